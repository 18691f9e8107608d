//! One run of a worker: a loop over its events. Only the loop changes what is held. The calls are futures beside it; one
//! receive, one request of each verb, and several extensions can be under way at a time.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::super::error::Error;
use super::super::queue::{Queue, Receive, Received};
use super::super::verbs::{BATCH_MAX, Outcomes, Refused, Settled, Verb};
use super::hold::{Brief, Hold};
use super::{Done, Ended, Failure, Job, Report, Settings};

pub(super) type Handling = Pin<Box<dyn Future<Output = Result<Done, Failure>> + Send>>;
pub(super) type Handler = Box<dyn Fn(Job) -> Handling + Send + Sync>;
type Beside<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// After an empty answer that came at once, the next receive waits this long: a broker that stops answers so.
const PAUSE: Duration = Duration::from_millis(200);

/// A receive under way, with what it acknowledges.
struct Receiving {
    receive: Receive,
    acks: Vec<Brief>,
    since: Instant,
    answer: Beside<Result<Received, Error>>,
}

/// A call of a verb that ended.
enum Called {
    Settled {
        verb: Verb,
        briefs: Vec<Brief>,
        answer: Result<Outcomes, Error>,
    },
    Extended {
        numbers: Vec<u64>,
        since: Instant,
        answer: Result<Outcomes, Error>,
    },
}

/// The end of the run.
#[derive(Debug, Clone, Copy)]
struct Stopping {
    /// Handlers that did not end by then are dropped.
    grace_end: Instant,
    /// The worker does not wait for an unreachable broker beyond it.
    give_up_at: Instant,
}

pub(super) struct Run {
    queue: Queue,
    settings: Settings,
    handler: Handler,
    hold: Hold,
    tasks: JoinSet<Result<Done, Failure>>,
    numbers: HashMap<Id, u64>,
    receiving: Option<Receiving>,
    /// Not before then.
    receive_at: Instant,
    calls: FuturesUnordered<Beside<Called>>,
    /// Finished deliveries, for each verb except extend, until they are sent.
    ended: HashMap<Verb, Vec<Brief>>,
    /// Verbs of which a request is under way.
    busy: Vec<Verb>,
    stopping: Option<Stopping>,
    failure: Option<Error>,
    report: Report,
}

const VERBS: [Verb; 4] = [Verb::Ack, Verb::Nack, Verb::Release, Verb::Reject];

impl Run {
    pub(super) fn new(queue: Queue, settings: Settings, handler: Handler) -> Self {
        Self {
            hold: Hold::new(settings.visibility_timeout / 3, settings.is_in_order),
            queue,
            settings,
            handler,
            tasks: JoinSet::new(),
            numbers: HashMap::new(),
            receiving: None,
            receive_at: Instant::now(),
            calls: FuturesUnordered::new(),
            ended: HashMap::new(),
            busy: Vec::new(),
            stopping: None,
            failure: None,
            report: Report::default(),
        }
    }

    pub(super) async fn until(mut self, stop: CancellationToken) -> Result<Report, Error> {
        loop {
            self.begin_handlers();
            self.begin_receive();
            self.begin_calls();
            if self.stopping.is_some() && self.is_over() {
                break;
            }
            let far = Instant::now() + Duration::from_secs(3_600);
            let (grace_end, give_up_at) = self.stopping.map_or((far, far), |stopping| {
                (stopping.grace_end, stopping.give_up_at)
            });
            let has_handlers = !self.numbers.is_empty();
            let beat = self.hold.next_beat();
            tokio::select! {
                () = stop.cancelled(), if self.stopping.is_none() => self.stop(),
                answer = answered(&mut self.receiving) => self.received(answer),
                Some(ended) = self.tasks.join_next_with_id() => self.handled(ended),
                Some(called) = self.calls.next() => self.called(called),
                () = sleep_until(beat.unwrap_or(far)), if beat.is_some() => self.beat(),
                () = sleep_until(grace_end), if self.stopping.is_some() && has_handlers => self.drop_handlers(),
                () = sleep_until(give_up_at), if self.stopping.is_some() => break,
            }
        }
        let untold: usize = self.ended.values().map(Vec::len).sum();
        match self.failure {
            Some(error) => Err(error),
            None if self.is_over() => Ok(self.report),
            None => Err(Error::Untold {
                count: untold + self.hold.len(),
            }),
        }
    }

