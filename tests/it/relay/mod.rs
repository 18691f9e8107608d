//! The relay against real outboxes. Producers and relays run as the granted roles, never as the owner, and what must be in the
//! stream is read from a ledger that the producers' own transactions wrote.

mod backlog;
mod claims;
mod expected;
mod faults;
mod install;
mod large;
pub mod mapped;
mod order;
mod race;
mod refused;
mod rejected;
mod rerelay;
mod roles;
mod rotation;
mod scheduled;
pub mod shop;
mod time_travel;
mod wrong;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use postroad::domain::name::OriginName;
use postroad::relay::{self, OriginOptions, State, Status};
use postroad::store::{self, Database};
use postroad::supervisor::Supervisor;
use postroad::{cluster, stream, topic};
use prometheus_client::registry::Registry;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::sync::watch;

/// The engines that a relay needs, on a broker's database.
pub struct Rig {
    pub relay: relay::Handle,
    pub cluster: cluster::Handle,
    supervisors: [Supervisor; 3],
}

/// Starts the engines with these origins.
pub async fn rig(db: &Database, origins: &[(&str, Option<&str>)]) -> Rig {
    rig_with(db, origins, relay::Options::default()).await
}

pub async fn rig_with(
    db: &Database,
    origins: &[(&str, Option<&str>)],
    options: relay::Options,
) -> Rig {
    let origins = origins
        .iter()
        .map(|(name, url)| OriginOptions {
            name: OriginName::parse(name).unwrap(),
            url: url.map(str::to_owned),
            mapping: None,
        })
        .collect();
    rig_of(db, relay::Options { origins, ..options }).await
}

/// Starts the engines with the origins of the options.
pub async fn rig_of(db: &Database, options: relay::Options) -> Rig {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut registry = Registry::default();
    let root = Supervisor::new();
    let [first, second, third] = [root.child(), root.child(), root.child()];
    let cluster_options = cluster::Options {
        allow_unsafe_postgres: true,
        ..cluster::Options::new(format!("http://relay-test-{}-{number}", std::process::id()))
    };
    let cluster = cluster::start(cluster_options, db.clone(), &third, &mut registry)
        .await
        .unwrap();
    let stream = stream::start(
        stream::Options {
            // Some tests set the database's clock.
            clock_lead: Duration::from_secs(10 * 365 * 86_400),
            ..stream::Options::default()
        },
        db.clone(),
        cluster.clone(),
        &second,
        &mut registry,
    )
    .await
    .unwrap();
    let topics = topic::start(db.clone(), &second).await.unwrap();
    let relay = relay::start(
        options,
        db.clone(),
        (stream.clone(), topics),
        cluster.clone(),
        &first,
        &mut registry,
    )
    .await
    .unwrap();
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    assert!(text.contains("postroad_relay_lag_rows"), "{text}");
    Rig {
        relay,

        cluster,
        supervisors: [first, second, third],
    }
}

impl Rig {
    pub fn watch(&self, origin: &str) -> watch::Receiver<Status> {
        self.relay
            .watch(&OriginName::parse(origin).unwrap())
            .unwrap()
    }

    pub fn status(&self, origin: &str) -> Status {
        self.watch(origin).borrow().clone()
    }

    /// Waits for a status, 3 minutes at most: a million rows take their time in a debug build.
    pub async fn until(
        &self,
        origin: &str,
        what: &str,
        is_so: impl FnMut(&Status) -> bool,
    ) -> Status {
        let mut status = self.watch(origin);
        let waiting = status.wait_for(is_so);
        let found = tokio::time::timeout(Duration::from_secs(180), waiting).await;
        match found {
            Ok(status) => status.unwrap().clone(),
            Err(_) => panic!("waited 3 minutes for {what}: {:?}", self.status(origin)),
        }
    }

    /// Waits until everything committed before this call is relayed.
    pub async fn caught_up(&self, origin: &str) -> Status {
        let now = self.cluster.now();
        self.until(origin, "the relay to catch up", |status| {
            status.state == State::Running && status.relayed_through.is_some_and(|at| at > now)
        })
        .await
    }

    pub async fn stop(self) {
        for supervisor in &self.supervisors {
            supervisor.stop(Duration::from_secs(30)).await.unwrap();
        }
    }
}

/// Runs a statement.
pub async fn execute(connection: &mut PgConnection, text: &str) {
    sqlx::raw_sql(AssertSqlSafe(text.to_owned()))
        .execute(connection)
        .await
        .unwrap_or_else(|error| panic!("{text}: {error}"));
}

/// Connects as a URL says.
pub async fn connect(url: &str) -> PgConnection {
    PgConnection::connect(url).await.unwrap()
}

/// The URL with another user in it.
pub fn as_user(url: &str, user: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap();
    let (_, place) = rest.split_once('@').unwrap();
    format!("{scheme}://{user}@{place}")
}

