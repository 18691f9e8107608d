//! One try of a group commit: looks up or makes what the group needs, then sends it.

use std::collections::HashMap;
use std::sync::Arc;

use super::appender::Appender;
use super::error::Error;
use super::group::{Group, Router};
use super::keys::{self, Counted};
use super::plan::{Counts, Plan};
use crate::domain::id::{Offset, StreamId};
use crate::failpoint;
use crate::store::stream::{self as sql, Append, AppendOutcome, GroupKey, Previous};
use crate::store::{self, Connection, Retry};

/// Reasons why an attempt had no result.
pub(super) struct Failure {
    pub(super) error: store::Error,
    /// Whether the append itself was sent, so that with a lost connection its outcome is unknown.
    pub(super) was_sent: bool,
}

impl Failure {
    /// Whether the database refuses the group, whenever it is tried. While the outcome of an earlier try is not known, only
    /// a refusal that came after the look for that outcome says so.
    pub(super) fn is_final(&self, is_unknown: bool) -> bool {
        let is_refused = self.error.retry() == Retry::Never && !self.error.is_connection_lost();
        let is_known = !is_unknown || (self.was_sent && self.error.is_data_refused());
        is_refused && is_known
    }
}

impl From<store::Error> for Failure {
    fn from(error: store::Error) -> Self {
        Self {
            error,
            was_sent: false,
        }
    }
}

impl Appender {
    /// One try of a group: what is missing is looked up or made, then the call is sent.
    pub(super) async fn attempt<'g>(
        &mut self,
        group: &'g Group,
        plan: &mut Option<Plan<'g>>,
        key: &mut GroupKey,
        is_repeat: bool,
    ) -> Result<AppendOutcome, Failure> {
        let connection = self.link.get().await?;
        let plan = match plan {
            Some(plan) => plan,
            None => {
                if self.router.version == 0 {
                    self.router.load(sql::load_catalogue(connection).await?);
                }
                key.catalogue = self.router.version;
                intern(connection, &mut self.router, group).await?;
                let counts = self.count_keys(group).await?;
                let made = Plan::new(group, &mut self.router, &self.lasts, &counts);
                plan.insert(made)
            }
        };
        let connection = self.link.get().await?;
        for (stream, count) in plan.append.streams() {
            let known_end = self.ends.get(&stream).copied();
            if known_end.is_none() {
                let Some(head) = sql::find_head(connection, stream).await? else {
                    return Ok(AppendOutcome::Stale);
                };
                let last = self.lasts.entry(stream).or_default();
                let top = sql::read_top(connection, stream, *last).await?;
                *last = (*last).max(head.floor).max(top.unwrap_or_default());
            }
            let last = self.lasts.get(&stream).copied().unwrap_or_default();
            let through = Offset(last.0 + i64::from(count));
            let size = self.state.leaf_sizes.get(stream);
            match known_end {
                Some(end) if end >= through => {
                    if end.0 - through.0 < size / 2 {
                        self.state.maintain.notify_one();
                    }
                }
                _ => {
                    let extended = sql::extend_log(connection, stream, through, size).await?;
                    let Some(end) = extended else {
                        return Ok(AppendOutcome::Stale);
                    };
                    self.ends.insert(stream, end);
                }
            }
        }
        key.witness = self.state.witness.now();
        self.send(&plan.append, *key, is_repeat)
            .await
            .map_err(|error| Failure {
                error,
                was_sent: true,
            })
    }

    /// Sends the laid-out group, by the quick call if possible.
    async fn send(
        &mut self,
        append: &Append<'_>,
        key: GroupKey,
        is_repeat: bool,
    ) -> Result<AppendOutcome, store::Error> {
        let next = append.plain_stream().filter(|_| !is_repeat);
        let next = next.and_then(|stream| Some((stream, self.previous_in(stream)?)));
        let connection = self.link.get().await?;
        failpoint::reach("append.before_call");
        let quick = match next {
            Some((_, previous)) => sql::append_next(connection, key, previous, append).await?,
            None => None,
        };
        let outcome = match (quick, next) {
            (Some(appended), _) => AppendOutcome::Appended(appended),
            (None, next) => {
                if let Some((stream, _)) = next {
                    self.previous.remove(&stream);
                }
                sql::append(connection, key, is_repeat, append).await?
            }
        };
        if let AppendOutcome::Appended(_) = outcome {
            failpoint::reach("append.after_commit");
        }
        Ok(outcome)
    }

    /// This appender's latest group in a stream, if nobody else appends there, as far as known. The quick call is right in any case,
    /// but would fail if somebody else appended.
    fn previous_in(&self, stream: StreamId) -> Option<Previous> {
        let previous = *self.previous.get(&stream)?;
        let is_alone = !self.cluster.view().has_peers();
        (is_alone && self.state.tails.last(stream) <= previous.last).then_some(previous)
    }

    /// Counts the keys that messages of the group expect versions of.
    async fn count_keys<'g>(&mut self, group: &'g Group) -> Result<Counts<'g>, store::Error> {
        let expected = self.router.expected_keys(group);
        let mut counts = Counts::with_capacity(expected.len());
        if expected.is_empty() {
            return Ok(counts);
        }
        let state = Arc::clone(&self.state);
        let connection = self.link.get().await?;
        let is_behind = std::mem::take(&mut self.is_behind);
        for (stream, own) in expected {
            let mut counted = state.keys.count(stream, own.iter().copied());
            let last = self.lasts.get(&stream).copied().unwrap_or_default();
            if is_behind || counted.as_ref().is_none_or(|known| known.through < last) {
                let through = match is_behind {
                    false => last,
                    // The log's end, which can be far beyond what this node knows, or before it.
                    true => {
                        let top = sql::read_top(connection, stream, Offset(0)).await?;
                        let is_ahead =
                            |known: &Counted<'_>| top.is_some_and(|top| known.through > top);
                        if counted.as_ref().is_some_and(is_ahead) {
                            state.keys.forget(stream);
                        }
                        top.unwrap_or_default()
                    }
                };
                counted = match keys::catch_up(connection, &state.keys, stream, through).await {
                    Ok(_) => state.keys.count(stream, own.iter().copied()),
                    Err(Error::Store(error)) => return Err(error),
                    Err(error) => {
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "counting keys failed"
                        );
                        None
                    }
                };
            }
            counts.insert(stream, counted);
        }
        Ok(counts)
    }
}

async fn intern(
    connection: &mut Connection,
    router: &mut Router,
    group: &Group,
) -> Result<(), store::Error> {
    let unknown = router.unknown_topics(group);
    if unknown.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = unknown.iter().map(|topic| topic.as_str()).collect();
    let found: HashMap<String, _> = sql::intern_topics(connection, &names)
        .await?
        .into_iter()
        .map(|(id, name)| (name, id))
        .collect();
    for topic in unknown {
        if let Some(&id) = found.get(topic.as_str()) {
            router.learn(topic, id);
        }
    }
    Ok(())
}
