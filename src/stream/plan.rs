//! A group laid out for the call that commits it: the place of each message, the messages that repeat an id, and the
//! members that are refused before the database is asked.

use std::collections::HashMap;
use std::fmt::Write as _;

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::error::{AppendError, ConflictItem};
use super::group::{Group, Router};
use super::keys::Counted;
use super::request::{Conditional, Member, key_hash};
use crate::domain::id::{Offset, StreamId};
use crate::domain::message::{DELIVER_AT, Message};
use crate::store::stream::{Append, AppendMessage, RelayMember};

/// The counts of the keys whose versions a group expects, by stream; `None` for a stream whose keys are not counted.
pub(super) type Counts<'g> = HashMap<StreamId, Option<Counted<'g>>>;

/// A group laid out for the call. Kept as it is while the outcome of a call is not known.
#[derive(Debug)]
pub(super) struct Plan<'g> {
    pub(super) append: Append<'g>,
    pub(super) layout: Layout,
}

/// The origin and the place of each message of a plan.
#[derive(Debug, Default)]
pub(super) struct Layout {
    pub(super) streams: Vec<StreamId>,
    /// In the order of the call: member, its message, place of the stream.
    pub(super) slots: Vec<(usize, usize, usize)>,
    /// By member: messages that repeat an earlier one of it, (place, place of the first).
    pub(super) repeats: Vec<Vec<(usize, usize)>>,
    /// By member: messages that have an earlier one's id and other content.
    pub(super) conflicts: Vec<Vec<ConflictItem>>,
    /// By member: why nothing of it is in the call.
    pub(super) refusals: Vec<Option<Refusal>>,
}

/// Reasons why a member is refused before the call.
#[derive(Debug, Clone)]
pub(super) enum Refusal {
    /// Messages expect a version in streams that are not keyed.
    NotKeyed(Vec<(usize, StreamId)>),
    /// A message expects a version in a stream whose keys are not counted at the moment.
    NotCounted,
}

impl Refusal {
    /// `None`: the member goes into the call.
    fn of(member: &Member, router: &mut Router, counts: &Counts<'_>) -> Option<Self> {
        let messages = member.messages().iter().enumerate();
        let mut not_keyed = Vec::new();
        for (index, message) in messages.filter(|(_, m)| m.expected_version.is_some()) {
            let stream = router.route(&message.topic);
            match counts.get(&stream) {
                Some(Some(_)) => {}
                Some(None) => return Some(Self::NotCounted),
                None => not_keyed.push((index, stream)),
            }
        }
        // An outbox row of a stream that is not keyed is listed as rejected, and its relay goes on.
        let is_refused = matches!(member, Member::Publish { .. }) && !not_keyed.is_empty();
        is_refused.then_some(Self::NotKeyed(not_keyed))
    }

    pub(super) fn error(self) -> AppendError {
        match self {
            Self::NotKeyed(items) => AppendError::NotKeyed { items },
            Self::NotCounted => AppendError::Unavailable(None),
        }
    }
}

/// The group that is being laid out.
struct Planner<'g, 'p> {
    router: &'p mut Router,
    lasts: &'p HashMap<StreamId, Offset>,
    counts: &'p Counts<'g>,
    append: Append<'g>,
    layout: Layout,
    places: HashMap<StreamId, usize>,
    /// Numbers of the keys that some message expects a version of.
    keys: HashMap<(StreamId, &'g str), usize>,
}

impl<'g> Plan<'g> {
    pub(super) fn new(
        group: &'g Group,
        router: &mut Router,
        lasts: &HashMap<StreamId, Offset>,
        counts: &Counts<'g>,
    ) -> Self {
        let mut planner = Planner {
            router,
            lasts,
            counts,
            append: Append::default(),
            layout: Layout::default(),
            places: HashMap::new(),
            keys: HashMap::new(),
        };
        for (number, member) in group.members.iter().enumerate() {
            planner.push(number, &member.taken.member);
        }
        Self {
            append: planner.append,
            layout: planner.layout,
        }
    }
}

impl<'g> Planner<'g, '_> {
    fn push(&mut self, number: usize, member: &'g Member) {
        let refusal = Refusal::of(member, self.router, self.counts);
        let is_refused = refusal.is_some();
        self.layout.refusals.push(refusal);
        let checks = checks(member, self.router);
        let (repeats, conflicts) = find_repeats(&checks);
        if !is_refused {
            push_relay(&mut self.append, number, member);
        }
        if !is_refused && conflicts.is_empty() {
            self.push_messages(number, member, &checks, &repeats);
        }
        let messages = member.messages();
        let conflicts = conflicts.into_iter().map(|index| ConflictItem {
            index,
            stream: self.router.route(&messages[index].topic),
            offset: Offset(0),
            scheduled: None,
        });
        self.layout.conflicts.push(conflicts.collect());
        self.layout.repeats.push(repeats);
    }

