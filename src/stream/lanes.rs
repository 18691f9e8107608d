//! Lanes beside the appender.
//!
//! Streams share a group commit, and a lock that somebody takes on one stream's log (`create index`, `reindex`, a forgotten
//! `lock table`) must hold up only that stream. So an append waits for a lock only for a moment. A group that does not get
//! its locks is tried again in parts, by stream. A part that still does not get them goes to a lane: an appender with its
//! own connection, which tries until it gets through. While a lane has work, all members of its streams go to it, so that
//! they stay in order.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::mpsc;

use super::AppendError;
use super::inbox::{Pending, Taken};
use crate::domain::id::StreamId;

/// Lanes at a time: each has a connection. Beyond them a stream shares the last one.
const LANES_MAX: usize = 4;

/// A part that can be held apart from the rest: a stream's log; and, apart from that, its later messages.
pub(super) type Part = (StreamId, bool);

/// The source of an appender's members.
#[derive(Debug)]
pub(super) enum Source {
    /// All that is published.
    Inbox(mpsc::Receiver<Pending>),
    /// Members that were passed on to a lane.
    Lane(mpsc::UnboundedReceiver<Taken>, Load),
}

impl Source {
    /// The next member; within, none when its caller has given up before it was tried. `None` when there will be no more.
    pub(super) async fn recv(&mut self) -> Option<Option<Taken>> {
        match self {
            Self::Inbox(inbox) => Some(inbox.recv().await?.take()),
            Self::Lane(passed, _) => Some(Some(passed.recv().await?)),
        }
    }

    /// The same, without waiting.
    pub(super) fn try_recv(&mut self) -> Option<Option<Taken>> {
        match self {
            Self::Inbox(inbox) => Some(inbox.try_recv().ok()?.take()),
            Self::Lane(passed, _) => Some(Some(passed.try_recv().ok()?)),
        }
    }

    pub(super) fn is_lane(&self) -> bool {
        matches!(self, Self::Lane(..))
    }

    /// Whether it can be closed: a lane ends when nobody passes anything to it.
    pub(super) fn is_open(&self) -> bool {
        matches!(self, Self::Inbox(inbox) if !inbox.is_closed())
    }

    pub(super) fn close(&mut self) {
        if let Self::Inbox(inbox) = self {
            inbox.close();
        }
    }

    /// Notes that this many members are answered.
    pub(super) fn done(&self, members: usize, bytes: usize) {
        if let Self::Lane(_, load) = self {
            load.remove(members, bytes);
        }
    }
}

/// The work of a lane.
#[derive(Debug, Clone)]
pub(super) struct Load {
    members: Arc<AtomicUsize>,
    bytes: Arc<AtomicUsize>,
    /// Lanes that have something to do.
    lanes: Gauge,
}

impl Load {
    fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::AcqRel);
        if self.members.fetch_add(1, Ordering::AcqRel) == 0 {
            self.lanes.inc();
        }
    }

    fn remove(&self, members: usize, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::AcqRel);
        if self.members.fetch_sub(members, Ordering::AcqRel) == members {
            self.lanes.dec();
        }
    }

    fn is_idle(&self) -> bool {
        self.members.load(Ordering::Acquire) == 0
    }
}

#[derive(Debug)]
struct Lane {
    parts: HashSet<Part>,
    sender: mpsc::UnboundedSender<Taken>,
    load: Load,
}

/// The lanes of an appender.
#[derive(Debug)]
pub(super) struct Lanes {
    lanes: Vec<Lane>,
    /// Bytes that may wait in one: the rest of the bound on what waits is for everybody else.
    bytes_max: usize,
    gauge: Gauge,
}

