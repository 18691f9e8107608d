//! Installing, rights, leaves that come and go.

use postroad::store::migrate::{self, Grants};
use sqlx::AssertSqlSafe;

use super::{accept, code, consumer, consumer_database, execute};
use crate::support;

#[tokio::test]
async fn the_printed_script_and_the_program_install_the_same_also_beside_an_outbox() {
    let database = support::empty_database().await;
    let mut owner = database.connect().await;
    let script = migrate::inbox_sql();
    execute(&mut owner, &script).await;
    execute(&mut owner, &script).await;
    assert_eq!(
        migrate::inbox(&database.database).await.unwrap(),
        Grants::Given
    );
    assert_eq!(
        migrate::origin(&database.database).await.unwrap(),
        Grants::Given
    );
    execute(&mut owner, &script).await;
    let versions: i64 = sqlx::query_scalar("select count(*) from postroad.migration")
        .fetch_one(&mut owner)
        .await
        .unwrap();
    assert_eq!(versions, 3);
    // One service, both sides: it hears of a message and tells of another in one transaction.
    let mut service = consumer(&database).await;
    let (producer, role) = (database.role("producer"), database.role("consumer"));
    execute(&mut owner, &format!("grant {producer} to {role}")).await;
    execute(&mut service, "begin").await;
    assert!(accept(&mut service, "mailer", 1).await.unwrap());
    execute(
        &mut service,
        "insert into postroad.outbox (topic) values ('mails.sent'); commit",
    )
    .await;
    execute(&mut owner, &format!("revoke {producer} from {role}")).await;
}

#[tokio::test]
async fn consumers_accept_and_can_do_nothing_else() {
    let database = consumer_database(10).await;
    let mut service = consumer(&database).await;
    assert!(accept(&mut service, "mailer", 1).await.unwrap());
    assert!(!accept(&mut service, "mailer", 1).await.unwrap());
    // Text of any kind in the queue's name is text.
    assert!(
        accept(&mut service, "'); drop table postroad.inbox; --", 1)
            .await
            .unwrap()
    );
    // Another queue's work is its own.
    assert!(accept(&mut service, "billing", 1).await.unwrap());
    for (forbidden, expected) in [
        ("select * from postroad.inbox", "42501"),
        (
            "insert into postroad.inbox values ('q', 1, 's', 'i')",
            "42501",
        ),
        ("select postroad.inbox_make_leaf('q', 1, true)", "42501"),
        ("select * from postroad.inbox_leaf", "42501"),
        ("update postroad.inbox set id = 'x'", "42501"),
        ("delete from postroad.inbox", "42501"),
        ("truncate postroad.inbox", "42501"),
        ("update postroad.inbox_setting set keep = '0'", "42501"),
        ("delete from postroad.inbox_leaf", "42501"),
        ("select postroad.inbox_empty_leaves(null, 1)", "42501"),
        ("select postroad.inbox_maintain()", "42501"),
        ("select postroad.inbox_forget('mailer')", "42501"),
        ("create table postroad.mine (a int)", "42501"),
        (
            "select postroad.inbox_accept('mailer', '/shop', 'a', 0)",
            "22023",
        ),
        ("select postroad.inbox_accept('', '/shop', 'a', 1)", "22023"),
        (
            "select postroad.inbox_accept(null, '/shop', 'a', 1)",
            "22023",
        ),
        (
            "select postroad.inbox_accept('mailer', '/shop', '', 1)",
            "23514",
        ),
        (
            "select postroad.inbox_accept('mailer', null, 'a', 1)",
            "23502",
        ),
    ] {
        let error = sqlx::query(AssertSqlSafe(forbidden))
            .execute(&mut service)
            .await
            .unwrap_err();
        assert_eq!(code(&error), expected, "{forbidden}: {error}");
    }
}