    fn push_messages(
        &mut self,
        number: usize,
        member: &'g Member,
        checks: &[(Uuid, Uuid)],
        repeats: &[(usize, usize)],
    ) {
        let (origin, rows): (_, &[Conditional]) = match member {
            Member::Publish { .. } => (None, &[]),
            Member::Relay {
                origin,
                conditional,
                ..
            } => (Some(*origin), conditional),
        };
        let mut rows = rows.iter();
        for (index, message) in member.messages().iter().enumerate() {
            if repeats.iter().any(|&(repeat, _)| repeat == index) {
                continue;
            }
            let expected = message.expected_version;
            let row = expected.and_then(|_| rows.next());
            let stream = self.router.route(&message.topic);
            if expected.is_some() && !self.counts.contains_key(&stream) {
                // Of a relay: see `Refusal`.
                if let Some(row) = row {
                    let reason = "it expects a version of its key, and its stream is not keyed";
                    self.append.push_rejected(row.seq, reason, &row.outbox_row);
                }
                continue;
            }
            let place = self.place(stream);
            self.append.push_message(AppendMessage {
                member: number,
                place,
                topic: self.router.topics[&message.topic],
                message,
                key_hash: message.key.as_deref().map(key_hash),
                origin,
                check: checks.get(index).copied(),
                due_at: message.deliver_at(),
            });
            if let Some(key) = self.key(stream, place, message) {
                let row = row.map(|row| (row.seq, row.outbox_row.as_str()));
                self.append.push_expectation(key, expected, row);
            }
            self.layout.slots.push((number, index, place));
        }
    }

    fn place(&mut self, stream: StreamId) -> usize {
        if let Some(&place) = self.places.get(&stream) {
            return place;
        }
        let hint = self.lasts.get(&stream).map_or(0, |last| last.0);
        let place = self.append.push_stream(stream, hint);
        if let Some(Some(counted)) = self.counts.get(&stream) {
            self.append.counted(place, counted.after, counted.through);
        }
        self.layout.streams.push(stream);
        self.places.insert(stream, place);
        place
    }

    /// The number of a message's key, if some message of the group expects a version of it.
    fn key(&mut self, stream: StreamId, place: usize, message: &'g Message) -> Option<usize> {
        let counted = self.counts.get(&stream)?.as_ref()?;
        let key = message.key.as_deref()?;
        let &count = counted.counts.get(key)?;
        let append = &mut self.append;
        let number = self
            .keys
            .entry((stream, key))
            .or_insert_with(|| append.push_key(place, key, count));
        Some(*number)
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

/// Identity and content of each message, by the current routes; none when ids are not checked.
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
    (identity, digest_content(message))
}

/// Attributes that may differ in a repeat: they describe the sending, not the message.
const OF_THE_SENDING: [&str; 4] = ["traceparent", "tracestate", "baggage", "recordedtime"];

/// The content of a message, its topic and its due time. Not its `time`, which libraries set as they send; and not the version
/// that it expects: a published message stays published, whatever the key's version is by now.
fn digest_content(message: &Message) -> Uuid {
    fn text(text: &Option<String>) -> &[u8] {
        text.as_deref().unwrap_or_default().as_bytes()
    }
    let due_at = message.deliver_at();
    let due_at = due_at.map_or(i64::MIN, |due_at| due_at.timestamp_micros());
    let mut extensions: Vec<(&String, &Value)> = message
        .extensions
        .iter()
        .filter(|(name, _)| *name != DELIVER_AT && !OF_THE_SENDING.contains(&name.as_str()))
        .collect();
    extensions.sort_by_key(|(name, _)| *name);
    let mut printed = String::new();
    for (name, value) in extensions {
        let _ = writeln!(printed, "{name}={value}");
    }
    digest(&[
        message.topic.as_str().as_bytes(),
        &message.data.kind().to_le_bytes(),
        message.data.bytes(),
        text(&message.key),
        text(&message.kind),
        text(&message.subject),
        text(&message.data_content_type),
        text(&message.data_schema),
        &due_at.to_le_bytes(),
        printed.as_bytes(),
    ])
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
