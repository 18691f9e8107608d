//! Checks of a Postgres server before the broker trusts it with acknowledged messages.

use super::{Database, Error, pooler, session};

/// The oldest major version that is supported and tested: older ones no longer get fixes.
pub const OLDEST_MAJOR: i32 = 15;

/// A server, as one session finds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// `150018` for 15.18.
    pub version_number: i32,
    /// Whether it is a standby, which cannot be written to.
    pub is_in_recovery: bool,
    /// The encoding of the database: `UTF8`.
    pub encoding: String,
    /// The isolation level a transaction of the session starts with.
    pub isolation: String,
}

impl Server {
    /// The reason why Postroad cannot use it; `None` when it can. The cluster engine checks durability.
    #[must_use]
    pub fn refusal(&self) -> Option<String> {
        if self.version_number / 10_000 < OLDEST_MAJOR {
            return Some(format!(
                "its version is {}, and the oldest supported version is {OLDEST_MAJOR}",
                self.version_number / 10_000
            ));
        }
        if self.is_in_recovery {
            return Some("it is a standby, which cannot be written to".to_owned());
        }
        if self.encoding != "UTF8" {
            return Some(format!(
                "the database's encoding is {}, and must be UTF8",
                self.encoding
            ));
        }
        if self.isolation != "read committed" {
            return Some(format!(
                "its sessions start with the isolation {} instead of read committed: a pooler may drop startup options",
                self.isolation
            ));
        }
        None
    }
}

/// Looks at the server, and at what stands before it.
///
/// # Errors
/// It cannot be reached or refuses the session; [`Error::Pooled`].
pub async fn look(database: &Database) -> Result<Server, Error> {
    let mut connection = database.open_unchecked(&[]).await?;
    pooler::check(database, &mut connection, &session(&[]), true).await?;
    let (version_number, is_in_recovery, encoding, isolation) =
        sqlx::query_as::<_, (i32, bool, String, String)>(
            "select current_setting('server_version_num')::int,
                    pg_is_in_recovery(),
                    current_setting('server_encoding'),
                    current_setting('transaction_isolation')",
        )
        .fetch_one(&mut connection)
        .await
        .map_err(Error::query("looking at the server"))?;
    Ok(Server {
        version_number,
        is_in_recovery,
        encoding,
        isolation,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_refused_with_the_reason() {
        let good = Server {
            version_number: 150_018,
            is_in_recovery: false,
            encoding: "UTF8".to_owned(),
            isolation: "read committed".to_owned(),
        };
        assert_eq!(good.refusal(), None);
        let mut old = good.clone();
        old.version_number = 140_009;
        assert!(
            old.refusal()
                .is_some_and(|why| why.contains("version is 14"))
        );
        let mut standby = good;
        standby.is_in_recovery = true;
        assert!(standby.refusal().is_some_and(|why| why.contains("standby")));
    }
}
