//! The shop's side: tasks that place orders, each in one transaction on its own connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::progress::Progress;
use super::random::Random;
use crate::store::shop::{self, End, NewOrder};
use crate::store::{Connection, Database, Error};

/// How many products the shop sells. Few, so that producers meet on the same stock rows.
pub(super) const PRODUCTS: i32 = 20;

/// A producer's report about an order: the time just before COMMIT, and how the transaction ended.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) order: Uuid,
    pub(super) at: Instant,
    pub(super) end: End,
}

/// State that the producers share.
#[derive(Debug)]
pub(super) struct Shop {
    pub(super) database: Database,
    pub(super) run: Uuid,
    pub(super) started: Instant,
    /// How many orders are placed at most, rolled back ones included.
    pub(super) orders: u64,
    /// No order is begun later than this after the start.
    pub(super) seconds: Option<Duration>,
    /// Orders per second, all producers together; 0 means as many as they can.
    pub(super) rate: u32,
    pub(super) next: AtomicU64,
    pub(super) progress: Arc<Progress>,
    /// Cancelled when no more orders are wanted.
    pub(super) enough: CancellationToken,
}

impl Shop {
    /// The number of the next order, once its time has come; `None` when the run is over.
    async fn next_order(&self) -> Option<u64> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if number >= self.orders {
            return None;
        }
        if self.rate > 0 {
            let due = self.started + Duration::from_secs_f64(number as f64 / f64::from(self.rate));
            tokio::select! {
                () = tokio::time::sleep_until(due.into()) => {}
                () = self.enough.cancelled() => {}
            }
        }
        let is_late = self
            .seconds
            .is_some_and(|seconds| self.started.elapsed() >= seconds);
        (!is_late && !self.enough.is_cancelled()).then_some(number)
    }
}

/// Places orders until the run is over. About one in ten is rolled back after everything in it was written.
pub(super) async fn run(
    shop: Arc<Shop>,
    mut connection: Connection,
    mut random: Random,
    placed: mpsc::Sender<Placed>,
) -> Result<(), Error> {
    while shop.next_order().await.is_some() {
        let order = NewOrder {
            id: Uuid::from_u64_pair(random.next(), random.next()),
            run: shop.run,
            product: 1 + random.below(PRODUCTS.unsigned_abs()).cast_signed(),
            quantity: 1 + random.below(3).cast_signed(),
            end: if random.one_in(10) {
                End::RollBack
            } else {
                End::Commit
            },
        };
        let mut at = Instant::now();
        shop::place(&mut connection, order, || at = Instant::now()).await?;
        let count = match order.end {
            End::Commit => &shop.progress.committed,
            End::RollBack => &shop.progress.rolled_back,
        };
        count.fetch_add(1, Ordering::Relaxed);
        let said = Placed {
            order: order.id,
            at,
            end: order.end,
        };
        if placed.send(said).await.is_err() {
            break;
        }
    }
    Ok(())
}
