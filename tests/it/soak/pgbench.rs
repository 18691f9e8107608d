//! pgbench as the producer: a client that knows nothing of Postroad runs the shop's transaction.

use std::io::Write as _;
use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;

use super::{relayed, size};
use crate::support;

const SCHEMA: &str = "
create schema bench;
create table bench.stock (product int primary key, version bigint not null default 0);
insert into bench.stock (product) select generate_series(1, 20);
create table bench.placed (product int not null, version bigint not null, primary key (product, version));";

/// About one in ten rolls back, after its insert into the outbox.
const SCRIPT: &str = "\
\\set product random(1, 20)
\\set fate random(1, 10)
begin;
update bench.stock set version = version + 1 where product = :product returning version \\gset
insert into bench.placed (product, version) values (:product, :version);
insert into postroad.outbox (topic, key, payload) values ('bench.placed', 'product-' || :product, json_build_object('product', :product, 'version', :version)::text);
\\if :fate = 1
rollback;
\\else
commit;
\\endif
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_stream_has_exactly_what_pgbench_committed() {
    let seconds = size("POSTROAD_SOAK_PGBENCH_SECONDS", 5);
    let Some(pgbench) = find_pgbench() else {
        println!("skipped: no pgbench beside the server's programs");
        return;
    };
    let database = support::database().await;
    let mut program = support::program(&database.url, &[]).await;
    let mut connection = database.connect().await;
    sqlx::raw_sql(SCHEMA)
        .execute(&mut connection)
        .await
        .unwrap();
    let mut script = tempfile::NamedTempFile::new().unwrap();
    script.write_all(SCRIPT.as_bytes()).unwrap();
    let output = Command::new(pgbench)
        .args(["--no-vacuum", "--client=16", "--jobs=2"])
        .arg(format!("--time={seconds}"))
        .arg("--file")
        .arg(script.path())
        .arg(&database.url)
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let (committed,): (i64,) = sqlx::query_as("select count(*) from bench.placed")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert!(committed > 0);
    relayed(&program, Duration::from_secs(60)).await;

    // Per product: what committed is 1..n, and the stream has 1..n in this order.
    let mut next = [1; 21];
    let mut after = 0;
    let mut in_stream = 0;
    loop {
        let (_, page) = program
            .http
            .get(&format!(
                "/v1/streams/main/messages?after={after}&max_messages=1000"
            ))
            .await;
        let messages = page["messages"].as_array().unwrap();
        if messages.is_empty() {
            break;
        }
        for message in messages {
            let data = &message["event"]["data"];
            let product = usize::try_from(data["product"].as_u64().unwrap()).unwrap();
            assert_eq!(data["version"], Value::from(next[product]), "{message}");
            next[product] += 1;
            after = message["offset"].as_i64().unwrap();
            in_stream += 1;
        }
    }
    assert_eq!(in_stream, committed);
    let tps = said.lines().find(|line| line.starts_with("tps"));
    println!(
        "pgbench, 16 clients, {seconds} s: {committed} committed, {in_stream} in the stream, each product 1..n; {}",
        tps.unwrap_or_default()
    );
    assert!(program.stop().await.success());
}

fn find_pgbench() -> Option<std::path::PathBuf> {
    let found = postroad::local_postgres::find();
    let programs = found.iter().map(|one| one.bin_dir.join("pgbench"));
    programs.into_iter().find(|pgbench| pgbench.exists())
}
