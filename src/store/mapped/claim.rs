//! Who relays a mapped table: one broker, as one of its origins. The first that comes writes itself down beside the table.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::store::Error;
use crate::store::origin::{Session, statement};

/// Who relays a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The table, as it is listed in `postroad.mapped_outbox`.
    pub table: String,
    /// The broker.
    pub broker: Uuid,
    /// The name of its origin.
    pub origin: String,
    /// Since when.
    pub at: DateTime<Utc>,
}

impl Session {
    /// Claims the mapped table for an origin of a broker. Returns the claim of another that was first. On a standby nothing is claimed.
    ///
    /// # Errors
    /// A statement failed.
    pub async fn claim(&mut self, broker: Uuid, origin: &str) -> Result<Option<Claim>, Error> {
        let table = self.relation()?.table.clone();
        let claiming = sqlx::query(
            "update postroad.mapped_outbox set broker = $2, origin = $3, claimed_at = clock_timestamp()
            where table_name = $1 and broker is null",
        )
        .bind(&table)
        .bind(broker)
        .bind(origin);
        let looking = "select broker, origin, claimed_at from postroad.mapped_outbox where table_name = $1 and broker is not null";
        let found: Option<(Uuid, String, DateTime<Utc>)> =
            statement("claiming a mapped table", async {
                let is_standby = sqlx::query_scalar("select pg_is_in_recovery()");
                let is_standby: bool = is_standby.fetch_one(&mut self.connection).await?;
                if !is_standby {
                    claiming.execute(&mut self.connection).await?;
                }
                sqlx::query_as(looking)
                    .bind(&table)
                    .fetch_optional(&mut self.connection)
                    .await
            })
            .await?;
        let claim = found.map(|(broker, origin, at)| Claim {
            table,
            broker,
            origin,
            at,
        });
        Ok(claim.filter(|claim| claim.broker != broker || claim.origin != origin))
    }
}
