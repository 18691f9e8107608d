//! An outbox that exists already: its table, the meaning of its columns, and how its rows are picked up.
//!
//! A person writes a [`Draft`]; [`Draft::finish`] makes a [`Mapping`] of it or says what is wrong. The database decides
//! whether the table really has these columns.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::name::{OriginName, Topic};
use super::template::check_identifier;
pub use super::template::{Part, Value};
use super::word::words;

/// Columns that `postroad install --map` may add, and what they are called unless the mapping says otherwise.
const XID_COLUMN: &str = "postroad_xid";
const SEQ_COLUMN: &str = "postroad_seq";

words! {
    /// How rows are picked up.
    pub enum Pickup {
        /// By the difference of two snapshots, as the relay's own outbox: the table has a column with the transaction's id.
        Snapshot = "snapshot",
        /// By deletion: a row that was relayed leaves the table.
        Delete = "delete",
    }
}

/// A table's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableName {
    /// Its schema; `public` without one.
    pub schema: Option<String>,
    /// Its name in the schema, exactly: upper case stays so.
    pub name: String,
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.schema {
            Some(schema) => write!(f, "{schema}.{}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// The attributes of a message that a mapping can set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "the outbox's own columns of these names")]
pub enum Field {
    Topic,
    Payload,
    Key,
    Type,
    Id,
    Source,
    Subject,
    ContentType,
    DataSchema,
    Headers,
    Time,
    DeliverAt,
    ExpectedVersion,
    Xid,
    Seq,
}

impl Field {
    /// All of them, in the order of the documentation.
    pub const ALL: [Self; 15] = [
        Self::Topic,
        Self::Payload,
        Self::Key,
        Self::Type,
        Self::Id,
        Self::Source,
        Self::Subject,
        Self::ContentType,
        Self::DataSchema,
        Self::Headers,
        Self::Time,
        Self::DeliverAt,
        Self::ExpectedVersion,
        Self::Xid,
        Self::Seq,
    ];

    /// Its name in the configuration.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Topic => "topic",
            Self::Payload => "payload",
            Self::Key => "key",
            Self::Type => "type",
            Self::Id => "id",
            Self::Source => "source",
            Self::Subject => "subject",
            Self::ContentType => "content_type",
            Self::DataSchema => "data_schema",
            Self::Headers => "headers",
            Self::Time => "time",
            Self::DeliverAt => "deliver_at",
            Self::ExpectedVersion => "expected_version",
            Self::Xid => "xid",
            Self::Seq => "seq",
        }
    }

    /// Whether it is a column and cannot be text around one.
    const fn is_column(self) -> bool {
        matches!(
            self,
            Self::Payload
                | Self::Headers
                | Self::Time
                | Self::DeliverAt
                | Self::ExpectedVersion
                | Self::Xid
                | Self::Seq
        )
    }
}

/// A table that is an outbox, and how it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// The table.
    pub table: TableName,
    /// How its rows are picked up.
    pub pickup: Pickup,
    /// Whether the relay takes rows out that were relayed a grace ago. Rows picked up by deletion leave anyhow.
    pub deletes_relayed: bool,
    /// The templates of the attributes.
    pub fields: BTreeMap<Field, Value>,
    /// Extension attributes by name.
    pub extensions: BTreeMap<String, Value>,
}

impl Mapping {
    /// The column that a field is.
    #[must_use]
    pub fn column(&self, field: Field) -> Option<&str> {
        self.fields.get(&field).and_then(Value::column)
    }

    /// Every column that it names.
    #[must_use]
    pub fn columns(&self) -> BTreeSet<&str> {
        let values = self.fields.values().chain(self.extensions.values());
        values.flat_map(Value::columns).collect()
    }
}

/// A fault of a draft.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The key, `columns.topic`.
    pub key: String,
    /// One clause after the key.
    pub what: String,
}

/// A mapping as it is written down.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Draft {
    /// A layout that is known: `debezium`.
    pub layout: Option<String>,
    /// `outbox_event` or `shop.outbox_event`.
    pub table: Option<String>,
    /// `snapshot` or `delete`.
    pub pickup: Option<String>,
    /// Whether relayed rows are taken out.
    pub delete_relayed: Option<bool>,
    /// Text with columns in braces, by field; empty text takes back what the layout says.
    pub columns: BTreeMap<String, String>,
    /// The same, by name of an extension attribute.
    pub extensions: BTreeMap<String, String>,
}

/// Debezium's layout: what its event router reads unless told otherwise, and the topic that it routes to.
const DEBEZIUM: [(Field, &str); 5] = [
    (Field::Id, "{id}"),
    (Field::Topic, "outbox.event.{aggregatetype}"),
    (Field::Key, "{aggregateid}"),
    (Field::Type, "{type}"),
    (Field::Payload, "{payload}"),
];

