//! A mapped table whose rows are picked up by deletion: every committed row in it still has to be relayed, except the rows
//! that the stored position names.
//!
//! A step reads the first rows in order, leaves the mark, and appends; the position of that very commit names the rows.
//! Only then are the rows deleted, and only when that is certain are the next ones read. If the relay is killed at any
//! point, its successor finds a position that names the rows: it deletes those that are still there, which can be repeated,
//! and reads on. So a row is in the streams as soon as the position names it, and never twice, whether the delete was sent,
//! committed or neither; and a row is deleted only after its message is durable. A relay that was fenced off can still
//! delete rows, but only rows that were appended.
//!
//! A table that went back in time holds rows again that were relayed and deleted. The mark shows it, and then all rows of
//! the table are looked up in the streams once, before anything is relayed.

use std::collections::HashMap;
use std::time::Instant;

use uuid::Uuid;

use super::decide::went_back;
use super::page::{self, Page, kept};
use super::position::Recheck;
use super::status::State;
use super::task::{Run, Stepped};
use super::trouble::Trouble;
use crate::failpoint;
use crate::store::mapped::Batch;
use crate::store::origin::Ids;
use crate::stream::{Rejected, Wanted};

/// Rows that are read at a time when some cannot be read.
const UNREADABLE_PART_ROWS: usize = 100;
/// Rows that are looked up in the streams at a time.
const RECHECK_CHUNK_ROWS: usize = 200_000;

