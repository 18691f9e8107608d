//! The parser of a database URL.

use percent_encoding::percent_decode_str;

use super::{DatabaseUrl, Fault, Place, SSL_MODES, Server, SslMode};

/// Characters that a password must not hold as they are.
const ESCAPE: &str =
    "in a user or password, write / as %2F, ? as %3F, @ as %40, : as %3A and % as %25";

/// Parameters that Postroad sets itself for every session, as bounds in time.
const UNHEEDED: [&str; 9] = [
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
    "tcp_user_timeout",
    "fallback_application_name",
    "client_encoding",
    "sslsni",
    "sslcompression",
];

/// The one value that a parameter may have where Postroad does nothing else.
const FIXED: [(&str, &[&str]); 6] = [
    ("gssencmode", &["disable", "prefer"]),
    ("channel_binding", &["disable", "prefer"]),
    ("sslnegotiation", &["postgres"]),
    ("load_balance_hosts", &["disable"]),
    ("target_session_attrs", &["any", "read-write", "primary"]),
    ("replication", &["false", "off", "no", "0"]),
];

/// Parameters that libpq or other drivers know, and Postroad does not.
const UNSUPPORTED: [&str; 21] = [
    "service",
    "servicefile",
    "sslpassword",
    "sslcrl",
    "sslcrldir",
    "sslcertmode",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
    "require_auth",
    "requirepeer",
    "krbsrvname",
    "gsslib",
    "gssdelegation",
    "min_protocol_version",
    "max_protocol_version",
    "scram_client_key",
    "scram_server_key",
    "pgbouncer",
    "schema",
    "connection_limit",
    "pool_timeout",
];

pub(super) fn read(text: &str) -> Result<DatabaseUrl, Fault> {
    let schemes = ["postgres://", "postgresql://"];
    let url = schemes.iter().find_map(|scheme| text.strip_prefix(scheme));
    let mut found = Found::default();
    match url {
        Some(rest) => found.read_url(rest)?,
        None if text.contains('=') && !text.contains("://") => found.read_keywords(text)?,
        None => {
            return Err(Fault::new(
                "it does not begin with postgres:// or postgresql://",
            ));
        }
    }
    found.finish()
}

/// The parameters of a text, before they are checked together.
#[derive(Default)]
struct Found {
    url: DatabaseUrl,
    /// Lists, one for each server.
    hosts: Option<String>,
    addresses: Option<String>,
    ports: Option<String>,
}

impl Found {
    /// Reads the text after the scheme. Like libpq, it looks for the end of user and password first.
    fn read_url(&mut self, rest: &str) -> Result<(), Fault> {
        let head = rest.find('/').map_or(rest, |slash| &rest[..slash]);
        let behind = match head.rfind('@') {
            None => rest,
            Some(at) => {
                let (user, password) = match head[..at].split_once(':') {
                    Some((user, password)) => (user, Some(password)),
                    None => (&head[..at], None),
                };
                self.set("user", decoded(user)?)?;
                if let Some(password) = password {
                    self.set("password", decoded(password)?)?;
                }
                &rest[at + 1..]
            }
        };
        let (behind, query) = match behind.split_once('?') {
            Some((before, query)) => (before, Some(query)),
            None => (behind, None),
        };
        let (servers, database) = match behind.split_once('/') {
            Some((servers, database)) => (servers, Some(database)),
            None => (behind, None),
        };
        if behind.contains('@') {
            return Err(Fault::new(format!(
                "it has an @ after the first /, perhaps because a password has an unescaped /: {ESCAPE}"
            )));
        }
        self.read_servers(servers)?;
        if let Some(database) = database.filter(|database| !database.is_empty()) {
            self.set("dbname", decoded(database)?)?;
        }
        let parameters = query.into_iter().flat_map(|query| query.split('&'));
        for (index, parameter) in parameters.enumerate() {
            let Some((name, value)) = parameter.split_once('=') else {
                return Err(Fault::new(format!(
                    "after its ?, part {} is not of the form name=value; {ESCAPE}",
                    index + 1
                )));
            };
            let (name, value) = (decoded(name)?, decoded(value)?);
            let known = self.set(&name, value)?;
            if !known {
                return Err(unknown(index));
            }
        }
        Ok(())
    }

