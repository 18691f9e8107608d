//! Combines the layers of the configuration.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Map, Value};

use super::{
    Config, Declared, Environment, Error, Fault, Flags, KEYS, Key, fault::unknown, origin,
};
use crate::domain::database_url::DatabaseUrl;
use crate::failpoint;

/// The file that is read when none is named.
const DEFAULT_FILE: &str = "postroad.toml";
/// Origins, where there is no file.
const ORIGINS_VARIABLE: &str = "POSTROAD_ORIGINS";
/// The tables of the file.
const TABLES: [&str; 4] = ["origins", "streams", "topics", "queues"];

struct Loader<'a> {
    environment: &'a Environment,
    config: Config,
    faults: Vec<Fault>,
}

/// Reads the file, the variables and the flags.
///
/// # Errors
/// The file cannot be read or is not TOML; or everything that is wrong in any layer.
pub fn load(flags: &Flags, environment: &Environment) -> Result<Config, Error> {
    let mut loader = Loader {
        environment,
        config: Config::default(),
        faults: Vec::new(),
    };
    loader.file(flags)?;
    loader.variables();
    for (place, key) in KEYS.iter().enumerate() {
        if let Some(text) = flags.values.get(key.name) {
            let flag = format!("--{}", key.flag());
            loader.set(place, key, text, &flag);
            loader.config.warnings.extend(exposed(key, text, &flag));
        }
    }
    loader.check_together();
    loader.note_database_url();
    loader.note_bind();
    if loader.faults.is_empty() {
        Ok(loader.config)
    } else {
        Err(Error::Invalid(loader.faults))
    }
}

