//! Redrives beside other work: in order of keys, under producers that go on, and in one group with what they bring back.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use postroad::domain::id::{Generation, Offset};
use postroad::domain::letter::{LetterId, Selection};
use postroad::domain::policy::{Ordering, Settings, Start};
use postroad::queue::{Act, Acted, LetterFilter, NewRedrive, Outcome, Renewal, Verb};
use sqlx::{Connection as _, PgConnection};

use super::letters::{ended, new, reject, with_letters};
use super::{Broker, HOUR, at_once, declaration, items, name};
use crate::stream::log::explain;
use crate::support;

#[tokio::test(flavor = "multi_thread")]
async fn letters_after_which_their_key_went_on_come_back_late() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    let ordered = Settings {
        ordering: Ordering::Key,
        ..at_once(16)
    };
    let declared = declaration(ordered);
    broker.queue.declare(name(), declared).await.unwrap();
    // Of the key a the second is done with and of the key b nothing is; without a key nothing is late.
    let keys = [Some("a"), Some("b"), None, Some("a"), Some("b"), None];
    broker.publish_keyed("orders.created", &keys).await;
    let first = broker.take(4, HOUR).await;
    let seen: Vec<i64> = first.iter().map(|d| d.entry.offset.0).collect();
    assert_eq!(seen, [1, 2, 3, 6]);
    reject(&broker, &first[..3], "no stock").await;
    broker.settle(Verb::Ack, items(&first[3..])).await;
    let second = broker.take(2, HOUR).await;
    broker.settle(Verb::Ack, items(&second[..1])).await;
    let release = broker.settle(Verb::Release, items(&second[1..])).await;
    assert!(matches!(release[0], Outcome::Released { .. }));
    let all = Selection::default();
    let dry = broker
        .queue
        .dry_run(&name(), new("dry", all.clone()))
        .await
        .unwrap();
    assert_eq!((dry.matching, dry.late), (3, 1));
    broker
        .queue
        .redrive(&name(), new("all", all))
        .await
        .unwrap();
    let done = ended(&broker, "all").await;
    assert_eq!((done.redriven, done.late), (3, 1));
    // The redriven one of the key b goes before its later one.
    let taken = broker.take(3, HOUR).await;
    let seen: Vec<i64> = taken.iter().map(|d| d.entry.offset.0).collect();
    assert_eq!(seen, [1, 2, 3]);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_in_order_of_keys_goes_on_while_producers_do() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    let ordered = Settings {
        ordering: Ordering::Key,
        ..at_once(16)
    };
    let declared = declaration(ordered);
    broker.queue.declare(name(), declared).await.unwrap();
    // Nothing comes after the letters in their keys, which is looked for again in all that is new.
    broker
        .publish_keyed("orders.created", &[Some("a"), Some("b")])
        .await;
    let taken = broker.take(2, HOUR).await;
    reject(&broker, &taken, "no stock").await;
    let is_over = AtomicBool::new(false);
    let produce = async {
        while !is_over.load(Relaxed) {
            broker.publish_keyed("orders.created", &[Some("c")]).await;
        }
    };
    let redrive = async {
        let all = new("all", Selection::default());
        broker.queue.redrive(&name(), all).await.unwrap();
        let done = ended(&broker, "all").await;
        is_over.store(true, Relaxed);
        done
    };
    let (_, done) = tokio::join!(produce, redrive);
    assert_eq!((done.redriven, done.late), (2, 0));
    broker.stop().await;
}

