//! A keyed stream of ten million messages: one key's history, its last message, a publish at its version, a page of keys; and what a
//! keyed stream costs those who publish to it.

use std::time::{Duration, Instant};

use postroad::stream::key_hash;
use serde_json::{Value, json};
use sqlx::PgConnection;

use super::{peak_resident_mib, size};
use crate::support::{self, Http};

/// Keys that are measured.
const SAMPLES: u64 = 200;

/// Writes messages 1 to `count` into the log, as appends would have left them, leaf after leaf, and folds the full leaves.
/// Message n has key n % keys.
async fn fill(
    connection: &mut PgConnection,
    stream: i32,
    count: i64,
    keys: i64,
    leaf: i64,
) -> Duration {
    let names: Vec<String> = (0..keys).map(|key| format!("account-{key:07}")).collect();
    let hashes: Vec<i64> = names.iter().map(|name| key_hash(name)).collect();
    sqlx::raw_sql(
        "create temp table name (n bigint primary key, name text not null, hash bigint not null)",
    )
    .execute(&mut *connection)
    .await
    .unwrap();
    sqlx::query(
        "insert into name select n - 1, name, hash from unnest($1::text[], $2::bigint[]) with ordinality as u (name, hash, n)",
    )
    .bind(names)
    .bind(hashes)
    .execute(&mut *connection)
    .await
    .unwrap();
    sqlx::raw_sql("analyze name")
        .execute(&mut *connection)
        .await
        .unwrap();
    sqlx::query("select postroad_broker.extend_log($1, $2, $3)")
        .bind(stream)
        .bind(count)
        .bind(leaf)
        .execute(&mut *connection)
        .await
        .unwrap();
    let mut folding = Duration::ZERO;
    for first in (1..=count).step_by(usize::try_from(leaf).unwrap()) {
        let last = count.min(first + leaf - 1);
        sqlx::query(
            "insert into postroad_broker.message
                (stream_id, \"offset\", topic_id, key_hash, appended_at, key, id, source, data_content_type, data_kind, data)
             select $1, o, (select min(id) from postroad_broker.topic), name.hash, now(), name.name, 'id-' || o, '/bank',
                'application/json', 1, convert_to('{\"n\": ' || o || ', \"text\": \"' || repeat('x', 60) || '\"}', 'UTF8')
             from generate_series($2::bigint, $3::bigint) as o join name on name.n = o % $4",
        )
        .bind(stream)
        .bind(first)
        .bind(last)
        .bind(keys)
        .execute(&mut *connection)
        .await
        .unwrap();
        if last - first + 1 == leaf {
            let began = Instant::now();
            for call in [
                "fold_keys($1, $2)",
                "summarise_leaf($1, $2, clock_timestamp())",
            ] {
                let text = format!("select postroad_broker.{call}");
                sqlx::query(sqlx::AssertSqlSafe(text))
                    .bind(stream)
                    .bind(first)
                    .execute(&mut *connection)
                    .await
                    .unwrap();
            }
            folding += began.elapsed();
        }
    }
    folding
}

/// How long each of some calls took, by rank.
struct Times(Vec<Duration>);

impl Times {
    fn note(&mut self, began: Instant) {
        self.0.push(began.elapsed());
    }

    fn print(mut self, what: &str) {
        self.0.sort();
        let at =
            |share: f64| self.0[((self.0.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
        println!(
            "{what}: p50 {:.1} ms, p99 {:.1} ms, most {:.1} ms, of {}",
            at(0.5),
            at(0.99),
            at(1.0),
            self.0.len()
        );
    }
}

async fn publish(http: &Http, key: &str, id: &str, version: u64) -> (u16, Value) {
    let event = json!({"specversion": "1.0", "id": id, "source": "/bank", "type": "t", "partitionkey": key,
        "expectedversion": version, "data": {}});
    let sent = http
        .client
        .post(format!("{}/v1/topics/accounts.a/messages", http.base))
        .header("content-type", "application/cloudevents+json")
        .body(event.to_string());
    let answer = sent.send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_a_long_stream_is_found_at_once() {
    let count = size("POSTROAD_SOAK_KEYED", 20_000);
    let (keys, leaf) = (count / 25, count / 40);
    // The open leaf is nearly full: the most that is in memory.
    let count = count - leaf / 10;
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let keyed = json!({"topics": ["accounts.>"], "keyed": true,
        "settled_retention_seconds": "unlimited", "unsettled_retention_seconds": "unlimited"});
    program.http.declare("/v1/streams/accounts", &keyed).await;
    // Gives the topic its number.
    program
        .http
        .ok("/v1/topics/other/messages", &json!({}))
        .await;
    program.kill().await;
    let mut connection = database.connect().await;
    let (stream,): (i32,) =
        sqlx::query_as("select id from postroad_broker.stream where name = 'accounts'")
            .fetch_one(&mut connection)
            .await
            .unwrap();
    sqlx::raw_sql("drop table if exists name")
        .execute(&mut connection)
        .await
        .unwrap();
    let began = Instant::now();
    let signed = |n: u64| i64::try_from(n).unwrap();
    let folding = fill(
        &mut connection,
        stream,
        signed(count),
        signed(keys),
        signed(leaf),
    )
    .await;
    println!(
        "{count} messages of {keys} keys in leaves of {leaf}: filled in {:?}, {folding:?} of it to fold",
        began.elapsed()
    );
    let began = Instant::now();
    program.start().await;
    let (status, answer) = publish(&program.http, "account-0000000", "first", 1 << 40).await;
    assert_eq!(status, 409, "{answer}");
    println!(
        "first answer after the start: {:?} after it",
        began.elapsed()
    );
    let versions = |key: u64| count / keys + u64::from(key > 0 && key <= count % keys);
    let [mut history, mut last, mut expected, mut refused, mut page] =
        std::array::from_fn(|_| Times(Vec::new()));
    for sample in 0..SAMPLES {
        let number = (sample * 7_919 + 1) % keys;
        let key = format!("account-{number:07}");
        let path = format!("/v1/streams/accounts/keys/{key}");
        let version = versions(number);
        let began = Instant::now();
        let (_, found) = program.http.get(&path).await;
        history.note(began);
        assert_eq!(found["version"], version, "{key}");
        assert_eq!(found["messages"].as_array().unwrap().len() as u64, version);
        let began = Instant::now();
        let (_, found) = program.http.get(&format!("{path}?last=true")).await;
        last.note(began);
        assert_eq!(found["messages"][0]["offset"], found["last_offset"]);
        let began = Instant::now();
        let (status, answer) =
            publish(&program.http, &key, &format!("new-{sample}"), version).await;
        expected.note(began);
        assert_eq!(status, 200, "{answer}");
        let began = Instant::now();
        let (status, answer) =
            publish(&program.http, &key, &format!("old-{sample}"), version).await;
        refused.note(began);
        assert_eq!((status, &answer["version"]), (409, &json!(version + 1)));
        let began = Instant::now();
        let (_, found) = program
            .http
            .get(&format!("/v1/streams/accounts/keys?after={key}"))
            .await;
        page.note(began);
        assert_eq!(
            found["keys"].as_array().unwrap().len() as u64,
            (keys - number - 1).min(100)
        );
    }
    history.print("one key's history");
    last.print("its last message");
    expected.print("a publish at its version");
    refused.print("a publish at an old version");
    page.print("100 keys with their last messages");
    println!(
        "broker's peak memory {} MiB",
        peak_resident_mib(program.pid())
    );
}

/// Messages per second of four publishers of batches of 100, each message of a key of its own.
async fn rate(http: &Http, topic: &str, batches: u64, round: u64) -> f64 {
    let began = Instant::now();
    let publishers = (0..4).map(|publisher| {
        let (http, topic) = (http.clone(), topic.to_owned());
        tokio::spawn(async move {
            for batch in 0..batches {
                let id = |n: u64| format!("{round}-{publisher}-{batch}-{n}");
                let events: Vec<Value> = (0..100)
                    .map(|n| json!({"specversion": "1.0", "id": id(n), "source": "/s", "type": "t",
                        "partitionkey": format!("key-{}", (batch * 100 + n) * 4 + publisher), "data": {"text": "x".repeat(100)}}))
                    .collect();
                support::consumer::publish_events(&http, &topic, &events).await;
            }
        })
    });
    for publisher in publishers.collect::<Vec<_>>() {
        publisher.await.unwrap();
    }
    (batches * 400) as f64 / began.elapsed().as_secs_f64()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keyed_stream_costs_its_publishers_next_to_nothing() {
    let batches = size("POSTROAD_SOAK_KEYED_BATCHES", 5);
    let database = support::database().await;
    let program = support::program(&database.url, &[]).await;
    for (stream, keyed) in [("plain", false), ("keyed", true)] {
        let body = json!({"topics": [stream], "keyed": keyed});
        program
            .http
            .declare(&format!("/v1/streams/{stream}"), &body)
            .await;
    }
    let mut rates = [Vec::new(), Vec::new()];
    // By turns, so that whatever else the machine does meets both.
    for round in 0..5 {
        for (place, topic) in ["plain", "keyed"].into_iter().enumerate() {
            rates[place].push(rate(&program.http, topic, batches, round).await);
        }
    }
    let [plain, keyed] = rates.map(|mut rates| {
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    });
    println!(
        "published in batches of 100 by 4: {plain:.0}/s, to a keyed stream {keyed:.0}/s, {:.3} of it",
        keyed / plain
    );
    let (_, stream) = program.http.get("/v1/streams/keyed").await;
    assert_eq!(stream["last_offset"], batches * 400 * 5);
}
