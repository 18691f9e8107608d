//! The journal's records and their binary form.
//!
//! A blob is a version byte and records, each a tag, a length and a body of varints and strings. Offsets are written as
//! differences. A reader refuses a version or a tag that it does not know: skipping a record would forget a decision.

use roaring::RoaringTreemap;

use super::wire::{Reader, Writer};
use super::{At, Receive};
use crate::domain::message::Priority;
use crate::domain::receipt::write_varint;

const VERSION: u8 = 1;

/// How a delivery ended without settling its message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The consumer gave it back as failed.
    Nacked,
    /// The consumer gave it back as not begun.
    Released,
    /// Its time ran out.
    TimedOut,
    /// The answer never reached the wire.
    Unwritten,
}

/// How a message was settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SettledAs {
    /// By an ack.
    Acked,
    /// By a person.
    Deleted,
    /// By retention's hard limit.
    Gap,
}

/// One durable change of a queue. Ranges are (first, last), both included, ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// Messages were handed out.
    Delivered {
        /// The time.
        at: At,
        /// They are held until then.
        deadline: At,
        /// The receive that took them.
        receive: Receive,
        /// Whether they may be several of one key, to be settled in order.
        in_order: bool,
        /// Messages never handed out before: their delivery has the number 1.
        first: Vec<(i64, i64)>,
        /// Messages handed out before: offset and number of the delivery.
        again: Vec<(i64, u32)>,
    },
    /// Messages were settled.
    Settled {
        /// How.
        kind: SettledAs,
        /// The messages.
        ranges: Vec<(i64, i64)>,
    },
    /// A message became a dead letter.
    Dead {
        /// The messages.
        offset: i64,
        /// Its last delivery.
        delivery: u32,
        /// The time.
        at: At,
        /// The hash of its key, if the queue knows it.
        key: Option<i64>,
        /// Its lane, if the queue knows it.
        priority: Priority,
        /// Whether its key waits for a person from now on.
        holds: bool,
    },
    /// A dead letter was removed.
    LetterRemoved {
        /// The offset of the letter's message.
        offset: i64,
    },
    /// A delivery ended and its message waits.
    Ended {
        /// The message.
        offset: i64,
        /// How it ended.
        end: End,
        /// The time.
        at: At,
        /// The time when the message is ready again.
        due: At,
        /// Attempts that count, this one included if it does.
        attempts: u32,
        /// Releases so far.
        releases: u32,
        /// The consumer's reason.
        reason: Option<String>,
    },
    /// A deadline moved; a delivery that had timed out lives again.
    Extended {
        /// The message.
        offset: i64,
        /// The deadline.
        deadline: At,
        /// Attempts that ended and count.
        attempts: u32,
    },
    /// All live deadlines moved by this many milliseconds: Postgres was away.
    Shifted {
        /// Milliseconds.
        by: i64,
    },
    /// The clock was set back: what began after this moment, or is held for longer after it than can be asked for, began then.
    SetBack {
        /// The moment.
        to: At,
    },
    /// Dead letters came back.
    Redriven {
        /// The time: they are due at once.
        at: At,
        /// Offset, and the number of a delivery that was never handed out: those of before are lower.
        letters: Vec<(i64, u32)>,
    },
    /// The queue is ordered by key no more.
    OrderLeft {
        /// Keys with a live message are in order still, until nothing of them is live.
        leaves: bool,
    },
    /// The queue has looked at the stream up to here. Of the newly seen messages, these match and were not handed out.
    Scanned {
        /// The scan position.
        through: i64,
        /// The fresh messages.
        matched: RoaringTreemap,
    },
}

/// Bytes that no known version of Postroad has written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} in the queue's stored state")]
pub struct Decode {
    /// The finding.
    pub what: &'static str,
}

impl Record {
    /// About how many bytes it takes in the journal.
    pub(super) fn weight(&self) -> usize {
        let own = match self {
            Self::Delivered {
                receive,
                first,
                again,
                ..
            } => {
                let texts = [&receive.consumer, &receive.receive_id];
                let texts = texts.into_iter().flatten().map(String::len);
                texts.sum::<usize>() + 6 * first.len() + 6 * again.len()
            }
            Self::Settled { ranges, .. } => 6 * ranges.len(),
            Self::Ended { reason, .. } => reason.as_ref().map_or(0, String::len),
            Self::Redriven { letters, .. } => 8 * letters.len(),
            Self::Scanned { matched, .. } => matched.serialized_size(),
            _ => 0,
        };
        own + 32
    }
}

/// Ascending offsets as ranges.
pub(super) fn to_ranges(offsets: Vec<i64>) -> Vec<(i64, i64)> {
    let mut offsets = offsets;
    offsets.sort_unstable();
    offsets.dedup();
    let mut ranges: Vec<(i64, i64)> = Vec::new();
    for offset in offsets {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == offset => *last = offset,
            _ => ranges.push((offset, offset)),
        }
    }
    ranges
}