impl Loader<'_> {
    fn set(&mut self, place: usize, key: &Key, text: &str, source: &str) {
        if key.set(&mut self.config, text).is_some() {
            source.clone_into(&mut self.config.sources[place]);
            return;
        }
        let value = if key.is_secret { "…" } else { text };
        let mut what = format!("is `{value}`, and must be {}", key.allowed);
        if let Some(why) = key.why_not(text) {
            what = format!("{what}: {why}");
        }
        self.fault(source, key.name, what);
    }

    fn fault(&mut self, source: &str, key: &str, what: String) {
        self.faults.push(Fault {
            source: source.to_owned(),
            key: key.to_owned(),
            what,
        });
    }

    fn file(&mut self, flags: &Flags) -> Result<(), Error> {
        let named = flags
            .file
            .clone()
            .or_else(|| self.environment.get("POSTROAD_CONFIG").map(PathBuf::from));
        let path = named.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_FILE));
        let shown = path.display().to_string();
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(());
            }
            Err(source) => {
                return Err(Error::Read {
                    path: shown,
                    source,
                });
            }
        };
        let table: toml::Table = toml::from_str(&text).map_err(|error| Error::Syntax {
            path: shown.clone(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        for (name, value) in &table {
            self.file_entry(&shown, name, value);
        }
        Ok(())
    }

    fn file_entry(&mut self, file: &str, name: &str, value: &toml::Value) {
        if TABLES.contains(&name) {
            match value.as_table() {
                Some(entries) => self.file_table(file, name, entries),
                None => self.fault(
                    file,
                    name,
                    format!("must be written as tables, like [{name}.some-name]"),
                ),
            }
            return;
        }
        let Some((place, key)) = KEYS.iter().enumerate().find(|(_, key)| key.name == name) else {
            let known = KEYS.iter().map(|key| key.name).chain(TABLES);
            let what = unknown(name, known);
            return self.fault(file, name, what);
        };
        let text = match value {
            toml::Value::String(text) => text.clone(),
            toml::Value::Integer(number) => number.to_string(),
            toml::Value::Float(number) => number.to_string(),
            toml::Value::Boolean(value) => value.to_string(),
            toml::Value::Array(texts) if key.is_list() && texts.iter().all(toml::Value::is_str) => {
                let texts: Vec<&str> = texts.iter().filter_map(toml::Value::as_str).collect();
                texts.join(",")
            }
            other => {
                let what = format!(
                    "is of type {}, and must be {}",
                    other.type_str(),
                    key.allowed
                );
                return self.fault(file, name, what);
            }
        };
        if key.holds_secret(&text) {
            let what = format!("holds a secret, and must be {}", key.allowed);
            return self.fault(file, name, what);
        }
        self.set(place, key, &text, file);
    }

    fn file_table(&mut self, file: &str, kind: &str, entries: &toml::Table) {
        for (name, value) in entries {
            let key = format!("{kind}.{name}");
            let Some(table) = value.as_table() else {
                self.fault(file, &key, format!("must be a table, [{key}]"));
                continue;
            };
            match kind {
                "origins" => match origin::read(file, name, table, self.environment) {
                    Ok(origin) => self.config.origins.push(origin),
                    Err(fault) => self.faults.push(fault),
                },
                "streams" => match declared(name, table) {
                    Ok(stream) => self.config.streams.push(stream),
                    Err(what) => self.fault(file, &key, what),
                },
                "topics" => match declared(name, table) {
                    Ok(topics) => self.config.topics.push(topics),
                    Err(what) => self.fault(file, &key, what),
                },
                _ => match declared(name, table) {
                    Ok(queue) => self.config.queues.push(queue),
                    Err(what) => self.fault(file, &key, what),
                },
            }
        }
    }

    fn variables(&mut self) {
        for (place, key) in KEYS.iter().enumerate() {
            let mut names = vec![key.variable()];
            if key.name == "database_url" {
                names.push("DATABASE_URL".to_owned());
            }
            let found = names
                .into_iter()
                .find_map(|name| Some((self.environment.get(&name)?.to_owned(), name)));
            if let Some((text, name)) = found {
                self.set(place, key, &text, &name);
            }
        }
        self.origins_variable();
        // Not a fault: Kubernetes makes variables of the names of services, and one may be named postroad.
        let known: Vec<String> = KEYS
            .iter()
            .map(Key::variable)
            .chain(["POSTROAD_CONFIG".to_owned(), ORIGINS_VARIABLE.to_owned()])
            .collect();
        for name in self.environment.0.keys() {
            if failpoint::VARIABLES.contains(&name.as_str()) {
                continue;
            }
            if name.starts_with("POSTROAD_") && !known.contains(name) && !self.is_origins(name) {
                let what = unknown(name, known.iter().map(String::as_str));
                self.config
                    .warnings
                    .push(format!("the environment variable {name} {what}"));
            }
        }
    }

    /// Origins as one JSON object, each as its table in the file would be. One of the same name stands in the file's place.
    fn origins_variable(&mut self) {
        let Some(text) = self.environment.get(ORIGINS_VARIABLE) else {
            return;
        };
        let parsed: Result<BTreeMap<String, toml::Table>, _> = serde_json::from_str(text);
        let origins = match parsed {
            Ok(origins) => origins,
            Err(error) => {
                let what = format!(
                    "must be a JSON object of origins, like {{\"shop\": {{\"url_env\": \"SHOP_URL\"}}}}: {error}"
                );
                return self.fault(ORIGINS_VARIABLE, "origins", what);
            }
        };
        for (name, table) in origins {
            match origin::read(ORIGINS_VARIABLE, &name, &table, self.environment) {
                Ok(origin) => {
                    let others = &mut self.config.origins;
                    others.retain(|other| other.name != origin.name);
                    others.push(origin);
                }
                Err(fault) => self.faults.push(fault),
            }
        }
    }

    fn is_origins(&self, variable: &str) -> bool {
        self.config.origins.iter().any(
            |origin| matches!(&origin.url_from, super::UrlFrom::Variable(name) if name == variable),
        )
    }

    fn note_database_url(&mut self) {
        let url = self.config.database_url.as_deref();
        let url = url.and_then(|url| DatabaseUrl::parse(url).ok());
        let unheeded = url.map(|url| url.unheeded).unwrap_or_default();
        if !unheeded.is_empty() {
            self.config.warnings.push(format!(
                "these parameters of the database URL have no effect: {}. Postroad sets its own limits for statements and sessions",
                unheeded.join(", ")
            ));
        }
    }

    fn note_bind(&mut self) {
        let bind = self.config.bind;
        if !bind.ip().is_loopback() {
            let pages = match self.config.allowed_hosts.is_empty() {
                true => {
                    ". Set allowed_hosts as well, so that no web page under a name of its own can read from it (DNS rebinding)"
                }
                false => "",
            };
            self.config.warnings.push(format!(
                "other machines can reach the API at {bind}, which has no login: anyone who reaches it may publish, receive, seek, \
                 purge and delete. Restrict access with a private network, a firewall, or a proxy with authentication{pages}"
            ));
        }
    }

    fn check_together(&mut self) {
        let Config {
            node_ttl,
            node_heartbeat,
            ..
        } = self.config;
        if node_heartbeat * 3 > node_ttl && self.faults.is_empty() {
            let what = format!(
                "is {}, and must be at most a third of node_ttl_seconds, which is {}: otherwise one late heartbeat makes a node count as dead",
                node_heartbeat.as_secs_f64(),
                node_ttl.as_secs_f64()
            );
            self.fault("configuration", "node_heartbeat_seconds", what);
        }
    }
}

/// A warning about a secret on the command line, which anyone who lists the machine's processes can read.
pub(super) fn exposed(key: &Key, text: &str, flag: &str) -> Option<String> {
    key.holds_secret(text).then(|| {
        format!(
            "everyone on this machine can read the secret in {flag} in the process list: set {} instead, or name a file with {}_file",
            key.variable(),
            key.name
        )
    })
}

/// A declared stream or queue. Its body is checked by what checks the API's.
fn declared<Name>(name: &str, table: &toml::Table) -> Result<Declared<Name>, String>
where
    Name: std::str::FromStr<Err = crate::domain::name::Error>,
{
    let name: Name = name
        .parse()
        .map_err(|error: crate::domain::name::Error| error.to_string())?;
    match json(&toml::Value::Table(table.clone())) {
        Value::Object(body) => Ok((name, body)),
        _ => Ok((name, Map::new())),
    }
}

fn json(value: &toml::Value) -> Value {
    match value {
        toml::Value::String(text) => Value::from(text.as_str()),
        toml::Value::Integer(number) => Value::from(*number),
        toml::Value::Float(number) => Value::from(*number),
        toml::Value::Boolean(value) => Value::from(*value),
        // In the API a time is text.
        toml::Value::Datetime(time) => Value::from(time.to_string()),
        toml::Value::Array(values) => values.iter().map(json).collect(),
        toml::Value::Table(table) => Value::Object(
            table
                .iter()
                .map(|(name, value)| (name.clone(), json(value)))
                .collect(),
        ),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn with_file(text: &str, environment: &Environment) -> Result<Config, Error> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let flags = Flags {
            file: Some(file.path().to_owned()),
            ..Flags::default()
        };
        load(&flags, environment)
    }

    fn fault(text: &str) -> String {
        match with_file(text, &Environment::default()).unwrap_err() {
            Error::Invalid(faults) => faults
                .iter()
                .map(|fault| format!("`{}` {}", fault.key, fault.what))
                .collect::<Vec<_>>()
                .join("\n"),
            other => other.to_string(),
        }
    }

    #[test]
    fn every_default_is_allowed() {
        let config = Config::default();
        assert_eq!(config.bind.port(), 8080);
        assert_eq!(config.outbox_grace.as_secs(), 600);
    }

    #[test]
    fn flags_beat_variables_beat_the_file_beats_defaults() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(
            file,
            "bind = '127.0.0.1:1'\nlog_level = 'warn'\nshutdown_seconds = 3"
        )
        .unwrap();
        let environment = Environment::from([
            ("POSTROAD_BIND", "127.0.0.1:2"),
            ("POSTROAD_LOG_LEVEL", "debug"),
            ("POSTROAD_CONFIG", file.path().to_str().unwrap()),
        ]);
        let mut flags = Flags::default();
        flags.values.insert("bind", "127.0.0.1:3".to_owned());
        let config = load(&flags, &environment).unwrap();
        assert_eq!(config.bind.port(), 3);
        assert_eq!(config.log_level, "debug");
        assert_eq!(config.shutdown.as_secs(), 3);
        assert_eq!(config.database_pool_size, 16);
    }

    #[test]
    fn what_is_wrong_is_named_with_what_is_allowed() {
        for (text, expected) in [
            (
                "bind = 'here'",
                "`bind` is `here`, and must be an address and port",
            ),
            ("bnd = 'x'", "`bnd` is not a key; did you mean `bind`?"),
            (
                "log_format = 'xml'",
                "`log_format` is `xml`, and must be text or json",
            ),
            ("log_level = 'loud=='", "`log_level` is `loud==`"),
            (
                "outbox_grace_seconds = 0",
                "`outbox_grace_seconds` is `0`, and must be seconds from 1",
            ),
            ("bind = [1]", "`bind` is of type array"),
            (
                "allowed_hosts = ['a', 'b:80']",
                "`allowed_hosts` is `a,b:80`",
            ),
            (
                "node_ttl_seconds = 2",
                "at most a third of node_ttl_seconds, which is 2",
            ),
            (
                "streams = 1",
                "`streams` must be written as tables, like [streams.some-name]",
            ),
            ("[streams.'a b']", "`streams.a b` has the character ` `"),
            ("[origins.shop]", "`origins.shop` needs one of url_env"),
            (
                "[origins.local]\nurl_env = 'X'",
                "is the broker's own database",
            ),
            (
                "[origins.shop]\nurl = 'postgres://x'",
                "`origins.shop.url` is not read from the configuration file",
            ),
            ("[origins.shop]\nurl_evn = 'X'", "did you mean `url_env`?"),
            (
                "[origins.shop]\nurl_env = 'NOT_SET'",
                "names the variable NOT_SET, which is not set",
            ),
            (
                "[origins.shop]\ntable = 'outbox'",
                "`origins.shop.pickup` is needed",
            ),
            (
                "[origins.shop]\ntable = 3",
                "`origins.shop.table` is of type integer",
            ),
            (
                "[origins.shop]\nlayout = 'debezium'\npickup = 'delete'\ncolumns = 'x'",
                "`origins.shop.columns` must be a table",
            ),
            (
                "[origins.shop]\nlayout = 'debezium'\npickup = 'delete'\n[origins.shop.columns]\nkey = '{a'",
                "`origins.shop.columns.key` has a `{` without",
            ),
            ("bind", "is not valid TOML"),
        ] {
            let found = fault(text);
            assert!(found.contains(expected), "{text}: {found}");
        }
        let two = fault("bind = 'x'\nlog_format = 'y'");
        assert_eq!(two.lines().count(), 2, "{two}");
    }

    #[test]
    fn a_password_is_neither_taken_from_the_file_nor_shown() {
        let found = fault("database_url = 'postgres://u:hunter2@h/d'");
        assert!(found.contains("holds a secret, and") && !found.contains("hunter2"));
        let environment = Environment::from([("DATABASE_URL", "mysql://u:hunter2@h/d")]);
        let error = load(&Flags::default(), &environment).unwrap_err();
        let text = format!("{error} {error:?}");
        assert!(text.contains("DATABASE_URL: `database_url`") && !text.contains("hunter2"));
    }

    #[test]
    fn declarations_and_origins_are_read() {
        let environment =
            Environment::from([("SHOP_URL", "postgres://u:p@h/d"), ("POSTROAD_BNID", "1")]);
        let text = "[origins.shop]\nurl_env = 'SHOP_URL'\n\
                    [streams.orders]\ntopics = ['orders.>']\n\
                    [queues.billing]\nstream = 'orders'\nmax_attempts = 3";
        let config = with_file(text, &environment).unwrap();
        assert_eq!(config.origins[0].url, "postgres://u:p@h/d");
        assert!(!format!("{config:?}").contains("u:p"));
        assert_eq!(config.streams[0].1["topics"][0], "orders.>");
        for (list, hosts) in [("[]", &[][..]), ("['a', '10.0.0.1']", &["a", "10.0.0.1"])] {
            let text = format!("allowed_hosts = {list}");
            let config = with_file(&text, &environment).unwrap();
            assert_eq!(config.allowed_hosts, hosts, "{list}");
        }
        assert_eq!(config.queues[0].1["max_attempts"], 3);
        assert!(config.warnings[0].contains("POSTROAD_BIND"));
    }

    #[test]
    fn mapped_origins_are_read_from_the_file_and_from_a_variable() {
        let json =
            r#"{"legacy": {"url_env": "SHOP_URL", "layout": "debezium", "pickup": "delete"}}"#;
        let environment = Environment::from([
            ("SHOP_URL", "postgres://u:p@h/d"),
            ("POSTROAD_ORIGINS", json),
        ]);
        let text = "[origins.shop]\nurl_env = 'SHOP_URL'\ntable = 'shop.events'\npickup = 'snapshot'\n\
                    delete_relayed = true\ncolumns = { id = '{id}', topic = 'orders.{kind}' }\n\
                    [origins.legacy]\nurl_env = 'SHOP_URL'";
        let config = with_file(text, &environment).unwrap();
        let [shop, legacy] = &config.origins[..] else {
            panic!("{:?}", config.origins);
        };
        let mapping = shop.mapping.as_ref().unwrap();
        assert_eq!(mapping.table.to_string(), "shop.events");
        assert!(mapping.deletes_relayed);
        let mapping = legacy.mapping.as_ref().unwrap();
        assert_eq!(mapping.table.to_string(), "outboxevent");
        assert!(config.warnings.is_empty(), "{:?}", config.warnings);
        let environment = Environment::from([("POSTROAD_ORIGINS", "[]")]);
        let error = load(&Flags::default(), &environment)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("must be a JSON object of origins"),
            "{error}"
        );
    }
}
