//! Threads that check payloads against schemas. The cost of a payload or a schema is bounded, and still too much for a
//! thread that many requests share.
//!
//! Work waits in one line and is done in slices: after each slice, unfinished work goes to the end of the line. So one
//! topic's slow schema holds up the others for one slice only. The stack is as deep as a payload and a schema together can
//! need.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::schema::{Answer, Schema};
use crate::domain::message::Data;
use crate::supervisor::{OnEnd, Supervisor};

/// Threads. They compete with those of the requests for the processors, so they are few.
const THREADS: usize = 2;
/// Payloads of so many bytes have a thread of their own beside: large ones with a costly schema keep the others busy for seconds, and no slice
/// ends within a payload.
const SMALL_BYTES: usize = 64 << 10;
/// 60 levels of a payload times 64 schemas on the way to one place take 2 MiB; unused stack takes no memory.
const STACK_BYTES: usize = 32 << 20;
/// How long a piece of work goes on while others wait.
const SLICE: Duration = Duration::from_millis(20);

/// The threads have been told to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stopped;

/// One payload and the schema that it must match.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) schema: Arc<Schema>,
    pub(super) data: Data,
}

/// Faults that are of interest: of one payload, and of all.
#[derive(Debug, Clone, Copy)]
pub(super) struct Most {
    pub(super) of_one: usize,
    pub(super) of_all: usize,
}

/// A piece of work.
struct Work {
    is_small: bool,
    /// Does a slice of it, and says whether that was all.
    slice: Box<dyn FnMut() -> bool + Send>,
}

/// The work that a thread takes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Takes {
    All,
    Small,
}

/// The threads' line. Cheap to clone.
#[derive(Clone)]
pub(super) struct Asking(Arc<Line>);

impl std::fmt::Debug for Asking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Asking").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Line {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Work>,
    is_stopped: bool,
}

impl Asking {
    /// Starts the threads.
    pub(super) fn start(supervisor: &Supervisor) -> Self {
        let line = Arc::new(Line::default());
        for number in 0..=THREADS {
            let line = Arc::clone(&line);
            let takes = match number < THREADS {
                true => Takes::All,
                false => Takes::Small,
            };
            supervisor.spawn_thread("schemas", STACK_BYTES, move || line.work(takes));
        }
        let (closing, stop) = (Arc::clone(&line), supervisor.clone());
        supervisor.spawn("stop of the schemas", OnEnd::StopProcess, async move {
            stop.stopping().await;
            closing.stop();
        });
        Self(line)
    }

    /// Does something that takes its time, on one of the threads.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Stopped> {
        let (reply, answer) = oneshot::channel();
        let mut once = Some((work, reply));
        let slice = Box::new(move || {
            if let Some((work, reply)) = once.take() {
                // Who asked may have gone away.
                let _ = reply.send(work());
            }
            true
        });
        let is_small = false;
        self.0.push(Work { is_small, slice });
        answer.await.map_err(|_| Stopped)
    }

    /// Asks all questions. If the caller stops waiting, the rest stays undone. After a number of faults nothing more is asked.
    pub(super) async fn ask(
        &self,
        questions: Vec<Question>,
        most: Most,
    ) -> Result<Vec<Answer>, Stopped> {
        let (reply, answer) = oneshot::channel();
        let mut reply = Some(reply);
        let mut answers: Vec<Answer> = Vec::with_capacity(questions.len());
        let mut faults = 0;
        let sizes = questions.iter().map(|question| question.data.bytes().len());
        let is_small = sizes.max().unwrap_or(0) <= SMALL_BYTES;
        let slice = Box::new(move || {
            let until = Instant::now() + SLICE;
            while let Some(question) = questions.get(answers.len()) {
                if reply.as_ref().is_none_or(oneshot::Sender::is_closed) {
                    return true;
                }
                let answer = match faults < most.of_all {
                    true => question.schema.check(&question.data, most.of_one),
                    false => Ok(()),
                };
                faults += answer.as_ref().err().map_or(0, Vec::len);
                answers.push(answer);
                if Instant::now() >= until {
                    break;
                }
            }
            if answers.len() < questions.len() {
                return false;
            }
            if let Some(reply) = reply.take() {
                let _ = reply.send(std::mem::take(&mut answers));
            }
            true
        });
        self.0.push(Work { is_small, slice });
        answer.await.map_err(|_| Stopped)
    }
}