    /// `host:5432,[::1],other`
    fn read_servers(&mut self, text: &str) -> Result<(), Fault> {
        if text.is_empty() {
            return Ok(());
        }
        let (mut hosts, mut ports) = (Vec::new(), Vec::new());
        for server in text.split(',') {
            let (host, port) = match server.strip_prefix('[') {
                Some(inside) => {
                    let (host, port) = inside.split_once(']').ok_or_else(|| {
                        Fault::new(format!("an address has a [ without a ]; {ESCAPE}"))
                    })?;
                    (host, port.strip_prefix(':').unwrap_or(port))
                }
                None => server.split_once(':').unwrap_or((server, "")),
            };
            hosts.push(decoded(host)?);
            ports.push(port);
        }
        self.hosts = Some(hosts.join(","));
        if ports.iter().any(|port| !port.is_empty()) {
            self.ports = Some(ports.join(","));
        }
        Ok(())
    }

    /// `host=here dbname='my base'`
    fn read_keywords(&mut self, text: &str) -> Result<(), Fault> {
        let mut rest = text.trim_start();
        let mut index = 0;
        while !rest.is_empty() {
            let (name, behind) = rest
                .split_once('=')
                .ok_or_else(|| Fault::new("it has a word that is not of the form name=value"))?;
            let (value, behind) = value(behind.trim_start())?;
            if !self.set(name.trim_end(), value)? {
                return Err(unknown(index));
            }
            rest = behind.trim_start();
            index += 1;
        }
        Ok(())
    }

    /// Takes a parameter; `false` if nobody knows its name.
    fn set(&mut self, name: &str, value: String) -> Result<bool, Fault> {
        let url = &mut self.url;
        if value.contains('\0') {
            return Err(Fault::new("it has the character U+0000"));
        }
        if value.is_empty() && name != "password" {
            // As if it were not there.
            return Ok(true);
        }
        match name {
            "host" => self.hosts = Some(value),
            "hostaddr" => self.addresses = Some(value),
            "port" => self.ports = Some(value),
            "user" => url.user = Some(value),
            "password" => url.password = Some(value),
            "dbname" => url.database = Some(value),
            "sslmode" => {
                let mode = SSL_MODES.iter().find(|(name, _)| *name == value);
                let (_, mode) = mode.ok_or_else(|| {
                    let known = SSL_MODES.map(|(name, _)| name).join(", ");
                    Fault::new(format!("its sslmode must be one of {known}"))
                })?;
                url.ssl_mode = Some(*mode);
            }
            // As JDBC says it, and libpq takes it.
            "ssl" if value == "true" => url.ssl_mode = Some(SslMode::Require),
            "sslrootcert" if value == "system" => url.trusts_system = true,
            "sslrootcert" => url.ssl_root_cert = Some(value),
            "sslcert" => url.ssl_cert = Some(value),
            "sslkey" => url.ssl_key = Some(value),
            "options" => url.options = Some(value),
            "application_name" => url.application_name = Some(value),
            "passfile" => url.passfile = Some(value),
            "connect_timeout" => {
                let seconds: i64 = value
                    .parse()
                    .map_err(|_| Fault::new("its connect_timeout is not a number of seconds"))?;
                // None is for ever to libpq; a connection attempt of Postroad's has a bound of its own.
                url.connect_timeout = u64::try_from(seconds).ok().filter(|&seconds| seconds > 0);
            }
            _ => return self.set_other(name, &value),
        }
        Ok(true)
    }

    fn set_other(&mut self, name: &str, value: &str) -> Result<bool, Fault> {
        if let Some((name, allowed)) = FIXED.iter().find(|(known, _)| *known == name) {
            return match allowed.contains(&value) {
                true => Ok(true),
                false => Err(Fault::new(format!(
                    "its {name} is not supported: Postroad supports {}",
                    allowed.join(" or ")
                ))),
            };
        }
        if let Some(name) = UNSUPPORTED.iter().find(|known| **known == name) {
            return Err(Fault::new(format!(
                "its parameter {name} is not supported: remove it"
            )));
        }
        let unheeded = UNHEEDED.iter().find(|known| **known == name);
        if let Some(name) = unheeded {
            self.url.unheeded.push(name);
        }
        Ok(unheeded.is_some())
    }