    fn is_over(&self) -> bool {
        self.hold.len() == 0
            && self.receiving.is_none()
            && self.calls.is_empty()
            && self.ended.values().all(Vec::is_empty)
    }

    fn begin_handlers(&mut self) {
        while self.stopping.is_none()
            && self.numbers.len() < self.settings.concurrency
            && let Some((number, job)) = self.hold.begin()
        {
            // The handler is called inside its task: it may panic before it first waits.
            let task = self.tasks.spawn((self.handler)(job));
            self.numbers.insert(task.id(), number);
        }
    }

    /// Receives when a handler is idle, or half of what can be held is not.
    fn begin_receive(&mut self) {
        let capacity = self.settings.concurrency + self.settings.prefetch;
        let room = capacity.saturating_sub(self.hold.len()).min(BATCH_MAX);
        let has_idle =
            self.numbers.len() < self.settings.concurrency && !self.hold.is_anything_waiting();
        let is_wanted = room > 0 && (has_idle || room * 2 >= capacity);
        if self.stopping.is_some() || self.receiving.is_some() || !is_wanted {
            return;
        }
        let acks = match self.settings.is_in_order {
            // An ack that overtakes another of its key would be refused: they go one request after another.
            true => Vec::new(),
            false if self.busy.contains(&Verb::Ack) => Vec::new(),
            false => self.take_ended(Verb::Ack),
        };
        let receive = Receive {
            max_messages: u32::try_from(room).unwrap_or(1),
            wait: self.settings.wait,
            batch_wait: self.settings.batch_wait,
            visibility_timeout: Some(self.settings.visibility_timeout),
            consumer: self.settings.consumer.clone(),
            receive_id: Some(Uuid::new_v4().to_string()),
            ack: acks
                .iter()
                .map(|brief| brief.item.receipt().to_owned())
                .collect(),
            ..Receive::default()
        };
        self.receive(receive, acks);
    }

    fn receive(&mut self, receive: Receive, acks: Vec<Brief>) {
        let (queue, asked, at) = (self.queue.clone(), receive.clone(), self.receive_at);
        self.receiving = Some(Receiving {
            receive,
            acks,
            since: Instant::now().max(at),
            answer: Box::pin(async move {
                sleep_until(at).await;
                queue.receive(&asked).await
            }),
        });
    }

    fn received(&mut self, answer: Result<Received, Error>) {
        let Some(Receiving { acks, since, .. }) = self.receiving.take() else {
            return;
        };
        let received = match answer {
            Ok(received) => received,
            Err(error) => return self.failed(Verb::Ack, acks, error),
        };
        self.settled(acks, received.acked);
        if received.deliveries.is_empty() && since.elapsed() < self.settings.wait.min(PAUSE) {
            self.receive_at = Instant::now() + PAUSE;
        }
        let now = Instant::now();
        for delivery in received.deliveries {
            match self.stopping {
                None => self.hold.add(delivery, now),
                Some(_) => self.end(Verb::Release, Brief::of(&delivery)),
            }
        }
    }

    fn take_ended(&mut self, verb: Verb) -> Vec<Brief> {
        let ended = self.ended.entry(verb).or_default();
        let rest = ended.split_off(ended.len().min(BATCH_MAX));
        std::mem::replace(ended, rest)
    }

