//! Named points where a test can end or stop the process, and planted faults. All of it is nothing without the feature
//! `failpoints`, which no release is built with.
//!
//! `POSTROAD_FAILPOINTS="append.before_call=abort@3,lease.after_take=stop@1"`: at the third passing of the one the process is gone, as
//! after kill -9; at the first of the other it stops by SIGSTOP before the call returns, until somebody sends SIGCONT. `hang@1` keeps the
//! thread for good, as a computation without end does.
//! `POSTROAD_FAILPOINTS_FILE` names a file by which a point is armed while the process runs: once it holds `append.before_call=abort`,
//! the next passing takes the file away and acts. `POSTROAD_LIMITS="leaf-offsets=200"` lowers a limit of [`LIMITS`].
//! `POSTROAD_MUTANT` names a fault of [`MUTANTS`]. What cannot be read ends the process: a test with a slip in it proves nothing.

/// The points. Where each is: `grep -r 'failpoint::reach("<name>")' src`.
pub const NAMES: &[&str] = &[
    // A group of queues' decisions.
    "settlement.before_call",
    "settlement.after_commit",
    // A group commit of the log.
    "append.before_call",
    "append.after_commit",
    // One origin's relay.
    "relay.window_opened",
    "relay.mark_written",
    "relay.before_append",
    "relay.after_append",
    "relay.before_delete",
    // A node and its leases.
    "node.before_renewal",
    "lease.before_take",
    "lease.after_take",
    // A slot's queues from their stored state. `lease_locked` is inside the transaction.
    "recovery.epoch_taken",
    "recovery.before_read",
    "recovery.lease_locked",
    "recovery.after_read",
    // A lease that is another's next.
    "hand_over.flushed",
    "hand_over.before_release",
    // What is emptied. The `leaf_` ones are inside the transaction.
    "checkpoint.before_write",
    "journal.before_truncate",
    "journal.before_turn",
    "relay.before_fold",
    "relay.after_fold",
    "outbox.leaf_locked",
    "outbox.leaf_truncated",
    "log.before_empty",
    "log.after_empty",
    // Messages that were due later.
    "scheduled.before_publish",
    "scheduled.after_publish",
    // Answers: decided and not written, and in the kernel's hands.
    "http.answer_decided",
    "http.deliveries_written",
];

/// Limits that a test can lower, so that what takes hours comes within seconds.
pub const LIMITS: &[&str] = &[
    // Offsets of a stream's first leaves.
    "leaf-offsets",
    // Bytes of a segment of the queues' journal.
    "journal-bytes",
    // Positions in the journal of an origin at which it is folded.
    "relay-fold-appends",
    // How far the node's clock is ahead of the system's: what tests that set the database's clock want to be believed.
    "clock-lead-seconds",
];

/// The planted faults, each of which a test must find. `docs/reliability.md` says which.
pub const MUTANTS: &[&str] = &[
    "no-epoch-check",
    "epoch-read-without-lock",
    "seq-after-last",
    "order-by-xid",
    "ack-before-commit",
    "receive-before-journal",
    "delivered-high-water",
    "in-flight-forgotten",
    "snapshot-before-epoch",
    "offset-from-empty-log",
    "expiry-while-away",
    "now-for-clock",
    "position-apart",
];

#[cfg(feature = "failpoints")]
pub use on::{VARIABLES, is_mutant, limit, reach};

#[cfg(feature = "failpoints")]
mod on {
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use rustix::process::{Signal, getpid, kill_process};

    use super::{LIMITS, MUTANTS, NAMES};

    /// The variables that are read here.
    pub const VARIABLES: &[&str] = &[
        "POSTROAD_FAILPOINTS",
        "POSTROAD_MUTANT",
        "POSTROAD_LIMITS",
        "POSTROAD_FAILPOINTS_FILE",
    ];

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Act {
        Abort,
        Stop,
        Hang,
    }

    /// An armed point: the act that happens there.
    #[derive(Debug)]
    struct Armed {
        act: Act,
        /// At which passing, from 1.
        at: u64,
        passed: AtomicU64,
    }

    #[derive(Debug, Default)]
    struct Plan {
        points: BTreeMap<&'static str, Vec<Armed>>,
        mutant: Option<&'static str>,
        limits: BTreeMap<&'static str, i64>,
        /// By which a point is armed later.
        file: Option<PathBuf>,
    }

    /// A point of [`NAMES`] is passed.
    pub fn reach(name: &'static str) {
        debug_assert!(NAMES.contains(&name), "{name} is in no list");
        let plan = plan();
        if let Some(act) = plan.file.as_ref().and_then(|file| take(file, name)) {
            perform(name, act);
        }
        for armed in plan.points.get(name).into_iter().flatten() {
            if armed.passed.fetch_add(1, Ordering::AcqRel) + 1 == armed.at {
                perform(name, armed.act);
            }
        }
    }

    fn perform(name: &str, act: Act) {
        eprintln!("failpoint {name}: {act:?}");
        match act {
            Act::Abort => std::process::abort(),
            Act::Stop => stop(),
            Act::Hang => loop {
                std::thread::park();
            },
        }
    }

    /// What the file says is to happen at this point, once: whoever takes the file away.
    fn take(file: &Path, name: &str) -> Option<Act> {
        let text = std::fs::read_to_string(file).ok()?;
        let (point, act) = text.trim().split_once('=')?;
        let act = act_of(act).filter(|_| point == name)?;
        std::fs::remove_file(file).ok().map(|()| act)
    }

    /// The limit, or what a test has lowered it to.
    pub fn limit(name: &'static str, usual: i64) -> i64 {
        debug_assert!(LIMITS.contains(&name), "{name} is in no list");
        plan().limits.get(name).copied().unwrap_or(usual)
    }

