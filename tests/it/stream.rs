//! Streams: the append's promises, with several appenders, faults, and sessions that hold what they read.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use postroad::cluster;
use postroad::domain::id::{Epoch, Fence, Offset, OriginId, StreamId};
use postroad::domain::message::{Data, Message};
use postroad::domain::name::{StreamName, Topic, TopicPattern};
use postroad::store::Database;
use postroad::stream::{
    self, AppendError, Declared, Error, Handle, Member, Options, Placed, Read, Rejected, Retention,
    Scan, Settings,
};
use postroad::supervisor::Supervisor;
use prometheus_client::registry::Registry;
use sqlx::{Connection as _, Executor as _, PgConnection};

use super::relay::as_user;
use super::support::{self, Action, Direction, TestDatabase, eventually};

/// A node with a stream engine: what one process runs.
struct Node {
    stream: Handle,
    cluster: cluster::Handle,
    supervisor: Supervisor,
}

async fn node_with(db: &Database, address: &str, options: Options) -> Node {
    let supervisor = Supervisor::new();
    let mut registry = Registry::default();
    let cluster_options = cluster::Options {
        heartbeat: Duration::from_millis(100),
        allow_unsafe_postgres: true,
        ..cluster::Options::new(address)
    };
    let cluster = cluster::start(cluster_options, db.clone(), &supervisor, &mut registry)
        .await
        .unwrap();
    let stream = stream::start(
        options,
        db.clone(),
        cluster.clone(),
        &supervisor,
        &mut registry,
    )
    .await
    .unwrap();
    Node {
        stream,
        cluster,
        supervisor,
    }
}

async fn node(db: &TestDatabase) -> Node {
    node_with(&db.database, "http://one", quick()).await
}

fn quick() -> Options {
    Options {
        poll: Duration::from_millis(20),
        maintenance: Duration::from_millis(20),
        leaf_offsets: 100,
        ..Options::default()
    }
}

impl Node {
    async fn main(&self) -> StreamId {
        self.stream.describe(&StreamName::main()).await.unwrap().id
    }

    async fn publish(
        &self,
        messages: Vec<Message>,
        check_ids: bool,
    ) -> Result<Vec<Placed>, AppendError> {
        let member = Member::Publish {
            messages,
            check_ids,
        };
        self.stream.append(member).await
    }

    async fn stop(&self) {
        self.supervisor.stop(Duration::from_secs(10)).await.unwrap();
    }
}

fn message(topic: &str, id: &str, data: &str) -> Message {
    Message {
        id: id.to_owned(),
        source: "/test".to_owned(),
        kind: None,
        topic: Topic::parse(topic).unwrap(),
        key: Some(format!("key {}", id.len())),
        subject: None,
        time: chrono::DateTime::from_timestamp_nanos(1_700_000_000_123_456_789).into(),
        data_content_type: Some("application/json".to_owned()),
        data_schema: None,
        data: Data::Json(Bytes::from(data.to_owned())),
        extensions: serde_json::Map::from_iter([("traceparent".to_owned(), "00-1".into())]),
    }
}

fn offsets(placed: &[Placed]) -> Vec<i64> {
    placed.iter().map(|placed| placed.offset.0).collect()
}

fn read(stream: StreamId, after: i64) -> Read {
    Read {
        stream,
        after: Offset(after),
        through: None,
        topics: None,
        key: None,
        max_messages: 10_000,
        max_bytes: 64 << 20,
    }
}

