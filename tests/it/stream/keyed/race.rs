//! Writers that race for the next version of a few keys.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use postroad::domain::id::Offset;
use postroad::stream::AppendError;

use super::super::read;
use super::{declare, node, node_with, of, quick};
use crate::support;

const WRITERS: usize = 16;
const KEYS: usize = 5;
const ROUNDS: usize = 60;

#[tokio::test(flavor = "multi_thread")]
async fn of_sixteen_writers_on_two_nodes_each_version_goes_to_one() {
    let db = support::database().await;
    let one = Arc::new(node(&db).await);
    let two = Arc::new(node_with(&db.database, "http://two", quick()).await);
    let stream = declare(&one).await;
    // Who was told that it made which version of which key.
    let won: Arc<Mutex<HashMap<(usize, i64), (usize, Offset)>>> = Arc::default();
    let writers = (0..WRITERS).map(|writer| {
        let node = Arc::clone(if writer % 2 == 0 { &one } else { &two });
        let won = Arc::clone(&won);
        tokio::spawn(async move {
            let mut known = [0; KEYS];
            for round in 0..ROUNDS {
                let key = (writer + round) % KEYS;
                // Until it gets one in.
                loop {
                    let expected = known[key];
                    let id = format!("{writer}-{round}-{expected}");
                    let message = of(&format!("k{key}"), &id, Some(expected));
                    match node.publish(vec![message], round % 2 == 0).await {
                        Ok(placed) => {
                            known[key] = expected + 1;
                            let mut won = won.lock().unwrap();
                            let before = won.insert((key, expected), (writer, placed[0].offset));
                            assert_eq!(before, None, "version {expected} of {key} went to two");
                            break;
                        }
                        Err(AppendError::VersionConflict(conflict)) => {
                            assert!(conflict.version > expected, "{conflict:?}");
                            known[key] = conflict.version;
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    let won = won.lock().unwrap().clone();
    assert_eq!(won.len(), WRITERS * ROUNDS);
    // What the other node committed last, this one reads a moment later.
    let all = Offset((WRITERS * ROUNDS) as i64);
    let mut tail = one.stream.last_offset(stream);
    tail.wait_for(|&last| last >= all).await.unwrap();
    let page = one.stream.read(read(stream, 0)).await.unwrap();
    assert_eq!(page.entries.len(), WRITERS * ROUNDS);
    for key in 0..KEYS {
        let history = one.key(&format!("k{key}")).await;
        let places: Vec<Offset> = history.entries.iter().map(|entry| entry.offset).collect();
        assert_eq!(history.version, places.len() as i64);
        for (version, offset) in places.into_iter().enumerate() {
            assert_eq!(
                won[&(key, version as i64)].1,
                offset,
                "in the order of the versions"
            );
        }
    }
    for node in [one, two] {
        node.stop().await;
    }
}
