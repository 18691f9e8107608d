//! The broker's database is put back behind tables whose rows leave as they are relayed: what was relayed after the copy was made is
//! nowhere any more. That is known and told, durably; all else comes once and in order, and the relay goes on.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use serde_json::{Value, json};

use super::{beaten, history};
use crate::relay::mapped::{Kind, count_rows};
use crate::relay::{Logged, Origin, read_log, shop};
use crate::support::consumer::patiently;
use crate::support::{self, Http, Program};

async fn node(url: &str, kind: Kind, origin: &Origin) -> Program {
    let draft = kind.draft();
    let mut mapping = json!({"url_env": "SHOP_URL", "pickup": "delete"});
    for (name, given) in [("layout", draft.layout), ("table", draft.table)] {
        if let Some(given) = given {
            mapping[name] = json!(given);
        }
    }
    mapping["columns"] = json!(draft.columns);
    mapping["extensions"] = json!(draft.extensions);
    let (origins, relay) = (json!({ "shop": mapping }).to_string(), origin.relay_url());
    let variables = [
        ("POSTROAD_NODE_TTL_SECONDS", "2"),
        ("POSTROAD_NODE_HEARTBEAT_SECONDS", "0.2"),
        ("POSTROAD_DATABASE_POOL_SIZE", "8"),
        ("POSTROAD_ORIGINS", origins.as_str()),
        ("SHOP_URL", relay.as_str()),
    ];
    support::program(url, &variables).await
}

async fn produce(origin: &Origin, milliseconds: u64) {
    let producers = shop::Producers::start(origin, 3, "select 1");
    tokio::time::sleep(Duration::from_millis(milliseconds)).await;
    producers.finish().await;
}

/// Waits until the table is empty.
async fn relayed(kind: Kind, origin: &Origin) {
    support::eventually("all to be relayed", || async {
        (count_rows(kind, origin).await == 0).then_some(())
    })
    .await;
}

/// The mapped origin, as a node tells of all, once some node has read what its relay knew before.
async fn known(http: &Http) -> Value {
    support::eventually("the origin to be known", || async {
        let answer = patiently(http, reqwest::Method::GET, "/v1/origins", None).await;
        let mut origins = answer["origins"].as_array().unwrap().iter();
        let shop = origins.find(|origin| origin["name"] == "shop").unwrap();
        (!shop["gap_count"].is_null()).then(|| shop.clone())
    })
    .await
}

/// All but what is lost is there, once, and the versions of each key rise.
fn check(kind: Kind, committed: &HashSet<String>, lost: &HashSet<String>, log: &[Logged]) {
    let ids: HashSet<String> = log.iter().map(|message| message.id.clone()).collect();
    assert_eq!(ids.len(), log.len(), "doubled");
    let kept: HashSet<String> = committed.difference(lost).cloned().collect();
    assert!(ids == kept, "{:?}", ids.symmetric_difference(&kept));
    let mut versions: HashMap<&str, i64> = HashMap::new();
    for message in log.iter().filter(|_| kind.keeps_order()) {
        let (Some(key), Some(version)) = (message.key.as_deref(), message.version) else {
            continue;
        };
        let last = versions.insert(key, version).unwrap_or_default();
        assert!(version > last, "{key}: {version} after {last}");
    }
    eprintln!(
        "{kind:?}: {} messages, {} lost and known",
        log.len(),
        lost.len()
    );
}

async fn put_back(kind: Kind) {
    let mut server = support::cluster().await;
    let url = server.create_database("broker").await;
    let origins = support::cluster().await;
    let origin = kind.install(&origins.create_database("shop").await).await;
    shop::open(&origin).await;
    let proxy = support::proxy(&url).await;
    let through = proxy.url(&url);
    let mut nodes = [
        node(&through, kind, &origin).await,
        node(&through, kind, &origin).await,
    ];
    produce(&origin, 400).await;
    relayed(kind, &origin).await;
    let copied = shop::committed(&origin).await;
    let copy = server.copy_data().await;
    // Relayed, taken out of the table, and in no copy.
    produce(&origin, 400).await;
    relayed(kind, &origin).await;
    let before = shop::committed(&origin).await;
    let lost: HashSet<String> = before.difference(&copied).cloned().collect();
    assert!(!lost.is_empty());
    for node in &nodes {
        beaten(&node.http).await;
        assert_eq!(known(&node.http).await["gap_count"], 0);
    }
    proxy.cut();
    // Waits in the table until the broker is back.
    produce(&origin, 300).await;
    server.put_back(&copy).await;
    proxy.open();
    let first_offset = history(&nodes[0].http, 2).await;
    assert_eq!(history(&nodes[1].http, 2).await, first_offset);
    assert_eq!(first_offset, copied.len() as u64 + 1);
    produce(&origin, 300).await;
    relayed(kind, &origin).await;
    let committed = shop::committed(&origin).await;
    check(kind, &committed, &lost, &read_log(&url).await);

    // Each node says so, also after all of them were started again.
    let mut gap_at = Value::Null;
    for is_again in [false, true] {
        if is_again {
            for node in &mut nodes {
                assert!(node.stop().await.success());
                node.start().await;
            }
        }
        let mut gaps = Vec::new();
        for node in &nodes {
            let shop = known(&node.http).await;
            assert_eq!(shop["gap_count"], 1, "{shop}");
            let now = shop["gap_at"].clone();
            assert!(
                now.is_string() && (gap_at.is_null() || gap_at == now),
                "{shop}, {gap_at}"
            );
            gap_at = now;
            let (_, metrics) = node.http.get("/metrics").await;
            let metrics = metrics.as_str().unwrap().lines();
            gaps.extend(
                metrics
                    .filter(|line| line.starts_with("postroad_relay_gaps_total{"))
                    .map(str::to_owned),
            );
        }
        // Whoever has it, or had it.
        assert!(gaps.iter().any(|line| line.ends_with(" 1")), "{gaps:?}");
    }
    produce(&origin, 200).await;
    relayed(kind, &origin).await;
    let committed = shop::committed(&origin).await;
    check(kind, &committed, &lost, &read_log(&url).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_behind_a_table_with_numbers_read_by_deletion() {
    put_back(Kind::NumberedDelete).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_behind_a_table_read_by_deletion() {
    put_back(Kind::DebeziumDelete).await;
}
