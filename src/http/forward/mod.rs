//! Any node answers any request: a request for a queue that another node owns is passed on to that node, once.
//!
//! A layer around the routes of queues finds the queue's slot and its assigned owner. A request for another node's queue
//! goes there with the slot and the epoch that this node knows. That node answers 421 if the slot is not its own either,
//! and then this one looks again. Between owners, and while none answers, the request waits, for at most twice a node's
//! time to live; then the answer is 503 `no_owner`. A long poll that was waiting when its queue went to another node
//! continues there for the rest of its time. In all, no request takes longer than it asked to wait plus twice a node's time
//! to live: a node that swallows requests looks alive in the database.
//!
//! The request is kept until it is answered; a receive is kept as parsed, not as written. The answer is read whole, so that
//! a slow client holds up nothing between nodes.
//!
//! Without other nodes none of this happens, and the body is not even looked at.

mod answer;
mod gap;
mod kept;
mod line;
mod peers;
mod poll;
mod secret;
mod unwritten;

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Extension;
use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use futures_util::future::join_all;
use percent_encoding::percent_decode_str;
use serde_json::Value;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::problem::{Kind, Problem};
use super::route::{Forward, Nature};
use super::state::State;
use crate::cluster::{Owner, Standing, View};
use crate::domain::id::{Epoch, Slot};
use crate::domain::name::QueueName;
use crate::queue;

use answer::{Received, end_to_end, read, target};
use kept::Kept;

pub(in crate::http) use gap::Gaps;
pub(in crate::http) use line::Lines;
pub(in crate::http) use peers::Peers;
pub(in crate::http) use poll::{Acked, Deliveries};
pub(in crate::http) use secret::Secret;

/// The slot that a node passes a request on for.
const SLOT: HeaderName = HeaderName::from_static("x-postroad-slot");
/// The epoch of its lease, as that node knows it.
const EPOCH: HeaderName = HeaderName::from_static("x-postroad-epoch");
/// The header that proves a node.
const NODE: HeaderName = HeaderName::from_static("x-postroad-node");
/// How long the request has waited already, in milliseconds.
const WAITED: HeaderName = HeaderName::from_static("x-postroad-waited");
/// An owner's header on its answer to a receive that was passed on: how many deliveries the answer has.
const DELIVERIES: HeaderName = HeaderName::from_static("x-postroad-deliveries");
/// A look at the nodes is not repeated sooner.
const LOOK: Duration = Duration::from_millis(40);

/// How long another node may take to say what it knows.
const ANSWER: Duration = Duration::from_secs(5);
/// An owner that was silent for this long did have the poll: waiting for the next owner starts again.
const LONG: Duration = Duration::from_secs(1);

/// How long a request has waited elsewhere: a long poll waits that much less.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::http) struct Waited(pub(in crate::http) Duration);

/// A request that another node passed on.
struct Forwarded {
    epoch: Epoch,
    waited: Duration,
}

/// The result of passing a request on.
enum Passed {
    Answered(Response),
    /// That node says that it does not own the slot: look up the queue's place again.
    Elsewhere,
    /// That node is unreachable, or is about to give up the slot: find out which node has it by now.
    Moved,
    /// It was sent, and nobody knows what became of it.
    Unknown,
}

/// Answers a request here, or by the node that owns the queue.
pub(in crate::http) async fn forward(state: &State, request: Request, next: Next) -> Response {
    let Some(queue) = queue_of(&request) else {
        return next.run(request).await;
    };
    let cluster = &state.parts.cluster;
    if cluster.view().has_peers() && !cluster.is_trusted() {
        // It has slept, or the database is away: what it knew may be long over.
        cluster.refresh().await;
    }
    match forwarded(state, request.headers()) {
        Some(forwarded) => own(state, &queue, forwarded, request, next).await,
        None if !state.parts.cluster.view().has_peers() => next.run(request).await,
        // Boxed: a node without others has no need of its place.
        None => {
            let path = request.extensions().get::<MatchedPath>();
            let path = path.map_or("", MatchedPath::as_str);
            let nature = state.natures.of(path, request.method());
            Box::pin(route(state, &queue, nature, request, next)).await
        }
    }
}

