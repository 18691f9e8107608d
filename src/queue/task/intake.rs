//! How messages come to a queue: by the feed while it keeps up, by scans of the log when it does not, and their payloads
//! by loads ahead of the receives.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Done, Task, log_read_failure};
use crate::domain::id::{Offset, StreamId};
use crate::domain::message::{Entry, Priority};
use crate::domain::policy;
use crate::domain::queue::Found;
use crate::queue::log::letters::Fetched;
use crate::stream::{self, Scan};

/// Ready messages in memory (offsets only) after which the scan pauses; it goes on at half of it.
const READY_MAX: u64 = 200_000;
/// As `READY_MAX`, where ready messages may be behind many that are not: with order by key and with lanes.
const ORDERED_MAX: u64 = 4_000_000;
/// Bytes of events that wait in memory for receives.
const LOADED_BYTES: usize = 4 * 1024 * 1024;
/// A queue this close to the end of the stream attaches itself to the feed.
const NEAR: i64 = 2_000;
/// Matching messages of one scan.
const SCAN_ITEMS: usize = 10_000;
/// Most messages of one load.
const LOAD_ITEMS: usize = 1_000;
/// A read that failed is tried again after this.
pub(super) const RETRY: Duration = Duration::from_millis(250);
/// Without a receive for so long, payloads are not kept.
const UNUSED: Duration = Duration::from_secs(60);

/// The source of the queue's messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// From the log.
    Scanning,
    /// From the log up to this offset, then from the feed.
    Joining(Offset),
    /// From the feed.
    Fed,
}

/// A load that ended.
#[derive(Debug)]
pub(super) struct Loaded {
    fetched: Result<Fetched, stream::Error>,
}

/// Messages on their way into the queue.
#[derive(Debug)]
pub(super) struct Intake {
    mode: Mode,
    last: watch::Receiver<Offset>,
    /// Up to where retention dropped everything.
    floor: watch::Receiver<Offset>,
    /// As the floor, as far as the queue has given up the messages below it.
    lost_through: Offset,
    loaded: BTreeMap<i64, Arc<Entry>>,
    loaded_bytes: usize,
    /// Bytes of an event, about.
    usual_bytes: usize,
    is_scanning: bool,
    /// The end of the stream as the scan under way began: what it did not find up to there is not there.
    scan_end: Offset,
    /// Nothing is looked at before the new patterns are known.
    is_pinned: bool,
    /// The scan under way goes by former patterns: what it finds does not count.
    is_scan_void: bool,
    is_loading: bool,
    /// How many of the next messages may be taken before it is worth checking whether the rest is in memory.
    known_ahead: usize,
    pub(super) retry_at: Option<Instant>,
    received_at: Option<Instant>,
}

impl Intake {
    pub(super) fn new(stream: &stream::Handle, id: StreamId) -> Self {
        Self {
            mode: Mode::Scanning,
            last: stream.last_offset(id),
            floor: stream.floor(id),
            lost_through: Offset(0),
            loaded: BTreeMap::new(),
            loaded_bytes: 0,
            usual_bytes: 64 * 1024,
            is_scanning: false,
            scan_end: Offset(0),
            is_pinned: false,
            is_scan_void: false,
            is_loading: false,
            known_ahead: 0,
            retry_at: None,
            received_at: None,
        }
    }

    /// The bytes of a message that is loaded.
    /// The stream's end, as far as this node knows it.
    pub(super) fn log_end(&self) -> Offset {
        *self.last.borrow()
    }

    pub(super) fn size(&self, offset: Offset) -> Option<u64> {
        self.loaded
            .get(&offset.0)
            .map(|entry| entry.event.len() as u64)
    }

    pub(super) fn take(&mut self, offset: Offset) -> Option<Arc<Entry>> {
        let entry = self.loaded.remove(&offset.0)?;
        self.loaded_bytes -= entry.event.len();
        self.known_ahead = self.known_ahead.saturating_sub(1);
        Some(entry)
    }