impl Draft {
    /// Checks what can be checked without the database.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn finish(self, origin: &OriginName) -> Result<Mapping, Fault> {
        let (mut columns, default_table) = match self.layout.as_deref() {
            None => (BTreeMap::new(), None),
            Some("debezium") => {
                let known = DEBEZIUM.map(|(field, text)| (field, text.to_owned()));
                (BTreeMap::from(known), Some("outboxevent"))
            }
            Some(other) => {
                return Err(fault(
                    "layout",
                    format!("is `{other}`, and must be debezium"),
                ));
            }
        };
        let table = match self.table.as_deref().or(default_table) {
            Some(text) => table_name(text).map_err(|what| fault("table", what))?,
            None => return Err(fault("table", "is needed: the table that is the outbox")),
        };
        let pickup = pickup(self.pickup.as_deref())?;
        for (name, text) in self.columns {
            let Some(field) = Field::ALL.into_iter().find(|field| field.as_str() == name) else {
                let known: Vec<&str> = Field::ALL.iter().map(|field| field.as_str()).collect();
                let what = format!("is not known; there are {}", known.join(", "));
                return Err(fault(&format!("columns.{name}"), what));
            };
            columns.insert(field, text);
        }
        columns
            .entry(Field::Source)
            .or_insert_with(|| format!("/postroad/{origin}"));
        if pickup == Pickup::Snapshot {
            let own = [(Field::Xid, XID_COLUMN), (Field::Seq, SEQ_COLUMN)];
            for (field, column) in own {
                columns
                    .entry(field)
                    .or_insert_with(|| format!("{{{column}}}"));
            }
        }
        let fields = fields(columns)?;
        let mapping = Mapping {
            table,
            pickup,
            deletes_relayed: self.delete_relayed.unwrap_or(false),
            fields,
            extensions: extensions(self.extensions)?,
        };
        check(&mapping)?;
        Ok(mapping)
    }
}

fn fault(key: &str, what: impl Into<String>) -> Fault {
    Fault {
        key: key.to_owned(),
        what: what.into(),
    }
}

fn pickup(text: Option<&str>) -> Result<Pickup, Fault> {
    match text {
        Some(text) => Pickup::of(text).ok_or_else(|| {
            fault(
                "pickup",
                format!("is `{text}`, and must be snapshot or delete"),
            )
        }),
        None => Err(fault(
            "pickup",
            "is needed: `snapshot` reads the table by a column with the transaction's id, which `postroad install --map` \
             adds, and leaves the rows; `delete` takes the rows out of the table",
        )),
    }
}

fn fields(columns: BTreeMap<Field, String>) -> Result<BTreeMap<Field, Value>, Fault> {
    let mut fields = BTreeMap::new();
    for (field, text) in columns {
        if text.is_empty() {
            continue;
        }
        let key = format!("columns.{}", field.as_str());
        let value = Value::parse(&text).map_err(|what| fault(&key, what))?;
        if field.is_column() && value.column().is_none() {
            let what = format!(
                "is `{text}`, and must be one column, like {{{}}}",
                field.as_str()
            );
            return Err(fault(&key, what));
        }
        fields.insert(field, value);
    }
    Ok(fields)
}

fn extensions(texts: BTreeMap<String, String>) -> Result<BTreeMap<String, Value>, Fault> {
    let mut extensions = BTreeMap::new();
    for (name, text) in texts {
        let key = format!("extensions.{name}");
        let is_name = (1..=20).contains(&name.len())
            && name
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        if !is_name {
            return Err(fault(&key, "has a name that is not 1 to 20 of a-z 0-9"));
        }
        let value = Value::parse(&text).map_err(|what| fault(&key, what))?;
        extensions.insert(name, value);
    }
    Ok(extensions)
}

fn check(mapping: &Mapping) -> Result<(), Fault> {
    for field in [Field::Topic, Field::Id] {
        if !mapping.fields.contains_key(&field) {
            let what = match field {
                Field::Id => {
                    "is needed: the text that makes a row's message unique, like {id}; source and id together identify a message"
                }
                _ => "is needed: text, a column, or both, like orders.created or orders.{kind}",
            };
            return Err(fault(&format!("columns.{}", field.as_str()), what));
        }
    }
    let topic = &mapping.fields[&Field::Topic];
    if let [Part::Text(text)] = &topic.0[..] {
        Topic::parse(text).map_err(|error| fault("columns.topic", error.to_string()))?;
    }
    if mapping.pickup == Pickup::Delete && mapping.fields.contains_key(&Field::Xid) {
        return Err(fault(
            "columns.xid",
            "is for pickup = \"snapshot\": rows picked up by deletion need none",
        ));
    }
    if mapping.pickup == Pickup::Delete && mapping.deletes_relayed {
        return Err(fault(
            "delete_relayed",
            "is for pickup = \"snapshot\": rows picked up by deletion are deleted anyway",
        ));
    }
    for field in [Field::Xid, Field::Seq] {
        if mapping.pickup == Pickup::Snapshot && mapping.column(field).is_none() {
            let key = format!("columns.{}", field.as_str());
            return Err(fault(&key, "is needed for pickup = \"snapshot\""));
        }
    }
    Ok(())
}

