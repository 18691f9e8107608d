//! The way from a transaction into the stream: what was committed is there exactly once (I1), what was not is nowhere (I2),
//! nothing twice (I3), offsets dense and the same in every read (I4), no reader skips or goes back (I5), the versions of a key in
//! order (I6), a transaction's messages in order and all of them (I7).

use std::collections::{BTreeMap, BTreeSet};

/// What became of a transaction or a publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Committed,
    /// Rolled back, or refused.
    Failed,
    /// No answer, or one that says so: all of it may be there, or nothing.
    Unknown,
}

/// A message that somebody sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    pub id: String,
    /// A key and its version, counted under the key's lock.
    pub version: Option<(String, u64)>,
    /// Where it was said to be.
    pub offset: Option<u64>,
}

/// A transaction, or a publish that is all or nothing: its messages in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transaction {
    pub fate: Fate,
    pub sent: Vec<Sent>,
}

/// A message that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    pub offset: u64,
    pub id: String,
}

/// All of one stream that nothing was dropped from.
#[derive(Debug, Clone, Default)]
pub struct LogHistory {
    pub transactions: Vec<Transaction>,
    /// What each reader read, in its order.
    pub readers: Vec<Vec<Read>>,
    /// The whole stream, read at the end.
    pub log: Vec<Read>,
}

/// Faults, each one a line.
pub fn check(history: &LogHistory) -> Vec<String> {
    let mut faults = Vec::new();
    let mut places: BTreeMap<&str, u64> = BTreeMap::new();
    for read in &history.log {
        if places.insert(&read.id, read.offset).is_some() {
            faults.push(format!("{} is in the stream twice", read.id));
        }
    }
    for pair in history.log.windows(2) {
        if pair[1].offset != pair[0].offset + 1 {
            faults.push(format!("{} comes after {}", pair[1].offset, pair[0].offset));
        }
    }
    let mut known = BTreeSet::new();
    for transaction in &history.transactions {
        known.extend(transaction.sent.iter().map(|sent| sent.id.as_str()));
        check_transaction(transaction, &places, &mut faults);
    }
    for id in places.keys().filter(|id| !known.contains(*id)) {
        faults.push(format!("{id} is in the stream, and nobody sent it"));
    }
    check_readers(history, &mut faults);
    check_versions(history, &places, &mut faults);
    faults
}

fn check_transaction(
    transaction: &Transaction,
    places: &BTreeMap<&str, u64>,
    faults: &mut Vec<String>,
) {
    let place = |sent: &Sent| places.get(sent.id.as_str()).copied();
    let found: Vec<u64> = transaction.sent.iter().filter_map(place).collect();
    let is_whole = found.len() == transaction.sent.len();
    let Some(first) = transaction.sent.first().map(|sent| &sent.id) else {
        return;
    };
    match transaction.fate {
        Fate::Committed if !is_whole => {
            faults.push(format!(
                "of the transaction of {first} {} are lost",
                transaction.sent.len() - found.len()
            ));
        }
        Fate::Failed if !found.is_empty() => {
            faults.push(format!(
                "of the transaction of {first}, which failed, {} are there",
                found.len()
            ));
        }
        Fate::Unknown if !is_whole && !found.is_empty() => {
            faults.push(format!("the transaction of {first} is there by half"));
        }
        _ => {}
    }
    if !found.is_sorted() {
        faults.push(format!(
            "the transaction of {first} is out of order: {found:?}"
        ));
    }
    for sent in &transaction.sent {
        if sent.offset.is_some() && sent.offset != place(sent) {
            faults.push(format!(
                "{} was said to be at {:?}, and is at {:?}",
                sent.id,
                sent.offset,
                place(sent)
            ));
        }
    }
}

fn check_readers(history: &LogHistory, faults: &mut Vec<String>) {
    let by_offset: BTreeMap<u64, &str> = history
        .log
        .iter()
        .map(|read| (read.offset, read.id.as_str()))
        .collect();
    for (number, reads) in history.readers.iter().enumerate() {
        for pair in reads.windows(2) {
            if pair[1].offset != pair[0].offset + 1 {
                faults.push(format!(
                    "reader {number} went from {} to {}",
                    pair[0].offset, pair[1].offset
                ));
            }
        }
        for read in reads {
            let is = by_offset.get(&read.offset).copied();
            if is != Some(read.id.as_str()) {
                faults.push(format!(
                    "reader {number} read {} at {}, where {is:?} is",
                    read.id, read.offset
                ));
            }
        }
    }
}

