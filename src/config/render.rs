//! The configuration for people: the table of the documentation, and the settings in effect.

use std::fmt::Write as _;

use super::{Config, KEYS, LogFormat, UrlFrom};
use crate::domain::database_url::DatabaseUrl;

/// The table of docs/configuration.md.
#[must_use]
pub fn markdown_table() -> String {
    let mut text = String::from(
        "| in the file | variable | flag | default | must be | what it is for |\n| --- | --- | --- | --- | --- | --- |\n",
    );
    for key in KEYS {
        let default = match key.default {
            "" => String::new(),
            default => format!("`{default}`"),
        };
        let _ = writeln!(
            text,
            "| `{}` | `{}` | `--{}` | {default} | {} | {} |",
            key.name,
            key.variable(),
            key.flag(),
            key.allowed,
            key.about
        );
    }
    text
}

/// The settings in effect, as a file could state them, each line with its source. Shows no password.
#[must_use]
pub fn effective(config: &Config) -> String {
    let mut text = String::new();
    for (key, source) in KEYS.iter().zip(&config.sources) {
        let value = value(config, key.name);
        let _ = match value {
            Some(value) => writeln!(text, "{} = {value}  # {source}", key.name),
            None => writeln!(text, "# {} is not set", key.name),
        };
    }
    for origin in &config.origins {
        let from = match &origin.url_from {
            UrlFrom::Variable(name) => format!("url_env = {name:?}"),
            UrlFrom::File(path) => format!("url_file = {:?}", path.display().to_string()),
        };
        let _ = writeln!(text, "\n[origins.{:?}]\n{from}", origin.name.as_str());
        if let Some(mapping) = &origin.mapping {
            let _ = writeln!(
                text,
                "table = {:?}\npickup = {:?}\ndelete_relayed = {}",
                mapping.table.to_string(),
                mapping.pickup.as_str(),
                mapping.deletes_relayed
            );
        }
    }
    let tables = [
        ("streams", names(&config.streams)),
        ("topics", names(&config.topics)),
        ("queues", names(&config.queues)),
    ];
    for (kind, names) in tables {
        if !names.is_empty() {
            let _ = writeln!(text, "\n# declared {kind}: {}", names.join(", "));
        }
    }
    text
}

fn names<Name: ToString>(declared: &[super::Declared<Name>]) -> Vec<String> {
    declared.iter().map(|(name, _)| name.to_string()).collect()
}

fn value(config: &Config, name: &str) -> Option<String> {
    let quoted = |text: &str| format!("{text:?}");
    let path = |path: &std::path::PathBuf| quoted(&path.display().to_string());
    match name {
        "bind" => Some(quoted(&config.bind.to_string())),
        "advertise_url" => config.advertise_url.as_deref().map(quoted),
        "allowed_hosts" => {
            (!config.allowed_hosts.is_empty()).then(|| quoted(&config.allowed_hosts.join(",")))
        }
        "node_secret" => config.node_secret.as_ref().map(|_| quoted("...")),
        "database_url" => config
            .database_url
            .as_deref()
            .map(|url| DatabaseUrl::parse(url).map_or_else(|_| "…".to_owned(), |url| url.shown()))
            .map(|url| quoted(&url)),
        "data_dir" => config.data_dir.as_ref().map(path),
        "postgres_bin" => config.postgres_bin.as_ref().map(path),
        "database_pool_size" => Some(config.database_pool_size.to_string()),
        "allow_unsafe_postgres" => Some(config.allow_unsafe_postgres.to_string()),
        "log_format" => Some(quoted(match config.log_format {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        })),
        "log_level" => Some(quoted(&config.log_level)),
        "node_ttl_seconds" => Some(config.node_ttl.as_secs_f64().to_string()),
        "node_heartbeat_seconds" => Some(config.node_heartbeat.as_secs_f64().to_string()),
        "outbox_grace_seconds" => Some(config.outbox_grace.as_secs_f64().to_string()),
        "message_max_bytes" => Some(config.message_max_bytes.to_string()),
        "connections_max" => Some(config.connections_max.to_string()),
        "http_memory_bytes" => config.http_memory_bytes.map(|bytes| bytes.to_string()),
        "keep_alive_seconds" => Some(config.keep_alive.as_secs_f64().to_string()),
        "stream_cache_bytes" => Some(config.stream_cache_bytes.to_string()),
        "lame_duck_seconds" => Some(config.lame_duck.as_secs_f64().to_string()),
        "shutdown_seconds" => Some(config.shutdown.as_secs_f64().to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effective_configuration_shows_every_key_and_no_password() {
        let config = Config {
            database_url: Some("postgres://u:hunter2@h/d?password=hunter2".to_owned()),
            ..Config::default()
        };
        let text = effective(&config);
        for key in KEYS {
            assert!(text.contains(key.name), "{}", key.name);
            let is_shown = value(&config, key.name).is_some();
            assert_eq!(
                is_shown,
                !key.default.is_empty() || key.name == "database_url",
                "{}",
                key.name
            );
        }
        assert!(!text.contains("hunter2"), "{text}");
    }
}
