//! Users' locks: acquire, renew, release, describe.

use std::time::Duration;

use axum::Extension;
use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::wire;
use crate::domain::name::LockName;
use crate::http::body::Outgoing;
use crate::http::extract::{Check, Json, Named, Query};
use crate::http::openapi::{LockConflicts, NoLock, Reads, Writes};
use crate::http::problem::{Kind, Problem};
use crate::http::route::{Routes, route};
use crate::http::state::State;
use crate::lock::{Described, Holder, Request, Waiter};

/// The longest that a lock is held without a renewal, and how long without a word, in seconds.
const TTL_MAX: f64 = 3_600.0;
const TTL: f64 = 30.0;
/// The longest wait, in seconds: balancers cut at 60.
const WAIT_MAX: f64 = 50.0;
/// The largest token: what JSON keeps.
const TOKEN_MAX: i64 = 9_007_199_254_740_991;

/// A request to acquire or renew a lock.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = LockRequest, example = json!({"owner": "billing-7f3a", "ttl_seconds": 30, "wait_seconds": 0}))]
struct Wanted {
    /// The caller's name, 1 to 255 bytes. Two callers that could hold the lock at the same time must not share a name: give each process a
    /// name with a random part. A caller that holds the lock and asks again gets more time under the same token.
    #[schema(min_length = 1, max_length = 255, pattern = r"^[^\x00]*$")]
    owner: String,
    /// How long the lock is held without a renewal; 30 by default. Count it from before the request.
    #[schema(minimum = 1, maximum = 3600, nullable = false)]
    ttl_seconds: Option<f64>,
    /// How long to wait in line while another owner holds the lock; 0 by default. The place in line is kept for 5 seconds after that,
    /// for the next request.
    #[schema(minimum = 0, maximum = 50, nullable = false)]
    wait_seconds: Option<f64>,
    /// Renew the lock that is held under this token, and do not acquire it again: `lock-lost` when another owner has held it since.
    #[schema(minimum = 1, maximum = 9_007_199_254_740_991_i64, nullable = false)]
    token: Option<i64>,
}

/// A lock that is held.
#[derive(Debug, Serialize, ToSchema)]
struct HeldLock {
    name: String,
    owner: String,
    /// The fencing token. It is higher than the tokens of all earlier holders, also after a failover of the database. Send it with
    /// every request to the thing that the lock protects, and let that thing refuse lower tokens.
    #[schema(example = 1_099_511_627_777_i64)]
    token: i64,
    #[schema(format = DateTime)]
    acquired_at: String,
    /// The end of the lease by the database's clock, unless it is renewed.
    #[schema(format = DateTime)]
    expires_at: String,
}

/// A caller that waits for a lock.
#[derive(Debug, Serialize, ToSchema)]
struct LockWaiter {
    owner: String,
    #[schema(format = DateTime)]
    since: String,
}

/// A lock and its holder.
#[derive(Debug, Serialize, ToSchema)]
struct Lock {
    name: String,
    state: LockState,
    /// The holder's name.
    owner: Option<String>,
    /// The fencing token of the current or last holder; 0 before the first.
    token: i64,
    #[schema(format = DateTime)]
    acquired_at: Option<String>,
    #[schema(format = DateTime)]
    expires_at: Option<String>,
    /// The first hundred that wait, in order.
    waiting: Vec<LockWaiter>,
}

/// A lock's state.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum LockState {
    Held,
    Free,
}

/// Locks that are held, by name.
#[derive(Debug, Serialize, ToSchema)]
struct Locks {
    locks: Vec<Lock>,
    /// Pass this as `after` to get the next page; null at the end.
    next_after: Option<String>,
}

pub(super) fn routes() -> Routes {
    Routes::new()
        .routes(routes!(list))
        .routes(route(routes!(acquire)).needs_body())
        .routes(routes!(describe, release))
}

impl HeldLock {
    fn new(name: &LockName, holder: Holder) -> Self {
        Self {
            name: name.to_string(),
            owner: holder.owner,
            token: holder.token,
            acquired_at: wire::time(holder.acquired_at),
            expires_at: wire::time(holder.expires_at),
        }
    }
}

impl From<Described> for Lock {
    fn from(lock: Described) -> Self {
        let waiter = |waiter: Waiter| LockWaiter {
            owner: waiter.owner,
            since: wire::time(waiter.since),
        };
        let (owner, acquired_at, expires_at) = match lock.holder {
            Some(holder) => (
                Some(holder.owner),
                Some(holder.acquired_at),
                Some(holder.expires_at),
            ),
            None => (None, None, None),
        };
        Self {
            name: lock.name.to_string(),
            state: match owner {
                Some(_) => LockState::Held,
                None => LockState::Free,
            },
            owner,
            token: lock.token,
            acquired_at: acquired_at.map(wire::time),
            expires_at: expires_at.map(wire::time),
            waiting: lock.waiters.into_iter().map(waiter).collect(),
        }
    }
}

