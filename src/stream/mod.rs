//! Streams: append-only logs with dense offsets, over partitioned tables of Postgres.

mod appender;
mod cache;
mod catalogue;
mod error;
mod handle;
mod reader;
mod request;
mod settings;
mod tail;

pub use appender::{MEMBER_MAX_BYTES, MEMBER_MAX_MESSAGES};
pub use error::{AppendError, ConflictItem, Error};
pub use handle::Handle;
pub use request::{Batch, Member, Page, Placed, Read, Rejected, Scan, ScanItem, Scanned, key_hash};
pub use settings::{
    DEFAULT_HARD_LIMIT, DEFAULT_RETENTION, Declared, Description, PATTERN_MAX_COUNT, Retention,
    Settings, SettingsError,
};