#[tokio::test]
async fn leaves_are_made_ahead_and_only_where_messages_come() {
    let database = consumer_database(10).await;
    let (mut service, mut owner) = (consumer(&database).await, database.connect().await);
    for offset in [1, 5, 6, 10, 1_000_003, 9_223_372_036_854_775] {
        assert!(accept(&mut service, "mailer", offset).await.unwrap());
    }
    // Another size from now on, beside what is there.
    execute(
        &mut owner,
        "update postroad.inbox_setting set leaf_offsets = 1000000",
    )
    .await;
    assert!(accept(&mut service, "mailer", 500).await.unwrap());
    assert!(!accept(&mut service, "mailer", 1_000_003).await.unwrap());
    let leaves: Vec<(i64, i64)> =
        sqlx::query_as("select first_offset, last_offset from postroad.inbox_leaf order by 1")
            .fetch_all(&mut owner)
            .await
            .unwrap();
    assert_eq!(
        leaves,
        [
            (1, 10),
            (11, 20),
            (21, 1_000_000),
            (1_000_001, 1_000_010),
            (9_223_372_036_854_771, 9_223_372_036_854_780),
        ]
    );
    let indexes: Vec<i64> = sqlx::query_scalar(
        "select count(*) from pg_inherits i join pg_index x on x.indrelid = i.inhrelid and x.indisunique \
         where i.inhparent = 'postroad.inbox'::regclass group by i.inhrelid",
    )
    .fetch_all(&mut owner)
    .await
    .unwrap();
    assert_eq!(indexes, [1; 5]);
}

#[tokio::test]
async fn old_leaves_leave_and_what_they_held_is_refused_and_not_taken_for_new() {
    let database = consumer_database(10).await;
    let (mut service, mut owner) = (consumer(&database).await, database.connect().await);
    for offset in 1..=25 {
        assert!(accept(&mut service, "mailer", offset).await.unwrap());
    }
    // Nothing is old yet.
    let maintain = "select postroad.inbox_maintain()";
    let left: i32 = sqlx::query_scalar(maintain)
        .fetch_one(&mut owner)
        .await
        .unwrap();
    assert_eq!(left, 0);

    execute(&mut owner, "update postroad.inbox_setting set keep = '0'").await;
    // Somebody who looked up the old leaf before it left, and inserts after.
    let mut late = consumer(&database).await;
    execute(&mut late, "begin isolation level repeatable read; select 1").await;
    // A leaf that is in use stays, and nobody waits for it.
    let mut user = consumer(&database).await;
    execute(&mut user, "begin").await;
    assert!(!accept(&mut user, "mailer", 3).await.unwrap());
    let left: i32 = sqlx::query_scalar(maintain)
        .fetch_one(&mut owner)
        .await
        .unwrap();
    assert_eq!(left, 0);
    execute(&mut user, "rollback").await;
    // Its first leaf leaves. The second is the one before what is made ahead: it may still be filled.
    let left: i32 = sqlx::query_scalar("select postroad.inbox_empty_leaves(null, 10)")
        .fetch_one(&mut owner)
        .await
        .unwrap();
    assert_eq!(left, 1);
    let error = accept(&mut late, "mailer", 3).await.unwrap_err();
    assert_eq!(code(&error), "23514", "{error}");
    assert!(
        error.to_string().contains("inbox_message_is_not_too_old"),
        "{error}"
    );
    execute(&mut late, "rollback").await;
    let error = accept(&mut service, "mailer", 3).await.unwrap_err();
    assert_eq!(code(&error), "55000", "{error}");
    assert!(
        error
            .to_string()
            .contains("no longer knows whether message 3"),
        "{error}"
    );
    assert!(!accept(&mut service, "mailer", 11).await.unwrap());

    // Dropped, and still refused.
    let _: i32 = sqlx::query_scalar(maintain)
        .fetch_one(&mut owner)
        .await
        .unwrap();
    let dropped: Vec<i64> = sqlx::query_scalar(
        "select first_offset from postroad.inbox_leaf where dropped_at is not null order by 1",
    )
    .fetch_all(&mut owner)
    .await
    .unwrap();
    assert_eq!(dropped, [1]);
    let error = accept(&mut service, "mailer", 3).await.unwrap_err();
    assert_eq!(code(&error), "55000", "{error}");

    // Consumers empty by themselves, as they go on.
    for offset in 26..=60 {
        assert!(accept(&mut service, "mailer", offset).await.unwrap());
    }
    let kept: Vec<i64> = sqlx::query_scalar(
        "select first_offset from postroad.inbox_leaf where emptied_at is null order by 1",
    )
    .fetch_all(&mut owner)
    .await
    .unwrap();
    assert_eq!(kept, [51, 61]);

    execute(&mut owner, "select postroad.inbox_forget('mailer')").await;
    assert!(accept(&mut service, "mailer", 3).await.unwrap());
}
