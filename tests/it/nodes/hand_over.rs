//! Slots change hands: at a join, at a leave, after a kill, and behind the back of a node that sleeps.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::api::{gauge, owned_by};
use super::{
    QUEUES, Ring, TTL, declare, moves, node, number, queue, settled, shares, size, three_nodes,
};
use crate::history::owners::{check, longest_gap};
use crate::support::consumer::{items, publish, publish_events};
use crate::support::leases::{events, watch};
use crate::support::process::raise_open_files;
use crate::support::{self, Consumer};

#[tokio::test(flavor = "multi_thread")]
async fn a_join_and_a_leave_move_the_fewest_slots() {
    let db = support::database().await;
    watch(&db.url).await;
    let one = node(&db.url).await;
    declare(&[&one]).await;
    let alone = settled(&one.http, 1).await;
    let two = node(&db.url).await;
    let both = settled(&one.http, 2).await;
    assert_eq!(moves(&alone, &both), 32);
    let mut three = node(&db.url).await;
    let all = settled(&two.http, 3).await;
    assert_eq!(moves(&both, &all), 21);
    let third = number(&three.http).await;
    assert_eq!(shares(&all)[&third], 21);
    assert!(three.stop().await.success());
    let left = settled(&one.http, 2).await;
    assert_eq!(moves(&all, &left), 21);
    assert!(
        all.iter()
            .all(|(slot, node)| *node == third || left[slot] == *node)
    );
    let shares: Vec<usize> = shares(&left).into_values().collect();
    assert_eq!(shares, [32, 32]);
    let events = events(&db.url).await;
    assert_eq!(check(&events), Vec::<String>::new());
    eprintln!(
        "the longest time without an owner: {:?}",
        longest_gap(&events)
    );
}

/// Messages in flight, of each queue.
async fn take_all(http: &support::Http, count: usize) -> Vec<(Consumer, Vec<Value>)> {
    let mut taken = Vec::new();
    for number in 0..QUEUES {
        let queue = queue(number);
        let http = http.clone();
        let consumer = Consumer { http, queue };
        let deliveries = consumer.take(count, 120).await;
        taken.push((consumer, deliveries));
    }
    taken
}

