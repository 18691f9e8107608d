//! The calls of a bench that are not part of its load: declare, delete, metrics.

use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::{Value, json};

use super::metrics::Scrape;

/// Declarations and deletions at a time.
const AT_A_TIME: usize = 16;

/// A client of one broker.
#[derive(Debug, Clone)]
pub(super) struct Api {
    client: reqwest::Client,
    base: String,
}

/// The reasons why a call fails.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No answer.
    #[error("{call} got no answer")]
    NoAnswer {
        /// Method and path.
        call: String,
        /// The HTTP client's error.
        #[source]
        source: reqwest::Error,
    },
    /// The broker refused.
    #[error("{call} was answered {status}: {body}")]
    Refused {
        /// Method and path.
        call: String,
        /// HTTP status.
        status: u16,
        /// The problem document.
        body: String,
    },
}

impl Api {
    pub(super) fn new(base: &str) -> Result<Self, reqwest::Error> {
        let client = reqwest::Client::builder()
            .connect_timeout(Duration::from_secs(5))
            .timeout(Duration::from_secs(60))
            // As the load goes: straight to the broker.
            .no_proxy()
            .build()?;
        Ok(Self {
            client,
            base: base.trim_end_matches('/').to_owned(),
        })
    }

    pub(super) async fn is_ready(&self) -> bool {
        let answer = self.call(reqwest::Method::GET, "/readyz", None).await;
        answer.is_ok()
    }

    pub(super) async fn declare_stream(&self, name: &str, topics: &str) -> Result<(), Error> {
        let body = json!({ "topics": [topics] });
        self.call(
            reqwest::Method::PUT,
            &format!("/v1/streams/{name}"),
            Some(body),
        )
        .await?;
        Ok(())
    }

    /// Queues, each with a name and a declaration.
    pub(super) async fn declare_queues(&self, queues: &[(String, Value)]) -> Result<(), Error> {
        stream::iter(queues)
            .map(|(name, declaration)| async move {
                let path = format!("/v1/queues/{name}");
                let body = Some(declaration.clone());
                self.call(reqwest::Method::PUT, &path, body).await
            })
            .buffer_unordered(AT_A_TIME)
            .try_for_each(async |_| Ok(()))
            .await
    }

    /// Deletes queues and their stream; missing ones are no error.
    pub(super) async fn delete(&self, queues: &[String], stream: &str) -> Result<(), Error> {
        stream::iter(queues)
            .map(|name| self.delete_one(format!("/v1/queues/{name}")))
            .buffer_unordered(AT_A_TIME)
            .try_for_each(async |()| Ok(()))
            .await?;
        self.delete_one(format!("/v1/streams/{stream}")).await
    }

    async fn delete_one(&self, path: String) -> Result<(), Error> {
        match self.call(reqwest::Method::DELETE, &path, None).await {
            Ok(_) | Err(Error::Refused { status: 404, .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The offset of a stream's newest message; 0 without one.
    pub(super) async fn last_offset(&self, stream: &str) -> Result<u64, Error> {
        let path = format!("/v1/streams/{stream}");
        let text = self.call(reqwest::Method::GET, &path, None).await?;
        let answer: Value = serde_json::from_str(&text).unwrap_or_default();
        Ok(answer["last_offset"].as_u64().unwrap_or(0))
    }

    pub(super) async fn metrics(&self) -> Result<Scrape, Error> {
        let text = self.call(reqwest::Method::GET, "/metrics", None).await?;
        Ok(Scrape::parse(&text))
    }

    async fn call(
        &self,
        method: reqwest::Method,
        path: &str,
        body: Option<Value>,
    ) -> Result<String, Error> {
        let call = || format!("{method} {path}");
        let no_answer = |source| Error::NoAnswer {
            call: call(),
            source,
        };
        let url = format!("{}{path}", self.base);
        let mut request = self.client.request(method.clone(), url);
        if let Some(body) = &body {
            request = request.json(body);
        }
        let answer = request.send().await.map_err(no_answer)?;
        let status = answer.status();
        let body = answer.text().await.map_err(no_answer)?;
        if status.is_success() {
            return Ok(body);
        }
        Err(Error::Refused {
            call: call(),
            status: status.as_u16(),
            body,
        })
    }
}
