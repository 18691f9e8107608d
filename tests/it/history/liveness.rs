//! Once the faults stop, nothing is left to do within a bounded time, with no manual step, and it stays so (I13).

use chrono::TimeDelta;

use super::Time;

/// What was left to do at a moment: None while nobody could tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    pub at: Time,
    /// Rows of the outboxes that were committed and not relayed.
    pub lag_rows: Option<u64>,
    /// Messages of all queues that were not settled.
    pub depth: Option<u64>,
}

impl Sample {
    fn is_done(&self) -> bool {
        (self.lag_rows, self.depth) == (Some(0), Some(0))
    }
}

/// When all was done for good; `samples` in the order of time.
pub fn done_at(samples: &[Sample]) -> Option<Time> {
    let undone = samples.iter().rposition(|sample| !sample.is_done());
    let first = undone.map_or(0, |last| last + 1);
    samples.get(first).map(|sample| sample.at)
}

/// Faults, each one a line. `stopped_at`: of the last fault and the last message.
pub fn check(samples: &[Sample], stopped_at: Time, bound: TimeDelta) -> Vec<String> {
    let after: Vec<Sample> = samples
        .iter()
        .filter(|sample| sample.at >= stopped_at)
        .cloned()
        .collect();
    let last = after.last();
    match done_at(&after) {
        None => vec![format!("not all was done at the end: {last:?}")],
        Some(at) if at > stopped_at + bound => vec![format!(
            "all was done {} after the faults stopped, later than {bound}",
            at - stopped_at
        )],
        Some(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(seconds: i64, lag_rows: u64, depth: u64) -> Sample {
        Sample {
            at: at(seconds),
            lag_rows: Some(lag_rows),
            depth: Some(depth),
        }
    }

    fn at(seconds: i64) -> Time {
        Time::UNIX_EPOCH + TimeDelta::seconds(seconds)
    }

    fn judge(samples: &[Sample]) -> Vec<String> {
        check(samples, at(10), TimeDelta::seconds(20))
    }

    #[test]
    fn what_comes_to_rest_in_time_is_sound() {
        let sound = [
            sample(1, 0, 0),
            sample(11, 5, 9),
            sample(12, 0, 3),
            sample(30, 0, 0),
        ];
        assert_eq!(judge(&sound), Vec::<String>::new());
        assert_eq!(done_at(&sound), Some(at(30)));
    }

    #[test]
    fn planted_faults_are_found() {
        let finds = |samples: &[Sample], fault: &str| {
            let faults = judge(samples);
            assert!(
                faults.iter().any(|found| found.contains(fault)),
                "{faults:?}"
            );
        };
        // A relay that stands still, a message that no queue ever gives, all too late, rest that does not last, nobody to ask.
        finds(&[sample(11, 1, 0), sample(29, 1, 0)], "not all was done");
        finds(&[sample(11, 0, 1), sample(29, 0, 1)], "not all was done");
        finds(&[sample(11, 1, 1), sample(31, 0, 0)], "later than");
        finds(&[sample(11, 0, 0), sample(12, 1, 0)], "not all was done");
        finds(&[sample(1, 0, 0)], "not all was done");
        let silent = Sample {
            lag_rows: None,
            ..sample(12, 0, 0)
        };
        finds(&[sample(11, 0, 0), silent], "not all was done");
    }
}
