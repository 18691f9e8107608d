//! The call that writes the log for most groups: see the function `append_next` in `migrations/broker`.

use chrono::{DateTime, Utc};

use super::append::{Append, Appended, GroupKey, NONE, with_messages};
use crate::domain::id::{Offset, StreamId};
use crate::store::bounded::{STATEMENT, bounded};
use crate::store::call::{Call, Function};
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
    let calling = async {
        call(key, previous, group)
            .query_as()?
            .fetch_one(connection)
            .await
    };
    let columns: Columns = match bounded("appending", STATEMENT, calling).await {
        Ok(columns) => columns,
        Err(error) if error.is_offset_taken() => return Ok(None),
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

/// The append of most groups, in one call that commits by itself: see the function's header in `migrations/broker`.
static APPEND_NEXT: Function = Function::new("append_next", "status, clock, appended_at");

fn call(key: GroupKey, previous: Previous, group: &Append<'_>) -> Call {
    let relays = &group.relays;
    let call = APPEND_NEXT
        .call()
        .with("p_incarnation", key.incarnation)
        .with("p_number", key.number)
        .with("p_born_at", key.born_at)
        .with("p_catalogue", key.catalogue)
        .with("p_after", previous.number)
        .with("p_after_born_at", previous.born_at)
        .with("p_stream", group.streams.first())
        .with("p_last", previous.last.0)
        .with("p_last_at", previous.last_at)
        .with("p_checks_ids", group.checks_ids)
        .with("r_lease", relays.leases.first())
        .with("r_epoch", relays.epochs.first())
        .with("r_origin", relays.origins.first())
        .with("r_from", relays.from.first())
        .with("r_to", relays.to.first())
        .with("r_position", relays.positions.first());
    with_messages(call, group).with("p_witness", key.witness)
}