/// Versions that are there, by offset, count from one without a gap: a failed one's number is taken by the next.
fn check_versions(history: &LogHistory, places: &BTreeMap<&str, u64>, faults: &mut Vec<String>) {
    let sent = history
        .transactions
        .iter()
        .flat_map(|transaction| &transaction.sent);
    let mut keys: BTreeMap<&str, BTreeMap<u64, u64>> = BTreeMap::new();
    for sent in sent {
        if let Some((key, version)) = &sent.version
            && let Some(place) = places.get(sent.id.as_str())
        {
            keys.entry(key).or_default().insert(*place, *version);
        }
    }
    for (key, versions) in keys {
        let versions: Vec<u64> = versions.into_values().collect();
        if !versions.iter().copied().eq(1..=versions.len() as u64) {
            faults.push(format!("the versions of {key} are {versions:?}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(id: &str, version: u64, offset: Option<u64>) -> Sent {
        Sent {
            id: id.to_owned(),
            version: Some(("k".to_owned(), version)),
            offset,
        }
    }

    fn read(ids: &[&str]) -> Vec<Read> {
        let ids = ids.iter().zip(1..);
        let reads = ids.map(|(id, offset)| Read {
            offset,
            id: (*id).to_owned(),
        });
        reads.collect()
    }

    /// Two committed ones, one that was rolled back, one that was not answered.
    fn sound() -> LogHistory {
        let transaction = |fate, sent| Transaction { fate, sent };
        LogHistory {
            transactions: vec![
                transaction(
                    Fate::Committed,
                    vec![sent("a", 1, Some(1)), sent("b", 2, Some(2))],
                ),
                transaction(Fate::Failed, vec![sent("c", 3, None)]),
                transaction(Fate::Unknown, vec![sent("d", 3, None), sent("e", 4, None)]),
                transaction(Fate::Committed, vec![sent("f", 5, None)]),
            ],
            readers: vec![read(&["a", "b"]), read(&["a", "b", "d", "e", "f"])],
            log: read(&["a", "b", "d", "e", "f"]),
        }
    }

    #[track_caller]
    fn finds(fault: &str, plant: impl FnOnce(&mut LogHistory)) {
        let mut history = sound();
        plant(&mut history);
        let faults = check(&history);
        assert!(
            faults.iter().any(|found| found.contains(fault)),
            "{fault}: {faults:?}"
        );
    }

    #[test]
    fn a_sound_log_has_no_fault() {
        assert_eq!(check(&sound()), Vec::<String>::new());
        let mut without = sound();
        without.transactions[2].sent.clear();
        without.transactions[3].sent[0].version = Some(("k".to_owned(), 3));
        (without.log, without.readers) = (read(&["a", "b", "f"]), Vec::new());
        assert_eq!(
            check(&without),
            Vec::<String>::new(),
            "what is not answered may be nowhere"
        );
    }

    #[test]
    fn planted_faults_are_found() {
        finds("of the transaction of f 1 are lost", |history| {
            history.log.truncate(4)
        });
        finds("which failed, 1 are there", |history| {
            history.log = read(&["a", "b", "c", "d", "e", "f"])
        });
        finds("d is there by half", |history| {
            history.log = read(&["a", "b", "d", "f"])
        });
        finds("b is in the stream twice", |history| {
            history.log = read(&["a", "b", "b", "d", "e", "f"])
        });
        finds("x is in the stream, and nobody sent it", |history| {
            history.log.extend(read(&["x"]))
        });
        finds("9 comes after 4", |history| history.log[4].offset = 9);
        finds("out of order: [2, 1]", |history| {
            history.log = read(&["b", "a", "d", "e", "f"])
        });
        finds(
            "a was said to be at Some(3), and is at Some(1)",
            |history| {
                history.transactions[0].sent[0].offset = Some(3);
            },
        );
        finds("reader 1 went from 1 to 3", |history| {
            history.readers[1].remove(1);
        });
        finds("reader 0 went from 2 to 1", |history| {
            let first = history.readers[0][0].clone();
            history.readers[0].push(first);
        });
        finds("reader 0 read x at 1", |history| {
            history.readers[0][0].id = "x".to_owned()
        });
        finds("the versions of k are [1, 2, 4, 3, 5]", |history| {
            history.log = read(&["a", "b", "e", "d", "f"]);
        });
    }
}
