//! What nodes write for themselves: heartbeats, who is to hold what, leases taken and given back. Nobody asks for it and nobody repeats it
//! but they. The connection is cut right before, or right after, each was forwarded; the node must go on, and every epoch
//! have one owner.

use serde_json::{Value, json};

use super::{Cut, Mark, Snare, bigint};
use crate::history::owners::check;
use crate::nodes::{node, settled};
use crate::support::consumer::{items, publish};
use crate::support::leases::{events, watch};
use crate::support::{self, Action, Consumer, Http, Program, Proxy};
use sqlx::{Connection as _, PgConnection};

const TTL_SECONDS: f64 = 2.0;
const QUEUES: usize = 8;
/// Looks like no other parameter.
const FIRST_NODE: i64 = 5_654_321;

#[derive(Debug, Clone, Copy)]
enum Write {
    Heartbeat,
    Assignment,
    GiveBack,
    Take,
}

impl Write {
    /// By its parameters: how many, that the node's number is the first, and what they are.
    fn mark(self, node: i64) -> Mark {
        let call = |count: i16| [&count.to_be_bytes()[..], &bigint(node)].concat();
        let array_of = |kind: i32| [&[0; 4][..], &kind.to_be_bytes()].concat();
        let (texts, numbers) = (array_of(25), array_of(20));
        let ttl = [&8_i32.to_be_bytes()[..], &TTL_SECONDS.to_be_bytes()].concat();
        Mark {
            bytes: match self {
                Self::Heartbeat => vec![[call(5), ttl].concat()],
                Self::Assignment => vec![call(5), numbers],
                Self::GiveBack => vec![call(2), texts],
                Self::Take => vec![call(4), texts],
            },
            cut: Cut::Statement,
            passes: 0,
        }
    }
}

/// The node itself, as it sees it.
async fn own(http: &Http) -> Value {
    let (_, cluster) = http.get("/v1/cluster").await;
    let mut nodes = cluster["nodes"].as_array().unwrap().iter();
    let own = nodes.find(|node| node["node"] == cluster["node"]);
    own.expect("a node sees itself").clone()
}

struct Pair {
    snare: Snare,
    url: String,
    one: Program,
    number: i64,
}

impl Pair {
    async fn sprung(&self, write: Write, action: Action) {
        support::eventually(&format!("{write:?} to be cut by {action:?}"), || async {
            self.snare.has_sprung().then_some(())
        })
        .await;
    }

    fn queue(&self, number: usize) -> Consumer {
        Consumer {
            http: self.one.http.clone(),
            queue: format!("q{number}"),
        }
    }

    async fn heartbeat(&self, action: Action) {
        let before = own(&self.one.http).await;
        self.snare.arm(Write::Heartbeat.mark(self.number), action);
        self.sprung(Write::Heartbeat, action).await;
        support::eventually("the node to live on", || async {
            let now = own(&self.one.http).await;
            assert_eq!(now["node"], self.number, "it is another one now");
            let later = support::consumer::time(&now["expires_at"]);
            (later > support::consumer::time(&before["expires_at"])).then_some(())
        })
        .await;
    }

    /// Another node comes, with a write of the first one cut, and goes, with its taking of what that had cut.
    async fn join_and_leave(&self, write: Write, action: Action) {
        publish(&self.one.http, "orders.created", 3).await;
        let mut taken = Vec::new();
        for number in 0..QUEUES {
            taken.push(self.queue(number).take(3, 600).await);
        }
        self.snare.arm(write.mark(self.number), action);
        let mut two = node(&self.url).await;
        settled(&self.one.http, 2).await;
        self.sprung(write, action).await;
        self.snare.arm(Write::Take.mark(self.number), action);
        assert!(two.stop().await.success());
        settled(&self.one.http, 1).await;
        self.sprung(Write::Take, action).await;
        settled(&self.one.http, 1).await;
        for (number, taken) in taken.iter().enumerate() {
            let queue = self.queue(number);
            let nothing = queue.receive(&json!({"wait_seconds": 0})).await;
            assert_eq!(nothing["deliveries"], json!([]), "before its deadline");
            let acks = items(taken, &json!({}));
            queue.settle_all("ack", &acks, "acked").await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_go_on_whose_own_writes_are_cut() {
    let database = support::database().await;
    watch(&database.url).await;
    let mut direct = PgConnection::connect(&database.url).await.unwrap();
    let numbers =
        "select setval(pg_get_serial_sequence('postroad_broker.node', 'incarnation'), $1)";
    let set = sqlx::query(numbers).bind(FIRST_NODE).execute(&mut direct);
    set.await.unwrap();
    let proxy: Proxy = support::proxy(&database.url).await;
    let one = node(&proxy.url(&database.url)).await;
    let pair = Pair {
        snare: Snare::on(&proxy),
        number: own(&one.http).await["node"].as_i64().unwrap(),
        url: database.url.clone(),
        one,
    };
    for number in 0..QUEUES {
        let path = format!("/v1/queues/q{number}");
        let topics = json!({"topics": ["orders.*"]});
        pair.one.http.declare(&path, &topics).await;
    }
    settled(&pair.one.http, 1).await;
    for action in [Action::CutBefore, Action::CutAfter] {
        pair.heartbeat(action).await;
        pair.join_and_leave(Write::Assignment, action).await;
        pair.join_and_leave(Write::GiveBack, action).await;
    }
    assert_eq!(own(&pair.one.http).await["node"], pair.number);
    assert_eq!(check(&events(&database.url).await), Vec::<String>::new());
}
