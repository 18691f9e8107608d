//! The rules of the tree that no compiler holds: which layer may use which, what lives in one place only, how long a file
//! may be, how it may not be named, where links lead. Each check is shown to find its fault.

mod layers;
mod links;
mod lists;
mod pages;
mod places;
mod rooms;
mod schemas;
mod shape;
mod source;

use source::Source;

pub(crate) fn check(faults: &[String]) {
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn every_check_finds_its_fault() {
    let planted = |path: &str, text: &str| {
        let source = [Source::new(path, text)];
        let mut faults = layers::edge_faults(&source);
        faults.extend(places::place_faults(&source));
        faults.extend(shape::shape_faults(&source));
        faults.extend(rooms::room_faults(&source));
        faults
    };
    for (path, text) in [
        ("src/domain/a.rs", "use crate::store;"),
        // Rooms of a module stand in an order, whichever way a path leads up.
        ("src/queue/ask.rs", "use crate::queue::task::Task;"),
        ("src/queue/ask.rs", "use super::task::Task;"),
        ("src/queue/task/mod.rs", "use super::owner::Engine;"),
        ("src/queue/task/part.rs", "use super::super::owner::Engine;"),
        ("src/queue/task/part.rs", "use crate::queue::{api, Handle};"),
        ("src/queue/drawer.rs", ""),
        // A module for tests that is declared and has no body here hides nothing.
        (
            "src/queue/mod.rs",
            "#[cfg(test)]\nmod simulation;\nmod task;\n\nuse crate::http;",
        ),
        (
            "src/relay/mod.rs",
            "#[cfg(test)]\n#[expect(a)]\nmod tests;\nfn f() { tokio::spawn(g()); }",
        ),
        (
            "src/relay/a.rs",
            "#[cfg(test)]\nfn a() {\n    b();\n}\n\nfn f() { tokio::spawn(g()); }",
        ),
        (
            "src/queue/task/a.rs",
            "use crate::{domain::id, relay::Handle};",
        ),
        ("src/queue/task/a.rs", "fn f() { crate::http::f(); }"),
        ("src/cluster/a.rs", "use crate::{store::{a, b}, stream};"),
        ("src/drawer/a.rs", ""),
        ("src/queue/task/a.rs", "use sqlx::Row;"),
        (
            "src/stream/a.rs",
            "fn f() { error.sqlstate() == Some(CODE) }",
        ),
        ("src/relay/a.rs", "fn f() { error.constraint().is_none() }"),
        ("src/relay/a.rs", "fn f() { tokio::spawn(g()); }"),
        ("src/domain/a.rs", "fn f() { Utc::now(); }"),
        ("src/store/a.rs", "fn f() { eprintln!(); }"),
        ("src/relay/a.rs", "fn f() { println!(); }"),
        ("src/http/utils.rs", ""),
        ("src/http/a.rs", &"\n".repeat(shape::LINES_MAX + 1)),
    ] {
        assert_eq!(planted(path, text).len(), 1, "{path}: {text:.60}");
    }
    for (path, text) in [
        (
            "src/queue/task/a.rs",
            "use crate::{domain::{id, name}, store::queue};",
        ),
        (
            "src/queue/task/a.rs",
            "/// Not crate::http.\nuse super::owner::b;\nuse crate::queue::api::b; // nor sqlx",
        ),
        ("src/store/a.rs", "use sqlx::Row;"),
        (
            "src/relay/a.rs",
            "#[cfg(test)]\nmod tests {\n    fn f() {\n        tokio::spawn(g());\n    }\n}",
        ),
        ("src/main.rs", "postroad::cli::main()"),
    ] {
        assert_eq!(planted(path, text), Vec::<String>::new(), "{text}");
    }
}
