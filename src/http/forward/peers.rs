//! Connections to other nodes: HTTP/2, shared by many requests.
//!
//! A connection carries as many requests at a time as the other side allows; one more would wait behind long polls. So
//! there are as many connections as needed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Requests at a time on one connection; below what a node takes.
const REQUESTS_PER_CONNECTION: usize = 200;
/// A node on the same network answers long before.
const CONNECT: Duration = Duration::from_secs(2);
/// A host that vanishes without a word is noticed after this and half of it.
const PING: Duration = Duration::from_secs(4);

/// The connections to all nodes.
#[derive(Debug, Default)]
pub(in crate::http) struct Peers {
    lanes: Mutex<HashMap<String, Vec<Lane>>>,
}

#[derive(Debug)]
struct Lane {
    client: reqwest::Client,
    busy: Arc<AtomicUsize>,
}

/// A place on a connection, free again when dropped.
#[derive(Debug)]
pub(in crate::http) struct Place {
    pub(in crate::http) client: reqwest::Client,
    busy: Arc<AtomicUsize>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Peers {
    /// A place on a connection to a node; connections to those that `is_there` does not know are closed.
    pub(in crate::http) fn place(
        &self,
        url: &str,
        is_there: impl Fn(&str) -> bool,
    ) -> Result<Place, reqwest::Error> {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        if !lanes.contains_key(url) {
            lanes.retain(|known, _| is_there(known));
        }
        let lanes = lanes.entry(url.to_owned()).or_default();
        let free = lanes
            .iter()
            .find(|lane| lane.busy.load(Ordering::Relaxed) < REQUESTS_PER_CONNECTION);
        let lane = match free {
            Some(lane) => lane,
            None => {
                let busy = Arc::default();
                let client = client()?;
                lanes.push(Lane { client, busy });
                &lanes[lanes.len() - 1]
            }
        };
        lane.busy.fetch_add(1, Ordering::Relaxed);
        Ok(Place {
            client: lane.client.clone(),
            busy: Arc::clone(&lane.busy),
        })
    }
}

fn client() -> Result<reqwest::Client, reqwest::Error> {
    reqwest::Client::builder()
        .http2_prior_knowledge()
        .http2_keep_alive_interval(PING)
        .http2_keep_alive_timeout(PING / 2)
        .http2_keep_alive_while_idle(true)
        .connect_timeout(CONNECT)
        .tcp_nodelay(true)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .build()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_full_connection_is_followed_by_another_and_nodes_that_are_gone_are_forgotten() {
        let peers = Peers::default();
        let places: Vec<Place> = (0..=REQUESTS_PER_CONNECTION)
            .map(|_| peers.place("http://one", |_| true).unwrap())
            .collect();
        assert_eq!(peers.lanes.lock().unwrap()["http://one"].len(), 2);
        drop(places);
        let place = peers.place("http://one", |_| true).unwrap();
        assert_eq!(place.busy.load(Ordering::Relaxed), 1, "the first again");
        drop(place);
        drop(
            peers
                .place("http://two", |url| url == "http://two")
                .unwrap(),
        );
        assert_eq!(peers.lanes.lock().unwrap().len(), 1);
    }
}
