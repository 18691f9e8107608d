//! The desk of rejected rows: lists them, deletes them, and resends one when a person asks. It is a separate task, so that
//! a caller that goes away leaves nothing half done.

use std::ops::RangeInclusive;

use super::handle::{Correction, RejectedError};
use super::row;
use crate::cluster;
use crate::domain::id::OriginId;
use crate::store::relay::RejectedRow;
use crate::store::{self, Database};
use crate::stream::{self, Member, Placed};
use crate::supervisor::Supervisor;
use crate::topic;

/// The most rejected rows in one page.
pub const REJECTED_PAGE_MAX: u32 = 1_000;

/// A page of rejected rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RejectedPage {
    /// The rows, oldest first.
    pub rows: Vec<RejectedRow>,
    /// The start of the next page; none at the end.
    pub next_after: Option<i64>,
}

/// Lists, deletes and resends rejected rows, at a desk.
pub(super) struct Rejected {
    pub(super) broker: Database,
    pub(super) stream: stream::Handle,
    pub(super) cluster: cluster::Handle,
    pub(super) topics: topic::Handle,
    pub(super) supervisor: Supervisor,
}

impl Rejected {
    pub(super) async fn list(
        &self,
        origin: OriginId,
        after: i64,
        limit: u32,
    ) -> Result<RejectedPage, RejectedError> {
        let limit = limit.clamp(1, REJECTED_PAGE_MAX);
        let (rows, has_next) =
            store::relay::list_rejected(&self.broker, origin, after, limit).await?;
        let next_after = rows.last().filter(|_| has_next).map(|row| row.id);
        Ok(RejectedPage { rows, next_after })
    }

    /// A chunk at a time: a repeat after a failure goes on.
    pub(super) async fn delete(
        &self,
        origin: OriginId,
        ids: RangeInclusive<i64>,
    ) -> Result<u64, RejectedError> {
        let mut count = 0;
        loop {
            let deleting =
                store::relay::delete_rejected(&self.broker, origin, ids.clone(), REJECTED_PAGE_MAX);
            let deleted = deleting.await?;
            count += deleted;
            if deleted < u64::from(REJECTED_PAGE_MAX) || self.supervisor.is_stopping() {
                return Ok(count);
            }
        }
    }

    /// Appends first and marks then: if the process dies in between, the repeat finds the id and appends nothing.
    pub(super) async fn resend(
        &self,
        origin: OriginId,
        id: i64,
        correction: Correction,
    ) -> Result<Placed, RejectedError> {
        let found = store::relay::find_rejected(&self.broker, origin, id).await?;
        let found = found.ok_or(RejectedError::NotFound { id })?;
        if found.resent_at.is_some() {
            return Err(RejectedError::AlreadyResent { id });
        }
        let mut outbox_row =
            row::from_copy(&found.outbox_row).ok_or(RejectedError::NotKept { id })?;
        if let Some(topic) = correction.topic {
            outbox_row.topic = Some(topic.to_string());
        }
        if let Some(payload) = correction.payload {
            outbox_row.payload = Some(payload);
            outbox_row.payload_bytes = None;
        }
        // A person sends it on: whatever version its key is at by now.
        outbox_row.expected_version = None;
        let message = row::to_message(outbox_row, self.cluster.now()).map_err(|rejected| {
            RejectedError::StillInvalid {
                reason: rejected.reason,
            }
        })?;
        if !correction.skip_schema {
            let refusals = self
                .topics
                .find_refusals(std::slice::from_ref(&message))
                .await;
            let refusals =
                refusals.map_err(|_| RejectedError::Append(stream::AppendError::Stopping))?;
            if let Some((_, reason)) = refusals.into_iter().next() {
                return Err(RejectedError::StillInvalid { reason });
            }
        }
        let member = Member::Publish {
            messages: vec![message],
            check_ids: true,
            as_one: Vec::new(),
        };
        let placed = self.stream.append(member).await;
        let placed = placed.map_err(RejectedError::Append)?;
        store::relay::mark_resent(&self.broker, origin, id).await?;
        placed
            .first()
            .copied()
            .ok_or(RejectedError::NotFound { id })
    }
}
