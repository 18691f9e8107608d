//! One group commit: the members that gathered, where their messages go, and what came of it.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::error::{AppendError, ConflictItem};
use super::inbox::{Reply, Taken};
use super::request::{Member, Placed, key_hash};
use super::tail::Appended as TailAppended;
use crate::domain::id::{Offset, OriginId, StreamId, TopicId};
use crate::domain::message::Message;
use crate::domain::name::Topic;
use crate::store::stream::{self as sql, Append, AppendMessage, Appended, RelayMember, StreamRow};

/// Routes and topic numbers remembered; beyond it they are looked up again.
const ROUTES_MAX: usize = 100_000;

/// Topic to stream, by one version of the catalogue; topic to number.
#[derive(Debug, Default)]
pub(super) struct Router {
    pub(super) version: i64,
    streams: Vec<StreamRow>,
    main: StreamId,
    routes: HashMap<Topic, StreamId>,
    topics: HashMap<Topic, TopicId>,
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

    /// The topics of a group whose numbers are not known.
    pub(super) fn unknown_topics(&mut self, group: &Group) -> Vec<Topic> {
        if self.topics.len() >= ROUTES_MAX {
            self.topics.clear();
        }
        let messages = group
            .members
            .iter()
            .flat_map(|member| member.taken.member.messages());
        let unknown: HashSet<&Topic> = messages
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

/// What taking a member in came to.
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

/// Identity and content of each message; none when ids are not checked. By the routes of now.
fn checks(member: &Member, router: &mut Router) -> Vec<(Uuid, Uuid)> {
    match member {
        Member::Publish {
            messages,
            check_ids: true,
            as_one,
        } => {
            let mut checks: Vec<(Uuid, Uuid)> = messages
                .iter()
                .map(|message| check(router.route(&message.topic), message))
                .collect();
            if !as_one.is_empty() {
                let whole = digest_whole(messages);
                for &place in as_one {
                    checks[place].1 = whole;
                }
            }
            checks
        }
        _ => Vec::new(),
    }
}

/// Places that repeat an earlier identity: with the same content, (place, place of the first); and with other content.
fn find_repeats(checks: &[(Uuid, Uuid)]) -> (Vec<(usize, usize)>, Vec<usize>) {
    let mut first: HashMap<Uuid, usize> = HashMap::with_capacity(checks.len());
    let mut repeats = Vec::new();
    let mut conflicts = Vec::new();
    for (place, (identity, content)) in checks.iter().enumerate() {
        match first.get(identity) {
            None => {
                first.insert(*identity, place);
            }
            Some(&earlier) if checks[earlier].1 == *content => repeats.push((place, earlier)),
            Some(_) => conflicts.push(place),
        }
    }
    (repeats, conflicts)
}

/// The identity of a message within its window, and its content: 128 bits of SHA-256 each.
fn check(stream: StreamId, message: &Message) -> (Uuid, Uuid) {
    let identity = digest(&[
        &stream.0.to_le_bytes(),
        message.source.as_bytes(),
        message.id.as_bytes(),
    ]);
    let content = digest(&[
        message.topic.as_str().as_bytes(),
        &message.data.kind().to_le_bytes(),
        message.data.bytes(),
    ]);
    (identity, content)
}

/// The content of a whole member: which messages in which order.
fn digest_whole(messages: &[Message]) -> Uuid {
    let contents: Vec<[u8; 16]> = messages
        .iter()
        .map(|message| {
            let (identity, content) = check(StreamId(0), message);
            digest(&[identity.as_bytes(), content.as_bytes()]).into_bytes()
        })
        .collect();
    let parts: Vec<&[u8]> = contents.iter().map(<[u8; 16]>::as_slice).collect();
    digest(&parts)
}

fn digest(parts: &[&[u8]]) -> Uuid {
    let mut digest = Sha256::new();
    for part in parts {
        // With its length, so that no two lists of parts read the same.
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    let mut half = [0; 16];
    half.copy_from_slice(&digest.finalize()[..16]);
    Uuid::from_bytes(half)
}

/// A group laid out for the call. Kept as it is while the outcome of a call is not known.
#[derive(Debug)]
pub(super) struct Plan<'g> {
    pub(super) append: Append<'g>,
    pub(super) layout: Layout,
}

/// Where each message of a plan comes from and goes to.
#[derive(Debug, Default)]
pub(super) struct Layout {
    pub(super) streams: Vec<StreamId>,
    /// In the order of the call: member, its message, place of the stream.
    slots: Vec<(usize, usize, usize)>,
    /// By member: messages that repeat an earlier one of it, (place, place of the first).
    repeats: Vec<Vec<(usize, usize)>>,
    /// By member: messages that have an earlier one's id and other content.
    conflicts: Vec<Vec<ConflictItem>>,
}

impl<'g> Plan<'g> {
    pub(super) fn new(
        group: &'g Group,
        router: &mut Router,
        lasts: &HashMap<StreamId, Offset>,
    ) -> Self {
        let mut append = Append::default();
        let mut layout = Layout::default();
        let mut places: HashMap<StreamId, usize> = HashMap::new();
        for (number, member) in group.members.iter().enumerate() {
            let origin = match &member.taken.member {
                Member::Publish { .. } => None,
                Member::Relay { origin, .. } => Some(*origin),
            };
            push_relay(&mut append, number, &member.taken.member);
            let messages = member.taken.member.messages();
            let checks = checks(&member.taken.member, router);
            let (repeats, conflicts) = find_repeats(&checks);
            let is_refused = !conflicts.is_empty();
            for (index, message) in messages.iter().enumerate() {
                if is_refused || repeats.iter().any(|&(repeat, _)| repeat == index) {
                    continue;
                }
                let stream = router.route(&message.topic);
                let place = *places.entry(stream).or_insert_with(|| {
                    layout.streams.push(stream);
                    append.push_stream(stream, lasts.get(&stream).map_or(0, |last| last.0))
                });
                append.push_message(AppendMessage {
                    member: number,
                    place,
                    topic: router.topics[&message.topic],
                    message,
                    key_hash: message.key.as_deref().map(key_hash),
                    origin,
                    check: checks.get(index).copied(),
                });
                layout.slots.push((number, index, place));
            }
            let conflicts = conflicts.into_iter().map(|index| ConflictItem {
                index,
                stream: router.route(&messages[index].topic),
                offset: Offset(0),
            });
            layout.conflicts.push(conflicts.collect());
            layout.repeats.push(repeats);
        }
        Self { append, layout }
    }
}

fn push_relay<'g>(append: &mut Append<'g>, number: usize, member: &'g Member) {
    if let Member::Relay {
        origin,
        fence,
        from,
        to,
        position,
        rejected,
        ..
    } = member
    {
        append.push_relay(
            number,
            RelayMember {
                origin: *origin,
                fence,
                from: *from,
                to: *to,
                position,
            },
        );
        for row in rejected {
            append.push_rejected(row.seq, &row.reason, &row.outbox_row);
        }
    }
}

/// What a committed group came to: for the tails, and for the callers.
#[derive(Debug, Default)]
pub(super) struct Settled {
    pub(super) tails: Vec<TailAppended>,
    pub(super) appended_count: usize,
    pub(super) duplicate_count: usize,
    pub(super) refused_count: usize,
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
            .zip(&layout.conflicts)
            .map(|(member, conflicts)| Outcome {
                refused: None,
                conflicts: conflicts.clone(),
                placed: vec![None; member.taken.member.messages().len()],
            })
            .collect();
        for &(member, found) in &appended.refused {
            outcomes[member].refused = Some(found);
        }
        let mut seen = HashMap::with_capacity(appended.seen.len());
        for &(slot, offset, is_conflict) in &appended.seen {
            let (member, index, place) = layout.slots[slot];
            let stream = layout.streams[place];
            if is_conflict {
                outcomes[member].conflicts.push(ConflictItem {
                    index,
                    stream,
                    offset: Offset(offset),
                });
            }
            seen.insert(slot, offset);
        }
        let mut next = appended.first.clone();
        for (slot, &(member, index, place)) in layout.slots.iter().enumerate() {
            let outcome = &mut outcomes[member];
            if outcome.refused.is_some() || !outcome.conflicts.is_empty() {
                continue;
            }
            let first_use = seen.get(&slot).copied();
            outcome.placed[index] = Some(Placed {
                stream: layout.streams[place],
                offset: Offset(first_use.unwrap_or(next[place])),
                duplicate: first_use.is_some(),
            });
            if first_use.is_none() {
                next[place] += 1;
            }
        }
        outcomes
    }
}

struct Outcome {
    refused: Option<Option<i64>>,
    conflicts: Vec<ConflictItem>,
    placed: Vec<Option<Placed>>,
}

impl Outcome {
    fn is_fresh(&self, index: usize) -> bool {
        self.placed[index].is_some_and(|placed| !placed.duplicate)
    }

    fn answer(&mut self, repeats: &[(usize, usize)]) -> Result<Vec<Placed>, AppendError> {
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
