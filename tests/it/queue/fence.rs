//! What stands between an answer, its commit and the next owner, with the commit held up in the database: the journal is locked by
//! somebody else, so that a call has read the epoch and has not written.

use postroad::queue::{self, InFlightFilter, ReceiveRequest, Verb};
use sqlx::{AssertSqlSafe, PgConnection};

use super::{Broker, HOUR, at_once, declaration, items, name};
use crate::support::{self, TestDatabase};

/// Nothing is journaled until it ends.
pub(super) async fn hold_journal(database: &TestDatabase) -> PgConnection {
    let mut holder = database.connect().await;
    run(
        &mut holder,
        "begin; lock table postroad_broker.queue_journal in share mode",
    )
    .await;
    holder
}

pub(super) async fn run(connection: &mut PgConnection, text: &str) {
    let text = AssertSqlSafe(text.to_owned());
    sqlx::raw_sql(text).execute(connection).await.unwrap();
}

/// Backends in a call of this function that wait for a lock.
async fn waiting(database: &TestDatabase, function: &str) -> Vec<i32> {
    sqlx::query_scalar(
        "select pid from pg_stat_activity
         where datname = current_database() and wait_event_type = 'Lock' and strpos(query, $1) > 0",
    )
    .bind(function)
    .fetch_all(&mut database.connect().await)
    .await
    .unwrap()
}

/// Waits until a group is in the database and cannot be written.
pub(super) async fn held_up(database: &TestDatabase) -> i32 {
    support::eventually("a group to be held up", || async {
        waiting(database, "write_queue_").await.first().copied()
    })
    .await
}

/// The offsets in flight, by broker and database, once the queue answers.
async fn in_flight(broker: &Broker) -> Vec<i64> {
    let listed = support::eventually("the in-flight list", || async {
        let filter = InFlightFilter {
            limit: 100,
            ..InFlightFilter::default()
        };
        broker.queue.in_flight(&name(), filter).await.ok()
    })
    .await;
    listed.iter().map(|delivery| delivery.offset.0).collect()
}

