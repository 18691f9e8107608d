//! Which layer may use which.

use std::collections::BTreeMap;

use crate::check;
use crate::source::{Source, sources};

/// What each module may use of the crate, from the top down: a module uses only what stands above it, so there is no circle. A
/// module that is not listed here is a fault, and so is an edge that is not drawn.
const EDGES: &[(&str, &[&str])] = &[
    ("domain", &[]),
    ("supervisor", &["domain"]),
    // For tests, and known to all; nothing in a release.
    ("failpoint", &[]),
    ("simulation", &["domain"]),
    ("client", &["domain"]),
    // For producing services. It uses nothing of the broker, and nothing of the broker uses it.
    ("outbox", &[]),
    ("store", &["domain", "supervisor"]),
    ("cluster", &["domain", "supervisor", "store"]),
    ("stream", &["domain", "supervisor", "store", "cluster"]),
    ("topic", &["domain", "supervisor", "store"]),
    ("lock", &["domain", "supervisor", "store"]),
    (
        "relay",
        &[
            "domain",
            "supervisor",
            "store",
            "cluster",
            "stream",
            "topic",
        ],
    ),
    (
        "queue",
        &["domain", "supervisor", "store", "cluster", "stream"],
    ),
    (
        "http",
        &[
            "domain",
            "supervisor",
            "store",
            "cluster",
            "stream",
            "topic",
            "lock",
            "relay",
            "queue",
        ],
    ),
    ("config", &["domain"]),
    ("telemetry", &["config", "supervisor"]),
    ("local_postgres", &["supervisor"]),
    (
        "app",
        &[
            "domain",
            "supervisor",
            "store",
            "cluster",
            "stream",
            "topic",
            "lock",
            "relay",
            "queue",
            "http",
            "config",
            "telemetry",
            "local_postgres",
        ],
    ),
    (
        "demo",
        &[
            "domain",
            "client",
            "supervisor",
            "store",
            "app",
            "config",
            "telemetry",
            "local_postgres",
        ],
    ),
    (
        "bench",
        &[
            "domain",
            "supervisor",
            "store",
            "config",
            "telemetry",
            "local_postgres",
        ],
    ),
    (
        "cli",
        &[
            "app",
            "domain",
            "bench",
            "config",
            "demo",
            "http",
            "store",
            "supervisor",
            "telemetry",
        ],
    ),
];

pub(crate) fn edge_faults(sources: &[Source]) -> Vec<String> {
    let edges: BTreeMap<&str, &[&str]> = EDGES.iter().copied().collect();
    let mut faults = Vec::new();
    for source in sources {
        let Some(module) = source.module() else {
            continue;
        };
        let Some(allowed) = edges.get(module) else {
            faults.push(format!(
                "{}: the module {module} has no place in the table of edges",
                source.path
            ));
            continue;
        };
        for used in source.uses() {
            if used != module
                && !["failpoint", "simulation"].contains(&used.as_str())
                && !allowed.contains(&used.as_str())
            {
                faults.push(format!("{}: {module} may not use {used}", source.path));
            }
        }
    }
    faults
}

#[test]
fn layers_use_only_what_stands_above_them() {
    check(&edge_faults(&sources()));
}

/// Edges of a table that do not lead to a module above.
fn upward_faults(edges: &[(&str, &[&str])]) -> Vec<String> {
    let mut faults = Vec::new();
    for (at, (module, allowed)) in edges.iter().enumerate() {
        for used in *allowed {
            if !edges[..at].iter().any(|(above, _)| above == used) {
                faults.push(format!("{used} does not stand above {module}"));
            }
        }
    }
    faults
}

#[test]
fn no_circle_joins_the_layers() {
    check(&upward_faults(EDGES));
    let circle: &[(&str, &[&str])] = &[("a", &["b"]), ("b", &["a"])];
    assert_eq!(upward_faults(circle).len(), 1);
}
