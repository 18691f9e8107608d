//! One round: everything of one variant, from its stream's declaration to the check of what was delivered.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde_json::json;
use tokio::sync::mpsc;

use super::consumer::{self, Consumer};
use super::live::Live;
use super::load::{Pace, Parts, Shared};
use super::measure::{Measured, Moment};
use super::plan::{Course, System, Variant};
use super::producer::{Producer, Via};
use super::random::Keys;
use super::tracker::{Spread, Tracker};
use super::{Bench, Error, wire};
use crate::domain::queue::Random;
use crate::store::{self, Connection};
use crate::supervisor::{OnEnd, Supervisor};

/// Single messages after silences, and how long each silence is.
const SINGLES: u32 = 20;
const SILENCE: Duration = Duration::from_secs(1);
/// How often the round is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Rows per transaction of the raw limit.
const RAW_BATCH: usize = 1_000;
/// How long tasks may take to end.
const STOP: Duration = Duration::from_secs(60);
/// A file descriptor each: more at once would only wait in the socket's backlog.
const OPEN_AT_A_TIME: usize = 64;

/// A round under way.
pub(super) struct Round<'a> {
    bench: &'a mut Bench,
    variant: &'a Variant,
    shared: Arc<Shared>,
    supervisor: Supervisor,
    failed: mpsc::Receiver<Error>,
    stream: String,
    queues: Vec<String>,
    holder: Option<Connection>,
    live: Live,
}

/// Runs a variant once.
pub(super) async fn run(
    bench: &mut Bench,
    variant: &Variant,
    number: u32,
) -> Result<Measured, Error> {
    store::bench::empty_tables(&mut bench.connection).await?;
    let mut round = Round::new(bench, variant, number);
    let measured = match variant.system {
        System::Raw => round.raw().await,
        _ => round.messages().await,
    };
    round.shared.enough.cancel();
    round.shared.done.cancel();
    let stopped = round.supervisor.stop(STOP).await;
    if let Some(mut holder) = round.holder.take() {
        store::bench::let_go(&mut holder).await?;
    }
    round.live.end();
    let mut measured = measured?;
    if stopped.is_err() {
        return Err(Error::TaskEnded);
    }
    if variant.system != System::Raw {
        measured.checked = round.shared.tracker.check();
    }
    if matches!(variant.system, System::Outbox | System::Publish) {
        let api = &round.bench.broker.api;
        api.delete(&round.queues, &round.stream).await?;
    }
    Ok(measured)
}

impl<'a> Round<'a> {
    fn new(bench: &'a mut Bench, variant: &'a Variant, number: u32) -> Self {
        let load = &bench.load;
        let run = format!("{}{number:x}", bench.run);
        let keys = match variant.is_ordered {
            true => load.keys as usize,
            false => 0,
        };
        let producers = load.producers as usize;
        let queues = variant.queues as usize;
        let (failed_tx, failed) = mpsc::channel(16);
        let is_backlog = variant.course == Course::FillThenDrain;
        let parts = Parts {
            topic: format!("bench-{run}.load"),
            has_topic_per_queue: variant.spread == Spread::One,
            payloads: Arc::clone(&bench.payloads),
            keys: Keys::new(load.keys, bench.options.skew),
            business_row: load.business_row && !is_backlog,
            pace: Pace {
                batch: load.batch,
                receive: load.receive,
                ack: load.ack,
                rate: load.rate,
                most: is_backlog.then_some(load.messages),
            },
            tracker: Tracker::new(producers, queues, variant.spread, keys),
            outstanding: match is_backlog {
                true => u32::MAX,
                false => load.outstanding,
            },
            run: run.clone(),
        };
        let shared = Arc::new(Shared::new(parts, failed_tx));
        let stream = format!("bench-{run}");
        Self {
            queues: (0..variant.queues)
                .map(|queue| format!("{stream}.{queue}"))
                .collect(),
            stream,
            live: Live::new(&variant.name, &shared),
            shared,
            supervisor: Supervisor::new(),
            failed,
            holder: None,
            bench,
            variant,
        }
    }

    /// Everything but the raw limit.
    async fn messages(&mut self) -> Result<Measured, Error> {
        if matches!(self.variant.system, System::Outbox | System::Publish) {
            self.declare().await?;
        }
        if self.bench.options.scenario == super::Scenario::Held {
            self.age().await?;
        }
        if let Some(hold) = self.variant.hold {
            let mut holder = self.bench.broker.database.connect().await?;
            store::bench::hold(&mut holder, hold).await?;
            self.holder = Some(holder);
        }
        match self.variant.course {
            Course::Steady => self.steady().await,
            Course::SteadyThenSingle => self.steady_then_single().await,
            Course::FillThenDrain => self.fill_then_drain().await,
            Course::Idle => self.idle().await,
        }
    }

