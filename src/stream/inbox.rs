//! The place where members wait for the next group commit.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::AppendError;
use super::request::{Member, Placed};

/// The most messages in one member (docs/protocol.md: 1,000 per publish; a relay's page may be larger).
pub const MEMBER_MAX_MESSAGES: usize = 10_000;
/// The most bytes in one member: a publish of 16 MiB, or one message at the cap, and what stands around the payloads.
pub const MEMBER_MAX_BYTES: usize = 24 << 20;
/// The semaphore counts in units of this many bytes, since its permits have 32 bits.
const PERMIT_BYTES: usize = 1_024;

/// The place where members wait for the next group, bounded in bytes and in count.
#[derive(Debug)]
pub(super) struct Inbox {
    sender: mpsc::Sender<Pending>,
    budget: Arc<Semaphore>,
    wait: Duration,
}

/// A member that waits for its group, with the one who waits for it.
#[derive(Debug)]
pub(super) struct Pending {
    /// Empty once its caller has given up before it was tried.
    slot: Arc<Mutex<Option<Member>>>,
    reply: Reply,
    bytes: usize,
    /// Its share of the bound on bytes, given back when it is answered.
    permit: OwnedSemaphorePermit,
}

pub(super) type Reply = oneshot::Sender<Result<Vec<Placed>, AppendError>>;

/// A member that the appender has taken up: from here on only the appender knows its outcome.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) member: Member,
    pub(super) reply: Reply,
    pub(super) bytes: usize,
    /// The time when it began.
    pub(super) at: Instant,
    _permit: OwnedSemaphorePermit,
}

impl Taken {
    pub(super) fn new(
        member: Member,
        reply: Reply,
        bytes: usize,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        Self {
            member,
            reply,
            bytes,
            at: Instant::now(),
            _permit: permit,
        }
    }
}

impl Inbox {
    pub(super) fn new(
        max_members: usize,
        max_bytes: usize,
        wait: Duration,
    ) -> (Self, mpsc::Receiver<Pending>) {
        let (sender, receiver) = mpsc::channel(max_members);
        let budget = Arc::new(Semaphore::new(
            max_bytes.max(MEMBER_MAX_BYTES).div_ceil(PERMIT_BYTES),
        ));
        let inbox = Self {
            sender,
            budget,
            wait,
        };
        (inbox, receiver)
    }
}

impl Pending {
    /// Queues a member and waits for its outcome. Cancel-safe: a queued member stays queued.
    pub(super) async fn append(inbox: &Inbox, member: Member) -> Result<Vec<Placed>, AppendError> {
        let bytes = check(&member)?;
        if member.messages().is_empty() && matches!(member, Member::Publish { .. }) {
            return Ok(Vec::new());
        }
        let permits = u32::try_from(bytes.div_ceil(PERMIT_BYTES)).unwrap_or(u32::MAX);
        let slot = Arc::new(Mutex::new(Some(member)));
        let (reply, mut answer) = oneshot::channel();
        let queue = async {
            let budget = Arc::clone(&inbox.budget);
            let permit = budget.acquire_many_owned(permits).await;
            let pending = Self {
                slot: Arc::clone(&slot),
                reply,
                bytes,
                permit: permit.map_err(|_| AppendError::Stopping)?,
            };
            let sent = inbox.sender.send(pending).await;
            sent.map_err(|_| AppendError::Stopping)
        };
        let until = tokio::time::Instant::now() + inbox.wait;
        match tokio::time::timeout_at(until, queue).await {
            Ok(queued) => queued?,
            Err(_) => return Err(AppendError::Overloaded),
        }
        match tokio::time::timeout_at(until, &mut answer).await {
            Ok(answered) => answered.unwrap_or(Err(AppendError::OutcomeUnknown)),
            // Not tried yet and now never to be: that is certain. Once tried, only the appender can find out.
            Err(_) => match take(&slot) {
                Some(_) => Err(AppendError::Unavailable(None)),
                None => Err(AppendError::OutcomeUnknown),
            },
        }
    }
}

impl Pending {
    /// Takes the member up, unless its caller has given up.
    pub(super) fn take(self) -> Option<Taken> {
        let member = take(&self.slot)?;
        Some(Taken::new(member, self.reply, self.bytes, self.permit))
    }
}

fn take(slot: &Mutex<Option<Member>>) -> Option<Member> {
    slot.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Checks what the database would refuse the whole group for. Returns the member's bytes.
fn check(member: &Member) -> Result<usize, AppendError> {
    let messages = member.messages();
    let mut bytes = 0;
    for (index, message) in messages.iter().enumerate() {
        if message.texts().any(|text| text.contains('\0')) {
            return Err(AppendError::Invalid {
                index,
                reason: "an attribute contains the character U+0000, which Postgres cannot store",
            });
        }
        bytes += message.size();
    }
    if messages.len() > MEMBER_MAX_MESSAGES || bytes > MEMBER_MAX_BYTES {
        return Err(AppendError::TooLarge {
            count: messages.len(),
            bytes,
        });
    }
    Ok(bytes)
}
