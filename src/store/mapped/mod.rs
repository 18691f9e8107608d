//! Outboxes that exist already, as SQL: the catalogue describes the table, and a subquery gives it the outbox's columns, so
//! that a relay's statements read it like an outbox. `catalog` looks at the table and finds faults, `batch` picks up by
//! deletion, `install` makes what a mapped table needs.
//!
//! Only here do names become identifiers: always quoted, and only those of a [`Mapping`], which a person configured.

mod batch;
mod catalog;
pub mod install;
mod keyed;

pub use batch::Batch;
pub use catalog::{Misfit, look};

use super::origin::SIZE;
use crate::domain::mapping::{Field, Mapping, Part, Pickup, Value};
use catalog::{Kind, Shape};

/// A row larger than this is left where it is: the broker could not even list it.
pub const ROW_MAX_BYTES: usize = 64 << 20;

/// A mapped table, looked at: all that statements need.
#[derive(Debug, Clone)]
pub struct Relation {
    /// Its name as SQL, with its schema: also its key in the tables beside it.
    pub(in crate::store) table: String,
    /// A subquery with the outbox's columns.
    source: String,
    /// The primary key's columns, quoted, with their types; for the pick-up by deletion.
    keys: Vec<(String, String)>,
    /// Columns of the subquery that the rows of a batch are ordered by.
    order: String,
    /// The column with the transaction's id, quoted.
    xid: Option<String>,
    /// The column with the row's number, quoted.
    seq: Option<String>,
}

impl Relation {
    /// A statement over the relay's own outbox, made one over this table.
    pub(in crate::store) fn rewrite(&self, statement: &str) -> String {
        statement
            .replace("postroad.outbox as outbox", "postroad.outbox")
            .replace("postroad.outbox", &format!("{} as outbox", self.source))
            .replace("postroad.relay_mark", "postroad.mapped_mark")
            .replace(SIZE, "size")
    }

    /// A statement about the table's own row at the place $1 with the number $2.
    pub(in crate::store) fn raw_by_place(&self, select: &str) -> String {
        let table = &self.table;
        // There where rows are read by their places: checked.
        let seq = match &self.seq {
            Some(seq) => format!("t.{seq}"),
            None => "null".to_owned(),
        };
        format!("{select} from {table} as t where t.ctid = $1::text::tid and {seq}::bigint = $2")
    }

    /// The subquery over the rows with certain primary keys, which come as arrays of text from $1 on.
    fn source_by_keys(&self) -> String {
        let (rows, matches) = (self.key_rows(), self.key_matches());
        // It ends with the table, and no condition.
        let open = self.source.strip_suffix(')').unwrap_or(&self.source);
        format!("{open} join {rows} as gone on {matches})")
    }

    /// `id = gone.k1::uuid and …`, against arrays of text that were made rows.
    fn key_matches(&self) -> String {
        let pairs = self.keys.iter().enumerate();
        let pairs = pairs.map(|(n, (name, kind))| format!("t.{name} = gone.k{n}::{kind}"));
        pairs.collect::<Vec<_>>().join(" and ")
    }

    /// `select unnest($1) as k0, …`.
    fn key_rows(&self) -> String {
        let columns = (0..self.keys.len()).map(|n| format!("unnest(${}::text[]) as k{n}", n + 1));
        format!("(select {})", columns.collect::<Vec<_>>().join(", "))
    }

    fn new(mapping: &Mapping, shape: &Shape) -> Self {
        let keys: Vec<(String, String)> = shape
            .primary_key
            .iter()
            .map(|(name, kind)| (identifier(name), kind.clone()))
            .collect();
        let mut order = Vec::new();
        if mapping.pickup == Pickup::Delete {
            if let Some(seq) = mapping.column(Field::Seq) {
                order.push(identifier(seq));
            }
            for (name, _) in &keys {
                if !order.contains(name) {
                    order.push(name.clone());
                }
            }
        }
        Self {
            table: shape.table.clone(),
            source: source(mapping, shape, &keys, &order),
            order: (0..order.len())
                .map(|n| format!("order_{n}"))
                .collect::<Vec<_>>()
                .join(", "),
            keys,
            xid: mapping.column(Field::Xid).map(identifier),
            seq: mapping.column(Field::Seq).map(identifier),
        }
    }
}

