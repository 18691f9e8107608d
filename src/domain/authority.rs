//! The host and port of a `Host`, an `:authority` or an `Origin`, as RFC 3986 writes them.

// Addresses as such: there is nothing in `core` that reaches a network.
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::fmt;

/// A host: a name, or an address.
#[derive(Debug, Clone, Copy)]
pub enum Host<'t> {
    /// A name as it was written, without the dot that may end it.
    Name(&'t str),
    /// An address. One of IPv4 that is written as IPv6 is the one of IPv4.
    Ip(IpAddr),
}

/// A host, and the port if it is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Authority<'t> {
    /// The host.
    pub host: Host<'t>,
    /// The port.
    pub port: Option<u16>,
}

impl PartialEq for Host<'_> {
    /// Upper and lower case are the same.
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Name(one), Self::Name(other)) => one.eq_ignore_ascii_case(other),
            (Self::Ip(one), Self::Ip(other)) => one == other,
            _ => false,
        }
    }
}

impl Eq for Host<'_> {}

impl fmt::Display for Host<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]"),
            Self::Ip(ip) => write!(f, "{ip}"),
        }
    }
}

impl Host<'_> {
    /// True if it means the caller's own machine without any DNS: `localhost`, names that end in `.localhost` (RFC 6761),
    /// 127.0.0.0/8 and `[::1]`.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        const LOCAL: &str = "localhost";
        match self {
            Self::Ip(ip) => ip.is_loopback(),
            Self::Name(name) => {
                let (front, end) = match name.len().checked_sub(LOCAL.len()) {
                    Some(at) if name.is_char_boundary(at) => name.split_at(at),
                    _ => return false,
                };
                end.eq_ignore_ascii_case(LOCAL) && (front.is_empty() || front.ends_with('.'))
            }
        }
    }
}

