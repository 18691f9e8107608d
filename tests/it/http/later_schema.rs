//! Functions of a later schema that answer with a status this program does not know: it is never taken for success.

use sqlx::AssertSqlSafe;

use super::*;

/// Has a function of the broker's schema answer with another word.
async fn rename_status(api: &Api, function: &str, from: &str, to: &str) {
    let mut admin = api.database.connect().await;
    let text: String = sqlx::query_scalar(
        "select pg_get_functiondef(p.oid) from pg_proc p join pg_namespace n on n.oid = p.pronamespace \
         where n.nspname = 'postroad_broker' and p.proname = $1",
    )
    .bind(function)
    .fetch_one(&mut admin)
    .await
    .unwrap();
    let (from, to) = (format!("'{from}'"), format!("'{to}'"));
    assert!(text.contains(&from), "{function} says {from}");
    sqlx::raw_sql(AssertSqlSafe(text.replace(&from, &to)))
        .execute(&mut admin)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_status_of_an_append_is_no_success() {
    let api = Api::start().await;
    let topic = "/v1/topics/orders.created/messages";
    // The second message of a stream goes by the shorter function.
    for order in 0..2 {
        let answer = api.post(topic, json!({"order": order})).await;
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    for function in ["append_next", "append"] {
        rename_status(&api, function, "appended", "accepted").await;
        let answer = api.post(topic, json!({"order": 2})).await;
        assert!(answer.status >= 500, "{function}: {answer:?}");
    }
    api.stop_server().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_status_of_the_journal_is_no_success() {
    let api = Api::start().await;
    api.queue("mailer", json!({"stream": "main"})).await;
    let topic = "/v1/topics/orders.created/messages";
    api.post(topic, json!({"order": 1})).await;
    let received = api.receive("mailer", json!({"wait_seconds": 5})).await;
    let receipt = &received.body["deliveries"][0]["receipt"];
    assert!(receipt.is_string(), "{received:?}");
    rename_status(&api, "write_queue_journal", "written", "recorded").await;
    let ack = json!({"deliveries": [{"receipt": receipt}]});
    let answer = api.post("/v1/queues/mailer/ack", ack).await;
    assert!(answer.status >= 500, "{answer:?}");
    api.stop_server().await;
}
