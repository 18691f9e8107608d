//! The times of a schedule: a cron expression on the clock of a zone.
//!
//! Where the zone's clock skips an hour, everything due in it at a fixed time comes at the first moment after it, all at
//! once; occurrences by `*` or a step are left out. Where an hour repeats, an occurrence at a fixed time comes once, the
//! first time; one by `*` or a step comes both times. The library that reads the expressions decides the same by the text
//! of each field, but treats a list or a range of fixed times like a step: so it is only asked about clocks that never
//! change.

use chrono::{DateTime, Offset as _, TimeDelta, TimeZone as _, Timelike as _, Utc};
use chrono_tz::Tz;
use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};

/// The longest expression, in bytes.
const EXPRESSION_MAX_BYTES: usize = 200;
/// No clock is set back by more.
const FOLD_MAX: TimeDelta = TimeDelta::hours(24);
/// No clock changes and changes back within so long.
const CHANGES_APART: TimeDelta = TimeDelta::hours(12);

/// Reasons why a cadence is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CadenceError {
    /// The expression does not parse.
    #[error("`cron` is not a cron expression: {reason}")]
    Expression {
        /// The cause.
        reason: String,
    },
    /// No such zone.
    #[error("`time_zone` must be a name of the IANA time zone database, such as `Europe/Berlin`")]
    Zone,
    /// It parses, and there is no such day.
    #[error("`cron` never occurs")]
    Never,
}

/// The times when a schedule is due: a cron expression, and the zone of its clock.
#[derive(Debug, Clone, PartialEq)]
pub struct Cadence {
    expression: String,
    zone: Tz,
    cron: Cron,
    /// It recurs by `*` or a step within the day: a skipped hour has none of it, one that comes twice has it twice.
    recurs: bool,
}

/// A time on a clock that never changes, as if of UTC, from which on is looked.
#[derive(Debug, Clone, Copy)]
struct Clock {
    time: DateTime<Utc>,
    /// Itself too.
    is_included: bool,
}

impl Clock {
    fn at(time: DateTime<Utc>) -> Self {
        Self {
            time,
            is_included: true,
        }
    }

    fn after(time: DateTime<Utc>) -> Self {
        Self {
            time,
            is_included: false,
        }
    }

    /// The later of two starts.
    fn max(self, other: Self) -> Self {
        match other.time > self.time {
            true => other,
            false => self,
        }
    }
}