    /// Puts the lists together.
    fn finish(mut self) -> Result<DatabaseUrl, Fault> {
        // Where both are said, libpq connects to the address, and verifies the name.
        let verifies =
            matches!(self.url.ssl_mode, Some(SslMode::VerifyFull)) || self.url.trusts_system;
        if self.addresses.is_some() && self.hosts.is_some() && verifies {
            return Err(Fault::new(
                "it has both host and hostaddr, and asks to verify the host's name: leave hostaddr out",
            ));
        }
        let hosts = self.addresses.or(self.hosts).unwrap_or_default();
        let mut servers = Vec::new();
        for host in hosts.split(',') {
            let place = match host {
                "" => None,
                host if host.starts_with('/') => Some(Place::Socket(host.to_owned())),
                host if host.starts_with('@') => {
                    return Err(Fault::new("sockets without a file are not supported"));
                }
                host => Some(Place::Host(host.to_owned())),
            };
            servers.push(Server { place, port: None });
        }
        if let Some(ports) = &self.ports {
            let ports: Vec<&str> = ports.split(',').collect();
            if ports.len() != 1 && ports.len() != servers.len() {
                return Err(Fault::new(format!(
                    "it has {} ports for {} hosts",
                    ports.len(),
                    servers.len()
                )));
            }
            for (index, server) in servers.iter_mut().enumerate() {
                let port = ports
                    .get(index)
                    .or(ports.first())
                    .copied()
                    .unwrap_or_default();
                server.port = match port {
                    "" => None,
                    port => Some(port.parse().ok().filter(|&port| port > 0).ok_or_else(|| {
                        Fault::new(format!("a port is not a number from 1 to 65535; {ESCAPE}"))
                    })?),
                };
            }
        }
        self.url.servers = servers;
        let weak = self
            .url
            .ssl_mode
            .filter(|mode| *mode != SslMode::VerifyFull);
        if self.url.trusts_system && weak.is_some() {
            return Err(Fault::new(
                "sslrootcert=system needs sslmode=verify-full, or none",
            ));
        }
        Ok(self.url)
    }
}

/// A parameter whose name may be a part of a password, and is not repeated.
fn unknown(index: usize) -> Fault {
    Fault::new(format!(
        "its parameter {} has a name that Postgres does not know; {ESCAPE}",
        index + 1
    ))
}

/// A keyword's value, quoted or not, and the text after it.
fn value(text: &str) -> Result<(String, &str), Fault> {
    let is_quoted = text.starts_with('\'');
    let mut value = String::new();
    let mut letters = text.char_indices().skip(usize::from(is_quoted));
    while let Some((at, letter)) = letters.next() {
        match letter {
            '\\' => value.extend(letters.next().map(|(_, letter)| letter)),
            '\'' if is_quoted => return Ok((value, &text[at + 1..])),
            letter if letter.is_whitespace() && !is_quoted => return Ok((value, &text[at..])),
            letter => value.push(letter),
        }
    }
    match is_quoted {
        true => Err(Fault::new(
            "a value that begins with ' does not end with one",
        )),
        false => Ok((value, "")),
    }
}