/// An origin: the outbox installed in a database, with a user of each role.
#[derive(Clone)]
pub struct Origin {
    /// As its owner.
    pub url: String,
    /// What producers insert into.
    pub layout: shop::Layout,
}

/// A user of each role, once the roles are there; with settings that the relay must not go by.
const SHOP_ROLES: &str = "do $$ declare kind text; begin
    begin
        create role shop_relay login;
        alter role shop_relay set default_transaction_isolation = 'serializable';
        alter role shop_relay set statement_timeout = '50ms';
        alter role shop_relay set default_transaction_read_only = on;
        create role shop_producer login;
    exception when duplicate_object or unique_violation then null;
    end;
    foreach kind in array array['relay', 'producer'] loop
        begin
            execute format('grant %I to %I', 'postroad_' || kind || '_' || current_database(), 'shop_' || kind);
        exception when undefined_object then null;
        end;
    end loop;
end $$";

impl Origin {
    /// Installs an outbox. The users' session defaults are ones that ruin naive relays.
    pub async fn install(url: &str) -> Self {
        let database = Database::new(url, 2).unwrap();
        let grants = store::migrate::origin(&database).await.unwrap();
        assert_eq!(grants, store::migrate::Grants::Given);
        database.close().await;
        let mut owner = connect(url).await;
        execute(&mut owner, SHOP_ROLES).await;
        Self {
            url: url.to_owned(),
            layout: shop::Layout::Own,
        }
    }

    /// As a relay may.
    pub fn relay_url(&self) -> String {
        as_user(&self.url, "shop_relay")
    }

    /// As a producer may.
    pub fn producer_url(&self) -> String {
        as_user(&self.url, "shop_producer")
    }

    pub async fn owner(&self) -> PgConnection {
        connect(&self.url).await
    }

    pub async fn producer(&self) -> PgConnection {
        connect(&self.producer_url()).await
    }
}

/// A message as the log has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logged {
    pub id: String,
    pub key: Option<String>,
    pub version: Option<i64>,
}

/// The log of the broker's database, in offset order, read from its table.
pub async fn read_log(url: &str) -> Vec<Logged> {
    let mut connection = connect(url).await;
    let rows: Vec<(i32, i64, String, Option<String>, Option<String>)> = sqlx::query_as(
        "select stream_id, \"offset\", id, key, case when data_kind = 1 then convert_from(data, 'UTF8')::json ->> 'version' end
        from postroad_broker.message order by stream_id, \"offset\"",
    )
    .fetch_all(&mut connection)
    .await
    .unwrap();
    for (index, (_, offset, ..)) in rows.iter().enumerate() {
        assert_eq!(*offset, index as i64 + 1, "offsets are dense, from 1");
    }
    rows.into_iter()
        .map(|(_, _, id, key, version)| Logged {
            id,
            key,
            version: version.map(|version| version.parse().unwrap()),
        })
        .collect()
}

/// What is wrong between a ledger of what committed and what was relayed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub lost: usize,
    pub twice: usize,
    pub phantom: usize,
    pub disordered: usize,
}

/// Compares. Order is judged per key, by version, over the messages that the ledger has.
pub fn judge(committed: &HashSet<String>, relayed: &[Logged]) -> Verdict {
    let mut seen = HashSet::new();
    let mut versions: HashMap<&str, i64> = HashMap::new();
    let mut verdict = Verdict::default();
    for message in relayed {
        if !seen.insert(message.id.as_str()) {
            verdict.twice += 1;
            continue;
        }
        if !committed.contains(&message.id) {
            verdict.phantom += 1;
            continue;
        }
        if let (Some(key), Some(version)) = (&message.key, message.version) {
            let last = versions.entry(key).or_default();
            if version != *last + 1 {
                verdict.disordered += 1;
            }
            *last = version;
        }
    }
    verdict.lost = committed
        .iter()
        .filter(|id| !seen.contains(id.as_str()))
        .count();
    verdict
}

#[test]
fn the_judge_finds_each_fault() {
    let message = |id: &str, version| Logged {
        id: id.to_owned(),
        key: Some("k".to_owned()),
        version: Some(version),
    };
    let committed = HashSet::from(["a".to_owned(), "b".to_owned(), "c".to_owned()]);
    let good = [message("a", 1), message("b", 2), message("c", 3)];
    assert_eq!(judge(&committed, &good), Verdict::default());
    assert_eq!(judge(&committed, &good[..2]).lost, 1);
    let twice = [good[0].clone(), good[0].clone(), good[1].clone()];
    assert_eq!(judge(&committed, &twice).twice, 1);
    assert_eq!(judge(&committed, &[message("x", 1)]).phantom, 1);
    let turned = [message("b", 2), message("a", 1), message("c", 3)];
    assert!(judge(&committed, &turned).disordered > 0);
}