impl Cadence {
    /// Reads five fields (minute, hour, day of month, month, day of week), six with seconds before them, or a nickname as
    /// `@daily`. `now` is for the check that it comes at all.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn parse(expression: &str, zone: &str, now: DateTime<Utc>) -> Result<Self, CadenceError> {
        if expression.len() > EXPRESSION_MAX_BYTES {
            let reason = format!("it is longer than {EXPRESSION_MAX_BYTES} bytes");
            return Err(CadenceError::Expression { reason });
        }
        let zone: Tz = zone.parse().map_err(|_| CadenceError::Zone)?;
        let parser = CronParser::builder()
            .seconds(Seconds::Optional)
            .year(Year::Disallowed)
            .build();
        let cron = parser
            .parse(expression)
            .map_err(|error| CadenceError::Expression {
                reason: error.to_string(),
            })?;
        let cadence = Self {
            expression: expression.to_owned(),
            zone,
            cron,
            recurs: recurs(expression),
        };
        match cadence.next_after(now) {
            Some(_) => Ok(cadence),
            None => Err(CadenceError::Never),
        }
    }

    /// The expression, as it was given.
    #[must_use]
    pub fn expression(&self) -> &str {
        &self.expression
    }

    /// The zone's name.
    #[must_use]
    pub fn zone(&self) -> &'static str {
        self.zone.name()
    }

    /// The first occurrence after a moment; `None` when there is none.
    ///
    /// Times of the expression are looked for on the zone's clock as if it never changed, from one change to the next.
    #[must_use]
    pub fn next_after(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let after = after.with_nanosecond(0)?;
        let mut offset = self.offset(after);
        let mut from = Clock::after(after + offset);
        // The second pass of an hour that comes twice has no fixed time.
        if !self.recurs
            && let Some((change, _)) = self.first_change(after - FOLD_MAX, after)
        {
            let first_pass = change + self.offset(change - TimeDelta::seconds(1));
            from = from.max(Clock::at(first_pass));
        }
        let mut since = after;
        loop {
            let time = self.next_time(from)?;
            let at = time.checked_sub_signed(offset)?;
            let Some((change, next_offset)) = self.first_change(since, at) else {
                return Some(at);
            };
            let (ends, begins) = (change + offset, change + next_offset);
            if !self.recurs && time < begins {
                // It is skipped.
                return Some(change);
            }
            from = match self.recurs {
                true => Clock::at(begins),
                false => Clock::at(ends.max(begins)),
            };
            (since, offset) = (change, next_offset);
        }
    }

    /// The first time of the expression, on a clock that never changes.
    fn next_time(&self, from: Clock) -> Option<DateTime<Utc>> {
        let next = self.cron.find_next_occurrence(&from.time, from.is_included);
        // A library that stood still would have it published again and again.
        let is_on =
            |&next: &DateTime<Utc>| next > from.time || (from.is_included && next == from.time);
        next.ok().filter(is_on)
    }

    /// How far the zone's clock is ahead of UTC.
    fn offset(&self, at: DateTime<Utc>) -> TimeDelta {
        let offset = self.zone.offset_from_utc_datetime(&at.naive_utc());
        TimeDelta::seconds(i64::from(offset.fix().local_minus_utc()))
    }

    /// The first moment after one and not after another at which the zone's clock changes, and its offset then.
    fn first_change(
        &self,
        after: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> Option<(DateTime<Utc>, TimeDelta)> {
        let (mut low, offset) = (after, self.offset(after));
        while low < until {
            let mut high = (low + CHANGES_APART).min(until);
            if self.offset(high) != offset {
                while high - low > TimeDelta::seconds(1) {
                    let middle = low + TimeDelta::seconds((high - low).num_seconds() / 2);
                    match self.offset(middle) == offset {
                        true => low = middle,
                        false => high = middle,
                    }
                }
                return Some((high, self.offset(high)));
            }
            low = high;
        }
        None
    }

    /// The next occurrences after a moment, at most `count`.
    #[must_use]
    pub fn preview(&self, after: DateTime<Utc>, count: usize) -> Vec<DateTime<Utc>> {
        let next = std::iter::successors(self.next_after(after), |&last| self.next_after(last));
        next.take(count).collect()
    }
}