    pub(super) fn appended_at(&self, offset: Offset) -> Option<DateTime<Utc>> {
        self.loaded.get(&offset.0).map(|entry| entry.appended_at)
    }

    pub(super) fn received(&mut self) {
        self.received_at = Some(Instant::now());
    }

    pub(super) fn received_at(&self) -> Option<Instant> {
        self.received_at
    }

    pub(super) fn set_received_at(&mut self, at: Option<Instant>) {
        self.received_at = at;
    }

    /// The time to repeat a failed read; far away when none failed.
    pub(super) fn retry_at(&self, now: Instant) -> Instant {
        self.retry_at.unwrap_or(now + Duration::from_secs(3_600))
    }

    pub(super) fn forget_if_unused(&mut self) {
        let is_used = self.received_at.is_some_and(|at| at.elapsed() < UNUSED);
        if !is_used && !self.is_loading {
            self.loaded = BTreeMap::new();
            self.loaded_bytes = 0;
        }
    }

    /// Whether payloads wait in memory for a receive.
    pub(super) fn has_loaded(&self) -> bool {
        !self.loaded.is_empty()
    }

    pub(super) fn is_loading(&self) -> bool {
        self.is_loading
    }

    fn keep(&mut self, entry: Arc<Entry>) {
        let bytes = entry.event.len();
        self.usual_bytes = (self.usual_bytes * 15 + bytes) / 16;
        self.loaded_bytes += bytes;
        if let Some(before) = self.loaded.insert(entry.offset.0, entry) {
            self.loaded_bytes -= before.event.len();
        }
    }

    /// Waits until retention drops more. Never resolves when the stream is gone. Cancel-safe.
    pub(super) async fn floor_raised(&mut self) {
        if self.floor.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    pub(super) fn may_read(&self) -> bool {
        self.retry_at.is_none_or(|at| at <= Instant::now())
    }
}

impl Task {
    /// Gives up what retention's hard limit dropped, live or not: its receipts are `gone` from then on. Otherwise what
    /// happens to be in memory would still go out, until a restart.
    pub(super) fn give_up_dropped(&mut self) {
        let floor = *self.intake.floor.borrow_and_update();
        if floor <= self.intake.lost_through {
            return;
        }
        self.intake.lost_through = floor;
        while let Some((&offset, _)) = self.intake.loaded.first_key_value()
            && offset <= floor.0
        {
            self.intake.take(Offset(offset));
        }
        let count = self.machine.lose_through(floor);
        if count > 0 {
            self.note_lost(count, floor);
        }
    }

    fn note_lost(&self, count: usize, through: Offset) {
        tracing::error!(
            queue = %self.parts.name,
            count,
            through = %through,
            "unsettled messages are gone: retention's hard limit passed the queue"
        );
        self.parts.shared.metrics.lost.inc_by(count as u64);
    }

    /// Takes what the feed brought, and starts the next scan if the queue is behind.
    pub(super) fn take_in(&mut self) {
        if self.intake.is_pinned {
            return;
        }
        if self.intake.mode == Mode::Fed {
            // Before the feed is emptied: the watermark's reader looks at the feed first, then at this.
            self.parts.progress.idle.store(false, Ordering::SeqCst);
            let fed = self.parts.dispatch.take(&self.parts.feed);
            for entry in fed.entries {
                self.machine.found(Found {
                    offset: entry.offset,
                    key_hash: entry.key_hash,
                    priority: entry.priority,
                });
                if self.intake.loaded_bytes < self.share(&entry) {
                    self.intake.keep(entry);
                }
            }
            self.machine.looked_through(fed.through);
            if !fed.attached {
                self.intake.mode = Mode::Scanning;
            } else if self.machine.counts().fresh >= self.found_max() {
                self.parts.dispatch.detach(&self.parts.feed);
                self.intake.mode = Mode::Scanning;
            }
        }
        if self.intake.mode != Mode::Fed && !self.intake.is_scanning && self.intake.may_read() {
            self.scan_on();
        }
    }

