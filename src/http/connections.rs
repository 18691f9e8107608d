//! The places for connections, and their holders.
//!
//! When all places are taken, the connections that have been idle for longest end to make room. Where none is idle there
//! are a few more places, each for one short request: an operator's probes are answered there, so that nothing kills a
//! broker for being busy.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use super::body::Outgoing;
use super::connection::Activity;

/// Places beside the ordinary ones.
const SPARE: usize = 16;
/// How long such a place is anybody's at most, without a request.
pub(super) const SPARE_TIME: Duration = Duration::from_secs(5);
/// A connection is idle that has been so for so long: a client that has just had its answer may be at the next request.
const IDLE_MIN: Duration = Duration::from_secs(1);
/// One connection in this many ends at a time, at least one.
const ENDED_PART: usize = 256;
/// How long a place may take that an idle connection leaves.
const LEAVING: Duration = Duration::from_millis(100);
/// The log says no more often that there is no place.
const WARN_PAUSE: Duration = Duration::from_secs(60);

/// The paths of probes.
pub(super) const PROBES: [&str; 3] = ["/healthz", "/readyz", "/metrics"];

/// A place.
#[derive(Debug)]
pub(super) struct Place {
    /// For one request: of a probe, unless there is an ordinary place by then.
    pub(super) is_spare: bool,
    _permit: OwnedSemaphorePermit,
}

impl Place {
    const fn new(is_spare: bool, permit: OwnedSemaphorePermit) -> Self {
        Self {
            is_spare,
            _permit: permit,
        }
    }
}

/// A request that came by a spare place.
#[derive(Debug, Clone, Copy)]
pub(in crate::http) struct Spare;

/// The open connections.
#[derive(Debug, Clone)]
struct Connected {
    activity: Activity,
    busy: Arc<AtomicUsize>,
    outgoing: Outgoing,
}

/// All places.
#[derive(Debug)]
pub(super) struct Connections {
    most: usize,
    ordinary: Arc<Semaphore>,
    spare: Arc<Semaphore>,
    connected: Mutex<HashMap<u64, Connected>>,
    next: AtomicU64,
    warned_at: Mutex<Option<Instant>>,
}

/// One of those connected, until it is dropped.
#[derive(Debug)]
pub(super) struct Entry {
    connections: Arc<Connections>,
    number: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.connections.connected().remove(&self.number);
    }
}

impl Connections {
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            ordinary: Arc::new(Semaphore::new(most)),
            spare: Arc::new(Semaphore::new(SPARE)),
            connected: Mutex::default(),
            next: AtomicU64::new(0),
            warned_at: Mutex::new(None),
        })
    }

    fn connected(&self) -> MutexGuard<'_, HashMap<u64, Connected>> {
        self.connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// An ordinary place, if there is one.
    pub(super) fn try_place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.ordinary).try_acquire_owned().ok()
    }

    /// Waits for a place.
    pub(super) async fn place(&self) -> Place {
        if let Some(permit) = self.try_place() {
            return Place::new(false, permit);
        }
        let ended = self.end_idle();
        self.warn(ended);
        if ended > 0 {
            let leaving = Arc::clone(&self.ordinary).acquire_owned();
            if let Ok(Ok(permit)) = timeout(LEAVING, leaving).await {
                return Place::new(false, permit);
            }
        }
        let (ordinary, spare) = (Arc::clone(&self.ordinary), Arc::clone(&self.spare));
        const OPEN: &str = "the semaphore is never closed";
        tokio::select! {
            biased;
            permit = ordinary.acquire_owned() => Place::new(false, permit.expect(OPEN)),
            permit = spare.acquire_owned() => Place::new(true, permit.expect(OPEN)),
        }
    }

    /// A connection is there, at an ordinary place.
    pub(super) fn enter(
        self: &Arc<Self>,
        activity: &Activity,
        busy: &Arc<AtomicUsize>,
        outgoing: &Outgoing,
    ) -> Entry {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let connected = Connected {
            activity: activity.clone(),
            busy: Arc::clone(busy),
            outgoing: outgoing.clone(),
        };
        self.connected().insert(number, connected);
        Entry {
            connections: Arc::clone(self),
            number,
        }
    }

    /// Ends those that have been idle for longest, a few at a time since each look is at all. Gives how many.
    fn end_idle(&self) -> usize {
        let now = Instant::now();
        let connected = self.connected();
        let mut idle: Vec<(Instant, &Connected)> = connected
            .values()
            .filter(|one| one.busy.load(Ordering::Relaxed) == 0 && !one.outgoing.is_busy())
            .map(|one| (one.activity.last(), one))
            .filter(|(last, _)| now.duration_since(*last) >= IDLE_MIN)
            .collect();
        idle.sort_unstable_by_key(|(last, _)| *last);
        let count = (self.most / ENDED_PART).max(1).min(idle.len());
        for (_, one) in &idle[..count] {
            one.outgoing.end();
        }
        count
    }

    fn warn(&self, ended: usize) {
        let now = Instant::now();
        let mut warned_at = self
            .warned_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if warned_at.is_some_and(|at| now.duration_since(at) < WARN_PAUSE) {
            return;
        }
        *warned_at = Some(now);
        tracing::warn!(
            connections_max = self.most,
            ended,
            "all connections are in use: the broker closes idle ones for new ones, and answers only probes when none is idle; \
             raise connections_max, or have clients share connections"
        );
    }
}
