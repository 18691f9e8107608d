//! The parts that records and checkpoints are made of: varints, texts, ranges.

use roaring::RoaringTreemap;

use super::Receive;
use super::record::Decode;
use crate::domain::receipt::{read_varint, write_varint};

/// Sets of more runs than this are written as bitmaps, which take two bytes for each offset at most.
const RUNS_MAX: usize = 64;
/// A record that stands for more offsets than this was not written by Postroad.
const OFFSETS_MAX: u64 = 100_000_000;

/// Writes the parts that records and checkpoints are made of.
pub(super) struct Writer<'a>(pub(super) &'a mut Vec<u8>);

impl Writer<'_> {
    pub(super) fn number(&mut self, value: u64) {
        write_varint(self.0, value);
    }

    /// Zigzag: small numbers of either sign are short.
    pub(super) fn signed(&mut self, value: i64) {
        write_varint(self.0, ((value << 1) ^ (value >> 63)) as u64);
    }

    pub(super) fn text(&mut self, text: Option<&str>) {
        match text {
            None => self.number(0),
            Some(text) => {
                self.number(text.len() as u64 + 1);
                self.0.extend_from_slice(text.as_bytes());
            }
        }
    }

    pub(super) fn receive(&mut self, receive: &Receive) {
        self.text(receive.consumer.as_deref());
        self.text(receive.receive_id.as_deref());
    }

    pub(super) fn ranges(&mut self, ranges: &[(i64, i64)]) {
        self.number(ranges.len() as u64);
        let mut last = 0i64;
        for &(from, through) in ranges {
            self.signed(from.wrapping_sub(last));
            self.number(through.wrapping_sub(from) as u64);
            last = through;
        }
    }

    /// Offsets with the numbers of their deliveries.
    pub(super) fn deliveries(&mut self, deliveries: &[(i64, u32)]) {
        self.number(deliveries.len() as u64);
        let mut last = 0i64;
        for &(offset, delivery) in deliveries {
            self.signed(offset.wrapping_sub(last));
            self.number(u64::from(delivery));
            last = offset;
        }
    }

    /// The hash of a key, or none.
    pub(super) fn key(&mut self, key: Option<i64>) {
        match key {
            None => self.0.push(0),
            Some(key) => {
                self.0.push(1);
                self.0.extend_from_slice(&key.to_le_bytes());
            }
        }
    }

    pub(super) fn offsets(&mut self, offsets: &RoaringTreemap) {
        let mut runs: Vec<(i64, i64)> = Vec::new();
        for offset in offsets {
            let offset = offset as i64;
            if let Some((_, last)) = runs.last_mut()
                && *last + 1 == offset
            {
                *last = offset;
                continue;
            }
            if runs.len() == RUNS_MAX {
                self.0.push(1);
                return self.bitmap(offsets);
            }
            runs.push((offset, offset));
        }
        self.0.push(0);
        self.ranges(&runs);
    }

    pub(super) fn bitmap(&mut self, bitmap: &RoaringTreemap) {
        self.number(bitmap.serialized_size() as u64);
        bitmap
            .serialize_into(&mut *self.0)
            .expect("writing into memory does not fail");
    }
}

/// Reads the parts that records and checkpoints are made of. Never panics, and allocates no more than it was given.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

const CUT: Decode = Decode {
    what: "a value cut short",
};

impl<'a> Reader<'a> {
    pub(super) fn byte(&mut self) -> Result<u8, Decode> {
        let (&byte, rest) = self.0.split_first().ok_or(CUT)?;
        self.0 = rest;
        Ok(byte)
    }

    pub(super) fn number(&mut self) -> Result<u64, Decode> {
        read_varint(&mut self.0).ok_or(CUT)
    }

    pub(super) fn small(&mut self) -> Result<u32, Decode> {
        u32::try_from(self.number()?).map_err(|_| Decode {
            what: "a count out of range",
        })
    }

    pub(super) fn signed(&mut self) -> Result<i64, Decode> {
        let value = self.number()?;
        Ok(((value >> 1) as i64) ^ -((value & 1) as i64))
    }

