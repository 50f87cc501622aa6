//! Outcomes of requests, and how each is counted in frames.

use contract::frame::Outcomes;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestOutcome {
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

impl RequestOutcome {
    /// Counts one request with this outcome.
    pub fn record(self, outcomes: &mut Outcomes) {
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

    /// Returns the outcome for a model's status.
    pub fn from_model_status(status: http::StatusCode) -> Self {
        if status.is_client_error() {
            Self::ModelClientError
        } else if status.as_u16() >= 500 {
            Self::ModelServerError
        } else {
            Self::Success
        }
    }

    /// Whether its latency is measured: the model answered, or the time-out was reached. A refusal is not a
    /// fast answer, however long it took.
    pub const fn has_latency(self) -> bool {
        matches!(
            self,
            Self::Success | Self::ModelClientError | Self::ModelServerError | Self::Timeout
        )
    }
}
