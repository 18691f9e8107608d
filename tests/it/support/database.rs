//! A database per test, cloned from a migrated template on the run's shared server.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use postroad::store::{self, Database};
use sqlx::postgres::{PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::sync::OnceCell;

use super::cluster::{self, Cluster};
use super::{background, finish};

/// A database of one test's own. Dropped with the value.
#[derive(Debug)]
pub struct TestDatabase {
    /// Its URL, as a superuser.
    pub url: String,
    /// Its name.
    pub name: String,
    /// The store's handle on it, with a pool of 10.
    pub database: Database,
}

/// The name of a role of the database that a URL names, as an install makes it.
pub fn role(kind: &str, url: &str) -> String {
    let place = url.split('?').next().unwrap_or_default();
    let name = place.rsplit('/').next().unwrap_or_default();
    format!("postroad_{kind}_{name}")
}

impl TestDatabase {
    /// The name of one of its roles, once Postroad is installed under its name.
    pub fn role(&self, kind: &str) -> String {
        role(kind, &self.url)
    }

    /// A connection as the superuser, with the server's own session defaults.
    pub async fn connect(&self) -> PgConnection {
        PgConnection::connect(&self.url).await.unwrap()
    }

    /// A pool as the superuser, for producers of a test.
    pub fn pool(&self, size: u32) -> PgPool {
        PgPoolOptions::new()
            .max_connections(size)
            .connect_lazy(&self.url)
            .unwrap()
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        let name = self.name.clone();
        let dropped = finish(async move {
            let statement = format!("drop database if exists {name} with (force)");
            let dropped = sqlx::query(AssertSqlSafe(statement))
                .execute(&shared().await.admin)
                .await;
            for kind in ["producer", "relay", "consumer", "fenced"] {
                // Those of a cluster of its own are gone already, and one with rights elsewhere stays.
                let statement = format!("drop role if exists postroad_{kind}_{name}");
                let _ = sqlx::query(AssertSqlSafe(statement))
                    .execute(&shared().await.admin)
                    .await;
            }
            dropped.map(|_| ()).map_err(|error| error.to_string())
        });
        if let Err(error) = dropped {
            eprintln!("dropping the database {} failed: {error}", self.name);
        }
    }
}

/// The run's shared server.
struct Shared {
    /// Its URL without the database's name, as (before, after).
    url: (String, String),
    admin: PgPool,
    template: OnceCell<String>,
    _cluster: Option<Cluster>,
}

impl Shared {
    fn url(&self, database: &str) -> String {
        format!("{}{database}{}", self.url.0, self.url.1)
    }

    async fn start() -> Self {
        let own = std::env::var("DATABASE_URL")
            .ok()
            .filter(|url| !url.is_empty());
        let (url, cluster) = match own {
            Some(url) => (url, None),
            None => {
                let cluster = cluster::cluster().await;
                (cluster.url("postgres"), Some(cluster))
            }
        };
        let admin = PgPoolOptions::new()
            .max_connections(4)
            .acquire_timeout(Duration::from_secs(60))
            .connect(&url)
            .await
            .expect("DATABASE_URL is the URL of a superuser on a running server");
        let shared = Self {
            url: split_url(&url),
            admin,
            template: OnceCell::new(),
            _cluster: cluster,
        };
        shared.sweep().await;
        shared
    }

    /// Drops what runs that were killed left on a server that outlives them.
    async fn sweep(&self) {
        let names: Vec<String> = sqlx::query_scalar(
            "select datname from pg_database where datname like 'postroad\\_test\\_%'",
        )
        .fetch_all(&self.admin)
        .await
        .unwrap();
        for name in names {
            let pid = name.split('_').nth(2).unwrap_or_default();
            if std::path::Path::new("/proc/self").exists()
                && !std::path::Path::new("/proc").join(pid).exists()
            {
                // In use by a run on another machine: stays.
                let _ = self.create_or_drop(format!("drop database {name}")).await;
            }
        }
    }

    async fn create_or_drop(&self, statement: String) -> Result<(), sqlx::Error> {
        sqlx::query(AssertSqlSafe(statement))
            .execute(&self.admin)
            .await
            .map(|_| ())
    }

    /// The migrated template's name; made when first asked for.
    async fn template(&self) -> &str {
        self.template
            .get_or_init(|| async {
                let name = format!("postroad_test_{}_template", std::process::id());
                self.create_or_drop(format!("create database {name}"))
                    .await
                    .unwrap();
                let database = Database::new(&self.url(&name), 2).unwrap();
                migrate(&database).await;
                database.close().await;
                name
            })
            .await
    }
}

/// What the broker's start does to its database.
async fn migrate(database: &Database) {
    store::migrate::broker(database).await.unwrap();
    store::migrate::origin(database).await.unwrap();
    super::mutant::plant(database).await;
}

/// The shared server. It lives as long as the process, and so on the background runtime.
async fn shared() -> &'static Shared {
    static SHARED: OnceCell<Shared> = OnceCell::const_new();
    SHARED
        .get_or_init(|| async { background().spawn(Shared::start()).await.unwrap() })
        .await
}

/// From the migrated template without another.
async fn make(from: Option<String>) -> TestDatabase {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("postroad_test_{}_{number}", std::process::id());
    let made = name.clone();
    let url = background()
        .spawn(async move {
            let shared = shared().await;
            let template = match &from {
                None => shared.template().await,
                Some(name) => name,
            };
            // The last session of the original may still be on its way out.
            super::eventually("the template to be left alone", || async {
                let statement = format!("create database {made} template {template}");
                shared.create_or_drop(statement).await.ok()
            })
            .await;
            shared.url(&made)
        })
        .await
        .unwrap();
    let database = Database::new(&url, 10).unwrap();
    TestDatabase {
        url,
        name,
        database,
    }
}

/// A copy of a database that nobody is connected to.
pub async fn copy_of(original: &TestDatabase) -> TestDatabase {
    make(Some(original.name.clone())).await
}

/// A fresh database with Postroad's schemas, as a broker's start makes them.
pub async fn database() -> TestDatabase {
    make(None).await
}

/// A fresh database with nothing in it.
pub async fn empty_database() -> TestDatabase {
    make(Some("template1".to_owned())).await
}

/// Splits a URL around the database's name.
fn split_url(url: &str) -> (String, String) {
    let (main, query) = match url.split_once('?') {
        Some((main, query)) => (main, format!("?{query}")),
        None => (url, String::new()),
    };
    let scheme_end = main.find("://").map_or(0, |at| at + 3);
    let before = match main[scheme_end..].find('/') {
        Some(slash) => &main[..=scheme_end + slash],
        None => return (format!("{main}/"), query),
    };
    (before.to_owned(), query)
}
