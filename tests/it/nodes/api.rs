//! Any node answers any request.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{QUEUES, assigned, declare, node, number, queue, settled, shares, size, three_nodes};
use crate::support::consumer::{items, publish};
use crate::support::process::{raise_open_files, resident_bytes};
use crate::support::{self, Consumer, Events, Http, Program};

#[tokio::test(flavor = "multi_thread")]
async fn the_name_by_which_other_nodes_ask_is_a_nodes_own() {
    let db = support::database().await;
    let variables = [
        ("POSTROAD_BIND", "0.0.0.0:0"),
        ("POSTROAD_ALLOWED_HOSTS", "postroad.example.com"),
    ];
    let program = support::program(&db.url, &variables).await;
    let (_, cluster) = program.http.get("/v1/cluster").await;
    let url = cluster["nodes"][0]["url"].as_str().unwrap();
    let registered = url.strip_prefix("http://").unwrap();
    assert!(!registered.starts_with("0.0.0.0"), "{registered}");
    for (host, status) in [
        (registered, 200),
        ("postroad.example.com", 200),
        ("another.example.com", 403),
    ] {
        let asked = program
            .http
            .client
            .get(format!("{}/v1/streams", program.http.base))
            .header("host", host);
        assert_eq!(asked.send().await.unwrap().status(), status, "{host}");
    }
}

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
    let nodes = three_nodes(&db.url).await;
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
}

#[tokio::test(flavor = "multi_thread")]
async fn more_polls_wait_on_the_wrong_node_than_a_connection_between_nodes_takes() {
    let count = size("POSTROAD_TEST_NODE_POLLS", 300);
    raise_open_files();
    let db = support::database().await;
    let (one, two) = (node(&db.url).await, node(&db.url).await);
    settled(&one.http, 2).await;
    let owned_by_two = owned_by(&db.url, &one, &two).await;
    let before = (resident_bytes(one.pid()), resident_bytes(two.pid()));
    let path = format!("/v1/queues/{owned_by_two}/receive");
    let polls: Vec<_> = (0..count)
        .map(|_| {
            let (http, path) = (one.http.clone(), path.clone());
            let receive = json!({"wait_seconds": 50, "max_messages": 1});
            tokio::spawn(async move { http.ok(&path, &receive).await })
        })
        .collect();
    let consumer = Consumer {
        http: one.http.clone(),
        queue: owned_by_two,
    };
    let began = Instant::now();
    // One with the owner, the others where they came in.
    support::eventually("all polls to wait", || async {
        let in_line = gauge(&one.http, "postroad_http_polls_in_line").await;
        let is_so = in_line == count as u64 - 1 && consumer.status().await["waiters"] == 1;
        is_so.then_some(())
    })
    .await;
    let each = |before: u64, after: u64| after.saturating_sub(before) / count as u64;
    eprintln!(
        "{count} polls on the wrong node wait after {:?}: {} bytes each there, {} at the owner",
        began.elapsed(),
        each(before.0, resident_bytes(one.pid())),
        each(before.1, resident_bytes(two.pid())),
    );
    publish(&one.http, "orders.created", count).await;
    let mut offsets = BTreeSet::new();
    for poll in polls {
        let received = poll.await.unwrap();
        let offset = received["deliveries"][0]["offset"].as_u64();
        assert!(
            offset.is_some_and(|offset| offsets.insert(offset)),
            "{received}"
        );
    }
    assert_eq!(offsets.len(), count);
    assert_eq!(gauge(&one.http, "postroad_http_polls_in_line").await, 0);
}

