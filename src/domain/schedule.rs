//! Recurring publishing: which occurrences are due, which missed ones are made up for, and the id of each.

use std::collections::VecDeque;

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use uuid::Uuid;

pub use super::cadence::{Cadence, CadenceError};
use super::name::{ScheduleName, Topic};
use super::word::words;

/// An occurrence that could not be published for so long is missed: the misfire policy decides.
pub const MISFIRE_AFTER: TimeDelta = TimeDelta::seconds(60);
/// The most missed occurrences that are made up for at a time: the latest.
pub const CATCH_UP_MAX: usize = 1_000;
/// The most schedules that there can be.
pub const SCHEDULES_MAX: i64 = 1_000;
/// The namespace of occurrences' ids.
const OCCURRENCES: Uuid = Uuid::from_u128(0x3c1d_5a0e_7b92_5f41_9d3a_60c8_5e2f_b714);

impl Cadence {
    /// The occurrences to publish now, when everything through `through` has been dealt with.
    #[must_use]
    pub fn due(&self, through: DateTime<Utc>, now: DateTime<Utc>, misfire: Misfire) -> Due {
        let missed_until = now - MISFIRE_AFTER;
        let most = match misfire {
            Misfire::Skip => 0,
            Misfire::One => 1,
            Misfire::All => CATCH_UP_MAX,
        };
        let first = self.next_after(through);
        let first_missed = first.filter(|&first| first <= missed_until);
        let mut occurrences = match first_missed {
            Some(_) => self.latest(through, missed_until, most),
            None => Vec::new(),
        };
        let has_skipped = first_missed.is_some() && occurrences.first() != first_missed.as_ref();
        occurrences.extend(self.between(through.max(missed_until), now));
        let mut until = through;
        if has_skipped {
            until = until.max(missed_until);
        }
        Due {
            through: occurrences.last().map_or(until, |&last| until.max(last)),
            occurrences,
            has_skipped,
        }
    }

    /// The occurrences after a moment, up to another.
    fn between(
        &self,
        after: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> impl Iterator<Item = DateTime<Utc>> {
        std::iter::successors(self.next_after(after), |&last| self.next_after(last))
            .take_while(move |&at| at <= until)
    }

    /// The latest occurrences after a moment, up to another, within a limit. The search runs forwards, from further and further
    /// back: the library's search backwards loses some where a zone goes back by half an hour.
    fn latest(
        &self,
        after: DateTime<Utc>,
        until: DateTime<Utc>,
        most: usize,
    ) -> Vec<DateTime<Utc>> {
        let mut latest = VecDeque::new();
        for days in [0, 1, 32, 400, 1_000_000] {
            let window = TimeDelta::days(days).max(TimeDelta::hours(1));
            let start = until
                .checked_sub_signed(window)
                .map_or(after, |start| start.max(after));
            latest.clear();
            for at in self.between(start, until) {
                latest.push_back(at);
                if latest.len() > most {
                    latest.pop_front();
                }
            }
            if start == after || latest.len() >= most {
                break;
            }
        }
        latest.into()
    }
}

/// The occurrences to publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Due {
    /// By time.
    pub occurrences: Vec<DateTime<Utc>>,
    /// Everything through here is dealt with then.
    pub through: DateTime<Utc>,
    /// Whether missed occurrences are left out.
    pub has_skipped: bool,
}

words! {
    /// The treatment of occurrences that were missed by more than [`MISFIRE_AFTER`], because no broker ran.
    #[derive(Default)]
    pub enum Misfire {
        /// They are left out.
        Skip = "skip",
        /// The latest of them is published, the others are left out.
        #[default]
        One = "one",
        /// All are published, [`CATCH_UP_MAX`] at most, the latest.
        All = "all",
    }
}

impl Misfire {
    /// Reads `skip`, `one` or `all`.
    ///
    /// # Errors
    /// Any other text.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        Self::of(text).ok_or("must be `skip`, `one` or `all`")
    }
}

/// A recurring publication.
#[derive(Debug, Clone, PartialEq)]
pub struct Declaration {
    /// The topic to publish to.
    pub topic: Topic,
    /// The times of its occurrences.
    pub cadence: Cadence,
    /// The treatment of missed occurrences.
    pub misfire: Misfire,
    /// Whether nothing is published until it is declared otherwise. What would have been due is not missed.
    pub is_paused: bool,
    /// The CloudEvent without id, source and time, as JSON text: checked by [`Declaration::event`].
    pub event: String,
}

impl Declaration {
    /// The event of an occurrence, JSON text: the declared one with the id, source and time of the occurrence.
    #[must_use]
    pub fn event(&self, name: &ScheduleName, due_at: DateTime<Utc>) -> String {
        let id = occurrence_id(name, due_at);
        let source = source(name);
        let time = due_at.to_rfc3339_opts(SecondsFormat::AutoSi, true);
        let rest = self.event.trim_start().trim_start_matches('{').trim_start();
        let comma = if rest.starts_with('}') { "" } else { "," };
        format!(
            r#"{{"specversion":"1.0","id":"{id}","source":"{source}","time":"{time}"{comma}{rest}"#
        )
    }
}

/// The CloudEvents source of a schedule's messages.
#[must_use]
pub fn source(name: &ScheduleName) -> String {
    format!("/postroad/schedules/{name}")
}