impl Line {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, work: Work) {
        let mut state = self.state();
        // Dropped, work tells who waits for it.
        if !state.is_stopped {
            state.waiting.push_back(work);
            // One alone may be a thread that does not take it.
            self.changed.notify_all();
        }
    }

    fn stop(&self) {
        let mut state = self.state();
        state.is_stopped = true;
        state.waiting.clear();
        self.changed.notify_all();
    }

    /// The loop of each thread until the stop.
    fn work(&self, takes: Takes) {
        while let Some(mut work) = self.next(takes) {
            // A defect in one piece of work is its own: dropped, it tells who waits for it.
            let is_done = catch_unwind(AssertUnwindSafe(&mut work.slice)).unwrap_or(true);
            if !is_done {
                self.push(work);
            }
        }
    }

    fn next(&self, takes: Takes) -> Option<Work> {
        let mut state = self.state();
        loop {
            if state.is_stopped {
                return None;
            }
            let mut waiting = state.waiting.iter();
            let taken = waiting.position(|work| takes == Takes::All || work.is_small);
            if let Some(work) = taken.and_then(|index| state.waiting.remove(index)) {
                return Some(work);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const ALL: Most = Most {
        of_one: 10,
        of_all: usize::MAX,
    };

    fn question(schema: &Arc<Schema>, data: &str) -> Question {
        Question {
            schema: Arc::clone(schema),
            data: Data::Json(data.to_owned().into()),
        }
    }

    #[tokio::test]
    async fn answers_come_in_order_and_a_short_question_passes_a_long_one() {
        let supervisor = Supervisor::new();
        let asking = Asking::start(&supervisor);
        let schema = Arc::new(Schema::compile(r#"{"type": "integer"}"#).unwrap());
        let asked = ["1", "\"a\"", "2"].map(|data| question(&schema, data));
        let answers = asking.ask(asked.into(), ALL).await.unwrap();
        let valid: Vec<bool> = answers.iter().map(Result::is_ok).collect();
        assert_eq!(valid, [true, false, true]);

        // Behind enough faults nothing more is asked.
        let most = Most {
            of_one: 10,
            of_all: 1,
        };
        let asked = ["\"a\"", "\"b\""].map(|data| question(&schema, data));
        let answers = asking.ask(asked.into(), most).await.unwrap();
        assert_eq!((answers[0].is_ok(), answers[1].is_ok()), (false, true));

        // Far more work than a test has time for, for each of the threads and one more; a short question is answered nevertheless.
        let slow: Vec<String> = (0..50).map(|level| format!(r##""a{}": {{"properties": {{"c": {{"allOf": [{{"not": {{"$ref": "#/$defs/a{level}"}}}}, {{"not": {{"$ref": "#/$defs/a{level}"}}}}]}}}}}}"##, level + 1)).collect();
        let slow = format!(
            r##"{{"$ref": "#/$defs/a50", "$defs": {{"a0": {{"type": "string"}}, {}}}}}"##,
            slow.join(",")
        );
        let slow = Arc::new(Schema::compile(&slow).unwrap());
        let payload = format!("{}1{}", r#"{"c":"#.repeat(50), "}".repeat(50));
        let mut waits = Vec::new();
        for _ in 0..=THREADS {
            let many = (0..5_000).map(|_| question(&slow, &payload)).collect();
            waits.push(Box::pin(asking.ask(many, ALL)));
            // Polled once: it is in the line.
            assert!(futures_util::poll!(waits.last_mut().unwrap()).is_pending());
        }
        let answers = asking.ask(vec![question(&schema, "1")], ALL).await.unwrap();
        assert!(answers[0].is_ok());
        for wait in &mut waits {
            assert!(futures_util::poll!(wait).is_pending());
        }
        // At the stop nobody waits for the rest.
        supervisor.stop(Duration::from_secs(30)).await.unwrap();
        for wait in waits {
            assert_eq!(wait.await, Err(Stopped));
        }
        assert_eq!(asking.run(|| 1).await, Err(Stopped));
    }

    #[tokio::test]
    async fn a_small_payload_passes_large_ones_that_keep_the_threads_busy() {
        let supervisor = Supervisor::new();
        let asking = Asking::start(&supervisor);
        let (began, has_begun) = std::sync::mpsc::channel();
        let (mut ends, mut busy) = (Vec::new(), Vec::new());
        for _ in 0..THREADS {
            let (end, is_over) = std::sync::mpsc::channel::<()>();
            ends.push(end);
            let (asking, began) = (asking.clone(), began.clone());
            busy.push(tokio::spawn(async move {
                let long = move || {
                    began.send(()).unwrap();
                    is_over.recv().is_err()
                };
                asking.run(long).await
            }));
        }
        let all_begun = tokio::task::spawn_blocking(move || {
            (0..THREADS).for_each(|_| has_begun.recv().unwrap());
        });
        all_begun.await.unwrap();
        let schema = Arc::new(Schema::compile(r#"{"type": "integer"}"#).unwrap());
        let asked = asking.ask(vec![question(&schema, "1")], ALL);
        let answers = tokio::time::timeout(Duration::from_secs(20), asked).await;
        assert_eq!(answers.unwrap().unwrap(), [Ok(())]);
        drop(ends);
        for one in busy {
            assert_eq!(one.await.unwrap(), Ok(true));
        }
        supervisor.stop(Duration::from_secs(30)).await.unwrap();
    }

    #[tokio::test]
    async fn the_deepest_schema_and_payload_fit_on_the_stack_and_a_defect_ends_nothing() {
        let supervisor = Supervisor::new();
        let asking = Asking::start(&supervisor);
        let mut definitions = vec![
            r##""a0": {"type": "object", "properties": {"c": {"$ref": "#/$defs/a30"}}}"##
                .to_owned(),
        ];
        for level in 1..=30 {
            definitions.push(format!(
                r##""a{level}": {{"allOf": [{{"$ref": "#/$defs/a{}"}}]}}"##,
                level - 1
            ));
        }
        let schema = format!(
            r##"{{"$ref": "#/$defs/a30", "$defs": {{{}}}}}"##,
            definitions.join(",")
        );
        let schema = asking.run(move || Schema::compile(&schema)).await.unwrap();
        let schema = Arc::new(schema.unwrap());
        let payload = format!("{}1{}", r#"{"c":"#.repeat(60), "}".repeat(60));
        let answers = asking
            .ask(vec![question(&schema, &payload)], ALL)
            .await
            .unwrap();
        let found = answers[0].as_ref().unwrap_err();
        assert!(found[0].detail.contains("object"), "{found:?}");

        for _ in 0..=THREADS {
            #[expect(clippy::panic, reason = "a defect")]
            let failed = asking
                .run(|| -> u8 { panic!("a defect in a piece of work") })
                .await;
            assert_eq!(failed, Err(Stopped));
        }
        assert_eq!(asking.run(|| 1).await, Ok(1));
        supervisor.stop(Duration::from_secs(30)).await.unwrap();
    }
}
