//! The names that requests may ask for.

use std::net::{IpAddr, SocketAddr};

use crate::domain::authority::{Authority, Host};
use crate::http::Options;

/// The names of this broker.
#[derive(Debug)]
pub(in crate::http) struct Hosts {
    /// Every name passes, for pages too.
    takes_all: bool,
    /// Every name passes that a program asks for. Programs ask for the names that a network gives a broker, which it need not know. A page's
    /// name is its author's choice.
    takes_names_of_programs: bool,
    /// Addresses pass: no page has one for a name of its own.
    takes_addresses: bool,
    names: Vec<Known>,
}

/// A host that is this broker's.
#[derive(Debug)]
enum Known {
    Name(String),
    Ip(IpAddr),
}

impl Known {
    fn parse(text: &str) -> Option<Self> {
        Authority::parse(text).map(|authority| match authority.host {
            Host::Name(name) => Self::Name(name.to_owned()),
            Host::Ip(ip) => Self::Ip(ip),
        })
    }

    fn is(&self, host: &Host<'_>) -> bool {
        match self {
            Self::Name(name) => Host::Name(name) == *host,
            Self::Ip(ip) => Host::Ip(*ip) == *host,
        }
    }
}

impl Hosts {
    pub(in crate::http) fn new(address: SocketAddr, options: &Options) -> Self {
        let is_loopback = address.ip().to_canonical().is_loopback();
        let allowed = &options.allowed_hosts;
        let advertised = options.advertise_url.as_deref().and_then(|url| {
            let rest = url.split_once("://")?.1;
            let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
            Known::parse(&rest[..end])
        });
        let allowed_names = allowed.iter().filter_map(|name| Known::parse(name));
        let own = Known::Ip(address.ip().to_canonical());
        Self {
            takes_all: allowed.iter().any(|name| name == "*"),
            takes_names_of_programs: !is_loopback && allowed.is_empty(),
            takes_addresses: !is_loopback,
            names: allowed_names.chain(advertised).chain([own]).collect(),
        }
    }

    /// True if a name is one of them. `is_of_page` says whether a page of a browser asks; it is asked when that matters.
    pub(super) fn has(&self, host: &Host<'_>, is_of_page: impl FnOnce() -> bool) -> bool {
        self.takes_all
            || host.is_loopback()
            || self.takes_addresses && matches!(host, Host::Ip(_))
            || self.names.iter().any(|known| known.is(host))
            || self.takes_names_of_programs && !is_of_page()
    }
}
