//! For services in Rust: inserts a message into the outbox, in a transaction of sqlx. It is a layer of its own, which
//! nothing in the broker uses; it is an insert with types around it, and may be copied instead of depended upon.
//!
//! It refuses whatever the database would refuse: [`Error::Refused`] has the constraint that says so. The insert needs the
//! rights of the database's role `postroad_producer_…` and no more.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::{PgConnection, Postgres, Transaction};
use uuid::Uuid;

/// A message on its way into the outbox. Only the topic is required.
///
/// Limits: topic 255 bytes of `[A-Za-z0-9_-]` tokens with dots between them, payload 16 MiB, key 512 bytes, other attributes 1,024
/// bytes, headers 64 KiB as JSON.
#[derive(Debug, Clone, Default)]
pub struct Message {
    topic: String,
    text: Option<String>,
    bytes: Option<Vec<u8>>,
    key: Option<String>,
    kind: Option<String>,
    id: Option<String>,
    source: Option<String>,
    subject: Option<String>,
    content_type: Option<String>,
    data_schema: Option<String>,
    headers: serde_json::Map<String, serde_json::Value>,
    expected_version: Option<i64>,
    deliver_at: Option<DateTime<Utc>>,
}

macro_rules! attributes {
    ($($(#[$doc:meta])* $name:ident => $field:ident;)*) => {$(
        $(#[$doc])*
        #[must_use]
        pub fn $name(mut self, $name: impl Into<String>) -> Self {
            self.$field = Some($name.into());
            self
        }
    )*};
}

impl Message {
    /// A message without a payload, which is not the JSON `null`.
    #[must_use]
    pub fn new(topic: impl Into<String>) -> Self {
        Self {
            topic: topic.into(),
            ..Self::default()
        }
    }

    /// A message with a JSON payload.
    ///
    /// # Errors
    /// The value does not serialize.
    pub fn json(
        topic: impl Into<String>,
        payload: &(impl Serialize + ?Sized),
    ) -> Result<Self, serde_json::Error> {
        let text = serde_json::to_string(payload)?;
        Ok(Self::text(topic, text, "application/json"))
    }

    /// A message with a text of this content type.
    #[must_use]
    pub fn text(
        topic: impl Into<String>,
        payload: impl Into<String>,
        content_type: impl Into<String>,
    ) -> Self {
        Self {
            text: Some(payload.into()),
            content_type: Some(content_type.into()),
            ..Self::new(topic)
        }
    }

    /// A message with bytes of this content type.
    #[must_use]
    pub fn bytes(
        topic: impl Into<String>,
        payload: impl Into<Vec<u8>>,
        content_type: impl Into<String>,
    ) -> Self {
        Self {
            bytes: Some(payload.into()),
            content_type: Some(content_type.into()),
            ..Self::new(topic)
        }
    }

    attributes! {
        /// With this ordering key. Messages of one key keep the order of their transactions if each takes the key's exclusive row
        /// lock, or [`lock_key`], before it publishes.
        key => key;
        /// With this CloudEvents `type`; the topic otherwise.
        kind => kind;
        /// With this CloudEvents `id`; a random one otherwise.
        id => id;
        /// With this CloudEvents `source`; `/postroad/` and the database's name otherwise.
        source => source;
        /// With this CloudEvents `subject`.
        subject => subject;
        /// With this CloudEvents `dataschema`.
        data_schema => data_schema;
    }

    /// For topics of a keyed stream: the message is published only if its key has had this many messages there when it arrives.
    /// Otherwise it is listed with the origin's rejected messages; the transaction does not learn of it. Needs a key.
    #[must_use]
    pub const fn expected_version(mut self, version: i64) -> Self {
        self.expected_version = Some(version);
        self
    }

    /// To enter its stream then, a year ahead at most; a time that is past is at once.
    #[must_use]
    pub fn deliver_at(mut self, at: DateTime<Utc>) -> Self {
        self.deliver_at = Some(at);
        self
    }

    /// With this CloudEvents extension attribute, `traceparent` for one: names of 1 to 20 of `a-z 0-9`; strings, booleans and
    /// 32-bit integers.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<serde_json::Value>) -> Self {
        self.headers.insert(name.into(), value.into());
        self
    }
}

/// Reasons why a message was not written. The transaction has failed in Postgres: roll it back.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not become a message: the outbox's constraint of this name says why.
    #[error("the outbox refuses the message: {constraint}")]
    Refused {
        /// `outbox_topic_is_valid`, say.
        constraint: String,
        /// The driver's error.
        #[source]
        source: sqlx::Error,
    },
    /// The database could not do it.
    #[error("writing into the outbox failed")]
    Database(#[source] sqlx::Error),
}

/// Writes a message into the outbox, and returns its id. It is delivered if the transaction commits, and was never there if it
/// does not.
///
/// ```no_run
/// # async fn f(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
/// use postroad::outbox::{self, Message};
///
/// let mut tx = pool.begin().await?;
/// // The row that the key stands for, first: that keeps its messages in order.
/// sqlx::query("update stock set quantity = quantity - 1 where product = 'tea'")
///     .execute(&mut *tx)
///     .await?;
/// let order = serde_json::json!({"order": 1, "product": "tea"});
/// outbox::publish(&mut tx, &Message::json("orders.created", &order)?.key("tea")).await?;
/// tx.commit().await?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`Error::Refused`] if it could not become a message, or the database's.
pub async fn publish(
    transaction: &mut Transaction<'_, Postgres>,
    message: &Message,
) -> Result<String, Error> {
    // Made here: an insert with RETURNING needs more than the INSERT privilege.
    let id = message.id.clone();
    let id = id.unwrap_or_else(|| Uuid::new_v4().to_string());
    let headers = (!message.headers.is_empty())
        .then(|| serde_json::Value::Object(message.headers.clone()).to_string());
    let connection: &mut PgConnection = transaction;
    sqlx::query(
        "insert into postroad.outbox (topic, payload, payload_bytes, key, type, id, source, subject, content_type, \
         data_schema, headers, expected_version, deliver_at) \
         values ($1, $2, $3, $4, $5, $6, coalesce($7, postroad.default_source()), $8, $9, $10, \
         $11::pg_catalog.text::pg_catalog.jsonb, $12, $13)",
    )
    .bind(&message.topic)
    .bind(&message.text)
    .bind(&message.bytes)
    .bind(&message.key)
    .bind(&message.kind)
    .bind(&id)
    .bind(&message.source)
    .bind(&message.subject)
    .bind(&message.content_type)
    .bind(&message.data_schema)
    .bind(headers)
    .bind(message.expected_version)
    .bind(message.deliver_at)
    .execute(connection)
    .await
    .map_err(refused)?;
    Ok(id)
}

/// Takes a key's lock until the transaction ends, for producers that have no row to lock: publish after it, and the messages of the
/// key keep the order of the transactions. The locks are a fixed space of 1,024, so two keys can share one; a transaction that
/// locks several keys takes them in a fixed order, as with rows.
///
/// # Errors
/// The database's.
pub async fn lock_key(transaction: &mut Transaction<'_, Postgres>, key: &str) -> Result<(), Error> {
    let connection: &mut PgConnection = transaction;
    sqlx::query("select postroad.lock_key($1)")
        .bind(key)
        .execute(connection)
        .await
        .map(|_| ())
        .map_err(Error::Database)
}

fn refused(source: sqlx::Error) -> Error {
    let constraint = source
        .as_database_error()
        .filter(|error| error.is_check_violation())
        .and_then(|error| error.constraint())
        .map(str::to_owned);
    match constraint {
        Some(constraint) => Error::Refused { constraint, source },
        None => Error::Database(source),
    }
}
