//! Receiving and settling.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::{Handle, bounded};
use crate::domain::name::QueueName;
use crate::domain::policy::{
    CONSUMER_MAX_BYTES, DELAY_MAX, REASON_MAX_BYTES, VISIBILITY_TIMEOUT_RANGE,
};
use crate::domain::queue::{EmptyReason, Item, Outcome, Verb};
use crate::queue::api::{
    BATCH_MAX, BATCH_WAIT_MAX, ENDED, Error, ReceiveRequest, Received, VerbItem, WAIT_MAX, invalid,
};
use crate::queue::ask::{Acks, Command};

impl Handle {
    /// Receives, and waits if necessary. Answered after the deliveries are journaled and committed. Dropping the future removes the
    /// waiter: nothing is handed out to it, and decided deliveries are released.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Invalid`], [`Error::InFlightFull`] with a wait of zero,
    /// [`Error::TooManyWaiters`], [`Error::Unavailable`], [`Error::OutcomeUnknown`], [`Error::Stopping`].
    pub async fn receive(
        &self,
        queue: &QueueName,
        request: ReceiveRequest,
    ) -> Result<Received, Error> {
        self.begin_receive(queue, request).await?.finish().await
    }

    /// As [`Handle::receive`], in two steps: returns when the acknowledgements that came along are committed. Deliveries are in the
    /// same commit, if there are any at once. The acknowledgements hold whatever happens to the rest.
    ///
    /// # Errors
    /// As [`Handle::receive`].
    pub async fn begin_receive(
        &self,
        queue: &QueueName,
        mut request: ReceiveRequest,
    ) -> Result<Receiving, Error> {
        check_receive(&request)?;
        self.shared.metrics.receives.inc();
        let until = request.wait + self.shared.outcome_wait;
        let (acks, acked) = self.acks(queue, std::mem::take(&mut request.ack));
        let mailbox = self.shared.mailbox(queue).await?;
        let (reply, answer) = oneshot::channel();
        let sent = mailbox.send(Command::Receive {
            request,
            acks,
            reply,
        });
        let begun = bounded(self.shared.outcome_wait, async {
            sent.await.map_err(|_| ENDED)?;
            match acked {
                Some(acked) => acked.await.unwrap_or(Err(Error::OutcomeUnknown)),
                None => Ok(Vec::new()),
            }
        });
        let acked = self.explained(queue, &mailbox, begun.await)?;
        Ok(Receiving {
            acked,
            handle: self.clone(),
            queue: queue.clone(),
            mailbox,
            answer,
            bound: until,
        })
    }

    fn acks(
        &self,
        queue: &QueueName,
        receipts: Vec<String>,
    ) -> (
        Option<Acks>,
        Option<oneshot::Receiver<Result<Vec<Outcome>, Error>>>,
    ) {
        if receipts.is_empty() {
            return (None, None);
        }
        let (reply, acked) = oneshot::channel();
        let stream = self.shared.stream_of(queue);
        let items = receipts.iter().map(|receipt| Item {
            receipt: stream.and_then(|stream| self.shared.receipt(stream, receipt)),
            delay: None,
            extend_by: None,
            reason: None,
        });
        let items = items.collect();
        (Some(Acks { items, reply }), Some(acked))
    }

    /// Settles deliveries by their receipts, evaluated as one request in offset order and answered in the order sent,
    /// after the commit. Repeating it is safe.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Invalid`], [`Error::Unavailable`], [`Error::OutcomeUnknown`],
    /// [`Error::Stopping`].
    pub async fn settle(
        &self,
        queue: &QueueName,
        verb: Verb,
        items: Vec<VerbItem>,
    ) -> Result<Vec<Outcome>, Error> {
        check_items(&items)?;
        let stream = self.shared.stream_of(queue);
        let items = items
            .into_iter()
            .map(|item| Item {
                receipt: stream.and_then(|stream| self.shared.receipt(stream, &item.receipt)),
                delay: item.delay,
                extend_by: item.extend_by,
                reason: item.reason,
            })
            .collect();
        self.tell(queue, self.shared.outcome_wait, |reply| Command::Settle {
            verb,
            items,
            reply,
        })
        .await
    }
}

