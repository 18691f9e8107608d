//! Rows on their way into the streams: rows that become messages, rows that are listed as rejected, and the position that
//! is stored with them.

use std::collections::HashSet;

use chrono::{DateTime, Utc};

use super::decide::next_number;
use super::page::Page;
use super::position::Position;
use super::row;
use super::status::State;
use super::task::Run;
use super::trouble::Trouble;
use crate::domain::mapping::Pickup;
use crate::domain::message::Message;
use crate::store::origin::OutboxRow;
use crate::stream::{self, AppendError, Conditional, Member, Rejected};
use crate::{failpoint, store};

/// A member on its way.
pub(super) struct Prepared {
    pub(super) member: Member,
    pub(super) sent: Sent,
}

/// The meaning of a member's success.
pub(super) struct Sent {
    position: Position,
    /// Rows.
    count: usize,
    /// Rows that became messages.
    messages: usize,
    /// Rows that could not.
    rejected: usize,
    /// The rows' copies, where they go one by one.
    copies: Vec<String>,
}

impl Run<'_> {
    /// Appends rows and stores the position after them, from the stored one: one commit, or nothing.
    pub(super) async fn append(&mut self, position: Position, page: Page) -> Result<(), Trouble> {
        let mut prepared = self.prepare(position, page).await?;
        if failpoint::is_mutant("position-apart") {
            self.append_apart(&mut prepared.member).await?;
        }
        let placed = self.relay.stream.append(prepared.member).await;
        self.settle(prepared.sent, placed)
    }

    /// A planted fault: the messages in one commit, and the rest of the member, its position, in another.
    async fn append_apart(&self, member: &mut Member) -> Result<(), Trouble> {
        let Member::Relay { messages, .. } = member else {
            return Ok(());
        };
        let apart = Member::Publish {
            messages: std::mem::take(messages),
            check_ids: false,
            as_one: Vec::new(),
        };
        if !apart.messages().is_empty() {
            self.relay.stream.append(apart).await?;
        }
        Ok(())
    }

    fn next_number(&self) -> i64 {
        next_number(self.number, self.emptied)
    }

    /// Turns rows into a member that follows the stored position.
    pub(super) async fn prepare(
        &self,
        position: Position,
        page: Page,
    ) -> Result<Prepared, Trouble> {
        let count = page.len();
        let Page { rows, unread } = page;
        let copies = match self.caution.is_single() {
            true => rows.iter().map(|row| row::copy(row).to_string()).collect(),
            false => Vec::new(),
        };
        let (rows, refused) = self.caution.sort_out(rows);
        let rows = self.without_refused(&position, rows).await?;
        let converted = convert(rows, self.relay.cluster.now());
        let (messages, conditional, mut rejected) = self.without_mismatched(converted).await?;
        rejected.extend(unread);
        rejected.extend(refused);
        let rejected = self.without_listed(&position, rejected).await?;
        let rejected_count = rejected.len();
        let message_count = messages.len();
        let member = Member::Relay {
            messages,
            conditional,
            origin: self.relay.id,
            fence: self.fence.clone(),
            from: self.number,
            to: self.next_number(),
            position: position.to_text(),
            rejected,
        };
        failpoint::reach("relay.before_append");
        Ok(Prepared {
            member,
            sent: Sent {
                position,
                count,
                messages: message_count,
                rejected: rejected_count,
                copies,
            },
        })
    }

    /// A row whose payload is not what its topic's schema says is rejected: listed with all that it has, and in nobody's way.
    async fn without_mismatched(
        &self,
        (messages, of_rows, mut rejected): Converted,
    ) -> Result<(Vec<Message>, Vec<Conditional>, Vec<Rejected>), Trouble> {
        let refusals = self.relay.topics.find_refusals(&messages).await;
        let mut refusals = refusals
            .map_err(|_| Trouble::Stopping)?
            .into_iter()
            .peekable();
        if refusals.peek().is_none() {
            let conditional = of_rows.into_iter().filter_map(|(_, of_row)| of_row);
            return Ok((messages, conditional.collect(), rejected));
        }
        let (mut taken, mut conditional) = (Vec::with_capacity(messages.len()), Vec::new());
        for (place, (message, (seq, of_row))) in messages.into_iter().zip(of_rows).enumerate() {
            match refusals.next_if(|(refused, _)| *refused == place) {
                Some((_, reason)) => rejected.push(row::refuse(seq, message, reason)),
                None => {
                    taken.push(message);
                    conditional.extend(of_row);
                }
            }
        }
        rejected.sort_by_key(|row| row.seq);
        Ok((taken, conditional, rejected))
    }

    /// Takes note of an append's outcome.
    pub(super) fn settle(
        &mut self,
        sent: Sent,
        placed: Result<Vec<stream::Placed>, AppendError>,
    ) -> Result<(), Trouble> {
        let Sent {
            position,
            count,
            messages,
            rejected,
            copies,
        } = sent;
        let placed = match placed {
            Ok(placed) => placed,
            Err(error) if error.is_row_refused() => {
                let keeps_rows = self.relay.pickup() == Pickup::Snapshot;
                let reason = error.reason();
                return Err(
                    match self.caution.refused(count, copies, reason, keeps_rows) {
                        true => Trouble::RowsRefused {
                            count,
                            source: error,
                        },
                        false => Trouble::Append(error),
                    },
                );
            }
            Err(error) => return Err(error.into()),
        };
        if self.caution.passed(self.relay.options.page_rows) {
            self.relay.set_state(State::Running, None);
        }
        failpoint::reach("relay.after_append");
        // The append itself listed a message that expected another version of its key.
        let rejected = rejected + messages.saturating_sub(placed.len());
        self.number = self.next_number();
        self.is_settled = position.taken.is_empty();
        self.position = Some(position);
        self.cursor = None;
        let number = self.number;
        self.relay.status.send_modify(|status| {
            status.position = number;
            status.relayed_count += placed.len() as u64;
            status.rejected_count += rejected as u64;
            status.lag_rows = status.lag_rows.saturating_sub(count as u64);
        });
        if rejected > 0 {
            tracing::warn!(origin = %self.relay.name, rejected, "outbox rows cannot become messages: see the list of rejected rows");
        }
        Ok(())
    }

    fn is_rerelay(&self, position: &Position) -> bool {
        // The last page of a window, or of a table that went back, has a position without it.
        let is_previous = |previous: &Position| position.window.is_none() && previous.is_rerelay();
        position.is_rerelay() || self.position.as_ref().is_some_and(is_previous)
    }

    /// In a re-relay, leaves out the rows that the stream did not take for the version that they expect: they are listed.
    async fn without_refused(
        &self,
        position: &Position,
        rows: Vec<OutboxRow>,
    ) -> Result<Vec<OutboxRow>, Trouble> {
        let copies = rows.iter().map(row::to_conditional);
        let expecting: Vec<(i64, String)> = copies
            .flatten()
            .map(|row| (row.seq, row.outbox_row))
            .collect();
        if expecting.is_empty() || !self.is_rerelay(position) {
            return Ok(rows);
        }
        let seqs: Vec<i64> = expecting.iter().map(|(seq, _)| *seq).collect();
        let listed = self.find_listed(expecting).await?;
        let listed = seqs.into_iter().zip(listed);
        let listed: HashSet<i64> = listed.filter_map(|(seq, is)| is.then_some(seq)).collect();
        let mut rows = rows;
        rows.retain(|row| !listed.contains(&row.seq));
        Ok(rows)
    }

    async fn find_listed(&self, rows: Vec<(i64, String)>) -> Result<Vec<bool>, Trouble> {
        let relay = self.relay;
        let listed = store::relay::find_listed_rejected(&relay.broker, relay.id, rows).await;
        listed.map_err(Trouble::Broker)
    }

    /// In a re-relay, leaves out the rejected rows that are listed already.
    async fn without_listed(
        &self,
        position: &Position,
        rejected: Vec<Rejected>,
    ) -> Result<Vec<Rejected>, Trouble> {
        if rejected.is_empty() || !self.is_rerelay(position) {
            return Ok(rejected);
        }
        let rows = rejected
            .iter()
            .map(|row| (row.seq, row.outbox_row.clone()))
            .collect();
        let listed = self.find_listed(rows).await?;
        let unlisted = rejected
            .into_iter()
            .zip(listed)
            .filter_map(|(row, is_listed)| (!is_listed).then_some(row));
        Ok(unlisted.collect())
    }
}

/// Messages with the numbers of their rows and what they expect, and the rows that cannot become any.
type Converted = (Vec<Message>, Vec<(i64, Option<Conditional>)>, Vec<Rejected>);

fn convert(rows: Vec<OutboxRow>, now: DateTime<Utc>) -> Converted {
    let mut messages = Vec::with_capacity(rows.len());
    let mut of_rows = Vec::with_capacity(rows.len());
    let mut rejected = Vec::new();
    for row in rows {
        let of_row = (row.seq, row::to_conditional(&row));
        match row::to_message(row, now) {
            Ok(message) => {
                messages.push(message);
                of_rows.push(of_row);
            }
            Err(row) => rejected.push(*row),
        }
    }
    (messages, of_rows, rejected)
}