    /// The length of a part that follows.
    pub(super) fn length(&mut self) -> Result<usize, Decode> {
        match usize::try_from(self.number()?) {
            Ok(length) if length <= self.0.len() => Ok(length),
            _ => Err(CUT),
        }
    }

    /// The length of a list: each of its items takes a byte at least.
    pub(super) fn length_of_list(&mut self) -> Result<usize, Decode> {
        self.length()
    }

    pub(super) fn bytes(&mut self, length: usize) -> Result<&'a [u8], Decode> {
        let (bytes, rest) = self.0.split_at_checked(length).ok_or(CUT)?;
        self.0 = rest;
        Ok(bytes)
    }

    pub(super) fn text(&mut self) -> Result<Option<String>, Decode> {
        let length = self.number()?;
        if length == 0 {
            return Ok(None);
        }
        let length = usize::try_from(length - 1).map_err(|_| CUT)?;
        let bytes = self.bytes(length)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(Some(text.to_owned())),
            Err(_) => Err(Decode {
                what: "a text that is not UTF-8",
            }),
        }
    }

    pub(super) fn receive(&mut self) -> Result<Receive, Decode> {
        Ok(Receive {
            consumer: self.text()?,
            receive_id: self.text()?,
        })
    }

    pub(super) fn ranges(&mut self) -> Result<Vec<(i64, i64)>, Decode> {
        let out_of_range = Decode {
            what: "a range out of range",
        };
        let count = self.length_of_list()?;
        let mut ranges = Vec::with_capacity(count);
        let (mut last, mut total) = (0i64, 0u64);
        for _ in 0..count {
            let from = last
                .checked_add(self.signed()?)
                .ok_or(out_of_range.clone())?;
            let length = self.number()?;
            total = total.saturating_add(length);
            if total > OFFSETS_MAX || from < 0 {
                return Err(out_of_range);
            }
            last = from
                .checked_add(length as i64)
                .ok_or(out_of_range.clone())?;
            ranges.push((from, last));
        }
        Ok(ranges)
    }

    pub(super) fn deliveries(&mut self) -> Result<Vec<(i64, u32)>, Decode> {
        let count = self.length_of_list()?;
        let mut deliveries = Vec::with_capacity(count);
        let mut last = 0i64;
        for _ in 0..count {
            last = last.wrapping_add(self.signed()?);
            deliveries.push((last, self.small()?));
        }
        Ok(deliveries)
    }

    pub(super) fn flag(&mut self) -> Result<bool, Decode> {
        match self.byte()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Decode {
                what: "a flag that is neither set nor clear",
            }),
        }
    }

    pub(super) fn key(&mut self) -> Result<Option<i64>, Decode> {
        if !self.flag()? {
            return Ok(None);
        }
        let bytes = self.bytes(8)?.try_into().map_err(|_| CUT)?;
        Ok(Some(i64::from_le_bytes(bytes)))
    }

    pub(super) fn offsets(&mut self) -> Result<RoaringTreemap, Decode> {
        if self.flag()? {
            let offsets = self.bitmap()?;
            let is_in_range = offsets.len() <= OFFSETS_MAX
                && offsets.max().is_none_or(|last| last <= i64::MAX as u64);
            return match is_in_range {
                true => Ok(offsets),
                false => Err(Decode {
                    what: "a set out of range",
                }),
            };
        }
        let mut offsets = RoaringTreemap::new();
        for (from, through) in self.ranges()? {
            offsets.insert_range(from as u64..=through as u64);
        }
        Ok(offsets)
    }

    pub(super) fn bitmap(&mut self) -> Result<RoaringTreemap, Decode> {
        let length = self.length()?;
        let bytes = self.bytes(length)?;
        RoaringTreemap::deserialize_from(bytes).map_err(|_| Decode {
            what: "a set that cannot be read",
        })
    }

    pub(super) fn end(&self) -> Result<(), Decode> {
        match self.0.is_empty() {
            true => Ok(()),
            false => Err(Decode {
                what: "more than was expected",
            }),
        }
    }
}
