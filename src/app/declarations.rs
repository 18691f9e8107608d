//! The streams, settings of topics and queues that the configuration declares, at every start.

use super::Error;
use crate::config::Config;
use crate::{http, queue, stream, topic};

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
        tracing::info!(stream = %name, ?declared, "stream of the configuration");
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
        tracing::info!(topic = %pattern, ?declared, "settings of topics of the configuration");
    }
    for (name, body) in &config.queues {
        let key = format!("queues.{name}");
        let declaration = http::queue_declaration(body).map_err(|reason| fault(&key, reason))?;
        let (_, declared) = queue
            .declare(name.clone(), declaration)
            .await
            .map_err(|error| match error {
                queue::Error::Store(_) => error.into(),
                other => fault(&key, other.to_string()),
            })?;
        tracing::info!(queue = %name, ?declared, "queue of the configuration");
    }
    Ok(())
}

fn fault(key: &str, reason: String) -> Error {
    Error::Declaration {
        key: key.to_owned(),
        reason,
    }
}