    /// Whether this fault of [`MUTANTS`] is planted.
    pub fn is_mutant(name: &'static str) -> bool {
        debug_assert!(MUTANTS.contains(&name), "{name} is in no list");
        plan().mutant == Some(name)
    }

    /// Returns when the process has been stopped and goes on.
    fn stop() {
        kill_process(getpid(), Signal::STOP).expect("a process may signal itself");
        // The signal goes to the process, and another thread may be the one that takes it. Once it is not pending any more
        // all threads are to stop, this one on its way out of the system call that says so.
        let is_pending = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
            let mask = status.lines().find_map(|line| line.strip_prefix("ShdPnd:"));
            let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
            mask.is_some_and(|mask| mask >> (Signal::STOP.as_raw() - 1) & 1 == 1)
        };
        while is_pending() {
            std::thread::yield_now();
        }
    }

    fn plan() -> &'static Plan {
        static PLAN: OnceLock<Plan> = OnceLock::new();
        PLAN.get_or_init(|| {
            let read = |name| std::env::var(name).unwrap_or_default();
            match parse(
                &read(VARIABLES[0]),
                &read(VARIABLES[1]),
                &read(VARIABLES[2]),
            ) {
                Ok(plan) => {
                    let file = std::env::var_os(VARIABLES[3]).map(PathBuf::from);
                    Plan { file, ..plan }
                }
                Err(what) => {
                    eprintln!("failpoints: {what}");
                    std::process::abort()
                }
            }
        })
    }

    fn act_of(text: &str) -> Option<Act> {
        match text {
            "abort" => Some(Act::Abort),
            "stop" => Some(Act::Stop),
            "hang" => Some(Act::Hang),
            _ => None,
        }
    }

    fn parse(points: &str, mutant: &str, limits: &str) -> Result<Plan, String> {
        let mut plan = Plan::default();
        for text in points.split(',').filter(|text| !text.is_empty()) {
            let unread =
                || format!("`{text}` is not <name>=abort@<n>, <name>=stop@<n> or <name>=hang@<n>");
            let (name, rest) = text.split_once('=').ok_or_else(unread)?;
            let (act, at) = rest.split_once('@').ok_or_else(unread)?;
            let name = known(name, NAMES)?;
            let act = act_of(act).ok_or_else(unread)?;
            let at = at.parse().ok().filter(|&at| at > 0).ok_or_else(unread)?;
            let passed = AtomicU64::new(0);
            let armed = Armed { act, at, passed };
            plan.points.entry(name).or_default().push(armed);
        }
        for text in limits.split(',').filter(|text| !text.is_empty()) {
            let unread = || format!("`{text}` is not <limit>=<number>");
            let (name, number) = text.split_once('=').ok_or_else(unread)?;
            let number = number.parse().map_err(|_| unread())?;
            plan.limits.insert(known(name, LIMITS)?, number);
        }
        if !mutant.is_empty() {
            plan.mutant = Some(known(mutant, MUTANTS)?);
        }
        Ok(plan)
    }

    fn known(name: &str, list: &'static [&'static str]) -> Result<&'static str, String> {
        let found = list.iter().find(|known| **known == name);
        found.copied().ok_or_else(|| format!("`{name}` is unknown"))
    }

    #[cfg(test)]
    #[expect(clippy::unwrap_used, reason = "tests")]
    mod tests {
        use super::*;

        #[test]
        fn points_are_read() {
            let plan = parse(
                "append.before_call=abort@3,lease.after_take=stop@1,append.before_call=stop@1",
                "order-by-xid",
                "leaf-offsets=200",
            );
            let plan = plan.unwrap();
            let read = |name: &str| -> Vec<(Act, u64)> {
                let armed = plan.points[name].iter();
                armed.map(|armed| (armed.act, armed.at)).collect()
            };
            assert_eq!(
                read("append.before_call"),
                [(Act::Abort, 3), (Act::Stop, 1)]
            );
            assert_eq!(read("lease.after_take"), [(Act::Stop, 1)]);
            assert_eq!(plan.mutant, Some("order-by-xid"));
            assert_eq!(plan.limits["leaf-offsets"], 200);
            assert!(parse("", "", "").unwrap().points.is_empty());
        }

        #[test]
        fn what_cannot_be_read_is_refused() {
            for points in [
                "append.before_call",
                "append.before_call=abort",
                "append.before_call=abort@0",
                "append.before_call=sleep@1",
                "append.before=abort@1",
            ] {
                assert!(parse(points, "", "").is_err(), "{points}");
            }
            assert!(parse("", "order by xid", "").is_err());
            for limits in ["leaf-offsets", "leaf-offsets=x", "leaves=1"] {
                assert!(parse("", "", limits).is_err(), "{limits}");
            }
        }

        #[test]
        fn a_point_is_armed_by_a_file_for_once() {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("point");
            assert_eq!(take(&file, "append.before_call"), None);
            std::fs::write(&file, "append.before_call=stop\n").unwrap();
            assert_eq!(take(&file, "append.after_commit"), None);
            assert_eq!(take(&file, "append.before_call"), Some(Act::Stop));
            assert_eq!(take(&file, "append.before_call"), None);
        }
    }
}

#[cfg(not(feature = "failpoints"))]
pub use off::{VARIABLES, is_mutant, limit, reach};

#[cfg(not(feature = "failpoints"))]
mod off {
    /// None is read.
    pub const VARIABLES: &[&str] = &[];

    /// Does nothing.
    #[inline(always)]
    pub const fn reach(_: &'static str) {}

    /// The limit.
    #[inline(always)]
    pub const fn limit(_: &'static str, usual: i64) -> i64 {
        usual
    }

    /// Never.
    #[inline(always)]
    pub const fn is_mutant(_: &'static str) -> bool {
        false
    }
}