/// What is decided while the writer waits for the row of its lease is one group.
#[tokio::test(flavor = "multi_thread")]
async fn a_letter_that_comes_back_and_dies_in_one_group_is_dead() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    let count = 60;
    with_letters(&broker, count, at_once(16)).await;
    let paced = NewRedrive {
        rate_per_second: Some(8),
        ..new("paced", Selection::default())
    };
    broker.queue.redrive(&name(), paced).await.unwrap();
    let depth = || async { broker.status().await.depth };
    // The database is held for too long now and then, and the queue stands still: then nothing is decided.
    let rejected = support::eventually("both in one group", || async {
        let before = depth().await;
        let mut other = database.connect().await;
        let mut locked = other.begin().await.unwrap();
        sqlx::query("select 1 from postroad_broker.lease for update")
            .execute(&mut *locked)
            .await
            .unwrap();
        // One batch is with the writer, the next one waits for it.
        let mut last = before;
        while last < before + 3 && !broker.status().await.standing_still {
            tokio::time::sleep(Duration::from_millis(5)).await;
            last = depth().await;
        }
        let reason = Some("not again".to_owned());
        let queue = name();
        let act = broker
            .queue
            .act(&queue, Offset(last as i64), Act::Reject { reason });
        let release = async {
            let is_decided = || async { depth().await < last };
            while !is_decided().await && !broker.status().await.standing_still {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            locked.rollback().await.unwrap();
        };
        let (acted, ()) = tokio::join!(act, release);
        let is_in_time = last >= before + 3 && matches!(acted, Ok(Acted::Rejected { .. }));
        is_in_time.then_some(Offset(last as i64))
    })
    .await;
    let dead = broker
        .queue
        .dead_letter(
            &name(),
            LetterId {
                generation: Generation(1),
                offset: rejected,
            },
        )
        .await
        .unwrap();
    assert_eq!(dead.failures.last().unwrap().reason, "not again");
    assert_eq!(dead.summary.redriven, None, "it is not on its way back");
    broker.queue.cancel_redrive(&name(), "paced").await.unwrap();
    let again = Selection {
        ids: Some(vec![dead.summary.id]),
        ..Selection::default()
    };
    broker
        .queue
        .redrive(&name(), new("again", again))
        .await
        .unwrap();
    assert_eq!(ended(&broker, "again").await.redriven, 1);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_goes_on_over_a_purge_and_a_seek_with_letters_of_before() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    with_letters(&broker, 9, at_once(16)).await;
    let slow = NewRedrive {
        rate_per_second: Some(4),
        ..new("slow", Selection::default())
    };
    broker.queue.redrive(&name(), slow).await.unwrap();
    let came = |count: u64| {
        let broker = &broker;
        support::eventually("letters to come back", move || async move {
            let redrive = broker.queue.find_redrive(&name(), "slow").await.unwrap();
            (redrive.redriven >= count).then_some(())
        })
    };
    // What had come back is dead again; what is left of the redrive comes back in the next generation.
    came(2).await;
    broker
        .queue
        .renew(&name(), Renewal::Purge, None)
        .await
        .unwrap();
    came(5).await;
    // Over a seek it stays.
    let to_end = Renewal::Seek(Start::Latest);
    broker.queue.renew(&name(), to_end, None).await.unwrap();
    broker.kill();
    let broker = Broker::on(&database).await;
    let slow = ended(&broker, "slow").await;
    assert_eq!(
        (slow.total, slow.redriven, slow.skipped),
        (Some(9), 9, 0),
        "each came back once"
    );
    let status = broker.status().await;
    let purged = status.dead_letters;
    assert!(
        (2..9).contains(&purged) && status.depth == 9 - purged,
        "{status:?}"
    );
    // The letters that are left are of the first generation, and are redriven in the third.
    let rest = new("rest", Selection::default());
    broker.queue.redrive(&name(), rest).await.unwrap();
    let rest = ended(&broker, "rest").await;
    assert_eq!((rest.total, rest.redriven), (Some(purged), purged));
    let taken = broker.take(9, HOUR).await;
    let offsets: Vec<i64> = taken.iter().map(|d| d.entry.offset.0).collect();
    assert_eq!(offsets, (1..=9).collect::<Vec<_>>());
    assert!(taken.iter().all(|d| (d.delivery, d.attempt) == (3, 1)));
    let acked = broker.settle(Verb::Ack, items(&taken)).await;
    assert!(acked.iter().all(|outcome| *outcome == Outcome::Acked));
    let status = broker.status().await;
    assert_eq!((status.dead_letters, status.depth), (0, 0));
    broker.stop().await;
}

/// The statements of lists, with the parameters' types and values of a page in the middle.
const LISTS: [(&str, &str, &str); 3] = [
    (
        include_str!("../../../src/store/sql/list_letters.sql"),
        "bigint, bigint, bigint[], text, bigint, bigint",
        "1, 50000, null, '{}', 10000, 100",
    ),
    (
        include_str!("../../../src/store/sql/find_redrivable_letters.sql"),
        "bigint, bigint, bigint[], text, timestamptz, bigint, bigint",
        "1, 50000, null, '{}', clock_timestamp(), 10000, 5000",
    ),
    (
        include_str!("../../../src/store/sql/count_redrivable_letters.sql"),
        "bigint, bigint, bigint[], text, timestamptz, bigint",
        "1, 50000, null, '{}', clock_timestamp(), 10000",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn lists_of_dead_letters_go_by_the_index_whatever_their_number() {
    let database = support::database().await;
    let broker = Broker::on(&database).await;
    with_letters(&broker, 1, at_once(16)).await;
    let mut session = database.connect().await;
    let execute = async |session: &mut PgConnection, statement: String| {
        let statement = sqlx::AssertSqlSafe(statement);
        sqlx::raw_sql(statement).execute(session).await.unwrap();
    };
    let fill = "insert into postroad_broker.dead_letter \
        select (jsonb_populate_record(d, jsonb_build_object('offset', d.\"offset\" + n))).* \
        from postroad_broker.dead_letter d, generate_series(1, 100000) n";
    execute(&mut session, fill.to_owned()).await;
    for prepare in ["select 1", "analyze postroad_broker.dead_letter"] {
        execute(&mut session, prepare.to_owned()).await;
        for (statement, types, values) in LISTS {
            execute(
                &mut session,
                format!("prepare listed ({types}) as {statement}"),
            )
            .await;
            for mode in ["force_custom_plan", "force_generic_plan"] {
                execute(&mut session, format!("set plan_cache_mode = {mode}")).await;
                let plan = explain(&mut session, &format!("execute listed ({values})")).await;
                let context = format!("{prepare}, {mode}:\n{plan}");
                assert!(!plan.contains("Seq Scan on dead_letter"), "{context}");
                let is_ranged = plan.contains("Index Cond: ((queue_id = ");
                assert!(is_ranged && plan.contains("dead_letter_pkey"), "{context}");
            }
            execute(&mut session, "deallocate listed".to_owned()).await;
        }
    }
    let end = LetterFilter {
        after: Offset(99_990),
        limit: 1_000,
        ..LetterFilter::default()
    };
    let page = broker.queue.dead_letters(&name(), end).await.unwrap();
    assert_eq!((page.letters.len(), page.next_after), (11, None));
    broker.stop().await;
}
