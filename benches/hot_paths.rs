//! The pure hot paths, without I/O: `cargo bench`, or `cargo bench -- receipt` for some of them.

#![expect(clippy::unwrap_used, reason = "a bench has fixed inputs")]

use std::hint::black_box;
use std::time::Duration;

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use postroad::domain::cloudevents::{self, Context, Limits, Request};
use postroad::domain::id::{Generation, Offset, QueueId};
use postroad::domain::message::{Data, Priority};
use postroad::domain::name::{Topic, TopicPattern};
use postroad::domain::policy::{Ordering, Settings};
use postroad::domain::queue::{At, Found, Item, Queue, Random, Receive, Verb, decode, encode};
use postroad::domain::receipt::{Key, Receipt};
use postroad::topic::Schema;
use roaring::RoaringTreemap;

const BATCH: usize = 100;
const VISIBLE: Duration = Duration::from_secs(30);
const SIZE: u64 = 256;

fn queue(ordering: Ordering) -> Queue {
    let settings = Settings {
        ordering,
        ..Settings::default()
    };
    Queue::new(
        QueueId(1),
        Generation(1),
        Offset(1),
        settings,
        Random::new(1),
    )
}

/// Lets the queue find so many messages after those it knows, of so many keys; 0 for none.
fn find(queue: &mut Queue, count: usize, keys: i64) {
    let first = queue.scanned_through().0 + 1;
    for offset in first..first + i64::try_from(count).unwrap() {
        queue.found(Found {
            offset: Offset(offset),
            key_hash: (keys > 0).then(|| (offset * 31) % keys),
            priority: Priority::Normal,
        });
    }
}

/// One batch through: received, journaled, acked, journaled. Gives how many.
fn receive_and_ack(queue: &mut Queue, now: At) -> usize {
    let receive = Receive::default();
    let taken = queue.hand_out(now, VISIBLE, &receive, (BATCH, u64::MAX), &|_| Some(SIZE));
    black_box(encode(&queue.take_batch().records));
    let items: Vec<Item> = taken
        .handed
        .iter()
        .map(|handed| Item {
            receipt: Some(Receipt {
                queue: queue.id(),
                generation: queue.generation(),
                offset: handed.offset,
                delivery: handed.delivery,
            }),
            delay: None,
            extend_by: None,
            reason: None,
        })
        .collect();
    black_box(queue.settle(Verb::Ack, &items, now));
    black_box(encode(&queue.take_batch().records));
    taken.handed.len()
}

fn queues(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("queue");
    group.throughput(Throughput::Elements(BATCH as u64));
    for (name, ordering, keys) in [
        ("receive and ack 100", Ordering::None, 0),
        ("receive and ack 100, with keys", Ordering::None, 10_000),
    ] {
        group.bench_function(name, |bencher| {
            let mut queue = queue(ordering);
            // A backlog in memory, so that the sets have their usual size.
            find(&mut queue, 10_000, keys);
            let mut now = 0;
            bencher.iter(|| {
                now += 1;
                find(&mut queue, BATCH, keys);
                receive_and_ack(&mut queue, At(now))
            });
        });
    }
    group.bench_function(
        "recover 100 receives and acks from the journal",
        |bencher| {
            let mut live = queue(Ordering::None);
            find(&mut live, BATCH, 0);
            let receive = Receive::default();
            live.hand_out(At(0), VISIBLE, &receive, (BATCH, u64::MAX), &|_| Some(SIZE));
            let journal = encode(&live.take_batch().records);
            bencher.iter_batched(
                || queue(Ordering::None),
                |mut queue| {
                    for record in decode(&journal).unwrap() {
                        queue.apply(&record);
                    }
                    queue
                },
                BatchSize::SmallInput,
            );
        },
    );
    group.finish();
}

fn settled_set(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("settled set");
    group.throughput(Throughput::Elements(1_000));
    // Out of order, as acks come: every third, then what is between.
    let offsets: Vec<u64> = (0..3)
        .flat_map(|part| (0..1_000).filter(move |n| n % 3 == part))
        .collect();
    group.bench_function("insert 1,000 and read back", |bencher| {
        bencher.iter(|| {
            let mut set = RoaringTreemap::new();
            for offset in &offsets {
                set.insert(black_box(1_000_000 + offset));
            }
            offsets
                .iter()
                .filter(|n| set.contains(1_000_000 + **n))
                .count()
        });
    });
    group.finish();
}