fn decoded(text: &str) -> Result<String, Fault> {
    let is_escape = |rest: &str| {
        let digits = rest.as_bytes().get(..2);
        digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    };
    if text.split('%').skip(1).any(|rest| !is_escape(rest)) {
        return Err(Fault::new(format!(
            "a % in it is not followed by two hexadecimal digits; {ESCAPE}"
        )));
    }
    let decoded = percent_decode_str(text).decode_utf8();
    let decoded =
        decoded.map_err(|_| Fault::new("its text is not UTF-8 once each % is decoded"))?;
    Ok(decoded.into_owned())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn place(text: &str) -> String {
        DatabaseUrl::parse(text).unwrap().place()
    }

    #[test]
    fn what_libpq_takes_is_taken() {
        for (text, expected) in [
            ("postgres://", "/"),
            ("postgresql:///b", "/b"),
            ("postgres://h", "h/"),
            ("postgres://u@h:5433/b", "h:5433/b"),
            ("postgres://u@/b?host=/run/pg", "/run/pg/b"),
            ("postgres://u@/b?host=/run/pg&port=5433", "/run/pg:5433/b"),
            ("postgres://%2Frun%2Fpg/b", "/run/pg/b"),
            ("postgres://u@%2Frun%2Fpg:5433/b", "/run/pg:5433/b"),
            ("postgres://[::1]:5433/b", "[::1]:5433/b"),
            ("postgres://h1:1,h2:2/b", "h1:1,h2:2/b"),
            ("postgres://h1,h2:2/b", "h1,h2:2/b"),
            ("postgres://h1,h2/b?port=7", "h1:7,h2:7/b"),
            ("postgres://h/b%20c", "h/b c"),
            ("postgres://h/?dbname=x", "h/x"),
            ("postgres://h?user=u&dbname=x", "h/x"),
            ("postgres://h/b?hostaddr=10.0.0.1", "10.0.0.1/b"),
            ("host=h port=5 dbname=b", "h:5/b"),
            ("host = h  dbname = 'my b\\'s'", "h/my b's"),
            ("host=/run/pg user=u", "/run/pg/"),
            (
                "host=a,b port=1,2 target_session_attrs=read-write",
                "a:1,b:2/",
            ),
        ] {
            assert_eq!(place(text), expected, "{text}");
        }
        let all = "postgres://u:p%40@h/b?sslmode=verify-full&sslrootcert=system&options=-c%20geqo%3Doff\
                   &application_name=x&passfile=/f&connect_timeout=3&keepalives=1&channel_binding=prefer";
        let url = DatabaseUrl::parse(all).unwrap();
        assert_eq!(url.password.as_deref(), Some("p@"));
        assert_eq!(url.options.as_deref(), Some("-c geqo=off"));
        assert_eq!((url.connect_timeout, url.trusts_system), (Some(3), true));
        assert_eq!(url.unheeded, ["keepalives"]);
        let again = DatabaseUrl::parse(&url.shown().replace("...", "p%40")).unwrap();
        let unheeded = url.unheeded.clone();
        assert_eq!(DatabaseUrl { unheeded, ..again }, url);
        for (mode, expected) in SSL_MODES {
            let url = DatabaseUrl::parse(&format!("postgres://h/b?sslmode={mode}")).unwrap();
            assert_eq!(url.ssl_mode, Some(expected));
        }
    }

    #[test]
    fn signs_that_end_nothing_may_stand_in_a_password() {
        for (text, password) in [
            ("postgres://u:a:b@h/b", "a:b"),
            ("postgres://u:a#b@h/b", "a#b"),
            ("postgres://u:a?b@h/b", "a?b"),
            ("postgres://u:a@b@h/b", "a@b"),
            ("postgres://u:a+b@h/b", "a+b"),
            ("postgres://u:%2F%3F@h/b", "/?"),
            ("host=h password='a b'", "a b"),
            ("host=h password=a/@b", "a/@b"),
        ] {
            let url = DatabaseUrl::parse(text).unwrap();
            assert_eq!(url.password.as_deref(), Some(password), "{text}");
            assert_eq!(url.servers[0].place, Some(Place::Host("h".to_owned())));
            let shown = format!("{} {url:?} {}", url.shown(), url.place());
            assert!(!shown.contains(password), "{shown}");
        }
    }

    #[test]
    fn what_is_refused_is_explained_and_never_repeated() {
        for (text, expected) in [
            ("postgres://u:12/s3cret@h:5/b", "has an unescaped /"),
            ("postgres://u:s3cret/x@h/b", "unescaped"),
            ("postgres://u:p@s3cret/x@h/b", "has an unescaped /"),
            ("postgres://u:s3cret@h:5x/b", "a port is not a number"),
            ("postgres://u:s3cret@h:0/b", "a port is not a number"),
            (
                "postgres://u:s3cret%@h/b",
                "not followed by two hexadecimal digits",
            ),
            ("postgres://u:s3cret%FF@h/b", "not UTF-8"),
            ("postgres://u:s3cret%00@h/b", "the character U+0000"),
            (
                "postgres://h/b?password=a&s3cret",
                "part 2 is not of the form name=value",
            ),
            (
                "postgres://h/b?password=a&s3cret=x",
                "its parameter 2 has a name",
            ),
            (
                "postgres://h/b?sslmode=s3cret",
                "its sslmode must be one of disable",
            ),
            (
                "postgres://h/b?connect_timeout=s3cret",
                "not a number of seconds",
            ),
            (
                "postgres://h/b?channel_binding=require",
                "channel_binding is not supported",
            ),
            (
                "postgres://h/b?target_session_attrs=standby",
                "supports any or read-write or primary",
            ),
            (
                "postgres://h/b?pgbouncer=true",
                "its parameter pgbouncer is not supported",
            ),
            (
                "postgres://h/b?service=s3cret",
                "its parameter service is not supported",
            ),
            (
                "postgres://h/b?sslmode=require&sslrootcert=system",
                "needs sslmode=verify-full",
            ),
            (
                "postgres://h1,h2:1,h3/b?port=1,2",
                "it has 2 ports for 3 hosts",
            ),
            ("postgres://[::1/b", "a [ without a ]"),
            ("mysql://u:s3cret@h/b", "does not begin with postgres://"),
            ("s3cret", "does not begin with postgres://"),
            ("host=h password='s3cret", "does not end with one"),
            ("host=h s3cret", "not of the form name=value"),
            ("host=h s3cret=1", "its parameter 2 has a name"),
        ] {
            let fault = DatabaseUrl::parse(text).unwrap_err().to_string();
            assert!(fault.contains(expected), "{text}: {fault}");
            assert!(!fault.contains("s3cret"), "{text}: {fault}");
        }
    }
}
