//! The typed client and its worker, against the real broker.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use postroad::client::{
    Client, Declaration, Done, Ended, Error, Failure, Item, Job, NewEvent, NodeState, ProblemKind,
    Queue, Receive, Refusal, Report, Settled, Status, Worker,
};
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::support;

/// A queue of a broker, made at once; failed messages come again at once.
async fn declared(base: &str) -> Queue {
    let queue = Client::new(base).unwrap().queue("billing").unwrap();
    let declaration = Declaration::of("main").topics(["orders.*"]);
    let declaration = declaration.retry_after([Duration::ZERO]);
    queue.declare(&declaration).await.unwrap();
    queue
}

async fn publish(base: &str, count: usize) -> BTreeSet<String> {
    let client = Client::new(base).unwrap();
    let ids: BTreeSet<String> = (0..count).map(|n| format!("order-{n}")).collect();
    let event = |id: &String| NewEvent::json(&json!({ "id": id })).unwrap().id(id);
    let events: Vec<NewEvent> = ids.iter().map(event).collect();
    let published = client.publish_all("orders.created", &events).await.unwrap();
    assert_eq!(published.len(), count);
    ids
}

async fn status(queue: &Queue) -> Status {
    support::eventually("the queue's status", || async {
        queue.describe().await.unwrap().unwrap().status
    })
    .await
}

async fn until(queue: &Queue, what: &str, check: impl Fn(&Status) -> bool) {
    support::eventually(what, || async { check(&status(queue).await).then_some(()) }).await;
}

type Running = JoinHandle<Result<Report, Error>>;

/// Starts a worker beside the test.
fn start<H, F>(worker: Worker, handler: H) -> (CancellationToken, Running)
where
    H: Fn(Job) -> F + Send + Sync + 'static,
    F: Future<Output = Result<Done, Failure>> + Send + 'static,
{
    let stop = CancellationToken::new();
    let running = tokio::spawn(worker.run(stop.clone(), handler));
    (stop, running)
}

