//! The services that consume the shop's orders: billing takes every order, shipping refuses some at first. Each consumer
//! writes down what it received, in a table of its own, before it acknowledges: the reconciliation compares with that.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::api::{self, Api, Delivery};
use super::progress::Progress;
use crate::store;
use crate::store::shop::{self, Received, Settled};

const MESSAGES: u32 = 50;
const LONG_POLL: Duration = Duration::from_secs(1);
const NACK_DELAY: Duration = Duration::from_secs(1);

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
    fn refuses(self, delivery: &Delivery) -> bool {
        self == Self::Shipping
            && delivery.attempt == 1
            && delivery.event.data.order.as_u128().is_multiple_of(10)
    }
}

/// What a consumer tells the demo while it runs.
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

/// What went wrong in a consumer, for good.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The broker refused a call, and repeating it would not help.
    #[error("a consumer's call failed")]
    Api(#[from] api::Error),
    /// The consumer's own table.
    #[error("a consumer could not write down what it received")]
    Store(#[from] store::Error),
}

/// One consumer of one service.
#[derive(Debug)]
pub(super) struct Consumer {
    pub(super) service: Service,
    pub(super) name: String,
    pub(super) api: Api,
    pub(super) connection: store::Connection,
    pub(super) said: mpsc::Sender<Said>,
    pub(super) progress: Arc<Progress>,
    pub(super) stop: CancellationToken,
}

impl Consumer {
    /// Receives, records and settles until told to stop. Waits out a broker that is away.
    pub(super) async fn run(mut self) -> Result<(), Error> {
        while !self.stop.is_cancelled() {
            let queue = self.service.queue();
            match self
                .api
                .receive(queue, &self.name, MESSAGES, LONG_POLL)
                .await
            {
                Ok(deliveries) if deliveries.is_empty() => {}
                Ok(deliveries) => self.take(deliveries).await?,
                Err(error) if error.is_transient() => pause().await,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    async fn take(&mut self, deliveries: Vec<Delivery>) -> Result<(), Error> {
        let at = Instant::now();
        let service = self.service;
        for delivery in &deliveries {
            let order = delivery.event.data.order;
            let _ = self.said.send(Said::Received { service, order, at }).await;
        }
        let received: Vec<Received> = deliveries
            .iter()
            .map(|delivery| Received {
                order: delivery.event.data.order,
                product: delivery.event.data.product,
                version: delivery.event.data.version,
                delivery: delivery.delivery,
                attempt: delivery.attempt,
                offset: delivery.offset,
            })
            .collect();
        let queue = service.queue();
        shop::insert_received(&mut self.connection, queue, &self.name, &received).await?;
        let (refused, taken): (Vec<_>, Vec<_>) = deliveries
            .into_iter()
            .partition(|delivery| service.refuses(delivery));
        self.settle(&taken, None).await?;
        self.settle(&refused, Some(NACK_DELAY)).await
    }

    async fn settle(
        &mut self,
        deliveries: &[Delivery],
        nack_after: Option<Duration>,
    ) -> Result<(), Error> {
        if deliveries.is_empty() {
            return Ok(());
        }
        let queue = self.service.queue();
        let receipts: Vec<String> = deliveries.iter().map(|d| d.receipt.clone()).collect();
        let answers = loop {
            match self.api.settle(queue, &receipts, nack_after).await {
                Ok(answers) => break answers,
                // No answer says nothing about the outcome. The same receipts again are safe.
                Err(error) if error.is_transient() && !self.stop.is_cancelled() => pause().await,
                Err(error) => return Err(error.into()),
            }
        };
        let mut settled = Vec::with_capacity(answers.len());
        for answer in answers {
            let Some(delivery) = deliveries.iter().find(|d| d.receipt == answer.receipt) else {
                continue;
            };
            let order = delivery.event.data.order;
            self.count(order, &answer.result).await;
            settled.push(Settled {
                order,
                delivery: delivery.delivery,
                answer: answer.result,
            });
        }
        shop::insert_settled(&mut self.connection, queue, &self.name, &settled).await?;
        Ok(())
    }

    async fn count(&self, order: Uuid, answer: &str) {
        let service = self.service;
        match answer {
            "acked" | "already_settled" => {
                let count = match service {
                    Service::Billing => &self.progress.billing,
                    Service::Shipping => &self.progress.shipping,
                };
                count.fetch_add(1, Ordering::Relaxed);
                let _ = self.said.send(Said::Acknowledged { service, order }).await;
            }
            "nacked" => {
                self.progress.refused.fetch_add(1, Ordering::Relaxed);
            }
            _ => {}
        }
    }
}

/// Between two tries to reach a broker that is away.
async fn pause() {
    tokio::time::sleep(Duration::from_millis(100)).await;
}
