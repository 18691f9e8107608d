//! An origin that went back in time: restored, failed over to a standby that lacked the end, or crashed with transactions
//! whose ends were not flushed and whose ids it then assigns again. The stored snapshot says "seen" of ids that now belong
//! to others, so it is worthless. Everything in the outbox is read through one new snapshot, and rows that the streams
//! already have from this origin are dropped, by topic, source and id: first all ids are read, then the log once. This can
//! repair as much as the grace keeps in the outbox.
//!
//! It begins with a position that says so, stored before the first row: after a crash in the middle it continues where it
//! was, and a second step back in time begins it again. An origin seen for the first time goes the same way without the
//! lookup.
//!
//! The broker's own database can go back too. Its older position still opens a window, but rows that were relayed and
//! emptied after the backup no longer exist anywhere. The origin knows up to which position it was emptied, so the relay
//! notices.

use super::page::Page;
use super::position::{Gaps, NOTHING, Window};
use super::status::State;
use super::task::{Relay, Run};
use super::trouble::Trouble;
use crate::store;

impl Relay {
    pub(super) fn show_gaps(&self, gaps: Option<Gaps>) {
        self.status.send_modify(|status| {
            status.gap_count = Some(gaps.map_or(0, |gaps| gaps.count));
            status.gap_at = gaps.map(|gaps| gaps.last_at);
        });
    }
}

impl Run<'_> {
    /// Messages were relayed, their rows emptied, and the broker was restored from a backup before that: they can be lost. The next
    /// position says so, and all after it.
    pub(super) fn note_gap(&mut self) {
        let before = self.position.as_ref().and_then(|position| position.gaps);
        let gaps = Gaps {
            count: before.map_or(0, |gaps| gaps.count) + 1,
            last_at: self.relay.cluster.now(),
        };
        self.gaps = Some(gaps);
        tracing::error!(
            origin = %self.relay.name,
            stored = self.number,
            emptied = self.emptied,
            "INCIDENT: the broker's database was restored to a point before rows were emptied from the outbox: messages relayed in between are \
             missing, except those that the outbox still holds"
        );
        self.relay.show_gaps(self.gaps);
    }

    /// Reads all of the outbox again. Returns how many rows that was.
    pub(super) async fn rerelay(&mut self, why: &'static str) -> Result<usize, Trouble> {
        let relay = self.relay;
        let is_first = self.number == 0;
        relay.set_state(State::Rerelaying, Some(why.to_owned()));
        if is_first {
            tracing::info!(origin = %relay.name, "relaying everything in the outbox: {why}");
        } else {
            tracing::warn!(origin = %relay.name, position = self.number, "reading all of the outbox again: {why}");
            relay.status.send_modify(|status| status.rerelay_count += 1);
            // Before anything else: the rotation would take the old snapshots at their word.
            let forgotten =
                store::relay::delete_history(&relay.broker, relay.id, &self.fence).await;
            if !forgotten.map_err(Trouble::Broker)? {
                return Err(Trouble::LeaseLost);
            }
        }
        let restamped = self.session.restamp().await.map_err(Trouble::Origin)?;
        if restamped > 0 {
            tracing::warn!(origin = %relay.name, restamped, "rows had transaction ids that this Postgres cluster has not assigned");
        }
        // After the restamp has committed: this snapshot shows every row that is there.
        let opening = self.session.open_window(NOTHING, None, 0, 0);
        let opened = opening.await.map_err(Trouble::Origin)?;
        self.check_session(&opened.identity)?;
        // Nobody knows the age of rows from another life of the database.
        let stored = self.position.as_ref();
        let is_same = stored.is_some_and(|position| {
            position.system_identifier == opened.identity.system_identifier
        });
        let oldest = match is_same && restamped == 0 && relay.mapping.is_none() {
            true => self.session.find_oldest().await.map_err(Trouble::Origin)?,
            false => None,
        };
        let mut position = self.mark(opened.identity).await?;
        position.window = Some(Window {
            since: NOTHING.to_owned(),
            after_seq: i64::MIN,
            // The streams also have the rows that another origin of this broker relayed.
            is_rerelay: !is_first || !self.formers.is_empty(),
            // A time to come was noted by a clock that was ahead, and says nothing.
            oldest: oldest.filter(|oldest| !is_first && *oldest <= relay.cluster.now()),
        });
        self.append(position.clone(), Page::default()).await?;
        self.relay_window(position).await
    }
}
