//! A step: the rows that became visible between two snapshots, in the order of seq. A small window comes with the statement
//! that opens it. A large one is counted (`backlog`), its places are found part by part, and its pages are read by place,
//! the next page while the last one is being appended. The position inside the window is the last seq, so memory is bounded
//! and a crash resumes there.

use std::time::Instant;

use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

use super::append::Prepared;
use super::backlog::{Effort, Part};
use super::decide::{Next, Since, passed_through};
use super::page::{self, Page};
use super::position::{Position, Window};
use super::status::State;
use super::task::{Run, Stepped};
use super::trouble::Trouble;
use crate::domain::mapping::Pickup;
use crate::failpoint;
use crate::store::origin::{Identity, Ids, Place};
use crate::stream::Wanted;

/// Rows whose ids are read at a time.
const IDS_CHUNK_ROWS: usize = 10_000;
/// How often a window is counted again whose rows are not where they were.
const RECOUNTS_MAX: usize = 5;
/// How far the clocks of the broker's nodes can be from its database's.
const CLOCKS_APART: TimeDelta = TimeDelta::hours(1);

impl Run<'_> {
    /// Moves on by one step, as the outbox is read.
    pub(super) async fn step(&mut self) -> Result<Stepped, Trouble> {
        match self.relay.pickup() {
            Pickup::Snapshot => self.step_by_snapshot().await,
            Pickup::Delete => self.step_by_deletion().await,
        }
    }

    /// Opens the next window and relays it.
    async fn step_by_snapshot(&mut self) -> Result<Stepped, Trouble> {
        let options = &self.relay.options;
        let now = self.relay.cluster.now();
        let started = Instant::now();
        if self.is_unchanged().await? {
            self.note_relayed_through(now);
            return Ok(Stepped { rows: 0 });
        }
        let since = Since::of(self.position.as_ref(), self.cursor.as_deref());
        let max_rows = match since.reads_rows {
            true => self.caution.page_rows(options.page_rows),
            false => 0,
        };
        let opening =
            self.session
                .open_window(since.snapshot, since.mark, max_rows, options.page_bytes);
        let opened = match opening.await {
            // Some row cannot be read: all are read by their places, which parts it from the others.
            Err(error) if error.is_row_unreadable() && max_rows > 0 => {
                let (snapshot, mark) = (since.snapshot, since.mark);
                let opening = self.session.open_window(snapshot, mark, 0, 0);
                let mut opened = opening.await.map_err(Trouble::Origin)?;
                opened.has_more = true;
                opened
            }
            other => other.map_err(Trouble::Origin)?,
        };
        let last = since.snapshot.to_owned();
        let identity = opened.identity;
        self.check_session(&identity)?;
        failpoint::reach("relay.window_opened");
        self.relay.status.send_modify(|status| {
            status.step_count += 1;
            status.step_time = started.elapsed();
        });
        let found = match opened.has_more {
            true => (1, false),
            false => (opened.rows.len(), opened.is_whole),
        };
        let numbers = (self.number, self.emptied);
        let rows = match Next::of(self.position.as_ref(), numbers, &identity, found) {
            Next::Gap => {
                self.note_gap();
                self.rerelay("the broker's database went back in time")
                    .await?
            }
            Next::Rerelay(why) => self.rerelay(why).await?,
            Next::Resume => match self.position.clone() {
                Some(position) => self.relay_window(position).await?,
                None => 0,
            },
            Next::Rest => {
                self.cursor = Some(identity.snapshot);
                0
            }
            Next::Append => {
                let count = opened.rows.len();
                let position = self.mark(identity).await?;
                self.relay
                    .status
                    .send_modify(|status| status.lag_rows = count as u64);
                self.append(position, Page::of(opened.rows)).await?;
                count
            }
            Next::Large => {
                drop(opened.rows);
                let mut position = self.mark(identity).await?;
                position.window = Some(Window {
                    since: last,
                    after_seq: i64::MIN,
                    is_rerelay: false,
                    oldest: None,
                });
                if self.caution.is_active() {
                    // Tried again, it is this window, and counted already.
                    self.append(position.clone(), Page::default()).await?;
                }
                self.relay_window(position).await?
            }
        };
        self.note_relayed_through(now);
        Ok(Stepped { rows })
    }

    fn note_relayed_through(&self, now: DateTime<Utc>) {
        self.relay.status.send_modify(|status| {
            status.lag_rows = 0;
            status.relayed_through = Some(now);
        });
    }

    /// Whether nothing can be new since a window of this session that had nothing: what it read, and all that it looked at, is as it was.
    async fn is_unchanged(&mut self) -> Result<bool, Trouble> {
        let (Some(cursor), Some(backend_pid)) = (&self.cursor, self.backend_pid) else {
            return Ok(false);
        };
        let asking = self.session.is_unchanged(cursor, backend_pid);
        asking.await.map_err(Trouble::Origin)
    }

    /// Checks that must hold for every position.
    pub(super) fn check_session(&mut self, identity: &Identity) -> Result<(), Trouble> {
        if identity.in_recovery {
            return Err(Trouble::Standby);
        }
        if *self.backend_pid.get_or_insert(identity.backend_pid) != identity.backend_pid {
            return Err(Trouble::Reload("another session of the origin answered"));
        }
        Ok(())
    }

    /// Leaves a mark, and makes the position that it stands behind. The order is the point: the snapshot was taken before, so once
    /// the mark is flushed so is every commit that the snapshot shows, and its own transaction id keeps all those before the
    /// snapshot's xmax from being handed out again; the position is stored after.
    pub(super) async fn mark(&mut self, identity: Identity) -> Result<Position, Trouble> {
        let mark = if self.relay.is_local {
            None
        } else {
            let mark = Uuid::now_v7();
            let marked = self.session.insert_mark(mark).await;
            marked.map_err(Trouble::Origin)?;
            failpoint::reach("relay.mark_written");
            self.rotation.mark_count += 1;
            Some(mark)
        };
        Ok(Position {
            snapshot: identity.snapshot,
            window: None,
            mark,
            system_identifier: identity.system_identifier,
            timeline: identity.timeline,
            taken: Vec::new(),
            recheck: None,
            gaps: self.gaps,
        })
    }

    /// Relays the rest of the position's window. Returns the number of its rows.
    pub(super) async fn relay_window(&mut self, position: Position) -> Result<usize, Trouble> {
        let longest = self.relay.options.piece_time;
        let setting = self.session.read_backlog(Some(longest)).await;
        setting.map_err(Trouble::Origin)?;
        let relayed = self.relay_parts(position).await;
        // After other troubles the session is dropped.
        if matches!(relayed, Ok(_) | Err(Trouble::RowsRefused { .. })) {
            let setting = self.session.read_backlog(None).await;
            setting.map_err(Trouble::Origin)?;
        }
        relayed
    }

    async fn relay_parts(&mut self, position: Position) -> Result<usize, Trouble> {
        let Some(window) = position.window.clone() else {
            return Ok(0);
        };
        if !window.is_rerelay {
            self.relay.set_state(State::Running, None);
        }
        let mut after = window.after_seq;
        let mut rows = None;
        let mut recounts = 0;
        loop {
            let left = self.count_backlog(&position, &window, after).await?;
            if rows.is_none() {
                rows = Some(left);
                self.relay
                    .status
                    .send_modify(|status| status.lag_rows = left);
            }
            let part = self.read_part(&window, after).await?;
            let is_done = match &part {
                None => false,
                Some(part) => {
                    let pages = cut(
                        &part.places,
                        self.caution.page_rows(self.relay.options.page_rows),
                        self.relay.options.page_bytes,
                    );
                    self.relay_pages(&position, part, &pages).await?
                }
            };
            let Some(part) = part.filter(|_| is_done) else {
                // A row was not where it was counted: look again, after what was appended.
                recounts += 1;
                if recounts > RECOUNTS_MAX {
                    return Err(Trouble::Reload(
                        "rows of the outbox keep moving while they are read",
                    ));
                }
                self.caution.backlog = None;
                let stored = self.position.as_ref().and_then(|p| p.window.as_ref());
                after = stored.map_or(window.after_seq, |stored| stored.after_seq);
                continue;
            };
            if part.is_last {
                self.caution.backlog = None;
                self.caution.effort = Effort::new(self.relay.options.manifest_rows);
                let rows = rows.unwrap_or(left);
                return Ok(usize::try_from(rows).unwrap_or(usize::MAX));
            }
            after = part.through;
        }
    }

    /// The next part of the window; in a re-relay without what the streams have.
    async fn read_part(&mut self, window: &Window, after: i64) -> Result<Option<Part>, Trouble> {
        let Some(mut part) = self.find_part(after).await? else {
            return Ok(None);
        };
        if !window.is_rerelay {
            return Ok(Some(part));
        }
        let relay = self.relay;
        let grant = relay.lookups.take();
        while !part.is_last && part.places.len() < grant.rows() {
            let Some(next) = self.find_part(part.through).await? else {
                return Ok(None);
            };
            part.places.extend(next.places);
            (part.through, part.is_last) = (next.through, next.is_last);
        }
        let mut wanted = Wanted::default();
        for places in part.places.chunks(IDS_CHUNK_ROWS) {
            if relay.supervisor.is_stopping() {
                return Err(Trouble::Stopping);
            }
            let ids = page::read_ids(&mut self.session, places).await;
            let ids = ids.map_err(Trouble::Origin)?;
            if ids.len() < places.len() {
                return Ok(None);
            }
            for ids in ids {
                match ids {
                    Some(Ids { topic, source, id }) => wanted.push(&topic, &source, &id),
                    None => wanted.push_unknown(),
                }
            }
        }
        let since = window.oldest.map(|oldest| oldest - CLOCKS_APART);
        let present = self.find_present(wanted, since).await?;
        let mut is_present = present.into_iter();
        part.places.retain(|_| !is_present.next().unwrap_or(false));
        Ok(Some(part))
    }

    /// Finds which of an origin's messages the streams have.
    pub(super) async fn find_present(
        &self,
        wanted: Wanted,
        since: Option<DateTime<Utc>>,
    ) -> Result<Vec<bool>, Trouble> {
        let relay = self.relay;
        let is_stopping = || relay.supervisor.is_stopping();
        // Under its present name, and under those that this broker knew it by before.
        let mut origins = vec![relay.id];
        origins.extend(&self.formers);
        let finding = relay
            .stream
            .find_present(&origins, wanted, since, is_stopping);
        finding.await.map_err(|error| match error {
            crate::stream::Error::Store(error) => Trouble::Broker(error),
            _ => Trouble::Stopping,
        })
    }

    /// Appends a chunk's pages, reading each while the one before is appended. Returns false when a row was not in its place.
    async fn relay_pages(
        &mut self,
        position: &Position,
        chunk: &Part,
        pages: &[&[Place]],
    ) -> Result<bool, Trouble> {
        let mut in_flight: Option<Prepared> = None;
        let mut is_whole = true;
        for (index, page) in pages.iter().enumerate() {
            let reading = Page::read(&mut self.session, page);
            let rows = match in_flight.take() {
                None => reading.await,
                Some(prepared) => {
                    let append = self.relay.stream.append(prepared.member);
                    let (placed, rows) = tokio::join!(append, reading);
                    self.settle(prepared.sent, placed)?;
                    rows
                }
            };
            if self.relay.supervisor.is_stopping() {
                return Err(Trouble::Stopping);
            }
            let rows = rows.map_err(Trouble::Origin)?;
            if rows.len() != page.len() {
                is_whole = false;
                break;
            }
            let is_end = index + 1 == pages.len();
            let last = page.last().map_or(chunk.through, |place| place.seq);
            let passed = passed_through(last, is_end, chunk.through, chunk.is_last);
            in_flight = Some(self.prepare(position.passed(passed), rows).await?);
        }
        if let Some(prepared) = in_flight {
            let placed = self.relay.stream.append(prepared.member).await;
            self.settle(prepared.sent, placed)?;
        }
        // A window that ends with rows that the streams have, or without any, is closed nevertheless; and a part of them is not looked
        // up twice.
        let is_looked_up = position.is_rerelay();
        if is_whole && pages.is_empty() && (chunk.is_last || is_looked_up) {
            let passed = passed_through(chunk.through, true, chunk.through, chunk.is_last);
            self.append(position.passed(passed), Page::default())
                .await?;
        }
        Ok(is_whole)
    }
}