impl Run<'_> {
    /// Relays a batch.
    pub(super) async fn step_by_deletion(&mut self) -> Result<Stepped, Trouble> {
        let options = &self.relay.options;
        let now = self.relay.cluster.now();
        let started = Instant::now();
        let mark = self.position.as_ref().and_then(|position| position.mark);
        // What the position took may still be there: then this look is for the mark alone.
        let max_rows = if self.is_ready() {
            self.caution.page_rows(options.page_rows)
        } else {
            0
        };
        let (batch, unread) = self.read_batch(mark, max_rows).await?;
        self.check_session(&batch.identity)?;
        self.relay.status.send_modify(|status| {
            status.step_count += 1;
            status.step_time = started.elapsed();
        });
        let is_gap = self.number < self.emptied;
        if is_gap {
            self.note_gap();
        }
        let is_taken_over = self.position.is_none() && !self.formers.is_empty();
        let went_back = self
            .position
            .as_ref()
            .and_then(|position| went_back(position, &batch.identity));
        let why = went_back
            .or(is_gap.then_some("the broker's database went back in time"))
            .or(is_taken_over.then_some("this broker has relayed it under another origin's name"));
        let is_cut_short = self
            .position
            .as_ref()
            .is_some_and(|position| position.recheck == Some(Recheck::Pass));
        if why.is_some() || is_cut_short {
            self.recheck(why.unwrap_or("the last full read was not finished"))
                .await?;
            return Ok(Stepped { rows: 0 });
        }
        if !self.is_ready() {
            self.settle_taken().await?;
            return Ok(Stepped {
                rows: options.page_rows,
            });
        }
        let count = batch.keys.len();
        let lag = match batch.is_all {
            true => count as u64,
            false => self.session.count_rows().await.map_err(Trouble::Origin)?,
        };
        self.relay
            .status
            .send_modify(|status| status.lag_rows = lag);
        if count > 0 {
            let is_rest = !batch.is_all;
            let mut position = self.mark(batch.identity).await?;
            position.taken = batch.keys;
            position.recheck = self
                .position
                .as_ref()
                .and_then(|position| position.recheck)
                .filter(|_| is_rest);
            let rows = batch.rows;
            self.append(position, Page { rows, unread }).await?;
            self.settle_taken().await?;
        }
        if batch.is_all {
            self.relay.status.send_modify(|status| {
                status.lag_rows = 0;
                status.relayed_through = Some(now);
            });
        }
        // A batch that was cut by its bytes has a next one as well.
        let rows = if batch.is_all {
            count
        } else {
            options.page_rows
        };
        Ok(Stepped { rows })
    }

    /// Reads the next batch, and lists the rows that cannot be read. Their keys are with the others': they leave the table as rows do
    /// that cannot become messages, with all that they have in the list.
    async fn read_batch(
        &mut self,
        mark: Option<Uuid>,
        max_rows: usize,
    ) -> Result<(Batch, Vec<Rejected>), Trouble> {
        let max_bytes = self.relay.options.page_bytes;
        let opening = self
            .session
            .open_batch(mark, max_rows, max_bytes, self.caution.left());
        match opening.await {
            Err(error) if error.is_row_unreadable() && max_rows > 0 => {}
            other => return Ok((other.map_err(Trouble::Origin)?, Vec::new())),
        }
        let opening = self.session.open_batch(mark, 0, 0, self.caution.left());
        let mut batch = opening.await.map_err(Trouble::Origin)?;
        let limit = max_rows + self.caution.left().len();
        let mut keys = self
            .session
            .first_keys(limit)
            .await
            .map_err(Trouble::Origin)?;
        keys.retain(|key| !self.caution.left().contains(key));
        keys.truncate(max_rows);
        batch.is_all = keys.is_empty();
        let mut unread = Vec::new();
        let mut broken = Vec::new();
        let mut bytes = 0;
        for part in keys.chunks(UNREADABLE_PART_ROWS) {
            let mut parts = vec![part];
            while let Some(part) = parts.pop() {
                match self.session.read_by_keys(part).await {
                    Ok(found) => {
                        // As they are ordered, not as they come.
                        let mut found: HashMap<_, _> = found.into_iter().collect();
                        for key in part {
                            if let Some(row) = found.remove(key) {
                                bytes += row.payload.as_ref().map_or(0, String::len)
                                    + row.payload_bytes.as_ref().map_or(0, Vec::len);
                                batch.rows.push(row);
                                batch.keys.push(key.clone());
                            }
                        }
                    }
                    Err(error) if !error.is_row_unreadable() => return Err(Trouble::Origin(error)),
                    Err(error) => match part {
                        [key] => broken.push((key.clone(), error)),
                        _ => {
                            let (first, second) = part.split_at(part.len() / 2);
                            parts.extend([second, first]);
                        }
                    },
                }
            }
            if bytes > max_bytes {
                break;
            }
        }
        for (key, error) in broken {
            // An internal error of every row is one of the table.
            if error.is_internal() && batch.rows.is_empty() {
                return Err(Trouble::Origin(error));
            }
            let raw = self.session.read_raw_by_key(&key).await;
            match kept(raw).map_err(Trouble::Origin)? {
                Some(raw) => {
                    unread.push(page::unread(0, &error, Some(raw)));
                    batch.keys.push(key);
                }
                None => {
                    let (origin, table) = (&self.relay.name, &self.relay.mapping);
                    let table = table.as_ref().map(|mapping| mapping.table.to_string());
                    tracing::error!(
                        %origin, table, key = key.join(", "), error = &error as &dyn std::error::Error,
                        "a row of the mapped table cannot be read and stays where it is: correct it or delete it"
                    );
                    if !self.caution.leave(key) {
                        return Err(Trouble::Origin(error));
                    }
                }
            }
        }
        Ok((batch, unread))
    }

    /// Whether the rows that the position took are known to be out.
    fn is_ready(&self) -> bool {
        let took = self
            .position
            .as_ref()
            .map_or(0, |position| position.taken.len());
        self.is_settled || took == 0
    }

    /// Takes out the rows that the stored position took.
    async fn settle_taken(&mut self) -> Result<(), Trouble> {
        let Some(position) = &self.position else {
            return Ok(());
        };
        let keys = position.taken.clone();
        self.take_out(&keys).await?;
        self.is_settled = true;
        Ok(())
    }

    async fn take_out(&mut self, keys: &[Vec<String>]) -> Result<(), Trouble> {
        let reader = self.relay.reader();
        failpoint::reach("relay.before_delete");
        let deleting = self.session.delete_rows(keys, reader, self.number);
        let left = deleting.await.map_err(Trouble::Origin)?;
        if left > 0 {
            // Reading on would relay them again.
            return Err(Trouble::Mapping(format!(
                "{left} relayed rows cannot be deleted from the table: a trigger, a rule or row security keeps them"
            )));
        }
        Ok(())
    }

    /// Looks up everything that the table holds, and takes out what the streams have.
    async fn recheck(&mut self, why: &'static str) -> Result<(), Trouble> {
        let relay = self.relay;
        relay.set_state(State::Rerelaying, Some(why.to_owned()));
        tracing::warn!(origin = %relay.name, position = self.number, "reading all rows of the mapped table: {why}");
        relay.status.send_modify(|status| status.rerelay_count += 1);
        let opening = self.session.open_batch(None, 0, 0, &[]);
        let batch = opening.await.map_err(Trouble::Origin)?;
        self.check_session(&batch.identity)?;
        let mut position = self.mark(batch.identity).await?;
        position.recheck = Some(Recheck::Pass);
        self.append(position.clone(), Page::default()).await?;
        let mut after: Option<Vec<String>> = None;
        loop {
            if relay.supervisor.is_stopping() {
                return Err(Trouble::Stopping);
            }
            let reading = self.session.read_keys(after.as_deref(), RECHECK_CHUNK_ROWS);
            let found = reading.await.map_err(Trouble::Origin)?;
            let is_last = found.len() < RECHECK_CHUNK_ROWS;
            after = found.last().map(|(key, _)| key.clone());
            let mut wanted = Wanted::default();
            let mut keys = Vec::with_capacity(found.len());
            for (key, Ids { topic, source, id }) in found {
                wanted.push(&topic, &source, &id);
                keys.push(key);
            }
            let present = self.find_present(wanted, None).await?;
            let relayed = keys.into_iter().zip(present);
            let relayed: Vec<_> = relayed
                .filter_map(|(key, is_present)| is_present.then_some(key))
                .collect();
            self.take_out(&relayed).await?;
            if is_last {
                break;
            }
        }
        position.recheck = Some(Recheck::Rest);
        self.append(position, Page::default()).await
    }
}
