//! Derives the options of each engine from the configuration.

use std::net::SocketAddr;
use std::time::Duration;

use super::{files, memory};
use crate::config::Config;
use crate::domain::cloudevents::Limits;
use crate::domain::name::OriginName;
use crate::{failpoint, http, queue, relay, stream, topic};

/// The address in the node's row when none is advertised. A node takes over at once the leases held under its own address, so
/// no process elsewhere may have the same one: every machine has loopback and `0.0.0.0`.
pub(super) fn node_address(listening: SocketAddr) -> String {
    let ip = listening.ip();
    if ip.is_loopback() || ip.is_unspecified() {
        let host = rustix::system::uname();
        let host = host.nodename().to_string_lossy().into_owned();
        format!("http://{host}:{}", listening.port())
    } else {
        format!("http://{listening}")
    }
}

/// The URL at which other nodes reach this one.
pub(super) fn url_for_others(config: &Config, listening: SocketAddr) -> String {
    let advertised = config.advertise_url.clone();
    advertised.unwrap_or_else(|| node_url(listening))
}

/// The URL at which other nodes reach this one when nothing is advertised: nodes on the same machine by its loopback address.
fn node_url(listening: SocketAddr) -> String {
    match listening.ip().is_unspecified() {
        true => node_address(listening),
        false => format!("http://{listening}"),
    }
}

/// The conditions under which a topic takes a schedule's occurrence.
pub(super) fn acceptance(topics: &topic::Handle, message_max_bytes: usize) -> stream::Acceptance {
    let topics = topics.clone();
    stream::Acceptance::new(move |message| {
        let topics = topics.clone();
        async move {
            let refusal = topics
                .find_refusal_within(&message, message_max_bytes)
                .await;
            match refusal {
                Ok(None) => Ok(()),
                Ok(Some(reason)) => Err(reason),
                Err(error) => Err(error.to_string()),
            }
        }
    })
}

pub(super) fn stream_options(config: &Config, topics: &topic::Handle) -> stream::Options {
    let defaults = stream::Options::default();
    stream::Options {
        cache_bytes: config.stream_cache_bytes,
        acceptance: acceptance(topics, config.message_max_bytes),
        leaf_offsets: failpoint::limit("leaf-offsets", defaults.leaf_offsets),
        ..defaults
    }
}

pub(super) fn queue_options() -> queue::Options {
    let defaults = queue::Options::default();
    queue::Options {
        journal_full_bytes: failpoint::limit("journal-bytes", defaults.journal_full_bytes),
        ..defaults
    }
}

pub(super) fn relay_options(config: &Config) -> relay::Options {
    let local = relay::OriginOptions {
        name: OriginName::local(),
        url: None,
        mapping: None,
    };
    let others = config.origins.iter().map(|origin| relay::OriginOptions {
        name: origin.name.clone(),
        url: Some(origin.url.clone()),
        mapping: origin.mapping.clone(),
    });
    relay::Options {
        origins: std::iter::once(local).chain(others).collect(),
        grace: config.outbox_grace,
        ..relay::Options::default()
    }
}

/// `listening`: where the server does.
pub(super) fn http_options(config: &Config, listening: SocketAddr) -> http::Options {
    let defaults = http::Options::default();
    // No balancer stands before a loopback address.
    let lame_duck = if config.bind.ip().is_loopback() {
        Duration::ZERO
    } else {
        config.lame_duck
    };
    http::Options {
        publish: Limits {
            message_bytes: config.message_max_bytes,
            ..Limits::default()
        },
        connections_max: files::connections_within(config.connections_max),
        memory_bytes: config.http_memory_bytes.unwrap_or_else(memory::for_http),
        lame_duck,
        node_secret: config.node_secret.clone(),
        allowed_hosts: config.allowed_hosts.clone(),
        // As other nodes know it, or what they pass on would not be for this broker.
        advertise_url: Some(url_for_others(config, listening)),
        // Half of the time is left for what the engines have to finish.
        drain: defaults
            .drain
            .min(config.shutdown.saturating_sub(lame_duck) / 2),
        ..defaults
    }
    .with_keep_alive(config.keep_alive)
}
