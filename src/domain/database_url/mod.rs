//! The place of a Postgres database, as libpq takes it: a URL (Postgres' documentation, 34.1.1.2) or keywords with values
//! (34.1.1.1).
//!
//! An unreadable text may contain a password with an unescaped character. So an error about it never repeats any part of
//! it, except names of known parameters.

mod read;

use std::fmt::{self, Write as _};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

/// Characters that stay as they are in a URL that is shown.
const SHOWN: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~')
    .remove(b'/');
/// The same before the name, where a slash ends the servers.
const SHOWN_HOST: &AsciiSet = &SHOWN.add(b'/');

/// The reason why a text does not name a database. It has no part of the text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Fault(String);

impl Fault {
    fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }
}

/// A server's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A name or an address.
    Host(String),
    /// The folder of a Unix socket.
    Socket(String),
}

/// A server of the list; absent values come from the environment or the platform.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Server {
    /// Its place.
    pub place: Option<Place>,
    /// Its port.
    pub port: Option<u16>,
}

/// Whether and how the connection is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SslMode {
    /// Never.
    Disable,
    /// If the server insists.
    Allow,
    /// If the server can.
    Prefer,
    /// Always, without checking who answers.
    Require,
    /// Always, with a server that an authority vouches for.
    VerifyCa,
    /// Always, with the very server that the host names.
    VerifyFull,
}

const SSL_MODES: [(&str, SslMode); 6] = [
    ("disable", SslMode::Disable),
    ("allow", SslMode::Allow),
    ("prefer", SslMode::Prefer),
    ("require", SslMode::Require),
    ("verify-ca", SslMode::VerifyCa),
    ("verify-full", SslMode::VerifyFull),
];

/// A database, as far as a text says where it is.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct DatabaseUrl {
    /// The servers, in the order in which they are tried; at least one.
    pub servers: Vec<Server>,
    /// The user.
    pub user: Option<String>,
    /// The password. Never shown.
    pub password: Option<String>,
    /// The database's name.
    pub database: Option<String>,
    /// `sslmode`
    pub ssl_mode: Option<SslMode>,
    /// `sslrootcert`, a file.
    pub ssl_root_cert: Option<String>,
    /// `sslrootcert=system`
    pub trusts_system: bool,
    /// `sslcert`, a file.
    pub ssl_cert: Option<String>,
    /// `sslkey`, a file.
    pub ssl_key: Option<String>,
    /// `options`, as a server's command line.
    pub options: Option<String>,
    /// `application_name`
    pub application_name: Option<String>,
    /// `passfile`
    pub passfile: Option<String>,
    /// `connect_timeout`, in seconds.
    pub connect_timeout: Option<u64>,
    /// Parameters that are taken and have no effect.
    pub unheeded: Vec<&'static str>,
}

impl fmt::Debug for DatabaseUrl {
    /// As it is shown: without the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown())
    }
}

impl DatabaseUrl {
    /// Reads a URL, or keywords with values.
    ///
    /// # Errors
    /// The text is neither, or asks for something that is not supported.
    pub fn parse(text: &str) -> Result<Self, Fault> {
        read::read(text)
    }

    /// Whether a password stands in it.
    #[must_use]
    pub const fn has_password(&self) -> bool {
        self.password.is_some()
    }

    /// The servers and the database, for logs.
    #[must_use]
    pub fn place(&self) -> String {
        let mut text = String::new();
        self.write_servers(&mut text, |host| host.to_owned());
        let _ = write!(text, "/{}", self.database.as_deref().unwrap_or_default());
        text
    }

    fn write_servers(&self, text: &mut String, form: impl Fn(&str) -> String) {
        for (index, server) in self.servers.iter().enumerate() {
            if index > 0 {
                text.push(',');
            }
            match &server.place {
                Some(Place::Host(host)) if host.contains(':') => {
                    let _ = write!(text, "[{host}]");
                }
                Some(Place::Host(host) | Place::Socket(host)) => text.push_str(&form(host)),
                None => {}
            }
            if let Some(port) = server.port {
                let _ = write!(text, ":{port}");
            }
        }
    }

    /// The same database as a URL, with dots for the password.
    #[must_use]
    pub fn shown(&self) -> String {
        let escaped = |text: &str| utf8_percent_encode(text, SHOWN).to_string();
        let mut text = "postgres://".to_owned();
        if let Some(user) = &self.user {
            text.push_str(&escaped(user));
        }
        if self.has_password() {
            text.push_str(":...");
        }
        if self.user.is_some() || self.has_password() {
            text.push('@');
        }
        self.write_servers(&mut text, |host| {
            utf8_percent_encode(host, SHOWN_HOST).to_string()
        });
        text.push('/');
        if let Some(database) = &self.database {
            text.push_str(&escaped(database));
        }
        let mode = |mode: SslMode| SSL_MODES.iter().find(|(_, it)| *it == mode);
        let ssl_mode = self
            .ssl_mode
            .and_then(mode)
            .map(|(name, _)| (*name).to_owned());
        let system = self.trusts_system.then(|| "system".to_owned());
        let timeout = self.connect_timeout.map(|seconds| seconds.to_string());
        let parameters = [
            ("sslmode", ssl_mode),
            ("sslrootcert", self.ssl_root_cert.clone().or(system)),
            ("sslcert", self.ssl_cert.clone()),
            ("sslkey", self.ssl_key.clone()),
            ("options", self.options.clone()),
            ("application_name", self.application_name.clone()),
            ("passfile", self.passfile.clone()),
            ("connect_timeout", timeout),
        ];
        let mut sign = '?';
        for (name, value) in parameters {
            if let Some(value) = value {
                let _ = write!(text, "{sign}{name}={}", escaped(&value));
                sign = '&';
            }
        }
        text
    }
}
