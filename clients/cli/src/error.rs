//! Errors of commands and their exit codes: 1 refused or failed, 2 usage, 3 server unreachable.

use crate::client::ClientError;
use crate::client::config::ConfigError;

/// The error behind a sentence.
pub type BoxedError = Box<dyn std::error::Error + Send + Sync>;

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
    /// One of those above, with the error behind it, which the sentence includes.
    #[error("{sentence}")]
    Caused {
        sentence: String,
        exit_code: u8,
        source: BoxedError,
    },
    /// The error has been reported already; only the exit code remains.
    #[error("")]
    Quiet(u8),
}

impl CliError {
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Client(ClientError::BadRequest { .. }) => 2,
            Self::Failed(_)
            | Self::Client(ClientError::Refused(_) | ClientError::Unreadable { .. }) => 1,
            Self::NoServer(_)
            | Self::Client(ClientError::Unreachable { .. } | ClientError::Gateway { .. }) => 3,
            Self::Caused { exit_code, .. } => *exit_code,
            Self::Quiet(code) => *code,
        }
    }

    /// Adds the error behind it.
    #[must_use]
    pub fn caused_by(self, source: impl Into<BoxedError>) -> Self {
        Self::Caused {
            sentence: self.to_string(),
            exit_code: self.exit_code(),
            source: source.into(),
        }
    }
}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> Self {
        match error {
            ConfigError::Unusable { sentence, source } => Self::Usage(sentence).caused_by(source),
            ConfigError::Invalid(sentence) => Self::Usage(sentence),
            ConfigError::NoServer(sentence) => Self::NoServer(sentence),
        }
    }
}

impl From<anyhow::Error> for CliError {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(sentence(&error)).caused_by(error)
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
    fn an_error_keeps_its_source_and_its_exit_code() {
        let source = std::io::Error::other("gone");
        let error = CliError::NoServer("the server is gone".into()).caused_by(source);
        assert_eq!(error.to_string(), "the server is gone");
        assert_eq!(error.exit_code(), 3);
        let source = std::error::Error::source(&error).unwrap();
        assert_eq!(source.to_string(), "gone");
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