/// The CloudEvents id of an occurrence: the same for every publisher and every try.
#[must_use]
pub fn occurrence_id(name: &ScheduleName, due_at: DateTime<Utc>) -> Uuid {
    let due = due_at.to_rfc3339_opts(SecondsFormat::Secs, true);
    Uuid::new_v5(&OCCURRENCES, format!("{name}\n{due}").as_bytes())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn at(text: &str) -> DateTime<Utc> {
        DateTime::parse_from_rfc3339(text).unwrap().to_utc()
    }

    fn cadence(expression: &str, zone: &str) -> Cadence {
        Cadence::parse(expression, zone, at("2026-01-01T00:00:00Z")).unwrap()
    }

    #[test]
    fn what_is_due_is_what_was_to_come() {
        for expression in [
            "30 2 * * *",
            "*/30 * * * *",
            "0 * * * *",
            "15 1-3 * * *",
            "0 3 * * SUN",
        ] {
            for zone in [
                "Europe/Berlin",
                "America/New_York",
                "Australia/Lord_Howe",
                "UTC",
            ] {
                let cadence = cadence(expression, zone);
                for start in [
                    "2026-03-07T00:00:00Z",
                    "2026-03-28T00:00:00Z",
                    "2026-10-24T00:00:00Z",
                    "2026-04-04T00:00:00Z",
                    "2026-10-03T00:00:00Z",
                    "2026-10-31T00:00:00Z",
                ] {
                    let start = at(start);
                    let end = start + TimeDelta::days(3);
                    let mut forward = cadence.preview(start, 1_000);
                    forward.retain(|&at| at <= end);
                    let due = cadence.due(start, end, Misfire::All);
                    assert_eq!(due.occurrences, forward, "{expression} {zone} {start}");
                    assert!(!due.has_skipped);
                    assert_eq!(due.through, forward.last().copied().unwrap_or(start));
                    let one = cadence.due(start, end, Misfire::One).occurrences;
                    let mut missed = forward.iter().filter(|&&at| at <= end - MISFIRE_AFTER);
                    assert_eq!(one.first(), missed.next_back().or(forward.last()));
                }
            }
        }
    }

    #[test]
    fn the_policy_decides_about_what_was_missed() {
        let cadence = cadence("* * * * *", "UTC");
        let through = at("2026-05-01T12:00:00Z");
        let minutes = |minutes| through + TimeDelta::minutes(minutes);
        let check = |misfire, now, occurrences: &[i64], has_skipped| {
            let due = cadence.due(through, now, misfire);
            let expected: Vec<_> = occurrences.iter().map(|&n| minutes(n)).collect();
            assert_eq!(due.occurrences, expected, "{misfire:?} {now}");
            assert_eq!(due.has_skipped, has_skipped);
        };
        for misfire in [Misfire::Skip, Misfire::One, Misfire::All] {
            check(misfire, through, &[], false);
            check(misfire, minutes(1) - TimeDelta::seconds(1), &[], false);
            check(misfire, minutes(1), &[1], false);
            check(misfire, minutes(1) + TimeDelta::seconds(59), &[1], false);
        }
        let late = minutes(5) + TimeDelta::seconds(30);
        check(Misfire::Skip, late, &[5], true);
        check(Misfire::One, late, &[4, 5], true);
        check(Misfire::All, late, &[1, 2, 3, 4, 5], false);
        // A clock that went back: nothing is due again.
        check(Misfire::All, minutes(-100), &[], false);
        let all = cadence.due(through, minutes(100_000), Misfire::All);
        assert_eq!(
            (all.occurrences.len(), all.has_skipped),
            (CATCH_UP_MAX + 1, true)
        );
        assert_eq!(all.through, minutes(100_000));
        assert_eq!(all.occurrences.last(), Some(&minutes(100_000)));
        let skipped = cadence.due(
            through,
            minutes(100_000) + TimeDelta::seconds(59),
            Misfire::Skip,
        );
        assert_eq!(skipped.occurrences, [minutes(100_000)]);
    }

    #[test]
    fn an_occurrence_has_one_name() {
        let name = ScheduleName::parse("nightly").unwrap();
        let due = at("2026-05-01T00:00:00Z");
        assert_eq!(occurrence_id(&name, due), occurrence_id(&name, due));
        let others = [
            occurrence_id(&name, due + TimeDelta::seconds(1)),
            occurrence_id(&ScheduleName::parse("nightly2").unwrap(), due),
        ];
        assert!(!others.contains(&occurrence_id(&name, due)));
    }

    #[test]
    fn the_event_of_an_occurrence_is_valid_json() {
        let name = ScheduleName::parse("nightly").unwrap();
        for event in [
            "{}",
            " { } ",
            r#"{"data": {"a": 1.0}}"#,
            r#" {"type":"t","data":"}"}"#,
        ] {
            let declaration = Declaration {
                topic: Topic::parse("a").unwrap(),
                cadence: cadence("@daily", "UTC"),
                misfire: Misfire::default(),
                is_paused: false,
                event: event.to_owned(),
            };
            let made = declaration.event(&name, at("2026-05-01T00:00:00Z"));
            let made: serde_json::Value = serde_json::from_str(&made).unwrap();
            assert_eq!(made["time"], "2026-05-01T00:00:00Z");
            assert_eq!(made["source"], "/postroad/schedules/nightly");
        }
    }
}
