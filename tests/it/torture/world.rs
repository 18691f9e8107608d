//! What a run works on: nodes, each by way of a proxy to the broker's database; that database's server; origins on servers of their
//! own, by way of proxies too.

use std::path::{Path, PathBuf};
use std::time::Duration;

use postroad::store::{self, Database};
use rustix::process::Signal;
use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};

use super::{Sizes, rare, tools};
use crate::relay::mapped::Kind;
use crate::relay::{Origin, shop};
use crate::support::cluster::Folder;
use crate::support::process::is_stopped;
use crate::support::{self, Cluster, Http, Program, Proxy, audit, clock, leases};

/// The shortest that can be configured.
pub const TTL: Duration = Duration::from_secs(2);

/// Queues that nobody publishes to: so every node has some to lose.
const IDLE_QUEUES: usize = 12;

/// The origin whose messages leave a table of its own as they are relayed.
pub const MAPPED: &str = "mapped";
const MAPPED_KIND: Kind = Kind::NumberedDelete;

/// How the world of a run differs from the plainest.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ground {
    /// The broker's Postgres flushes, and its disk is a small one where that can be had.
    pub has_disk: bool,
    /// The clocks of the nodes and of the broker's database can be set, and jump by so many seconds at most.
    pub clock_jump: Option<i64>,
    /// What comes seldom comes within seconds: a mapped table, messages that are due later, small leaves and journals.
    pub is_rich: bool,
}

pub struct Node {
    pub program: Program,
    pub proxy: Proxy,
    /// By which a failpoint is armed while it runs.
    pub point: PathBuf,
    /// What its clock is ahead by, in a file that libfaketime reads.
    pub clock: Option<PathBuf>,
}

pub struct Shop {
    pub name: String,
    pub origin: Origin,
    /// None: in the broker's own database.
    pub server: Option<Cluster>,
    pub proxy: Option<Proxy>,
}

pub struct World {
    pub nodes: Vec<Node>,
    pub shops: Vec<Shop>,
    /// The broker's database, directly.
    pub url: String,
    pub server: Cluster,
    /// Whether the server's disk is small enough to be filled.
    pub is_small: bool,
    pub ground: Ground,
    /// What the database's clock is ahead by, in seconds.
    pub clock_ahead: i64,
    /// By how much it jumped, all in all, the hours left out.
    pub clock_jumped: i64,
    /// Logs of the nodes.
    pub folder: tempfile::TempDir,
}

impl World {
    pub async fn open(sizes: &Sizes, ground: Ground) -> Self {
        let others = (0..sizes.origins).map(|number| tokio::spawn(origin(number)));
        let others: Vec<_> = others.collect();
        let (server, is_small) = server(ground).await;
        let url = server.create_database("broker").await;
        let database = Database::new(&url, 2).unwrap();
        store::migrate::broker(&database).await.unwrap();
        database.close().await;
        let local = Origin::install(&url).await;
        shop::open(&local).await;
        audit::install(&url).await;
        leases::watch(&url).await;
        if ground.clock_jump.is_some() {
            clock::settable(&url).await;
        }
        let mut shops = vec![Shop {
            name: "local".to_owned(),
            origin: local,
            server: None,
            proxy: None,
        }];
        for other in others {
            shops.push(other.await.unwrap());
        }
        if ground.is_rich {
            let server = shops[1].server.as_ref().expect("a server of its own");
            shops.push(mapped(server).await);
        }
        let folder = tempfile::tempdir().unwrap();
        let mut world = Self {
            nodes: Vec::new(),
            shops,
            url,
            server,
            is_small,
            ground,
            clock_ahead: 0,
            clock_jumped: 0,
            folder,
        };
        let nodes = (0..sizes.nodes).map(|number| world.node(number, ground));
        world.nodes = futures_util::future::join_all(nodes).await;
        world.declare().await;
        world.settled().await;
        world
    }

    async fn node(&self, number: usize, ground: Ground) -> Node {
        let proxy = support::proxy(&self.url).await;
        let mut variables = vec![
            ("POSTROAD_NODE_TTL_SECONDS".to_owned(), "2".to_owned()),
            (
                "POSTROAD_NODE_HEARTBEAT_SECONDS".to_owned(),
                "0.2".to_owned(),
            ),
            ("POSTROAD_DATABASE_POOL_SIZE".to_owned(), "8".to_owned()),
        ];
        let mut origins = serde_json::Map::new();
        for shop in &self.shops {
            if let Some(proxy) = &shop.proxy {
                let variable = shop.name.to_uppercase().replace('-', "_");
                let mut origin = json!({"url_env": variable});
                if shop.name == MAPPED {
                    let draft = MAPPED_KIND.draft();
                    origin["table"] = json!(draft.table);
                    origin["pickup"] = json!(draft.pickup);
                    origin["columns"] = json!(draft.columns);
                    origin["extensions"] = json!(draft.extensions);
                }
                origins.insert(shop.name.clone(), origin);
                variables.push((variable, proxy.url(&shop.origin.relay_url())));
            }
        }
        let origins = Value::Object(origins).to_string();
        variables.push(("POSTROAD_ORIGINS".to_owned(), origins));
        let clock = match (ground.clock_jump.is_some(), tools::fake_time()) {
            (true, Some(library)) => {
                let file = self.folder.path().join(format!("clock-{number}"));
                tools::set_clock(&file, 0);
                variables.extend(tools::clock_variables(&library, &file));
                Some(file)
            }
            _ => None,
        };
        let point = self.folder.path().join(format!("point-{number}"));
        if cfg!(feature = "failpoints") {
            let file = point.to_str().unwrap().to_owned();
            variables.push(("POSTROAD_FAILPOINTS_FILE".to_owned(), file));
        }
        let mut limits = Vec::new();
        if ground.clock_jump.is_some() {
            // The database's clock is the one that is set, and is believed.
            limits.push("clock-lead-seconds=315360000");
        }
        if ground.is_rich {
            limits.push(rare::LIMITS);
        }
        if cfg!(feature = "failpoints") && !limits.is_empty() {
            variables.push(("POSTROAD_LIMITS".to_owned(), limits.join(",")));
        }
        if cfg!(feature = "failpoints") && ground.is_rich {
            let grace = ("POSTROAD_OUTBOX_GRACE_SECONDS".to_owned(), "1".to_owned());
            variables.push(grace);
        }
        let variables: Vec<(&str, &str)> = variables
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        let log = self.folder.path().join(format!("node-{number}.log"));
        let url = proxy.url(&self.url);
        let program = support::program_with_log(&url, &variables, Some(log)).await;
        Node {
            program,
            proxy,
            point,
            clock,
        }
    }