/// The queue that a request is about. None for other paths, and for names that the route will refuse.
fn queue_of(request: &Request) -> Option<QueueName> {
    let path = request.extensions().get::<MatchedPath>()?;
    path.as_str().strip_prefix("/v1/queues/{queue}")?;
    let name = request.uri().path().split('/').nth(3)?;
    let name = percent_decode_str(name).decode_utf8().ok()?;
    QueueName::parse(&name).ok()
}

/// The headers of a node that passes the request on. Headers without the secret are ignored.
fn forwarded(state: &State, headers: &HeaderMap) -> Option<Forwarded> {
    let tag = headers.get(NODE)?;
    if !state.secret.knows(tag.as_bytes()) {
        tracing::debug!(
            "refused a forwarded request that did not come from a node of this broker: do all nodes have the same node_secret?"
        );
        return None;
    }
    let number = |name| -> Option<u64> { headers.get(name)?.to_str().ok()?.parse().ok() };
    Some(Forwarded {
        epoch: Epoch(i64::try_from(number(EPOCH)?).ok()?),
        waited: Duration::from_millis(number(WAITED).unwrap_or_default()),
    })
}

/// Whether it says that a node passes it on, whether that is believed or not.
pub(in crate::http) fn is_passed_on(headers: &HeaderMap) -> bool {
    headers.contains_key(NODE)
}

/// Whether another node passed the request on.
pub(in crate::http) fn is_from_node(state: &State, headers: &HeaderMap) -> bool {
    is_passed_on(headers) && forwarded(state, headers).is_some()
}

/// True if other nodes must be asked for their part of the answer, too: there are some, and the request does not come from one.
pub(in crate::http) fn has_others(state: &State, headers: &HeaderMap) -> bool {
    state.parts.cluster.view().has_peers() && forwarded(state, headers).is_none()
}

/// Answers a request that was passed on: here, or not at all.
async fn own(
    state: &State,
    queue: &QueueName,
    forwarded: Forwarded,
    mut request: Request,
    next: Next,
) -> Response {
    let located = state.parts.queue.locate(queue).await;
    if let Ok((slot, owner)) = &located {
        let lease = slot.lease_name();
        let mut owner = owner.clone();
        let known = |view: &View| view.leases.get(&lease).map_or(Epoch(0), |row| row.epoch);
        if forwarded.epoch > known(&state.parts.cluster.view()) {
            // The other node knows more than this one, which may have slept.
            owner = state.parts.cluster.refresh().await.owner(&lease);
        }
        if owner != Owner::This {
            return misdirected(queue, *slot, &owner).into_response();
        }
    }
    request.extensions_mut().insert(Waited(forwarded.waited));
    let mut answer = next.run(request).await;
    if let Some(&Deliveries(count)) = answer.extensions().get() {
        answer.headers_mut().insert(DELIVERIES, count.into());
    }
    match (is_no_owner(&answer), located) {
        (true, Ok((slot, _))) => misdirected(queue, slot, &Owner::Nobody).into_response(),
        _ => answer,
    }
}

fn misdirected(queue: &QueueName, slot: Slot, owner: &Owner) -> Problem {
    let detail = format!("this node does not own the queue `{queue}`");
    let problem = Problem::new(Kind::MisdirectedRequest, detail).with("slot", slot.0);
    match owner {
        Owner::Other { node, url, .. } => problem.with("node", *node).with("url", url.as_str()),
        Owner::This | Owner::Nobody => problem,
    }
}

fn is_no_owner(answer: &Response) -> bool {
    let problem = answer.extensions().get::<Problem>();
    problem.is_some_and(|problem| problem.kind == Kind::NoOwner)
}

