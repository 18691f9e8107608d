//! Rooms inside a module: the order in which they stand.

use crate::check;
use crate::source::{Source, sources};

/// The rooms of each module that has an order inside, from the top down: a room uses only rooms above it. The module's own
/// `mod.rs` stands below them all, and puts them together.
const ROOMS: &[(&str, &[&str])] = &[(
    "queue",
    &[
        "options", "api", "ask", "metrics", "log", "writer", "shared", "gauges", "desk", "forward",
        "task", "owner",
    ],
)];

pub(crate) fn room_faults(sources: &[Source]) -> Vec<String> {
    let mut faults = Vec::new();
    for source in sources {
        for (module, rooms) in ROOMS {
            if let Some(inside) = source.path.strip_prefix(&format!("src/{module}/")) {
                faults.extend(faults_inside(source, inside, module, rooms));
            }
        }
    }
    faults
}

/// The faults of one file of a module: `inside` is its path from there.
fn faults_inside(source: &Source, inside: &str, module: &str, rooms: &[&str]) -> Vec<String> {
    let path = &source.path;
    let (room, rest) = match inside.split_once('/') {
        Some((room, rest)) => (room, rest),
        None => (inside.trim_end_matches(".rs"), "mod.rs"),
    };
    if room == "mod" {
        return Vec::new();
    }
    let Some(place) = rooms.iter().position(|known| *known == room) else {
        return vec![format!("{path}: {room} has no place in the order of rooms")];
    };
    let up = "super::".repeat(1 + rest.matches('/').count() + usize::from(rest != "mod.rs"));
    let mut used = source.names_behind(&format!("crate::{module}::"));
    used.extend(source.names_behind(&up));
    let of_room = |name: &String| rooms[..=place].contains(&name.as_str());
    used.retain(|name| !of_room(name));
    let faults = used.into_iter();
    faults
        .map(|name| format!("{path}: {name} does not stand above {room}"))
        .collect()
}

#[test]
fn rooms_use_only_what_stands_above_them() {
    check(&room_faults(&sources()));
}
