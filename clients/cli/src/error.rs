//! Errors of commands and their exit codes: 1 refused or failed, 2 usage, 3 server unreachable.

use crate::client::ClientError;
use crate::client::config::ConfigError;

#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The command line is invalid.
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Failed(String),
    /// There is no server, or it cannot be reached.
    #[error("{0}")]
    NoServer(String),
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The error has been reported already; only the exit code remains.
    #[error("")]
    Quiet(u8),
}

impl CliError {
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Client(ClientError::BadRequest(..)) => 2,
            Self::Failed(_)
            | Self::Client(ClientError::Refused(_) | ClientError::Unreadable { .. }) => 1,
            Self::NoServer(_)
            | Self::Client(ClientError::Unreachable { .. } | ClientError::Gateway { .. }) => 3,
            Self::Quiet(code) => *code,
        }
    }
}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> Self {
        match error {
            ConfigError::Invalid(sentence) => Self::Usage(sentence),
            ConfigError::NoServer(sentence) => Self::NoServer(sentence),
        }
    }
}

impl From<anyhow::Error> for CliError {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(sentence(&error))
    }
}

/// The error with its causes, without repetition: many messages already include their cause.
fn sentence(error: &anyhow::Error) -> String {
    let mut said = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if said.contains(&cause) {
            continue;
        }
        if !said.is_empty() {
            said.push_str(": ");
        }
        said.push_str(&cause);
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot listen: {source}; choose another port")]
    struct Listen {
        source: std::io::Error,
    }

    #[test]
    fn a_cause_that_is_already_in_the_message_is_not_repeated() {
        let source = std::io::Error::other("in use");
        let error = anyhow::Error::new(Listen { source }).context("the start failed");
        let text = CliError::from(error).to_string();
        assert_eq!(
            text,
            "the start failed: cannot listen: in use; choose another port"
        );
    }
}