/// The subquery: the columns of `postroad.outbox`, and those that the pick-up by deletion adds.
fn source(mapping: &Mapping, shape: &Shape, keys: &[(String, String)], order: &[String]) -> String {
    let text = |field: Field| match mapping.fields.get(&field) {
        Some(value) => expression(value),
        None => "null::text".to_owned(),
    };
    let column = |field: Field| {
        mapping
            .column(field)
            .map(|name| format!("t.{}", identifier(name)))
    };
    let kind = |field: Field| mapping.column(field).and_then(|name| shape.kind(name));
    let (payload, payload_bytes) = match (column(Field::Payload), kind(Field::Payload)) {
        (Some(column), Some(Kind::Bytes)) => ("null::text".to_owned(), column),
        (Some(column), _) => (format!("{column}::text"), "null::bytea".to_owned()),
        (None, _) => ("null::text".to_owned(), "null::bytea".to_owned()),
    };
    let time = |field: Field| match (column(field), kind(field)) {
        (Some(column), Some(Kind::LocalTime)) => format!("({column} at time zone 'UTC')"),
        (Some(column), _) => column,
        (None, _) => "null::timestamptz".to_owned(),
    };
    let seq = match (column(Field::Seq), kind(Field::Seq)) {
        (Some(column), Some(Kind::Integer)) => format!("{column}::bigint"),
        _ => "0::bigint".to_owned(),
    };
    let expected = match column(Field::ExpectedVersion) {
        Some(column) => format!("{column}::bigint"),
        None => "null::bigint".to_owned(),
    };
    // By deletion exactly, since rows that are too large stay. Otherwise without a look at values that are kept apart, which one that
    // is broken would end: a large JSON value is about so much longer than it is stored.
    let size = |name: Option<&str>| match name {
        Some(name)
            if mapping.pickup == Pickup::Snapshot
                && shape.kind(name).is_some_and(Kind::is_json) =>
        {
            let stored = format!("pg_column_size(t.{})", identifier(name));
            format!("coalesce({stored} * case when {stored} > 2000 then 4 else 1 end, 0)")
        }
        Some(name) => format!("coalesce(octet_length(t.{}::text), 0)", identifier(name)),
        None => "0".to_owned(),
    };
    let payload_size = match kind(Field::Payload) {
        Some(Kind::Bytes) => format!("coalesce(octet_length({payload_bytes}), 0)"),
        _ => size(mapping.column(Field::Payload)),
    };
    let texts = [
        Field::Key,
        Field::Type,
        Field::Id,
        Field::Source,
        Field::Subject,
        Field::ContentType,
        Field::DataSchema,
    ];
    let lengths = texts.map(|field| format!("coalesce(octet_length({}), 0)", text(field)));
    let extensions = mapping.extensions.values();
    let extensions: String = extensions
        .map(|value| format!(" + 32 + coalesce(octet_length({}), 0)", expression(value)))
        .collect();
    let size = format!(
        "(256::bigint + {payload_size} + {} + 2 * {}{extensions})",
        lengths.join(" + "),
        size(mapping.column(Field::Headers)),
    );
    let mut columns = vec![
        format!("{seq} as seq"),
        "0::smallint as bucket".to_owned(),
        format!("{} as topic", text(Field::Topic)),
        format!("{payload} as payload"),
        format!("{payload_bytes} as payload_bytes"),
        format!("{} as key", text(Field::Key)),
        format!("{} as type", text(Field::Type)),
        format!("{} as id", text(Field::Id)),
        format!("{} as source", text(Field::Source)),
        format!("{} as subject", text(Field::Subject)),
        format!("{} as content_type", text(Field::ContentType)),
        format!("{} as data_schema", text(Field::DataSchema)),
        format!("{} as headers", headers(mapping, column(Field::Headers))),
        format!("{} as time", time(Field::Time)),
        format!("{} as deliver_at", time(Field::DeliverAt)),
        format!("{expected} as expected_version"),
        format!("{size} as size"),
    ];
    match mapping.pickup {
        Pickup::Snapshot => {
            // There: checked.
            let xid = column(Field::Xid).unwrap_or_else(|| "null::xid8".to_owned());
            columns.push(format!("{xid} as xid"));
            columns.push("t.ctid as ctid".to_owned());
        }
        Pickup::Delete => {
            let texts: Vec<String> = keys.iter().map(|(k, _)| format!("t.{k}::text")).collect();
            columns.push(format!("array[{}] as keys", texts.join(", ")));
            let ordered = order.iter().enumerate();
            columns.extend(ordered.map(|(n, name)| format!("t.{name} as order_{n}")));
        }
    }
    format!("(select {} from {} as t)", columns.join(", "), shape.table)
}

fn headers(mapping: &Mapping, column: Option<String>) -> String {
    let base = column.map(|column| format!("{column}::jsonb"));
    if mapping.extensions.is_empty() {
        return base.unwrap_or_else(|| "null::jsonb".to_owned());
    }
    let pairs = mapping
        .extensions
        .iter()
        .map(|(name, value)| format!("{}, {}", literal(name), expression(value)));
    let pairs = pairs.collect::<Vec<_>>().join(", ");
    let made = format!("jsonb_strip_nulls(jsonb_build_object({pairs}))");
    match base {
        Some(base) => format!("(coalesce({base}, '{{}}'::jsonb) || {made})"),
        None => made,
    }
}

fn expression(value: &Value) -> String {
    let parts = value.0.iter().map(|part| match part {
        Part::Text(text) => format!("{}::text", literal(text)),
        Part::Column(name) => format!("t.{}::text", identifier(name)),
    });
    format!("({})", parts.collect::<Vec<_>>().join(" || "))
}

/// A name as an identifier, exactly as it is.
fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A text as a literal, whatever the session makes of backslashes.
fn literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if quoted.contains('\\') {
        format!(" E'{}'", quoted.replace('\\', "\\\\"))
    } else {
        format!("'{quoted}'")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_texts_cannot_leave_their_quotes() {
        assert_eq!(
            identifier("a\"; drop table t; --"),
            "\"a\"\"; drop table t; --\""
        );
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(literal("\\' or"), " E'\\\\'' or'");
    }
}
