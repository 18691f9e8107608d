//! Any node answers any request.

use serde_json::json;

use super::{QUEUES, Ring, assigned, declare, node, number, queue, settled, shares};
use crate::support::consumer::{items, publish};
use crate::support::{self, Consumer};

#[tokio::test(flavor = "multi_thread")]
async fn any_node_answers_any_request() {
    let db = support::database().await;
    let (one, two) = (node(&db.url).await, node(&db.url).await);
    settled(&one.http, 2).await;
    declare(&[&one, &two]).await;
    publish(&two.http, "orders.created", 3).await;
    for (receiver, settler) in [(&one, &two), (&two, &one)] {
        for number in 0..QUEUES {
            let consumer = |program: &support::Program| Consumer {
                http: program.http.clone(),
                queue: queue(number),
            };
            let taken = consumer(receiver).take(1, 60).await;
            let acks = items(&taken, &json!({}));
            consumer(settler).settle_all("ack", &acks, "acked").await;
            // Again, at the other one: what was settled there is known here.
            let again = consumer(receiver).settle("ack", &acks).await;
            assert_eq!(again[0]["result"], "already_settled");
        }
    }
    // Each node tells the same of each queue, whoever owns it.
    for number in 0..QUEUES {
        let path = format!("/v1/queues/{}", queue(number));
        for program in [&one, &two] {
            let (status, described) = program.http.get(&path).await;
            assert_eq!(
                (status.as_u16(), &described["status"]["depth"]),
                (200, &json!(1))
            );
        }
    }
    // What changes a queue goes by its owner, too.
    for number in 0..4 {
        let path = format!("/v1/queues/{}", queue(number));
        for program in [&one, &two] {
            program.http.ok(&format!("{path}/pause"), &json!({})).await;
            let receive = json!({"wait_seconds": 0});
            let received = two.http.ok(&format!("{path}/receive"), &receive).await;
            assert_eq!(received["reason"], "paused");
            program.http.ok(&format!("{path}/resume"), &json!({})).await;
        }
        one.http
            .declare(&path, &json!({"topics": ["orders.*"], "max_attempts": 3}))
            .await;
        two.http
            .declare(
                &path,
                &json!({"topics": ["orders.created"], "max_attempts": 4}),
            )
            .await;
        let (_, described) = one.http.get(&path).await;
        assert_eq!(described["max_attempts"], 4);
        let purged = one.http.ok(&format!("{path}/purge"), &json!({})).await;
        assert_eq!(purged["generation"], 2);
        let (status, _) = two.http.delete(&path).await;
        assert_eq!(status.as_u16(), 204);
        for program in [&one, &two] {
            let (status, gone) = program.http.get(&path).await;
            assert_eq!(
                (status.as_u16(), &gone["type"]),
                (404, &json!("/problems/queue-not-found"))
            );
        }
        // Another queue of the name is another's slot, perhaps.
        one.http
            .declare(&path, &json!({"topics": ["orders.*"]}))
            .await;
        let consumer = Consumer {
            http: two.http.clone(),
            queue: queue(number),
        };
        assert_eq!(consumer.take(3, 30).await.len(), 3);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_poll_on_the_wrong_node_hears_of_a_message_published_on_a_third() {
    let db = support::database().await;
    let nodes = [
        node(&db.url).await,
        node(&db.url).await,
        node(&db.url).await,
    ];
    settled(&nodes[0].http, 3).await;
    let consumer =
        Consumer::declare(&nodes[0].http, "billing", &json!({"topics": ["orders.*"]})).await;
    let owner = support::eventually("an owner", || async {
        let (_, cluster) = nodes[0].http.get("/v1/cluster").await;
        let slots = cluster["slots"].as_array()?.iter();
        slots
            .filter(|slot| slot["epoch"] != 0)
            .find_map(|slot| slot["holder"].as_i64())
    })
    .await;
    let mut others = Vec::new();
    for program in &nodes {
        if number(&program.http).await != owner {
            others.push(program);
        }
    }
    assert_eq!(others.len(), 2);
    let poll = Consumer {
        http: others[0].http.clone(),
        ..consumer.clone()
    };
    let waiting = tokio::spawn(async move { poll.take(1, 30).await });
    support::eventually("the poll to wait at the owner", || async {
        (consumer.status().await["waiters"] == 1).then_some(())
    })
    .await;
    publish(&others[1].http, "orders.created", 1).await;
    let taken = waiting.await.unwrap();
    consumer
        .settle_all("ack", &items(&taken, &json!({})), "acked")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_node_is_served_as_any_client() {
    let db = support::database().await;
    let (one, two) = (node(&db.url).await, node(&db.url).await);
    settled(&one.http, 2).await;
    declare(&[&one]).await;
    for number in 0..QUEUES {
        for program in [&one, &two] {
            let url = format!("{}/v1/queues/{}/receive", program.http.base, queue(number));
            let asked = program
                .http
                .client
                .post(url)
                .json(&json!({"wait_seconds": 0}));
            let asked = asked
                .header("x-postroad-node", "Zm9yZ2Vk")
                .header("x-postroad-epoch", "9");
            assert_eq!(asked.send().await.unwrap().status().as_u16(), 200);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cluster_is_described_alike_by_all() {
    let db = support::database().await;
    let (one, two) = (node(&db.url).await, node(&db.url).await);
    let before = settled(&one.http, 2).await;
    assert_eq!(settled(&two.http, 2).await, before);
    let ring = Ring::new(&[&one, &two]);
    let (_, cluster) = one.http.get("/v1/cluster").await;
    let (_, other) = two.http.get("/v1/cluster").await;
    assert_ne!(cluster["node"], other["node"]);
    assert_eq!(cluster["leader"], other["leader"]);
    assert_eq!(assigned(&cluster), assigned(&other));
    assert_eq!(shares(&before).into_values().collect::<Vec<_>>(), [32, 32]);
    let names: Vec<&str> = cluster["leases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|lease| lease["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["duty/scheduled", "duty/streams", "relay/1"]);
    let urls: Vec<&str> = cluster["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| node["url"].as_str().unwrap())
        .collect();
    assert_eq!(urls, [one.http.base.as_str(), two.http.base.as_str()]);
    drop(ring);
}
