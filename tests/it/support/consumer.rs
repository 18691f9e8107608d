//! A producer and consumer of one queue, over HTTP, that behaves as the documentation asks: what was answered 503, or not
//! at all, is asked again as it was.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use super::Http;

/// How long a request is repeated before the test fails: a minute, and as long as an outage is made to last.
fn patience() -> Duration {
    let outage = std::env::var("POSTROAD_TEST_OUTAGE_SECONDS").ok();
    let seconds: u64 = outage.and_then(|text| text.parse().ok()).unwrap_or(0);
    Duration::from_secs(60 + seconds)
}

/// A queue, by way of one broker. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Consumer {
    /// The broker.
    pub http: Http,
    /// The queue's name.
    pub queue: String,
}

/// Asks until the answer is 200, and gives it.
///
/// # Panics
/// With the answer, if it is neither 2xx nor 503; or after too long a time.
pub async fn patiently(http: &Http, method: Method, path: &str, body: Option<&Value>) -> Value {
    let deadline = Instant::now() + patience();
    loop {
        let answer = http.call(method.clone(), path, body).await;
        match answer {
            Ok((status, answer)) if status.is_success() => return answer,
            Ok((status, answer)) => {
                assert_eq!(status.as_u16(), 503, "{method} {path}: {answer}");
                assert!(Instant::now() < deadline, "{method} {path}: {answer}");
            }
            Err(error) => assert!(Instant::now() < deadline, "{method} {path}: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Publishes events of these ids, in one request, each with `{"id": …}` as its data. Gives what became of each.
pub async fn publish_ids(http: &Http, topic: &str, ids: &[String]) -> Vec<Value> {
    let events: Vec<Value> = ids
        .iter()
        .map(|id| json!({"specversion": "1.0", "id": id, "source": "/test", "type": "t", "data": {"id": id}}))
        .collect();
    publish_events(http, topic, &events).await
}

/// Publishes CloudEvents in one request, as often as it takes. Gives what became of each.
pub async fn publish_events(http: &Http, topic: &str, events: &[Value]) -> Vec<Value> {
    let deadline = Instant::now() + patience();
    loop {
        let sent = http
            .client
            .post(format!("{}/v1/topics/{topic}/messages", http.base))
            .header("content-type", "application/cloudevents-batch+json")
            .body(serde_json::to_vec(events).unwrap())
            .send();
        let answer = match sent.await {
            Ok(answer) => answer,
            Err(error) => {
                assert!(Instant::now() < deadline, "publishing: {error}");
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        let status = answer.status();
        if let Ok(answer) = answer.json::<Value>().await {
            if status.is_success() {
                return answer["messages"].as_array().unwrap().clone();
            }
            assert_eq!(status.as_u16(), 503, "publishing: {answer}");
            assert!(Instant::now() < deadline, "publishing: {answer}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Publishes so many messages with ids of their own, by as many requests as it takes.
pub async fn publish(http: &Http, topic: &str, count: usize) {
    let ids: Vec<String> = (0..count)
        .map(|_| uuid::Uuid::new_v4().to_string())
        .collect();
    for ids in ids.chunks(1_000) {
        publish_ids(http, topic, ids).await;
    }
}

/// All messages of a stream that are still there, as `(offset, id)`.
pub async fn stream_ids(http: &Http, stream: &str) -> Vec<(u64, String)> {
    let mut found = Vec::new();
    let mut after = 0;
    loop {
        let path = format!("/v1/streams/{stream}/messages?after={after}&max_messages=1000");
        let page = patiently(http, Method::GET, &path, None).await;
        let messages = page["messages"].as_array().unwrap();
        if messages.is_empty() {
            return found;
        }
        for message in messages {
            let offset = message["offset"].as_u64().unwrap();
            found.push((offset, message["event"]["id"].as_str().unwrap().to_owned()));
            after = offset;
        }
    }
}

/// Items of a verb for these deliveries, each with these further members.
pub fn items(deliveries: &[Value], members: &Value) -> Vec<Value> {
    deliveries
        .iter()
        .map(|delivery| {
            let mut item = members.clone();
            item["receipt"] = delivery["receipt"].clone();
            item
        })
        .collect()
}

impl Consumer {
    /// Declares the queue and gives a consumer of it.
    pub async fn declare(http: &Http, queue: &str, declaration: &Value) -> Self {
        http.declare(&format!("/v1/queues/{queue}"), declaration)
            .await;
        Self {
            http: http.clone(),
            queue: queue.to_owned(),
        }
    }

    fn path(&self, rest: &str) -> String {
        format!("/v1/queues/{}{rest}", self.queue)
    }

    /// Receives, under an id of its own unless the body has one.
    pub async fn receive(&self, body: &Value) -> Value {
        let mut body = body.clone();
        if body.get("receive_id").is_none() {
            body["receive_id"] = json!(uuid::Uuid::new_v4().to_string());
        }
        patiently(
            &self.http,
            Method::POST,
            &self.path("/receive"),
            Some(&body),
        )
        .await
    }

    /// Receives so many messages, by as many receives as it takes, and holds them for so long.
    pub async fn take(&self, count: usize, visible_seconds: u32) -> Vec<Value> {
        let mut taken: Vec<Value> = Vec::new();
        while taken.len() < count {
            let body = json!({
                "max_messages": (count - taken.len()).min(1_000), "max_bytes": 16_777_216, "wait_seconds": 10,
                "visibility_timeout_seconds": visible_seconds,
            });
            let answer = self.receive(&body).await;
            let deliveries = answer["deliveries"].as_array().unwrap();
            let mut why = String::new();
            let _ = write!(why, "{} of {count} came: {answer}", taken.len());
            assert!(!deliveries.is_empty(), "{why}");
            taken.extend(deliveries.iter().cloned());
        }
        taken
    }

    /// Carries out a verb, 1,000 items a request, and gives what became of each.
    pub async fn settle(&self, verb: &str, items: &[Value]) -> Vec<Value> {
        let mut outcomes = Vec::new();
        for items in items.chunks(1_000) {
            let body = json!({"deliveries": items});
            let path = self.path(&format!("/{verb}"));
            let answer = patiently(&self.http, Method::POST, &path, Some(&body)).await;
            let deliveries = answer["deliveries"].as_array().unwrap();
            let total = answer["settled"].as_u64().unwrap() + answer["refused"].as_u64().unwrap();
            assert_eq!((deliveries.len(), total), (items.len(), items.len() as u64));
            outcomes.extend(deliveries.iter().cloned());
        }
        outcomes
    }

    /// Carries out a verb, and every item must have this result.
    pub async fn settle_all(&self, verb: &str, items: &[Value], result: &str) -> Vec<Value> {
        let outcomes = self.settle(verb, items).await;
        for outcome in &outcomes {
            assert_eq!(outcome["result"], result, "{verb}: {outcome}");
        }
        outcomes
    }

    /// The queue's numbers, once its state is at hand.
    pub async fn status(&self) -> Value {
        super::eventually("the queue's status", || async {
            let queue = patiently(&self.http, Method::GET, &self.path(""), None).await;
            (!queue["status"].is_null()).then(|| queue["status"].clone())
        })
        .await
    }

    /// All live deliveries, by offset.
    pub async fn in_flight(&self) -> Vec<Value> {
        let mut found = Vec::new();
        let mut after = 0;
        loop {
            let path = self.path(&format!("/in-flight?max_messages=1000&after={after}"));
            let page = patiently(&self.http, Method::GET, &path, None).await;
            found.extend(page["deliveries"].as_array().unwrap().iter().cloned());
            match page["next_after"].as_u64() {
                Some(next) => after = next,
                None => return found,
            }
        }
    }
}

/// A time of an answer.
pub fn time(value: &Value) -> chrono::DateTime<chrono::Utc> {
    let text = value
        .as_str()
        .unwrap_or_else(|| panic!("{value} is no time"));
    chrono::DateTime::parse_from_rfc3339(text).unwrap().to_utc()
}
