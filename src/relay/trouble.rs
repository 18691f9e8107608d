//! The reasons why a relay's session with its origin ended, and the status that each leads to.

use super::status::State;
use crate::domain::chain;
use crate::store;
use crate::stream::AppendError;

/// Reasons why a session ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    #[error("the process is ending")]
    Stopping,
    #[error("the relay's lease was taken over")]
    LeaseLost,
    /// Something that reading the position again puts right.
    #[error("{0}")]
    Reload(&'static str),
    #[error("the origin is a standby")]
    Standby,
    #[error("{0}")]
    NotInstalled(String),
    /// The mapped table is not what its mapping says, or does not do what it must.
    #[error("{0}")]
    Mapping(String),
    #[error("the origin could not be used")]
    Origin(#[source] store::Error),
    #[error("the broker's database could not be used")]
    Broker(#[source] store::Error),
    #[error("the stream did not take the rows")]
    Append(#[source] AppendError),
    /// An append of this many rows was refused because of the contents of some. Fewer are tried.
    #[error("an append of {count} rows was refused; trying fewer until the bad row is found")]
    RowsRefused {
        count: usize,
        #[source]
        source: AppendError,
    },
    /// Never guessed around.
    #[error("the stored position cannot be read")]
    Position(#[source] serde_json::Error),
}

impl From<AppendError> for Trouble {
    fn from(error: AppendError) -> Self {
        match error {
            AppendError::Fenced => Self::LeaseLost,
            AppendError::Stopping => Self::Stopping,
            AppendError::PositionMoved { .. } => Self::Reload("the stored position has changed"),
            AppendError::OutcomeUnknown => {
                Self::Reload("nobody knows yet whether the rows were appended")
            }
            other => Self::Append(other),
        }
    }
}

impl Trouble {
    pub(super) fn state(&self) -> State {
        match self {
            Self::Stopping => State::Stopped,
            Self::LeaseLost => State::Waiting,
            Self::Reload(_) => State::Connecting,
            Self::Standby => State::Standby,
            Self::NotInstalled(_) => State::NotInstalled,
            Self::Mapping(_) => State::Refused,
            Self::Origin(error) if error.is_setup_wrong() => State::Refused,
            Self::Origin(_) => State::Unreachable,
            Self::RowsRefused { .. } => State::RowsRefused,
            Self::Append(error) if error.is_row_refused() => State::RowsRefused,
            Self::Broker(_) | Self::Append(_) | Self::Position(_) => State::BrokerUnavailable,
        }
    }

    /// The chain in one line.
    pub(super) fn describe(&self) -> String {
        chain(self)
    }
}