impl Lanes {
    pub(super) fn new(bytes_max: usize, gauge: Gauge) -> Self {
        Self {
            lanes: Vec::new(),
            bytes_max,
            gauge,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }

    /// Passes a member on to the lane that has its streams, or gives it back.
    pub(super) fn pass(&mut self, parts: &BTreeSet<Part>, taken: Taken) -> Option<Taken> {
        self.lanes.retain(|lane| !lane.load.is_idle());
        let is_of = |lane: &&Lane| parts.iter().any(|part| lane.parts.contains(part));
        let Some(lane) = self.lanes.iter().find(is_of) else {
            return Some(taken);
        };
        lane.push(taken, self.bytes_max);
        None
    }

    /// Has these members go to a lane: of their stream, or, when they are of several, of nobody else. The second value is for the lane's
    /// appender, if it is a new one.
    pub(super) fn hold(&mut self, parts: &BTreeSet<Part>, members: Vec<Taken>) -> Option<Source> {
        self.lanes.retain(|lane| !lane.load.is_idle());
        // Of several streams it is not known which one is held.
        let own = parts.iter().filter(|_| parts.len() == 1);
        let mut opened = None;
        if self.lanes.len() < LANES_MAX {
            let (sender, passed) = mpsc::unbounded_channel();
            let load = Load {
                members: Arc::default(),
                bytes: Arc::default(),
                lanes: self.gauge.clone(),
            };
            self.lanes.push(Lane {
                parts: HashSet::new(),
                sender,
                load: load.clone(),
            });
            opened = Some(Source::Lane(passed, load));
        }
        if let Some(lane) = self.lanes.last_mut() {
            lane.parts.extend(own);
            for taken in members {
                lane.push(taken, usize::MAX);
            }
        }
        opened
    }
}

impl Lane {
    fn push(&self, taken: Taken, bytes_max: usize) {
        if self.load.bytes.load(Ordering::Acquire) + taken.bytes > bytes_max {
            let _ = taken.reply.send(Err(AppendError::Unavailable(None)));
            return;
        }
        let bytes = taken.bytes;
        self.load.add(bytes);
        if let Err(mpsc::error::SendError(taken)) = self.sender.send(taken) {
            self.load.remove(1, bytes);
            let _ = taken.reply.send(Err(AppendError::Stopping));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::{Semaphore, oneshot};

    use super::*;
    use crate::stream::request::{Member, Placed};

    type Answer = oneshot::Receiver<Result<Vec<Placed>, AppendError>>;

    async fn taken(bytes: usize) -> (Taken, Answer) {
        let (reply, answer) = oneshot::channel();
        let budget = Arc::new(Semaphore::new(1));
        let member = Member::Publish {
            messages: Vec::new(),
            check_ids: false,
            as_one: Vec::new(),
        };
        let permit = budget.acquire_owned().await.expect("it is not closed");
        (Taken::new(member, reply, bytes, permit), answer)
    }

    #[tokio::test]
    async fn what_is_held_goes_to_its_lane_until_that_is_idle() {
        let gauge = Gauge::default();
        let mut lanes = Lanes::new(100, gauge.clone());
        let a = BTreeSet::from([(StreamId(1), false)]);
        let b = BTreeSet::from([(StreamId(2), false)]);
        let both = BTreeSet::from([(StreamId(1), false), (StreamId(2), false)]);
        let mut lane = lanes.hold(&a, vec![taken(60).await.0]).expect("a new one");
        assert_eq!(gauge.get(), 1);
        assert!(lanes.pass(&b, taken(1).await.0).is_some());
        assert!(lanes.pass(&both, taken(1).await.0).is_none());
        // Later messages are held apart.
        let later = BTreeSet::from([(StreamId(1), true)]);
        assert!(lanes.pass(&later, taken(1).await.0).is_some());
        // Beyond its share a member is refused, and nobody else is.
        let (over, answer) = taken(60).await;
        assert!(lanes.pass(&a, over).is_none());
        assert!(matches!(
            answer.await,
            Ok(Err(AppendError::Unavailable(None)))
        ));
        for bytes in [60, 1] {
            assert_eq!(
                lane.recv().await.flatten().map(|taken| taken.bytes),
                Some(bytes)
            );
            lane.done(1, bytes);
        }
        assert_eq!(gauge.get(), 0);
        assert!(lanes.pass(&a, taken(1).await.0).is_some());
        assert!(lanes.is_empty() && lane.recv().await.is_none());
        // One of several streams keeps nobody else waiting; there are only so many lanes.
        let mut opened = Vec::new();
        for _ in 0..6 {
            opened.extend(lanes.hold(&both, vec![taken(1).await.0]));
        }
        assert_eq!(opened.len(), LANES_MAX);
        assert!(lanes.pass(&a, taken(1).await.0).is_some());
    }
}
