//! The long polls of one queue: the longest first, at most one per receive id.
//!
//! A poll that wants its batch filled is passed over while it fills. Only the longest of these fills at a time, and as soon
//! as its time is over it takes its turn by its waiting time, like every other poll.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::queue::api::{Error, ReceiveRequest, Received};

/// A long poll.
pub(super) struct Waiter {
    pub(super) request: ReceiveRequest,
    pub(super) reply: oneshot::Sender<Result<Received, Error>>,
    pub(super) since: Instant,
    pub(super) until: Instant,
}

/// The waiting receives.
#[derive(Default)]
pub(super) struct Waiters {
    waiters: BTreeMap<u64, Waiter>,
    ends: BTreeSet<(Instant, u64)>,
    by_id: HashMap<String, u64>,
    /// Receives that take whatever is ready.
    plain: BTreeSet<u64>,
    /// Receives that wait for a batch to fill.
    patient: BTreeSet<u64>,
    /// The receive whose batch fills, and the end of its time.
    filling: Option<(u64, Instant)>,
    last: u64,
}

impl Waiters {
    pub(super) fn len(&self) -> usize {
        self.waiters.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiters.is_empty()
    }

    /// Puts a waiter at the end. One under the same receive id is given back: two of them would get different messages
    /// under one id.
    pub(super) fn add(&mut self, waiter: Waiter) -> Option<Waiter> {
        let id = waiter.request.receive_id.as_ref();
        let replaced = id.and_then(|id| self.by_id.get(id).copied());
        let replaced = replaced.and_then(|number| self.remove(number));
        self.last += 1;
        self.put(self.last, waiter);
        replaced
    }

    /// Puts a waiter back in its place.
    pub(super) fn put(&mut self, number: u64, waiter: Waiter) {
        if let Some(id) = &waiter.request.receive_id {
            self.by_id.insert(id.clone(), number);
        }
        self.ends.insert((waiter.until, number));
        match waiter.request.batch_wait.is_zero() {
            true => self.plain.insert(number),
            false => self.patient.insert(number),
        };
        self.waiters.insert(number, waiter);
    }

    pub(super) fn remove(&mut self, number: u64) -> Option<Waiter> {
        let waiter = self.waiters.remove(&number)?;
        self.ends.remove(&(waiter.until, number));
        self.plain.remove(&number);
        self.patient.remove(&number);
        self.filling = self.filling.filter(|&(filling, _)| filling != number);
        if let Some(id) = &waiter.request.receive_id {
            self.by_id.remove(id);
        }
        Some(waiter)
    }

    /// The receive whose turn it is, while something is ready: the one that has waited longest, except that one whose batch still
    /// fills lets the next one go before it. Removes receives whose caller is gone on the way.
    pub(super) fn next(
        &mut self,
        now: Instant,
        is_full: impl Fn(&ReceiveRequest) -> bool,
    ) -> Option<(u64, &Waiter)> {
        let plain = self.first_present(|waiters| waiters.plain.first());
        let patient = self.first_present(|waiters| waiters.patient.first());
        let is_due = |(number, waiter): &(u64, &Waiter)| {
            let filled = self.filling.filter(|(filling, _)| filling == number);
            filled.is_some_and(|(_, until)| until <= now) || is_full(&waiter.request)
        };
        let found = |number: u64| Some((number, self.waiters.get(&number)?));
        let due = patient
            .and_then(found)
            .filter(is_due)
            .map(|(number, _)| number);
        if due.is_none()
            && let Some((number, waiter)) = patient.and_then(found)
            && self.filling.is_none()
        {
            let until = (now + waiter.request.batch_wait).min(waiter.until);
            if until <= now {
                return found(plain.map_or(number, |plain| plain.min(number)));
            }
            self.filling = Some((number, until));
        }
        let next = plain.into_iter().chain(due).min()?;
        Some((next, self.waiters.get(&next)?))
    }

