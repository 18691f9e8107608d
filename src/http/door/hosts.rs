//! The host names that requests may use.

use std::net::SocketAddr;

use crate::domain::authority::{Authority, Host};
use crate::http::Options;

/// The names of this broker.
#[derive(Debug)]
pub(in crate::http) struct Hosts {
    /// Every name is let through.
    takes_all: bool,
    /// IP addresses are let through: no page reaches them under its own name.
    takes_addresses: bool,
    names: Vec<String>,
}

impl Hosts {
    pub(in crate::http) fn new(address: SocketAddr, options: &Options) -> Self {
        let is_loopback = address.ip().to_canonical().is_loopback();
        let allowed = &options.allowed_hosts;
        let advertised = options.advertise_url.as_deref();
        let advertised = advertised.and_then(|url| {
            let rest = url.split_once("://")?.1;
            let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
            Some(rest[..end].to_owned())
        });
        Self {
            takes_all: allowed.iter().any(|name| name == "*") || !is_loopback && allowed.is_empty(),
            takes_addresses: !is_loopback,
            names: allowed
                .iter()
                .cloned()
                .chain(advertised)
                .chain([address.to_string()])
                .collect(),
        }
    }

    /// Whether a name is one of them.
    pub(super) fn has(&self, host: &Host<'_>) -> bool {
        self.takes_all
            || host.is_loopback()
            || self.takes_addresses && matches!(host, Host::Ip(_))
            || self
                .names
                .iter()
                .any(|name| Authority::parse(name).is_some_and(|authority| authority.host == *host))
    }
}
