//! One call, repeated until it is answered, refused for good, or past its deadline.
//!
//! Every call of the API may be repeated: verbs are idempotent by their receipts, a publish by the ids of its messages, a
//! receive by its id. So the client simply retries: no answer, 429, 503, and a proxy's error without a broker behind it are
//! tried again after a growing random delay, and not before `Retry-After`.

use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{CONTENT_TYPE, RETRY_AFTER};
use reqwest::{Method, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;
use uuid::Uuid;

use super::error::{Error, Problem};
use super::{Client, Options};

/// The request.
#[derive(Debug, Clone)]
pub(super) struct Call {
    method: Method,
    path: String,
    content_type: &'static str,
    body: Option<Bytes>,
    /// How long the broker may think about it by design: a long poll.
    wait: Duration,
}

impl Call {
    pub(super) fn new(method: Method, path: impl Into<String>) -> Self {
        Self {
            method,
            path: path.into(),
            content_type: "application/json",
            body: None,
            wait: Duration::ZERO,
        }
    }

    pub(super) fn json(mut self, body: &impl Serialize) -> Result<Self, Error> {
        self.body = Some(serde_json::to_vec(body).map_err(Error::Payload)?.into());
        Ok(self)
    }

    pub(super) fn content_type(mut self, content_type: &'static str) -> Self {
        self.content_type = content_type;
        self
    }

    pub(super) fn waiting(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    fn name(&self) -> String {
        format!("{} {}", self.method, self.path)
    }
}

impl Client {
    /// Calls until there is an answer, and reads it.
    pub(super) async fn ask<T: DeserializeOwned>(&self, call: Call) -> Result<T, Error> {
        let name = call.name();
        let body = self.call(call).await?;
        serde_json::from_slice(&body).map_err(|source| Error::Answer { call: name, source })
    }

    /// Calls until there is an answer, and gives its body.
    pub(super) async fn call(&self, call: Call) -> Result<Bytes, Error> {
        let deadline = Instant::now() + self.options().deadline + call.wait;
        let mut backoff = Backoff::new(self.options());
        loop {
            let error = match self.call_once(&call).await {
                Ok(body) => return Ok(body),
                Err(error) if error.is_transient() => error,
                Err(error) => return Err(error),
            };
            let asked = error.problem().and_then(|problem| problem.retry_after);
            let delay = backoff.next(asked);
            if Instant::now() + delay >= deadline {
                return Err(error);
            }
            tracing::debug!(
                ?delay,
                error = &error as &dyn std::error::Error,
                "repeating the call"
            );
            tokio::time::sleep(delay).await;
        }
    }

    /// Calls once.
    pub(super) async fn call_once(&self, call: &Call) -> Result<Bytes, Error> {
        let no_answer = |source| Error::NoAnswer {
            call: call.name(),
            source,
        };
        let mut request = self
            .http()
            .request(
                call.method.clone(),
                format!("{}{}", self.base_url(), call.path),
            )
            .timeout(self.options().answer_timeout + call.wait);
        if let Some(body) = &call.body {
            request = request
                .header(CONTENT_TYPE, call.content_type)
                .body(body.clone());
        }
        let answer = request.send().await.map_err(no_answer)?;
        let status = answer.status();
        let retry_after = answer.headers().get(RETRY_AFTER);
        let retry_after = retry_after
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .map(Duration::from_secs);
        let body = answer.bytes().await.map_err(no_answer)?;
        if status.is_success() {
            return Ok(body);
        }
        let problem = Problem::read(status.as_u16(), retry_after, &body);
        Err(Error::Problem {
            call: call.name(),
            problem: Box::new(problem),
        })
    }

    /// As [`Client::ask`]; None when there is no such thing.
    pub(super) async fn find<T: DeserializeOwned>(&self, call: Call) -> Result<Option<T>, Error> {
        match self.ask(call).await {
            Ok(found) => Ok(Some(found)),
            Err(error) if is_not_found(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

pub(super) fn is_not_found(error: &Error) -> bool {
    error
        .problem()
        .is_some_and(|problem| problem.status == StatusCode::NOT_FOUND.as_u16())
}

/// Delays between repeats: doubled each time up to a cap, and each a random part of it, so that those who failed
/// together do not come back together.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
    cap: Duration,
}

impl Backoff {
    pub(super) fn new(options: &Options) -> Self {
        Self {
            next: options.first_delay,
            cap: options.longest_delay,
        }
    }

    /// The next delay: from half of it to the whole, behind what the broker asked for.
    pub(super) fn next(&mut self, asked: Option<Duration>) -> Duration {
        let delay = self.next.min(self.cap);
        self.next = delay * 2;
        asked.unwrap_or_default() + delay.mul_f64(0.5 + 0.5 * random())
    }
}

/// From 0 to 1, good enough to spread callers.
fn random() -> f64 {
    let bits = Uuid::new_v4().as_u128() & u128::from(u32::MAX);
    f64::from(u32::try_from(bits).unwrap_or(0)) / f64::from(u32::MAX)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::collections::VecDeque;
    use std::sync::{Arc, Mutex};

    use axum::extract::Request;
    use axum::response::Response;
    use http_body_util::BodyExt as _;
    use serde_json::{Value, json};
    use tokio::net::TcpListener;

    use super::*;
    use crate::client::{Item, ProblemKind, Queue, Receive, Refusal, Settled, Verb};

    /// A status, a `Retry-After` and a body. Status 0 breaks the connection off.
    type Scripted = (u16, Option<u64>, Value);
    /// Paths and bodies.
    type Asked = Arc<Mutex<Vec<(String, Value)>>>;

    /// A server that answers by a script, the last line again and again, and a queue of it.
    async fn server(script: Vec<Scripted>) -> (Queue, Asked) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let script = Arc::new(Mutex::new(VecDeque::from(script)));
        let asked = Asked::default();
        let heard = Arc::clone(&asked);
        let answer = async move |request: Request| {
            let path = request.uri().path().to_owned();
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
            heard.lock().unwrap().push((path, body));
            let (status, retry_after, body) = {
                let mut script = script.lock().unwrap();
                match script.len() {
                    1 => script[0].clone(),
                    _ => script.pop_front().unwrap(),
                }
            };
            assert!(status > 0, "the connection breaks off");
            let mut answer = Response::builder().status(status);
            if let Some(seconds) = retry_after {
                answer = answer.header(RETRY_AFTER, seconds);
            }
            answer.body(body.to_string()).unwrap()
        };
        tokio::spawn(async move {
            let router = axum::Router::new().fallback(answer);
            axum::serve(listener, router).await.unwrap();
        });
        let options = Options {
            deadline: Duration::from_secs(30),
            first_delay: Duration::from_millis(1),
            longest_delay: Duration::from_millis(10),
            ..Options::default()
        };
        let client = Client::with(base, options).unwrap();
        (client.queue("billing").unwrap(), asked)
    }

    fn problem(slug: &str) -> Value {
        json!({"type": format!("/problems/{slug}"), "title": "t", "detail": "d", "request_id": "r"})
    }

    fn settled(result: &str) -> Value {
        json!({"settled": 0, "refused": 0, "deliveries": [{"receipt": "a", "result": result, "attempt": 3}]})
    }

    #[tokio::test]
    async fn what_can_pass_is_repeated_as_it_was() {
        let broken = (0, None, Value::Null);
        let script = vec![
            (503, None, problem("outcome-unknown")),
            broken,
            (429, None, problem("too-many-requests")),
            (502, None, json!("<html>no upstream</html>")),
            (200, None, settled("acked")),
        ];
        let (queue, asked) = server(script).await;
        assert_eq!(queue.ack(Item::new("a")).await.unwrap(), Settled::Acked);
        let asked = asked.lock().unwrap();
        let call = (
            "/v1/queues/billing/ack",
            json!({"deliveries": [{"receipt": "a"}]}),
        );
        assert_eq!(asked.len(), 5);
        assert!(
            asked
                .iter()
                .all(|asked| (asked.0.as_str(), &asked.1) == (call.0, &call.1))
        );
    }

    #[tokio::test]
    async fn a_repeat_waits_as_long_as_it_is_asked_to() {
        let script = vec![
            (503, Some(1), problem("stopping")),
            (200, None, settled("acked")),
        ];
        let (queue, _) = server(script).await;
        let since = Instant::now();
        queue.ack(Item::new("a")).await.unwrap();
        assert!(since.elapsed() >= Duration::from_secs(1));
        // Not when it is over by then.
        let (queue, asked) = server(vec![(503, Some(3_600), problem("unavailable"))]).await;
        let error = queue.ack(Item::new("a")).await.unwrap_err();
        let problem = error.problem().unwrap();
        assert_eq!(
            (&problem.kind, problem.status),
            (&ProblemKind::Unavailable, 503)
        );
        assert!(error.is_transient() && asked.lock().unwrap().len() == 1);
    }

    #[tokio::test]
    async fn what_cannot_pass_is_an_error_at_once_with_its_kind() {
        for (status, body, kind) in [
            (404, problem("queue-not-found"), ProblemKind::QueueNotFound),
            (409, problem("id-conflict"), ProblemKind::IdConflict),
            (500, problem("internal"), ProblemKind::Internal),
            (
                418,
                problem("teapot"),
                ProblemKind::Other("/problems/teapot".to_owned()),
            ),
            (404, json!("no page"), ProblemKind::Other(String::new())),
        ] {
            let (queue, asked) = server(vec![(status, None, body)]).await;
            let error = queue.receive(&Receive::default()).await.unwrap_err();
            assert_eq!(error.problem().unwrap().kind, kind, "{error}");
            assert!(!error.is_transient() && asked.lock().unwrap().len() == 1);
        }
        let (queue, _) = server(vec![(200, None, json!({"deliveries": 7}))]).await;
        let error = queue.receive(&Receive::default()).await.unwrap_err();
        assert!(matches!(error, Error::Answer { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_receive_is_repeated_under_its_id() {
        let received = json!({"deliveries": [], "reason": "empty", "next_due_at": null});
        let script = vec![(0, None, Value::Null), (200, None, received)];
        let (queue, asked) = server(script).await;
        for _ in 0..2 {
            let received = queue.receive(&Receive::default()).await.unwrap();
            assert_eq!(received.reason.as_deref(), Some("empty"));
        }
        let asked = asked.lock().unwrap();
        let ids: Vec<&str> = asked
            .iter()
            .map(|(_, body)| body["receive_id"].as_str().unwrap())
            .collect();
        assert_eq!(ids.len(), 3);
        assert!(ids[0] == ids[1] && ids[1] != ids[2], "{ids:?}");
    }

    #[tokio::test]
    async fn a_refused_delivery_is_an_error() {
        for (verb, result, expected) in [
            (Verb::Ack, "already_settled", Ok(Settled::AlreadySettled)),
            (Verb::Nack, "already_settled", Err(Refusal::AlreadySettled)),
            (Verb::Ack, "stale", Err(Refusal::Stale { attempt: 3 })),
            (Verb::Extend, "gone", Err(Refusal::Gone)),
            (Verb::Ack, "blocked", Err(Refusal::Blocked)),
            (Verb::Ack, "new", Err(Refusal::Other("new".to_owned()))),
        ] {
            let (queue, _) = server(vec![(200, None, settled(result))]).await;
            let outcomes = queue.settle(verb, vec![Item::new("a")]).await.unwrap();
            let outcome = outcomes.all().map(|mut settled| settled.remove(0));
            assert_eq!(outcome.map_err(|refused| refused.refusal), expected);
        }
        let (queue, _) = server(vec![(200, None, settled("gone"))]).await;
        let error = queue.ack(Item::new("a")).await.unwrap_err();
        assert!(
            error
                .to_string()
                .contains("refused to ack a delivery: it is gone"),
            "{error}"
        );
    }

    #[test]
    fn delays_grow_to_their_cap_and_are_spread() {
        let options = Options::default();
        let mut backoff = Backoff::new(&options);
        let mut expected = options.first_delay;
        for _ in 0..10 {
            let delay = backoff.next(None);
            assert!(
                expected / 2 <= delay && delay <= expected,
                "{delay:?} of {expected:?}"
            );
            expected = (2 * expected).min(options.longest_delay);
        }
        let asked = Duration::from_secs(7);
        assert!(backoff.next(Some(asked)) >= asked);
    }
}