/// Whether an expression recurs within the day by `*` or a step, in any of its seconds, minutes and hours.
fn recurs(expression: &str) -> bool {
    let fields: Vec<&str> = expression.split_whitespace().collect();
    match fields.as_slice() {
        [nickname] => {
            let within_a_day = ["@hourly", "@minutely", "@secondly"];
            within_a_day
                .iter()
                .any(|own| nickname.eq_ignore_ascii_case(own))
        }
        fields => {
            let within_the_day = fields.len().saturating_sub(3);
            let fields = &fields[..within_the_day];
            fields.iter().any(|field| field.contains(['*', '/', '?']))
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    fn cadence(expression: &str, zone: &str) -> Cadence {
        Cadence::parse(expression, zone, at("2026-01-01T00:00:00Z")).unwrap()
    }

    /// The next occurrences, in the zone's own time with its offset.
    fn next(expression: &str, zone: &str, after: &str, count: usize) -> Vec<String> {
        let cadence = cadence(expression, zone);
        let next = cadence.preview(at(after), count);
        let local = next.into_iter().map(|at| {
            at.with_timezone(&cadence.zone)
                .format("%d %H:%M%:z")
                .to_string()
        });
        local.collect()
    }

    #[test]
    fn cadences_say_what_is_wrong_with_them() {
        let now = at("2026-01-01T00:00:00Z");
        for (expression, zone, error) in [
            ("", "UTC", "not a cron expression"),
            ("* * * *", "UTC", "not a cron expression"),
            ("60 * * * *", "UTC", "not a cron expression"),
            ("* * * * * * 2027", "UTC", "not a cron expression"),
            ("@reboot", "UTC", "not a cron expression"),
            ("0 0 30 2 *", "UTC", "never occurs"),
            ("* * * * *", "Europe/Atlantis", "IANA"),
            ("* * * * *", "", "IANA"),
        ] {
            let found = Cadence::parse(expression, zone, now)
                .unwrap_err()
                .to_string();
            assert!(found.contains(error), "`{expression}` {zone}: {found}");
        }
        for expression in [
            "@daily",
            "*/5 * * * *",
            "0 9 * * MON-FRI",
            "30 0 0 L * *",
            "0 0 29 2 *",
        ] {
            Cadence::parse(expression, "America/New_York", now).unwrap();
        }
    }

    // Berlin skips 02:00 to 03:00 on 2026-03-29 and has 02:00 to 03:00 twice on 2026-10-25.
    #[test]
    fn an_hour_that_is_skipped_skips_no_fixed_time() {
        assert_eq!(
            next("30 2 * * *", "Europe/Berlin", "2026-03-27T12:00:00Z", 3),
            ["28 02:30+01:00", "29 03:00+02:00", "30 02:30+02:00"]
        );
        assert_eq!(
            next("*/30 * * * *", "Europe/Berlin", "2026-03-29T00:00:00Z", 4),
            [
                "29 01:30+01:00",
                "29 03:00+02:00",
                "29 03:30+02:00",
                "29 04:00+02:00"
            ]
        );
        assert_eq!(
            next("0 3 * * *", "Europe/Berlin", "2026-03-28T12:00:00Z", 2),
            ["29 03:00+02:00", "30 03:00+02:00"]
        );
    }

    #[test]
    fn an_hour_that_comes_twice_has_a_fixed_time_once() {
        assert_eq!(
            next("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00Z", 2),
            ["25 02:30+02:00", "26 02:30+01:00"]
        );
        assert_eq!(
            next("*/30 * * * *", "Europe/Berlin", "2026-10-24T23:45:00Z", 6),
            [
                "25 02:00+02:00",
                "25 02:30+02:00",
                "25 02:00+01:00",
                "25 02:30+01:00",
                "25 03:00+01:00",
                "25 03:30+01:00"
            ]
        );
    }

    #[test]
    fn lists_and_ranges_of_fixed_times_come_once_a_day() {
        let berlin = |expression, after, count| next(expression, "Europe/Berlin", after, count);
        assert_eq!(
            berlin("30 2,14 * * *", "2026-03-28T12:00:00Z", 4),
            [
                "28 14:30+01:00",
                "29 03:00+02:00",
                "29 14:30+02:00",
                "30 02:30+02:00"
            ]
        );
        assert_eq!(
            berlin("0,30 2 * * *", "2026-03-28T12:00:00Z", 2),
            ["29 03:00+02:00", "30 02:00+02:00"]
        );
        assert_eq!(
            berlin("0,30 2 * * *", "2026-10-24T12:00:00Z", 3),
            ["25 02:00+02:00", "25 02:30+02:00", "26 02:00+01:00"]
        );
        assert_eq!(
            berlin("0 1-3 * * *", "2026-10-24T20:00:00Z", 4),
            [
                "25 01:00+02:00",
                "25 02:00+02:00",
                "25 03:00+01:00",
                "26 01:00+01:00"
            ]
        );
        // From within the second pass.
        assert_eq!(
            berlin("30 2,14 * * *", "2026-10-25T01:10:00Z", 1),
            ["25 14:30+01:00"]
        );
    }

    /// Occurrences of `expression` from `start` to `end`, from one second, or minute, to the next, by what the page says.
    fn reference(
        expression: &str,
        zone: Tz,
        (start, end): (DateTime<Utc>, DateTime<Utc>),
    ) -> Vec<DateTime<Utc>> {
        let parse = CronParser::builder().seconds(Seconds::Optional).build();
        let cron = parse.parse(expression).unwrap();
        let recurs = ["*", "/"].iter().any(|sign| {
            expression
                .split(' ')
                .take(2)
                .any(|field| field.contains(sign))
        });
        let matches =
            |local: chrono::NaiveDateTime| cron.is_time_matching(&local.and_utc()).unwrap();
        let mut found = Vec::new();
        let mut at = start;
        let mut seen: std::collections::BTreeSet<chrono::NaiveDateTime> = Default::default();
        // Times that the clock shows for the first time, and times that it never shows.
        let mut last = (start - TimeDelta::minutes(1))
            .with_timezone(&zone)
            .naive_local();
        while at <= end {
            let local = at.with_timezone(&zone).naive_local();
            let is_new = seen.insert(local);
            let mut is_due = matches(local) && (recurs || is_new);
            if !recurs {
                let mut skipped = last + TimeDelta::minutes(1);
                while skipped < local {
                    is_due |= matches(skipped);
                    skipped += TimeDelta::minutes(1);
                }
            }
            last = local;
            if is_due {
                found.push(at);
            }
            at += TimeDelta::minutes(1);
        }
        found
    }

    #[test]
    fn each_zone_and_expression_agrees_with_a_look_at_each_minute() {
        let zones = [
            "Europe/Berlin",
            "America/New_York",
            "America/Sao_Paulo",
            "America/Santiago",
            "America/Havana",
            "Africa/Cairo",
            "Africa/Casablanca",
            "Asia/Beirut",
            "Asia/Kolkata",
            "Asia/Tehran",
            "Australia/Lord_Howe",
            "Antarctica/Troll",
            "Pacific/Chatham",
        ];
        let expressions = [
            "30 2 * * *",
            "30 2,14 * * *",
            "0,30 2 * * *",
            "0 1-3 * * *",
            "15,45 0-3,23 * * *",
            "0 0 * * *",
            "0,59 23,0 * * *",
            "30 2 * * SUN",
            "10 1,2,3 29 3 *",
            "*/30 * * * *",
            "30 * * * *",
            "*/20 2 * * *",
            "5 */2 * * *",
        ];
        let mut changes = 0;
        for name in zones {
            for expression in expressions {
                let cadence = cadence(expression, name);
                let zone: Tz = name.parse().unwrap();
                // Around each change of a year and a half; the reference remembers a day before.
                let (mut since, until) = (at("2026-01-01T00:00:00Z"), at("2027-06-01T00:00:00Z"));
                while let Some((change, _)) = cadence.first_change(since, until) {
                    since = change;
                    changes += 1;
                    let (start, end) =
                        (change - TimeDelta::hours(30), change + TimeDelta::hours(30));
                    let expected = reference(expression, zone, (start, end));
                    let mut found = cadence.preview(start - TimeDelta::seconds(1), 1_000);
                    found.retain(|at| *at <= end);
                    assert_eq!(found, expected, "{expression} {name} {change}");
                    // From wherever one begins to look, also within an hour that comes twice.
                    for minutes in (0..3_600).step_by(17) {
                        let from = start + TimeDelta::minutes(minutes);
                        let next = cadence.next_after(from).filter(|at| *at <= end);
                        let next_expected = expected.iter().find(|at| **at > from).copied();
                        assert_eq!(next, next_expected, "{expression} {name} from {from}");
                    }
                }
            }
        }
        assert!(changes > 13 * 20, "{changes}");
    }
}
