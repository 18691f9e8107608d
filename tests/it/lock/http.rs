//! Locks over HTTP, as a user meets them.

use reqwest::StatusCode;
use serde_json::json;

use crate::support;

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_is_acquired_renewed_looked_at_and_released() {
    let mut broker = support::broker().await;
    let http = broker.http.clone();
    let path = "/v1/locks/nightly-report";
    let (status, nobody) = http.get(path).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert_eq!(nobody["type"], "/problems/lock-not-found");

    let held = http
        .declare(path, &json!({"owner": "a", "ttl_seconds": 600}))
        .await;
    assert_eq!(held["owner"], "a");
    let token = held["token"].as_i64().unwrap();
    let (status, other) = http.put(path, &json!({"owner": "b"})).await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert_eq!(other["type"], "/problems/lock-held");
    assert_eq!(other["owner"], "a");
    assert_eq!(other["expires_at"], held["expires_at"]);

    let waiting = {
        let http = http.clone();
        let body = json!({"owner": "b", "wait_seconds": 40});
        tokio::spawn(async move { http.put(path, &body).await })
    };
    support::eventually("b is in line", || async {
        let (_, lock) = http.get(path).await;
        (lock["waiting"][0]["owner"] == "b").then_some(())
    })
    .await;
    let renewed = http
        .declare(path, &json!({"owner": "a", "token": token}))
        .await;
    assert_eq!(renewed["token"], token);
    let (_, list) = http.get("/v1/locks").await;
    assert_eq!(list["locks"][0]["state"], "held", "{list}");
    assert_eq!(list["next_after"], json!(null));

    let (status, _) = http.delete(&format!("{path}?token={token}")).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    let (status, next) = waiting.await.unwrap();
    assert_eq!(status, StatusCode::OK, "{next}");
    assert!(next["token"].as_i64() > Some(token));
    let (status, lost) = http.put(path, &json!({"owner": "a", "token": token})).await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert_eq!(lost["type"], "/problems/lock-lost");

    // Pages.
    for name in ["one", "two"] {
        let path = format!("/v1/locks/{name}");
        http.declare(&path, &json!({"owner": "a"})).await;
    }
    let (_, page) = http.get("/v1/locks?max_locks=2").await;
    assert_eq!(page["next_after"], "one", "{page}");
    let (_, page) = http.get("/v1/locks?max_locks=2&after=one").await;
    assert_eq!(page["locks"][0]["name"], "two", "{page}");
    assert_eq!(page["next_after"], json!(null));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_a_request_is_refused_with_its_place() {
    let mut broker = support::broker().await;
    let http = broker.http.clone();
    let path = "/v1/locks/report";
    for (body, pointer) in [
        (json!({}), "/owner"),
        (json!({"owner": ""}), "/owner"),
        (json!({"owner": "x".repeat(256)}), "/owner"),
        (json!({"owner": "a", "ttl_seconds": 0.5}), "/ttl_seconds"),
        (json!({"owner": "a", "ttl_seconds": 3601}), "/ttl_seconds"),
        (json!({"owner": "a", "wait_seconds": 51}), "/wait_seconds"),
        (json!({"owner": "a", "token": 0}), "/token"),
        (
            json!({"owner": "a", "token": 1, "wait_seconds": 1}),
            "/wait_seconds",
        ),
        (json!({"owner": "a", "ttl": 1}), "/ttl"),
    ] {
        let (status, problem) = http.put(path, &body).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{body}");
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{problem}");
    }
    for (path, parameter) in [
        ("/v1/locks/report", "token"),
        ("/v1/locks/report?token=x", "token"),
        ("/v1/locks/re%20port?token=1", "name"),
        ("/v1/locks/report?token=1&owner=a", "owner"),
    ] {
        let (status, problem) = http.delete(path).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{path}");
        assert_eq!(problem["errors"][0]["parameter"], parameter, "{problem}");
    }
    broker.stop().await;
}

/// The answer comes at once, and the place in the line is there for the next node.
#[tokio::test(flavor = "multi_thread")]
async fn who_waits_on_a_node_that_stops_is_told_and_keeps_its_place() {
    let mut broker = support::broker().await;
    let http = broker.http.clone();
    let path = "/v1/locks/report";
    http.declare(path, &json!({"owner": "a"})).await;
    let waiting = {
        let http = http.clone();
        tokio::spawn(async move {
            let body = json!({"owner": "b", "wait_seconds": 40});
            http.put(path, &body).await
        })
    };
    support::eventually("b is in line", || async {
        let (_, lock) = http.get(path).await;
        (lock["waiting"][0]["owner"] == "b").then_some(())
    })
    .await;
    broker.stop().await;
    let (status, told) = waiting.await.unwrap();
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(told["type"], "/problems/stopping");
}
