//! Seek and purge.

use crate::domain::id::{Generation, Offset};

/// The result of a seek or a purge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Renewed {
    /// The generation that began.
    pub generation: Generation,
    /// The queue goes on after this offset.
    pub through_offset: Offset,
    /// Retention had dropped some of the requested messages: the generation begins with the first one left.
    pub at_floor: bool,
    /// The stream's end is before that: nothing is delivered until the stream has got there.
    pub ahead: bool,
}

/// Says if a queue whose log was restored without it may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnLoss {
    /// It stays as it is: [`Error::LogBehind`](super::Error::LogBehind).
    Refuse,
    /// It begins its next generation: what the log lacks is lost to it.
    Accept,
}
