//! What can go wrong with a statement, and whether to try again.

/// A failed statement or connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is not a URL of a Postgres database.
    #[error("the database URL is not valid")]
    Url(#[source] sqlx::Error),
    /// Migrations did not run.
    #[error("migrating the database failed")]
    Migrate(#[source] sqlx::migrate::MigrateError),
    /// A statement or a connection failed.
    #[error("{doing} failed")]
    Query {
        /// What was being done, as a gerund: "appending messages".
        doing: &'static str,
        /// What the driver said.
        #[source]
        source: sqlx::Error,
    },
    /// A row holds what no version of Postroad has written.
    #[error("{doing} found a value that is not valid: {what}")]
    Corrupt {
        /// What was being done.
        doing: &'static str,
        /// What was found, and where.
        what: String,
    },
}

/// Whether a failed statement is worth repeating.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// At once: a serialization failure or a deadlock.
    Now,
    /// After a pause: the server cannot be reached, is starting, stopping, out of connections or out of space.
    Backoff,
    /// Not at all: the statement itself is refused.
    Never,
}

impl Error {
    pub(in crate::store) fn url(source: sqlx::Error) -> Self {
        Self::Url(source)
    }

    /// Adapter for `map_err`.
    pub(in crate::store) fn query(doing: &'static str) -> impl FnOnce(sqlx::Error) -> Self {
        move |source| Self::Query { doing, source }
    }

    /// The SQLSTATE, if the server sent one.
    #[must_use]
    pub fn sqlstate(&self) -> Option<String> {
        match self {
            Self::Query {
                source: sqlx::Error::Database(error),
                ..
            } => error.code().map(std::borrow::Cow::into_owned),
            _ => None,
        }
    }

    /// The constraint that refused the row, if one did.
    #[must_use]
    pub fn constraint(&self) -> Option<&str> {
        match self {
            Self::Query {
                source: sqlx::Error::Database(error),
                ..
            } => error.constraint(),
            _ => None,
        }
    }

    /// Whether repeating the statement can help.
    #[must_use]
    pub fn retry(&self) -> Retry {
        match self {
            Self::Url(_) | Self::Corrupt { .. } => Retry::Never,
            Self::Migrate(_) => Retry::Backoff,
            Self::Query { source, .. } => match source {
                sqlx::Error::Database(error) => match error.code().as_deref().unwrap_or_default() {
                    "40001" | "40P01" | "55P03" => Retry::Now,
                    // Connection trouble, resources, operator intervention, system and disk errors.
                    code if ["08", "53", "57", "58"]
                        .iter()
                        .any(|class| code.starts_with(class)) =>
                    {
                        Retry::Backoff
                    }
                    // Idle in transaction timeout ended the session.
                    "25P03" => Retry::Backoff,
                    _ => Retry::Never,
                },
                sqlx::Error::Io(_)
                | sqlx::Error::Tls(_)
                | sqlx::Error::Protocol(_)
                | sqlx::Error::PoolTimedOut
                | sqlx::Error::PoolClosed
                | sqlx::Error::WorkerCrashed => Retry::Backoff,
                _ => Retry::Never,
            },
        }
    }

    /// Whether the connection is lost, so that the outcome of what ran on it is unknown.
    #[must_use]
    pub fn is_connection_lost(&self) -> bool {
        match self {
            Self::Query { source, .. } => match source {
                sqlx::Error::Database(error) => {
                    let code = error.code().unwrap_or_default();
                    code.starts_with("08")
                        || matches!(&*code, "57P01" | "57P02" | "57P03" | "25P03")
                }
                sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) => true,
                _ => false,
            },
            _ => false,
        }
    }
}
