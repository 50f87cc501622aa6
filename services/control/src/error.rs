//! API errors and their wire format: RFC 9457 problem documents with a stable code.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use contract::problem::{Finding, Problem};
use domain::endpoint::commands::CommandRefusal;
use http::{HeaderValue, StatusCode, header};
use store::{CommitError, StoreError};

use crate::deps::SourceError;

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    pub status: StatusCode,
    /// A stable code for programs.
    pub code: &'static str,
    pub detail: String,
    pub errors: Vec<Finding>,
}

impl ApiError {
    pub fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self {
            status,
            code,
            detail: detail.into(),
            errors: Vec::new(),
        }
    }

    pub fn invalid(errors: Vec<Finding>) -> Self {
        let detail = match errors.len() {
            1 => "the document has an error; see `errors`".into(),
            count => format!("the document has {count} errors; see `errors`"),
        };
        Self {
            errors,
            ..Self::new(StatusCode::BAD_REQUEST, "invalid-document", detail)
        }
    }

    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid-request", detail)
    }

    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not-found", detail)
    }

    pub fn conflict(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, code, detail)
    }

    pub fn too_many_streams(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "too-many-streams", detail)
    }

    pub fn internal(detail: impl std::fmt::Display) -> Self {
        tracing::error!(%detail, "request failed");
        let detail =
            "the server failed to handle the request; see its log for the cause, or try again";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", detail)
    }

    fn problem(&self) -> Problem {
        Problem {
            kind: format!("urn:penstock:problem:{}", self.code),
            title: self
                .status
                .canonical_reason()
                .unwrap_or("Refused")
                .to_owned(),
            status: self.status.as_u16(),
            detail: self.detail.clone(),
            code: self.code.to_owned(),
            errors: self.errors.clone(),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = serde_json::to_vec(&self.problem()).unwrap_or_default();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        if self.status == StatusCode::UNAUTHORIZED {
            let challenge = HeaderValue::from_static("Bearer");
            headers.insert(header::WWW_AUTHENTICATE, challenge);
        }
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<CommandRefusal> for ApiError {
    fn from(refusal: CommandRefusal) -> Self {
        match refusal {
            CommandRefusal::NotFound(detail) => Self::not_found(detail),
            CommandRefusal::Invalid(findings) => Self::invalid(findings),
            CommandRefusal::Conflict { code, detail } => Self::conflict(code, detail),
            CommandRefusal::PreconditionFailed(detail) => Self::new(
                StatusCode::PRECONDITION_FAILED,
                "precondition-failed",
                detail,
            ),
        }
    }
}

impl From<CommitError> for ApiError {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Conflict { .. } => Self::conflict(
                "changed-meanwhile",
                "the resource was repeatedly changed by other requests; try again",
            ),
            CommitError::IdempotencyKeyReused => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "idempotency-key-reused",
                "this Idempotency-Key was used for another request; use a new one",
            ),
            CommitError::TooLarge { bytes, limit } => Self::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "too-large",
                format!(
                    "the change needs an event of {bytes} bytes, and the limit is {limit}; make the document smaller"
                ),
            ),
            error => Self::internal(error),
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Closed => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "shutting-down",
                "the server is shutting down; try again when it is back",
            ),
            // Says which file is missing, and what to do; whoever may read events may know.
            StoreError::ArchiveUnavailable(detail) => {
                tracing::error!(%detail, "request failed");
                Self::new(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "archive-unavailable",
                    detail.to_string(),
                )
            }
            error => Self::internal(error),
        }
    }
}

impl From<SourceError> for ApiError {
    fn from(error: SourceError) -> Self {
        match error {
            SourceError::Unavailable(detail) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", detail)
            }
            SourceError::Busy(detail) => Self::too_many_streams(detail),
            SourceError::Failed(detail) => Self::internal(detail),
        }
    }
}
