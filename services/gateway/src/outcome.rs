//! What becomes of requests, and how each is counted in frames.

use contract::frame::Outcomes;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Success,
    ModelClientError,
    ModelServerError,
    Timeout,
    Unreachable,
    Unavailable,
    Internal,
    TooManyPending,
    Refused,
    ClientLeft,
}

impl Outcome {
    /// Counts one request that ended so.
    pub fn count(self, outcomes: &mut Outcomes) {
        let counter = match self {
            Self::Success => &mut outcomes.success,
            Self::ModelClientError => &mut outcomes.model_client_error,
            Self::ModelServerError => &mut outcomes.model_server_error,
            Self::Timeout => &mut outcomes.timeout,
            Self::Unreachable => &mut outcomes.unreachable,
            Self::Unavailable => &mut outcomes.unavailable,
            Self::Internal => &mut outcomes.internal,
            Self::TooManyPending => &mut outcomes.too_many_pending,
            Self::Refused => &mut outcomes.refused,
            Self::ClientLeft => &mut outcomes.client_left,
        };
        *counter += 1;
    }

    /// Of an answer that a model gave.
    pub fn of(status: http::StatusCode) -> Self {
        if status.is_client_error() {
            Self::ModelClientError
        } else if status.as_u16() >= 500 {
            Self::ModelServerError
        } else {
            Self::Success
        }
    }

    /// Whether its latency is measured: a refusal in no time is no fast answer.
    pub const fn has_latency(self) -> bool {
        !matches!(self, Self::Refused | Self::ClientLeft)
    }
}