    async fn declare(&self) -> Result<(), Error> {
        let api = &self.bench.broker.api;
        api.declare_stream(&self.stream, &format!("{}.>", self.stream))
            .await?;
        let ordering = if self.variant.is_ordered {
            "key"
        } else {
            "none"
        };
        let queues: Vec<_> = (self.queues.iter().enumerate())
            .map(|(number, name)| {
                let topic = match self.variant.spread {
                    Spread::All => format!("{}.>", self.stream),
                    Spread::One => format!("{}.{number}", self.shared.topic),
                };
                let declaration =
                    json!({ "stream": self.stream, "topics": [topic], "ordering": ordering });
                (name.clone(), declaration)
            })
            .collect();
        Ok(api.declare_queues(&queues).await?)
    }

    /// Only on a database of our own: these are the broker's tables.
    async fn age(&mut self) -> Result<(), Error> {
        if self.bench.broker.is_own() {
            let updates = self.bench.age_updates();
            store::bench::age(&mut self.bench.connection, updates).await?;
        }
        Ok(())
    }

    async fn start_consumers(&mut self) -> Result<(), Error> {
        if self.variant.system == System::Lease {
            for number in 0..self.variant.consumers {
                let connection = self.bench.broker.database.connect().await?;
                let consumer = consumer::run_lease(Arc::clone(&self.shared), connection);
                self.spawn(format!("consumer-{number}"), consumer);
            }
            return Ok(());
        }
        let wanted: Vec<(usize, String)> = (self.queues.iter().enumerate())
            .flat_map(|(queue, name)| {
                std::iter::repeat_n((queue, name.clone()), self.variant.consumers as usize)
            })
            .collect();
        let address = self.bench.broker.address.clone();
        for some in wanted.chunks(OPEN_AT_A_TIME) {
            let opening = some.iter().map(|_| wire::Connection::open(&address));
            let opened = futures_util::future::try_join_all(opening).await?;
            for ((queue, name), connection) in some.iter().zip(opened) {
                let consumer = Consumer {
                    shared: Arc::clone(&self.shared),
                    queue: *queue,
                    queue_name: name.clone(),
                    connection,
                };
                self.spawn(format!("consumer-of-{name}"), consumer.run());
            }
        }
        Ok(())
    }

    async fn producer(&self, number: u32) -> Result<Producer, Error> {
        let database = &self.bench.broker.database;
        let via = match self.variant.system {
            System::Outbox | System::Raw => Via::Outbox(Box::new(database.connect().await?)),
            System::Lease => Via::Lease(Box::new(database.connect().await?)),
            System::Publish => {
                let connection = wire::Connection::open(&self.bench.broker.address).await?;
                Via::Publish(Box::new(connection))
            }
        };
        let seed = self.bench.options.seed ^ (u64::from(number) << 32);
        Ok(Producer {
            shared: Arc::clone(&self.shared),
            number: number as usize,
            random: Random::new(seed),
            via,
            next: 0,
        })
    }

    async fn start_producers(&mut self, producers: std::ops::Range<u32>) -> Result<(), Error> {
        for number in producers {
            let producer = self.producer(number).await?;
            self.spawn(format!("producer-{number}"), producer.run());
        }
        Ok(())
    }

    fn spawn(&self, name: String, task: impl Future<Output = Result<(), Error>> + Send + 'static) {
        let failed = self.shared.failed.clone();
        self.supervisor.spawn(name, OnEnd::Ordinary, async move {
            if let Err(error) = task.await {
                let _ = failed.send(error).await;
            }
        });
    }

