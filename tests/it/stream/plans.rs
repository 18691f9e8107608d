//! A plan that was made when the log was small is kept, and the leaves have no statistics: whatever a hot statement looks at must not grow
//! with the log. Each is asked in the session that the product asks it in, often enough for its plan to be kept, then the tables grow a
//! hundredfold, and it is asked again. What counts are the rows and the entries of indexes that it visits.

use chrono::{DateTime, TimeDelta, Utc};
use postroad::domain::id::{Epoch, Fence, Offset, OriginId, ScheduledId, StreamId, TopicId};
use postroad::domain::message::Message;
use postroad::domain::name::Topic;
use postroad::store::Connection;
use postroad::store::stream::{
    self as sql, Append, AppendMessage, GroupKey, Previous, RelayMember,
};
use sqlx::Executor as _;
use uuid::Uuid;

use super::{message, node};
use crate::support::{self, TestDatabase};

/// Rows at first, in each table, and a hundred times as many.
const SMALL: i64 = 1_000;
const LARGE: i64 = 100_000;
/// The keyed stream's first leaf, which is full and folded.
const FOLDED: i64 = 500;

/// What is asked, and how many rows and entries it visits.
type Visits = Vec<(&'static str, i64)>;

struct Sessions {
    reader: Connection,
    duty: Connection,
    appender: Connection,
}

async fn visited(connection: &mut Connection) -> i64 {
    let text = "select (
            coalesce((select sum(t.seq_tup_read) from pg_stat_xact_user_tables t where t.schemaname = 'postroad_broker'), 0)
            + coalesce((
                select sum(pg_stat_get_xact_tuples_returned(i.indexrelid)) from pg_index i
                join pg_class c on c.oid = i.indexrelid where c.relnamespace = 'postroad_broker'::regnamespace), 0))::bigint";
    sqlx::query_scalar(text)
        .fetch_one(connection)
        .await
        .unwrap()
}

/// Asks within a transaction of its own that leaves nothing behind.
macro_rules! visit {
    ($visits:ident, $connection:expr, $name:literal, $asked:expr) => {{
        $connection.execute("begin").await.unwrap();
        let before = visited(&mut $connection).await;
        let asked = $asked.await.unwrap();
        let after = visited(&mut $connection).await;
        $connection.execute("rollback").await.unwrap();
        $visits.push(($name, after - before));
        asked
    }};
}

/// Fills the tables from one number of rows to another.
async fn grow(db: &TestDatabase, from: i64, to: i64) {
    let text = format!(
        "insert into postroad_broker.message (stream_id, \"offset\", topic_id, key_hash, appended_at, key, id, source, data_kind)
            select 1, n, 1, n % 10, now(), 'k' || n % 10, n::text, '/test', 0 from generate_series({from} + 1, {to}) n;
        insert into postroad_broker.key_head (stream_id, key, version, last_offset)
            select 1, 'h' || n, 1, n from generate_series({from} + 1, {to}) n;
        insert into postroad_broker.recent_id (bucket, identity, content, \"offset\")
            select postroad_broker.half_day(now()) % 5, gen_random_uuid(), gen_random_uuid(), n from generate_series({from} + 1, {to}) n;
        insert into postroad_broker.append_journal (bucket, incarnation, number, stream_first, stream_at, refused_member, refused_found,
                seen_message, seen_offset, seen_conflict, conflict_message, conflict_version, seen_due, scheduled_number)
            select postroad_broker.ten_minutes(now()) % 4, 1, n, '{{}}', '{{}}', '{{}}', '{{}}', '{{}}', '{{}}', '{{}}', '{{}}', '{{}}', '{{}}', '{{}}'
            from generate_series({from} + 1, {to}) n;
        insert into postroad_broker.relay_journal (origin_id, number, epoch, position)
            select 1, n, 1, '{{}}' from generate_series({from} + 1, {to}) n;
        insert into postroad_broker.scheduled_message (tier, stream_id, due_at, number, topic_id, id, source, data_kind, accepted_at)
            select (postroad_broker.scheduled_tiers(array[d]))[1], 1, d, n, 1, n::text, '/test', 0, now()
            from generate_series({from} + 1, {to}) n, lateral (select now() + interval '1 hour' + n * interval '1 second' as d) l",
    );
    let mut owner = db.connect().await;
    sqlx::raw_sql(sqlx::AssertSqlSafe(text))
        .execute(&mut owner)
        .await
        .unwrap();
}

/// A group of one message, due at a time or at once.
fn group<'a>(message: &'a Message, top: i64, due_at: Option<DateTime<Utc>>) -> Append<'a> {
    let mut append = Append::default();
    let place = append.push_stream(StreamId(1), top);
    append.push_message(AppendMessage {
        member: 0,
        place,
        topic: TopicId(1),
        message,
        key_hash: None,
        origin: None,
        check: Some((Uuid::new_v4(), Uuid::new_v4())),
        due_at,
    });
    append
}

