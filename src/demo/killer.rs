//! Kills the broker during the run with `kill -9`, and starts it again.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::broker::{self, Broker};
use super::producer::Shop;

/// How long a restarted broker may go without an acknowledgement before it is killed anyway.
const WORK_DEADLINE: Duration = Duration::from_secs(30);

/// Kills the broker `kills` times, spread over the orders, and ends once the last one is ready again.
///
/// # Errors
/// The broker did not start again.
pub(super) async fn run(
    broker: Arc<Broker>,
    shop: Arc<Shop>,
    kills: u64,
) -> Result<(), broker::Error> {
    for number in 1..=kills {
        let due = shop.orders / (kills + 1) * number;
        while shop.next.load(Ordering::Relaxed) < due {
            let is_over = shop.seconds.is_some_and(|limit| {
                shop.started.elapsed() >= limit.mul_f64(number as f64 / (kills + 1) as f64)
            });
            if is_over || shop.enough.is_cancelled() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if shop.enough.is_cancelled() {
            break;
        }
        broker.kill().await?;
        shop.progress.kills.fetch_add(1, Ordering::Relaxed);
        // Long enough for orders to pile up without a broker.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let before = shop.progress.acknowledged();
        broker.start_again().await?;
        // The next kill is to meet a broker at work, not one that starts.
        let since = Instant::now();
        while shop.progress.acknowledged() == before
            && since.elapsed() < WORK_DEADLINE
            && !shop.enough.is_cancelled()
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}