    /// Sends what ended, one request of each verb at a time: under load the next one gathers meanwhile.
    fn begin_calls(&mut self) {
        for verb in VERBS {
            if self.busy.contains(&verb) {
                continue;
            }
            let briefs = self.take_ended(verb);
            if briefs.is_empty() {
                continue;
            }
            self.busy.push(verb);
            let queue = self.queue.clone();
            self.calls.push(Box::pin(async move {
                let items = briefs.iter().map(|brief| brief.item.clone()).collect();
                let answer = queue.settle(verb, items).await;
                Called::Settled {
                    verb,
                    briefs,
                    answer,
                }
            }));
        }
    }

    fn called(&mut self, called: Called) {
        match called {
            Called::Settled {
                verb,
                briefs,
                answer,
            } => {
                self.busy.retain(|busy| *busy != verb);
                match answer {
                    Ok(outcomes) => self.settled(briefs, outcomes),
                    Err(error) => self.failed(verb, briefs, error),
                }
            }
            Called::Extended {
                numbers,
                since,
                answer,
            } => self.extended(numbers, since, answer),
        }
    }

    /// Repeats results that did not reach the broker, while that can help. A queue that is gone ends the run.
    fn failed(&mut self, verb: Verb, briefs: Vec<Brief>, error: Error) {
        if error.is_transient() {
            tracing::warn!(
                queue = %self.queue.name(),
                error = &error as &dyn std::error::Error,
                "the broker is unreachable; the worker keeps trying"
            );
            let ended = self.ended.entry(verb).or_default();
            ended.splice(0..0, briefs);
            return;
        }
        self.failure.get_or_insert(error);
        if self.stopping.is_none() {
            self.stop();
        }
    }

    fn settled(&mut self, briefs: Vec<Brief>, outcomes: Outcomes) {
        for (brief, outcome) in briefs.into_iter().zip(outcomes) {
            let count = match &outcome {
                Ok(Settled::Acked | Settled::AlreadySettled) => &mut self.report.acked,
                Ok(Settled::Nacked { .. }) => &mut self.report.nacked,
                Ok(Settled::Released { .. }) => &mut self.report.released,
                Ok(Settled::Rejected { .. }) => &mut self.report.rejected,
                Ok(Settled::Extended { .. }) => continue,
                Err(refused) => {
                    self.warn(&brief, refused);
                    &mut self.report.refused
                }
            };
            *count += 1;
            if let Some(observer) = &self.settings.observer {
                observer(&Ended {
                    offset: brief.offset,
                    delivery: brief.delivery,
                    attempt: brief.attempt,
                    event_id: brief.event_id,
                    outcome,
                });
            }
        }
    }

    fn warn(&self, brief: &Brief, refused: &Refused) {
        tracing::warn!(
            queue = %self.queue.name(),
            offset = brief.offset,
            attempt = brief.attempt,
            event = brief.event_id,
            "{refused}"
        );
    }

    /// A handler ended, by itself or by a panic.
    fn handled(&mut self, ended: Result<(Id, Result<Done, Failure>), JoinError>) {
        let (id, result) = match ended {
            Ok((id, result)) => (id, result),
            Err(error) if error.is_panic() => {
                self.report.panicked += 1;
                (error.id(), Err(Failure::retry(panic_text(error))))
            }
            // Dropped: by us, at the end of the grace, and then it is off the list; else with the whole runtime.
            Err(error) => (error.id(), Err(Failure::retry("its handler was dropped"))),
        };
        let Some(number) = self.numbers.remove(&id) else {
            return;
        };
        if !matches!(result, Ok(Done::Handled)) {
            let later = self.hold.end_waiting(Some(number));
            later
                .into_iter()
                .for_each(|brief| self.end(Verb::Release, brief));
        }
        let Some(mut brief) = self.hold.end(number) else {
            return;
        };
        let item = brief.item.clone();
        let (verb, item) = match result {
            Ok(Done::Handled) => (Verb::Ack, item),
            Ok(Done::NotNow(delay)) => (Verb::Release, item.delay(delay)),
            Err(failure) => {
                let item = item.reason(&failure.reason);
                match (failure.is_final, failure.delay) {
                    (true, _) => (Verb::Reject, item),
                    (false, None) => (Verb::Nack, item),
                    (false, Some(delay)) => (Verb::Nack, item.delay(delay)),
                }
            }
        };
        brief.item = item;
        self.end(verb, brief);
    }