/// Answers a client's request: here, or on the node that owns the queue.
async fn route(
    state: &State,
    queue: &QueueName,
    nature: Nature,
    request: Request,
    next: Next,
) -> Response {
    let mut kept = match Kept::read(state, nature, request).await {
        Ok(kept) => kept,
        Err(problem) => return problem.into_response(),
    };
    let cluster = &state.parts.cluster;
    let mut gap_until = None;
    let mut is_known = true;
    loop {
        // Once each time that a node says so: a look-up goes by the engine, which has a slot to recover meanwhile.
        let located = match std::mem::replace(&mut is_known, true) {
            true => state.parts.queue.locate(queue).await,
            false => look_up(state, queue).await,
        };
        let looked_at = Instant::now();
        match located {
            Ok((_, Owner::This)) | Err(queue::Error::NotFound { .. }) => {
                let answer = next.clone().run(kept.request()).await;
                if !is_no_owner(&answer) {
                    return answer;
                }
            }
            Ok((slot, Owner::Other { node, url, epoch })) => {
                let to = (node, url.as_str(), epoch);
                // Boxed: a poll whose queue is this node's after all has no need of its place.
                match Box::pin(pass_on(state, &mut kept, (queue, slot), to)).await {
                    Passed::Answered(answer) => return answer,
                    Passed::Elsewhere => is_known = false,
                    Passed::Moved => {}
                    Passed::Unknown => {
                        let detail = "the queue's owner did not answer; sending the same request again is safe";
                        return Problem::new(Kind::OutcomeUnknown, detail).into_response();
                    }
                }
            }
            Ok((_, Owner::Nobody)) => {}
            Err(error) => return Problem::from(error).into_response(),
        }
        // A poll that waited by right with an owner, or for its turn, has all of the time for the gap that begins now. A request that does
        // not wait, or no more, was with a node that answers nothing.
        let polled_until = kept.since + kept.wait;
        let gap_at = match looked_at < polled_until && looked_at.elapsed() > LONG {
            true => {
                gap_until = None;
                Instant::now().min(polled_until)
            }
            false => looked_at,
        };
        let until = *gap_until.get_or_insert_with(|| gap_at + cluster.ttl() * 2);
        if Instant::now() >= until.min(kept.until) {
            let detail = "nobody owns the queue, or its owner cannot be reached";
            return Problem::new(Kind::NoOwner, detail).into_response();
        }
        let _waiting = state.gaps.enter();
        sleep(state.gaps.pause()).await;
        cluster.refresh_within(LOOK).await;
    }
}

async fn look_up(state: &State, queue: &QueueName) -> Result<(Slot, Owner), queue::Error> {
    let slot = state.parts.queue.look_up(queue).await?;
    let view = state.parts.cluster.view();
    Ok((slot, view.owner(&slot.lease_name())))
}

/// Sends the request to a node, and gives its answer.
async fn pass_on(
    state: &State,
    kept: &mut Kept,
    (queue, slot): (&QueueName, Slot),
    to: (i64, &str, Epoch),
) -> Passed {
    if kept.forward == Forward::Poll {
        return poll::pass_on(state, kept, (queue, slot), to).await;
    }
    let asking = async {
        let answer = ask(state, kept, slot, to, Duration::ZERO).await?;
        read(state, kept, answer).await
    };
    match Box::pin(asking).await {
        Ok(answer) => Passed::Answered(answer.into_response()),
        Err(passed) => passed,
    }
}

/// Sends the request to a node and waits for its answer, for as long as the node lives. `waited`: how long it is to have waited
/// already, at least.
async fn ask(
    state: &State,
    kept: &Kept,
    slot: Slot,
    (node, url, epoch): (i64, &str, Epoch),
    waited: Duration,
) -> Result<reqwest::Response, Passed> {
    let view = state.parts.cluster.view();
    let is_there = |url: &str| view.nodes.iter().any(|member| member.row.url == url);
    let Ok(place) = state.peers.place(url, is_there) else {
        return Err(Passed::Moved);
    };
    state.parts.metrics.forwarded.inc();
    let Some(target) = target(url, kept.parts.uri.path_and_query()) else {
        let detail = "the path has `.` or `..` as a segment, which would lead elsewhere";
        let problem = Problem::new(Kind::NotFound, detail);
        return Err(Passed::Answered(problem.into_response()));
    };
    let waited = kept.since.elapsed().max(waited);
    let waited = i64::try_from(waited.as_millis()).unwrap_or(i64::MAX);
    let mut headers = end_to_end(&kept.parts.headers);
    for (name, number) in [
        (SLOT, i64::from(slot.0)),
        (EPOCH, epoch.0),
        (WAITED, waited),
    ] {
        headers.insert(name, HeaderValue::from(number));
    }
    headers.insert(NODE, state.tag.clone());
    let request = place
        .client
        .request(kept.parts.method.clone(), target)
        .headers(headers)
        .body(kept.body.clone())
        .send();
    let mut views = state.parts.cluster.views();
    let gone = views.wait_for(|view| !view.is_live(node));
    let answer = tokio::select! {
        biased;
        answer = request => answer,
        _ = gone => return Err(kept.unanswered()),
        // It looks alive, and answers nothing.
        () = sleep_until(kept.until) => {
            tracing::debug!(url, "a node did not answer in time");
            return Err(kept.unanswered());
        }
    };
    match answer {
        Ok(answer) if answer.status() == StatusCode::MISDIRECTED_REQUEST => Err(Passed::Elsewhere),
        Ok(answer) => Ok(answer),
        Err(error) if error.is_connect() => {
            tracing::debug!(%error, url, "a node cannot be reached");
            Err(Passed::Moved)
        }
        Err(error) => {
            tracing::debug!(%error, url, "a node did not answer");
            Err(kept.unanswered())
        }
    }
}

