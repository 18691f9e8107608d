//! Lists of locks, read beside the task that takes them, so that no renewal waits, however many read. It is a separate
//! task, so that a caller may go away without leaving a connection half used.

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc;

use super::{Error, Reply};
use crate::domain::name::LockName;
use crate::store::Database;
use crate::store::lock::{self as sql, Described};
use crate::supervisor::Supervisor;

/// Lists that are read at a time: the pool is for others too.
const READS: usize = 2;

/// The request to read.
#[derive(Debug)]
pub(super) struct List {
    /// This lock alone.
    pub(super) one: Option<LockName>,
    pub(super) after: Option<LockName>,
    pub(super) limit: i64,
    pub(super) reply: Reply<Vec<Described>>,
}

impl List {
    async fn read(self, database: Database) {
        if self.reply.is_closed() {
            // Nobody waits for it any more.
            return;
        }
        let listed = match &self.one {
            Some(one) => sql::find(&database, one).await,
            None => sql::list(&database, self.after.as_ref(), self.limit).await,
        };
        let _ = self.reply.send(listed.map_err(Error::from));
    }
}

/// Reads lists until the process stops.
pub(super) async fn run(
    database: Database,
    supervisor: Supervisor,
    mut lists: mpsc::Receiver<List>,
) {
    let mut reads = FuturesUnordered::new();
    loop {
        tokio::select! {
            list = lists.recv(), if reads.len() < READS => match list {
                Some(list) => reads.push(list.read(database.clone())),
                // Every handle is gone.
                None => break,
            },
            Some(()) = reads.next() => {}
            () = supervisor.stopping() => break,
        }
    }
    lists.close();
    while reads.next().await.is_some() {}
    supervisor.stopping().await;
}