impl Wanted {
    fn request(self, name: LockName) -> Result<Request, Problem> {
        let mut check = Check::default();
        let seconds = |check: &mut Check, field, value: Option<f64>, or, range| match value {
            Some(value) => check.seconds(field, value, range),
            None => Duration::from_secs_f64(or),
        };
        if !(1..=255).contains(&self.owner.len()) || self.owner.contains('\0') {
            let rule = "must be 1 to 255 bytes long, without the character U+0000";
            check.fault("/owner", rule);
        }
        let ttl = seconds(
            &mut check,
            "/ttl_seconds",
            self.ttl_seconds,
            TTL,
            1.0..=TTL_MAX,
        );
        let wait = seconds(
            &mut check,
            "/wait_seconds",
            self.wait_seconds,
            0.0,
            0.0..=WAIT_MAX,
        );
        if let Some(token) = self.token {
            check.integer("/token", token, 1..=TOKEN_MAX);
            if !wait.is_zero() {
                check.fault(
                    "/wait_seconds",
                    "cannot be combined with `token`: a renewal does not wait",
                );
            }
        }
        check.finish()?;
        Ok(Request {
            name,
            owner: self.owner,
            token: self.token,
            ttl,
            wait,
        })
    }
}

/// List the locks that are held, by name.
#[utoipa::path(
    get, path = "/v1/locks", tag = "locks", operation_id = "list_locks",
    params(
        ("after" = Option<String>, Query, description = "`next_after` of the previous page", min_length = 1, max_length = 100,
            pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$"),
        ("max_locks" = Option<i64>, Query, description = "At most this many; 100 by default", minimum = 1, maximum = 1000),
    ),
    responses((status = 200, description = "A page", body = Locks), Reads),
)]
async fn list(Extract(state): Extract<State>, mut query: Query) -> Result<Response, Problem> {
    let after = query.parsed("after", LockName::parse);
    let limit = query.integer("max_locks", 1..=1_000).unwrap_or(100);
    query.finish()?;
    // One more than is shown says whether there is a next page.
    let mut found = state.parts.locks.list(after, limit + 1).await?;
    let is_last = (found.len() as i64) <= limit;
    found.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    let last = found.last().map(|lock| lock.name.to_string());
    let locks = Locks {
        locks: found.into_iter().map(Lock::from).collect(),
        next_after: last.filter(|_| !is_last),
    };
    Ok(wire::json(StatusCode::OK, &locks))
}

/// Acquire a lock, or renew it.
///
/// If another owner holds the lock, the request waits in line. A lock is a lease: its time can be up while its holder still works.
/// So whatever the lock protects must refuse a token lower than one it has seen.
#[utoipa::path(
    put, path = "/v1/locks/{name}", tag = "locks", operation_id = "acquire_lock",
    params(("name" = String, Path, description = "The lock", min_length = 1, max_length = 100,
        pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "nightly-report")),
    request_body = Wanted,
    responses(
        (status = 200, description = "The lock is held by `owner`, under `token`", body = HeldLock),
        LockConflicts, Writes,
    ),
)]
async fn acquire(
    Extract(state): Extract<State>,
    Named(name): Named<LockName>,
    query: Query,
    outgoing: Option<Extension<Outgoing>>,
    Json(wanted): Json<Wanted>,
) -> Result<Response, Problem> {
    query.finish()?;
    let request = wanted.request(name.clone())?;
    if let Some(Extension(outgoing)) = outgoing {
        outgoing.waits();
    }
    let holder = tokio::select! {
        // What was given just now is told although the process stops.
        biased;
        holder = state.parts.locks.acquire(request) => holder?,
        () = state.stopping.cancelled() => {
            return Err(Problem::new(
                Kind::Stopping,
                "this process is stopping; the place in line is kept for 5 seconds",
            ));
        }
    };
    Ok(wire::json(StatusCode::OK, &HeldLock::new(&name, holder)))
}

/// Describe a lock: who holds it, until when, and who waits.
#[utoipa::path(
    get, path = "/v1/locks/{name}", tag = "locks", operation_id = "describe_lock",
    params(("name" = String, Path, description = "The lock", min_length = 1, max_length = 100,
        pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "nightly-report")),
    responses((status = 200, description = "The lock", body = Lock), NoLock, Reads),
)]
async fn describe(
    Extract(state): Extract<State>,
    Named(name): Named<LockName>,
    query: Query,
) -> Result<Response, Problem> {
    query.finish()?;
    let lock = state.parts.locks.describe(&name).await?;
    Ok(wire::json(StatusCode::OK, &Lock::from(lock)))
}

/// Release a lock that is held under a token. Repeating it changes nothing, and it is no error if the lock is no longer held under
/// that token.
#[utoipa::path(
    delete, path = "/v1/locks/{name}", tag = "locks", operation_id = "release_lock",
    params(
        ("name" = String, Path, description = "The lock", min_length = 1, max_length = 100,
            pattern = "^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", example = "nightly-report"),
        ("token" = i64, Query, description = "The token under which it is held", minimum = 1,
            maximum = 9_007_199_254_740_991_i64),
    ),
    responses((status = 204, description = "The lock is not held under this token"), Writes),
)]
async fn release(
    Extract(state): Extract<State>,
    Named(name): Named<LockName>,
    mut query: Query,
) -> Result<Response, Problem> {
    let token = query.integer("token", 1..=TOKEN_MAX);
    query.finish()?;
    let token = token.ok_or_else(|| Problem::parameter("token", "is needed"))?;
    state.parts.locks.release(name, token).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}
