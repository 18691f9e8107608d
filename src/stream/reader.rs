//! Reads of the log. A few tasks with a connection each, so that no read is ever cut off inside a statement and no more
//! run at once than the database should bear.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use tokio::sync::oneshot;

use super::Error;
use super::request::{Page, Read, Scan, Scanned};
use crate::domain::id::{Offset, StreamId};
use crate::domain::message::Entry;

type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// What is asked of the readers.
#[derive(Debug)]
pub(super) enum Job {
    Read {
        read: Read,
        reply: Reply<Page>,
    },
    Scan {
        scan: Scan,
        reply: Reply<Scanned>,
    },
    Fetch {
        stream: StreamId,
        offsets: Vec<Offset>,
        reply: Reply<Vec<Arc<Entry>>>,
    },
    FindPresent {
        ids: Vec<(String, String)>,
        reply: Reply<Vec<bool>>,
    },
    OffsetAt {
        stream: StreamId,
        at: DateTime<Utc>,
        reply: Reply<Offset>,
    },
}