/// The connection of a group is gone for good, and what it was about to write with it.
async fn end_backend(database: &TestDatabase, pid: i32) {
    let text = format!("select pg_terminate_backend({pid})");
    run(&mut database.connect().await, &text).await;
    support::eventually("the backend to end", || async {
        waiting(database, "write_queue_")
            .await
            .is_empty()
            .then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_former_owner_still_commits_is_known_to_the_next() {
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(16)).await;
    broker.publish("orders.created", 2).await;
    let taken = broker.take(2, HOUR).await;
    let mut holder = hold_journal(&database).await;
    let (queue, ack) = (broker.queue.clone(), items(&taken[..1]));
    let settling = tokio::spawn(async move { queue.settle(&name(), Verb::Ack, ack).await });
    held_up(&database).await;
    broker.kill();
    assert!(settling.await.unwrap().is_err(), "nobody is left to answer");
    // At the same address, so that it need not wait for the end of the former one's time.
    let next = Broker::on(&database).await;
    support::eventually("the next owner to ask for the slot", || async {
        let mut connection = database.connect().await;
        let asked: bool = sqlx::query_scalar(
            "select exists (select from pg_stat_activity where datname = current_database() and state = 'idle'
                and strpos(query, 'postroad_broker.take_leases') > 0)",
        )
        .fetch_one(&mut connection)
        .await
        .unwrap();
        let taken: bool = sqlx::query_scalar(
            "select exists (select from postroad_broker.lease where name like 'slot/%' and epoch > 1)",
        )
        .fetch_one(&mut connection)
        .await
        .unwrap();
        // A row that is locked is passed over. If it is not, what the next one reads must be seen.
        let described = next.queue.describe(&name()).await;
        let has_recovered = described.is_ok_and(|described| described.status.is_some());
        match taken {
            true => has_recovered.then_some(()),
            false => asked.then_some(()),
        }
    })
    .await;
    run(&mut holder, "rollback").await;
    support::eventually("the former owner's group to commit", || async {
        let busy = waiting(&database, "write_queue_").await;
        busy.is_empty().then_some(())
    })
    .await;
    assert_eq!(
        in_flight(&next).await,
        [2],
        "an ack that was committed is not known"
    );
    next.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ack_is_not_answered_before_it_is_committed() {
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(16)).await;
    broker.publish("orders.created", 1).await;
    let taken = broker.take(1, HOUR).await;
    let mut holder = hold_journal(&database).await;
    let (queue, ack) = (broker.queue.clone(), items(&taken));
    let settling = tokio::spawn(async move { queue.settle(&name(), Verb::Ack, ack).await });
    let pid = held_up(&database).await;
    broker.kill();
    end_backend(&database, pid).await;
    run(&mut holder, "rollback").await;
    let answered = settling.await.unwrap();
    let next = Broker::on(&database).await;
    assert_eq!(in_flight(&next).await, [1], "it was never written");
    assert!(
        answered.is_err(),
        "acknowledged, and in flight again: {answered:?}"
    );
    next.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delivery_is_not_answered_before_its_row_is_committed() {
    let database = support::database().await;
    let broker = Broker::with(&database, at_once(16)).await;
    broker.publish("orders.created", 1).await;
    let mut holder = hold_journal(&database).await;
    let queue = broker.queue.clone();
    let receiving = tokio::spawn(async move {
        let wait = std::time::Duration::from_secs(10);
        let request = ReceiveRequest {
            wait,
            ..ReceiveRequest::default()
        };
        let received = queue.receive(&name(), request).await;
        received.map(|received| {
            received.handout.written();
            received.deliveries.len()
        })
    });
    let pid = held_up(&database).await;
    broker.kill();
    end_backend(&database, pid).await;
    run(&mut holder, "rollback").await;
    let answered = receiving.await.unwrap();
    let next = Broker::on(&database).await;
    let again = next.take(1, HOUR).await;
    assert_eq!(again[0].delivery, 1, "no delivery of it was ever written");
    assert!(
        answered.is_err(),
        "two deliveries have one number: {answered:?}"
    );
    next.stop().await;
}

/// What a node remembers that was not heard of for its time to live may be long over: another node may have the queue, and have handed out
/// and settled since.
#[tokio::test(flavor = "multi_thread")]
async fn what_changes_nothing_is_not_answered_out_of_a_memory_that_may_be_over() {
    let database = support::database().await;
    let proxy = support::proxy(&database.url).await;
    // The queues' journal is reached, and the node's heartbeat is not.
    let url = proxy.url(&database.url);
    let broker = Broker::start(&url, &database.url, queue::Options::default()).await;
    let declaration = declaration(at_once(16));
    broker.queue.declare(name(), declaration).await.unwrap();
    broker.publish("orders.created", 1).await;
    let taken = broker.take(1, HOUR).await;
    let settle = async || {
        let queue = name();
        let acked = broker.queue.settle(&queue, Verb::Ack, items(&taken));
        acked.await
    };
    assert_eq!(settle().await.unwrap(), [queue::Outcome::Acked]);
    proxy.hold();
    support::eventually("the node not to be trusted", || async {
        (!broker.cluster.is_trusted()).then_some(())
    })
    .await;
    // Nobody has the queue yet.
    assert_eq!(settle().await.unwrap(), [queue::Outcome::AlreadySettled]);
    sqlx::query("update postroad_broker.lease set epoch = epoch + 1, holder = null where name like 'slot/%'")
        .execute(&mut database.connect().await)
        .await
        .unwrap();
    let refused = settle().await;
    assert!(
        matches!(refused, Err(queue::Error::NotOwner { .. })),
        "{refused:?}"
    );
    proxy.open();
    broker.kill();
}
