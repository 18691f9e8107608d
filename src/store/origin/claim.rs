//! The claim on an outbox, or on a table in its place: one broker relays it, as one of its origins. The first broker that
//! connects writes its claim beside the outbox, and any other is refused until that claim is released.
//!
//! A claim names the broker's history too. A copy of a broker's database has the broker's id and all of its origins, and
//! begins another history as soon as it runs in another server or database: only the lineage that made the claim continues
//! with it. A promoted standby stays in its server, as far as anybody can tell, and continues.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{Session, statement};
use crate::domain::id::OriginId;
use crate::store::{Database, Error, migrate};

/// The reader of an outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reader {
    /// The broker.
    pub broker: Uuid,
    /// Its origin.
    pub origin: OriginId,
}

/// The relay that claims it.
#[derive(Debug, Clone)]
pub struct Claimant<'a> {
    /// The reader.
    pub reader: Reader,
    /// The name of its origin.
    pub name: &'a str,
    /// The salts of the history that the broker's database is in, and of those before it in the same server and database, latest first.
    pub lineage: &'a [Uuid],
    /// The outbox is in the broker's own database, and is copied with it.
    pub is_local: bool,
}

/// The current claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The table: the outbox, or the one in its place.
    pub table: String,
    /// The broker.
    pub broker: Uuid,
    /// The number of its origin.
    pub origin: OriginId,
    /// The name that this origin had.
    pub name: String,
    /// The time when it began.
    pub at: DateTime<Utc>,
    /// The salt of the history in which it was made or confirmed.
    salt: Uuid,
}

/// The outcome of a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claimed {
    /// It is the claimant's. With the other origins of this broker that have relayed it before.
    Yes(Vec<OriginId>),
    /// Another was first.
    Not(Claim),
}

const OWN: &str = "postroad.outbox";

type Row = (Uuid, i32, String, DateTime<Utc>, Uuid);

impl Session {
    fn claimed_table(&self) -> (String, &'static str) {
        match &self.mapped {
            None => (OWN.to_owned(), "postroad.relay_claim"),
            Some(relation) => (relation.table.clone(), "postroad.mapped_claim"),
        }
    }

    /// Claims what the session reads. On a standby nothing is claimed.
    ///
    /// # Errors
    /// A statement failed.
    pub async fn claim(&mut self, claimant: &Claimant<'_>) -> Result<Claimed, Error> {
        let Claimant { reader, name, .. } = *claimant;
        let (table, claims) = self.claimed_table();
        let salt = claimant.lineage.first().copied().unwrap_or_default();
        let looking = format!(
            "select broker, origin_id, origin, claimed_at, salt from {claims} where table_name = $1 and released_at is null"
        );
        // Of two at a time one finds that the other has the only row that is not released.
        let claiming = format!(
            "insert into {claims} as c (table_name, broker, origin_id, origin, salt)
            select $1, $2, $3, $4, $5
            where not pg_is_in_recovery() and not exists (select from {claims} where table_name = $1 and released_at is null)
            on conflict (table_name, broker, origin_id) do update
            set origin = excluded.origin, salt = excluded.salt, claimed_at = clock_timestamp(), released_at = null"
        );
        let confirming = format!(
            "update {claims} set origin = $4, salt = $5
            where table_name = $1 and broker = $2 and origin_id = $3 and released_at is null and salt = $6 and not pg_is_in_recovery()"
        );
        let former = format!(
            "select origin_id from {claims} where table_name = $1 and broker = $2 and origin_id <> $3 order by origin_id"
        );
        let connection = &mut self.connection;
        statement("claiming the outbox", async {
            let bound = |text: String| {
                sqlx::query(sqlx::AssertSqlSafe(text))
                    .bind(table.clone())
                    .bind(reader.broker)
                    .bind(reader.origin.0)
                    .bind(name.to_owned())
                    .bind(salt)
            };
            let is_standby = sqlx::query_scalar("select pg_is_in_recovery()");
            if is_standby.fetch_one(&mut *connection).await? {
                return Ok(Claimed::Yes(Vec::new()));
            }
            let claimed = bound(claiming).execute(&mut *connection).await;
            if let Err(error) = claimed {
                let code = error.as_database_error().and_then(|error| error.code());
                if code.as_deref() != Some("23505") {
                    return Err(error);
                }
            }
            let found: Option<Row> = sqlx::query_as(sqlx::AssertSqlSafe(looking))
                .bind(&table)
                .fetch_optional(&mut *connection)
                .await?;
            let Some((broker, origin, had, at, found_salt)) = found else {
                return Err(sqlx::Error::RowNotFound);
            };
            let claim = Claim {
                table: table.clone(),
                broker,
                origin: OriginId(origin),
                name: had,
                at,
                salt: found_salt,
            };
            if !claimant.has(&claim) {
                return Ok(Claimed::Not(claim));
            }
            if claim.salt != salt || claim.name != name {
                bound(confirming)
                    .bind(claim.salt)
                    .execute(&mut *connection)
                    .await?;
            }
            let former: Vec<i32> = sqlx::query_scalar(sqlx::AssertSqlSafe(former))
                .bind(&table)
                .bind(reader.broker)
                .bind(reader.origin.0)
                .fetch_all(&mut *connection)
                .await?;
            Ok(Claimed::Yes(former.into_iter().map(OriginId).collect()))
        })
        .await
    }

