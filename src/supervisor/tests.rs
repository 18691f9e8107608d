//! Duties, driven pass by pass.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::{Backoff, Closed, Desk, Duty, Lease, Next, Routine, State, Status, Supervisor};
use crate::domain::id::{Epoch, Fence};

const LONG: Duration = Duration::from_secs(600);
const NAME: &str = "a duty";

#[derive(Debug, thiserror::Error)]
#[error("it failed")]
struct Failed(#[source] std::io::Error);

fn failed() -> Result<Next, Failed> {
    Err(Failed(std::io::Error::other("no room")))
}

/// A duty whose passes say that they begin, and end when they are told how.
struct Told {
    begun: mpsc::UnboundedSender<Instant>,
    answers: mpsc::UnboundedReceiver<Result<Next, Failed>>,
    ended: Arc<AtomicUsize>,
}

impl Duty for Told {
    type Error = Failed;

    async fn pass(&mut self) -> Result<Next, Failed> {
        let _ = self.begun.send(Instant::now());
        let answer = self.answers.recv().await;
        self.ended.fetch_add(1, Ordering::AcqRel);
        answer.unwrap_or(Ok(Next::Tick))
    }

    fn failed(&mut self, _error: &Failed) {}
}

/// The other side of it.
struct Teller {
    supervisor: Supervisor,
    begun: mpsc::UnboundedReceiver<Instant>,
    answers: mpsc::UnboundedSender<Result<Next, Failed>>,
    ended: Arc<AtomicUsize>,
}

impl Teller {
    fn start(routine: Routine) -> Self {
        let supervisor = Supervisor::new();
        let (begun, begins) = mpsc::unbounded_channel();
        let (answers, answered) = mpsc::unbounded_channel();
        let ended = Arc::default();
        let duty = Told {
            begun,
            answers: answered,
            ended: Arc::clone(&ended),
        };
        supervisor.start(routine, duty);
        Self {
            supervisor,
            begun: begins,
            answers,
            ended,
        }
    }

    async fn begins(&mut self) -> Instant {
        let begun = tokio::time::timeout(Duration::from_secs(10), self.begun.recv());
        begun
            .await
            .expect("a pass begins in time")
            .expect("the duty runs")
    }

    fn answer(&self, answer: Result<Next, Failed>) {
        self.answers.send(answer).expect("the duty runs");
    }

    fn status(&self) -> Status {
        let mut statuses = self.supervisor.statuses();
        assert_eq!(statuses.len(), 1);
        statuses.remove(0)
    }

    async fn comes_to(&self, state: State) -> Status {
        for _ in 0..10_000 {
            let status = self.status();
            if status.state == state {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("{:?} is not {state:?}", self.status());
    }
}

#[tokio::test]
async fn a_pass_that_failed_is_tried_again_and_no_wake_up_hastens_it() {
    let pause = Duration::from_millis(60);
    let wake = Arc::new(Notify::new());
    let routine = Routine::every(LONG, NAME)
        .woken_by(&wake)
        .backing_off(Backoff::constant(pause));
    let mut told = Teller::start(routine);
    told.begins().await;
    let status = told.comes_to(State::Running).await;
    assert_eq!((status.passes, status.next_at), (0, None));
    let failed_at = Instant::now();
    told.answer(failed());
    wake.notify_one();
    let status = told.comes_to(State::Failing).await;
    assert_eq!((status.passes, status.failures_in_a_row), (1, 1));
    let (_, why) = status.last_error.expect("it failed");
    assert_eq!(why, "it failed: no room");
    assert!(
        status
            .next_at
            .is_some_and(|at| at <= Instant::now() + pause)
    );
    assert!(told.begins().await >= failed_at + pause);
    told.answer(failed());
    told.begins().await;
    assert_eq!(told.status().failures_in_a_row, 2);
    // The wake-up of before has not brought a pass yet: after one that came through it does.
    told.answer(Ok(Next::Tick));
    told.begins().await;
    told.answer(Ok(Next::Tick));
    let status = told.comes_to(State::Waiting).await;
    assert_eq!((status.passes, status.failures_in_a_row), (4, 0));
    assert!(status.last_error.is_some(), "it is remembered");
    assert!(
        status
            .next_at
            .is_some_and(|at| at > Instant::now() + LONG / 2)
    );
}

#[tokio::test]
async fn a_pass_says_when_the_next_is_due() {
    let wake = Arc::new(Notify::new());
    let mut told = Teller::start(Routine::every(LONG, NAME).woken_by(&wake));
    told.begins().await;
    told.answer(Ok(Next::AtOnce));
    told.begins().await;
    let pause = Duration::from_millis(50);
    let ended_at = Instant::now();
    told.answer(Ok(Next::Within(pause)));
    assert!(told.begins().await >= ended_at + pause);
    let ended_at = Instant::now();
    told.answer(Ok(Next::Woken(pause)));
    wake.notify_one();
    assert!(told.begins().await >= ended_at + pause);
    told.answer(Ok(Next::Woken(Duration::ZERO)));
    let status = told.comes_to(State::Waiting).await;
    assert_eq!(status.next_at, None);
    assert!(told.begun.try_recv().is_err(), "nobody woke it");
    wake.notify_one();
    told.begins().await;
}

#[tokio::test]
async fn a_duty_runs_under_its_lease_alone_and_gives_it_back_after_the_pass() {
    let (fence, held) = watch::channel(None);
    let given_back = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&given_back);
    let lease = Lease::new("duty/told", held, move || {
        count.fetch_add(1, Ordering::AcqRel);
    });
    let mut told = Teller::start(Routine::every(LONG, NAME).under(lease));
    let status = told.comes_to(State::StandingBy).await;
    assert_eq!(
        (status.passes, status.lease.as_deref()),
        (0, Some("duty/told"))
    );
    assert!(told.begun.try_recv().is_err());
    let before = given_back.load(Ordering::Acquire);
    fence.send_replace(Some(Fence {
        lease: "duty/told".to_owned(),
        epoch: Epoch(1),
    }));
    told.begins().await;
    fence.send_replace(None);
    assert_eq!(told.comes_to(State::Running).await.passes, 0);
    assert_eq!(given_back.load(Ordering::Acquire), before, "it is at work");
    told.answer(Ok(Next::Tick));
    told.comes_to(State::StandingBy).await;
    assert_eq!(given_back.load(Ordering::Acquire), before + 1);
}

#[tokio::test]
async fn the_stop_waits_for_the_pass_and_ends_the_status() {
    let mut told = Teller::start(Routine::every(LONG, NAME));
    told.begins().await;
    let late = told.supervisor.stop(Duration::from_millis(20)).await;
    assert_eq!(late, Err(vec![NAME.to_owned()]));
    assert_eq!(told.ended.load(Ordering::Acquire), 0);
    told.answer(Ok(Next::AtOnce));
    let ended = told.supervisor.stop(Duration::from_secs(10)).await;
    assert_eq!(ended, Ok(()));
    assert_eq!(told.ended.load(Ordering::Acquire), 1, "and no other");
    assert!(told.supervisor.statuses().is_empty());
}

#[tokio::test]
async fn a_desk_goes_on_with_work_whose_caller_went_away() {
    let supervisor = Supervisor::new();
    let desk = Desk::open(&supervisor, "a desk", 4, Vec::new());
    let (go, gone) = oneshot::channel::<()>();
    let (begun, begins) = oneshot::channel::<()>();
    let slow = desk.ask(move |done: &mut Vec<u8>| {
        Box::pin(async move {
            let _ = begun.send(());
            let _ = gone.await;
            done.push(1);
        })
    });
    tokio::select! {
        _ = slow => panic!("it was not told to go on"),
        begun = begins => begun.expect("the work begins"),
    }
    go.send(()).expect("the work goes on without its caller");
    let asked = desk.ask(|done| {
        Box::pin(async move {
            done.push(2);
            done.clone()
        })
    });
    assert_eq!(asked.await, Ok(vec![1, 2]));
    let stopped = supervisor.stop(Duration::from_secs(10)).await;
    assert_eq!(stopped, Ok(()));
    let late = desk.ask(|done| Box::pin(async move { done.len() })).await;
    assert_eq!(late, Err(Closed));
}
