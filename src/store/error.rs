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
    /// The schema was changed by a later version in a way that this one cannot run with.
    #[error(
        "the database's schema is of a later version of postroad: it needs one that knows migration {needed}, and this one knows {known} at most"
    )]
    SchemaTooNew {
        /// The migration that a program must know.
        needed: i64,
        /// The last that this one knows.
        known: i64,
    },
    /// No connection came about: the server cannot be reached, does not answer, or refuses this user or database.
    #[error("connecting failed")]
    Connect(#[source] sqlx::Error),
    /// A statement failed.
    #[error("{doing} failed")]
    Query {
        /// What was being done, as a gerund: "appending messages".
        doing: &'static str,
        /// What the driver said.
        #[source]
        source: sqlx::Error,
    },
    /// The write may be carried out or not: the connection was lost, and no other came about in time. A repeat is safe.
    #[error("it is not known whether it was done")]
    OutcomeUnknown(#[source] Box<Error>),
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

    /// A value that no version of Postroad has written.
    #[must_use]
    pub const fn corrupt(doing: &'static str, what: String) -> Self {
        Self::Corrupt { doing, what }
    }

    /// A status that this program does not know: the function that gave it is of a later schema. It is never taken for success.
    pub(in crate::store) fn unknown_status(doing: &'static str, status: &str) -> Self {
        Self::corrupt(doing, format!("the status `{status}`"))
    }

    /// Adapter for `map_err`.
    pub(in crate::store) fn query(doing: &'static str) -> impl FnOnce(sqlx::Error) -> Self {
        move |source| Self::Query { doing, source }
    }

    fn driver(&self) -> Option<&sqlx::Error> {
        match self {
            Self::Query { source, .. } | Self::Connect(source) => Some(source),
            Self::OutcomeUnknown(error) => error.driver(),
            _ => None,
        }
    }

    /// The SQLSTATE, if the server sent one.
    #[must_use]
    pub fn sqlstate(&self) -> Option<String> {
        match self.driver()? {
            sqlx::Error::Database(error) => error.code().map(std::borrow::Cow::into_owned),
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

    /// Whether repeating the statement can help. That a session was refused, or is one of a standby, says nothing about the
    /// statement: both pass with the failover or the rotation of passwords that causes them.
    #[must_use]
    pub fn retry(&self) -> Retry {
        match self {
            Self::Url(_) | Self::Corrupt { .. } | Self::SchemaTooNew { .. } => Retry::Never,
            Self::Migrate(_) | Self::Connect(_) | Self::OutcomeUnknown(_) => Retry::Backoff,
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
                    // The session's transaction timeout ended it; the server is a standby.
                    "25P03" | "25006" => Retry::Backoff,
                    // The pool could not connect: the user or the database is refused.
                    code if is_refused_login(code) => Retry::Backoff,
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

    /// Whether the server refuses the user or the database: at the start of a process most likely a mistake in the URL.
    #[must_use]
    pub fn is_login_refused(&self) -> bool {
        self.sqlstate().is_some_and(|code| is_refused_login(&code))
    }

    /// Whether the connection is lost, so that the outcome of what ran on it is unknown.
    #[must_use]
    pub fn is_connection_lost(&self) -> bool {
        if matches!(self, Self::OutcomeUnknown(_)) {
            return true;
        }
        match self.driver() {
            Some(sqlx::Error::Database(error)) => {
                let code = error.code().unwrap_or_default();
                code.starts_with("08") || matches!(&*code, "57P01" | "57P02" | "57P03" | "25P03")
            }
            Some(sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_)) => true,
            _ => false,
        }
    }

    /// Whether a new connection is needed: this one is lost, or its server has become a standby.
    #[must_use]
    pub fn is_connection_spent(&self) -> bool {
        self.is_connection_lost() || self.sqlstate().as_deref() == Some("25006")
    }

    /// Whether the server refuses what one row holds, so that another row can pass: a value or a constraint (SQLSTATE classes 22, 23
    /// and 44), a limit (54), or code of the table's owner (38, 39, P0). Where no partition takes a row, nothing is said of the row.
    #[must_use]
    pub fn is_row_refused(&self) -> bool {
        const CLASSES: [&str; 7] = ["22", "23", "44", "54", "38", "39", "P0"];
        let Some(code) = self.sqlstate() else {
            return false;
        };
        let is_without_partition = code == "23514" && self.constraint().is_none();
        matches!(self, Self::Query { .. })
            && !is_without_partition
            && CLASSES.iter().any(|class| code.starts_with(class))
    }

    /// Whether a row that was to be read cannot be given out, or not be understood.
    #[must_use]
    pub fn is_row_unreadable(&self) -> bool {
        self.is_row_refused() || self.is_internal()
    }

    /// Whether what was read is broken, which can be a row or all of a table: the server's internal errors, corrupted data, and values
    /// that the driver cannot take.
    #[must_use]
    pub fn is_internal(&self) -> bool {
        match self {
            Self::Query {
                source: sqlx::Error::Decode(_) | sqlx::Error::ColumnDecode { .. },
                ..
            } => true,
            Self::Query { .. } => self.sqlstate().is_some_and(|code| code.starts_with("XX")),
            _ => false,
        }
    }

    /// What the server says, in its own words and without what was being done.
    #[must_use]
    pub fn reason(&self) -> String {
        match self.driver() {
            Some(sqlx::Error::Database(error)) => error.message().to_owned(),
            Some(error) => error.to_string(),
            None => self.to_string(),
        }
    }

    /// Whether the server's table of locks, or its memory, was full. Nothing was done.
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        self.sqlstate().as_deref() == Some("53200")
    }

    /// Whether the server refused the data itself, for a value or a constraint (SQLSTATE classes 22 and 23): it came as
    /// far as writing it.
    #[must_use]
    pub fn is_data_refused(&self) -> bool {
        matches!(self, Self::Query { .. })
            && self
                .sqlstate()
                .is_some_and(|code| code.starts_with("22") || code.starts_with("23"))
    }
}

/// Classes 28, invalid authorization, and 3D, invalid catalogue name.
fn is_refused_login(code: &str) -> bool {
    code.starts_with("28") || code.starts_with("3D")
}
