//! Signals, and the end of a stop that hangs.
//!
//! A separate thread listens for signals, because a runtime whose threads are all busy would not notice them. The same
//! thread ends the process when a stop takes too long, or when the runtime does not react to a second signal.

use std::time::Duration;

use anyhow::Context as _;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use crate::supervisor::thread;
use crate::telemetry::Hangup;
use crate::{app, telemetry};

/// How long the process has to end by itself after a second signal.
const AT_ONCE: Duration = Duration::from_secs(2);
/// How long the last lines of the log have.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// The status of a process that had to be ended.
const STATUS: i32 = 1;

/// The signals that came so far: how many, and the last one's name.
#[derive(Debug, Clone, Copy, Default)]
struct Heard {
    count: usize,
    last: &'static str,
}

/// The signals that ask the process to stop: SIGTERM, SIGINT and SIGHUP, which a terminal sends when it closes.
pub(super) struct Signals {
    heard: watch::Receiver<Heard>,
    seen: usize,
    deadline: watch::Sender<Option<Instant>>,
    longest_stop: Duration,
}

impl Signals {
    /// Listens from now on. After the first signal the process ends within `longest_stop`, come what may.
    pub(super) fn listen(longest_stop: Duration) -> anyhow::Result<Self> {
        let (heard, receiver) = watch::channel(Heard::default());
        let (deadline, deadlines) = watch::channel(None);
        let (started, has_started) = oneshot::channel();
        let work = move || {
            let begun = begin();
            let (runtime, ears) = match begun {
                Ok(begun) => {
                    let _ = started.send(Ok(()));
                    begun
                }
                Err(error) => {
                    let _ = started.send(Err(error));
                    return;
                }
            };
            runtime.block_on(hear(ears, heard, deadlines, longest_stop));
        };
        thread("signals", work).context("starting a thread failed")?;
        has_started
            .blocking_recv()
            .context("the thread for signals ended")??;
        Ok(Self {
            heard: receiver,
            seen: 0,
            deadline,
            longest_stop,
        })
    }

    /// The next one's name. Cancel-safe.
    pub(super) async fn next(&mut self) -> &'static str {
        let seen = self.seen;
        let name = match self.heard.wait_for(|heard| heard.count > seen).await {
            Ok(heard) => heard.last,
            // The thread never ends.
            Err(_) => std::future::pending().await,
        };
        self.seen += 1;
        name
    }

    /// A stop begins that no signal asked for.
    pub(super) fn stop_begins(&self) {
        let until = Instant::now() + self.longest_stop;
        self.deadline.send_replace(Some(until));
    }

    /// It ended, and the process goes on.
    pub(super) fn stop_ended(&self) {
        self.deadline.send_replace(None);
    }
}

type Ears = (Signal, Signal, Hangup);

fn begin() -> anyhow::Result<(Runtime, Ears)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting a runtime for signals failed")?;
    let entered = runtime.enter();
    let listen = |kind| signal(kind).context("listening for signals failed");
    let ears = (
        listen(SignalKind::terminate())?,
        listen(SignalKind::interrupt())?,
        Hangup::listen().context("listening for signals failed")?,
    );
    drop(entered);
    Ok((runtime, ears))
}

async fn hear(
    (mut terminate, mut interrupt, mut hangup): Ears,
    heard: watch::Sender<Heard>,
    mut deadlines: watch::Receiver<Option<Instant>>,
    longest_stop: Duration,
) {
    let mut signalled: Option<Instant> = None;
    loop {
        let asked = *deadlines.borrow_and_update();
        let until = signalled.into_iter().chain(asked).min();
        let over = async {
            match until {
                Some(until) => tokio::time::sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
            () = hangup.received() => "SIGHUP",
            changed = deadlines.changed() => match changed {
                Ok(()) => continue,
                // The program is at its end: nobody is told any more.
                Err(_) => std::future::pending().await,
            },
            () = over => end(),
        };
        let mut count = 0;
        heard.send_modify(|heard| {
            heard.count += 1;
            heard.last = name;
            count = heard.count;
        });
        let longest = if count == 1 { longest_stop } else { AT_ONCE };
        let until = Instant::now() + longest;
        signalled = Some(signalled.map_or(until, |before| before.min(until)));
    }
}

/// Ends the process, whatever its other threads do.
#[expect(
    clippy::disallowed_methods,
    reason = "a stop that hangs runs no drops anyway, and its time is over"
)]
fn end() -> ! {
    tracing::error!("the stop took too long: ending the process now, with status {STATUS}");
    app::let_postgres_go();
    telemetry::flush(LAST_WORDS);
    std::process::exit(STATUS);
}