pub async fn gauge(http: &Http, name: &str) -> u64 {
    let (_, text) = http.get("/metrics").await;
    let line = text
        .as_str()
        .unwrap()
        .lines()
        .find_map(|line| line.strip_prefix(name));
    line.map_or(0, |value| value.trim().parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn polls_in_line_are_told_what_is_wrong_and_what_they_acknowledged() {
    let db = support::database().await;
    let (one, two) = (node(&db.url).await, node(&db.url).await);
    settled(&one.http, 2).await;
    let queue = owned_by(&db.url, &one, &two).await;
    let consumer = Consumer {
        http: one.http.clone(),
        queue: queue.clone(),
    };
    publish(&one.http, "orders.created", 2).await;
    let path = format!("/v1/queues/{queue}/receive");
    let named = json!({"receive_id": "named", "max_messages": 1, "visibility_timeout_seconds": 60});
    let first = consumer.receive(&named).await;
    let second = consumer.take(1, 60).await;
    // From now on one waits at the owner, and whoever comes later is behind it.
    let waiting = consumer.clone();
    let waiting = tokio::spawn(async move { waiting.take(1, 60).await });
    support::eventually("the poll to wait", || async {
        (consumer.status().await["waiters"] == 1).then_some(())
    })
    .await;
    let wrong = one.http.post(&path, &json!({"max_messages": 0})).await;
    assert_eq!(wrong.0.as_u16(), 422, "{}", wrong.1);
    assert_eq!(
        consumer.receive(&named).await,
        first,
        "its deliveries are live"
    );
    let began = Instant::now();
    let nothing = json!({"wait_seconds": 1, "ack": items(&second, &json!({}))});
    let nothing = consumer.receive(&nothing).await;
    assert_eq!(nothing["reason"], "empty", "{nothing}");
    assert_eq!(
        nothing["ack"]["deliveries"][0]["result"], "acked",
        "{nothing}"
    );
    assert!(began.elapsed() >= Duration::from_secs(1), "it waited");
    assert_eq!(consumer.status().await["in_flight"], 1, "acknowledged");
    // Acknowledged while it waits, and answered with what comes.
    let named = first["deliveries"].as_array().unwrap().clone();
    let (poll, ack) = (consumer.clone(), items(&named, &json!({})));
    let behind = tokio::spawn(async move {
        poll.receive(&json!({"wait_seconds": 40, "max_messages": 1, "ack": ack}))
            .await
    });
    support::eventually("the acknowledgement", || async {
        (consumer.status().await["in_flight"] == 0).then_some(())
    })
    .await;
    assert!(!behind.is_finished() && !waiting.is_finished());
    publish(&one.http, "orders.created", 2).await;
    let mut offsets = vec![waiting.await.unwrap()[0]["offset"].as_u64().unwrap()];
    let behind = behind.await.unwrap();
    assert_eq!(
        behind["ack"]["deliveries"][0]["result"], "acked",
        "{behind}"
    );
    offsets.push(behind["deliveries"][0]["offset"].as_u64().unwrap());
    offsets.sort_unstable();
    assert_eq!(offsets, [3, 4]);
}

/// Declares queues until one is the second node's, and gives its name.
pub async fn owned_by(url: &str, one: &Program, two: &Program) -> String {
    let second = number(&two.http).await;
    let mut connection = PgConnection::connect(url).await.unwrap();
    for number in 0.. {
        let name = format!("owned-{number}");
        one.http
            .declare(
                &format!("/v1/queues/{name}"),
                &json!({"topics": ["orders.*"]}),
            )
            .await;
        let (slot,): (i16,) =
            sqlx::query_as("select slot from postroad_broker.queue where name = $1")
                .bind(&name)
                .fetch_one(&mut connection)
                .await
                .unwrap();
        let (_, cluster) = one.http.get("/v1/cluster").await;
        if assigned(&cluster)[&i64::from(slot)] == second {
            return name;
        }
    }
    unreachable!("there are enough numbers")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_wakes_the_queues_of_other_nodes() {
    let db = support::database().await;
    let (one, two) = (node(&db.url).await, node(&db.url).await);
    settled(&one.http, 2).await;
    let queue = owned_by(&db.url, &one, &two).await;
    let consumer = Consumer {
        http: two.http.clone(),
        queue,
    };
    let mut took = Vec::new();
    for _ in 0..30 {
        let poll = consumer.clone();
        let waiting = tokio::spawn(async move {
            let taken = poll.take(1, 30).await;
            (Instant::now(), taken)
        });
        support::eventually("the poll to wait", || async {
            (consumer.status().await["waiters"] == 1).then_some(())
        })
        .await;
        publish(&one.http, "orders.created", 1).await;
        let published = Instant::now();
        let (at, taken) = waiting.await.unwrap();
        took.push(at.saturating_duration_since(published));
        consumer
            .settle_all("ack", &items(&taken, &json!({})), "acked")
            .await;
    }
    took.sort_unstable();
    let (median, longest) = (took[took.len() / 2], took[took.len() - 1]);
    eprintln!(
        "from a publish's answer on one node to the receipt on another: {median:?}, at most {longest:?}"
    );
    // Looked for every 500 ms, half of them would take 250 and more.
    assert!(median < Duration::from_millis(200), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_changes_queues_that_another_node_owns() {
    let db = support::database().await;
    let one = node(&db.url).await;
    declare(&[&one]).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("postroad.toml");
    let queues = (0..8).map(|number| {
        format!(
            "[queues.{}]\ntopics = [\"orders.created\"]\nmax_attempts = 5\n",
            queue(number)
        )
    });
    std::fs::write(&file, queues.collect::<String>()).unwrap();
    let two = support::program(
        &db.url,
        &[
            ("POSTROAD_NODE_TTL_SECONDS", "2"),
            ("POSTROAD_NODE_HEARTBEAT_SECONDS", "0.2"),
            ("POSTROAD_CONFIG", file.to_str().unwrap()),
        ],
    )
    .await;
    settled(&two.http, 2).await;
    for program in [&one, &two] {
        // While a queue changes hands nobody knows its numbers.
        let queues = support::eventually("all queues' numbers", || async {
            let (_, list) = program.http.get("/v1/queues").await;
            let queues = list["queues"].as_array()?.clone();
            queues
                .iter()
                .all(|queue| !queue["status"].is_null())
                .then_some(queues)
        })
        .await;
        assert_eq!(queues.len(), QUEUES);
        let is_changed = |queue: &&Value| {
            queue["max_attempts"] == 5 && queue["topics"] == json!(["orders.created"])
        };
        assert_eq!(queues.iter().filter(is_changed).count(), 8);
        let (_, origins) = program.http.get("/v1/origins").await;
        assert_eq!(origins["origins"][0]["state"], "running", "{origins}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_need_no_owner() {
    let db = support::database().await;
    let nodes = three_nodes(&db.url).await;
    let (one, two, three) = (&nodes[0].http, &nodes[1].http, &nodes[2].http);
    one.declare("/v1/streams/shop", &json!({"topics": ["shop.>"]}))
        .await;
    let url = format!("{}/v1/streams/shop/messages?after=0", three.base);
    let mut events = Events::open(&url, None).await;
    for (number, http) in [two, one, three, two].into_iter().enumerate() {
        publish(http, "shop.orders", 1).await;
        let event = events.next().await.unwrap();
        assert_eq!(
            (event.name.as_str(), event.id),
            ("message", number as i64 + 1)
        );
    }
    for http in [one, two, three] {
        // What others publish is noticed a moment later.
        support::eventually("all messages", || async {
            let (_, page) = http.get("/v1/streams/shop/messages?after=0").await;
            (page["messages"].as_array()?.len() == 4).then_some(())
        })
        .await;
    }
    let (status, _) = two.delete("/v1/streams/shop").await;
    assert_eq!(status.as_u16(), 204);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_by_way_of_the_wrong_node_that_are_never_written_hide_no_message() {
    let db = support::database().await;
    // One message alone is more than a socket's buffers take.
    let variables = [
        ("POSTROAD_NODE_TTL_SECONDS", "2"),
        ("POSTROAD_NODE_HEARTBEAT_SECONDS", "0.2"),
        ("POSTROAD_MESSAGE_MAX_BYTES", "16777216"),
    ];
    let one = support::program(&db.url, &variables).await;
    let two = support::program(&db.url, &variables).await;
    settled(&one.http, 2).await;
    let queue = owned_by(&db.url, &one, &two).await;
    let large = json!({"data": "x".repeat(12 << 20)});
    one.http
        .ok("/v1/topics/orders.created/messages", &large)
        .await;
    let body = r#"{"wait_seconds": 30, "visibility_timeout_seconds": 43200}"#;
    let request = format!(
        "POST /v1/queues/{queue}/receive HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let address = one.http.base.trim_start_matches("http://");
    let consumer = Consumer {
        http: one.http.clone(),
        queue,
    };
    for _ in 0..3 {
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(request.as_bytes()).await.unwrap();
        // The head is there, so the owner has written all of it.
        let mut head = [0; 16];
        client.read_exact(&mut head).await.unwrap();
        assert_eq!(&head[..12], b"HTTP/1.1 200");
        drop(client);
        support::eventually("the message to be back", || async {
            let numbers = consumer.status().await;
            (numbers["in_flight"] == 0 && numbers["ready"] == 1).then_some(())
        })
        .await;
    }
    let taken = consumer.take(1, 60).await;
    assert_eq!(
        (&taken[0]["delivery"], &taken[0]["attempt"]),
        (&json!(4), &json!(1))
    );
    consumer
        .settle_all("ack", &items(&taken, &json!({})), "acked")
        .await;
}
