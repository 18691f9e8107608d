//! The proof by which nodes recognize each other: a tag that only a holder of the secret can make.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

/// The signed text. Another use of the same key signs another text.
const CONTEXT: &[u8] = b"postroad node 1";

/// The secret that all nodes share.
#[derive(Clone)]
pub(in crate::http) struct Secret(Hmac<Sha256>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Secret {
    pub(in crate::http) fn new(bytes: &[u8]) -> Self {
        let key = Hmac::new_from_slice(bytes).expect("HMAC takes keys of any length");
        Self(key)
    }

    /// The tag that a node shows; it does not reveal the secret.
    pub(in crate::http) fn tag(&self) -> String {
        let mac = self.0.clone().chain_update(CONTEXT).finalize();
        URL_SAFE_NO_PAD.encode(mac.into_bytes())
    }

    /// Whether a tag was made with the same secret. In constant time.
    pub(in crate::http) fn knows(&self, tag: &[u8]) -> bool {
        let Ok(mac) = URL_SAFE_NO_PAD.decode(tag) else {
            return false;
        };
        let own = self.0.clone().chain_update(CONTEXT);
        own.verify_slice(&mac).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_secret_makes_the_tag() {
        let secret = Secret::new(b"one and the same");
        assert!(secret.knows(secret.tag().as_bytes()));
        for tag in [Secret::new(b"another").tag(), String::new(), "é".to_owned()] {
            assert!(!secret.knows(tag.as_bytes()), "{tag}");
        }
    }
}
