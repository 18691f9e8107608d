//! One group commit: its members, the places of their messages, and its results.

use std::collections::{BTreeSet, HashMap, HashSet};

use chrono::{DateTime, Utc};

use super::error::{AppendError, ConflictItem, VersionConflict};
use super::inbox::{Reply, Taken};
use super::lanes::Part;
use super::plan::{Layout, Refusal};
use super::request::{Member, Placed};
use super::tail::Appended as TailAppended;
use crate::domain::id::{Offset, OriginId, ScheduledId, StreamId, TopicId};
use crate::domain::message::Message;
use crate::domain::name::Topic;
use crate::store::stream::{self as sql, Appended, StreamRow};

/// Routes and topic numbers remembered; beyond it they are looked up again.
const ROUTES_MAX: usize = 100_000;

/// Topic to stream, by one version of the catalogue; topic to number.
#[derive(Debug, Default)]
pub(super) struct Router {
    pub(super) version: i64,
    streams: Vec<StreamRow>,
    main: StreamId,
    routes: HashMap<Topic, StreamId>,
    pub(super) topics: HashMap<Topic, TopicId>,
}

impl Router {
    pub(super) fn load(&mut self, catalogue: sql::Catalogue) {
        let main = crate::domain::name::StreamName::main();
        let found = catalogue.streams.iter().find(|stream| stream.name == main);
        self.main = found.map_or(StreamId(0), |stream| stream.id);
        self.version = catalogue.version;
        self.streams = catalogue.streams;
        self.routes.clear();
    }

    pub(super) fn route(&mut self, topic: &Topic) -> StreamId {
        if let Some(&stream) = self.routes.get(topic) {
            return stream;
        }
        if self.routes.len() >= ROUTES_MAX {
            self.routes.clear();
        }
        let owner = self
            .streams
            .iter()
            .find(|stream| stream.patterns.iter().any(|p| p.matches(topic)));
        let stream = owner.map_or(self.main, |stream| stream.id);
        self.routes.insert(topic.clone(), stream);
        stream
    }

    /// The parts of the log that a member needs, as far as they are held apart.
    pub(super) fn parts(&mut self, member: &Member) -> BTreeSet<Part> {
        let messages = member.messages().iter();
        messages
            .map(|message| (self.route(&message.topic), message.deliver_at().is_some()))
            .collect()
    }

    pub(super) fn is_keyed(&self, stream: StreamId) -> bool {
        let mut streams = self.streams.iter();
        streams.any(|row| row.id == stream && row.is_keyed)
    }

    /// The keys of keyed streams that some message of a group expects a version of.
    pub(super) fn expected_keys<'g>(
        &mut self,
        group: &'g Group,
    ) -> HashMap<StreamId, HashSet<&'g str>> {
        let mut expected: HashMap<StreamId, HashSet<&str>> = HashMap::new();
        for message in group.messages().filter(|m| m.expected_version.is_some()) {
            let stream = self.route(&message.topic);
            if let Some(key) = &message.key
                && self.is_keyed(stream)
            {
                expected.entry(stream).or_default().insert(key);
            }
        }
        expected
    }

    /// The topics of a group whose numbers are not known.
    pub(super) fn unknown_topics(&mut self, group: &Group) -> Vec<Topic> {
        if self.topics.len() >= ROUTES_MAX {
            self.topics.clear();
        }
        let unknown: HashSet<&Topic> = group
            .messages()
            .map(|message| &message.topic)
            .filter(|topic| !self.topics.contains_key(topic))
            .collect();
        let mut unknown: Vec<Topic> = unknown.into_iter().cloned().collect();
        unknown.sort();
        unknown
    }

    pub(super) fn learn(&mut self, topic: Topic, id: TopicId) {
        self.topics.insert(topic, id);
    }
}

/// Members that are committed together.
#[derive(Debug, Default)]
pub(super) struct Group {
    pub(super) members: Vec<GroupMember>,
    pub(super) message_count: usize,
    pub(super) bytes: usize,
    /// Hashes of source and id of messages whose ids are checked.
    ids: HashSet<u64>,
    origins: HashSet<OriginId>,
}

#[derive(Debug)]
pub(super) struct GroupMember {
    pub(super) taken: Taken,
}

/// The result of taking a member in.
pub(super) enum Joined {
    /// It is in.
    Yes,
    /// It must wait for the next group: an id or an origin of it is in this one, and the database is asked about both only
    /// once per group.
    NextGroup(Taken),
}

