//! The catalogue's description of a mapped table, and whether the mapping fits it.

use std::collections::BTreeMap;

use sqlx::Row as _;

use super::{Relation, identifier};
use crate::domain::mapping::{Field, Mapping, Pickup, TableName};
use crate::store::bounded::{STATEMENT, bounded};
use crate::store::{Connection, Error};

/// The meaning of a column's type for a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Json,
    Jsonb,
    Bytes,
    Integer,
    /// With a time zone.
    Time,
    /// Without one: taken as UTC.
    LocalTime,
    Xid,
    /// Something with a text form: uuid, numbers, enums, booleans.
    Other,
    /// An array, a row, a range: nothing that a message's attribute could be.
    Composite,
}

impl Kind {
    pub(super) const fn is_json(self) -> bool {
        matches!(self, Self::Json | Self::Jsonb)
    }
}

#[derive(Debug, Clone)]
pub(super) struct Column {
    kind: Kind,
    /// As SQL writes it.
    type_name: String,
    is_not_null: bool,
    /// The text of its default.
    default: Option<String>,
    /// The first column of a valid index that has all rows.
    leads_index: bool,
}

/// A table, as the catalogue has it.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    /// With its schema, quoted where it must be.
    pub(super) table: String,
    pub(super) schema: String,
    relkind: String,
    pub(super) is_partitioned: bool,
    pub(super) columns: BTreeMap<String, Column>,
    pub(super) primary_key: Vec<(String, String)>,
    may_select: bool,
    may_delete: bool,
    hides_rows: bool,
}

impl Shape {
    pub(super) fn kind(&self, column: &str) -> Option<Kind> {
        self.columns.get(column).map(|column| column.kind)
    }

    pub(super) fn has(&self, column: &str) -> bool {
        self.columns.contains_key(column)
    }

    pub(super) fn leads_index(&self, column: &str) -> bool {
        self.columns
            .get(column)
            .is_some_and(|column| column.leads_index)
    }
}

/// Reasons why a table cannot be read as the mapping says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Misfit {
    /// Something that `postroad install --map` makes is missing.
    NotInstalled(String),
    /// The mapping, the table or the rights on it are wrong; each a clause.
    Wrong(Vec<String>),
}

/// The name as `to_regclass` takes it. A search path would let others put a table before the one that is meant.
fn regclass(table: &TableName) -> String {
    let schema = table.schema.as_deref().unwrap_or("public");
    format!("{}.{}", identifier(schema), identifier(&table.name))
}

/// Looks the table up. None when there is no such table.
pub(super) async fn shape(
    connection: &mut Connection,
    table: &TableName,
) -> Result<Option<Shape>, Error> {
    const DOING: &str = "looking at a mapped table";
    let name = regclass(table);
    let looking = sqlx::query(include_str!("../sql/describe_mapped_table.sql"))
        .bind(&name)
        .fetch_all(&mut *connection);
    let rows = bounded(DOING, STATEMENT, looking).await?;
    let Some(first) = rows.first() else {
        return Ok(None);
    };
    let read = || {
        let mut columns = BTreeMap::new();
        for row in &rows {
            let category: String = row.try_get("category")?;
            let base: String = row.try_get("base_type")?;
            let column = Column {
                kind: kind(&base, &category),
                type_name: row.try_get("type_name")?,
                is_not_null: row.try_get("is_not_null")?,
                default: row.try_get("default_text")?,
                leads_index: row.try_get("leads_index")?,
            };
            columns.insert(row.try_get("column_name")?, column);
        }
        let key: Vec<String> = first.try_get("primary_key")?;
        let types: Vec<String> = first.try_get("primary_key_types")?;
        Ok(Some(Shape {
            table: first.try_get("table_name")?,
            schema: first.try_get("schema_name")?,
            is_partitioned: first.try_get::<String, _>("relkind")? == "p",
            relkind: first.try_get("relkind")?,
            columns,
            primary_key: key.into_iter().zip(types).collect(),
            may_select: first.try_get("may_select")?,
            may_delete: first.try_get("may_delete")?,
            hides_rows: first.try_get("hides_rows")?,
        }))
    };
    read().map_err(Error::query(DOING))
}

