//! How a command fails, and the exit code that says so: 1 refused or failed, 2 usage, 3 server
//! unreachable.

use crate::client::ClientError;

#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// What was typed cannot be carried out.
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Failed(String),
    /// There is nobody to ask.
    #[error("{0}")]
    NoServer(String),
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Everything has been said already; only the exit code is left.
    #[error("")]
    Quiet(u8),
}

impl CliError {
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Client(ClientError::BadRequest(..)) => 2,
            Self::Failed(_)
            | Self::Client(ClientError::Refused(_) | ClientError::Unreadable { .. }) => 1,
            Self::NoServer(_) | Self::Client(ClientError::Unreachable { .. }) => 3,
            Self::Quiet(code) => *code,
        }
    }
}

impl From<anyhow::Error> for CliError {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(format!("{error:#}"))
    }
}
