//! The promise of an answer: deliveries that were decided and journaled, and may never reach the wire.

use tokio::sync::mpsc;

use crate::domain::receipt::Receipt;

/// Stands for the deliveries of one answer until they are on the wire. Dropped before [`Handout::written`], they go back
/// to the queue at once and are not charged as attempts.
#[derive(Debug, Default)]
pub struct Handout {
    release: Option<(mpsc::UnboundedSender<Vec<Receipt>>, Vec<Receipt>)>,
}

impl Handout {
    /// Deliveries to be released over `to` unless they are written. The channel is unbounded since a drop cannot
    /// wait; what passes through it is bounded by the deliveries in flight.
    pub(in crate::queue) fn new(
        to: mpsc::UnboundedSender<Vec<Receipt>>,
        deliveries: Vec<Receipt>,
    ) -> Self {
        Self {
            release: (!deliveries.is_empty()).then_some((to, deliveries)),
        }
    }

    /// The answer is on the wire: from here on the consumer answers for the deliveries.
    pub fn written(mut self) {
        self.release = None;
    }
}

impl Drop for Handout {
    fn drop(&mut self) {
        if let Some((to, deliveries)) = self.release.take() {
            // A queue that has ended since recovers from its journal, where the deliveries expire by themselves.
            let _ = to.send(deliveries);
        }
    }
}
