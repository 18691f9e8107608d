//! The errors of a statement, and whether to try again.

use sqlx::migrate::MigrateError;
use sqlx::postgres::{PgDatabaseError, PgSeverity};

use crate::domain::chain;
use crate::domain::database_url::Fault;

/// A failed statement or connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is not a URL of a Postgres database.
    #[error("the database URL is not valid")]
    Url(#[source] Fault),
    /// A variable that the URL is read with does not fit.
    #[error("the database URL cannot be used: {0}")]
    Variable(&'static str),
    /// Sessions are shared with others.
    #[error(
        "the connection goes through a pooler in transaction mode: a session would lose its settings, locks and prepared statements, or get those of others. \
         Point the URL at the server itself, or at a pool in session mode"
    )]
    Pooled,
    /// Migrations did not run.
    #[error("migrating the database failed")]
    Migrate(#[source] sqlx::migrate::MigrateError),
    /// Another session migrates, and does not end.
    #[error(
        "another session has been migrating the database for {} s or longer: {holder}. If it hangs, end it with pg_terminate_backend", waited.as_secs()
    )]
    MigrationHeld {
        /// How long it was waited for.
        waited: std::time::Duration,
        /// The other session.
        holder: String,
    },
    /// The schema was changed by a later version in a way that this one cannot run with.
    #[error(
        "the database's schema is from a later version of postroad: it needs migration {needed}, and this version knows {known} at most"
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
        /// The operation, as a gerund: "appending messages".
        doing: &'static str,
        /// The driver's error.
        #[source]
        source: sqlx::Error,
    },
    /// The write may be carried out or not: the connection was lost, and no other came about in time. A repeat is safe.
    #[error("it is unknown whether the write happened")]
    OutcomeUnknown(#[source] Box<Error>),
    /// Somebody has locked what is asked for, as was found out a moment ago.
    #[error("another session holds a lock on what is asked for")]
    Held,
    /// A row holds what no version of Postroad has written.
    #[error("{doing} found a value that is not valid: {what}")]
    Corrupt {
        /// The operation that failed.
        doing: &'static str,
        /// The finding, and its place.
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
            Self::Migrate(
                MigrateError::Execute(source) | MigrateError::ExecuteMigration(source, _),
            ) => Some(source),
            Self::OutcomeUnknown(error) => error.driver(),
            _ => None,
        }
    }

    /// The SQLSTATE, if the server sent one. Other modules ask by a name what it means.
    pub(in crate::store) fn sqlstate(&self) -> Option<String> {
        match self.driver()? {
            sqlx::Error::Database(error) => error.code().map(std::borrow::Cow::into_owned),
            _ => None,
        }
    }

    /// The constraint that refused the row, if one did.
    pub(in crate::store) fn constraint(&self) -> Option<&str> {
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
            Self::Url(_)
            | Self::Variable(_)
            | Self::Pooled
            | Self::Corrupt { .. }
            | Self::SchemaTooNew { .. }
            | Self::MigrationHeld { .. } => Retry::Never,
            // An edited migration, say.
            Self::Migrate(_) if self.driver().is_none() || self.is_right_missing() => Retry::Never,
            Self::Migrate(_) | Self::Connect(_) | Self::OutcomeUnknown(_) | Self::Held => {
                Retry::Backoff
            }
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
                    // A timeout of the session or of its transaction ended it; the server is a standby.
                    "25P03" | "25P04" | "25006" => Retry::Backoff,
                    // Any other end of the session says nothing about the statement.
                    code if is_fatal(&**error) && !is_refused_session(code) => Retry::Backoff,
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

    /// Whether this user lacks a right: SQLSTATE 42501.
    #[must_use]
    pub fn is_right_missing(&self) -> bool {
        self.sqlstate().as_deref() == Some("42501")
    }

    /// Whether something between takes the place of the server's sessions: a pooler that knows no settings of sessions.
    #[must_use]
    pub fn is_pooler(&self) -> bool {
        // pgbouncer's words. A server of version 15 and later takes all parameters that a session of Postroad begins with.
        matches!(self, Self::Connect(sqlx::Error::Database(error))
            if error.message().contains("unsupported startup parameter"))
    }

    /// Whether at the start of a process it is a mistake that only a person can put right.
    #[must_use]
    pub fn is_setup_wrong(&self) -> bool {
        self.retry() == Retry::Never
            || self.is_login_refused()
            || self.is_right_missing()
            || self.is_pooler()
    }

    /// With its causes and what to do about it, in one line.
    #[must_use]
    pub fn explained(&self) -> String {
        let mut text = match self.driver() {
            Some(sqlx::Error::Database(error)) => format!("{self}: {}", error.message()),
            _ => chain(self),
        };
        if let Some(advice) = self.advice() {
            text.push_str("; ");
            text.push_str(advice);
        }
        text
    }

    /// The advice, as a clause.
    fn advice(&self) -> Option<&'static str> {
        if self.is_pooler() {
            return Some(
                "a pooler refuses the settings of Postroad's sessions: point the URL at the server itself",
            );
        }
        if let Some(sqlx::Error::Tls(_)) = self.driver() {
            return Some(
                "look at sslmode and sslrootcert of the URL, and at the server's certificate",
            );
        }
        match self.sqlstate()?.as_str() {
            "28P01" => Some("the URL's user or password is wrong"),
            "28000" => Some(
                "the server accepts this user only from other addresses, or only over TLS (sslmode=require): see its pg_hba.conf",
            ),
            "3D000" => Some("create the database, or correct its name in the URL"),
            "42501" => Some(
                "grant this user the missing right: Postroad's user owns its schemas, and needs CREATE on the database to create them",
            ),
            "25006" => Some(
                "the server is read-only: point the URL at the primary, or end the read-only mode",
            ),
            "53300" => Some("raise max_connections, or close other connections"),
            _ => None,
        }
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
                ends_session(&code) || (is_fatal(&**error) && !is_refused_session(&code))
            }
            Some(sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_)) => true,
            _ => false,
        }
    }

    /// Whether there was no answer in time.
    #[must_use]
    pub fn is_timed_out(&self) -> bool {
        matches!(self.driver(), Some(sqlx::Error::Io(error)) if error.kind() == std::io::ErrorKind::TimedOut)
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
        matches!(self, Self::Query { .. })
            && !self.is_leaf_missing()
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

    /// Whether the server ended the statement, for its time or since somebody asked for it. The session is as good as before.
    #[must_use]
    pub fn is_canceled(&self) -> bool {
        self.sqlstate().as_deref() == Some("57014")
    }

    /// The server's own words, without the action.
    #[must_use]
    pub fn reason(&self) -> String {
        match self.driver() {
            Some(sqlx::Error::Database(error)) => error.message().to_owned(),
            Some(error) => error.to_string(),
            None => self.to_string(),
        }
    }

    /// Whether the server itself refused: it read the statement, and said why not.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        self.sqlstate().is_some()
    }

    /// Whether a lock was not to be had in time. Nothing was done.
    #[must_use]
    pub fn is_held(&self) -> bool {
        matches!(self, Self::Held) || self.sqlstate().as_deref() == Some("55P03")
    }

    /// Whether no leaf (partition) takes the row. A check of the schema has a name; the bounds of a leaf have none.
    #[must_use]
    pub fn is_leaf_missing(&self) -> bool {
        self.sqlstate().as_deref() == Some("23514") && self.constraint().is_none()
    }

    /// Whether a group of this appender and number is in the journal already: an earlier try of it came through.
    #[must_use]
    pub fn is_already_written(&self) -> bool {
        let of_journal = |name: &str| name.starts_with("append_journal");
        self.is_doubled() && self.constraint().is_some_and(of_journal)
    }

    /// Whether a row of the log has the offset already: another appender was there first.
    pub(in crate::store) fn is_offset_taken(&self) -> bool {
        let of_log = |name: &str| name.starts_with("message");
        self.is_doubled() && self.constraint().is_some_and(of_log)
    }

    fn is_doubled(&self) -> bool {
        self.sqlstate().as_deref() == Some("23505")
    }

    /// Whether there are as many topics as there can be: a code of the broker's own functions.
    #[must_use]
    pub fn is_topic_limit_reached(&self) -> bool {
        self.sqlstate().as_deref() == Some("PR002")
    }

    /// Whether the server's table of locks, or its memory, was full. Nothing was done.
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        self.sqlstate().as_deref() == Some("53200")
    }

    /// Whether the statement names a table or a schema that is not there.
    #[must_use]
    pub fn is_undefined(&self) -> bool {
        matches!(self.sqlstate().as_deref(), Some("42P01" | "3F000"))
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

/// The session is gone: class 08 (the connection), 57P (shut down, crashed, not up, its database dropped, idle for too long), and the
/// timeouts of a transaction.
fn ends_session(code: &str) -> bool {
    code.starts_with("08") || code.starts_with("57P") || matches!(code, "25P03" | "25P04")
}

/// Whether the server ends the session with this, whatever its code: it may be of a later version, or an extension.
fn is_fatal(error: &dyn sqlx::error::DatabaseError) -> bool {
    let error = error.try_downcast_ref::<PgDatabaseError>();
    error.is_some_and(|error| matches!(error.severity(), PgSeverity::Fatal | PgSeverity::Panic))
}

/// No session came about: what was to run on it has not begun. Logins that are refused, missing rights, no room, a database that takes
/// no connections.
fn is_refused_session(code: &str) -> bool {
    is_refused_login(code)
        || ["42", "53", "55"]
            .iter()
            .any(|class| code.starts_with(class))
}

/// Classes 28, invalid authorization, and 3D, invalid catalogue name.
fn is_refused_login(code: &str) -> bool {
    code.starts_with("28") || code.starts_with("3D")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_that_end_a_session_are_told_from_those_that_refuse_one() {
        for code in [
            "08006", "57P01", "57P02", "57P03", "57P04", "57P05", "25P03", "25P04",
        ] {
            assert!(ends_session(code) && !is_refused_session(code), "{code}");
        }
        // A statement that was cancelled, a lock that was not free, a value that does not fit, a server that is a standby.
        for code in ["57014", "55P03", "22003", "25006", "40001"] {
            assert!(!ends_session(code), "{code}");
        }
        for code in ["28P01", "28000", "3D000", "42501", "53300", "55000"] {
            assert!(is_refused_session(code), "{code}");
        }
    }
}