fn settings(patterns: &[&str], retention: Retention) -> Settings {
    Settings {
        patterns: patterns
            .iter()
            .map(|pattern| TopicPattern::parse(pattern).unwrap())
            .collect(),
        retention,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_appenders_give_dense_offsets_and_every_tail_sees_all_in_order() {
    let db = support::database().await;
    let one = Arc::new(node(&db).await);
    let two = Arc::new(node_with(&db.database, "http://two", quick()).await);
    let main = one.main().await;
    let tails = [one.stream.tail(main), two.stream.tail(main)].map(|mut tail| {
        tokio::spawn(async move {
            let mut events = Vec::new();
            while events.len() < 960 {
                let batch = tail.recv().await.unwrap();
                assert_eq!(batch.first.0, events.len() as i64 + 1, "no gap");
                events.extend(batch.entries.iter().cloned());
            }
            events
        })
    });
    let writers = (0..8).map(|writer| {
        let node = Arc::clone(if writer % 2 == 0 { &one } else { &two });
        tokio::spawn(async move {
            let mut own = Vec::new();
            for round in 0..40 {
                let messages = (0..3)
                    .map(|n| message("orders", &format!("{writer}-{round}-{n}"), "1"))
                    .collect();
                let placed = node.publish(messages, false).await.unwrap();
                assert_eq!(placed[2].offset.0 - placed[0].offset.0, 2);
                own.extend(offsets(&placed));
            }
            assert!(own.is_sorted(), "a writer's offsets rise");
            own
        })
    });
    let mut all = Vec::new();
    for writer in writers.collect::<Vec<_>>() {
        all.extend(writer.await.unwrap());
    }
    all.sort_unstable();
    assert_eq!(all, (1..=960).collect::<Vec<_>>());
    let mut seen = Vec::new();
    for tail in tails {
        seen.push(tail.await.unwrap());
    }
    assert_eq!(seen[0], seen[1]);
    // From the log the same, and times never go back.
    let fresh = node_with(&db.database, "http://three", quick()).await;
    let page = fresh.stream.read(read(main, 0)).await.unwrap();
    assert_eq!(page.entries, seen[0]);
    assert!(page.entries.is_sorted_by_key(|entry| entry.appended_at));
    for node in [&*one, &*two, &fresh] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_are_deduplicated_within_a_member_a_group_and_over_groups() {
    let db = support::database().await;
    let node = node(&db).await;
    let first = node
        .publish(vec![message("a", "1", "1"), message("a", "2", "2")], true)
        .await
        .unwrap();
    assert_eq!(offsets(&first), [1, 2]);
    // The same content again, among new ones and repeated in the same member.
    let again = vec![
        message("a", "2", "2"),
        message("a", "3", "3"),
        message("a", "3", "3"),
        message("a", "4", "4"),
    ];
    let placed = node.publish(again, true).await.unwrap();
    assert_eq!(offsets(&placed), [2, 3, 3, 4]);
    let duplicates: Vec<bool> = placed.iter().map(|placed| placed.duplicate).collect();
    assert_eq!(duplicates, [true, false, true, false]);
    // Other content: the member is refused whole, its group's others are not.
    let clash = vec![message("a", "5", "5"), message("a", "1", "other")];
    let (refused, taken) = tokio::join!(
        node.publish(clash, true),
        node.publish(vec![message("a", "6", "6")], true)
    );
    let Err(AppendError::IdConflict { items }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!((items[0].index, items[0].offset), (1, Offset(1)));
    assert_eq!(offsets(&taken.unwrap()), [5]);
    let inside = vec![message("a", "7", "7"), message("a", "7", "other")];
    let refused = node.publish(inside, true).await;
    assert!(matches!(refused, Err(AppendError::IdConflict { items }) if items[0].index == 1));
    // Many callers with one id at once: one is first, the others are its duplicates.
    let racers = (0..20).map(|_| node.publish(vec![message("a", "race", "1")], true));
    let results = futures_util::future::join_all(racers).await;
    let placed: Vec<Placed> = results
        .into_iter()
        .map(|result| result.unwrap()[0])
        .collect();
    assert!(placed.iter().all(|placed| placed.offset == Offset(6)));
    assert_eq!(placed.iter().filter(|placed| !placed.duplicate).count(), 1);
    // Unchecked ids are not looked up.
    let placed = node.publish(vec![message("a", "1", "1")], false).await;
    assert_eq!(offsets(&placed.unwrap()), [7]);
    node.stop().await;
}

fn relay(fence: &Fence, from: i64, to: i64, ids: &[&str]) -> Member {
    Member::Relay {
        messages: ids.iter().map(|id| message("orders", id, "1")).collect(),
        origin: OriginId(1),
        fence: fence.clone(),
        from,
        to,
        position: format!("{{\"at\": {to}}}"),
        rejected: vec![Rejected {
            seq: to,
            reason: "has no topic".to_owned(),
            outbox_row: "{}".to_owned(),
        }],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_appends_once_per_position_and_not_under_an_old_epoch() {
    let db = support::database().await;
    let node = node(&db).await;
    let mut connection = db.connect().await;
    connection
        .execute("insert into postroad_broker.origin (name) values ('shop')")
        .await
        .unwrap();
    let mut lease = node.cluster.hold(OriginId(1).lease_name());
    let fence = lease
        .wait_for(Option::is_some)
        .await
        .unwrap()
        .clone()
        .unwrap();
    let placed = node.stream.append(relay(&fence, 0, 5, &["a", "b"])).await;
    assert_eq!(offsets(&placed.unwrap()), [1, 2]);
    let repeated = node.stream.append(relay(&fence, 0, 5, &["a", "b"])).await;
    assert!(matches!(
        repeated,
        Err(AppendError::PositionMoved { found: 5 })
    ));
    let next = node.stream.append(relay(&fence, 5, 6, &[])).await;
    assert_eq!(next.unwrap(), []);
    // Another node takes over; a publish of the same group as the fenced member goes through.
    connection
        .execute("update postroad_broker.lease set epoch = epoch + 1 where name = 'relay/1'")
        .await
        .unwrap();
    let (fenced, published) = tokio::join!(
        node.stream.append(relay(&fence, 6, 7, &["c"])),
        node.publish(vec![message("orders", "d", "1")], false)
    );
    assert!(matches!(fenced, Err(AppendError::Fenced)));
    assert_eq!(offsets(&published.unwrap()), [3]);
    let (journal, rejected): (Vec<i64>, i64) = sqlx::query_as(
        "select array(select number from postroad_broker.relay_journal order by number), \
         (select count(*) from postroad_broker.rejected_message)",
    )
    .fetch_one(&mut connection)
    .await
    .unwrap();
    assert_eq!((journal, rejected), (vec![5, 6], 2));
    // Told of it, the cluster takes the lease again at a later epoch, and the relay goes on from the stored position.
    node.cluster.fenced(&fence);
    let later = lease
        .wait_for(|held| {
            held.as_ref()
                .is_some_and(|held| held.epoch > Epoch(fence.epoch.0 + 1))
        })
        .await
        .unwrap()
        .clone()
        .unwrap();
    let placed = node.stream.append(relay(&later, 6, 7, &["c"])).await;
    assert_eq!(offsets(&placed.unwrap()), [4]);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_own_their_topics_from_the_answer_of_the_declare_on() {
    let db = support::database().await;
    let one = node(&db).await;
    let two = node_with(&db.database, "http://two", quick()).await;
    let main = one.main().await;
    let before = two
        .publish(vec![message("orders.created", "1", "1")], true)
        .await
        .unwrap();
    assert_eq!((before[0].stream, before[0].offset), (main, Offset(1)));
    let name = StreamName::parse("orders").unwrap();
    let wanted = settings(&["orders.>"], Retention::default());
    let (description, declared) = one
        .stream
        .declare(name.clone(), wanted.clone())
        .await
        .unwrap();
    assert_eq!(declared, Declared::Created);
    assert_eq!(
        one.stream.declare(name.clone(), wanted).await.unwrap().1,
        Declared::Unchanged
    );
    // The other node routed by the old catalogue so far.
    let after = two
        .publish(
            vec![
                message("orders.created", "2", "1"),
                message("carts", "2", "1"),
            ],
            true,
        )
        .await
        .unwrap();
    assert_eq!(
        (after[0].stream, after[0].offset),
        (description.id, Offset(1))
    );
    assert_eq!((after[1].stream, after[1].offset), (main, Offset(2)));
    let overlap = one
        .stream
        .declare(
            StreamName::parse("other").unwrap(),
            settings(&["*.created"], Retention::default()),
        )
        .await;
    assert!(matches!(overlap, Err(Error::Overlap { other_stream, .. }) if other_stream == name));
    let main_patterns = settings(&["x"], Retention::default());
    assert!(matches!(
        one.stream.declare(StreamName::main(), main_patterns).await,
        Err(Error::Settings(_))
    ));
    assert!(matches!(
        one.stream.delete(&StreamName::main()).await,
        Err(Error::MainIsKept)
    ));
    one.stream.delete(&name).await.unwrap();
    assert!(matches!(
        one.stream.describe(&name).await,
        Err(Error::NotFound { .. })
    ));
    let back = two
        .publish(vec![message("orders.created", "3", "1")], true)
        .await
        .unwrap();
    assert_eq!((back[0].stream, back[0].offset), (main, Offset(3)));
    let pool = db.pool(1);
    let log = format!("postroad_broker.message_{}", description.id);
    eventually("the deleted stream's log is dropped", async || {
        let (there,): (bool,) = sqlx::query_as("select to_regclass($1) is not null")
            .bind(&log)
            .fetch_one(&pool)
            .await
            .unwrap();
        (!there).then_some(())
    })
    .await;
    for node in [one, two] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_drops_all_and_offsets_go_on() {
    let db = support::database().await;
    let node = node(&db).await;
    let name = StreamName::parse("short").unwrap();
    let retention = Retention {
        settled: Duration::from_secs(1),
        unsettled: None,
    };
    let (description, _) = node
        .stream
        .declare(name.clone(), settings(&["short"], retention))
        .await
        .unwrap();
    let batch = |from: i64| (from..from + 250).map(|n| message("short", &n.to_string(), "1"));
    node.publish(batch(0).collect(), false).await.unwrap();
    let mut tail = node.stream.tail(description.id);
    // Not settled by every queue: kept.
    node.stream.set_watermark(description.id, Offset(120));
    let first = eventually("the settled leaf is emptied", async || {
        let first = node.stream.describe(&name).await.unwrap().first_offset;
        (first > Offset(1)).then_some(first)
    })
    .await;
    assert_eq!(first, Offset(101));
    node.stream.set_watermark(description.id, Offset(i64::MAX));
    eventually("all is dropped", async || {
        let description = node.stream.describe(&name).await.unwrap();
        (description.first_offset == Offset(251) && description.last_offset == Offset(250))
            .then_some(())
    })
    .await;
    let placed = node
        .publish(vec![message("short", "last", "1")], false)
        .await
        .unwrap();
    assert_eq!(offsets(&placed), [251]);
    while tail.recv().await.unwrap().last < Offset(251) {}
    node.stop().await;
    // Another process finds the same, whatever it has in memory.
    let node = node_with(&db.database, "http://two", quick()).await;
    let page = node.stream.read(read(description.id, 0)).await.unwrap();
    assert_eq!(page.through, Offset(251).max(page.through));
    let placed = node
        .publish(vec![message("short", "next", "1")], false)
        .await
        .unwrap();
    assert_eq!(offsets(&placed), [252]);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_idle_in_a_transaction_stalls_nothing() {
    let db = support::database().await;
    let node = node(&db).await;
    let retention = Retention {
        settled: Duration::from_secs(1),
        unsettled: None,
    };
    node.stream
        .declare(StreamName::main(), settings(&[], retention))
        .await
        .unwrap();
    let main = node.main().await;
    node.stream.set_watermark(main, Offset(i64::MAX));
    node.publish(vec![message("a", "0", "1")], false)
        .await
        .unwrap();
    let mut reader = db.connect().await;
    reader
        .execute(
            "begin isolation level repeatable read; select count(*) from postroad_broker.message",
        )
        .await
        .unwrap();
    let started = std::time::Instant::now();
    let mut slowest = Duration::ZERO;
    // Over several leaves, for longer than the retention.
    for round in 0..30 {
        let batch = (0..20)
            .map(|n| message("a", &format!("{round}-{n}"), "1"))
            .collect();
        let asked = std::time::Instant::now();
        node.publish(batch, true).await.unwrap();
        slowest = slowest.max(asked.elapsed());
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    assert!(started.elapsed() > Duration::from_secs(1));
    assert!(
        slowest < Duration::from_secs(1),
        "an append took {slowest:?}"
    );
    let description = node.stream.describe(&StreamName::main()).await.unwrap();
    assert_eq!(description.last_offset, Offset(601));
    assert_eq!(description.first_offset, Offset(1), "what is read is kept");
    reader.execute("commit").await.unwrap();
    eventually("the space comes back", async || {
        let first = node
            .stream
            .describe(&StreamName::main())
            .await
            .unwrap()
            .first_offset;
        (first == Offset(602)).then_some(())
    })
    .await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_defaults_to_another_isolation_level_changes_nothing() {
    for level in ["repeatable read", "serializable"] {
        let db = support::database().await;
        let mut admin = db.connect().await;
        let statement = format!(
            "alter database {} set default_transaction_isolation = '{level}'",
            db.name
        );
        admin.execute(sqlx::AssertSqlSafe(statement)).await.unwrap();
        let one = node(&db).await;
        let two = node_with(&db.database, "http://two", quick()).await;
        let publishes = (0..60).map(|n| {
            let node = if n % 2 == 0 { &one } else { &two };
            node.publish(vec![message("a", &n.to_string(), "1")], true)
        });
        let placed = futures_util::future::join_all(publishes).await;
        let all: HashSet<i64> = placed.into_iter().map(|p| p.unwrap()[0].offset.0).collect();
        assert_eq!(all, (1..=60).collect());
        // Called at another level it refuses, rather than give an offset twice.
        let mut other = db.connect().await;
        let refused = other
            .execute("select postroad_broker.empty_leaf(1, 1, now(), '1s', null, 0)")
            .await;
        assert!(refused.unwrap_err().to_string().contains("read committed"));
        for node in [one, two] {
            node.stop().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_append_still_happens_and_leaves_no_session_in_a_transaction() {
    let db = support::database().await;
    let node = node(&db).await;
    for n in 0..200 {
        let append = node.publish(vec![message("a", &n.to_string(), "1")], true);
        let _ = tokio::time::timeout(Duration::from_micros(n * 10), append).await;
    }
    node.publish(vec![message("a", "last", "1")], true)
        .await
        .unwrap();
    let page = node.stream.read(read(node.main().await, 0)).await.unwrap();
    let ids: HashSet<&[u8]> = page.entries.iter().map(|entry| &entry.event[..]).collect();
    assert_eq!(ids.len(), page.entries.len(), "nothing twice");
    let mut connection = db.connect().await;
    let (idle,): (i64,) = sqlx::query_as(
        "select count(*) from pg_stat_activity \
         where datname = current_database() and state like 'idle in transaction%'",
    )
    .fetch_one(&mut connection)
    .await
    .unwrap();
    assert_eq!(idle, 0);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_database_refuses_fails_its_member_alone() {
    let db = support::database().await;
    let node = node(&db).await;
    let mut connection = db.connect().await;
    connection
        .execute("alter table postroad_broker.message add constraint poison check (id <> 'poison')")
        .await
        .unwrap();
    let poison = node.publish(vec![message("a", "poison", "1")], false);
    let others = (0..20).map(|n| node.publish(vec![message("a", &n.to_string(), "1")], false));
    let (refused, others) = tokio::join!(poison, futures_util::future::join_all(others));
    assert!(
        matches!(refused, Err(AppendError::Refused(_))),
        "{refused:?}"
    );
    let all: HashSet<i64> = others.into_iter().map(|p| p.unwrap()[0].offset.0).collect();
    assert_eq!(all, (1..=20).collect());
    let nul = node.publish(vec![message("a", "a\0b", "1")], false).await;
    assert!(matches!(nul, Err(AppendError::Invalid { index: 0, .. })));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn scans_pass_over_leaves_that_cannot_match_and_find_all_that_do() {
    let db = support::database().await;
    let node = node(&db).await;
    let main = node.main().await;
    for hundred in 0..12 {
        let batch = (0..100).map(|n| {
            let rare = n == 50 && hundred % 4 == 0;
            message(
                if rare { "rare.one" } else { "usual" },
                &format!("{hundred}-{n}"),
                "1",
            )
        });
        node.publish(batch.collect(), false).await.unwrap();
    }
    let pool = db.pool(1);
    eventually("full leaves are summarised", async || {
        let (open,): (i64,) = sqlx::query_as(
            "select count(*) from postroad_broker.message_leaf \
             where summarised_at is null and last_offset <= 1200",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        (open == 0).then_some(())
    })
    .await;
    let scan = |after: i64, max_items| Scan {
        stream: main,
        after: Offset(after),
        topics: vec![TopicPattern::parse("rare.*").unwrap()],
        max_items,
    };
    let found = node.stream.scan(scan(0, 100)).await.unwrap();
    let at: Vec<i64> = found.items.iter().map(|item| item.offset.0).collect();
    assert_eq!((at, found.through), (vec![51, 451, 851], Offset(1200)));
    let found = node.stream.scan(scan(0, 2)).await.unwrap();
    assert_eq!((found.items.len(), found.through), (2, Offset(850)));
    assert_eq!(found.items[0].topic.as_str(), "rare.one");
    let rest = node.stream.scan(scan(850, 2)).await.unwrap();
    assert_eq!(
        (rest.items[0].offset, rest.through),
        (Offset(851), Offset(1200))
    );
    // By key, by page, by time, by id, by offset.
    let fresh = node_with(&db.database, "http://two", quick()).await;
    let keyed = Read {
        key: Some("key 3".to_owned()),
        max_messages: 7,
        ..read(main, 0)
    };
    let page = fresh.stream.read(keyed).await.unwrap();
    assert_eq!(page.entries.len(), 7);
    assert!(
        page.entries
            .iter()
            .all(|entry| entry.key.as_deref() == Some("key 3"))
    );
    assert_eq!(page.through, page.entries[6].offset);
    let small = Read {
        max_bytes: 1,
        ..read(main, 10)
    };
    assert_eq!(fresh.stream.read(small).await.unwrap().through, Offset(11));
    let entries = fresh
        .stream
        .fetch(main, vec![Offset(700), Offset(3), Offset(5_000)])
        .await;
    let entries = entries.unwrap();
    let found: Vec<i64> = entries.iter().map(|entry| entry.offset.0).collect();
    assert_eq!(found, [3, 700]);
    let before = fresh
        .stream
        .offset_at(main, entries[1].appended_at)
        .await
        .unwrap();
    assert_eq!(before, Offset(600), "the group of 601 to 700 has one time");
    let far = entries[1].appended_at + chrono::TimeDelta::hours(1);
    assert_eq!(
        fresh.stream.offset_at(main, far).await.unwrap(),
        Offset(1200)
    );
    let ids = ["3-3", "nope", "11-99"].map(|id| ("/test".to_owned(), id.to_owned()));
    let present = fresh.stream.find_present(ids.to_vec()).await.unwrap();
    assert_eq!(present, [true, false, true]);
    for node in [node, fresh] {
        node.stop().await;
    }
}

/// A statement of the append function: it must be there as it is explained.
async fn explain(connection: &mut PgConnection, statement: &'static str) -> String {
    let lines: Vec<(String,)> = sqlx::query_as(sqlx::AssertSqlSafe(format!("explain {statement}")))
        .fetch_all(connection)
        .await
        .unwrap();
    lines.into_iter().map(|(line,)| line + "\n").collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn hot_statements_go_by_the_index_whatever_the_size_of_the_log() {
    let db = support::database().await;
    let node = node(&db).await;
    for n in 0..5 {
        let batch = (0..100)
            .map(|i| message("a", &format!("{n}-{i}"), "1"))
            .collect();
        node.publish(batch, true).await.unwrap();
    }
    let mut reader = postroad::store::stream::connect_reader(&db.database)
        .await
        .unwrap();
    for (statement, condition) in [
        (
            "select m.\"offset\", m.appended_at from postroad_broker.message m \
             where m.stream_id = 1 and m.\"offset\" >= 450 order by m.\"offset\" desc limit 1",
            "Index Cond: ((stream_id = 1) AND (\"offset\" >= 450))",
        ),
        (
            "select m.\"offset\", m.topic_id, m.key_hash, octet_length(m.data) from postroad_broker.message m \
             where m.stream_id = 1 and m.\"offset\" > 120 and m.\"offset\" <= 180 and m.topic_id = any ('{1}') \
             order by m.\"offset\" limit 100",
            "Index Cond: ((stream_id = 1) AND (\"offset\" > 120) AND (\"offset\" <= 180))",
        ),
        (
            "select m.data from postroad_broker.message m where m.stream_id = 1 and m.\"offset\" = any ('{3,400}')",
            "Index Scan",
        ),
        (
            "select appended_at from postroad_broker.message where stream_id = 1 and \"offset\" = 77",
            "Index Cond: ((stream_id = 1) AND (\"offset\" = 77))",
        ),
    ] {
        let plan = explain(&mut reader, statement).await;
        assert!(plan.contains(condition), "{plan}");
        assert!(
            !plan.contains("Seq Scan") && !plan.contains("Sort"),
            "{plan}"
        );
    }
    // The look-up of ids, under the settings of the append function.
    let mut session = db.connect().await;
    session
        .execute("set enable_seqscan = off; set enable_hashjoin = off; set enable_mergejoin = off")
        .await
        .unwrap();
    let lookup = "select u.place, i.\"offset\" from unnest(array[gen_random_uuid()], array[gen_random_uuid()]) \
         with ordinality as u (identity, content, place) \
         join postroad_broker.recent_id i on i.identity = u.identity";
    let plan = explain(&mut session, lookup).await;
    assert!(
        plan.contains("Index Cond: (identity = ") && !plan.contains("Seq Scan"),
        "{plan}"
    );
    session.close().await.unwrap();
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_cut_before_and_after_the_commit_append_once() {
    let db = support::database().await;
    let proxy = support::proxy(&db.url).await;
    let database = Database::new(&proxy.url(&db.url), 2).unwrap();
    let node = node_with(&database, "http://one", quick()).await;
    let main = node.main().await;
    let mut cut = HashSet::new();
    proxy.filter(move |direction, bytes| {
        let find = |marker: &str| {
            let marker = marker.as_bytes();
            let at = bytes
                .windows(marker.len())
                .position(|window| window == marker)?;
            Some(bytes[at..at + marker.len() + 3].to_vec())
        };
        if direction == Direction::ToClient {
            return Action::Forward;
        }
        // Once each: the repeat goes through.
        match (find("before-"), find("after-")) {
            (Some(marker), _) if cut.insert(marker.clone()) => Action::CutBefore,
            (_, Some(marker)) if cut.insert(marker.clone()) => Action::CutAfter,
            _ => Action::Forward,
        }
    });
    let mut placed = Vec::new();
    for n in 0..40 {
        let kind = ["plain", "before", "after"][n % 3];
        let one = vec![message("a", &format!("{kind}-{n:03}"), "1")];
        placed.extend(offsets(&node.publish(one, n % 2 == 0).await.unwrap()));
    }
    assert_eq!(placed, (1..=40).collect::<Vec<_>>());
    let page = node.stream.read(read(main, 0)).await.unwrap();
    assert_eq!(page.entries.len(), 40);
    assert_eq!(page.through, Offset(40));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_database_is_away_appends_fail_as_unavailable_or_unknown_and_then_go_on() {
    let db = support::database().await;
    let proxy = support::proxy(&db.url).await;
    let database = Database::new(&proxy.url(&db.url), 2).unwrap();
    let options = Options {
        wait: Duration::from_secs(2),
        ..quick()
    };
    let node = node_with(&database, "http://one", options).await;
    node.publish(vec![message("a", "1", "1")], true)
        .await
        .unwrap();
    proxy.cut();
    let away = node.publish(vec![message("a", "2", "2")], true).await;
    let is_expected = matches!(
        away,
        Err(AppendError::Unavailable(_) | AppendError::OutcomeUnknown)
    );
    assert!(is_expected, "{away:?}");
    proxy.open();
    // A repeat with the same id is safe, whatever became of the first.
    let placed = eventually("the database is back", async || {
        node.publish(vec![message("a", "2", "2")], true).await.ok()
    })
    .await;
    assert_eq!(offsets(&placed), [2]);
    let next = node
        .publish(vec![message("a", "3", "3")], true)
        .await
        .unwrap();
    assert_eq!(offsets(&next), [3]);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_session_does_not_make_an_append_of_unknown_outcome_refused() {
    let db = support::database().await;
    let mut admin = db.connect().await;
    let role = format!("login_{}", uuid::Uuid::new_v4().simple());
    let create = format!("create role {role} superuser login");
    admin.execute(sqlx::AssertSqlSafe(create)).await.unwrap();
    let proxy = support::proxy(&as_user(&db.url, &role)).await;
    let database = Database::new(&proxy.url(&as_user(&db.url, &role)), 2).unwrap();
    let options = Options {
        wait: Duration::from_secs(2),
        ..quick()
    };
    let node = node_with(&database, "http://one", options).await;
    node.publish(vec![message("a", "1", "1")], true)
        .await
        .unwrap();
    let refuse = format!("alter role {role} nologin");
    admin.execute(sqlx::AssertSqlSafe(refuse)).await.unwrap();
    let mut is_cut = false;
    proxy.filter(move |direction, bytes| {
        let is_it = bytes.windows(6).any(|window| window == b"commit");
        if is_cut || direction == Direction::ToClient || !is_it {
            return Action::Forward;
        }
        is_cut = true;
        Action::CutAfter
    });
    let one = || vec![message("a", "commit", "2")];
    let unknown = node.publish(one(), true).await;
    assert!(
        matches!(unknown, Err(AppendError::OutcomeUnknown)),
        "{unknown:?}"
    );
    let allow = format!("alter role {role} login");
    admin.execute(sqlx::AssertSqlSafe(allow)).await.unwrap();
    let placed = eventually("the role may log in", async || {
        node.publish(one(), true).await.ok()
    })
    .await;
    assert_eq!(placed[0].offset, Offset(2));
    assert!(placed[0].duplicate, "it was committed once");
    node.stop().await;
    let drop =
        format!("reassign owned by {role} to current_user; drop owned by {role}; drop role {role}");
    admin.execute(sqlx::AssertSqlSafe(drop)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_another_node_filled_is_extended() {
    let db = support::database().await;
    // Nobody makes leaves ahead.
    let options = Options {
        wait: Duration::from_secs(5),
        maintenance: Duration::from_secs(3_600),
        ..quick()
    };
    let node = node_with(&db.database, "http://one", options).await;
    node.publish(vec![message("a", "1", "1")], true)
        .await
        .unwrap();
    let filled = db
        .connect()
        .await
        .execute(
            "insert into postroad_broker.message (stream_id, \"offset\", topic_id, appended_at, id, source, data_kind, data)
            select m.stream_id, n, m.topic_id, m.appended_at, m.id, m.source, m.data_kind, m.data
            from postroad_broker.message m, generate_series(2, 100) n",
        )
        .await
        .unwrap();
    assert_eq!(filled.rows_affected(), 99);
    let placed = node.publish(vec![message("a", "2", "2")], true).await;
    assert_eq!(offsets(&placed.unwrap()), [101]);
    node.stop().await;
}
