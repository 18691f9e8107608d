//! The services that consume the shop's orders: billing takes every order, shipping refuses some at first. Each consumer
//! records what it received in its own table before it acknowledges; the reconciliation compares with that.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::progress::Progress;
use crate::client::{
    self, Delivery, Item, Outcomes, Queue, Receive, Refusal, Refused, Settled as Outcome, Verb,
};
use crate::store;
use crate::store::shop::{self, Received, Settled};

const MESSAGES: u32 = 50;
const LONG_POLL: Duration = Duration::from_secs(1);
const NACK_DELAY: Duration = Duration::from_secs(1);
const COURIER: &str = "the courier is out";

/// A service of the shop, and its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Service {
    /// Acknowledges every order.
    Billing,
    /// Refuses about one order in ten the first time, and takes it when it comes again.
    Shipping,
}

impl Service {
    pub(super) const ALL: [Self; 2] = [Self::Billing, Self::Shipping];

    pub(super) const fn queue(self) -> &'static str {
        match self {
            Self::Billing => "billing",
            Self::Shipping => "shipping",
        }
    }

    /// Decided by the order alone, so that it does not matter which consumer gets it.
    fn refuses(self, delivery: &Delivery, order: &OrderCreated) -> bool {
        self == Self::Shipping && delivery.attempt == 1 && order.order.as_u128().is_multiple_of(10)
    }
}

/// The payload that the producers write.
#[derive(Debug, Deserialize)]
struct OrderCreated {
    order: Uuid,
    product: i32,
    version: i64,
}

/// A delivery that was written down, until the broker has said what became of it.
#[derive(Debug)]
struct Taken {
    order: Uuid,
    delivery: i32,
    item: Item,
}

/// A consumer's report to the demo while it runs.
#[derive(Debug)]
pub(super) enum Said {
    /// The order was in an answer that had been read by then.
    Received {
        service: Service,
        order: Uuid,
        at: Instant,
    },
    /// The broker answered that the order is settled.
    Acknowledged { service: Service, order: Uuid },
}

/// Permanent errors of a consumer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The broker refused a call, and repeating it would not help.
    #[error("a consumer's call failed")]
    Client(#[from] client::Error),
    /// The payload is not what the producers write.
    #[error("the order at offset {offset} cannot be read")]
    Order {
        /// Its place.
        offset: i64,
        /// The difference in the JSON.
        #[source]
        source: serde_json::Error,
    },
    /// The consumer's own table.
    #[error("a consumer could not record what it received")]
    Store(#[from] store::Error),
}

/// One consumer of one service.
#[derive(Debug)]
pub(super) struct Consumer {
    pub(super) service: Service,
    pub(super) name: String,
    pub(super) queue: Queue,
    pub(super) connection: store::Connection,
    pub(super) said: mpsc::Sender<Said>,
    pub(super) progress: Arc<Progress>,
    pub(super) stop: CancellationToken,
}

impl Consumer {
    /// Receives and records until told to stop, and acknowledges each batch with the receive of the next one. Waits out a
    /// broker that is away.
    pub(super) async fn run(mut self) -> Result<(), Error> {
        let mut taken: Vec<Taken> = Vec::new();
        while !self.stop.is_cancelled() {
            let receipts = taken.iter().map(|taken| taken.item.receipt().to_owned());
            let receive = Receive {
                max_messages: MESSAGES,
                wait: LONG_POLL,
                consumer: Some(self.name.clone()),
                ack: receipts.collect(),
                ..Receive::default()
            };
            match self.queue.receive(&receive).await {
                Ok(received) => {
                    self.settled(&taken, received.acked).await?;
                    taken = self.take(received.deliveries).await?;
                }
                // Tried for as long as a call is: the same receipts go with the next one.
                Err(error) if error.is_transient() => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.settle(Verb::Ack, taken).await
    }

    /// Records the deliveries, gives back those it refuses, and returns the rest, for acknowledgement.
    async fn take(&mut self, deliveries: Vec<Delivery>) -> Result<Vec<Taken>, Error> {
        let at = Instant::now();
        let service = self.service;
        let (mut received, mut taken, mut refused) = (Vec::new(), Vec::new(), Vec::new());
        for delivery in &deliveries {
            let (offset, number) = (delivery.offset, delivery.delivery.cast_signed());
            let order: OrderCreated = delivery
                .event
                .json()
                .map_err(|source| Error::Order { offset, source })?;
            received.push(Received {
                order: order.order,
                product: order.product,
                version: order.version,
                delivery: number,
                attempt: delivery.attempt.cast_signed(),
                offset,
            });
            let item = Item::from(delivery);
            let (list, item) = match service.refuses(delivery, &order) {
                true => (&mut refused, item.delay(NACK_DELAY).reason(COURIER)),
                false => (&mut taken, item),
            };
            let order = order.order;
            list.push(Taken {
                order,
                delivery: number,
                item,
            });
            let _ = self.said.send(Said::Received { service, order, at }).await;
        }
        shop::insert_received(&mut self.connection, service.queue(), &self.name, &received).await?;
        self.settle(Verb::Nack, refused).await?;
        Ok(taken)
    }

    async fn settle(&mut self, verb: Verb, taken: Vec<Taken>) -> Result<(), Error> {
        let items: Vec<Item> = taken.iter().map(|taken| taken.item.clone()).collect();
        let outcomes = loop {
            match self.queue.settle(verb, items.clone()).await {
                Ok(outcomes) => break outcomes,
                Err(error) if error.is_transient() && !self.stop.is_cancelled() => {}
                Err(error) => return Err(error.into()),
            }
        };
        self.settled(&taken, outcomes).await
    }

    /// Writes down what the broker answered.
    async fn settled(&mut self, taken: &[Taken], outcomes: Outcomes) -> Result<(), Error> {
        let mut settled = Vec::with_capacity(taken.len());
        for (taken, outcome) in taken.iter().zip(&outcomes) {
            self.count(taken.order, outcome).await;
            settled.push(Settled {
                order: taken.order,
                delivery: taken.delivery,
                answer: word(outcome).to_owned(),
            });
        }
        if !settled.is_empty() {
            let queue = self.service.queue();
            shop::insert_settled(&mut self.connection, queue, &self.name, &settled).await?;
        }
        Ok(())
    }

    async fn count(&self, order: Uuid, outcome: &Result<Outcome, Refused>) {
        let service = self.service;
        match outcome {
            Ok(Outcome::Acked | Outcome::AlreadySettled) => {
                let count = match service {
                    Service::Billing => &self.progress.billing,
                    Service::Shipping => &self.progress.shipping,
                };
                count.fetch_add(1, Ordering::Relaxed);
                let _ = self.said.send(Said::Acknowledged { service, order }).await;
            }
            Ok(Outcome::Nacked { .. }) => {
                self.progress.refused.fetch_add(1, Ordering::Relaxed);
            }
            _ => {}
        }
    }
}

/// The broker's word for it.
fn word(outcome: &Result<Outcome, Refused>) -> &str {
    match outcome {
        Ok(Outcome::Acked) => "acked",
        Ok(Outcome::AlreadySettled) => "already_settled",
        Ok(Outcome::Nacked { .. }) => "nacked",
        Ok(_) => "settled otherwise",
        Err(refused) => match &refused.refusal {
            Refusal::AlreadySettled => "already_settled",
            Refusal::DeadLettered { .. } => "dead_lettered",
            Refusal::Stale { .. } => "stale",
            Refusal::Gone => "gone",
            Refusal::Unknown => "unknown",
            Refusal::Other(other) => other,
            _ => "refused",
        },
    }
}
