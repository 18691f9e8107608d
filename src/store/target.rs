//! The servers of a database, as the driver wants them. Each value comes from the URL, otherwise from libpq's variables,
//! otherwise from the defaults.
//!
//! The driver reads the variables itself (`PGHOST`, `PGUSER`, `PGSSLMODE`, …). Values of the URL are set over them.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use sqlx::postgres::{PgConnectOptions, PgSslMode};

use super::Error;
use crate::domain::database_url::{DatabaseUrl, Place, Server, SslMode};

/// The folders to search for Unix sockets when no host is named.
const SOCKET_FOLDERS: [&str; 2] = ["/var/run/postgresql", "/tmp"];

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// How to connect to each of the servers.
pub(in crate::store) fn targets(url: &DatabaseUrl) -> Result<Vec<PgConnectOptions>, Error> {
    // The driver would take its `system` for a file, and cannot be told to forget the other.
    match variable("PGSSLROOTCERT").as_deref() {
        _ if url.ssl_mode == Some(SslMode::Disable) => {}
        Some("system") => {
            let what = "PGSSLROOTCERT=system is not supported: set sslrootcert=system in the URL";
            return Err(Error::Variable(what));
        }
        Some(_) if url.trusts_system => {
            let what = "its sslrootcert=system and the variable PGSSLROOTCERT exclude each other";
            return Err(Error::Variable(what));
        }
        _ => {}
    }
    url.servers
        .iter()
        .map(|server| target(url, server))
        .collect()
}

fn target(url: &DatabaseUrl, server: &Server) -> Result<PgConnectOptions, Error> {
    let mut options = base(url.options.as_deref())?;
    if let Some(port) = server.port {
        options = options.port(port);
    }
    let named = || {
        let named = variable("PGHOSTADDR").or_else(|| variable("PGHOST"))?;
        Some(match named.starts_with('/') {
            true => Place::Socket(named),
            false => Place::Host(named),
        })
    };
    let place = server.place.clone().or_else(named);
    options = match place.unwrap_or_else(|| usual_place(options.get_port())) {
        Place::Host(host) => options.host(&host),
        Place::Socket(folder) => options.socket(folder).host("localhost"),
    };
    if let Some(user) = &url.user {
        options = options.username(user);
    }
    if let Some(database) = &url.database {
        options = options.database(database);
    }
    if let Some(name) = &url.application_name {
        options = options.application_name(name);
    }
    options = encrypted(options, url);
    let password = url.password.clone().or_else(|| variable("PGPASSWORD"));
    let password = password.or_else(|| filed_password(url.passfile.as_deref(), &options));
    Ok(match password {
        Some(password) => options.password(&password),
        None => options,
    })
}

/// The variables' parameters, with options of the server's command line besides, which can be had by a URL alone.
fn base(options: Option<&str>) -> Result<PgConnectOptions, Error> {
    let Some(options) = options else {
        return Ok(PgConnectOptions::new_without_pgpass());
    };
    let options = utf8_percent_encode(options, NON_ALPHANUMERIC);
    // A password, so that no file is looked into. An empty one is none.
    let url = format!("postgres://:x@localhost/?options={options}");
    let options: PgConnectOptions = url.parse().map_err(Error::Connect)?;
    Ok(options.password(""))
}

fn usual_place(port: u16) -> Place {
    let is_there = |folder: &&&str| Path::new(folder).join(format!(".s.PGSQL.{port}")).exists();
    match SOCKET_FOLDERS.iter().find(is_there) {
        Some(folder) => Place::Socket((*folder).to_owned()),
        None => Place::Host("localhost".to_owned()),
    }
}

fn encrypted(mut options: PgConnectOptions, url: &DatabaseUrl) -> PgConnectOptions {
    let mode = match url.ssl_mode {
        _ if url.trusts_system => Some(PgSslMode::VerifyFull),
        Some(SslMode::Disable) => Some(PgSslMode::Disable),
        // The driver never encrypts for `allow`. Encrypted if the server can is what may be, too.
        Some(SslMode::Allow | SslMode::Prefer) => Some(PgSslMode::Prefer),
        // With an authority's certificate it is verified, as libpq does.
        Some(SslMode::Require) if url.ssl_root_cert.is_some() => Some(PgSslMode::VerifyCa),
        Some(SslMode::Require) => Some(PgSslMode::Require),
        Some(SslMode::VerifyCa) => Some(PgSslMode::VerifyCa),
        Some(SslMode::VerifyFull) => Some(PgSslMode::VerifyFull),
        None => None,
    };
    if let Some(mode) = mode {
        options = options.ssl_mode(mode);
    }
    if let Some(file) = &url.ssl_root_cert {
        options = options.ssl_root_cert(file);
    }
    if let Some(file) = &url.ssl_cert {
        options = options.ssl_client_cert(file);
    }
    if let Some(file) = &url.ssl_key {
        options = options.ssl_client_key(file);
    }
    // A socket of this machine is not encrypted, whatever is asked for.
    match options.get_socket().is_some() {
        true => options.ssl_mode(PgSslMode::Disable),
        false => options,
    }
}