fn kind(base: &str, category: &str) -> Kind {
    match base {
        "text" | "varchar" | "bpchar" => Kind::Text,
        "json" => Kind::Json,
        "jsonb" => Kind::Jsonb,
        "bytea" => Kind::Bytes,
        "int2" | "int4" | "int8" => Kind::Integer,
        "timestamptz" => Kind::Time,
        "timestamp" => Kind::LocalTime,
        "xid8" => Kind::Xid,
        _ if matches!(category, "A" | "C" | "P" | "R" | "G") => Kind::Composite,
        _ => Kind::Other,
    }
}

/// The faults, each as a clause. A column in `missing` may be missing: it is about to be added.
pub(super) fn faults(mapping: &Mapping, shape: &Shape, missing: &[&str]) -> Vec<String> {
    let table = &mapping.table;
    let mut faults = Vec::new();
    if !matches!(shape.relkind.as_str(), "r" | "p") {
        faults.push(format!("`{table}` is not a table"));
        return faults;
    }
    for name in mapping.columns() {
        if !shape.has(name) && !missing.contains(&name) {
            let there: Vec<&str> = shape.columns.keys().map(String::as_str).collect();
            faults.push(format!(
                "the table `{table}` has no column `{name}`; it has {}",
                there.join(", ")
            ));
        }
    }
    let values = mapping
        .fields
        .iter()
        .map(|(field, value)| (Some(*field), value));
    let extensions = mapping.extensions.values().map(|value| (None, value));
    for (field, value) in values.chain(extensions) {
        for name in value.columns() {
            let Some(column) = shape.columns.get(name) else {
                continue;
            };
            if let Some(needed) = misfit(field, column.kind, mapping.pickup) {
                let what = field.map_or("extension attribute", Field::as_str);
                faults.push(format!(
                    "the column `{name}` is of type {}, and a {what} must be {needed}",
                    column.type_name
                ));
            }
        }
    }
    if mapping.pickup == Pickup::Delete && shape.primary_key.is_empty() {
        faults.push(format!(
            "the table `{table}` has no primary key, which is needed to delete rows"
        ));
    }
    if mapping.pickup == Pickup::Snapshot {
        for field in [Field::Xid, Field::Seq] {
            let column = mapping
                .column(field)
                .and_then(|name| shape.columns.get(name));
            if column.is_some_and(|column| !column.is_not_null) {
                let name = mapping.column(field).unwrap_or_default();
                faults.push(format!(
                    "the column `{name}` is nullable, and must be not null"
                ));
            }
        }
        let xid = mapping
            .column(Field::Xid)
            .and_then(|name| shape.columns.get(name));
        let is_own = |column: &Column| {
            let default = column.default.as_deref().unwrap_or_default();
            default.contains("pg_current_xact_id()")
        };
        if xid.is_some_and(|column| !is_own(column)) {
            let name = mapping.column(Field::Xid).unwrap_or_default();
            faults.push(format!(
                "the column `{name}` has no default pg_current_xact_id(): rows without their transaction's id are never relayed"
            ));
        }
    }
    faults
}

/// The needed type of a column that has another.
fn misfit(field: Option<Field>, kind: Kind, pickup: Pickup) -> Option<&'static str> {
    let (fits, needed) = match field {
        Some(Field::Payload) => (
            matches!(kind, Kind::Text | Kind::Json | Kind::Jsonb | Kind::Bytes),
            "text, varchar, json, jsonb or bytea",
        ),
        // Of json, what jsonb does not take would fail the statement, and with it the rows beside.
        Some(Field::Headers) => (kind == Kind::Jsonb, "jsonb"),
        Some(Field::Time | Field::DeliverAt) => (
            matches!(kind, Kind::Time | Kind::LocalTime),
            "timestamptz, or timestamp in UTC",
        ),
        Some(Field::Xid) => (kind == Kind::Xid, "xid8"),
        Some(Field::ExpectedVersion) => (kind == Kind::Integer, "smallint, integer or bigint"),
        Some(Field::Seq) if pickup == Pickup::Snapshot => {
            (kind == Kind::Integer, "smallint, integer or bigint")
        }
        _ => (
            !matches!(
                kind,
                Kind::Bytes | Kind::Json | Kind::Jsonb | Kind::Composite
            ),
            "of a type with a plain text form",
        ),
    };
    (!fits).then_some(needed)
}

