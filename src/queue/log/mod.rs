//! How the queues read the log and the dead letters: what the tail brings, scans that queues share, payloads, letters.

pub(super) mod feed;
pub(super) mod letters;
mod pages;
pub(super) mod scans;
