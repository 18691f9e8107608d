//! The streams that there are: declared, described, deleted; and how far their queues are.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use tokio::sync::oneshot;

use super::Error;
use super::settings::{Declared, Description, Settings};
use crate::domain::id::{Offset, StreamId};
use crate::domain::name::StreamName;

type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// What is asked of the catalogue's task.
#[derive(Debug)]
pub(super) enum Job {
    Declare {
        name: StreamName,
        settings: Settings,
        reply: Reply<(Description, Declared)>,
    },
    Describe {
        name: StreamName,
        reply: Reply<Description>,
    },
    List {
        reply: Reply<Vec<Description>>,
    },
    Delete {
        name: StreamName,
        reply: Reply<()>,
    },
}

/// Up to where every queue of a stream has settled, as the queue engine tells it.
#[derive(Debug, Default)]
pub(super) struct Watermarks {
    streams: Mutex<HashMap<StreamId, Offset>>,
}

impl Watermarks {
    pub(super) fn set(&self, stream: StreamId, watermark: Offset) {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams.insert(stream, watermark);
    }

    /// `None` until told.
    pub(super) fn get(&self, stream: StreamId) -> Option<Offset> {
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams.get(&stream).copied()
    }
}