    /// The first of a list whose caller is still there.
    fn first_present(&mut self, list: impl Fn(&Self) -> Option<&u64>) -> Option<u64> {
        while let Some(&number) = list(self) {
            let waiter = self.waiters.get(&number)?;
            if !waiter.reply.is_closed() {
                return Some(number);
            }
            self.remove(number);
        }
        None
    }

    /// The time when the filling batch goes out as it is.
    pub(super) fn fills_until(&self) -> Option<Instant> {
        self.filling.map(|(_, until)| until)
    }

    /// The time when the next wait is over, and its receive.
    pub(super) fn next_end(&self) -> Option<(Instant, u64)> {
        self.ends.first().copied()
    }

    /// Takes out those whose caller is gone.
    pub(super) fn drop_gone(&mut self) {
        let gone = self.waiters.iter().filter(|(_, w)| w.reply.is_closed());
        let gone: Vec<u64> = gone.map(|(&number, _)| number).collect();
        for number in gone {
            self.remove(number);
        }
    }

    /// Takes all out, the longest first.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = Waiter> + use<> {
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
        let (number, _) = waiters.next(Instant::now(), |_| false).unwrap();
        assert_eq!(number, 3);
        let left = waiters.remove(number).unwrap();
        assert!(waiters.is_empty() && waiters.next_end().is_none());
        waiters.put(number, left);
        let (third, _answer) = waiter(Some("r"));
        assert!(waiters.add(third).is_some(), "also after it was put back");
        assert_eq!(waiters.take_all().count(), 1);
    }

    #[test]
    fn a_filling_batch_delays_nobody_else_and_is_not_passed_over_for_ever() {
        let mut waiters = Waiters::default();
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut answers = Vec::new();
        for batch_wait in [Duration::ZERO, second / 2, second / 4, Duration::ZERO] {
            let (mut waiter, answer) = waiter(None);
            waiter.request.batch_wait = batch_wait;
            (waiter.since, waiter.until) = (start, start + 20 * second);
            waiters.add(waiter);
            answers.push(answer);
        }
        let turn = |waiters: &mut Waiters, now, is_full| {
            let (number, _) = waiters.next(now, |_| is_full)?;
            waiters.remove(number);
            Some(number)
        };
        assert_eq!(turn(&mut waiters, start, false), Some(1), "the longest");
        assert_eq!(waiters.fills_until(), Some(start + second / 2));
        assert_eq!(
            turn(&mut waiters, start, false),
            Some(4),
            "2 and 3 fill theirs"
        );
        assert_eq!(turn(&mut waiters, start + second / 3, false), None);
        assert_eq!(
            waiters.fills_until(),
            Some(start + second / 2),
            "not begun anew"
        );
        let (mut late, _late_answer) = waiter(None);
        late.until = start + 20 * second;
        waiters.add(late);
        let now = start + second / 2;
        assert_eq!(turn(&mut waiters, now, false), Some(2), "its time is over");
        assert_eq!(
            turn(&mut waiters, now, false),
            Some(5),
            "3 begins to fill only now"
        );
        assert_eq!(waiters.fills_until(), Some(now + second / 4));
        assert_eq!(
            turn(&mut waiters, now, true),
            Some(3),
            "a full batch goes out"
        );
        assert!(waiters.is_empty() && waiters.fills_until().is_none());

        // Not beyond the end of the receive's own wait; and one whose caller is gone holds nobody up.
        let (mut gone, _) = waiter(None);
        gone.request.batch_wait = second;
        waiters.add(gone);
        let (mut short, _short_answer) = waiter(None);
        short.request.batch_wait = second;
        (short.since, short.until) = (now, now + second / 10);
        waiters.add(short);
        assert_eq!(turn(&mut waiters, now, false), None);
        assert_eq!(waiters.fills_until(), Some(now + second / 10));
        assert_eq!(turn(&mut waiters, now + second / 10, false), Some(7));
    }
}