/// Writes records as one blob.
#[must_use]
pub fn encode(records: &[Record]) -> Vec<u8> {
    let mut out = vec![VERSION];
    let mut body = Vec::new();
    for record in records {
        body.clear();
        let tag = write_record(&mut Writer(&mut body), record);
        out.push(tag);
        write_varint(&mut out, body.len() as u64);
        out.extend_from_slice(&body);
    }
    out
}

/// Reads a blob.
///
/// # Errors
/// The bytes are not a blob of a known version.
pub fn decode(bytes: &[u8]) -> Result<Vec<Record>, Decode> {
    let mut from = Reader(bytes);
    if from.byte()? != VERSION {
        return Err(Decode {
            what: "an unknown version of the journal",
        });
    }
    let mut records = Vec::new();
    while !from.0.is_empty() {
        let tag = from.byte()?;
        let length = from.length()?;
        let (body, rest) = from.0.split_at(length);
        from.0 = rest;
        let mut body = Reader(body);
        records.push(read_record(tag, &mut body)?);
        body.end()?;
    }
    Ok(records)
}

fn write_record(to: &mut Writer<'_>, record: &Record) -> u8 {
    match record {
        Record::Delivered {
            at,
            deadline,
            receive,
            in_order,
            first,
            again,
        } => {
            to.signed(at.0);
            to.signed(deadline.0);
            to.receive(receive);
            to.0.push(u8::from(*in_order));
            to.ranges(first);
            to.deliveries(again);
            1
        }
        Record::Settled { kind, ranges } => {
            to.0.push(match kind {
                SettledAs::Acked => 0,
                SettledAs::Deleted => 1,
                SettledAs::Gap => 2,
            });
            to.ranges(ranges);
            2
        }
        Record::Dead {
            offset,
            delivery,
            at,
            key,
            priority,
            holds,
        } => {
            to.signed(*offset);
            to.number(u64::from(*delivery));
            to.signed(at.0);
            to.key(*key);
            to.0.push(priority.stored() as u8);
            to.0.push(u8::from(*holds));
            3
        }
        Record::LetterRemoved { offset } => {
            to.signed(*offset);
            4
        }
        Record::Ended {
            offset,
            end,
            at,
            due,
            attempts,
            releases,
            reason,
        } => {
            to.signed(*offset);
            to.0.push(end.code());
            to.signed(at.0);
            to.signed(due.0.wrapping_sub(at.0));
            to.number(u64::from(*attempts));
            to.number(u64::from(*releases));
            to.text(reason.as_deref());
            5
        }
        Record::Extended {
            offset,
            deadline,
            attempts,
        } => {
            to.signed(*offset);
            to.signed(deadline.0);
            to.number(u64::from(*attempts));
            6
        }
        Record::Shifted { by } => {
            to.signed(*by);
            7
        }
        Record::SetBack { to: moment } => {
            to.signed(moment.0);
            14
        }
        Record::Scanned { through, matched } => {
            to.signed(*through);
            to.offsets(matched);
            8
        }
        Record::Redriven { at, letters } => {
            to.signed(at.0);
            to.deliveries(letters);
            12
        }
        Record::OrderLeft { leaves } => {
            to.0.push(u8::from(*leaves));
            13
        }
    }
}

fn read_record(tag: u8, from: &mut Reader<'_>) -> Result<Record, Decode> {
    Ok(match tag {
        1 => {
            let (at, deadline) = (At(from.signed()?), At(from.signed()?));
            let receive = from.receive()?;
            let in_order = from.flag()?;
            let first = from.ranges()?;
            let again = from.deliveries()?;
            Record::Delivered {
                at,
                deadline,
                receive,
                in_order,
                first,
                again,
            }
        }
        2 => Record::Settled {
            kind: match from.byte()? {
                0 => SettledAs::Acked,
                1 => SettledAs::Deleted,
                2 => SettledAs::Gap,
                _ => {
                    return Err(Decode {
                        what: "an unknown kind of settlement",
                    });
                }
            },
            ranges: from.ranges()?,
        },
        3 => Record::Dead {
            offset: from.signed()?,
            delivery: from.small()?,
            at: At(from.signed()?),
            key: from.key()?,
            priority: Priority::from_stored(i16::from(from.byte()?)),
            holds: from.flag()?,
        },
        4 => Record::LetterRemoved {
            offset: from.signed()?,
        },
        5 => {
            let offset = from.signed()?;
            let end = End::of(from.byte()?)?;
            let at = At(from.signed()?);
            Record::Ended {
                offset,
                end,
                at,
                due: At(at.0.wrapping_add(from.signed()?)),
                attempts: from.small()?,
                releases: from.small()?,
                reason: from.text()?,
            }
        }
        6 => Record::Extended {
            offset: from.signed()?,
            deadline: At(from.signed()?),
            attempts: from.small()?,
        },
        7 => Record::Shifted { by: from.signed()? },
        8 => Record::Scanned {
            through: from.signed()?,
            matched: from.offsets()?,
        },
        14 => Record::SetBack {
            to: At(from.signed()?),
        },
        13 => Record::OrderLeft {
            leaves: from.flag()?,
        },
        12 => Record::Redriven {
            at: At(from.signed()?),
            letters: from.deliveries()?,
        },
        _ => {
            return Err(Decode {
                what: "an unknown record",
            });
        }
    })
}

