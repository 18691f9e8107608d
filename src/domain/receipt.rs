//! Receipts, by which a consumer settles a delivery. A receipt names (queue, generation, offset, delivery) and carries a
//! MAC, so that it holds across owners and restarts without a table of receipts, and cannot be guessed.

use std::collections::HashMap;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use super::id::{Generation, Offset, QueueId, StreamId};

/// The form of the text. A later form gets another first byte, and this one stays readable.
const VERSION: u8 = 1;
/// Bytes of the truncated HMAC-SHA256.
const MAC_BYTES: usize = 16;
/// Longest receipt text worth looking at.
const TEXT_MAX_BYTES: usize = 128;

/// The contents of a receipt.
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

/// The keys of a broker's receipts: one for the messages of each history of its database. After a failover or a restore other
/// messages can stand where some were lost, and a receipt of those must not settle these.
#[derive(Debug, Clone)]
pub struct Keys {
    first: Key,
    /// By stream, in order: from which offset on a later history's key holds.
    later: HashMap<StreamId, Vec<(Offset, Key)>>,
}

/// The kinds of texts given as receipts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// No receipt of this broker's.
    Unknown,
    /// A receipt.
    Valid(Receipt),
    /// A receipt of a message that was lost with the end of a former history. Another message is at its offset, or will be.
    Lost(Receipt),
}

impl Keys {
    /// The keys, derived from the broker's one by the salt of each later history of a stream: stream, first offset, salt; of each
    /// stream in order.
    pub fn new<'s>(
        bytes: &[u8],
        histories: impl Iterator<Item = (StreamId, Offset, &'s [u8])>,
    ) -> Self {
        let first = Key::new(bytes);
        let mut later: HashMap<StreamId, Vec<(Offset, Key)>> = HashMap::new();
        for (stream, from, salt) in histories {
            let derived = first.0.clone().chain_update(salt).finalize().into_bytes();
            let keys = later.entry(stream).or_default();
            keys.push((from, Key::new(&derived)));
        }
        Self { first, later }
    }

    /// The place among the stream's keys of the one for an offset: 0 is the first.
    fn place(&self, stream: StreamId, offset: Offset) -> usize {
        let later = self.later.get(&stream).map_or(&[][..], Vec::as_slice);
        // A history can have begun before the end of the one before it.
        later
            .iter()
            .rposition(|(from, _)| *from <= offset)
            .map_or(0, |place| place + 1)
    }

    fn of(&self, stream: StreamId) -> impl Iterator<Item = &Key> {
        let later = self.later.get(&stream).into_iter().flatten();
        std::iter::once(&self.first).chain(later.map(|(_, key)| key))
    }

    /// The receipt of a delivery of a stream's message, as text.
    #[must_use]
    pub fn seal(&self, stream: StreamId, receipt: &Receipt) -> String {
        let key = self.of(stream).nth(self.place(stream, receipt.offset));
        key.unwrap_or(&self.first).seal(receipt)
    }

    /// Opens a text as a receipt of a queue of the stream.
    #[must_use]
    pub fn open(&self, stream: StreamId, text: &str) -> Opened {
        for (place, key) in self.of(stream).enumerate() {
            if let Some(receipt) = key.open(text) {
                return match place == self.place(stream, receipt.offset) {
                    true => Opened::Valid(receipt),
                    false => Opened::Lost(receipt),
                };
            }
        }
        Opened::Unknown
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

    #[test]
    fn a_receipt_of_what_was_lost_is_told_from_that_of_what_came_in_its_place() {
        let at = |offset| Receipt {
            queue: QueueId(7),
            generation: Generation(1),
            offset: Offset(offset),
            delivery: 1,
        };
        let (stream, other) = (StreamId(1), StreamId(2));
        let first = Keys::new(b"k", std::iter::empty());
        let second = Keys::new(b"k", [(stream, Offset(11), &b"s"[..])].into_iter());
        // The third history goes back behind the second one's beginning.
        let third = [
            (stream, Offset(11), &b"s"[..]),
            (stream, Offset(6), &b"t"[..]),
        ];
        let third = Keys::new(b"k", third.into_iter());
        for (keys, offset, later, opened) in [
            (&first, 10, &second, Opened::Valid(at(10))),
            (&first, 11, &second, Opened::Lost(at(11))),
            (&second, 10, &second, Opened::Valid(at(10))),
            (&second, 11, &second, Opened::Valid(at(11))),
            (&first, 5, &third, Opened::Valid(at(5))),
            (&first, 6, &third, Opened::Lost(at(6))),
            (&second, 11, &third, Opened::Lost(at(11))),
            (&third, 11, &third, Opened::Valid(at(11))),
        ] {
            let text = keys.seal(stream, &at(offset));
            assert_eq!(later.open(stream, &text), opened, "{offset}");
        }
        let text = first.seal(other, &at(11));
        assert_eq!(third.open(other, &text), Opened::Valid(at(11)));
        assert_eq!(third.open(stream, "AAAA"), Opened::Unknown);
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
