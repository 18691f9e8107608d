//! The promise of an answer: deliveries that were decided and journaled, and may never reach the wire.
//!
//! A receive repeated under its id gets deliveries that an earlier answer carries too. All such answers share one promise:
//! the deliveries go back when the last answer is gone and none was written.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use tokio::sync::mpsc;

use crate::domain::receipt::Receipt;

/// Receive ids remembered before those that are over are looked for.
const PRUNE_AT: usize = 1_024;

/// The channel by which deliveries go back. It is unbounded since a drop cannot wait; the deliveries in flight bound its
/// contents.
pub(in crate::queue) type Back = mpsc::UnboundedSender<Vec<Receipt>>;

/// Stands for the deliveries of one answer until they are on the wire. Dropped before [`Handout::written`], they go back
/// to the queue at once and are not charged as attempts, unless another answer carries them as well.
#[derive(Debug, Default)]
pub struct Handout {
    promise: Option<Arc<Promise>>,
}

impl Handout {
    pub(in crate::queue) fn new(promise: Option<Arc<Promise>>) -> Self {
        Self { promise }
    }

    /// The answer is on the wire: from here on the consumer answers for the deliveries.
    pub fn written(self) {
        if let Some(promise) = &self.promise {
            promise.is_written.store(true, Ordering::Release);
        }
    }
}

/// Deliveries that go back over `to` when the last answer that carries them is gone, unless one was written.
#[derive(Debug)]
pub(in crate::queue) struct Promise {
    to: Back,
    deliveries: Vec<Receipt>,
    is_written: AtomicBool,
}

impl Promise {
    pub(in crate::queue) fn new(to: Back, deliveries: Vec<Receipt>) -> Arc<Self> {
        Arc::new(Self {
            to,
            deliveries,
            is_written: AtomicBool::new(false),
        })
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        if !*self.is_written.get_mut() {
            // A queue that has ended since recovers from its journal, where the deliveries expire by themselves.
            let _ = self.to.send(std::mem::take(&mut self.deliveries));
        }
    }
}

/// The promises that a repeated receive may join, by receive id.
#[derive(Debug, Default)]
pub(in crate::queue) struct Promises {
    by_id: HashMap<String, Weak<Promise>>,
    prune_at: usize,
}

impl Promises {
    pub(in crate::queue) fn keep(&mut self, receive_id: String, promise: &Arc<Promise>) {
        if self.by_id.len() >= self.prune_at.max(PRUNE_AT) {
            self.by_id.retain(|_, promise| promise.strong_count() > 0);
            self.prune_at = 2 * self.by_id.len();
        }
        self.by_id.insert(receive_id, Arc::downgrade(promise));
    }

    /// The promise of an answer that is still under way. None when it was written, or its deliveries went back.
    pub(in crate::queue) fn find(&self, receive_id: &str) -> Option<Arc<Promise>> {
        self.by_id.get(receive_id)?.upgrade()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::id::{Generation, Offset, QueueId};

    #[test]
    fn deliveries_go_back_with_their_last_answer_unless_one_was_written() {
        let receipt = Receipt {
            queue: QueueId(1),
            generation: Generation(1),
            offset: Offset(1),
            delivery: 1,
        };
        for written in [None, Some(0), Some(1)] {
            let (to, mut back) = mpsc::unbounded_channel();
            let mut promises = Promises::default();
            let promise = Promise::new(to, vec![receipt]);
            promises.keep("r".into(), &promise);
            let repeated = Handout::new(promises.find("r"));
            let answers = [Handout::new(Some(promise)), repeated];
            for (number, answer) in answers.into_iter().enumerate() {
                assert!(back.try_recv().is_err(), "not before the last is gone");
                match written == Some(number) {
                    true => answer.written(),
                    false => drop(answer),
                }
            }
            assert_eq!(back.try_recv().is_ok(), written.is_none());
            assert!(promises.find("r").is_none());
        }
    }
}
