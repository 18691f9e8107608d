//! A page of rows, read by their places. When the contents of a row make it unreadable, the page is read in halves until
//! that row stands alone: it is listed as rejected, with as much of it as the server returns, and the other rows go on.

use std::collections::HashMap;

use super::row;
use crate::store;
use crate::store::mapped::ROW_MAX_BYTES;
use crate::store::origin::{Ids, OutboxRow, Place, Session};
use crate::stream::Rejected;

/// The outcome of reading some rows.
#[derive(Debug, Default)]
pub(super) struct Page {
    pub(super) rows: Vec<OutboxRow>,
    /// The rows that cannot be read.
    pub(super) unread: Vec<Rejected>,
}

impl Page {
    pub(super) fn of(rows: Vec<OutboxRow>) -> Self {
        Self {
            rows,
            unread: Vec::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len() + self.unread.len()
    }

    /// Reads the rows at these places, by seq. Fewer, when a row is not where it was.
    pub(super) async fn read(
        session: &mut Session,
        places: &[Place],
    ) -> Result<Self, store::Error> {
        let fits = |place: &&Place| place.bytes as usize <= ROW_MAX_BYTES;
        let mut page = Self::default();
        for place in places.iter().filter(|place| !fits(place)) {
            page.unread.push(Rejected {
                seq: place.seq,
                reason: format!(
                    "the row is about {} bytes long, at most {ROW_MAX_BYTES} are allowed",
                    place.bytes
                ),
                outbox_row: row::unread_copy(place.seq, None),
            });
        }
        let places: Vec<Place> = places.iter().filter(fits).copied().collect();
        let mut parts = vec![&places[..]];
        let mut broken = Vec::new();
        while let Some(part) = parts.pop() {
            match session.read_places(part).await {
                Ok(rows) => page.rows.extend(rows),
                Err(error) if !error.is_row_unreadable() && !error.is_canceled() => {
                    return Err(error);
                }
                Err(error) => match part {
                    [_] if error.is_canceled() => return Err(error),
                    [place] => broken.push((*place, error)),
                    _ => {
                        let (first, second) = part.split_at(part.len() / 2);
                        parts.extend([second, first]);
                    }
                },
            }
        }
        for (place, error) in broken {
            // An internal error of every row is one of the table.
            if error.is_internal() && page.rows.is_empty() {
                return Err(error);
            }
            let raw = session.read_raw(place).await;
            page.unread.push(unread(place.seq, &error, kept(raw)?));
        }
        Ok(page)
    }
}

/// The identities of the messages of the rows at these places, in their order; none of a row that cannot say it. Fewer, when a row is
/// not where it was.
pub(super) async fn read_ids(
    session: &mut Session,
    places: &[Place],
) -> Result<Vec<Option<Ids>>, store::Error> {
    let mut known: HashMap<(i64, i16, u32, u16), Option<Ids>> = HashMap::new();
    let name = |place: &Place| (place.seq, place.leaf, place.block, place.line);
    let mut parts = vec![places];
    while let Some(part) = parts.pop() {
        match session.read_ids(part).await {
            Ok(found) => {
                let found = found.into_iter();
                known.extend(found.map(|(place, ids)| (name(&place), Some(ids))));
            }
            Err(error) if !error.is_row_unreadable() && !error.is_canceled() => return Err(error),
            Err(error) => match part {
                [_] if error.is_canceled() => return Err(error),
                [place] => {
                    known.insert(name(place), None);
                }
                _ => {
                    let (first, second) = part.split_at(part.len() / 2);
                    parts.extend([second, first]);
                }
            },
        }
    }
    Ok(places
        .iter()
        .filter_map(|place| known.remove(&name(place)))
        .collect())
}

/// The part of an unreadable row that the server gives out, which can be nothing.
pub(super) fn kept(
    raw: Result<Option<String>, store::Error>,
) -> Result<Option<String>, store::Error> {
    match raw {
        Err(error) if error.is_row_unreadable() => Ok(None),
        other => other,
    }
}

pub(super) fn unread(seq: i64, error: &store::Error, raw: Option<String>) -> Rejected {
    Rejected {
        seq,
        reason: format!("the row cannot be read: {}", error.reason()),
        outbox_row: row::unread_copy(seq, raw),
    }
}