async fn ask(sessions: &mut Sessions, top: i64, due: ScheduledId) -> Visits {
    let mut visits = Visits::new();
    let stream = StreamId(1);
    let topic = |_| Some(Topic::parse("a").unwrap());
    let dense: Vec<Offset> = (top - 9..=top).map(Offset).collect();
    let sparse = [10, 700, top - 1].map(Offset);
    let now = Utc::now();

    let reader = &mut sessions.reader;
    let found = visit!(
        visits,
        *reader,
        "entries of a range",
        sql::fetch_entries(reader, stream, &dense, topic)
    );
    assert_eq!(found.len(), 10);
    let found = visit!(
        visits,
        *reader,
        "single entries",
        sql::fetch_entries(reader, stream, &sparse, topic)
    );
    assert_eq!(found.len(), 3);
    let found = visit!(
        visits,
        *reader,
        "attributes of a range",
        sql::fetch_attributes(reader, stream, &dense)
    );
    assert_eq!(found.len(), 10);
    let found = visit!(
        visits,
        *reader,
        "single attributes",
        sql::fetch_attributes(reader, stream, &sparse)
    );
    assert_eq!(found.len(), 3);
    let found = visit!(
        visits,
        *reader,
        "single items",
        sql::fetch_items(reader, stream, &sparse)
    );
    assert_eq!(found.len(), 3);
    let slice = sql::Slice {
        stream,
        after: Offset(top - 10),
        through: Offset(top),
        topics: Some(&[TopicId(1)]),
        key_hash: None,
        id: None,
        limit: 5,
    };
    let found = visit!(visits, *reader, "a slice", sql::read_slice(reader, &slice));
    assert_eq!(found.len(), 5);
    let found = visit!(
        visits,
        *reader,
        "keys",
        sql::read_keys(reader, stream, Offset(top - 10), Offset(top))
    );
    assert_eq!(found.len(), 10);
    let found = visit!(
        visits,
        *reader,
        "the head of a key",
        sql::find_key_head(reader, stream, "h7")
    );
    assert!(found.is_some_and(|(_, head)| head.is_some()));
    let found = visit!(
        visits,
        *reader,
        "heads of keys",
        sql::list_key_heads(reader, stream, Some("h3"), 10)
    );
    assert_eq!(found.map(|(_, heads)| heads.len()), Some(10));
    let span = (Offset(0), Offset(FOLDED));
    let found = visit!(
        visits,
        *reader,
        "a key's history",
        sql::read_key_slice(reader, stream, ("k3", 3), span, 5)
    );
    assert_eq!(found.len(), 5);
    visit!(
        visits,
        *reader,
        "the head of a stream",
        sql::find_head(reader, stream)
    );
    let found = visit!(
        visits,
        *reader,
        "the top of a stream",
        sql::read_top(reader, stream, Offset(1))
    );
    assert_eq!(found, Some(Offset(top)));
    visit!(
        visits,
        *reader,
        "a time",
        sql::read_appended_at(reader, stream, Offset(top / 2))
    );
    let found = visit!(
        visits,
        *reader,
        "a scheduled message",
        sql::find_scheduled(reader, due, topic)
    );
    assert!(found.is_some());
    let slice = sql::ScheduledSlice {
        stream: Some(stream),
        from: now,
        until: now + TimeDelta::days(300),
        after: None,
        limit: 10,
    };
    let found = visit!(
        visits,
        *reader,
        "scheduled messages",
        sql::list_scheduled(reader, &slice)
    );
    assert_eq!(found.len(), 10);

    let duty = &mut sessions.duty;
    visit!(
        visits,
        *duty,
        "what is due next",
        sql::next_scheduled(duty, std::time::Duration::from_secs(60), now)
    );
    let most = (100, 1 << 20);
    let moved = visit!(
        visits,
        *duty,
        "publishing what is due",
        sql::publish_scheduled(duty, stream, Offset(top), most, now)
    );
    assert!(
        matches!(moved, sql::PublishedScheduled::Moved { count: 1, .. }),
        "{moved:?}"
    );
    visit!(
        visits,
        *duty,
        "a time, by the duty",
        sql::read_appended_at(duty, stream, Offset(top / 2))
    );
    visit!(
        visits,
        *duty,
        "cancelling",
        sql::cancel_scheduled(duty, due)
    );

    let appender = &mut sessions.appender;
    let catalogue = sql::load_catalogue(appender).await.unwrap().version;
    let one = message("a", "new", "1");
    let key = |number| GroupKey {
        incarnation: 2,
        number,
        born_at: now,
        catalogue,
        witness: now,
    };
    let later = group(&one, top, Some(now + TimeDelta::hours(2)));
    visit!(
        visits,
        *appender,
        "an append of what comes later",
        sql::append(appender, key(1), false, &later)
    );
    let fence = Fence {
        lease: "relay/none".to_owned(),
        epoch: Epoch(1),
    };
    let mut relayed = group(&one, top, None);
    relayed.push_relay(
        0,
        RelayMember {
            origin: OriginId(1),
            fence: &fence,
            from: 1,
            to: 2,
            position: "{}",
        },
    );
    visit!(
        visits,
        *appender,
        "an append of a relay",
        sql::append(appender, key(2), true, &relayed)
    );
    let (first, second) = (group(&one, top, None), group(&one, top + 1, None));
    appender.execute("begin").await.unwrap();
    let begun = visited(appender).await;
    let appended = sql::append(appender, key(3), false, &first).await.unwrap();
    assert!(
        matches!(appended, sql::AppendOutcome::Appended(_)),
        "{appended:?}"
    );
    let then = visited(appender).await;
    let previous = Previous {
        number: 3,
        born_at: now,
        last: Offset(top + 1),
        last_at: now,
    };
    let next = sql::append_next(appender, key(4), previous, &second)
        .await
        .unwrap();
    assert!(next.is_some());
    let last = visited(appender).await;
    appender.execute("rollback").await.unwrap();
    visits.push(("an append", then - begun));
    visits.push(("the next append", last - then));
    visits
}

