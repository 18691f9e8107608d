//! The call that writes the log for most groups: see the function `append_next` in `migrations/broker`.

use chrono::{DateTime, Utc};
use sqlx::Postgres;
use sqlx::postgres::PgArguments;
use sqlx::query::QueryAs;

use super::append::{Append, Appended, GroupKey, NONE, bind_messages};
use crate::domain::id::{Offset, StreamId};
use crate::store::bounded::{STATEMENT, bounded};
use crate::store::{Connection, Error};

/// The state that an appender's latest group with messages for a stream left there.
#[derive(Debug, Clone, Copy)]
pub struct Previous {
    /// The group's number.
    pub number: i64,
    /// The time of its creation, which says where its result is kept.
    pub born_at: DateTime<Utc>,
    /// The last offset that it took.
    pub last: Offset,
    /// The time when its messages were appended.
    pub last_at: DateTime<Utc>,
}

type Columns = (String, Option<DateTime<Utc>>, Option<DateTime<Utc>>);

impl Append<'_> {
    /// The stream, if all messages go to one, at once, and nothing is asked of the database but to check their ids; and with one
    /// relay at most, all of whose rows are messages.
    #[must_use]
    pub fn plain_stream(&self) -> Option<StreamId> {
        let &[stream] = self.streams.as_slice() else {
            return None;
        };
        let is_plain = self.bases == [NONE]
            && self.dues.is_empty()
            && self.relays.members.len() <= 1
            && self.relays.rejected_relays.is_empty();
        is_plain.then_some(StreamId(stream))
    }
}

/// Appends a group with a [plain stream](Append::plain_stream) behind the appender's previous one, if nothing speaks against it.
/// Only for the first try of a group. `None`: nothing was done, and [`append`](super::append()) is to decide.
///
/// # Errors
/// The database's. Lost connections leave the outcome unknown; any other error means that nothing was done.
pub async fn append_next(
    connection: &mut Connection,
    key: GroupKey,
    previous: Previous,
    group: &Append<'_>,
) -> Result<Option<Appended>, Error> {
    let calling = call(key, previous, group).fetch_one(connection);
    let columns: Columns = match bounded("appending", STATEMENT, calling).await {
        Ok(columns) => columns,
        Err(error) if is_taken(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    match columns {
        (status, _, Some(at)) if status == "appended" => Ok(Some(Appended {
            first: vec![previous.last.0 + 1],
            at: vec![at],
            ..Appended::default()
        })),
        (status, ..) if status == "other" => Ok(None),
        (status, ..) => Err(Error::unknown_status("appending", &status)),
    }
}

/// Whether another appender has the offsets.
fn is_taken(error: &Error) -> bool {
    let of_log = |name: &str| name.starts_with("message");
    error.sqlstate().as_deref() == Some("23505") && error.constraint().is_some_and(of_log)
}

type Call<'q> = QueryAs<'q, Postgres, Columns, PgArguments>;

fn call<'q>(key: GroupKey, previous: Previous, group: &'q Append<'_>) -> Call<'q> {
    let relays = &group.relays;
    let call = sqlx::query_as(include_str!("../sql/append_next.sql"))
        .bind(key.incarnation)
        .bind(key.number)
        .bind(key.born_at)
        .bind(key.catalogue)
        .bind(previous.number)
        .bind(previous.born_at)
        .bind(group.streams.first())
        .bind(previous.last.0)
        .bind(previous.last_at)
        .bind(group.checks_ids)
        .bind(relays.leases.first())
        .bind(relays.epochs.first())
        .bind(relays.origins.first())
        .bind(relays.from.first())
        .bind(relays.to.first())
        .bind(relays.positions.first());
    bind_messages(call, group).bind(key.witness)
}
