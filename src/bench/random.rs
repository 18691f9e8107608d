//! The contents of the load: payloads and keys, chosen by a seed.

use std::path::Path;

use super::Error;
use super::options::Skew;
use crate::domain::queue::Random;

/// Payloads made up in advance; a load uses them in turn.
const PAYLOADS: usize = 1_000;
const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// JSON documents of exactly this many bytes. They have random letters, since text that compresses well would flatter large
/// payloads.
pub(super) fn payloads(bytes: u32, seed: u64) -> Vec<String> {
    let mut random = Random::new(seed);
    let (head, tail) = ("{\"text\":\"", "\"}");
    let letters = (bytes as usize).saturating_sub(head.len() + tail.len());
    // Some megabytes are plenty.
    let count = (8_000_000 / (bytes as usize + 1)).clamp(4, PAYLOADS);
    (0..count)
        .map(|_| {
            let mut text = String::with_capacity(bytes as usize);
            text.push_str(head);
            for _ in 0..letters {
                text.push(char::from(LETTERS[below(&mut random, 64)]));
            }
            text.push_str(tail);
            text
        })
        .collect()
}

/// The lines of a file, each of which must be a JSON document.
pub(super) fn payloads_of(path: &Path) -> Result<Vec<String>, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::File {
        path: path.to_owned(),
        source,
    })?;
    let mut payloads = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        if let Err(source) = serde_json::from_str::<&serde_json::value::RawValue>(line) {
            return Err(Error::Payload {
                path: path.to_owned(),
                line: number + 1,
                source,
            });
        }
        payloads.push(line.to_owned());
    }
    if payloads.is_empty() {
        return Err(Error::NoPayload {
            path: path.to_owned(),
        });
    }
    Ok(payloads)
}

fn below(random: &mut Random, below: usize) -> usize {
    ((random.next_unit() * below as f64) as usize).min(below.saturating_sub(1))
}

/// Chooses keys.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    count: usize,
    /// For Zipf's law: the cumulative share of the keys up to and including each.
    shares: Vec<f64>,
}

impl Keys {
    pub(super) fn new(count: u32, skew: Skew) -> Self {
        let count = count as usize;
        let mut shares = Vec::new();
        if skew == Skew::Zipf {
            let mut sum = 0.0;
            shares.extend((1..=count).map(|rank| {
                sum += 1.0 / rank as f64;
                sum
            }));
            for share in &mut shares {
                *share /= sum;
            }
        }
        Self { count, shares }
    }

    pub(super) const fn count(&self) -> usize {
        self.count
    }

    /// The number of the next key; `None` when the load has no keys.
    pub(super) fn next(&self, random: &mut Random) -> Option<usize> {
        if self.count == 0 {
            return None;
        }
        if self.shares.is_empty() {
            return Some(below(random, self.count));
        }
        let unit = random.next_unit();
        let found = self.shares.partition_point(|share| *share < unit);
        Some(found.min(self.count - 1))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_json_of_the_asked_size() {
        for bytes in [16, 256, 2_048] {
            for payload in payloads(bytes, 7) {
                assert_eq!(payload.len(), bytes as usize);
                serde_json::from_str::<serde_json::Value>(&payload).unwrap();
            }
        }
        assert_eq!(payloads(64, 7), payloads(64, 7));
        assert_ne!(payloads(64, 7), payloads(64, 8));
    }

    #[test]
    fn a_file_of_payloads_is_checked_line_by_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("payloads");
        std::fs::write(&path, "{\"a\":1}\n\n[2]\n").unwrap();
        assert_eq!(payloads_of(&path).unwrap(), ["{\"a\":1}", "[2]"]);
        std::fs::write(&path, "{}\n{oops\n").unwrap();
        assert!(matches!(
            payloads_of(&path),
            Err(Error::Payload { line: 2, .. })
        ));
        std::fs::write(&path, "\n").unwrap();
        assert!(matches!(payloads_of(&path), Err(Error::NoPayload { .. })));
    }

    #[test]
    fn keys_are_uniform_or_follow_zipf() {
        let draw = |skew| {
            let keys = Keys::new(100, skew);
            let mut random = Random::new(3);
            let mut counts = vec![0u32; 100];
            for _ in 0..100_000 {
                counts[keys.next(&mut random).unwrap()] += 1;
            }
            counts
        };
        let uniform = draw(Skew::Uniform);
        assert!(uniform.iter().all(|count| (800..1_200).contains(count)));
        let zipf = draw(Skew::Zipf);
        // The harmonic number of 100 is 5.187.
        assert!((18_500..20_100).contains(&zipf[0]), "{}", zipf[0]);
        assert!((9_000..10_300).contains(&zipf[1]), "{}", zipf[1]);
        assert!(zipf[99] > 100 && zipf[99] < 300, "{}", zipf[99]);
        assert_eq!(Keys::new(0, Skew::Zipf).next(&mut Random::new(1)), None);
    }
}
