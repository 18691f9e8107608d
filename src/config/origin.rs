//! Origins other than `local`: a name, the place of the URL, and the table to read where the outbox is not Postroad's own.
//! The URL itself is never part of the configuration file, so the file holds no password.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::{Environment, Fault, fault::unknown, keys::postgres_url};
use crate::domain::mapping::{Draft, Mapping};
use crate::domain::name::OriginName;

/// The source of an origin's URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UrlFrom {
    /// An environment variable of this name.
    Variable(String),
    /// A file that holds nothing else.
    File(PathBuf),
}

/// An origin of the configuration.
#[derive(Clone, PartialEq, Eq)]
pub struct Origin {
    /// Its name.
    pub name: OriginName,
    /// The source of the URL.
    pub url_from: UrlFrom,
    /// The URL as read at start. Can hold a password: not shown.
    pub url: String,
    /// A table that is there already and is read in place of the outbox.
    pub mapping: Option<Mapping>,
}

impl std::fmt::Debug for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Origin")
            .field("name", &self.name)
            .field("url_from", &self.url_from)
            .field("mapping", &self.mapping)
            .finish_non_exhaustive()
    }
}

/// Reads `[origins.<name>]`.
pub(super) fn read(
    file: &str,
    name: &str,
    table: &toml::Table,
    environment: &Environment,
) -> Result<Origin, Fault> {
    let fault = |key: &str, what: String| Fault {
        source: file.to_owned(),
        key: format!("origins.{name}{key}"),
        what,
    };
    let parsed = OriginName::parse(name).map_err(|error| fault("", error.to_string()))?;
    if parsed == OriginName::local() {
        return Err(fault(
            "",
            "is the broker's own database, which is always an origin".to_owned(),
        ));
    }
    let known = [
        "url_env",
        "url_file",
        "layout",
        "table",
        "pickup",
        "delete_relayed",
        "columns",
        "extensions",
    ];
    if let Some(key) = table.keys().find(|key| !known.contains(&key.as_str())) {
        let what = if key == "url" {
            "is not read from the configuration file, which would then hold the password: name a variable with url_env, or a file with url_file".to_owned()
        } else {
            unknown(key, known.into_iter())
        };
        return Err(fault(&format!(".{key}"), what));
    }
    let mapping = mapping(&parsed, table).map_err(|(key, what)| fault(&format!(".{key}"), what))?;
    let text = |key: &str| table.get(key).and_then(toml::Value::as_str);
    let (url_from, key, found) = match (text("url_env"), text("url_file")) {
        (Some(variable), None) => {
            let found = environment.get(variable).map(ToOwned::to_owned);
            let found =
                found.ok_or_else(|| format!("names the variable {variable}, which is not set"));
            (UrlFrom::Variable(variable.to_owned()), ".url_env", found)
        }
        (None, Some(path)) => {
            let found = std::fs::read_to_string(path)
                .map(|text| text.trim().to_owned())
                .map_err(|error| format!("names the file {path}, which cannot be read: {error}"));
            (UrlFrom::File(PathBuf::from(path)), ".url_file", found)
        }
        _ => {
            let what = "needs one of url_env, the name of a variable, and url_file, the path of a file, as text";
            return Err(fault("", what.to_owned()));
        }
    };
    let url = found.map_err(|what| fault(key, what))?;
    let url = postgres_url(&url).map_err(|why| {
        let what = format!(
            "does not lead to a URL like postgres://user:password@host:5432/database: {why}"
        );
        fault(key, what)
    })?;
    Ok(Origin {
        name: parsed,
        url_from,
        url,
        mapping,
    })
}

/// Reads what makes an origin a mapped one, if anything does.
fn mapping(origin: &OriginName, table: &toml::Table) -> Result<Option<Mapping>, (String, String)> {
    let is_mapped = table
        .keys()
        .any(|key| !matches!(key.as_str(), "url_env" | "url_file"));
    if !is_mapped {
        return Ok(None);
    }
    let text = |key: &str| match table.get(key) {
        None => Ok(None),
        Some(toml::Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err((
            key.to_owned(),
            format!("is of type {}, and must be text", other.type_str()),
        )),
    };
    let delete_relayed = match table.get("delete_relayed") {
        None => None,
        Some(toml::Value::Boolean(value)) => Some(*value),
        Some(_) => {
            return Err((
                "delete_relayed".to_owned(),
                "must be true or false".to_owned(),
            ));
        }
    };
    let draft = Draft {
        layout: text("layout")?,
        table: text("table")?,
        pickup: text("pickup")?,
        delete_relayed,
        columns: texts(table, "columns")?,
        extensions: texts(table, "extensions")?,
    };
    let finished = draft.finish(origin);
    finished.map(Some).map_err(|fault| (fault.key, fault.what))
}

/// A table of texts.
fn texts(table: &toml::Table, key: &str) -> Result<BTreeMap<String, String>, (String, String)> {
    let Some(value) = table.get(key) else {
        return Ok(BTreeMap::new());
    };
    let wrong = |key: String| {
        let what = "must be text, in which {column} stands for the value of a column";
        (key, what.to_owned())
    };
    let Some(entries) = value.as_table() else {
        let what = format!("must be a table, like {key} = {{ topic = \"orders.{{kind}}\" }}");
        return Err((key.to_owned(), what));
    };
    let mut texts = BTreeMap::new();
    for (name, value) in entries {
        let text = value
            .as_str()
            .ok_or_else(|| wrong(format!("{key}.{name}")))?;
        texts.insert(name.clone(), text.to_owned());
    }
    Ok(texts)
}
