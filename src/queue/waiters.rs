//! The long polls of one queue: the longest first, at most one per receive id.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::api::{Error, ReceiveRequest, Received};

/// A long poll.
pub(in crate::queue) struct Waiter {
    pub(in crate::queue) request: ReceiveRequest,
    pub(in crate::queue) reply: oneshot::Sender<Result<Received, Error>>,
    pub(in crate::queue) since: Instant,
    pub(in crate::queue) until: Instant,
}

/// Those that wait.
#[derive(Default)]
pub(in crate::queue) struct Waiters {
    waiters: BTreeMap<u64, Waiter>,
    ends: BTreeSet<(Instant, u64)>,
    by_id: HashMap<String, u64>,
    last: u64,
}

impl Waiters {
    pub(in crate::queue) fn len(&self) -> usize {
        self.waiters.len()
    }

    pub(in crate::queue) fn is_empty(&self) -> bool {
        self.waiters.is_empty()
    }

    /// Puts a waiter at the end. One under the same receive id is given back: two of them would get different messages
    /// under one id.
    pub(in crate::queue) fn add(&mut self, waiter: Waiter) -> Option<Waiter> {
        let id = waiter.request.receive_id.as_ref();
        let replaced = id.and_then(|id| self.by_id.get(id).copied());
        let replaced = replaced.and_then(|number| self.remove(number));
        self.last += 1;
        self.put(self.last, waiter);
        replaced
    }

    /// Puts a waiter back in its place.
    pub(in crate::queue) fn put(&mut self, number: u64, waiter: Waiter) {
        if let Some(id) = &waiter.request.receive_id {
            self.by_id.insert(id.clone(), number);
        }
        self.ends.insert((waiter.until, number));
        self.waiters.insert(number, waiter);
    }

    pub(in crate::queue) fn remove(&mut self, number: u64) -> Option<Waiter> {
        let waiter = self.waiters.remove(&number)?;
        self.ends.remove(&(waiter.until, number));
        if let Some(id) = &waiter.request.receive_id {
            self.by_id.remove(id);
        }
        Some(waiter)
    }

    /// The one that has waited longest.
    pub(in crate::queue) fn first(&self) -> Option<(u64, &Waiter)> {
        let (&number, waiter) = self.waiters.first_key_value()?;
        Some((number, waiter))
    }

    /// When the next wait is over, and whose.
    pub(in crate::queue) fn next_end(&self) -> Option<(Instant, u64)> {
        self.ends.first().copied()
    }

    /// Takes out those whose caller is gone.
    pub(in crate::queue) fn drop_gone(&mut self) {
        let gone = self.waiters.iter().filter(|(_, w)| w.reply.is_closed());
        let gone: Vec<u64> = gone.map(|(&number, _)| number).collect();
        for number in gone {
            self.remove(number);
        }
    }

    /// Takes all out, the longest first.
    pub(in crate::queue) fn take_all(&mut self) -> impl Iterator<Item = Waiter> + use<> {
        std::mem::take(self).waiters.into_values()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::time::Duration;

    use super::*;

    fn waiter(id: Option<&str>) -> (Waiter, oneshot::Receiver<Result<Received, Error>>) {
        let (reply, answer) = oneshot::channel();
        let since = Instant::now();
        let request = ReceiveRequest {
            receive_id: id.map(str::to_owned),
            ..ReceiveRequest::default()
        };
        let until = since + Duration::from_secs(1);
        (
            Waiter {
                request,
                reply,
                since,
                until,
            },
            answer,
        )
    }

    #[test]
    fn a_receive_id_waits_once() {
        let mut waiters = Waiters::default();
        let (first, first_answer) = waiter(Some("r"));
        let (other, other_answer) = waiter(None);
        let (second, _second_answer) = waiter(Some("r"));
        assert!(waiters.add(first).is_none());
        assert!(waiters.add(other).is_none());
        let replaced = waiters.add(second).unwrap();
        assert!(!replaced.reply.is_closed());
        drop(first_answer);
        assert!(replaced.reply.is_closed(), "the first is given back");
        assert_eq!(waiters.len(), 2);
        drop(other_answer);
        waiters.drop_gone();
        let (number, _) = waiters.first().unwrap();
        assert_eq!(number, 3);
        let left = waiters.remove(number).unwrap();
        assert!(waiters.is_empty() && waiters.next_end().is_none());
        waiters.put(number, left);
        let (third, _answer) = waiter(Some("r"));
        assert!(waiters.add(third).is_some(), "also after it was put back");
        assert_eq!(waiters.take_all().count(), 1);
    }
}
