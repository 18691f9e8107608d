//! Declares the streams, topic settings and queues of the configuration at every start.

use std::time::Duration;

use serde_json::{Map, Value};
use tokio::time::{Instant, sleep};

use super::Error;
use crate::cluster::Owner;
use crate::config::Config;
use crate::domain::name::QueueName;
use crate::{http, queue, stream, topic};

/// How long a change of a queue that another node owns is tried.
const ELSEWHERE: Duration = Duration::from_secs(30);
/// How long that node may take. It may have to ask this one, which does not answer yet.
const ANSWER: Duration = Duration::from_secs(5);

/// Declares all of them, streams first. One that is there already becomes what the configuration says.
pub(super) async fn declare(
    config: &Config,
    stream: &stream::Handle,
    queue: &queue::Handle,
    topics: &topic::Handle,
) -> Result<(), Error> {
    for (name, body) in &config.streams {
        let key = format!("streams.{name}");
        let settings = http::stream_declaration(body).map_err(|reason| fault(&key, reason))?;
        let (_, declared) = stream
            .declare(name.clone(), settings)
            .await
            .map_err(|error| match error {
                stream::Error::Store(_) => error.into(),
                other => fault(&key, other.to_string()),
            })?;
        tracing::info!(stream = %name, ?declared, "declared a stream of the configuration");
    }
    for (pattern, body) in &config.topics {
        let key = format!("topics.{pattern}");
        let settings = http::topic_declaration(body).map_err(|reason| fault(&key, reason))?;
        let (_, declared) = topics
            .declare(pattern.clone(), settings)
            .await
            .map_err(|error| match error {
                topic::Error::Store(_) => error.into(),
                other => fault(&key, other.to_string()),
            })?;
        tracing::info!(topic = %pattern, ?declared, "declared topic settings of the configuration");
    }
    for (name, body) in &config.queues {
        let key = format!("queues.{name}");
        declare_queue(&key, name, body, queue).await?;
    }
    Ok(())
}

/// Declares a queue; one that another node owns is changed there.
async fn declare_queue(
    key: &str,
    name: &QueueName,
    body: &Map<String, Value>,
    queue: &queue::Handle,
) -> Result<(), Error> {
    let until = Instant::now() + ELSEWHERE;
    loop {
        let declaration = http::queue_declaration(body).map_err(|reason| fault(key, reason))?;
        match queue.declare(name.clone(), declaration).await {
            Ok((_, declared)) => {
                tracing::info!(queue = %name, ?declared, "declared a queue of the configuration");
                return Ok(());
            }
            Err(queue::Error::NotOwner { .. }) => {}
            Err(error @ queue::Error::Store(_)) => return Err(error.into()),
            Err(other) => return Err(fault(key, other.to_string())),
        }
        if let Ok((_, Owner::Other { url, .. })) = queue.locate(name).await {
            match put(&url, name, body).await {
                Ok(()) => {
                    tracing::info!(queue = %name, url, "declared a queue of the configuration at its node");
                    return Ok(());
                }
                Err(why) if Instant::now() >= until => return Err(fault(key, why)),
                Err(why) => {
                    tracing::debug!(queue = %name, url, why, "declaring a queue at its node failed")
                }
            }
        }
        sleep(Duration::from_millis(100)).await;
    }
}

async fn put(url: &str, name: &QueueName, body: &Map<String, Value>) -> Result<(), String> {
    let asking = async {
        let client = reqwest::Client::builder()
            .no_proxy()
            .timeout(ANSWER)
            .build()?;
        let put = client.put(format!("{url}/v1/queues/{name}")).json(body);
        put.send().await?.error_for_status()
    };
    match asking.await {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("its node refused it: {error}")),
    }
}

fn fault(key: &str, reason: String) -> Error {
    Error::Declaration {
        key: key.to_owned(),
        reason,
    }
}
