//! What is committed must be what the code makes: the schema, the table of the configuration.
//! `make golden` rewrites the files.

use std::path::PathBuf;

use crate::support;

/// Compares, or with UPDATE_GOLDEN set writes.
fn check(path: &str, made: &str) {
    let full = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(full, made).unwrap();
        return;
    }
    let committed = std::fs::read_to_string(full).unwrap_or_default();
    let differs = committed
        .lines()
        .zip(made.lines())
        .enumerate()
        .find(|(_, (committed, made))| committed != made);
    if let Some((number, (committed, made))) = differs {
        panic!(
            "{path}:{}: run `make golden`\n  committed: {committed}\n  made:      {made}",
            number + 1
        );
    }
    assert_eq!(
        committed.lines().count(),
        made.lines().count(),
        "{path}: run `make golden`"
    );
}

#[test]
fn the_documented_configuration_is_the_real_one() {
    const START: &str = "<!-- the table below is made by `make golden` -->\n";
    const END: &str = "<!-- the end of the table -->\n";
    let path = "docs/configuration.md";
    let full = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path);
    let text = std::fs::read_to_string(full).unwrap();
    let (before, rest) = text.split_once(START).unwrap();
    let (_, after) = rest.split_once(END).unwrap();
    let table = postroad::config::markdown_table();
    check(path, &format!("{before}{START}\n{table}\n{END}{after}"));
}

#[test]
fn the_committed_openapi_is_the_real_one() {
    check("openapi.yaml", &postroad::http::openapi_yaml());
}

#[tokio::test]
async fn the_schema_is_the_committed_one() {
    let database = support::database().await;
    // As an install leaves it in a database of this name.
    postroad::store::migrate::origin(&database.database)
        .await
        .unwrap();
    postroad::store::migrate::inbox(&database.database)
        .await
        .unwrap();
    let mut connection = database.connect().await;
    // Every name is printed with its schema, whoever asks.
    sqlx::query("set search_path = ''")
        .execute(&mut connection)
        .await
        .unwrap();
    let lines: Vec<String> = sqlx::query_scalar(include_str!("schema.sql"))
        .fetch_all(&mut connection)
        .await
        .unwrap();
    assert!(lines.len() > 100, "the dump sees the schema");
    check("tests/it/golden/schema.txt", &(lines.join("\n") + "\n"));
}