    fn found_max(&self) -> u64 {
        let settings = self.machine.settings();
        match settings.ordering == policy::Ordering::Key || settings.priorities {
            true => ORDERED_MAX,
            false => READY_MAX,
        }
    }

    /// How much may be loaded for a message that the feed brought to be kept. What does not go out next must not crowd
    /// out what does.
    fn share(&self, entry: &Entry) -> usize {
        let goes_early = self.machine.settings().priorities && entry.priority == Priority::High;
        match (goes_early, self.machine.is_open(entry.offset)) {
            (true, _) => 2 * LOADED_BYTES,
            (false, true) => LOADED_BYTES,
            (false, false) => LOADED_BYTES / 4,
        }
    }

    fn scan_on(&mut self) {
        let scanned = self.machine.scanned_through();
        if self.intake.mode == Mode::Scanning {
            if self.machine.counts().fresh >= self.found_max() / 2 {
                return;
            }
            if self.intake.last.borrow().0 - scanned.0 <= NEAR {
                let base = self.parts.dispatch.attach(&self.parts.feed);
                self.intake.mode = Mode::Joining(base);
            }
        }
        if let Mode::Joining(base) = self.intake.mode
            && scanned >= base
        {
            self.intake.mode = Mode::Fed;
            return self.take_in();
        }
        let scan = Scan {
            stream: self.parts.stream_id,
            after: scanned,
            topics: self.parts.patterns.to_vec(),
            max_items: SCAN_ITEMS,
        };
        let scans = self.parts.scans.clone();
        self.intake.is_scanning = true;
        self.intake.scan_end = match self.intake.mode {
            Mode::Joining(base) => base,
            Mode::Scanning | Mode::Fed => *self.intake.last.borrow(),
        };
        self.work.push(Box::pin(
            async move { Done::Scanned(scans.scan(scan).await) },
        ));
    }

    pub(super) fn finish_scan(&mut self, scanned: Result<stream::Scanned, stream::Error>) {
        self.intake.is_scanning = false;
        if std::mem::take(&mut self.intake.is_scan_void) {
            return;
        }
        let scanned = match scanned {
            Ok(scanned) => scanned,
            Err(error) => {
                log_read_failure(&self.parts.name, &error);
                self.intake.retry_at = Some(Instant::now() + RETRY);
                return;
            }
        };
        self.intake.retry_at = None;
        let before = self.machine.scanned_through();
        for item in scanned.items {
            self.machine.found(Found {
                offset: item.offset,
                key_hash: item.key_hash,
                priority: item.priority,
            });
        }
        self.machine.looked_through(scanned.through);
        if self.machine.scanned_through() > before {
            return;
        }
        // Nothing is left of what comes after: retention dropped it. What was appended since the scan began is not
        // meant: it may be there and match.
        self.machine.looked_through(self.intake.scan_end);
    }

    /// The patterns are about to change: the scan position stays where it is, so that the one that is journaled with the
    /// change is the one from which the new patterns hold, here and after a restart.
    pub(super) fn pin(&mut self) {
        self.take_in();
        self.intake.is_pinned = true;
        self.intake.is_scan_void = self.intake.is_scanning;
        self.parts.progress.idle.store(false, Ordering::SeqCst);
    }

    /// Resumes with the current patterns: the former ones chose everything that the feed has brought since.
    pub(super) fn unpin(&mut self) {
        if std::mem::take(&mut self.intake.is_pinned) {
            self.parts.dispatch.detach(&self.parts.feed);
            self.intake.mode = Mode::Scanning;
        }
        let patterns = Arc::clone(&self.parts.patterns);
        self.parts.dispatch.subscribe(self.machine.id(), patterns);
    }

