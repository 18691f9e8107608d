//! The private Postgres of the program: reached whatever the environment says, closed to others, stopped whenever the program is.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStderr};

use super::postroad;
use crate::support::{self, cluster::Folder, send_signal};

/// What a developer may have in the environment; none of it is for the private server.
const ASTRAY: [(&str, &str); 11] = [
    ("PGHOST", "nowhere.invalid"),
    ("PGHOSTADDR", "192.0.2.1"),
    ("PGPORT", "5433"),
    ("PGUSER", "nobody_such"),
    ("PGPASSWORD", "wrong"),
    ("PGDATABASE", "nowhere"),
    ("PGSSLMODE", "require"),
    ("PGSSLROOTCERT", "system"),
    ("PGOPTIONS", "-c search_path=nowhere --no_such_setting=1"),
    ("PGAPPNAME", "astray"),
    ("PGSERVICE", "nowhere"),
];

fn serve(data_dir: &Path) -> (Child, Lines<BufReader<ChildStderr>>) {
    let mut command = postroad(&["serve", "--bind", "127.0.0.1:0", "--data-dir"]);
    command
        .arg(data_dir)
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    // To find the server.
    for name in ["PATH", "LD_LIBRARY_PATH", "POSTROAD_POSTGRES_BIN"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    let mut child = command.envs(ASTRAY).spawn().unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    (child, lines)
}

async fn wait_for(lines: &mut Lines<BufReader<ChildStderr>>, words: &str) {
    let mut seen = Vec::new();
    while let Some(line) = lines.next_line().await.unwrap() {
        if line.contains(words) {
            return;
        }
        seen.push(line);
    }
    panic!("the program ended:\n{}", seen.join("\n"));
}

async fn ends(mut child: Child) {
    let ended = tokio::time::timeout(Duration::from_secs(60), child.wait()).await;
    let status = ended.expect("it ends in time").unwrap();
    assert!(status.success(), "{status:?}");
}

fn signal(child: &Child, signal: Signal) {
    send_signal(i32::try_from(child.id().unwrap()).unwrap(), signal);
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn variables_for_other_servers_do_not_lead_it_astray_and_its_log_is_closed() {
    let folder = Folder::new();
    let data = folder.path.join("data");
    let (child, mut lines) = serve(&data);
    wait_for(&mut lines, "postroad is ready").await;
    let log = data.join("postgres.log");
    assert_eq!((mode(&data), mode(&log)), (0o700, 0o600));
    // A row that its check refuses: nothing of it is in the log.
    let url = format!(
        "postgres://postgres:@localhost:5432/postroad?host={}&sslmode=disable",
        data.join("run").display()
    );
    let insert = "insert into postroad.outbox (topic, payload) values ('no such topic!', $1)";
    let mut connection = postroad::store::Database::new(&url, 1)
        .unwrap()
        .connect()
        .await
        .unwrap();
    let refused = sqlx::query(insert)
        .bind(&b"4111111111111111"[..])
        .execute(&mut connection)
        .await;
    assert!(refused.is_err());
    let refused = sqlx::raw_sql(
        "insert into postroad.outbox (topic, payload) values ('no such topic!', '4111111111111111')",
    );
    assert!(refused.execute(&mut connection).await.is_err());
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(text.contains("ERROR:") && !text.contains("4111"), "{text}");
    signal(&child, Signal::HUP);
    ends(child).await;
    assert!(!data.join("postgres/postmaster.pid").exists());
}

#[tokio::test]
async fn a_stop_during_the_start_leaves_no_server_behind() {
    let folder = Folder::new();
    let data = folder.path.join("data");
    // While initdb works.
    let (child, mut lines) = serve(&data);
    support::eventually("initdb to begin", || async {
        data.join("postgres.new/base").exists().then_some(())
    })
    .await;
    signal(&child, Signal::TERM);
    let drained = tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    ends(child).await;
    drained.await.unwrap();
    assert!(!data.join("postgres").exists());
    // Between its server's start and its own.
    let (child, mut lines) = serve(&data);
    wait_for(&mut lines, "local Postgres is running").await;
    signal(&child, Signal::TERM);
    let drained = tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    ends(child).await;
    drained.await.unwrap();
    assert!(data.join("postgres").exists());
    assert!(!data.join("postgres/postmaster.pid").exists());
}