fn receipts(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("receipt");
    let key = Key::new(&[7; 32]);
    let receipt = Receipt {
        queue: QueueId(12),
        generation: Generation(3),
        offset: Offset(123_456_789),
        delivery: 1,
    };
    let text = key.seal(&receipt);
    group.bench_function("seal", |bencher| {
        bencher.iter(|| key.seal(black_box(&receipt)));
    });
    group.bench_function("open", |bencher| {
        bencher.iter(|| key.open(black_box(&text)));
    });
    group.finish();
}

fn topics(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("topic");
    let patterns: Vec<TopicPattern> = (0..10_000)
        .map(|number| match number % 4 {
            0 => format!("shop{number}.orders.created"),
            1 => format!("shop{number}.orders.*"),
            2 => format!("shop{number}.>"),
            _ => format!("*.orders.{number}"),
        })
        .map(|text| TopicPattern::parse(&text).unwrap())
        .collect();
    let topic = Topic::parse("shop4001.orders.created").unwrap();
    group.bench_function("match against the patterns of 10,000 queues", |bencher| {
        bencher.iter(|| {
            let topic = black_box(&topic);
            patterns
                .iter()
                .filter(|pattern| pattern.matches(topic))
                .count()
        });
    });
    group.finish();
}

fn events(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("CloudEvents");
    let topic = Topic::parse("orders.created").unwrap();
    let new_id = |number: usize| format!("generated-{number}");
    let context = Context {
        topic: &topic,
        limits: Limits::default(),
        new_id: &new_id,
    };
    let data = format!("{{\"text\":\"{}\"}}", "x".repeat(245));
    let event = format!(
        "{{\"specversion\":\"1.0\",\"id\":\"order-7\",\"source\":\"/shop\",\"type\":\"orders.created\",\"partitionkey\":\"sku-1\",\"data\":{data}}}"
    );
    let batch = format!("[{}]", vec![event.as_str(); BATCH].join(","));
    let request = |content_type, body: &str| Request {
        content_type: Some(content_type),
        body: Bytes::copy_from_slice(body.as_bytes()),
        ..Request::default()
    };
    let mut binary = request("application/json", &data);
    binary.attributes = vec![("id", &b"order-7"[..]), ("partitionkey", b"sku-1")];
    let structured = request("application/cloudevents+json", &event);
    let batch = request("application/cloudevents-batch+json", &batch);
    for (name, request) in [
        ("parse one, binary", &binary),
        ("parse one, structured", &structured),
        ("parse a batch of 100", &batch),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| cloudevents::parse(black_box(request), &context).unwrap());
        });
    }
    let message = cloudevents::parse(&structured, &context)
        .unwrap()
        .messages
        .remove(0);
    group.bench_function("print one", |bencher| {
        bencher.iter(|| black_box(&message).to_event_json());
    });
    group.finish();
}

/// What a schema costs per message: the payload is parsed and asked.
fn schemas(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("JSON Schema");
    let schema = Schema::compile(
        r#"{"type": "object", "required": ["order", "customer", "lines"], "properties": {
            "order": {"type": "integer", "minimum": 1}, "customer": {"type": "string", "pattern": "^[a-z0-9-]{1,40}$"},
            "lines": {"type": "array", "maxItems": 10000, "items": {"type": "object", "required": ["sku", "count"], "properties": {
                "sku": {"type": "string"}, "count": {"type": "integer"}, "price": {"type": "number"}}}}}}"#,
    )
    .unwrap();
    for (name, lines) in [("256 bytes", 4), ("1 KiB", 19), ("64 KiB", 1_250)] {
        let line = r#"{"sku": "sku-0001", "count": 2, "price": 9.75}"#;
        let lines = vec![line; lines].join(", ");
        let text = format!(r#"{{"order": 7, "customer": "customer-0001", "lines": [{lines}]}}"#);
        group.throughput(Throughput::Bytes(text.len() as u64));
        let data = Data::Json(text.into());
        group.bench_function(name, |bencher| {
            bencher.iter(|| schema.check(black_box(&data), 1).unwrap());
        });
    }
    group.finish();
}

criterion_group!(
    hot_paths,
    queues,
    settled_set,
    receipts,
    topics,
    events,
    schemas
);
criterion_main!(hot_paths);