    /// Lets the load run for a time.
    async fn wait(&mut self, time: Duration) -> Result<(), Error> {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.look(until.saturating_duration_since(Instant::now()).min(LOOK))
                .await?;
        }
        Ok(())
    }

    /// Waits a moment, and ends the round if a task failed or the user wants it.
    async fn look(&mut self, time: Duration) -> Result<(), Error> {
        self.live.tick(&self.shared);
        tokio::select! {
            Some(error) = self.failed.recv() => return Err(error),
            () = self.supervisor.failed() => return Err(Error::TaskEnded),
            waited = self.bench.interrupt.pause(time) => waited?,
        }
        Ok(())
    }

    /// Waits until every sent message is settled, or no more arrive. The check then finds the missing ones.
    async fn drain(&mut self) -> Result<(), Error> {
        let mut moved = (Instant::now(), self.shared.settled.load(Ordering::Relaxed));
        while self.shared.outstanding() > 0 {
            self.look(LOOK.min(Duration::from_millis(20))).await?;
            let settled = self.shared.settled.load(Ordering::Relaxed);
            if settled != moved.1 {
                moved = (Instant::now(), settled);
            }
            if moved.0.elapsed() >= self.bench.patience() {
                self.live
                    .note("No more messages are arriving: giving up on the missing ones.");
                break;
            }
        }
        Ok(())
    }

    /// Once all has come, whether anything comes that ought not to.
    async fn linger(&mut self) -> Result<(), Error> {
        self.wait(Duration::from_millis(300)).await
    }

    async fn steady(&mut self) -> Result<Measured, Error> {
        self.start_consumers().await?;
        self.start_producers(0..self.bench.load.producers).await?;
        let measured = self.measure_steady().await?;
        self.drain().await?;
        self.linger().await?;
        Ok(measured)
    }

    async fn measure_steady(&mut self) -> Result<Measured, Error> {
        let (warmup, seconds) = (self.bench.load.warmup_seconds, self.bench.load.seconds);
        self.wait(Duration::from_secs(warmup)).await?;
        let before = self.moment().await?;
        self.wait(Duration::from_secs(seconds)).await?;
        let after = self.moment().await?;
        self.shared.enough.cancel();
        Ok(self.measured(&before, &after))
    }

    async fn steady_then_single(&mut self) -> Result<Measured, Error> {
        self.start_consumers().await?;
        let last = self.bench.load.producers - 1;
        self.start_producers(0..last.max(1)).await?;
        let mut measured = self.measure_steady().await?;
        self.drain().await?;
        if last == 0 {
            return Ok(measured);
        }
        // The last producer has sent nothing yet.
        let mut single = self.producer(last).await?;
        let from = Instant::now();
        let mut first: Histogram<u64> = super::series::histogram();
        for _ in 0..self.bench.singles(SINGLES) {
            self.wait(SILENCE).await?;
            single.send(1).await?;
            self.drain().await?;
        }
        // From the next whole second on: what came before belongs to the load.
        let until = Instant::now();
        let _ = first.add(self.shared.series.latency(from + SILENCE, until));
        measured.first_after_silence = super::measure::Percentiles::of(&first);
        self.linger().await?;
        Ok(measured)
    }

    async fn fill_then_drain(&mut self) -> Result<Measured, Error> {
        let began = Instant::now();
        self.start_producers(0..self.bench.load.producers).await?;
        let messages = self.bench.load.messages;
        while self.shared.published.load(Ordering::Relaxed) < messages {
            self.look(LOOK).await?;
        }
        if self.variant.system != System::Lease {
            while self.bench.broker.api.last_offset(&self.stream).await? < messages {
                self.look(LOOK).await?;
            }
        }
        let filled = began.elapsed();
        let before = self.moment().await?;
        self.start_consumers().await?;
        self.drain().await?;
        let after = self.moment().await?;
        self.linger().await?;
        let mut measured = self.measured(&before, &after);
        // The time that messages waited before there were consumers says nothing.
        measured.latency = None;
        measured.fill_per_second = Some(messages as f64 / filled.as_secs_f64());
        Ok(measured)
    }

    async fn idle(&mut self) -> Result<Measured, Error> {
        self.start_consumers().await?;
        self.measure_steady().await
    }

    async fn raw(&mut self) -> Result<Measured, Error> {
        let mut connection = self.bench.broker.database.connect().await?;
        let payloads = Arc::clone(&self.bench.payloads);
        let shared = Arc::clone(&self.shared);
        self.spawn("inserts".to_owned(), async move {
            let batch: Vec<&str> = payloads
                .iter()
                .map(String::as_str)
                .cycle()
                .take(RAW_BATCH)
                .collect();
            while !shared.enough.is_cancelled() {
                store::bench::insert_raw(&mut connection, &batch).await?;
                shared.published(RAW_BATCH as u64);
                shared.settled(RAW_BATCH as u64);
            }
            Ok(())
        });
        let mut measured = self.measure_steady().await?;
        measured.latency = None;
        Ok(measured)
    }

    async fn moment(&mut self) -> Result<Moment, Error> {
        Moment::take(self.bench, &self.shared).await
    }

    fn measured(&self, before: &Moment, after: &Moment) -> Measured {
        let is_of_broker = matches!(self.variant.system, System::Outbox | System::Publish);
        let mut measured = Measured::between(before, after, &self.shared);
        if is_of_broker {
            measured.broker_memory_mib = self.bench.broker.peak_memory_mib();
        } else {
            // The broker runs beside it, and has no part in it.
            measured.journal_wait = None;
            measured.journal_commit = None;
            measured.broker_cpu_us = None;
            measured.broker_cpu_percent = None;
        }
        measured
    }
}