/// A receive whose acknowledgements are committed.
#[derive(Debug)]
#[must_use = "dropping it takes the waiter away"]
pub struct Receiving {
    /// The results for the receipts that came along, in the order of the request.
    pub acked: Vec<Outcome>,
    handle: Handle,
    queue: QueueName,
    mailbox: mpsc::Sender<Command>,
    answer: oneshot::Receiver<Result<Received, Error>>,
    bound: Duration,
}

impl Receiving {
    /// Waits for messages, as [`Handle::receive`] does. Dropping the future takes the waiter away.
    ///
    /// # Errors
    /// As [`Handle::receive`]. Not [`Error::InFlightFull`] if something came along to be acknowledged: what became of
    /// that must be told.
    pub async fn finish(self) -> Result<Received, Error> {
        let Self {
            acked,
            handle,
            queue,
            mailbox,
            answer,
            bound,
        } = self;
        // The task ended with the decision in its hands: it may be committed.
        let exchange = async { answer.await.unwrap_or(Err(Error::OutcomeUnknown)) };
        let answer = bounded(bound, exchange).await;
        let received = match handle.explained(&queue, &mailbox, answer) {
            Err(Error::InFlightFull { .. }) if !acked.is_empty() => {
                Received::nothing(EmptyReason::InFlightFull)
            }
            // The result of the acknowledgement must be told; the next receive finds the new owner.
            Err(Error::NotOwner { .. }) if !acked.is_empty() => {
                Received::nothing(EmptyReason::Empty)
            }
            answer => answer?,
        };
        Ok(Received { acked, ..received })
    }
}

fn check_receive(request: &ReceiveRequest) -> Result<(), Error> {
    let (shortest, longest) = VISIBILITY_TIMEOUT_RANGE;
    if request.max_messages == 0 || request.max_messages as usize > BATCH_MAX {
        return Err(invalid("max_messages", "must be from 1 to 1000"));
    }
    if request.max_bytes == 0 {
        return Err(invalid("max_bytes", "must be at least 1"));
    }
    if request.wait > WAIT_MAX {
        return Err(invalid("wait_seconds", "must be from 0 to 50"));
    }
    if request.batch_wait > BATCH_WAIT_MAX {
        return Err(invalid("batch_wait_seconds", "must be from 0 to 5"));
    }
    if request.ack.len() > BATCH_MAX {
        return Err(invalid("ack", "must be a list of at most 1000"));
    }
    if request
        .visibility_timeout
        .is_some_and(|timeout| timeout < shortest || timeout > longest)
    {
        return Err(invalid(
            "visibility_timeout_seconds",
            "must be from 1 to 43200",
        ));
    }
    for (field, text) in [
        ("consumer", &request.consumer),
        ("receive_id", &request.receive_id),
    ] {
        if text
            .as_ref()
            .is_some_and(|text| text.len() > CONSUMER_MAX_BYTES)
        {
            return Err(invalid(field, "must be at most 255 bytes long"));
        }
    }
    Ok(())
}

fn check_items(items: &[VerbItem]) -> Result<(), Error> {
    let (shortest, longest) = VISIBILITY_TIMEOUT_RANGE;
    if items.is_empty() || items.len() > BATCH_MAX {
        return Err(invalid("deliveries", "must be a list of 1 to 1000"));
    }
    for item in items {
        if item.delay.is_some_and(|delay| delay > DELAY_MAX) {
            return Err(invalid("delay_seconds", "must be from 0 to 43200"));
        }
        if item
            .extend_by
            .is_some_and(|by| by < shortest || by > longest)
        {
            return Err(invalid(
                "visibility_timeout_seconds",
                "must be from 1 to 43200",
            ));
        }
        if item
            .reason
            .as_ref()
            .is_some_and(|reason| reason.len() > REASON_MAX_BYTES)
        {
            return Err(invalid("reason", "must be at most 1024 bytes long"));
        }
        if item
            .reason
            .as_ref()
            .is_some_and(|reason| reason.contains('\0'))
        {
            return Err(invalid("reason", "must not contain the character U+0000"));
        }
    }
    Ok(())
}