/// Nothing is handed out again, and what is out is acknowledged by its receipts.
async fn settle_all(ring: &Ring, taken: Vec<(Consumer, Vec<Value>)>) {
    for (consumer, deliveries) in taken {
        let path = format!("/v1/queues/{}", consumer.queue);
        let receive = json!({"wait_seconds": 0});
        let received = ring.post(&format!("{path}/receive"), &receive).await;
        assert_eq!(
            received["deliveries"],
            json!([]),
            "before its deadline: {received}"
        );
        let acks = json!({"deliveries": items(&deliveries, &json!({}))});
        let answer = ring.post(&format!("{path}/ack"), &acks).await;
        assert_eq!(answer["settled"], json!(deliveries.len()), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_flight_outlives_its_node_ended_in_order_and_long_polls_go_on() {
    let db = support::database().await;
    watch(&db.url).await;
    let (mut one, two) = (node(&db.url).await, node(&db.url).await);
    settled(&one.http, 2).await;
    declare(&[&one, &two]).await;
    publish(&one.http, "orders.created", 10).await;
    let taken = take_all(&two.http, 10).await;
    // Waiting at the node that stays, for queues of both.
    let polls: Vec<_> = (0..QUEUES)
        .map(|number| {
            let consumer = Consumer {
                http: two.http.clone(),
                queue: queue(number),
            };
            let receive = json!({"wait_seconds": 40, "max_messages": 1});
            tokio::spawn(async move { consumer.receive(&receive).await })
        })
        .collect();
    let waiting = || async {
        let mut waiting = 0;
        for number in 0..QUEUES {
            let consumer = Consumer {
                http: two.http.clone(),
                queue: queue(number),
            };
            waiting += consumer.status().await["waiters"].as_u64().unwrap();
        }
        (waiting == QUEUES as u64).then_some(())
    };
    support::eventually("all polls to wait", waiting).await;
    assert!(one.stop().await.success());
    settled(&two.http, 1).await;
    support::eventually("all polls to wait at the other node", waiting).await;
    publish(&two.http, "orders.created", 1).await;
    for poll in polls {
        let received = poll.await.unwrap();
        assert_eq!(
            received["deliveries"].as_array().unwrap().len(),
            1,
            "{received}"
        );
    }
    settle_all(&Ring::new(&[&two]), taken).await;
    let events = events(&db.url).await;
    assert_eq!(check(&events), Vec::<String>::new());
    let gap = longest_gap(&events);
    eprintln!("the longest time without an owner: {gap:?}");
    assert!(gap < TTL, "{gap:?}");
}

/// The next message of key `a` waits for the one in flight, whoever has the queue now.
async fn waits_for_its_key(consumer: &Consumer, in_flight: &Value, next: u64) -> Value {
    let answer = consumer.receive(&json!({"wait_seconds": 0})).await;
    assert_eq!(answer["reason"], "waiting_for_keys", "{answer}");
    let acks = items(std::slice::from_ref(in_flight), &json!({}));
    consumer.settle_all("ack", &acks, "acked").await;
    let taken = consumer.take(1, 120).await;
    assert_eq!(taken[0]["offset"], next, "{taken:?}");
    taken[0].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_stay_in_order_over_a_hand_over_and_a_kill() {
    let db = support::database().await;
    let (mut one, mut two) = (node(&db.url).await, node(&db.url).await);
    settled(&one.http, 2).await;
    // Enough for both nodes to have some.
    let ordered = json!({"topics": ["orders.*"], "ordering": "key"});
    let names = (0..8).map(|number| format!("ordered-{number}"));
    let names: Vec<String> = names.collect();
    for name in &names {
        Consumer::declare(&two.http, name, &ordered).await;
    }
    let event = |(number, key): (usize, &&str)| json!({"specversion": "1.0", "id": format!("e{number}"), "source": "/s", "type": "t", "partitionkey": key});
    let events: Vec<Value> = ["a", "a", "a", "b"].iter().enumerate().map(event).collect();
    publish_events(&one.http, "orders.created", &events).await;
    let at = |http: &support::Http, name: &String| Consumer {
        http: http.clone(),
        queue: name.clone(),
    };
    let mut in_flight = Vec::new();
    for name in &names {
        let taken = at(&two.http, name).take(2, 120).await;
        let offsets: Vec<_> = taken.iter().map(|taken| taken["offset"].clone()).collect();
        assert_eq!(offsets, [1, 4], "one of each key");
        in_flight.push(taken[0].clone());
    }
    assert!(one.stop().await.success());
    settled(&two.http, 1).await;
    for (name, first) in names.iter().zip(&mut in_flight) {
        *first = waits_for_its_key(&at(&two.http, name), first, 2).await;
    }
    one.start().await;
    settled(&one.http, 2).await;
    two.kill().await;
    settled(&one.http, 1).await;
    for (name, second) in names.iter().zip(&in_flight) {
        waits_for_its_key(&at(&one.http, name), second, 3).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_redelivers_nothing() {
    let db = support::database().await;
    watch(&db.url).await;
    let mut nodes = three_nodes(&db.url).await;
    declare(&[&nodes[0], &nodes[1], &nodes[2]]).await;
    publish(&nodes[0].http, "orders.created", 42).await;
    let taken = take_all(&nodes[0].http, 42).await;
    for number in 0..3 {
        assert!(nodes[number].stop().await.success());
        settled(&nodes[(number + 1) % 3].http, 2).await;
        nodes[number].start().await;
        settled(&nodes[(number + 1) % 3].http, 3).await;
    }
    let ring = Ring::new(&[&nodes[0], &nodes[1], &nodes[2]]);
    settle_all(&ring, taken).await;
    let events = events(&db.url).await;
    assert_eq!(check(&events), Vec::<String>::new());
    eprintln!(
        "the longest time without an owner: {:?}",
        longest_gap(&events)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_flight_outlives_its_node_killed() {
    let db = support::database().await;
    watch(&db.url).await;
    let (mut one, two) = (node(&db.url).await, node(&db.url).await);
    settled(&one.http, 2).await;
    declare(&[&one, &two]).await;
    publish(&one.http, "orders.created", 10).await;
    let taken = take_all(&one.http, 10).await;
    let killed_at = Instant::now();
    one.kill().await;
    // Every request is answered, however early it comes.
    settle_all(&Ring::new(&[&two]), taken).await;
    let took = killed_at.elapsed();
    settled(&two.http, 1).await;
    eprintln!("all answered by the other node after {took:?}, with a ttl of {TTL:?}");
    // Started again, it gets its share back, under its new number.
    one.start().await;
    let both = settled(&one.http, 2).await;
    assert_eq!(shares(&both)[&number(&one.http).await], 32);
    assert_eq!(check(&events(&db.url).await), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_killed_and_started_at_once_keeps_its_slots() {
    let db = support::database().await;
    let (mut one, two) = (node(&db.url).await, node(&db.url).await);
    let before = settled(&two.http, 2).await;
    let second = number(&two.http).await;
    one.kill().await;
    one.start().await;
    let after = settled(&two.http, 2).await;
    let kept = after.iter().filter(|(_, node)| **node == second).count();
    assert_eq!(kept, 32);
    assert!(
        before
            .iter()
            .all(|(slot, node)| *node != second || after[slot] == second)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_slept_for_longer_than_its_ttl_does_nothing_with_what_it_had() {
    let db = support::database().await;
    watch(&db.url).await;
    let (one, two) = (node(&db.url).await, node(&db.url).await);
    settled(&one.http, 2).await;
    declare(&[&one, &two]).await;
    publish(&two.http, "orders.created", 20).await;
    let taken = take_all(&two.http, 10).await;
    let first = number(&one.http).await;
    one.signal(Signal::STOP);
    support::eventually("the sleeper's end", || async {
        let (_, cluster) = two.http.get("/v1/cluster").await;
        let slots = cluster["slots"].as_array()?.iter();
        let mut of_first =
            slots.filter(|slot| slot["node"] == json!(first) || slot["holder"] == json!(first));
        of_first.next().is_none().then_some(())
    })
    .await;
    // The other one goes on with what it had handed out, and hands out more.
    settle_all_but_receives(&two.http, &taken).await;
    let more = take_all(&two.http, 10).await;
    one.signal(Signal::CONT);
    // At once, when it still believes in what it had.
    let asked: Vec<_> = (0..QUEUES)
        .map(|number| {
            let http = one.http.clone();
            tokio::spawn(async move {
                let path = format!("/v1/queues/{}/receive", queue(number));
                let ring = Ring {
                    nodes: [http].into(),
                    next: Default::default(),
                    repeated: Default::default(),
                };
                ring.post(&path, &json!({"wait_seconds": 0})).await
            })
        })
        .collect();
    for asked in asked {
        let received = asked.await.unwrap();
        assert_eq!(
            received["deliveries"],
            json!([]),
            "all is in flight: {received}"
        );
    }
    settle_all(&Ring::new(&[&one, &two]), more).await;
    settled(&one.http, 2).await;
    assert_ne!(number(&one.http).await, first, "a new incarnation");
    assert_eq!(check(&events(&db.url).await), Vec::<String>::new());
}

async fn settle_all_but_receives(http: &support::Http, taken: &[(Consumer, Vec<Value>)]) {
    for (consumer, deliveries) in taken {
        let consumer = Consumer {
            http: http.clone(),
            queue: consumer.queue.clone(),
        };
        let acks = items(deliveries, &json!({}));
        consumer.settle_all("ack", &acks, "acked").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_goes_by_the_queues_of_all_nodes() {
    let db = support::database().await;
    let (one, two) = (node(&db.url).await, node(&db.url).await);
    settled(&one.http, 2).await;
    declare(&[&one, &two]).await;
    let short = json!({"settled_retention_seconds": 1});
    let (status, answer) = one.http.put("/v1/streams/main", &short).await;
    assert!(status.is_success(), "{answer}");
    publish(&one.http, "orders.created", 5).await;
    let mut taken = take_all(&two.http, 5).await;
    // One queue keeps the stream, wherever it is and wherever the retention is.
    let ring = Ring::new(&[&one, &two]);
    let last = taken.split_off(QUEUES - 1);
    settle_all(&ring, taken).await;
    publish(&one.http, "other", 1).await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    let (_, stream) = one.http.get("/v1/streams/main").await;
    assert_eq!(stream["first_offset"], json!(1), "{stream}");
    settle_all(&ring, last).await;
    support::eventually("the stream to be emptied", || async {
        let (_, stream) = two.http.get("/v1/streams/main").await;
        (stream["first_offset"] == json!(7)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_the_database_moves_nothing() {
    let mut postgres = support::cluster().await;
    let url = postgres.create_database("shop").await;
    let (one, two) = (node(&url).await, node(&url).await);
    let before = settled(&one.http, 2).await;
    let numbers = (number(&one.http).await, number(&two.http).await);
    declare(&[&one, &two]).await;
    publish(&one.http, "orders.created", 5).await;
    let taken = take_all(&two.http, 5).await;
    postgres.stop().await;
    // Every row is out of date by the time that somebody can look again.
    tokio::time::sleep(TTL * 2).await;
    postgres.start().await;
    settle_all(&Ring::new(&[&one, &two]), taken).await;
    assert_eq!(settled(&two.http, 2).await, before);
    assert_eq!((number(&one.http).await, number(&two.http).await), numbers);
}

/// Polls that have waited for longer than a gap between owners may last: one at the owner, the others in line.
#[tokio::test(flavor = "multi_thread")]
async fn polls_that_have_waited_for_long_outlive_the_owner_killed() {
    let db = support::database().await;
    let (mut one, two) = (node(&db.url).await, node(&db.url).await);
    settled(&one.http, 2).await;
    declare(&[&one, &two]).await;
    let polls: Vec<_> = (0..QUEUES * 2)
        .map(|number| {
            let (http, name) = (two.http.clone(), queue(number % QUEUES));
            let receive = json!({"wait_seconds": 40, "max_messages": 1});
            let path = format!("/v1/queues/{name}/receive");
            // Asked once: a client that repeats would not notice.
            tokio::spawn(async move { http.ok(&path, &receive).await })
        })
        .collect();
    tokio::time::sleep(TTL * 2 + TTL / 2).await;
    one.kill().await;
    settled(&two.http, 1).await;
    publish(&two.http, "orders.created", 2).await;
    for poll in polls {
        let received = poll.await.unwrap();
        let deliveries = received["deliveries"].as_array();
        assert_eq!(deliveries.map(Vec::len), Some(1), "{received}");
    }
}

/// All at once they look for who has it now; that is this node, which is to recover it meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn many_polls_for_one_queue_move_with_it() {
    let count = size("POSTROAD_TEST_NODE_POLLS", 300);
    raise_open_files();
    let db = support::database().await;
    let (mut one, two) = (node(&db.url).await, node(&db.url).await);
    settled(&one.http, 2).await;
    let name = owned_by(&db.url, &two, &one).await;
    let path = format!("/v1/queues/{name}/receive");
    let polls: Vec<_> = (0..count)
        .map(|_| {
            let (http, path) = (two.http.clone(), path.clone());
            let receive = json!({"wait_seconds": 50, "max_messages": 1});
            tokio::spawn(async move { http.ok(&path, &receive).await })
        })
        .collect();
    support::eventually("all polls to wait", || async {
        let in_line = gauge(&two.http, "postroad_http_polls_in_line").await;
        (in_line == count as u64 - 1).then_some(())
    })
    .await;
    one.kill().await;
    let killed_at = Instant::now();
    let consumer = Consumer {
        http: two.http.clone(),
        queue: name,
    };
    support::eventually("all polls to wait at the other node", || async {
        (consumer.status().await["waiters"] == count).then_some(())
    })
    .await;
    eprintln!(
        "{count} polls wait at the other node {:?} after the kill, with a ttl of {TTL:?}",
        killed_at.elapsed()
    );
    publish(&two.http, "orders.created", count).await;
    for poll in polls {
        let received = poll.await.unwrap();
        assert_eq!(
            received["deliveries"].as_array().map(Vec::len),
            Some(1),
            "{received}"
        );
    }
}
