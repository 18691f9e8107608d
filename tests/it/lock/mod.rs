//! Users' locks: one holder at a time, the line, tokens that rise whatever happens to the database, and the fence where they are
//! checked.

mod faults;
mod fence;
mod http;
mod line;
mod lists;

use std::time::Duration;

use postroad::domain::name::LockName;
use postroad::lock::{self, Error, Handle, Holder, Request};
use postroad::store::Database;
use postroad::supervisor::Supervisor;
use prometheus_client::registry::Registry;

const NOT_AT_ALL: Duration = Duration::ZERO;
/// Longer than any test.
const LONG: Duration = Duration::from_secs(3_000);

/// What takes locks on one node.
struct Node {
    locks: Handle,
    supervisor: Supervisor,
}

impl Node {
    fn start(url: &str) -> Self {
        let supervisor = Supervisor::new();
        let database = Database::new(url, 2).unwrap();
        Self {
            locks: lock::start(database, &supervisor, &mut Registry::default()),
            supervisor,
        }
    }

    async fn acquire(&self, owner: &str, ttl: Duration, wait: Duration) -> Result<Holder, Error> {
        self.locks.acquire(request(owner, None, ttl, wait)).await
    }

    async fn renew(&self, owner: &str, token: i64, ttl: Duration) -> Result<Holder, Error> {
        let renewal = request(owner, Some(token), ttl, NOT_AT_ALL);
        self.locks.acquire(renewal).await
    }

    async fn release(&self, token: i64) {
        self.locks.release(name(), token).await.unwrap();
    }

    async fn waiting(&self) -> Vec<String> {
        let lock = self.locks.describe(&name()).await.unwrap();
        lock.waiters.into_iter().map(|w| w.owner).collect()
    }

    async fn stop(self) {
        self.supervisor.stop(Duration::from_secs(30)).await.unwrap();
    }
}

fn name() -> LockName {
    LockName::parse("report").unwrap()
}

fn request(owner: &str, token: Option<i64>, ttl: Duration, wait: Duration) -> Request {
    Request {
        name: name(),
        owner: owner.to_owned(),
        token,
        ttl,
        wait,
    }
}

/// Who has it and how many are before, of a request that was refused.
fn refused(outcome: Result<Holder, Error>) -> (Option<String>, u64) {
    match outcome {
        Err(Error::Held { holder, ahead, .. }) => (holder.map(|holder| holder.owner), ahead),
        other => panic!("{other:?}"),
    }
}

/// A lock's time is up, whatever the clock says.
async fn let_expire(url: &str) {
    execute(
        url,
        "update postroad_broker.user_lock set expires_at = clock_timestamp()",
    )
    .await;
}

async fn execute(url: &str, sql: &str) {
    use sqlx::Connection as _;
    let mut connection = sqlx::PgConnection::connect(url).await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned()))
        .execute(&mut connection)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"));
}
