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