fn table_name(text: &str) -> Result<TableName, String> {
    let parts: Vec<&str> = text.split('.').collect();
    let (schema, name) = match parts[..] {
        [name] => (None, name),
        [schema, name] => (Some(schema), name),
        _ => {
            return Err(format!(
                "is `{text}`, and must be a table's name, or a schema's and a table's with a dot between"
            ));
        }
    };
    for part in parts {
        check_identifier("has a name that", part)?;
    }
    Ok(TableName {
        schema: schema.map(str::to_owned),
        name: name.to_owned(),
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn draft(pickup: &str, columns: &[(&str, &str)]) -> Draft {
        let owned = |(name, text): &(&str, &str)| ((*name).to_owned(), (*text).to_owned());
        Draft {
            table: Some("shop.outbox".into()),
            pickup: Some(pickup.into()),
            columns: columns.iter().map(owned).collect(),
            ..Draft::default()
        }
    }

    fn finish(draft: Draft) -> Result<Mapping, Fault> {
        draft.finish(&OriginName::parse("shop").unwrap())
    }

    #[test]
    fn debeziums_layout_is_known_and_can_be_changed() {
        let mut draft = Draft {
            layout: Some("debezium".into()),
            pickup: Some("delete".into()),
            ..Draft::default()
        };
        let mapping = finish(draft.clone()).unwrap();
        assert_eq!(mapping.table.to_string(), "outboxevent");
        assert_eq!(mapping.column(Field::Key), Some("aggregateid"));
        let topic = &mapping.fields[&Field::Topic];
        let parts = [
            Part::Text("outbox.event.".into()),
            Part::Column("aggregatetype".into()),
        ];
        assert_eq!(topic.0, parts);
        let source = &mapping.fields[&Field::Source];
        assert_eq!(source.0, [Part::Text("/postroad/shop".into())]);
        draft.pickup = Some("snapshot".into());
        draft.columns = BTreeMap::from([
            ("topic".into(), "{aggregatetype}.{type}".into()),
            ("type".into(), String::new()),
            ("seq".into(), "{n}".into()),
        ]);
        let mapping = finish(draft).unwrap();
        assert_eq!(mapping.column(Field::Xid), Some("postroad_xid"));
        assert_eq!(mapping.column(Field::Seq), Some("n"));
        assert!(!mapping.fields.contains_key(&Field::Type));
        assert!(mapping.columns().contains("type"), "the topic has it");
    }

    #[test]
    fn what_is_wrong_is_said() {
        let fine = [("topic", "a"), ("id", "{id}")];
        assert!(finish(draft("delete", &fine)).is_ok());
        let with = |pickup: &str, name: &'static str, text: &'static str| {
            let columns: Vec<_> = fine.into_iter().filter(|(n, _)| *n != name).collect();
            draft(pickup, &[&columns[..], &[(name, text)]].concat())
        };
        for (draft, key, what) in [
            (
                draft("delete", &[("id", "{id}")]),
                "columns.topic",
                "is needed",
            ),
            (
                draft("delete", &[("topic", "a")]),
                "columns.id",
                "is needed",
            ),
            (
                with("delete", "topic", "a..b"),
                "columns.topic",
                "has the token",
            ),
            (
                with("delete", "topic", "a.{b"),
                "columns.topic",
                "without its `}`",
            ),
            (
                with("delete", "topic", "a}"),
                "columns.topic",
                "without its `{`",
            ),
            (with("delete", "topic", "{}"), "columns.topic", "is empty"),
            (
                with("delete", "payload", "{a}{b}"),
                "columns.payload",
                "must be one column",
            ),
            (with("delete", "xid", "{x}"), "columns.xid", "is for pickup"),
            (
                with("delete", "colour", "{x}"),
                "columns.colour",
                "is not known",
            ),
            (with("snapshot", "seq", ""), "columns.seq", "is needed"),
            (
                with("both", "id", "{id}"),
                "pickup",
                "must be snapshot or delete",
            ),
            (
                Draft {
                    pickup: None,
                    ..draft("", &fine)
                },
                "pickup",
                "is needed",
            ),
            (
                Draft {
                    table: Some("a.b.c".into()),
                    ..draft("delete", &fine)
                },
                "table",
                "a table's name",
            ),
            (
                Draft {
                    table: None,
                    ..draft("delete", &fine)
                },
                "table",
                "is needed",
            ),
            (
                Draft {
                    layout: Some("x".into()),
                    ..draft("delete", &fine)
                },
                "layout",
                "must be debezium",
            ),
            (
                Draft {
                    delete_relayed: Some(true),
                    ..draft("delete", &fine)
                },
                "delete_relayed",
                "is for pickup",
            ),
        ] {
            let found = finish(draft).unwrap_err();
            assert_eq!(found.key, key, "{}", found.what);
            assert!(found.what.contains(what), "{}: {}", found.key, found.what);
        }
    }

    #[test]
    fn braces_can_be_written() {
        let value = Value::parse("a{{b}}{c}").unwrap();
        let parts = [Part::Text("a{b}".into()), Part::Column("c".into())];
        assert_eq!(value.0, parts);
    }
}
