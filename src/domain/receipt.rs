//! Receipts: what a consumer settles a delivery by. A receipt names (queue, generation, offset, delivery) and carries a
//! MAC, so that it holds across owners and restarts without a table of receipts, and cannot be guessed.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use super::id::{Generation, Offset, QueueId};

/// The form of the text. A later form gets another first byte, and this one stays readable.
const VERSION: u8 = 1;
/// Bytes of the truncated HMAC-SHA256.
const MAC_BYTES: usize = 16;
/// Longest receipt text worth looking at.
const TEXT_MAX_BYTES: usize = 128;

/// What a receipt stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Receipt {
    /// The queue that handed the message out.
    pub queue: QueueId,
    /// The queue's generation at that time.
    pub generation: Generation,
    /// The message.
    pub offset: Offset,
    /// The number of the delivery, from 1, ever rising per message.
    pub delivery: u32,
}

/// The key of the MACs. Kept in the broker's database: every node signs alike.
#[derive(Clone)]
pub struct Key(Hmac<Sha256>);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(…)")
    }
}

impl Key {
    /// A key of any length; 32 random bytes are right.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        Self(Hmac::new_from_slice(bytes).expect("an HMAC takes keys of any length"))
    }

    /// Signs: the receipt's text, URL-safe, about 40 characters.
    #[must_use]
    pub fn seal(&self, receipt: &Receipt) -> String {
        let mut bytes = Vec::with_capacity(48);
        bytes.push(VERSION);
        for part in [
            receipt.queue.0 as u64,
            receipt.generation.0 as u64,
            receipt.offset.0 as u64,
            u64::from(receipt.delivery),
        ] {
            write_varint(&mut bytes, part);
        }
        let mac = self.0.clone().chain_update(&bytes).finalize().into_bytes();
        bytes.extend_from_slice(&mac[..MAC_BYTES]);
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// Reads a receipt back, comparing the MAC in constant time.
    ///
    /// None for what this broker did not sign: malformed, changed or of another broker.
    #[must_use]
    pub fn open(&self, text: &str) -> Option<Receipt> {
        if text.len() > TEXT_MAX_BYTES {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
        let (signed, mac) = bytes.split_at_checked(bytes.len().checked_sub(MAC_BYTES)?)?;
        self.0
            .clone()
            .chain_update(signed)
            .verify_truncated_left(mac)
            .ok()?;
        let (&version, mut rest) = signed.split_first()?;
        if version != VERSION {
            return None;
        }
        let mut next = || read_varint(&mut rest);
        let receipt = Receipt {
            queue: QueueId(i64::try_from(next()?).ok()?),
            generation: Generation(i64::try_from(next()?).ok()?),
            offset: Offset(i64::try_from(next()?).ok()?),
            delivery: u32::try_from(next()?).ok()?,
        };
        rest.is_empty().then_some(receipt)
    }
}

/// Appends an unsigned LEB128 number.
pub(crate) fn write_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value as u8) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Takes an unsigned LEB128 number off the front; None when it is cut short or too large.
pub(crate) fn read_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let part = u64::from(byte & 0x7f);
        if shift == 63 && part > 1 {
            return None;
        }
        value |= part << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_changed_receipt_is_not_read() {
        let key = Key::new(b"k");
        let receipt = Receipt {
            queue: QueueId(7),
            generation: Generation(1),
            offset: Offset(i64::MAX),
            delivery: u32::MAX,
        };
        let text = key.seal(&receipt);
        assert_eq!(key.open(&text), Some(receipt));
        assert_eq!(Key::new(b"other").open(&text), None);
        for place in 0..text.len() {
            let mut changed = text.clone().into_bytes();
            changed[place] = if changed[place] == b'A' { b'B' } else { b'A' };
            assert_eq!(
                key.open(std::str::from_utf8(&changed).unwrap()),
                None,
                "{place}"
            );
        }
        for text in ["", "A", "é", "AAAAAAAAAAAAAAAAAAAAAAAAAAAA"] {
            assert_eq!(key.open(text), None);
        }
    }

    proptest! {
        #[test]
        fn receipts_round_trip(queue in 0..i64::MAX, generation in 0..i64::MAX, offset in 0..i64::MAX, delivery: u32) {
            let key = Key::new(b"k");
            let receipt = Receipt { queue: QueueId(queue), generation: Generation(generation), offset: Offset(offset), delivery };
            prop_assert_eq!(key.open(&key.seal(&receipt)), Some(receipt));
        }

        #[test]
        fn no_text_panics(text in ".*") {
            prop_assert_eq!(Key::new(b"k").open(&text), None);
        }
    }
}
