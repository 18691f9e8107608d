//! The failpoints themselves: the process ends, or stops and goes on, where it was told to.

use reqwest::Method;
use rustix::process::Signal;
use serde_json::json;

use crate::support::{database, eventually, process, program};

#[tokio::test(flavor = "multi_thread")]
async fn a_process_stops_at_a_point_and_goes_on_and_another_ends_there() {
    let database = database().await;
    let points = "append.before_call=stop@3,append.after_commit=abort@5";
    let mut program = program(&database.url, &[("POSTROAD_FAILPOINTS", points)]).await;
    let http = program.http.clone();
    let publishing = tokio::spawn(async move {
        let message = json!({ "n": 1 });
        let mut published = 0i64;
        let path = "/v1/topics/a/messages";
        while let Ok((status, answer)) = http.call(Method::POST, path, Some(&message)).await {
            assert!(status.is_success(), "{answer}");
            published += 1;
        }
        published
    });
    let pid = program.pid();
    let is_stopped = || async { process::is_stopped(pid).then_some(()) };
    eventually("the program stops", is_stopped).await;
    assert!(!publishing.is_finished());
    program.signal(Signal::CONT);
    let published = publishing.await.unwrap();
    program.kill().await;
    let mut connection = database.connect().await;
    let (count,): (i64,) = sqlx::query_as("select count(*) from postroad_broker.message")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    // The last one was committed, and its answer not given. The relay appends its position, too.
    assert!(
        published > 0 && count == published + 1,
        "{published} {count}"
    );
}

/// The rows and the position that says so are one commit: killed right after any commit, the relay goes on behind it.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_killed_after_a_commit_of_the_log_relays_nothing_twice() {
    let database = database().await;
    let mut program = program(&database.url, &[]).await;
    let mut connection = database.connect().await;
    let mut publish = async |ids: &[&str]| {
        let insert = "insert into postroad.outbox (topic, id, payload) select 'a', id, '{}' from unnest($1::text[]) id";
        let inserting = sqlx::query(insert).bind(ids).execute(&mut connection);
        inserting.await.unwrap();
    };
    let log = async || {
        let ids = "select id from postroad_broker.message order by \"offset\"";
        let reading = sqlx::query_scalar::<_, String>(ids);
        reading
            .fetch_all(&mut database.connect().await)
            .await
            .unwrap()
    };
    let until_last = async |last: &str| {
        eventually("the relay to catch up", || async {
            let ids = log().await;
            ids.iter().any(|id| id == last).then_some(ids)
        })
        .await
    };
    publish(&["before"]).await;
    until_last("before").await;
    program.kill().await;
    program.set("POSTROAD_FAILPOINTS", "append.after_commit=abort@1");
    program.start().await;
    publish(&["one", "two"]).await;
    assert!(!program.ended().await.success());
    program.set("POSTROAD_FAILPOINTS", "");
    program.start().await;
    publish(&["after"]).await;
    let ids = until_last("after").await;
    assert_eq!(
        ids,
        ["before", "one", "two", "after"],
        "each once, in order"
    );
}
