//! The methods that look right and are not, run beside the relay on the same outbox: a checker that never fails proves nothing.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sqlx::{Connection as _, PgConnection};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{Logged, Origin, Verdict, connect, execute, judge, shop};

/// What each wrong method made of it.
#[derive(Debug)]
pub struct Verdicts {
    pub by_seq: Verdict,
    pub by_seq_and_xmin: Verdict,
    pub by_xid: Verdict,
}

struct Reader {
    /// The highest seq it has read.
    last: watch::Receiver<i64>,
    task: JoinHandle<Vec<Logged>>,
}

pub struct Wrong {
    stop: Arc<AtomicBool>,
    by_seq: Reader,
    by_seq_and_xmin: Reader,
    by_xid: Reader,
}

const COLUMNS: &str = "seq, xid::text::bigint, id, key, case when payload is not null then payload::json ->> 'version' end";

impl Reader {
    /// Polls with a condition on the last ($1 seq, $2 xid) and an order.
    fn start(origin: &Origin, condition: &str, order: &str, stop: &Arc<AtomicBool>) -> Self {
        let text =
            format!("select {COLUMNS} from postroad.outbox where {condition} order by {order}");
        let url = origin.relay_url();
        let stop = Arc::clone(stop);
        let (sender, last) = watch::channel(0);
        let task = tokio::spawn(async move {
            let mut connection = PgConnection::connect(&url).await.unwrap();
            execute(
                &mut connection,
                "set statement_timeout = 0; set default_transaction_isolation = 'read committed'",
            )
            .await;
            let mut messages = Vec::new();
            let mut position = (0_i64, 0_i64);
            loop {
                let is_last = stop.load(Ordering::Relaxed);
                let rows: Vec<(i64, i64, String, Option<String>, Option<String>)> =
                    sqlx::query_as(sqlx::AssertSqlSafe(text.clone()))
                        .bind(position.0)
                        .bind(position.1.to_string())
                        .fetch_all(&mut connection)
                        .await
                        .unwrap();
                for (seq, xid, id, key, version) in rows {
                    position = (seq, xid);
                    messages.push(Logged {
                        id,
                        key,
                        version: version.map(|version| version.parse().unwrap()),
                    });
                    sender.send_if_modified(|last| {
                        let is_higher = seq > *last;
                        *last = seq.max(*last);
                        is_higher
                    });
                }
                if is_last {
                    return messages;
                }
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
        });
        Self { last, task }
    }

    async fn has_read(&self, seq: i64) {
        let mut last = self.last.clone();
        last.wait_for(|last| *last >= seq).await.unwrap();
    }
}

impl Wrong {
    pub fn start(origin: &Origin) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let horizon = "xid < pg_snapshot_xmin(pg_current_snapshot())";
        Self {
            by_seq: Reader::start(origin, "seq > $1 and $2 <> ''", "seq", &stop),
            by_seq_and_xmin: Reader::start(
                origin,
                &format!("seq > $1 and $2 <> '' and {horizon}"),
                "seq",
                &stop,
            ),
            by_xid: Reader::start(
                origin,
                &format!("(xid, seq) > ($2::text::xid8, $1) and {horizon}"),
                "xid, seq",
                &stop,
            ),
            stop,
        }
    }

    /// The interleavings that each method fails on, on stage rather than left to chance. With the horizon held back by the
    /// open transactions of the race, the methods that look at it see nothing until those end: their scenes then play in
    /// hindsight, so the one that depends on the reader's timing is played without.
    pub async fn stage(&self, origin: &Origin) {
        // `seq > last`: the smaller number commits after the larger was read.
        let mut early = origin.producer().await;
        let mut late = origin.producer().await;
        execute(&mut late, "begin").await;
        shop::note(&mut late).await.unwrap();
        shop::note(&mut early).await.unwrap();
        let mut owner = connect(&origin.url).await;
        let highest: i64 = sqlx::query_scalar("select max(seq) from postroad.outbox")
            .fetch_one(&mut owner)
            .await
            .unwrap();
        self.by_seq.has_read(highest).await;
        execute(&mut late, "commit").await;
        // `(xid, seq)`: the transaction with the smaller id writes the key last.
        let mut first = origin.producer().await;
        let mut second = origin.producer().await;
        execute(&mut second, "begin; select pg_current_xact_id()").await;
        execute(&mut first, "begin").await;
        shop::sell(&mut first, 1).await.unwrap();
        execute(&mut first, "commit").await;
        shop::sell(&mut second, 1).await.unwrap();
        execute(&mut second, "commit").await;
    }

    /// The scene for `seq > last` under the xmin horizon: the larger number has the smaller transaction id. Played when no
    /// other transaction holds the horizon back.
    pub async fn stage_horizon(&self, origin: &Origin) {
        let mut older = origin.producer().await;
        let mut younger = origin.producer().await;
        execute(&mut older, "begin; select pg_current_xact_id()").await;
        execute(&mut younger, "begin").await;
        shop::note(&mut younger).await.unwrap();
        shop::note(&mut older).await.unwrap();
        execute(&mut older, "commit").await;
        let mut owner = connect(&origin.url).await;
        let highest: i64 = sqlx::query_scalar("select max(seq) from postroad.outbox")
            .fetch_one(&mut owner)
            .await
            .unwrap();
        self.by_seq_and_xmin.has_read(highest).await;
        execute(&mut younger, "commit").await;
    }

    pub async fn finish(self, committed: &HashSet<String>) -> Verdicts {
        // One more look after everything has ended.
        tokio::time::sleep(Duration::from_millis(20)).await;
        self.stop.store(true, Ordering::Relaxed);
        Verdicts {
            by_seq: judge(committed, &self.by_seq.task.await.unwrap()),
            by_seq_and_xmin: judge(committed, &self.by_seq_and_xmin.task.await.unwrap()),
            by_xid: judge(committed, &self.by_xid.task.await.unwrap()),
        }
    }
}
