//! The two orders that a relay must not go by, each with the one interleaving that shows it.

use super::{Origin, Verdict, execute, judge, read_log, rig, shop};
use crate::support;

#[tokio::test(flavor = "multi_thread")]
async fn a_late_committer_is_relayed_and_keys_go_out_in_the_order_of_their_locks() {
    let broker = support::database().await;
    let origin = Origin::install(&broker.url).await;
    shop::open(&origin).await;
    let running = rig(&broker.database, &[("local", None)]).await;
    running.caught_up("local").await;
    let (mut first, mut second) = (origin.producer().await, origin.producer().await);
    // Its number is the lower one, and it commits when the higher one is relayed.
    execute(&mut first, "begin").await;
    shop::note(&mut first).await.unwrap();
    shop::note(&mut second).await.unwrap();
    running.caught_up("local").await;
    execute(&mut first, "commit").await;
    running.caught_up("local").await;
    running.stop().await;
    // Two transactions of one window: the one with the lower id has the key's row later.
    execute(&mut first, "begin; select pg_current_xact_id()").await;
    execute(&mut second, "begin").await;
    shop::sell(&mut second, 1).await.unwrap();
    execute(&mut second, "commit").await;
    shop::sell(&mut first, 1).await.unwrap();
    execute(&mut first, "commit").await;
    let running = rig(&broker.database, &[("local", None)]).await;
    running.caught_up("local").await;
    let committed = shop::committed(&origin).await;
    let relayed = read_log(&broker.url).await;
    assert_eq!(judge(&committed, &relayed), Verdict::default());
    running.stop().await;
}