impl Group {
    pub(super) fn of(member: GroupMember) -> Self {
        Self {
            message_count: member.taken.member.messages().len(),
            bytes: member.taken.bytes,
            members: vec![member],
            ..Self::default()
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The group in parts that need the same of the log, in order.
    pub(super) fn by_part(self, router: &mut Router) -> Vec<(BTreeSet<Part>, Self)> {
        let mut groups: Vec<(BTreeSet<Part>, Self)> = Vec::new();
        for member in self.members {
            let parts = router.parts(&member.taken.member);
            let messages = member.taken.member.messages().len();
            let group = match groups.iter_mut().find(|(own, _)| *own == parts) {
                Some((_, group)) => group,
                None => {
                    groups.push((parts, Self::default()));
                    &mut groups.last_mut().expect("pushed just above").1
                }
            };
            group.message_count += messages;
            group.bytes += member.taken.bytes;
            group.members.push(member);
        }
        groups
    }

    pub(super) fn messages(&self) -> impl Iterator<Item = &Message> {
        let members = self.members.iter();
        members.flat_map(|member| member.taken.member.messages())
    }

    pub(super) fn join(&mut self, taken: Taken) -> Joined {
        match &taken.member {
            Member::Relay { origin, .. } => {
                if !self.origins.insert(*origin) {
                    return Joined::NextGroup(taken);
                }
            }
            Member::Publish {
                messages,
                check_ids,
                ..
            } => {
                if *check_ids {
                    let ids: Vec<u64> = messages.iter().map(id_hash).collect();
                    if ids.iter().any(|id| self.ids.contains(id)) {
                        return Joined::NextGroup(taken);
                    }
                    self.ids.extend(ids);
                }
            }
        }
        self.message_count += taken.member.messages().len();
        self.bytes += taken.bytes;
        self.members.push(GroupMember { taken });
        Joined::Yes
    }

    pub(super) fn answer_all(self, error: impl Fn() -> AppendError) {
        for member in self.members {
            let _ = member.taken.reply.send(Err(error()));
        }
    }
}

fn id_hash(message: &Message) -> u64 {
    let source = xxhash_rust::xxh3::xxh3_64(message.source.as_bytes());
    xxhash_rust::xxh3::xxh3_64_with_seed(message.id.as_bytes(), source)
}

/// The results of a committed group: for the tails, and for the callers.
#[derive(Debug, Default)]
pub(super) struct Settled {
    pub(super) tails: Vec<TailAppended>,
    pub(super) appended_count: usize,
    pub(super) duplicate_count: usize,
    pub(super) refused_count: usize,
    /// The scheduled messages, by stream.
    pub(super) scheduled: Vec<ScheduledId>,
    pub(super) answers: Vec<(Reply, Result<Vec<Placed>, AppendError>)>,
}

impl Group {
    /// Reads the result of the call.
    pub(super) fn settle(self, layout: &Layout, appended: &Appended) -> Settled {
        let mut settled = Settled::default();
        let mut outcomes = self.outcomes(layout, appended);
        let mut messages: Vec<Vec<Option<Message>>> = Vec::with_capacity(self.members.len());
        for (number, (member, outcome)) in self
            .members
            .into_iter()
            .zip(outcomes.iter_mut())
            .enumerate()
        {
            let answer = outcome.answer(&layout.repeats[number]);
            match &answer {
                Ok(placed) => {
                    settled.duplicate_count +=
                        placed.iter().filter(|placed| placed.duplicate).count();
                }
                Err(_) => settled.refused_count += 1,
            }
            settled.answers.push((member.taken.reply, answer));
            let (Member::Publish { messages: own, .. } | Member::Relay { messages: own, .. }) =
                member.taken.member;
            messages.push(own.into_iter().map(Some).collect());
        }
        let mut by_stream: Vec<Vec<Message>> = layout.streams.iter().map(|_| Vec::new()).collect();
        for &(member, index, place) in &layout.slots {
            if let Some(scheduled) = outcomes[member].scheduled_now(index) {
                settled.scheduled.push(scheduled);
            }
            if outcomes[member].is_fresh(index)
                && let Some(message) = messages[member][index].take()
            {
                by_stream[place].push(message);
            }
        }
        for (place, own) in by_stream.into_iter().enumerate() {
            settled.appended_count += own.len();
            if !own.is_empty() {
                settled.tails.push(TailAppended {
                    stream: layout.streams[place],
                    first: Offset(appended.first[place]),
                    at: appended.at[place],
                    messages: own,
                });
            }
        }
        settled
    }

    fn outcomes(&self, layout: &Layout, appended: &Appended) -> Vec<Outcome> {
        let mut outcomes: Vec<Outcome> = self
            .members
            .iter()
            .zip(layout.conflicts.iter().zip(&layout.refusals))
            .map(|(member, (conflicts, refusal))| Outcome {
                refusal: refusal.clone(),
                version: None,
                refused: None,
                conflicts: conflicts.clone(),
                placed: vec![None; member.taken.member.messages().len()],
            })
            .collect();
        for &(member, found) in &appended.refused {
            outcomes[member].refused = Some(found);
        }
        let mut seen = HashMap::with_capacity(appended.seen.len());
        for found in &appended.seen {
            let (member, index, place) = layout.slots[found.place];
            let stream = layout.streams[place];
            let first_use = Placed {
                stream,
                offset: Offset(found.due_at.map_or(found.offset, |_| 0)),
                duplicate: true,
                scheduled: found.due_at.map(|due_at| ScheduledId {
                    due_at,
                    number: found.offset,
                    stream,
                }),
            };
            if found.is_conflict {
                outcomes[member].conflicts.push(ConflictItem {
                    index,
                    stream,
                    offset: first_use.offset,
                    scheduled: first_use.scheduled,
                });
            }
            seen.insert(found.place, first_use);
        }
        let mut left_out = HashSet::new();
        for &(slot, version) in &appended.conflicts {
            let (member, index, _) = layout.slots[slot];
            let own = &self.members[member].taken.member;
            match own {
                Member::Relay { .. } => {
                    left_out.insert(slot);
                }
                Member::Publish { messages, .. } => {
                    outcomes[member].version = Some(VersionConflict {
                        index,
                        key: messages[index].key.clone().unwrap_or_default(),
                        expected: messages[index].expected_version.unwrap_or_default(),
                        version,
                    });
                }
            }
        }
        let mut next = appended.first.clone();
        for (slot, &(member, index, _)) in layout.slots.iter().enumerate() {
            let outcome = &mut outcomes[member];
            if outcome.is_refused() || left_out.contains(&slot) {
                continue;
            }
            outcome.placed[index] = Some(match seen.get(&slot) {
                Some(&first_use) => first_use,
                None => self.place_new(layout, appended, slot, &mut next),
            });
        }
        outcomes
    }

    /// The place of a new message: in the log, or among the scheduled ones.
    fn place_new(
        &self,
        layout: &Layout,
        appended: &Appended,
        slot: usize,
        next: &mut [i64],
    ) -> Placed {
        let (member, index, place) = layout.slots[slot];
        let stream = layout.streams[place];
        let due_at = || self.members[member].taken.member.messages()[index].deliver_at();
        let number = appended.scheduled.get(slot).copied().flatten();
        let scheduled = number.zip(number.and_then(|_| due_at()));
        let scheduled = scheduled.map(|(number, due_at)| ScheduledId {
            due_at,
            number,
            stream,
        });
        let mut offset = Offset(0);
        if scheduled.is_none() {
            offset = Offset(next[place]);
            next[place] += 1;
        }
        Placed {
            stream,
            offset,
            duplicate: false,
            scheduled,
        }
    }
}

struct Outcome {
    refusal: Option<Refusal>,
    version: Option<VersionConflict>,
    refused: Option<Option<i64>>,
    conflicts: Vec<ConflictItem>,
    placed: Vec<Option<Placed>>,
}

impl Outcome {
    fn is_refused(&self) -> bool {
        self.refused.is_some() || self.version.is_some() || !self.conflicts.is_empty()
    }

    fn is_fresh(&self, index: usize) -> bool {
        self.placed[index].is_some_and(|placed| !placed.duplicate && placed.scheduled.is_none())
    }

    /// The name of a message that this group scheduled.
    fn scheduled_now(&self, index: usize) -> Option<ScheduledId> {
        self.placed[index].and_then(|placed| placed.scheduled.filter(|_| !placed.duplicate))
    }

    fn answer(&mut self, repeats: &[(usize, usize)]) -> Result<Vec<Placed>, AppendError> {
        if let Some(refusal) = self.refusal.take() {
            return Err(refusal.error());
        }
        match self.refused {
            Some(None) => return Err(AppendError::Fenced),
            Some(Some(found)) => return Err(AppendError::PositionMoved { found }),
            None => {}
        }
        if !self.conflicts.is_empty() {
            let items = std::mem::take(&mut self.conflicts);
            // Nothing of the member was appended, so nothing of it is fresh.
            self.placed.fill(None);
            return Err(AppendError::IdConflict { items });
        }
        if let Some(conflict) = self.version.take() {
            return Err(AppendError::VersionConflict(conflict));
        }
        for &(repeat, first) in repeats {
            self.placed[repeat] = self.placed[first].map(|placed| Placed {
                duplicate: true,
                ..placed
            });
        }
        Ok(self.placed.iter().copied().flatten().collect())
    }
}

/// Cuts a time to what the log keeps, so that an event prints the same from memory as from the log.
pub(super) fn truncate_times(messages: &mut [Message]) {
    for message in messages {
        message.time = message.time.map(to_micros);
    }
}

fn to_micros(time: DateTime<Utc>) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(time.timestamp_micros()).unwrap_or(time)
}