/// The password of the first line that fits in the file of passwords. (The driver has this too, and logs lines that it cannot read.)
fn filed_password(named: Option<&str>, options: &PgConnectOptions) -> Option<String> {
    let path = match named
        .map(PathBuf::from)
        .or_else(|| variable("PGPASSFILE").map(PathBuf::from))
    {
        Some(path) => path,
        None => PathBuf::from(variable("HOME")?).join(".pgpass"),
    };
    let file = File::open(&path).ok()?;
    let metadata = file.metadata().ok()?;
    if !metadata.is_file() {
        return None;
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        tracing::warn!(file = %path.display(), "ignoring the password file because others can read it: run chmod 600");
        return None;
    }
    let port = options.get_port().to_string();
    let database = options.get_database().unwrap_or(options.get_username());
    let wanted = [options.get_host(), &port, database, options.get_username()];
    let mut lines = BufReader::new(file).lines().map_while(Result::ok);
    lines.find_map(|line| password_of(&line, wanted))
}

/// The password of a line `host:port:database:user:password`, if the line is for these.
fn password_of(line: &str, wanted: [&str; 4]) -> Option<String> {
    if line.starts_with('#') {
        return None;
    }
    let mut fields = vec![String::new()];
    let mut letters = line.chars();
    while let Some(letter) = letters.next() {
        let letter = match letter {
            ':' if wanted.len() >= fields.len() => {
                fields.push(String::new());
                continue;
            }
            '\\' => letters.next().unwrap_or('\\'),
            letter => letter,
        };
        fields.last_mut()?.push(letter);
    }
    let password = fields.pop().filter(|_| fields.len() == wanted.len())?;
    let fits = |(field, wanted): (&String, &str)| field == "*" || field == wanted;
    fields.iter().zip(wanted).all(fits).then_some(password)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_file_of_passwords_is_for_one_place() {
        let wanted = ["localhost", "5432", "b", "u"];
        for (line, expected) in [
            ("localhost:5432:b:u:secret", Some("secret")),
            ("*:*:*:*:a\\:b\\\\c", Some("a:b\\c")),
            ("*:*:*:u:with:colon", Some("with:colon")),
            ("localhost:5433:b:u:secret", None),
            ("#*:*:*:*:secret", None),
            ("secret", None),
            ("", None),
        ] {
            assert_eq!(password_of(line, wanted).as_deref(), expected, "{line}");
        }
    }

    #[test]
    fn the_driver_is_told_what_the_url_says() {
        let all = |text: &str| targets(&DatabaseUrl::parse(text).unwrap()).unwrap();
        let [one, two] =
            &all("postgres://u@h1:1,h2:2/b?sslmode=require&options=-c%20geqo%3Doff")[..]
        else {
            panic!("there are two");
        };
        assert_eq!((one.get_host(), one.get_port()), ("h1", 1));
        assert_eq!((two.get_host(), two.get_port()), ("h2", 2));
        assert!(matches!(one.get_ssl_mode(), PgSslMode::Require));
        assert!(one.get_options().unwrap().ends_with("-c geqo=off"));
        let socket = &all("postgres://u@/b?host=/run/x&sslmode=require")[0];
        assert_eq!(socket.get_socket(), Some(&PathBuf::from("/run/x")));
        assert!(matches!(socket.get_ssl_mode(), PgSslMode::Disable));
        let verified = &all("postgres://h/b?sslmode=require&sslrootcert=/ca.pem")[0];
        assert!(matches!(verified.get_ssl_mode(), PgSslMode::VerifyCa));
        let system = &all("postgres://h/b?sslrootcert=system")[0];
        assert!(matches!(system.get_ssl_mode(), PgSslMode::VerifyFull));
    }
}