/// Cuts places into pages, bounded by rows and by bytes, never between equal seqs.
pub(super) fn cut(places: &[Place], max_rows: usize, max_bytes: usize) -> Vec<&[Place]> {
    let mut pages = Vec::new();
    let mut rest = places;
    while !rest.is_empty() {
        let mut bytes = 0;
        let mut end = 0;
        for place in rest {
            bytes += place.bytes as usize;
            if end > 0 && (end >= max_rows || bytes > max_bytes) && place.seq != rest[end - 1].seq {
                break;
            }
            end += 1;
        }
        let (page, after) = rest.split_at(end);
        pages.push(page);
        rest = after;
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(seq: i64, bytes: u32) -> Place {
        Place {
            seq,
            leaf: 0,
            block: 0,
            line: 1,
            bytes,
        }
    }

    #[test]
    fn pages_are_bounded_and_never_cut_a_seq() {
        let check = |places: &[(i64, u32)], expected: &[usize]| {
            let places: Vec<Place> = places.iter().map(|&(s, b)| place(s, b)).collect();
            let pages: Vec<usize> = cut(&places, 3, 100).iter().map(|p| p.len()).collect();
            assert_eq!(pages, expected, "{places:?}");
        };
        check(&[], &[]);
        check(&[(1, 0), (2, 0), (3, 0)], &[3]);
        check(&[(1, 0), (2, 0), (3, 0), (4, 0)], &[3, 1]);
        check(&[(1, 60), (2, 60), (3, 500), (4, 40)], &[1, 1, 1, 1]);
        check(&[(1, 40), (2, 60), (3, 1)], &[2, 1]);
        check(&[(1, 0), (2, 0), (3, 0), (3, 0), (3, 0), (4, 0)], &[5, 1]);
    }
}
