//! A schedule's declaration as stored in its row.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::domain::name::Topic;
use crate::domain::schedule::{Cadence, Declaration, Misfire};

#[derive(Serialize, Deserialize)]
struct Stored {
    topic: String,
    cron: String,
    time_zone: String,
    misfire: String,
    paused: bool,
    /// The raw text: it is published as it was declared.
    event: Box<RawValue>,
}

pub(super) fn print(declaration: &Declaration) -> String {
    let stored = Stored {
        topic: declaration.topic.to_string(),
        cron: declaration.cadence.expression().to_owned(),
        time_zone: declaration.cadence.zone().to_owned(),
        misfire: declaration.misfire.as_str().to_owned(),
        paused: declaration.is_paused,
        event: RawValue::from_string(declaration.event.clone())
            .expect("checked to be JSON when it was declared"),
    };
    serde_json::to_string(&stored).expect("it has string keys only")
}

pub(super) fn read(text: &str, now: DateTime<Utc>) -> Result<Declaration, String> {
    let stored: Stored = serde_json::from_str(text).map_err(|error| error.to_string())?;
    Ok(Declaration {
        topic: Topic::parse(&stored.topic).map_err(|error| error.to_string())?,
        cadence: Cadence::parse(&stored.cron, &stored.time_zone, now)
            .map_err(|error| error.to_string())?,
        misfire: Misfire::parse(&stored.misfire)?,
        is_paused: stored.paused,
        event: stored.event.get().to_owned(),
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn declarations_read_back() {
        let now = DateTime::from_timestamp(1_767_225_600, 0).unwrap();
        let declaration = Declaration {
            topic: Topic::parse("reports.daily").unwrap(),
            cadence: Cadence::parse("0 9 * * MON-FRI", "Europe/Berlin", now).unwrap(),
            misfire: Misfire::All,
            is_paused: true,
            event: r#"{"data": {"a": 1.0}, "partitionkey": "k"}"#.to_owned(),
        };
        assert_eq!(read(&print(&declaration), now).unwrap(), declaration);
    }
}