    fn end(&mut self, verb: Verb, brief: Brief) {
        self.ended.entry(verb).or_default().push(brief);
    }

    /// Extends the held deliveries.
    fn beat(&mut self) {
        let now = Instant::now();
        let due = self.hold.beat(now, BATCH_MAX);
        if due.is_empty() {
            return;
        }
        let timeout = self.settings.visibility_timeout;
        let (numbers, items): (Vec<u64>, Vec<_>) = due
            .into_iter()
            .map(|(number, item)| (number, item.visibility_timeout(timeout)))
            .unzip();
        let queue = self.queue.clone();
        self.calls.push(Box::pin(async move {
            Called::Extended {
                answer: queue.settle(Verb::Extend, items).await,
                since: now,
                numbers,
            }
        }));
    }

    fn extended(&mut self, numbers: Vec<u64>, since: Instant, answer: Result<Outcomes, Error>) {
        let outcomes = match answer {
            Ok(outcomes) => outcomes,
            Err(error) => {
                let is_transient = error.is_transient();
                for number in numbers {
                    match is_transient {
                        // It was tried for as long as a call is.
                        true => self.hold.beat_again(number, since),
                        false => drop(self.hold.lose(number)),
                    }
                }
                return self.failed(Verb::Extend, Vec::new(), error);
            }
        };
        for (number, outcome) in numbers.into_iter().zip(outcomes) {
            match outcome {
                // Its handler ended meanwhile: of course it is settled.
                Err(refused) if refused.refusal.is_lost() => {
                    if self.hold.lose(number) {
                        self.report.lost += 1;
                        tracing::warn!(queue = %self.queue.name(), "a delivery was lost: {refused}");
                    }
                }
                _ => self.hold.beat_again(number, since),
            }
        }
    }

    /// Receives no more and gives back deliveries that were not begun. A receive under way is repeated once, without a wait: its
    /// answer may be on its way, and its deliveries would be held until they expire.
    fn stop(&mut self) {
        let now = Instant::now();
        let grace_end = now + self.settings.grace;
        self.stopping = Some(Stopping {
            grace_end,
            give_up_at: grace_end + self.queue.client().options().deadline,
        });
        for brief in self.hold.end_waiting(None) {
            self.end(Verb::Release, brief);
        }
        if let Some(Receiving { receive, acks, .. }) = self.receiving.take() {
            self.receive_at = now;
            let last = Receive {
                max_messages: 1,
                wait: Duration::ZERO,
                batch_wait: Duration::ZERO,
                ..receive
            };
            self.receive(last, acks);
        }
    }

    /// The grace is over.
    fn drop_handlers(&mut self) {
        self.tasks.abort_all();
        self.numbers.clear();
        for number in self.hold.handled() {
            if let Some(mut brief) = self.hold.end(number) {
                let item = brief.item.reason("the consumer stopped before it was done");
                brief.item = item;
                self.end(Verb::Nack, brief);
            }
        }
    }
}

/// The answer of the receive under way; never resolves without one. Cancel-safe.
async fn answered(receiving: &mut Option<Receiving>) -> Result<Received, Error> {
    match receiving {
        Some(receiving) => receiving.answer.as_mut().await,
        None => std::future::pending().await,
    }
}

fn panic_text(error: JoinError) -> String {
    let panic = error.into_panic();
    let text = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned());
    format!("its handler panicked: {}", text.unwrap_or_default())
}