/// The answers of the other nodes to a GET, as JSON; nodes that do not answer in time are left out.
pub(in crate::http) async fn ask_all(state: &State, path: &str) -> Vec<Value> {
    let view = state.parts.cluster.view();
    let others = view.nodes.iter().filter(|member| {
        member.row.incarnation != view.own && member.standing != Standing::Expired
    });
    let is_there = |url: &str| view.nodes.iter().any(|member| member.row.url == url);
    let asked = others.map(|member| {
        let url = member.row.url.as_str();
        let place = state.peers.place(url, is_there);
        async move {
            let place = place.ok()?;
            let asked = place
                .client
                .get(format!("{url}{path}"))
                .header(NODE, state.tag.clone())
                .header(EPOCH, 0);
            let answer = async { asked.send().await?.error_for_status()?.json().await };
            match timeout(ANSWER, answer).await {
                Ok(Ok(answer)) => Some(answer),
                Ok(Err(error)) => {
                    tracing::debug!(%error, url, "a node did not answer");
                    None
                }
                Err(_) => None,
            }
        }
    });
    let answers = join_all(asked).await;
    answers.into_iter().flatten().collect()
}

/// Puts what other nodes answer in the place of own items that `is_elsewhere`, by name; theirs that are unknown here are added.
pub(in crate::http) fn merge(
    own: Vec<Value>,
    others: Vec<Value>,
    list: &str,
    is_elsewhere: impl Fn(&Value) -> bool,
) -> Vec<Value> {
    let name = |item: &Value| item["name"].as_str().unwrap_or_default().to_owned();
    let mut merged: BTreeMap<String, Value> = BTreeMap::new();
    let mut order = Vec::new();
    let theirs = others
        .into_iter()
        .filter_map(|mut answer| match answer[list].take() {
            Value::Array(items) => Some(items),
            _ => None,
        });
    for item in own.into_iter().chain(theirs.flatten()) {
        let name = name(&item);
        match merged.get_mut(&name) {
            Some(found) if is_elsewhere(found) => *found = item,
            Some(_) => {}
            None => {
                order.push(name.clone());
                merged.insert(name, item);
            }
        }
    }
    let items = order.iter().filter_map(|name| merged.remove(name));
    items.collect()
}

/// How long a long poll of a request has waited elsewhere.
pub(in crate::http) fn waited(waited: Option<Extension<Waited>>) -> Duration {
    waited.map_or(Duration::ZERO, |Extension(Waited(waited))| waited)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_elsewhere_is_told_by_whoever_has_it() {
        let own = vec![
            json!({"name": "a", "status": null}),
            json!({"name": "b", "status": 1}),
        ];
        let others = vec![
            json!({"queues": [{"name": "a", "status": null}, {"name": "b", "status": null}]}),
            json!({"queues": [{"name": "a", "status": 2}, {"name": "c", "status": 3}]}),
            json!({"what": "else"}),
        ];
        let merged = merge(own, others, "queues", |item| item["status"].is_null());
        assert_eq!(
            json!(merged),
            json!([{"name": "a", "status": 2}, {"name": "b", "status": 1}, {"name": "c", "status": 3}])
        );
    }
}