impl<'t> Authority<'t> {
    /// Parses `host`, `host:port`, `[address]` or `[address]:port`. None for anything else: no host, a user before it, an invalid
    /// port.
    #[must_use]
    pub fn parse(text: &'t str) -> Option<Self> {
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (address, rest) = rest.split_once(']')?;
                let address: Ipv6Addr = address.parse().ok()?;
                let port = match rest {
                    "" => None,
                    rest => Some(rest.strip_prefix(':')?),
                };
                (Host::Ip(address.to_canonical()), port)
            }
            None => {
                let (host, port) = match text.split_once(':') {
                    Some((host, port)) => (host, Some(port)),
                    None => (text, None),
                };
                let is_of_name =
                    |byte: u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=".contains(&byte);
                let name = host.strip_suffix('.').unwrap_or(host);
                if name.is_empty() || !name.bytes().all(is_of_name) {
                    return None;
                }
                let host = match name.parse::<Ipv4Addr>() {
                    Ok(address) => Host::Ip(address.into()),
                    Err(_) => Host::Name(name),
                };
                (host, port)
            }
        };
        let port = match port {
            // A colon without a port is allowed, and says nothing.
            None | Some("") => None,
            Some(port) if port.bytes().all(|byte| byte.is_ascii_digit()) => {
                Some(port.parse().ok()?)
            }
            Some(_) => return None,
        };
        Some(Self { host, port })
    }

    /// Parses an origin of the web, `http://host:port` or `https://…`; its port is never left open. None for `null` and for
    /// other schemes.
    #[must_use]
    pub fn of_origin(text: &'t str) -> Option<Self> {
        let (scheme, authority) = text.split_once("://")?;
        let default = match scheme {
            _ if scheme.eq_ignore_ascii_case("http") => 80,
            _ if scheme.eq_ignore_ascii_case("https") => 443,
            _ => return None,
        };
        let authority = Self::parse(authority)?;
        Some(Self {
            port: Some(authority.port.unwrap_or(default)),
            ..authority
        })
    }

    /// Whether an origin is the same place. A port that is not written is the origin's scheme's own: whether the way here is
    /// encrypted is known to a proxy, and not to this.
    #[must_use]
    pub fn is_place_of(&self, origin: &str) -> bool {
        let default = match origin.split_once("://") {
            Some((scheme, _)) if scheme.eq_ignore_ascii_case("https") => 443,
            _ => 80,
        };
        Authority::of_origin(origin).is_some_and(|origin| {
            origin.host == self.host && origin.port == Some(self.port.unwrap_or(default))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_are_taken_apart() {
        for (text, found) in [
            ("localhost", Some(("localhost", None))),
            ("LOCALHOST.:80", Some(("localhost", Some(80)))),
            ("postroad.example:", Some(("postroad.example", None))),
            ("127.0.0.1:8080", Some(("127.0.0.1", Some(8080)))),
            ("[::1]", Some(("[::1]", None))),
            ("[::1]:8080", Some(("[::1]", Some(8080)))),
            ("[::ffff:127.0.0.1]", Some(("127.0.0.1", None))),
            ("", None),
            (".", None),
            (":80", None),
            ("a b", None),
            ("a/b", None),
            ("user@localhost", None),
            ("localhost:http", None),
            ("localhost:+80", None),
            ("localhost:65536", None),
            ("localhost:80:80", None),
            ("::1", None),
            ("[::1", None),
            ("[::1]80", None),
            ("[localhost]", None),
            ("[fe80::1%25eth0]", None),
            ("é", None),
        ] {
            let parsed = Authority::parse(text);
            let shown = parsed.map(|authority| {
                let host = authority.host.to_string().to_ascii_lowercase();
                (host, authority.port)
            });
            let found = found.map(|(host, port): (&str, _)| (host.to_owned(), port));
            assert_eq!(shown, found, "{text}");
        }
    }

    #[test]
    fn loopback_is_what_no_dns_can_lead_elsewhere() {
        for (text, is_loopback) in [
            ("localhost", true),
            ("LocalHost.", true),
            ("postroad.localhost:8080", true),
            ("127.0.0.1", true),
            ("127.9.9.9", true),
            ("[::1]", true),
            ("evil-localhost", false),
            ("localhost.evil.example", false),
            ("127.0.0.1.evil.example", false),
            ("0.0.0.0", false),
            ("2130706433", false),
            ("127.1", false),
            ("10.0.0.1", false),
        ] {
            let host = Authority::parse(text).map(|authority| authority.host);
            assert_eq!(
                host.map(|host| host.is_loopback()),
                Some(is_loopback),
                "{text}"
            );
        }
    }

    #[test]
    fn an_origin_is_the_same_place_or_not() {
        for (host, origin, is_same) in [
            ("localhost:8080", "http://localhost:8080", true),
            ("LOCALHOST:8080", "http://localhost:8080", true),
            ("localhost.:8080", "http://localhost:8080", true),
            ("[::1]:8080", "http://[0:0::1]:8080", true),
            ("localhost", "http://localhost", true),
            ("localhost:80", "http://localhost", true),
            ("postroad.example", "https://postroad.example", true),
            ("postroad.example:443", "https://postroad.example", true),
            ("postroad.example", "https://postroad.example:443", true),
            ("localhost:8080", "http://localhost:3000", false),
            ("localhost:8080", "http://127.0.0.1:8080", false),
            ("localhost:8080", "http://localhost", false),
            ("postroad.example:80", "https://postroad.example", false),
            (
                "localhost:8080",
                "http://localhost:8080.evil.example",
                false,
            ),
            (
                "localhost:8080",
                "http://evil.example/localhost:8080",
                false,
            ),
            (
                "localhost:8080",
                "http://localhost:8080@evil.example",
                false,
            ),
            ("localhost:8080", "https://evil.example", false),
            ("localhost:8080", "null", false),
            ("localhost:8080", "", false),
            ("localhost:8080", "localhost:8080", false),
            ("localhost", "file://", false),
            ("localhost", "ftp://localhost", false),
        ] {
            let place = Authority::parse(host);
            let found = place.map(|place| place.is_place_of(origin));
            assert_eq!(found, Some(is_same), "{host} {origin}");
        }
    }
}
