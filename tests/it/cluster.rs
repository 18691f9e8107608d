//! The cluster: leases change hands at once or after the ttl, epochs only rise, and the dead stay dead.

use std::time::Duration;

use postroad::cluster::{self, Error, Handle, Options};
use postroad::domain::id::Slot;
use postroad::store::{self, Database};
use postroad::supervisor::Supervisor;
use prometheus_client::registry::Registry;
use sqlx::Executor as _;

use super::support::{self, TestDatabase};

async fn node(db: &TestDatabase, address: &str, ttl: Duration) -> (Handle, Supervisor) {
    node_at(&db.database, address, ttl).await
}

async fn node_at(db: &Database, address: &str, ttl: Duration) -> (Handle, Supervisor) {
    let supervisor = Supervisor::new();
    let options = Options {
        ttl,
        heartbeat: Duration::from_millis(50),
        allow_unsafe_postgres: true,
        ..Options::new(address)
    };
    let handle = cluster::start(options, db.clone(), &supervisor, &mut Registry::default())
        .await
        .unwrap();
    (handle, supervisor)
}

const LONG: Duration = Duration::from_secs(60);

async fn stop(supervisor: &Supervisor) {
    supervisor.stop(Duration::from_secs(10)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_are_shared_out_and_an_orderly_end_hands_them_over_at_once() {
    let db = support::database().await;
    let (one, one_tasks) = node(&db, "http://one", LONG).await;
    let names: Vec<String> = (0..64).map(|slot| Slot(slot).lease_name()).collect();
    let mut held = Vec::new();
    for name in &names {
        let mut watcher = one.hold(name.clone());
        let fence = watcher.wait_for(Option::is_some).await.unwrap().clone();
        let fence = fence.unwrap();
        assert_eq!((&fence.lease, fence.epoch.0), (name, 1));
        held.push(watcher);
    }
    let (two, two_tasks) = node(&db, "http://two", LONG).await;
    let mut wanted: Vec<_> = names.iter().map(|name| two.hold(name.clone())).collect();
    let mut moved = 0;
    let mut views = two.views();
    let view = views
        .wait_for(|view| {
            view.assigned
                .values()
                .filter(|&&node| node == view.own)
                .count()
                == 32
        })
        .await
        .unwrap()
        .clone();
    for (name, (held, wanted)) in names.iter().zip(held.iter_mut().zip(&mut wanted)) {
        if view.assigned[name] != view.own {
            assert!(
                wanted.borrow().is_none() && held.borrow().is_some(),
                "{name} stays"
            );
            continue;
        }
        held.wait_for(Option::is_none).await.unwrap();
        assert!(
            wanted.borrow().is_none(),
            "{name} is not free before its holder says so"
        );
        one.yielded(name);
        let fence = wanted.wait_for(Option::is_some).await.unwrap().clone();
        assert_eq!(fence.unwrap().epoch.0, 2);
        moved += 1;
    }
    assert_eq!(moved, 32);
    stop(&one_tasks).await;
    for watcher in &mut wanted {
        let fence = watcher.wait_for(Option::is_some).await.unwrap().clone();
        assert_eq!(fence.unwrap().epoch.0, 2);
    }
    stop(&two_tasks).await;
}

/// By the clock of the start nothing would get old for as long as the process lives.
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_was_behind_at_the_start_is_moved_on_once_both_agree() {
    let db = support::database().await;
    support::clock::settable(&db.url).await;
    support::clock::set(&db.url, "-1 day").await;
    let (node, tasks) = node(&db, "http://one", LONG).await;
    let real = chrono::Utc::now;
    let minutes = chrono::TimeDelta::minutes;
    // For as long as they do not agree, the earlier one counts.
    let mut views = node.views();
    for _ in 0..3 {
        views.changed().await.unwrap();
    }
    assert!(node.now() < real() - minutes(23 * 60));
    support::clock::set(&db.url, "0").await;
    support::eventually("the clock to be moved on", async || {
        (node.now() > real() - minutes(1)).then_some(())
    })
    .await;
    // A database that is ahead moves nothing.
    support::clock::set(&db.url, "1 day").await;
    for _ in 0..3 {
        views.changed().await.unwrap();
    }
    assert!(node.now() < real() + minutes(1));
    stop(&tasks).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_does_not_finish_loses_its_lease_all_the_same() {
    let db = support::database().await;
    let short = Duration::from_millis(400);
    let (one, one_tasks) = node(&db, "http://one", short).await;
    let mut first = one.hold("duty/a".to_owned());
    let mut second = one.hold("duty/b".to_owned());
    first.wait_for(Option::is_some).await.unwrap();
    second.wait_for(Option::is_some).await.unwrap();
    let (two, two_tasks) = node(&db, "http://two", LONG).await;
    let (mut third, mut fourth) = (two.hold("duty/a".to_owned()), two.hold("duty/b".to_owned()));
    // One of the two is handed over, though nobody says that it is finished.
    tokio::select! {
        taken = third.wait_for(Option::is_some) => assert!(taken.is_ok()),
        taken = fourth.wait_for(Option::is_some) => assert!(taken.is_ok()),
    }
    // A node that leaves has nothing left that another one can hold.
    one.leave(LONG).await;
    third.wait_for(Option::is_some).await.unwrap();
    fourth.wait_for(Option::is_some).await.unwrap();
    assert!(first.borrow().is_none() && second.borrow().is_none());
    stop(&one_tasks).await;
    two.leave(LONG).await;
    assert!(third.borrow().is_some(), "there is nobody to leave it to");
    stop(&two_tasks).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumped_back_keeps_nobody_alive() {
    let db = support::database().await;
    let (one, one_tasks) = node(&db, "http://one", LONG).await;
    let mut held = one.hold("duty/a".to_owned());
    held.wait_for(Option::is_some).await.unwrap();
    // It dies, and its row says that it lives for an hour yet.
    let mut other = db.database.connect().await.unwrap();
    let (dead, ..) = store::cluster::register_node(&mut other, "http://dead", "http://dead", 0.5)
        .await
        .unwrap();
    let taken = store::cluster::take_leases(&mut other, dead, &["duty/b".to_owned()], &[]).await;
    assert_eq!(taken.unwrap().len(), 1);
    let mut admin = db.connect().await;
    admin
        .execute("update postroad_broker.node set expires_at = expires_at + interval '1 h' where address = 'http://dead'")
        .await
        .unwrap();
    let mut left = one.hold("duty/b".to_owned());
    let fence = left.wait_for(Option::is_some).await.unwrap().clone();
    assert_eq!(fence.unwrap().epoch.0, 2);
    stop(&one_tasks).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_takes_over_at_once_what_its_own_address_held() {
    let db = support::database().await;
    let (one, _left_running) = node(&db, "http://same", LONG).await;
    let mut first = one.hold("slot/00".to_owned());
    first.wait_for(Option::is_some).await.unwrap();
    let incarnation = one.incarnation();
    let (two, tasks) = node(&db, "http://same", LONG).await;
    let mut second = two.hold("slot/00".to_owned());
    let fence = second
        .wait_for(Option::is_some)
        .await
        .unwrap()
        .clone()
        .unwrap();
    // More, if the former one, which runs on here, has noticed by then and taken it back.
    assert!(fence.epoch.0 >= 2);
    assert!(two.incarnation() > incarnation);
    stop(&tasks).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nodes_say_of_the_loads_of_slots_is_added_up() {
    let db = support::database().await;
    let mut connection = db.database.connect().await.unwrap();
    let mut nodes = Vec::new();
    for (address, loads) in [("http://one", [1, 0, 300]), ("http://two", [0, 20, 5])] {
        let registering =
            store::cluster::register_node(&mut connection, address, address, 60.0).await;
        let (node, ..) = registering.unwrap();
        let noting = store::cluster::note_loads(&db.database, node, &loads);
        noting.await.unwrap();
        nodes.push(node);
    }
    let sign = store::cluster::Sign {
        incarnation: nodes[0],
        ttl_millis: 60_000,
        wants: &[],
        is_leaving: false,
        beat: 1,
    };
    let seen = store::cluster::beat(&mut connection, sign).await.unwrap();
    assert_eq!(seen.loads, [1, 20, 305]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_holder_is_marked_dead_and_starts_over_as_a_new_incarnation() {
    let db = support::database().await;
    let (one, one_tasks) = node(&db, "http://one", LONG).await;
    let mut first = one.hold("slot/00".to_owned());
    first.wait_for(Option::is_some).await.unwrap();
    let incarnation = one.incarnation();
    // Its heartbeat is late: the row is locked by somebody else's transaction until it has expired.
    let mut admin = db.connect().await;
    admin
        .execute("update postroad_broker.node set expires_at = clock_timestamp() - interval '1 s'")
        .await
        .unwrap();
    let mut other = db.database.connect().await.unwrap();
    let (dead, ..) = store::cluster::register_node(&mut other, "http://two", "http://two", 60.0)
        .await
        .unwrap();
    let taken = store::cluster::take_leases(&mut other, dead, &["slot/00".to_owned()], &[]).await;
    // Either the heartbeat came first and keeps it, or the taker was first and the holder starts over.
    match taken.unwrap().first() {
        None => assert_eq!(one.incarnation(), incarnation),
        Some(fence) => {
            assert_eq!(fence.epoch.0, 2);
            first.wait_for(Option::is_none).await.unwrap();
            support::eventually("a new incarnation", async || {
                (one.incarnation() > incarnation).then_some(())
            })
            .await;
        }
    }
    // A dead incarnation is neither renewed nor does it take anything.
    store::cluster::mark_node_dead(&mut other, dead)
        .await
        .unwrap();
    let sign = store::cluster::Sign {
        incarnation: dead,
        ttl_millis: 60_000,
        wants: &[],
        is_leaving: false,
        beat: 1,
    };
    let seen = store::cluster::beat(&mut other, sign).await.unwrap();
    assert!(!seen.is_renewed);
    let taken = store::cluster::take_leases(&mut other, dead, &["slot/01".to_owned()], &[]).await;
    assert_eq!(taken.unwrap(), []);
    first.wait_for(Option::is_some).await.unwrap();
    // Declared dead by a person: fences are dropped and taken again at a later epoch.
    let before = first.borrow().clone().unwrap();
    admin
        .execute("update postroad_broker.node set dead_at = clock_timestamp()")
        .await
        .unwrap();
    let later = first
        .wait_for(|held| {
            held.as_ref()
                .is_some_and(|fence| fence.epoch > before.epoch)
        })
        .await
        .unwrap();
    assert!(later.is_some());
    drop(later);
    assert!(one.is_trusted());
    stop(&one_tasks).await;
}

/// A call that waited, or that somebody made in a transaction of his own, goes by the moment.
#[tokio::test(flavor = "multi_thread")]
async fn lives_are_judged_by_the_clock_and_not_by_when_a_transaction_began() {
    let db = support::database().await;
    let (mut early, mut other) = (db.connect().await, db.connect().await);
    early.execute("begin; select now()").await.unwrap();
    let (old, ..) = store::cluster::register_node(&mut other, "http://old", "http://old", 0.3)
        .await
        .unwrap();
    let name = ["slot/00".to_owned()];
    let taken = store::cluster::take_leases(&mut other, old, &name, &[]).await;
    assert_eq!(taken.unwrap().len(), 1);
    support::eventually("its time to be over", async || {
        let over = "select expires_at < clock_timestamp() from postroad_broker.node";
        let mut connection = db.connect().await;
        let over = sqlx::query_scalar(over).fetch_one(&mut connection).await;
        over.unwrap_or(false).then_some(())
    })
    .await;
    let (new, ..) = store::cluster::register_node(&mut early, "http://new", "http://new", 60.0)
        .await
        .unwrap();
    let taken = store::cluster::take_leases(&mut early, new, &name, &[]).await;
    assert_eq!(taken.unwrap().len(), 1, "a dead holder keeps its lease");
    early.execute("commit").await.unwrap();
    let left = "select expires_at > clock_timestamp() + interval '59 s' from postroad_broker.node where dead_at is null";
    let left: bool = sqlx::query_scalar(left)
        .fetch_one(&mut other)
        .await
        .unwrap();
    assert!(left, "a new node has all of its time before it");
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_takers_never_share_an_epoch() {
    let db = support::database().await;
    let mut epochs = Vec::new();
    let takers = (0..8).map(|n| {
        let database = db.database.clone();
        tokio::spawn(async move {
            let mut connection = database.connect().await.unwrap();
            let mut taken = Vec::new();
            for _ in 0..20 {
                // Always expired: everybody takes from everybody.
                let address = format!("http://{n}");
                let (node, ..) =
                    store::cluster::register_node(&mut connection, &address, &address, -1.0)
                        .await
                        .unwrap();
                let names = ["slot/00", "slot/01"].map(str::to_owned);
                let fences = store::cluster::take_leases(&mut connection, node, &names, &[])
                    .await
                    .unwrap();
                taken.extend(fences.into_iter().map(|fence| (fence.lease, fence.epoch)));
            }
            taken
        })
    });
    for taker in takers.collect::<Vec<_>>() {
        epochs.extend(taker.await.unwrap());
    }
    let taken = epochs.len();
    // The holder may change while a taker waits for the one it saw: then it gets nothing, and asks again.
    assert!(taken >= 100, "{taken} of 320 were taken");
    epochs.sort();
    epochs.dedup();
    assert_eq!(epochs.len(), taken);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_may_lose_what_it_acknowledged_is_refused() {
    let server = support::cluster_with(&[("fsync", "off"), ("full_page_writes", "on")]).await;
    let database = store::Database::new(&server.url("postgres"), 2).unwrap();
    store::migrate::broker(&database).await.unwrap();
    let supervisor = Supervisor::new();
    let mut registry = Registry::default();
    let strict = Options::new("http://one");
    let refused =
        cluster::start(strict.clone(), database.clone(), &supervisor, &mut registry).await;
    assert!(
        matches!(&refused, Err(Error::UnsafePostgres { settings }) if settings == &["fsync"]),
        "{refused:?}"
    );
    let lenient = Options {
        allow_unsafe_postgres: true,
        ..strict
    };
    let one = cluster::start(lenient, database.clone(), &supervisor, &mut registry)
        .await
        .unwrap();
    let again = store::cluster::broker_identity(&database).await.unwrap();
    assert_eq!(one.identity(), &again, "written once");
    assert!(!format!("{again:?}").contains(&again.receipt_key.0[0].to_string().repeat(2)));
    let before = one.now();
    assert!(one.now() >= before);
    stop(&supervisor).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_vanishes_without_a_word_costs_no_more_than_half_a_ttl() {
    let db = support::database().await;
    let proxy = support::proxy(&db.url).await;
    let database = Database::new(&proxy.url(&db.url), 2).unwrap();
    let ttl = Duration::from_secs(10);
    let (one, tasks) = node_at(&database, "http://one", ttl).await;
    let incarnation = one.incarnation();
    proxy.vanish();
    // Asked for on a connection on which nothing is heard again.
    let mut held = one.hold("a".to_owned());
    let taken = async { held.wait_for(Option::is_some).await.is_ok() };
    assert_eq!(
        tokio::time::timeout(ttl, taken).await,
        Ok(true),
        "the heartbeat goes on over a new connection"
    );
    assert_eq!(one.incarnation(), incarnation, "renewed in time");
    stop(&tasks).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_somebody_has_locked_holds_up_no_other() {
    let db = support::database().await;
    let (one, one_tasks) = node(&db, "http://one", LONG).await;
    let mut a = one.hold("a".to_owned());
    a.wait_for(Option::is_some).await.unwrap();
    // As a process has it that was stopped within a transaction.
    let mut stuck = db.connect().await;
    stuck
        .execute("begin; select from postroad_broker.lease where name = 'a' for no key update")
        .await
        .unwrap();
    let (two, two_tasks) = node(&db, "http://two", LONG).await;
    let mut taken = two.hold("a".to_owned());
    let mut other = two.hold("b".to_owned());
    // It cannot give the locked one back, and goes on living.
    stop(&one_tasks).await;
    other.wait_for(Option::is_some).await.unwrap();
    assert!(taken.borrow().is_none(), "it is locked");
    stuck.execute("commit").await.unwrap();
    taken.wait_for(Option::is_some).await.unwrap();
    stop(&two_tasks).await;
}
