//! Somebody else's lock on one stream's log, as `create index` and `reindex` take it, holds up that stream alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::TimeDelta;
use postroad::domain::name::StreamName;
use postroad::stream::Retention;
use sqlx::{AssertSqlSafe, Executor as _, PgConnection};

use super::{Node, message, node, offsets, settings};
use crate::support::{self, TestDatabase, eventually};

/// A session that holds a lock on a table until it is told.
struct Holder(PgConnection);

impl Holder {
    async fn lock(db: &TestDatabase, table: &str, mode: &str) -> Self {
        let mut session = db.connect().await;
        let text = format!("begin; lock table postroad_broker.{table} in {mode} mode");
        session.execute(AssertSqlSafe(text)).await.unwrap();
        Self(session)
    }

    async fn release(mut self) {
        self.0.execute("rollback").await.unwrap();
    }
}

/// How long publishes to `topic` take, one after the other.
async fn publish_all(node: &Node, topic: &str, count: usize) -> Vec<Duration> {
    let mut took = Vec::new();
    for n in 0..count {
        let began = Instant::now();
        let one = vec![message(topic, &format!("{topic}-{n}"), "1")];
        node.publish(one, true).await.unwrap();
        took.push(began.elapsed());
    }
    took.sort();
    took
}

/// All but the slowest 3 of a hundred, since the first ones find out that something is held. With a margin for a busy machine.
fn is_quick(took: &[Duration]) -> bool {
    took[took.len() * 97 / 100] < Duration::from_millis(250)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_on_one_streams_leaf_holds_up_no_other_stream() {
    let db = support::database().await;
    let node = Arc::new(node(&db).await);
    let name = StreamName::parse("held").unwrap();
    let declared = settings(&["held.>"], Retention::default());
    let (held, _) = node.stream.declare(name, declared).await.unwrap();
    publish_all(&node, "held.before", 1).await;
    publish_all(&node, "free", 1).await;
    let leaf = format!("message_{}_1", held.id.0);
    let holder = Holder::lock(&db, &leaf, "share").await;
    let waiting: Vec<_> = (0..4)
        .map(|n| {
            let node = Arc::clone(&node);
            tokio::spawn(async move {
                let mut messages = vec![message("held.a", &format!("w{n}"), "1")];
                if n == 3 {
                    messages.push(message("free.too", "w", "1"));
                }
                node.publish(messages, true).await
            })
        })
        .collect();
    let took = publish_all(&node, "free.b", 200).await;
    println!(
        "beside a lock: median {:?}, slowest {:?}",
        took[100], took[199]
    );
    assert!(is_quick(&took), "{took:?}");
    assert!(took[199] < Duration::from_secs(4), "{:?}", took[199]);
    assert!(waiting.iter().all(|one| !one.is_finished()));
    holder.release().await;
    let mut placed = Vec::new();
    for one in waiting {
        placed.extend(offsets(&one.await.unwrap().unwrap()[..1]));
    }
    placed.sort_unstable();
    assert_eq!(placed, [2, 3, 4, 5], "each once");
    // The lane has nothing to do any more, and what comes next goes behind.
    for n in 6..30 {
        let one = vec![message("held.a", &format!("n{n}"), "1")];
        assert_eq!(offsets(&node.publish(one, true).await.unwrap()), [n]);
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_on_what_comes_later_holds_up_nothing_that_comes_now() {
    let db = support::database().await;
    let node = Arc::new(node(&db).await);
    publish_all(&node, "a", 1).await;
    let holder = Holder::lock(&db, "scheduled_rest", "share").await;
    let later = {
        let node = Arc::clone(&node);
        tokio::spawn(async move {
            let at = node.cluster.now() + TimeDelta::hours(1);
            node.publish(vec![super::scheduled::due("later", at)], true)
                .await
        })
    };
    let took = publish_all(&node, "later", 200).await;
    assert!(is_quick(&took), "{took:?}");
    assert!(!later.is_finished());
    holder.release().await;
    assert!(later.await.unwrap().unwrap()[0].scheduled.is_some());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_on_one_streams_leaf_holds_up_what_is_due_in_no_other() {
    let db = support::database().await;
    let node = node(&db).await;
    let main = node.main().await;
    let name = StreamName::parse("held").unwrap();
    let declared = settings(&["held.>"], Retention::default());
    let (held, _) = node.stream.declare(name, declared).await.unwrap();
    publish_all(&node, "held.before", 1).await;
    publish_all(&node, "free", 1).await;
    let at = node.cluster.now() + TimeDelta::seconds(2);
    let mut first = super::scheduled::due("held", at);
    first.topic = postroad::domain::name::Topic::parse("held.a").unwrap();
    let second = super::scheduled::due("free", at + TimeDelta::milliseconds(1));
    let placed = node.publish(vec![first, second], true).await.unwrap();
    assert!(placed.iter().all(|placed| placed.scheduled.is_some()));
    let leaf = format!("message_{}_1", held.id.0);
    let holder = Holder::lock(&db, &leaf, "share").await;
    assert_eq!(node.ids(main, 2).await, ["free-0", "free"]);
    assert_eq!(node.stream.last_offset(held.id).borrow().0, 1);
    holder.release().await;
    assert_eq!(node.ids(held.id, 2).await, ["held.before-0", "held"]);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_stream_of_many_leaves_goes_in_steps_and_in_nobodys_way() {
    const LEAVES: i64 = 70;
    let db = support::database().await;
    let node = node(&db).await;
    let name = StreamName::parse("gone").unwrap();
    let declared = settings(&["gone.>"], Retention::default());
    let (gone, _) = node.stream.declare(name.clone(), declared).await.unwrap();
    node.stop().await;
    let mut owner = db.connect().await;
    let text = format!(
        "select postroad_broker.extend_log({}, {LEAVES}, 1); delete from postroad_broker.stream where id = {0}",
        gone.id.0
    );
    owner.execute(AssertSqlSafe(text)).await.unwrap();
    // The locks of each step, until all is gone.
    let mut steps = 0;
    loop {
        owner.execute("begin").await.unwrap();
        let step = format!("select postroad_broker.drop_stream_log({}, 10)", gone.id.0);
        let is_gone: bool = sqlx::query_scalar(AssertSqlSafe(step))
            .fetch_one(&mut owner)
            .await
            .unwrap();
        let locks: i64 =
            sqlx::query_scalar("select count(*) from pg_locks where pid = pg_backend_pid()")
                .fetch_one(&mut owner)
                .await
                .unwrap();
        assert!(locks < 200, "{locks} locks in a step");
        steps += 1;
        // The first steps alone: the rest is the node's.
        owner.execute("commit").await.unwrap();
        if is_gone || steps == 2 {
            break;
        }
    }
    let node = super::node(&db).await;
    eventually("the log to be dropped", async || {
        let text = "select count(*) from pg_class where relname like $1";
        let left: i64 = sqlx::query_scalar(text)
            .bind(format!("message_{}%", gone.id.0))
            .fetch_one(&db.pool(1))
            .await
            .unwrap();
        (left == 0).then_some(())
    })
    .await;
    publish_all(&node, "free", 1).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_duty_that_fails_does_not_end_the_others() {
    let db = support::database().await;
    let node = node(&db).await;
    let mut ids = Vec::new();
    for name in ["gone", "too"] {
        let declared = settings(&[name], Retention::default());
        let name = StreamName::parse(name).unwrap();
        let (stream, _) = node.stream.declare(name, declared).await.unwrap();
        ids.push(stream.id.0);
    }
    node.stop().await;
    let mut owner = db.connect().await;
    // One that cannot be dropped, and a row that is out of date.
    let text = format!(
        "select postroad_broker.extend_log({0}, 2, 1);
        create view keeps as select * from postroad_broker.message_{0}_1;
        delete from postroad_broker.stream where id in ({0}, {1});
        insert into postroad_broker.recent_id (bucket, identity, content, \"offset\")
        values ((postroad_broker.half_day(clock_timestamp()) + 2) % 5, gen_random_uuid(), gen_random_uuid(), 1)",
        ids[0], ids[1]
    );
    owner.execute(AssertSqlSafe(text)).await.unwrap();
    let node = super::node(&db).await;
    eventually(
        "what is out of date to go, and the other stream",
        async || {
            let text = format!(
                "select (select count(*) from postroad_broker.recent_id) = 0
                and to_regclass('postroad_broker.message_{}') is null",
                ids[1]
            );
            let is_done: bool = sqlx::query_scalar(AssertSqlSafe(text))
                .fetch_one(&db.pool(1))
                .await
                .unwrap();
            is_done.then_some(())
        },
    )
    .await;
    publish_all(&node, "free", 1).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_looks_for_the_ends_of_streams_locks_few_leaves() {
    let db = support::database().await;
    let node = node(&db).await;
    for name in ["a", "b", "c", "d"] {
        let declared = settings(&[name], Retention::default());
        let name = StreamName::parse(name).unwrap();
        node.stream.declare(name, declared).await.unwrap();
    }
    node.stop().await;
    let mut owner = db.connect().await;
    sqlx::raw_sql(
        "select postroad_broker.extend_log(id, 20, 1) from postroad_broker.stream;
        insert into postroad_broker.message (stream_id, \"offset\", topic_id, appended_at, id, source, data_kind)
        select id, 18, 1, now(), 'x', '/test', 0 from postroad_broker.stream",
    )
    .execute(&mut owner)
    .await
    .unwrap();
    let locked =
        "select count(distinct relation) from pg_locks l join pg_class c on c.oid = l.relation
        where l.pid = pg_backend_pid() and c.relkind = 'r' and c.relname like 'message\\_%\\_%'";
    for (statement, most) in [
        ("select * from postroad_broker.stream_last(1)", 3),
        ("select postroad_broker.log_end(1)", 3),
        ("select * from postroad_broker.messages_at(1, '{18}')", 1),
        (
            "select * from postroad_broker.begin_history(array(select salt from postroad_broker.history))",
            0,
        ),
    ] {
        owner.execute("begin").await.unwrap();
        owner.execute(statement).await.unwrap();
        let locks: i64 = sqlx::query_scalar(locked)
            .fetch_one(&mut owner)
            .await
            .unwrap();
        assert!(locks <= most, "{statement}: {locks}");
        owner.execute("rollback").await.unwrap();
    }
}