    /// Whether "empty" would be a guess: messages may be on their way.
    pub(super) fn is_looking(&self) -> bool {
        self.intake.is_scanning
            || self.intake.is_loading && self.machine.has_ready()
            || self.intake.is_pinned
            || self.machine.is_arranging()
            || self.intake.mode != Mode::Fed
            || *self.intake.last.borrow() > self.parts.dispatch.done()
    }

    /// Loads the messages that go out next, if somebody waits for them or did lately.
    pub(super) fn load_ahead(&mut self, is_waited_for: bool) {
        let lately = self
            .intake
            .received_at
            .is_some_and(|at| at.elapsed() < Duration::from_secs(5));
        if self.intake.is_loading || !self.intake.may_read() || !(is_waited_for || lately) {
            return;
        }
        let is_missing = |offset: &Offset| !self.intake.loaded.contains_key(&offset.0);
        // Each round comes by here, and a look at all that goes out next costs more than the rest of a small receive.
        if self.intake.known_ahead > 0 && !self.machine.ready(1).iter().any(is_missing) {
            return;
        }
        let wanted = (LOADED_BYTES / self.intake.usual_bytes.max(256)).clamp(16, LOAD_ITEMS);
        let ready = self.machine.ready(wanted);
        let missing = ready.iter().filter(|offset| is_missing(offset)).count();
        // The next one is missing, or so many that a read is worth its while.
        let is_next_missing = ready.first().is_some_and(is_missing);
        if missing == 0 || !is_next_missing && missing * 2 < wanted {
            self.intake.known_ahead = (ready.len() - missing) / 2;
            return;
        }
        self.intake.known_ahead = 0;
        let mut offsets = self.machine.upcoming(wanted);
        offsets.retain(is_missing);
        self.intake.is_loading = true;
        let (source, reads) = (self.source(), Arc::clone(&self.parts.reads));
        let reopened = self.reopened(&offsets);
        self.work.push(Box::pin(async move {
            let _permit = reads.acquire_owned().await;
            let fetched = source.fetch(offsets, &reopened).await;
            Done::Loaded(Loaded { fetched })
        }));
    }

    pub(super) fn finish_load(&mut self, loaded: Loaded) {
        self.intake.is_loading = false;
        let Fetched { entries, missing } = match loaded.fetched {
            Ok(fetched) => fetched,
            Err(error) => {
                log_read_failure(&self.parts.name, &error);
                self.intake.retry_at = Some(Instant::now() + RETRY);
                return;
            }
        };
        self.intake.retry_at = None;
        for entry in entries {
            self.intake.keep(entry);
        }
        self.unload();
        if !missing.is_empty() {
            self.note_lost(missing.len(), missing[missing.len() - 1]);
            self.machine.lose(missing);
        }
    }

    /// Whether the queue keeps up and has nothing unsettled.
    pub(super) fn is_quiet(&self) -> bool {
        self.intake.mode == Mode::Fed
            && !self.intake.is_pinned
            && self.machine.oldest_unsettled().is_none()
    }

    /// Forgets payloads when they are too many: first what does not go out next, then what does so last.
    fn unload(&mut self) {
        if self.intake.loaded_bytes <= 2 * LOADED_BYTES {
            return;
        }
        let next = self.machine.ready(LOAD_ITEMS);
        let is_next: HashSet<Offset> = next.iter().copied().collect();
        let loaded = self
            .intake
            .loaded
            .keys()
            .rev()
            .map(|&offset| Offset(offset));
        let others: Vec<Offset> = loaded.filter(|offset| !is_next.contains(offset)).collect();
        for offset in others.into_iter().chain(next.into_iter().skip(1).rev()) {
            if self.intake.loaded_bytes <= LOADED_BYTES {
                return;
            }
            self.intake.take(offset);
        }
    }

    /// Tells the watermark's reader whether the dispatcher's progress is the queue's own.
    pub(super) fn note_idle(&self) {
        let is_idle = self.is_quiet();
        let is_written = !self.is_writing();
        self.parts
            .progress
            .idle
            .store(is_idle && is_written, Ordering::SeqCst);
    }
}
