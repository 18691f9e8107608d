//! Checks, each time a relay connects, that an outbox exists, is as it must be, and belongs to this relay.

use std::time::{Duration, Instant};

use chrono::SecondsFormat;
use uuid::Uuid;

use super::task::{Relay, Run};
use super::trouble::Trouble;
use crate::domain::id::OriginId;
use crate::domain::mapping::Pickup;
use crate::store;
use crate::store::mapped::Misfit;
use crate::store::origin::{Claim, Claimant, Claimed, Reader, Session};

/// How often the claim and rows of another server are looked for.
const FOREIGN_INTERVAL: Duration = Duration::from_secs(10);

impl Relay {
    /// The identity of this relay as a reader.
    pub(super) fn reader(&self) -> Reader {
        Reader {
            broker: self.cluster.identity().id,
            origin: self.id,
        }
    }

    /// Looks whether the outbox is there, and claims it. Gives the other origins of this broker that have relayed it before.
    pub(super) async fn take_hold(&self, session: &mut Session) -> Result<Vec<OriginId>, Trouble> {
        match &self.mapping {
            None if session.is_installed().await.map_err(Trouble::Origin)? => {}
            None => {
                return Err(Trouble::NotInstalled(
                    "the origin has no outbox: run `postroad install` there".to_owned(),
                ));
            }
            Some(mapping) => {
                let mapped = session.map(mapping).await.map_err(Trouble::Origin)?;
                mapped.map_err(|misfit| match misfit {
                    Misfit::NotInstalled(what) => Trouble::NotInstalled(what),
                    Misfit::Wrong(faults) => Trouble::Mapping(faults.join("; ")),
                })?;
            }
        }
        if self.pickup() == Pickup::Snapshot {
            let found = session.find_subscription().await;
            if let Some(subscription) = found.map_err(Trouble::Origin)? {
                return Err(Trouble::Mapping(format!(
                    "the subscription `{subscription}` feeds this outbox by logical replication, and such rows cannot be relayed: \
                     relay the publisher's database, or remove the outbox from the subscription"
                )));
            }
        }
        let lineage = store::history::lineage(&self.broker).await;
        let claimant = Claimant {
            reader: self.reader(),
            name: self.name.as_str(),
            lineage: &lineage.map_err(Trouble::Broker)?,
            is_local: self.is_local,
        };
        match session.claim(&claimant).await.map_err(Trouble::Origin)? {
            Claimed::Yes(formers) => Ok(formers),
            Claimed::Not(claim) => Err(Trouble::Mapping(claimed_by(&claim, self.reader()))),
        }
    }
}

fn claimed_by(claim: &Claim, reader: Reader) -> String {
    let Claim {
        table,
        name,
        at,
        broker,
        ..
    } = claim;
    let since = at.to_rfc3339_opts(SecondsFormat::Secs, true);
    let whose = whose(claim, reader, *broker);
    format!(
        "`{table}` is relayed as the origin `{name}` of {whose} since {since}, and only one relay may read it: once that relay has stopped for good, \
         run `postroad release` on the origin's database"
    )
}

fn whose(claim: &Claim, reader: Reader, broker: Uuid) -> String {
    if broker != reader.broker {
        return format!("the broker {broker}");
    }
    if claim.origin == reader.origin {
        return "this broker's database in another server, of which this one is a copy,".to_owned();
    }
    "this broker".to_owned()
}

impl Run<'_> {
    /// Looks now and then whether the outbox is still this relay's, and whether something else than an insert brought rows, which no
    /// window has.
    pub(super) async fn has_foreign_rows(&mut self) -> Result<bool, Trouble> {
        let is_due = self
            .foreign_at
            .is_none_or(|at| at.elapsed() >= FOREIGN_INTERVAL);
        if !is_due {
            return Ok(false);
        }
        self.foreign_at = Some(Instant::now());
        let claimed = self.session.has_claim(self.relay.reader()).await;
        if !claimed.map_err(Trouble::Origin)? {
            return Err(Trouble::Reload("its claim on the outbox was released"));
        }
        if self.relay.pickup() != Pickup::Snapshot {
            return Ok(false);
        }
        self.session
            .has_foreign_rows()
            .await
            .map_err(Trouble::Origin)
    }
}
