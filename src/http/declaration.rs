//! Declarations from the configuration instead of a request: the same fields, the same rules.

use serde_json::{Map, Value};

use super::problem::{Place, Problem};
use super::routes;
use crate::queue;
use crate::stream;
use crate::topic;

/// Reads what `PUT /v1/streams/{stream}` takes.
///
/// # Errors
/// The rules that the body breaks, as one clause.
pub fn stream_declaration(body: &Map<String, Value>) -> Result<stream::Settings, String> {
    routes::streams::read_declaration(&bytes(body)).map_err(|problem| clause(&problem))
}

/// Reads what `PUT /v1/queues/{queue}` takes.
///
/// # Errors
/// The rules that the body breaks, as one clause.
pub fn queue_declaration(body: &Map<String, Value>) -> Result<queue::Declaration, String> {
    routes::queues::read_declaration(&bytes(body)).map_err(|problem| clause(&problem))
}

/// Reads what `PUT /v1/topics/{topic}` takes.
///
/// # Errors
/// The rules that the body breaks, as one clause.
pub fn topic_declaration(body: &Map<String, Value>) -> Result<topic::Settings, String> {
    routes::topics::read_declaration(&bytes(body)).map_err(|problem| clause(&problem))
}

fn bytes(body: &Map<String, Value>) -> Vec<u8> {
    serde_json::to_vec(body).expect("a JSON object can be written")
}

fn clause(problem: &Problem) -> String {
    if problem.errors.is_empty() {
        return problem.detail.to_string();
    }
    let parts = problem.errors.iter().map(|error| match &error.place {
        Place::Pointer(pointer) if !pointer.is_empty() => {
            let key = pointer.trim_start_matches('/').replace('/', ".");
            format!("`{key}`: {}", error.detail)
        }
        _ => error.detail.clone(),
    });
    parts.collect::<Vec<_>>().join("; ")
}