#[tokio::test(flavor = "multi_thread")]
async fn no_kept_plan_visits_more_of_a_log_that_has_grown() {
    let db = support::database().await;
    // It makes the stream `main`, and ends.
    let one = node(&db).await;
    one.publish(vec![message("a", "first", "1")], false)
        .await
        .unwrap();
    one.stop().await;
    let mut owner = db.connect().await;
    let text = format!(
        "delete from postroad_broker.message; truncate postroad_broker.append_journal;
        update postroad_broker.message_leaf set emptied_at = now() where stream_id = 1;
        select postroad_broker.drop_leaf(1, first_offset) from postroad_broker.message_leaf where stream_id = 1;
        select postroad_broker.create_stream_keys(1);
        select postroad_broker.extend_log(1, {FOLDED}, {FOLDED});
        select postroad_broker.extend_log(1, {FOLDED} + 1000000, 1000000);
        insert into postroad_broker.origin (name) values ('none');
        insert into postroad_broker.scheduled_stream (stream_id) values (1);
        select postroad_broker.extend_scheduled(kind, leaf_at) from postroad_broker.missing_scheduled_leaves(now());"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(text))
        .execute(&mut owner)
        .await
        .unwrap();
    grow(&db, 0, SMALL).await;
    owner
        .execute("select postroad_broker.fold_keys(1, 1)")
        .await
        .unwrap();
    // One that is due.
    let due_at: DateTime<Utc> = sqlx::query_scalar(
        "insert into postroad_broker.scheduled_message (stream_id, due_at, number, topic_id, id, source, data_kind, accepted_at)
        values (1, clock_timestamp() - interval '1 second', 1000000, 1, 'due', '/test', 0, now()) returning due_at",
    )
    .fetch_one(&mut owner)
    .await
    .unwrap();
    let due = ScheduledId {
        due_at,
        number: 1_000_000,
        stream: StreamId(1),
    };
    let mut sessions = Sessions {
        reader: sql::connect_reader(&db.database).await.unwrap(),
        duty: sql::connect_duty(&db.database).await.unwrap(),
        appender: sql::connect_appender(&db.database, false).await.unwrap(),
    };
    let mut small = Visits::new();
    for _ in 0..8 {
        small = ask(&mut sessions, SMALL, due).await;
    }
    grow(&db, SMALL, LARGE).await;
    let large = ask(&mut sessions, LARGE, due).await;
    for ((name, before), (_, after)) in small.iter().zip(&large) {
        println!("{name}: {before} rows and entries, {after} of a hundred times as many");
        assert!(*after <= before * 2 + 50, "{name}: {before}, then {after}");
    }
    assert_eq!(small.len(), large.len());
}
