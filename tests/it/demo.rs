//! The demo's checker must be able to fail: each fault it exists for is planted in its tables, one at a time.

use postroad::store::shop::{
    self, End, NewOrder, QueueFigures, Received, Settled, StreamFigures, reconcile_queue,
    reconcile_stream,
};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use uuid::Uuid;

use crate::support;

const ORDERS: i64 = 30;

/// A shop whose orders of 3 products are in a stream as they were committed, and one order that was rolled back.
async fn shop_in_order(database: &support::TestDatabase, run: Uuid) {
    postroad::store::migrate::origin(&database.database)
        .await
        .unwrap();
    let mut connection = database.database.connect().await.unwrap();
    assert!(shop::create(&mut connection, 3).await.unwrap());
    for number in 0..=ORDERS {
        let order = NewOrder {
            id: Uuid::from_u128(number.unsigned_abs().into()),
            run,
            product: 1 + i32::try_from(number % 3).unwrap(),
            quantity: 1,
            end: if number == ORDERS {
                End::RollBack
            } else {
                End::Commit
            },
        };
        shop::place(&mut connection, order, || ()).await.unwrap();
    }
    // A stream by hand, with none of the code that the checker checks.
    let copy = "insert into postroad_broker.stream (name) values ('checked');
        create table postroad_broker.message_checked partition of postroad_broker.message default;
        insert into postroad_broker.topic (name) values ('shop.orders.created') on conflict do nothing;
        insert into postroad_broker.message
            (stream_id, \"offset\", topic_id, appended_at, id, source, data_kind, data)
        select stream.id, row_number() over (order by seq), topic.id, now(), outbox.id, source, 1, convert_to(payload, 'UTF8')
        from postroad.outbox, postroad_broker.stream, postroad_broker.topic
        where stream.name = 'checked' and topic.name = 'shop.orders.created'";
    sqlx::raw_sql(copy).execute(&mut connection).await.unwrap();
}

/// Applies a fault, reads the figures, and takes the fault back.
async fn with_fault<T>(
    connection: &mut PgConnection,
    fault: &str,
    figures: impl AsyncFnOnce(&mut PgConnection) -> T,
) -> T {
    let mut transaction = connection.begin().await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(fault.to_owned()))
        .execute(&mut *transaction)
        .await
        .unwrap();
    let found = figures(&mut transaction).await;
    transaction.rollback().await.unwrap();
    found
}

#[tokio::test]
async fn the_checker_of_the_stream_finds_every_planted_fault() {
    let database = support::database().await;
    let run = Uuid::from_u128(77);
    shop_in_order(&database, run).await;
    let mut connection = database.connect().await;
    let clean = StreamFigures {
        committed: ORDERS,
        in_stream: ORDERS,
        ..StreamFigures::default()
    };
    // A message moved, to a free offset: the log cannot be made to hold one offset twice.
    let moved = "update postroad_broker.message set \"offset\" = 1000 where \"offset\" = 1";
    let twice = "insert into postroad_broker.message (stream_id, \"offset\", topic_id, appended_at, id, source, data_kind, data)
        select stream_id, 1000, topic_id, appended_at, 'another', source, data_kind, data
        from postroad_broker.message where \"offset\" = 30";
    for (fault, expected) in [
        ("select 1", clean),
        (
            "delete from postroad_broker.message where \"offset\" = 30",
            StreamFigures {
                in_stream: ORDERS - 1,
                lost: 1,
                ..clean
            },
        ),
        (
            twice,
            StreamFigures {
                in_stream: ORDERS + 1,
                duplicated: 1,
                out_of_order: 1,
                ..clean
            },
        ),
        (
            "delete from shop.orders where id = '00000000-0000-0000-0000-000000000004'",
            StreamFigures {
                committed: ORDERS - 1,
                phantoms: 1,
                ..clean
            },
        ),
        // The first of the ten of its product comes last: all ten are out of their places.
        (
            moved,
            StreamFigures {
                out_of_order: 10,
                ..clean
            },
        ),
    ] {
        let found = with_fault(&mut connection, fault, async |connection| {
            reconcile_stream(connection, run, "checked", 0)
                .await
                .unwrap()
        })
        .await;
        assert_eq!(found, expected, "{fault}");
    }
    let other_run = reconcile_stream(&mut connection, Uuid::from_u128(78), "checked", 0)
        .await
        .unwrap();
    assert_eq!((other_run.in_stream, other_run.lost), (0, ORDERS));
}