fn rights(mapping: &Mapping, shape: &Shape) -> Vec<String> {
    let table = &mapping.table;
    let mut faults = Vec::new();
    if shape.hides_rows {
        faults.push(format!(
            "row security of `{table}` hides rows from the relay's user: grant that user bypassrls"
        ));
    }
    let deletes = mapping.pickup == Pickup::Delete || mapping.deletes_relayed;
    for (may, right) in [
        (shape.may_select, "select"),
        (shape.may_delete || !deletes, "delete"),
    ] {
        if !may {
            faults.push(format!(
                "the relay's user has no right to {right} on `{table}`: run `postroad install --map`, and grant that user the role it names"
            ));
        }
    }
    faults
}

/// Looks at the table as the relay will read it.
///
/// # Errors
/// A statement failed.
pub async fn look(
    connection: &mut Connection,
    mapping: &Mapping,
) -> Result<Result<Relation, Misfit>, Error> {
    let table = &mapping.table;
    let Some(shape) = shape(connection, table).await? else {
        return Ok(Err(Misfit::Wrong(vec![format!(
            "there is no table `{table}`"
        )])));
    };
    let own: Vec<&str> = [Field::Xid, Field::Seq]
        .into_iter()
        .filter(|_| mapping.pickup == Pickup::Snapshot)
        .filter_map(|field| mapping.column(field))
        .collect();
    let found = faults(mapping, &shape, &own);
    if !found.is_empty() {
        return Ok(Err(Misfit::Wrong(found)));
    }
    let looking = sqlx::query_scalar(
        "select to_regclass('postroad.mapped_outbox') is not null and to_regclass('postroad.mapped_mark') is not null",
    )
    .fetch_one(&mut *connection);
    let has_schema: bool = bounded(
        "looking for the tables beside a mapped one",
        STATEMENT,
        looking,
    )
    .await?;
    let mut missing = Vec::new();
    if !has_schema {
        missing.push("the tables beside it".to_owned());
    }
    for name in &own {
        if !shape.has(name) {
            missing.push(format!("the column `{name}`"));
        }
    }
    if let Some(xid) = mapping.column(Field::Xid)
        && shape.has(xid)
        && !shape.leads_index(xid)
    {
        missing.push(format!("an index that begins with `{xid}`"));
    }
    if has_schema {
        let looking = sqlx::query_scalar(
            "select exists (select from postroad.mapped_outbox where table_name = $1)",
        )
        .bind(&shape.table)
        .fetch_one(&mut *connection);
        let is_known: bool =
            bounded("looking for a mapped table's entry", STATEMENT, looking).await?;
        if !is_known {
            missing.push("its entry in postroad.mapped_outbox".to_owned());
        }
    }
    if !missing.is_empty() {
        return Ok(Err(Misfit::NotInstalled(format!(
            "the table `{table}` lacks {}: run `postroad install --map` there",
            missing.join(", ")
        ))));
    }
    let found = rights(mapping, &shape);
    if !found.is_empty() {
        return Ok(Err(Misfit::Wrong(found)));
    }
    let event = match mapping.pickup == Pickup::Delete || mapping.deletes_relayed {
        true => "delete",
        false => "select",
    };
    let looking = sqlx::query_as("select postroad.mapped_code($1, $2), current_user::text")
        .bind(&shape.table)
        .bind(event)
        .fetch_one(&mut *connection);
    let (code, user): (Vec<String>, String) =
        bounded("looking for code of others", STATEMENT, looking).await?;
    if !code.is_empty() {
        return Ok(Err(Misfit::Wrong(vec![format!(
            "to {event} rows of `{table}` would run other users' code with the rights of the relay's user {user}: {}: remove that code, or \
             grant those roles what they would gain (`grant {user} to …`)",
            code.join(", ")
        )])));
    }
    Ok(Ok(Relation::new(mapping, &shape)))
}
