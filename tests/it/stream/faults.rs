//! Connections cut around the commit, and a database that is away.

use std::time::Duration;

use postroad::domain::id::Offset;
use postroad::store::Database;
use postroad::stream::{AppendError, Options};
use sqlx::Executor as _;

use super::{message, node_with, offsets, quick, read};
use crate::relay::as_user;
use crate::support::{self, Action, Direction, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn connections_cut_before_and_after_the_commit_append_once() {
    let db = support::database().await;
    let proxy = support::proxy(&db.url).await;
    let database = Database::new(&proxy.url(&db.url), 2).unwrap();
    let node = node_with(&database, "http://one", quick()).await;
    let main = node.main().await;
    support::cut_marked(&proxy);
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
        let is_it = bytes.windows(8).any(|window| window == b"the-one!");
        if is_cut || direction == Direction::ToClient || !is_it {
            return Action::Forward;
        }
        is_cut = true;
        Action::CutAfter
    });
    let one = || vec![message("a", "the-one!", "2")];
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