#[tokio::test]
async fn the_checker_of_a_queue_finds_every_planted_fault() {
    let database = support::database().await;
    shop_in_order(&database, Uuid::from_u128(77)).await;
    let mut connection = database.connect().await;
    let (mut received, mut settled) = (Vec::new(), Vec::new());
    for number in 0..ORDERS {
        let order = Uuid::from_u128(number.unsigned_abs().into());
        let is_refused = number == 7;
        for delivery in 1..=if is_refused { 2 } else { 1 } {
            received.push(Received {
                order,
                product: 1,
                version: 1,
                delivery,
                attempt: delivery,
                offset: number + 1,
            });
            let answer = if is_refused && delivery == 1 {
                "nacked"
            } else {
                "acked"
            };
            settled.push(Settled {
                order,
                delivery,
                answer: answer.into(),
            });
        }
    }
    shop::insert_received(&mut connection, "billing", "billing-1", &received)
        .await
        .unwrap();
    shop::insert_settled(&mut connection, "billing", "billing-1", &settled)
        .await
        .unwrap();
    let clean = QueueFigures {
        delivered: ORDERS,
        acknowledged: ORDERS,
        nacked: 1,
        redelivered: 1,
        ..QueueFigures::default()
    };
    let order_3 = "'00000000-0000-0000-0000-000000000003'";
    for (fault, expected) in [
        ("select 1".to_owned(), clean),
        (
            format!(
                "delete from shop.received where order_id = {order_3}; delete from shop.settled where order_id = {order_3}"
            ),
            QueueFigures {
                delivered: ORDERS - 1,
                acknowledged: ORDERS - 1,
                lost: 1,
                ..clean
            },
        ),
        (
            format!(
                "insert into shop.received (queue, consumer, order_id, product, version, delivery, attempt, \"offset\")
                 values ('billing', 'billing-2', {order_3}, 1, 1, 2, 2, 4)"
            ),
            QueueFigures {
                redelivered: 2,
                redelivered_after_ack: 1,
                ..clean
            },
        ),
    ] {
        let found = with_fault(&mut connection, &fault, async |connection| {
            reconcile_queue(connection, "billing").await.unwrap()
        })
        .await;
        assert_eq!(found, expected, "{fault}");
    }
}

#[tokio::test]
async fn a_schema_of_somebody_elses_is_left_alone() {
    let database = support::database().await;
    let mut connection = database.connect().await;
    sqlx::raw_sql("create schema shop; create table shop.orders (id int)")
        .execute(&mut connection)
        .await
        .unwrap();
    assert!(!shop::create(&mut connection, 3).await.unwrap());
    sqlx::raw_sql("drop schema shop cascade")
        .execute(&mut connection)
        .await
        .unwrap();
    assert!(shop::create(&mut connection, 3).await.unwrap());
    assert!(shop::create(&mut connection, 3).await.unwrap(), "its own");
}

/// Runs `postroad demo` and gives what it printed.
async fn demo(database: &support::TestDatabase, arguments: &[&str]) -> String {
    let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_postroad"))
        .arg("demo")
        .args(arguments)
        .args(["--database-url", &database.url, "--bind", "127.0.0.1:0"])
        // The tests' server flushes nothing.
        .env("POSTROAD_ALLOW_UNSAFE_POSTGRES", "true")
        .kill_on_drop(true)
        .output()
        .await
        .unwrap();
    let printed = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{}\n{printed}", output.status);
    printed
}

#[tokio::test]
async fn a_run_of_the_demo_loses_repeats_and_reorders_nothing() {
    let database = support::database().await;
    let printed = demo(
        &database,
        &["--orders", "1000", "--rate", "0", "--producers", "8"],
    )
    .await;
    assert!(printed.contains("Nothing lost, nothing twice"), "{printed}");
    // A second run on the same database begins anew.
    demo(&database, &["--orders", "50", "--seed", "2"]).await;
}

#[tokio::test]
async fn the_demo_loses_nothing_when_its_broker_is_killed_again_and_again() {
    let database = support::database().await;
    let printed = demo(
        &database,
        &["--orders", "2000", "--rate", "400", "--kills", "3"],
    )
    .await;
    assert!(printed.contains("killed 3 times on the way"), "{printed}");
}