impl End {
    pub(super) const fn code(self) -> u8 {
        match self {
            Self::Nacked => 0,
            Self::Released => 1,
            Self::TimedOut => 2,
            Self::Unwritten => 3,
        }
    }

    pub(super) const fn of(code: u8) -> Result<Self, Decode> {
        match code {
            0 => Ok(Self::Nacked),
            1 => Ok(Self::Released),
            2 => Ok(Self::TimedOut),
            3 => Ok(Self::Unwritten),
            _ => Err(Decode {
                what: "an unknown end of a delivery",
            }),
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    prop_compose! {
        fn ranges()(parts in proptest::collection::vec((1..50i64, 0..20i64), 0..6)) -> Vec<(i64, i64)> {
            let mut at = 0;
            parts.into_iter().map(|(gap, length)| {
                let from = at + gap + 1;
                at = from + length;
                (from, at)
            }).collect()
        }
    }

    fn text() -> impl Strategy<Value = Option<String>> {
        proptest::option::of(".{0,20}")
    }

    fn record() -> impl Strategy<Value = Record> {
        let at = || any::<i32>().prop_map(|at| At(i64::from(at)));
        prop_oneof![
            (
                at(),
                at(),
                text(),
                text(),
                any::<bool>(),
                ranges(),
                proptest::collection::vec((0..1_000i64, any::<u32>()), 0..5)
            )
                .prop_map(
                    |(at, deadline, consumer, receive_id, in_order, first, again)| {
                        Record::Delivered {
                            at,
                            deadline,
                            receive: Receive {
                                consumer,
                                receive_id,
                            },
                            in_order,
                            first,
                            again,
                        }
                    }
                ),
            (0..3u8, ranges()).prop_map(|(kind, ranges)| Record::Settled {
                kind: [SettledAs::Acked, SettledAs::Deleted, SettledAs::Gap][usize::from(kind)],
                ranges,
            }),
            (
                0..1_000i64,
                any::<u32>(),
                at(),
                any::<Option<i64>>(),
                any::<bool>()
            )
                .prop_map(|(offset, delivery, at, key, holds)| Record::Dead {
                    priority: if holds { Priority::High } else { Priority::Low },
                    offset,
                    delivery,
                    at,
                    key,
                    holds,
                }),
            (0..1_000i64).prop_map(|offset| Record::LetterRemoved { offset }),
            (
                0..1_000i64,
                0..4u8,
                at(),
                at(),
                any::<u32>(),
                any::<u32>(),
                text()
            )
                .prop_map(|(offset, end, at, due, attempts, releases, reason)| {
                    Record::Ended {
                        offset,
                        end: End::of(end).unwrap(),
                        at,
                        due,
                        attempts,
                        releases,
                        reason,
                    }
                }),
            (0..1_000i64, at(), any::<u32>()).prop_map(|(offset, deadline, attempts)| {
                Record::Extended {
                    offset,
                    deadline,
                    attempts,
                }
            }),
            any::<i64>().prop_map(|by| Record::Shifted { by }),
            at().prop_map(|to| Record::SetBack { to }),
            (
                at(),
                proptest::collection::vec((0..1_000i64, any::<u32>()), 0..5)
            )
                .prop_map(|(at, letters)| Record::Redriven { at, letters }),
            any::<bool>().prop_map(|leaves| Record::OrderLeft { leaves }),
            (0..1_000i64, ranges(), any::<bool>()).prop_map(|(through, ranges, many)| {
                let mut matched = RoaringTreemap::new();
                for (from, through) in ranges {
                    matched.insert_range(from as u64..=through as u64);
                }
                if many {
                    matched.extend((0..1_000).map(|number| 10_000 + 3 * number));
                }
                Record::Scanned { through, matched }
            }),
        ]
    }

    proptest! {
        #[test]
        fn records_round_trip(records in proptest::collection::vec(record(), 0..8)) {
            prop_assert_eq!(decode(&encode(&records)).unwrap(), records);
        }

        #[test]
        fn no_bytes_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), known: bool) {
            if known && let Some(first) = bytes.first_mut() {
                *first = VERSION;
            }
            let _ = decode(&bytes);
        }

        #[test]
        fn changed_blobs_do_not_panic(records in proptest::collection::vec(record(), 1..4), place: prop::sample::Index, byte: u8) {
            let mut bytes = encode(&records);
            let place = place.index(bytes.len());
            bytes[place] = byte;
            let _ = decode(&bytes);
        }
    }
}
