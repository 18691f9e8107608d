//! A relay's progress, as the append records it.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A snapshot that shows nothing: the last one of a relay that has not begun. Transaction ids begin at 3.
pub(super) const NOTHING: &str = "3:3:";

/// A relay's position: everything that `snapshot` shows is in the streams, but for what `window` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Position {
    /// The snapshot, of Postgres' type pg_snapshot in its text form.
    pub(super) snapshot: String,
    /// A window that is not at its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) window: Option<Window>,
    /// The mark left in the origin after the snapshot was taken and before the position was stored. None in the broker's
    /// own database, where storing the position flushes the same log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) mark: Option<Uuid>,
    /// The cluster that the snapshot is of: in another one it means nothing.
    pub(super) system_identifier: String,
    /// The cluster's timeline, for people who read the position after a failover. The mark decides.
    pub(super) timeline: i32,
    /// For pickup by deletion: the primary keys of the rows that were appended with this position. They are deleted before the next
    /// ones are read; until that is certain they still have to be.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) taken: Vec<Vec<String>>,
    /// For pickup by deletion: the table went back in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) recheck: Option<Recheck>,
    /// The broker's database went back in time, and the rows emptied since then exist nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) gaps: Option<Gaps>,
}

/// Times that rows were found emptied that the broker's database can lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Gaps {
    /// How often, ever.
    pub(super) count: u64,
    /// The time of the last one.
    pub(super) last_at: DateTime<Utc>,
}

/// How far the look at a mapped table is that went back in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Recheck {
    /// Rows that the streams have are being taken out.
    Pass,
    /// The lookup is done; the remaining rows are relayed, and a row that was rejected before is not listed twice.
    Rest,
}

/// The rows that the position's snapshot shows and `since` does not, in the order of seq; those after `after_seq` are still to come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Window {
    pub(super) since: String,
    pub(super) after_seq: i64,
    /// A re-relay: rows that a stream has already are dropped, by (source, id).
    #[serde(default)]
    pub(super) is_rerelay: bool,
    /// In a re-relay: when the oldest of its rows was committed, or before, by the broker's clock; none where nobody knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) oldest: Option<DateTime<Utc>>,
}

impl Position {
    /// Its JSON text.
    pub(super) fn to_text(&self) -> String {
        serde_json::to_string(self).expect("a position always serializes")
    }

    /// Whether rows that were relayed or rejected before can come again.
    pub(super) fn is_rerelay(&self) -> bool {
        self.recheck.is_some() || self.window.as_ref().is_some_and(|window| window.is_rerelay)
    }

    /// The same position with all of its window passed, or up to a seq.
    pub(super) fn passed(&self, through: Option<i64>) -> Self {
        let window = through.and_then(|after_seq| {
            let window = self.window.clone()?;
            Some(Window {
                after_seq,
                ..window
            })
        });
        Self {
            window,
            ..self.clone()
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn positions_are_stored_as_json() {
        let mut position = Position {
            snapshot: "10:20:12".into(),
            window: None,
            mark: None,
            system_identifier: "7".into(),
            timeline: 1,
            taken: Vec::new(),
            recheck: None,
            gaps: None,
        };
        let text = r#"{"snapshot":"10:20:12","system_identifier":"7","timeline":1}"#;
        assert_eq!(position.to_text(), text);
        assert_eq!(serde_json::from_str::<Position>(text).unwrap(), position);
        position.window = Some(Window {
            since: NOTHING.into(),
            after_seq: 5,
            is_rerelay: true,
            oldest: Some(DateTime::UNIX_EPOCH),
        });
        position.mark = Some(Uuid::nil());
        position.gaps = Some(Gaps {
            count: 2,
            last_at: DateTime::UNIX_EPOCH,
        });
        let read: Position = serde_json::from_str(&position.to_text()).unwrap();
        assert_eq!(read, position);
        assert_eq!(read.passed(None).window, None);
        assert_eq!(read.passed(None).gaps, position.gaps);
        assert_eq!(read.passed(Some(9)).window.unwrap().after_seq, 9);
    }
}
