//! Who had which lease, and what was written under it: no write under an epoch after one of a later epoch was begun (I11), one
//! owner of an epoch, and epochs only rise (I12).

use std::collections::BTreeMap;
use std::time::Duration;

use super::Time;

/// A change of a lease, or a write under it, in the order of the commits: both hold the lease's row until they commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub at: Time,
    pub lease: String,
    pub epoch: i64,
    pub holder: Option<i64>,
    pub is_write: bool,
}

/// Faults, each one a line.
pub fn check(events: &[Event]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut now: BTreeMap<&str, (i64, Option<i64>)> = BTreeMap::new();
    let mut owners: BTreeMap<(&str, i64), i64> = BTreeMap::new();
    for event in events {
        let lease = event.lease.as_str();
        let (epoch, holder) = now.get(lease).copied().unwrap_or((0, None));
        if event.is_write {
            if event.epoch != epoch || holder.is_none() {
                faults.push(format!(
                    "{lease}: a write under epoch {} while {holder:?} had it at {epoch}",
                    event.epoch
                ));
            }
            continue;
        }
        if event.epoch < epoch {
            faults.push(format!("{lease}: epoch {} after {epoch}", event.epoch));
        }
        if let Some(holder) = event.holder {
            let owner = *owners.entry((lease, event.epoch)).or_insert(holder);
            if owner != holder {
                let epoch = event.epoch;
                faults.push(format!("{lease}: {owner} and {holder} had epoch {epoch}"));
            }
        }
        now.insert(lease, (event.epoch, event.holder));
    }
    faults
}

/// The longest time that a lease was given back and not taken, of those that somebody took.
pub fn longest_gap(events: &[Event]) -> Duration {
    let mut free: BTreeMap<&str, Time> = BTreeMap::new();
    let mut longest = Duration::ZERO;
    for event in events
        .iter()
        .filter(|event| !event.is_write && event.epoch > 0)
    {
        match event.holder {
            None => {
                free.insert(&event.lease, event.at);
            }
            Some(_) => {
                if let Some(since) = free.remove(event.lease.as_str()) {
                    longest = longest.max((event.at - since).to_std().unwrap_or_default());
                }
            }
        }
    }
    longest
}

/// How long after a moment the last of the leases that a node had then was another's: zero if it had none, None while one is not.
pub fn taken_over(events: &[Event], holder: i64, since: Time) -> Option<Duration> {
    let changes = || events.iter().filter(|event| !event.is_write);
    let mut had: BTreeMap<&str, bool> = BTreeMap::new();
    for event in changes().filter(|event| event.at <= since) {
        had.insert(&event.lease, event.holder == Some(holder));
    }
    let mut last = since;
    for (lease, _) in had.iter().filter(|(_, had)| **had) {
        let mut later = changes().filter(|event| event.at > since && event.lease == **lease);
        let taken = later.find(|event| event.holder.is_some_and(|other| other != holder))?;
        last = last.max(taken.at);
    }
    (last - since).to_std().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checker_finds_planted_faults() {
        let event = |epoch, holder, is_write| Event {
            at: Time::UNIX_EPOCH,
            lease: "slot/00".to_owned(),
            epoch,
            holder,
            is_write,
        };
        let sound = [
            event(0, None, false),
            event(1, Some(1), false),
            event(1, None, true),
            event(1, None, false),
            event(2, Some(2), false),
            event(2, None, true),
        ];
        assert_eq!(check(&sound), Vec::<String>::new());
        let finds = |plant: Event, fault: &str| {
            let mut events = sound.to_vec();
            events.push(plant);
            let faults = check(&events);
            assert!(
                faults.iter().any(|found| found.contains(fault)),
                "{faults:?}"
            );
        };
        finds(
            event(1, None, true),
            "a write under epoch 1 while Some(2) had it at 2",
        );
        finds(event(2, Some(1), false), "2 and 1 had epoch 2");
        finds(event(1, Some(1), false), "epoch 1 after 2");
    }

    #[test]
    fn a_take_over_ends_with_the_last_lease() {
        let event = |seconds, lease: &str, epoch, holder| Event {
            at: Time::UNIX_EPOCH + chrono::TimeDelta::seconds(seconds),
            lease: lease.to_owned(),
            epoch,
            holder,
            is_write: false,
        };
        let mut events = vec![
            event(1, "a", 1, Some(1)),
            event(1, "b", 1, Some(1)),
            event(1, "c", 1, Some(2)),
            event(5, "a", 2, Some(2)),
        ];
        let since = Time::UNIX_EPOCH + chrono::TimeDelta::seconds(3);
        assert_eq!(taken_over(&events, 1, since), None, "b is still its own");
        events.push(event(6, "b", 2, Some(2)));
        assert_eq!(taken_over(&events, 1, since), Some(Duration::from_secs(3)));
        assert_eq!(taken_over(&events, 3, since), Some(Duration::ZERO));
    }
}