    /// Why the outbox cannot be relayed though it is there: a logical subscription feeds it. The rows that a subscription applies have the
    /// transaction ids of the publisher's server, so that no window of this one ever has them.
    ///
    /// # Errors
    /// A statement failed.
    pub async fn find_subscription(&mut self) -> Result<Option<String>, Error> {
        let table = self.claimed_table().0;
        let finding = sqlx::query_scalar(
            "with recursive tree (id) as (
                select to_regclass($1)::oid
                union
                select i.inhrelid from pg_inherits as i join tree on i.inhparent = tree.id
            )
            select s.subname::text
            from pg_subscription_rel as r join tree on tree.id = r.srrelid join pg_subscription as s on s.oid = r.srsubid
            limit 1",
        )
        .bind(table)
        .fetch_optional(&mut self.connection);
        statement("looking for a subscription", finding).await
    }

    /// Whether the claim is still this reader's: somebody may have released it while its relay runs.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn has_claim(&mut self, reader: Reader) -> Result<bool, Error> {
        let (table, claims) = self.claimed_table();
        let text = format!(
            "select exists (select from {claims}
            where table_name = $1 and broker = $2 and origin_id = $3 and released_at is null)"
        );
        let looking = sqlx::query_scalar(sqlx::AssertSqlSafe(text))
            .bind(table)
            .bind(reader.broker)
            .bind(reader.origin.0)
            .fetch_one(&mut self.connection);
        statement("looking for the claim", looking).await
    }

    /// Whether the outbox holds a row of a transaction that this server has not begun yet: one that something else than an insert
    /// brought, a restore or a replication. No window has it.
    ///
    /// # Errors
    /// The statement failed.
    pub async fn has_foreign_rows(&mut self) -> Result<bool, Error> {
        let text = self.text(
            "select exists (select from postroad.outbox where xid >= pg_snapshot_xmax(pg_current_snapshot()))",
        );
        let looking = sqlx::query_scalar(text).fetch_one(&mut self.connection);
        statement("looking for rows of another server", looking).await
    }
}

impl Claimant<'_> {
    /// Whether a claim is this claimant's.
    fn has(&self, claim: &Claim) -> bool {
        let is_same = claim.broker == self.reader.broker && claim.origin == self.reader.origin;
        is_same
            && (self.is_local
                || claim.salt == self.lineage.first().copied().unwrap_or_default()
                || self.lineage.contains(&claim.salt))
    }
}

/// A released claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Released {
    /// The table.
    pub table: String,
    /// The broker.
    pub broker: Uuid,
    /// The name of its origin.
    pub origin: String,
    /// The time since when it had it.
    pub since: DateTime<Utc>,
}

/// The script that releases claims: of one mapped table, or of the outbox. Gives who had it.
#[must_use]
pub fn release_sql(table: Option<&str>) -> String {
    format!(
        "begin;\nset local search_path = pg_catalog, pg_temp;\n{}{}commit;\n",
        migrate::look(),
        releasing(table)
    )
}

fn releasing(table: Option<&str>) -> String {
    let (claims, name) = match table {
        None => ("postroad.relay_claim", OWN),
        Some(table) => ("postroad.mapped_claim", table),
    };
    let name = name.replace('\'', "''");
    format!(
        "update {claims} set released_at = pg_catalog.clock_timestamp()\n\
         where table_name operator(pg_catalog.=) '{name}' and released_at is null\n\
         returning table_name, broker, origin, claimed_at;\n"
    )
}

/// Releases a claim: the next broker that comes relays what it was of.
///
/// # Errors
/// The statement failed.
pub async fn release(database: &Database, table: Option<&str>) -> Result<Option<Released>, Error> {
    let mut connection = database.connect().await?;
    sqlx::raw_sql(sqlx::AssertSqlSafe(migrate::look()))
        .execute(&mut connection)
        .await
        .map_err(Error::query("looking whose schema it is"))?;
    let text = releasing(table);
    let releasing = sqlx::query_as::<_, (String, Uuid, String, DateTime<Utc>)>(
        sqlx::AssertSqlSafe(text.trim_end().trim_end_matches(';').to_owned()),
    )
    .fetch_optional(&mut connection);
    let found = match statement("releasing the claim", releasing).await {
        // Nothing of the kind is installed here, so nobody has claimed it.
        Err(error) if error.is_undefined() => None,
        found => found?,
    };
    Ok(found.map(|(table, broker, origin, since)| Released {
        table,
        broker,
        origin,
        since,
    }))
}