    /// The queues of the run, and some that idle.
    async fn declare(&self) {
        let http = &self.nodes[0].program.http;
        if self.ground.is_rich {
            let path = format!("/v1/streams/{}", rare::BRIEF);
            http.declare(&path, &rare::brief()).await;
        }
        for (name, members) in super::load::queues() {
            http.declare(&format!("/v1/queues/{name}"), &members).await;
        }
        for number in 0..IDLE_QUEUES {
            let idle = json!({"topics": ["nothing"]});
            http.declare(&format!("/v1/queues/idle-{number}"), &idle)
                .await;
        }
    }

    /// Waits until all nodes have their shares.
    async fn settled(&self) {
        let nodes = self.nodes.len();
        crate::nodes::settled(&self.nodes[0].program.http, nodes).await;
    }

    pub fn logs(&self) -> &Path {
        self.folder.path()
    }

    /// Clients that give up on a node that sleeps.
    pub fn clients(&self) -> Vec<Http> {
        let client = |node: &Node| Http {
            base: node.program.http.base.clone(),
            client: reqwest::Client::builder()
                .timeout(Duration::from_millis(2_500))
                .build()
                .unwrap(),
        };
        self.nodes.iter().map(client).collect()
    }

    /// The broker's database, if it can be reached.
    pub async fn connect(&self) -> Option<PgConnection> {
        PgConnection::connect(&self.url).await.ok()
    }

    /// The number under which a node is known to the others, if it is alive and the database can be asked.
    pub async fn incarnation(&self, node: usize) -> Option<i64> {
        let mut connection = self.connect().await?;
        sqlx::query_scalar(
            "select incarnation from postroad_broker.node where url = $1 and dead_at is null",
        )
        .bind(&self.nodes[node].program.http.base)
        .fetch_optional(&mut connection)
        .await
        .ok()?
    }
}

impl Node {
    /// Starts it again. While its database is away it may end, and is started once more, as a service manager would.
    pub async fn start(&mut self) {
        for _ in 0..60 {
            match self.program.try_start().await {
                Ok(()) => return,
                Err(_) => tokio::time::sleep(Duration::from_millis(500)).await,
            }
        }
        panic!("a node does not start; see its log");
    }

    pub async fn kill(&mut self) {
        if !self.program.has_ended() {
            self.program.kill().await;
        }
    }

    pub fn is_stopped(&self) -> bool {
        is_stopped(self.program.pid())
    }

    pub fn go_on(&self) {
        self.program.signal(Signal::CONT);
    }
}

/// An origin on a server of its own.
async fn origin(number: usize) -> Shop {
    let server = support::cluster().await;
    let origin = Origin::install(&server.create_database("shop").await).await;
    shop::open(&origin).await;
    let proxy = support::proxy(&origin.url).await;
    Shop {
        name: format!("shop-{number}"),
        origin,
        server: Some(server),
        proxy: Some(proxy),
    }
}

/// An origin with a table that was there before, in a database beside another's.
async fn mapped(server: &Cluster) -> Shop {
    let url = server.create_database("mapped").await;
    let origin = MAPPED_KIND.install(&url).await;
    shop::open(&origin).await;
    let proxy = support::proxy(&origin.url).await;
    Shop {
        name: MAPPED.to_owned(),
        origin,
        server: None,
        proxy: Some(proxy),
    }
}

/// The broker's server, and whether its disk is a small one.
async fn server(ground: Ground) -> (Cluster, bool) {
    if !ground.has_disk {
        return (support::cluster().await, false);
    }
    let folder = Folder::new();
    let is_small = tools::mount_small(&folder.path);
    let durable = [
        ("fsync", "on"),
        ("full_page_writes", "on"),
        ("max_wal_size", "64MB"),
        ("min_wal_size", "32MB"),
        ("shared_buffers", "32MB"),
    ];
    (support::cluster_in(folder, &durable).await, is_small)
}
