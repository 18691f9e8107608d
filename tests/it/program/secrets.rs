//! Database URLs as libpq takes them, and no part of a password anywhere.

use postroad::store::Database;

use super::{output, postroad};
use crate::support;

#[tokio::test]
async fn a_password_with_signs_that_were_not_escaped_is_not_repeated() {
    for url in [
        "postgres://app:12/s3cretpart@127.0.0.1:1/b",
        "postgres://app:p@ss/s3cretpart@127.0.0.1:1/b",
        "postgres://app:s3cretpart/x?y@127.0.0.1:1/b",
        "postgres://app:x@127.0.0.1:1/b?password=a&s3cretpart",
        "postgres://app:s3cretpart%@127.0.0.1:1/b",
    ] {
        for arguments in [
            &["serve"][..],
            &["config", "check"],
            &["config", "print"],
            &["install"],
        ] {
            let mut command = postroad(arguments);
            command
                .env("DATABASE_URL", url)
                .env("POSTROAD_LOG_LEVEL", "trace");
            let (code, stdout, said) = output(command).await;
            assert_ne!(code, 0, "{url}: {stdout}");
            assert!(
                !format!("{stdout}{said}").contains("s3cret"),
                "{arguments:?} {said}"
            );
            assert!(
                said.contains("%2F") || said.contains("database URL"),
                "{said}"
            );
        }
    }
}

#[tokio::test]
async fn a_secret_on_the_command_line_is_warned_of_and_one_in_the_file_is_refused() {
    let url = "postgres://u:s3cret@h/d";
    let secret = "s3cret-of-all-the-nodes";
    let (code, stdout, _) = output(postroad(&[
        "config",
        "check",
        "--database-url",
        url,
        "--node-secret",
        secret,
        "--bind",
        "0.0.0.0:80",
    ]))
    .await;
    assert_eq!(code, 0, "{stdout}");
    for expected in [
        "can read the secret in --database-url",
        "can read the secret in --node-secret",
        "other machines can reach the API at 0.0.0.0:80, which has no login",
    ] {
        assert!(stdout.contains(expected), "{stdout}");
    }
    assert!(!stdout.contains("s3cret"), "{stdout}");
    let (_, stdout, _) = output(postroad(&[
        "config",
        "check",
        "--database-url",
        "postgres://h/d",
    ]))
    .await;
    assert_eq!(stdout, "the configuration is valid\n");

    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    for key in ["node_secret", "database_url"] {
        let value = if key == "node_secret" { secret } else { url };
        std::fs::write(path("p.toml"), format!("{key} = '{value}'")).unwrap();
        let (code, _, said) =
            output(postroad(&["config", "check", "--config", &path("p.toml")])).await;
        assert_eq!(code, 2, "{said}");
        assert!(said.contains("holds a secret, and must be"), "{said}");
        assert!(
            said.contains(&format!("{key}_file")) && !said.contains("s3cret"),
            "{said}"
        );
        std::fs::write(path("value"), format!("{value}\n")).unwrap();
        let named = format!("{key}_file = '{}'", path("value"));
        std::fs::write(path("p.toml"), named).unwrap();
        let (code, _, said) =
            output(postroad(&["config", "check", "--config", &path("p.toml")])).await;
        assert_eq!((code, said.as_str()), (0, ""));
    }
}

#[tokio::test]
async fn of_several_servers_the_first_that_answers_is_taken() {
    let database = support::database().await;
    let proxy = support::proxy(&database.url).await;
    let url = proxy.url(&database.url);
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let (before, behind) = url.split_once('@').unwrap();
    let several = format!("{before}@{nobody},{behind}&target_session_attrs=read-write");
    let found = Database::new(&several, 2).unwrap();
    assert!(
        found.place().starts_with(&format!("{nobody},127.0.0.1:")),
        "{}",
        found.place()
    );
    found.connect().await.unwrap();
    // The pool follows.
    postroad::store::history::list(&found).await.unwrap();
    assert!(!format!("{found:?}").contains("password"));
    let keywords = format!(
        "host=127.0.0.1 port={} user=postgres dbname={}",
        behind.split(['/', ':']).nth(1).unwrap(),
        database.name
    );
    Database::new(&keywords, 2)
        .unwrap()
        .connect()
        .await
        .unwrap();
}