#[tokio::test]
async fn calls_are_typed_and_what_is_refused_is_an_error() {
    let broker = support::broker().await;
    let base = &broker.http.base;
    let client = Client::new(format!("{base}/")).unwrap();
    assert!(client.is_ready().await);
    client.declare_stream("shop", ["shop.>"]).await.unwrap();
    let queue = client.queue("billing").unwrap();
    assert!(queue.describe().await.unwrap().is_none());
    let error = queue.receive(&Receive::default()).await.unwrap_err();
    assert_eq!(error.problem().unwrap().kind, ProblemKind::QueueNotFound);
    let wrong = Declaration::of("shop").max_attempts(0);
    let error = queue.declare(&wrong).await.unwrap_err();
    let problem = error.problem().unwrap();
    assert_eq!(problem.kind, ProblemKind::InvalidRequest);
    assert_eq!(problem.errors[0].pointer.as_deref(), Some("/max_attempts"));
    queue.declare(&Declaration::of("shop")).await.unwrap();
    assert!(matches!(client.queue("a b"), Err(Error::Name(_))));

    let event = NewEvent::json(&json!({"order": 7})).unwrap();
    let event = event.key("sku-1").source("/shop").extension("tenant", "x");
    let first = client.publish("shop.orders", &event).await.unwrap();
    let again = client.publish("shop.orders", &event).await.unwrap();
    assert_eq!((first.offset, first.duplicate), (Some(1), false));
    assert_eq!((again.offset, again.duplicate), (Some(1), true));
    let other = NewEvent::bytes("image/png", &[0, 1])
        .id(&first.id)
        .source("/shop");
    let error = client.publish("shop.orders", &other).await.unwrap_err();
    assert_eq!(error.problem().unwrap().kind, ProblemKind::IdConflict);

    let received = queue.receive(&Receive::default()).await.unwrap();
    let delivery = &received.deliveries[0];
    assert_eq!((delivery.offset, delivery.attempt), (1, 1));
    let event = &delivery.event;
    assert_eq!(
        (event.id.as_str(), event.key.as_deref()),
        (&*first.id, Some("sku-1"))
    );
    assert_eq!(event.attribute("tenant"), Some(json!("x")));
    assert_eq!(&*event.bytes(), b"{\"order\":7}");
    let extended =
        queue.extend(Item::from(delivery).visibility_timeout(Duration::from_secs(3_600)));
    assert!(matches!(extended.await.unwrap(), Settled::Extended { .. }));
    let nacked = queue.nack(Item::from(delivery).delay(Duration::ZERO).reason("later"));
    assert!(matches!(
        nacked.await.unwrap(),
        Settled::Nacked {
            due_at: Some(_),
            dead_letter: None
        }
    ));

    let received = queue.receive(&Receive::default()).await.unwrap();
    assert_eq!(received.deliveries[0].attempt, 2);
    let Err(Error::Refused(refused)) = queue.ack(delivery).await else {
        panic!("the first delivery is stale");
    };
    assert_eq!(refused.refusal, Refusal::Stale { attempt: 2 });
    let next = Receive {
        wait: Duration::ZERO,
        ack: vec![
            received.deliveries[0].receipt.clone(),
            delivery.receipt.clone(),
        ],
        ..Receive::default()
    };
    let next = queue.receive(&next).await.unwrap();
    assert_eq!((next.acked.len(), next.acked.refused().count()), (2, 1));
    assert_eq!(
        (next.deliveries.len(), next.reason.as_deref()),
        (0, Some("empty"))
    );
    queue.delete().await.unwrap();
    queue.delete().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_loses_nothing_and_repeats_nothing_acknowledged_while_the_broker_is_killed() {
    const MESSAGES: usize = 600;
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let queue = declared(&program.http.base).await;
    let ids = publish(&program.http.base, MESSAGES).await;
    let handled: Arc<Mutex<BTreeMap<String, usize>>> = Arc::default();
    let acked: Arc<Mutex<BTreeSet<String>>> = Arc::default();
    let (heard, known) = (Arc::clone(&acked), Arc::clone(&acked));
    let worker = Worker::new(queue.clone())
        .concurrency(8)
        .observe(move |ended: &Ended| {
            assert_eq!(ended.outcome.as_ref().map(|_| ()), Ok(()), "{ended:?}");
            heard.lock().unwrap().insert(ended.event_id.clone());
        });
    let counted = Arc::clone(&handled);
    let (stop, running) = start(worker, move |job| {
        let (counted, known) = (Arc::clone(&counted), Arc::clone(&known));
        async move {
            let id = job.event.id.clone();
            assert!(
                !known.lock().unwrap().contains(&id),
                "{id} was acknowledged"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
            *counted.lock().unwrap().entry(id).or_default() += 1;
            Ok(Done::Handled)
        }
    });
    for part in 1..=3 {
        support::eventually("some of the work to be done", || async {
            (acked.lock().unwrap().len() >= part * MESSAGES / 4).then_some(())
        })
        .await;
        program.kill().await;
        program.start().await;
    }
    support::eventually("all to be acknowledged", || async {
        (acked.lock().unwrap().len() == MESSAGES).then_some(())
    })
    .await;
    stop.cancel();
    let report = running.await.unwrap().unwrap();
    assert_eq!(
        (report.acked, report.panicked, report.refused),
        (MESSAGES as u64, 0, 0)
    );
    let handled = handled.lock().unwrap().clone();
    assert!(handled.keys().eq(&ids), "nothing is lost");
    // What was received is held over a restart, and its answer is asked for again: none of it comes twice.
    assert!(handled.values().all(|&count| count == 1), "{handled:?}");
    let numbers = status(&queue).await;
    assert_eq!(
        (numbers.depth, numbers.in_flight, numbers.dead_letters),
        (0, 0, 0)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_handler_keeps_its_message() {
    let broker = support::broker().await;
    let queue = declared(&broker.http.base).await;
    publish(&broker.http.base, 2).await;
    let gate = Arc::new(Semaphore::new(0));
    let begun = Arc::new(AtomicUsize::new(0));
    let (pass, count) = (Arc::clone(&gate), Arc::clone(&begun));
    // One is handled, the other waits for the handler: both are held.
    let worker = Worker::new(queue.clone()).visibility_timeout(Duration::from_secs(6));
    let (stop, running) = start(worker, move |job| {
        let (pass, count) = (Arc::clone(&pass), Arc::clone(&count));
        async move {
            count.fetch_add(1, Relaxed);
            pass.acquire().await.unwrap().forget();
            assert!(!job.lost.is_cancelled());
            Ok(Done::Handled)
        }
    });
    support::eventually("both to be extended, twice", || async {
        let (_, page) = broker.http.get("/v1/queues/billing/in-flight").await;
        let deliveries = page["deliveries"].as_array()?;
        let held = deliveries.iter().filter(|delivery| {
            let [from, until] = ["delivered_at", "visible_until"]
                .map(|name| support::consumer::time(&delivery[name]));
            (until - from).num_milliseconds() > 9_500
        });
        (held.count() == 2).then_some(())
    })
    .await;
    assert_eq!(begun.load(Relaxed), 1);
    gate.add_permits(2);
    until(&queue, "both to be acknowledged", |numbers| {
        numbers.depth == 0
    })
    .await;
    stop.cancel();
    let report = running.await.unwrap().unwrap();
    assert_eq!((report.acked, report.lost, report.refused), (2, 0, 0));
    assert_eq!(begun.load(Relaxed), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_is_told_that_its_message_is_lost() {
    let broker = support::broker().await;
    let queue = declared(&broker.http.base).await;
    publish(&broker.http.base, 1).await;
    let other = queue.clone();
    let worker = Worker::new(queue.clone()).visibility_timeout(Duration::from_secs(3));
    let (stop, running) = start(worker, move |job| {
        let other = other.clone();
        async move {
            // Somebody else settles it, by the same receipt.
            other
                .reject(Item::from(&job.delivery).reason("spam"))
                .await
                .unwrap();
            job.lost.cancelled().await;
            Ok(Done::Handled)
        }
    });
    until(&queue, "the message to be over", |numbers| {
        numbers.dead_letters == 1
    })
    .await;
    stop.cancel();
    let report = running.await.unwrap().unwrap();
    // With the last delivery's receipt an ack takes the dead letter back, says the matrix.
    assert_eq!(
        (report.lost, report.acked, report.refused),
        (1, 1, 0),
        "{report:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_graceful_stop_finishes_what_was_begun_and_gives_back_the_rest() {
    let broker = support::broker().await;
    let queue = declared(&broker.http.base).await;
    publish(&broker.http.base, 10).await;
    until(&queue, "the messages", |numbers| numbers.ready == 10).await;
    let gate = Arc::new(Semaphore::new(0));
    let begun = Arc::new(AtomicUsize::new(0));
    let (pass, count) = (Arc::clone(&gate), Arc::clone(&begun));
    let worker = Worker::new(queue.clone()).concurrency(2).prefetch(6);
    let (stop, running) = start(worker, move |_| {
        let (pass, count) = (Arc::clone(&pass), Arc::clone(&count));
        async move {
            count.fetch_add(1, Relaxed);
            pass.acquire().await.unwrap().forget();
            Ok(Done::Handled)
        }
    });
    support::eventually("two handlers", || async {
        (begun.load(Relaxed) == 2).then_some(())
    })
    .await;
    assert_eq!(status(&queue).await.in_flight, 8);
    stop.cancel();
    until(&queue, "the rest to be given back", |numbers| {
        numbers.in_flight == 2
    })
    .await;
    gate.add_permits(2);
    let report = running.await.unwrap().unwrap();
    assert_eq!((report.acked, report.released, report.refused), (2, 6, 0));
    let numbers = status(&queue).await;
    assert_eq!(
        (numbers.in_flight, numbers.depth, numbers.waiters),
        (0, 8, 0)
    );
    let received = queue.receive(&Receive::default()).await.unwrap();
    assert!(
        received
            .deliveries
            .iter()
            .all(|delivery| delivery.attempt == 1),
        "not charged"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_worker_stops_at_once() {
    let broker = support::broker().await;
    let queue = declared(&broker.http.base).await;
    let worker = Worker::new(queue.clone()).wait(Duration::from_secs(50));
    let (stop, running) = start(worker, async |_| Ok(Done::Handled));
    until(&queue, "the long poll", |numbers| numbers.waiters == 1).await;
    stop.cancel();
    let ended = tokio::time::timeout(Duration::from_secs(30), running).await;
    let report = ended
        .expect("it does not wait for its long poll")
        .unwrap()
        .unwrap();
    assert_eq!(report, Report::default());
    until(&queue, "nobody to wait", |numbers| numbers.waiters == 0).await;
    assert_eq!(status(&queue).await.in_flight, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_beyond_the_grace_is_dropped_and_its_message_tried_again() {
    let broker = support::broker().await;
    let queue = declared(&broker.http.base).await;
    publish(&broker.http.base, 1).await;
    let worker = Worker::new(queue.clone()).grace(Duration::from_millis(100));
    let begun = Arc::new(Semaphore::new(0));
    let begin = Arc::clone(&begun);
    let (stop, running) = start(worker, move |_| {
        begin.add_permits(1);
        std::future::pending()
    });
    begun.acquire().await.unwrap().forget();
    stop.cancel();
    let report = running.await.unwrap().unwrap();
    assert_eq!((report.nacked, report.acked), (1, 0));
    let received = queue.receive(&Receive::default()).await.unwrap();
    assert_eq!(received.deliveries[0].attempt, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_panics_and_refusals_go_back_as_what_they_are() {
    let broker = support::broker().await;
    let queue = declared(&broker.http.base).await;
    publish(&broker.http.base, 5).await;
    let worker = Worker::new(queue.clone()).concurrency(3);
    let (stop, running) = start(worker, async |job| {
        match (job.event.id.as_str(), job.attempt) {
            ("order-0", 1) => panic!("out of paper"),
            ("order-1", 1) => Err("x".parse::<u32>().unwrap_err())?,
            ("order-2", _) => Err(Failure::reject("spam")),
            ("order-3", 1) if job.delivery.delivery == 1 => Ok(Done::NotNow(Duration::ZERO)),
            ("order-4", 1) => Err(Failure::retry("busy").after(Duration::from_millis(1))),
            ("order-3", attempt) => {
                assert_eq!(attempt, 1, "not now is not charged");
                Ok(Done::Handled)
            }
            (_, attempt) => {
                assert_eq!(attempt, 2);
                Ok(Done::Handled)
            }
        }
    });
    until(&queue, "all to be settled", |numbers| {
        numbers.depth == 0 && numbers.dead_letters == 1
    })
    .await;
    stop.cancel();
    let report = running.await.unwrap().unwrap();
    let numbers = (
        report.acked,
        report.nacked,
        report.rejected,
        report.released,
        report.panicked,
    );
    assert_eq!(numbers, (4, 3, 1, 1, 1), "{report:?}");
    assert_eq!(status(&queue).await.dead_letters, 1);
    let reasons: Vec<(String,)> =
        sqlx::query_as("select failures::text from postroad_broker.dead_letter")
            .fetch_all(&mut broker.database.connect().await)
            .await
            .unwrap();
    assert!(
        reasons.len() == 1 && reasons[0].0.contains("spam"),
        "{reasons:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_of_no_queue_ends_with_the_reason() {
    let broker = support::broker().await;
    let queue = Client::new(&broker.http.base)
        .unwrap()
        .queue("nobody")
        .unwrap();
    let (_stop, running) = start(Worker::new(queue), async |_| Ok(Done::Handled));
    let error = running.await.unwrap().unwrap_err();
    assert_eq!(error.problem().unwrap().kind, ProblemKind::QueueNotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_in_order_handles_a_key_one_after_another_though_it_holds_several_of_it() {
    const KEYS: usize = 7;
    const EACH: usize = 20;
    let broker = support::broker().await;
    let client = Client::new(&broker.http.base).unwrap();
    let queue = client.queue("billing").unwrap();
    let keyed = Declaration::of("main").retry_after([Duration::ZERO]);
    let keyed = keyed.set("ordering", "key").set("key_batches", true);
    queue.declare(&keyed).await.unwrap();
    let event = |n: usize| {
        let (key, number) = (format!("key-{}", n % KEYS), n / KEYS);
        let event = NewEvent::json(&json!({ "number": number })).unwrap();
        event.id(format!("{key}-{number}")).key(key)
    };
    let events: Vec<NewEvent> = (0..KEYS * EACH).map(event).collect();
    client.publish_all("orders.created", &events).await.unwrap();
    until(&queue, "the messages", |numbers| {
        numbers.depth == (KEYS * EACH) as u64
    })
    .await;

    let busy: Arc<Mutex<BTreeSet<String>>> = Arc::default();
    let handled: Arc<Mutex<BTreeMap<String, Vec<u64>>>> = Arc::default();
    let acked: Arc<Mutex<Vec<i64>>> = Arc::default();
    let heard = Arc::clone(&acked);
    let worker = Worker::new(queue.clone()).in_order().concurrency(4);
    let worker = worker.prefetch(60).observe(move |ended: &Ended| {
        assert!(ended.outcome.is_ok(), "{ended:?}");
        if let Ok(Settled::Acked) = ended.outcome {
            heard.lock().unwrap().push(ended.offset);
        }
    });
    let (held, done) = (Arc::clone(&busy), Arc::clone(&handled));
    let (stop, running) = start(worker, move |job| {
        let (busy, handled) = (Arc::clone(&held), Arc::clone(&done));
        async move {
            let key = job.event.key.clone().unwrap();
            assert!(busy.lock().unwrap().insert(key.clone()), "two of {key}");
            tokio::task::yield_now().await;
            busy.lock().unwrap().remove(&key);
            let data: serde_json::Value = job.event.json().unwrap();
            let number = data["number"].as_u64().unwrap();
            // What was handed out together with it goes back, and waits for it.
            if number % 6 == 5 && job.attempt == 1 {
                return Err(Failure::retry("busy"));
            }
            handled.lock().unwrap().entry(key).or_default().push(number);
            Ok(Done::Handled)
        }
    });
    until(&queue, "all to be settled", |numbers| {
        // The queue may not have heard of them all yet.
        numbers.depth == 0 && acked.lock().unwrap().len() == KEYS * EACH
    })
    .await;
    stop.cancel();
    let report = running.await.unwrap().unwrap();
    assert_eq!(
        (report.acked, report.nacked, report.refused, report.panicked),
        ((KEYS * EACH) as u64, (KEYS * 3) as u64, 0, 0),
        "{report:?}"
    );
    assert!(
        report.released > 0,
        "several of a key were held: {report:?}"
    );
    let expected: Vec<u64> = (0..EACH as u64).collect();
    let handled = handled.lock().unwrap();
    assert_eq!(handled.len(), KEYS);
    assert!(handled.values().all(|numbers| *numbers == expected));
    // Each key's messages were acknowledged in order, too.
    let acked = acked.lock().unwrap();
    for key in 0..KEYS as i64 {
        let of_key = acked
            .iter()
            .filter(|&&offset| (offset - 1) % KEYS as i64 == key);
        assert!(of_key.is_sorted(), "{acked:?}");
    }
}

#[tokio::test]
async fn a_version_is_expected_and_a_conflict_says_which_it_is() {
    let broker = support::broker().await;
    let keyed = json!({"topics": ["accounts.>"], "keyed": true});
    broker.http.declare("/v1/streams/accounts", &keyed).await;
    let client = Client::new(&broker.http.base).unwrap();
    let event = |version| {
        let event = NewEvent::json(&json!({ "version": version })).unwrap();
        event.key("k").expected_version(version)
    };
    client.publish("accounts.a", &event(0)).await.unwrap();
    client.publish("accounts.a", &event(1)).await.unwrap();
    let late = client.publish("accounts.a", &event(1)).await.unwrap_err();
    assert!(!late.is_transient());
    let problem = late.problem().unwrap();
    assert_eq!(problem.kind, ProblemKind::VersionConflict);
    assert_eq!(problem.version, Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cluster_is_described() {
    let database = support::database().await;
    let program = support::program(&database.url, &[]).await;
    let queue = declared(&program.http.base).await;
    status(&queue).await;
    let client = Client::new(&program.http.base).unwrap();
    let cluster = support::eventually("everything to be held", || async {
        let cluster = client.cluster().await.unwrap();
        let is_held = cluster.leases.len() == 3 && cluster.is_settled();
        is_held.then_some(cluster)
    })
    .await;
    let [node] = &cluster.nodes[..] else {
        panic!("one node, not {:?}", cluster.nodes);
    };
    assert_eq!((node.node, node.state), (cluster.node, NodeState::Live));
    assert_eq!((node.slots, cluster.slots.len()), (64, 64));
    assert_eq!(
        (cluster.leader, &node.url),
        (Some(node.node), &program.http.base)
    );
    assert!(node.expires_at > node.started_at);
    let held = cluster
        .slots
        .iter()
        .find(|slot| slot.held.epoch > 0)
        .unwrap();
    assert_eq!(held.held.holder, Some(node.node));
    let [history] = &cluster.histories[..] else {
        panic!("one history, not {:?}", cluster.histories);
    };
    assert_eq!((history.era, history.first_offsets.len()), (1, 0));
}
