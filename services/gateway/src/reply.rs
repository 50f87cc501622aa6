//! What Penstock itself answers: a problem document, a stable code in `penstock-error-code`, and
//! the status of the contract's table.

use contract::problem::Problem;
use http::header::{
    CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, RETRY_AFTER,
    WWW_AUTHENTICATE,
};
use http::{HeaderValue, Response, StatusCode};

use crate::framing::HeadError;
use crate::outcome::Outcome;

pub const DEPLOYMENT: HeaderName = HeaderName::from_static("penstock-deployment");
pub const AZURE_DEPLOYMENT: HeaderName = HeaderName::from_static("azureml-model-deployment");
pub const ERROR_CODE: HeaderName = HeaderName::from_static("penstock-error-code");
pub const MODEL_STATUS: HeaderName = HeaderName::from_static("penstock-model-status");
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Why a request gets no answer of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    Head(HeadError),
    /// No such endpoint, or not its scoring path.
    UnknownEndpoint,
    UnknownDeployment,
    /// The split gives nobody anything.
    NoTraffic,
    /// The path climbs out of `/score`.
    Path,
    NoKey,
    WrongKey,
    BodyTooLarge,
    /// The body broke its framing, or did not come whole in time.
    Body,
    TooManyPending {
        retry_after_secs: u64,
    },
    QueuedTooLong {
        retry_after_secs: u64,
    },
    NoInstance,
    Timeout,
    Unreachable,
    BadAnswer,
    /// There are as many clients as there can be.
    TooManyConnections,
    /// There is no descriptor for a connection to an instance.
    Lacking,
    Internal,
}

impl Refusal {
    /// Status, code, sentence, and how it is counted.
    fn parts(self) -> (StatusCode, &'static str, &'static str, Outcome) {
        use Outcome::{Internal, Refused, Timeout, TooManyPending, Unavailable, Unreachable};
        const BAD: StatusCode = StatusCode::BAD_REQUEST;
        match self {
            Self::Head(HeadError::Malformed) => (
                BAD,
                "malformed-request",
                "The request is not valid HTTP/1.1; lines end with CR LF and headers have no folds.",
                Refused,
            ),
            Self::Head(HeadError::Framing) => (
                BAD,
                "ambiguous-length",
                "The length of the body is not clear: send one content-length of digits, or transfer-encoding: chunked alone.",
                Refused,
            ),
            Self::Head(HeadError::Host) => (
                BAD,
                "bad-host",
                "The request needs exactly one host header.",
                Refused,
            ),
            Self::Head(HeadError::Method) => (
                BAD,
                "bad-method",
                "This method cannot be passed to a model; use POST.",
                Refused,
            ),
            Self::Head(HeadError::TooLarge) => (
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "headers-too-large",
                "The headers are too large: at most 32 KiB in all and 100 of them.",
                Refused,
            ),
            Self::Head(HeadError::Slow) => (
                StatusCode::REQUEST_TIMEOUT,
                "headers-too-slow",
                "The headers did not come whole within 10 seconds.",
                Refused,
            ),
            Self::UnknownEndpoint => (
                StatusCode::NOT_FOUND,
                "unknown-endpoint",
                "There is no such endpoint here; scoring URIs are /endpoints/NAME/score.",
                Refused,
            ),
            Self::UnknownDeployment => (
                StatusCode::NOT_FOUND,
                "unknown-deployment",
                "The endpoint has no deployment of the name in the penstock-deployment header.",
                Refused,
            ),
            Self::NoTraffic => (
                StatusCode::NOT_FOUND,
                "no-traffic",
                "No deployment of the endpoint has a share of its traffic; set one, or name a deployment in the penstock-deployment header.",
                Refused,
            ),
            Self::Path => (
                BAD,
                "bad-path",
                "The path must not hold the segments . or .. after /score.",
                Refused,
            ),
            Self::NoKey => (
                StatusCode::UNAUTHORIZED,
                "no-key",
                "Send the endpoint's key as authorization: Bearer KEY.",
                Refused,
            ),
            Self::WrongKey => (
                StatusCode::UNAUTHORIZED,
                "wrong-key",
                "The key is not one of the endpoint's.",
                Refused,
            ),
            Self::BodyTooLarge => (
                StatusCode::PAYLOAD_TOO_LARGE,
                "body-too-large",
                "The body is larger than the endpoint takes.",
                Refused,
            ),
            Self::Body => (
                BAD,
                "bad-body",
                "The body broke off, was malformed, or did not come whole within the request timeout.",
                Refused,
            ),
            Self::TooManyPending { .. } => (
                StatusCode::TOO_MANY_REQUESTS,
                "too-many-pending",
                "More requests are pending than the deployment's instances can take; try again later.",
                TooManyPending,
            ),
            Self::QueuedTooLong { .. } => (
                StatusCode::TOO_MANY_REQUESTS,
                "too-many-pending",
                "No instance became free within maxQueueWait; try again later.",
                TooManyPending,
            ),
            Self::NoInstance => (
                StatusCode::SERVICE_UNAVAILABLE,
                "no-instance",
                "No instance of the deployment became ready in time.",
                Unavailable,
            ),
            Self::Timeout => (
                StatusCode::REQUEST_TIMEOUT,
                "model-timeout",
                "The model took longer than the deployment's request timeout.",
                Timeout,
            ),
            Self::Unreachable => (
                StatusCode::BAD_GATEWAY,
                "instance-unreachable",
                "The instance could not be reached, or broke off before it answered.",
                Unreachable,
            ),
            Self::BadAnswer => (
                StatusCode::BAD_GATEWAY,
                "bad-answer",
                "The instance's answer is not valid HTTP/1.1.",
                Unreachable,
            ),
            Self::TooManyConnections => (
                StatusCode::SERVICE_UNAVAILABLE,
                "too-many-connections",
                "The gateway has as many connections as it can take; try again later.",
                Refused,
            ),
            Self::Lacking => (
                StatusCode::SERVICE_UNAVAILABLE,
                "out-of-descriptors",
                "The gateway has no file descriptor left for a connection to an instance; its log says how to raise the limit.",
                Internal,
            ),
            Self::Internal => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal",
                "The gateway failed; its log says why.",
                Internal,
            ),
        }
    }

    pub fn outcome(self) -> Outcome {
        self.parts().3
    }

    pub fn status(self) -> StatusCode {
        self.parts().0
    }

    /// The answer, with its body as one piece.
    pub fn response(self, request_id: HeaderValue) -> Response<Vec<u8>> {
        let (status, code, detail, _) = self.parts();
        let problem = Problem {
            kind: "about:blank".into(),
            title: status.canonical_reason().unwrap_or_default().into(),
            status: status.as_u16(),
            detail: detail.into(),
            code: code.into(),
            errors: Vec::new(),
        };
        // A struct of strings and numbers always has a JSON form.
        let body = serde_json::to_vec(&problem).unwrap_or_default();
        let mut response = Response::new(body);
        *response.status_mut() = status;
        let length = response.body().len();
        let headers = response.headers_mut();
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(ERROR_CODE, HeaderValue::from_static(code));
        headers.insert(REQUEST_ID, request_id);
        match self {
            Self::NoKey | Self::WrongKey => {
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            Self::TooManyPending { retry_after_secs }
            | Self::QueuedTooLong { retry_after_secs } => {
                headers.insert(RETRY_AFTER, HeaderValue::from(retry_after_secs));
            }
            Self::TooManyConnections => {
                headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Self::Lacking => {
                headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
            // What the client still sends cannot be told from a next request.
            Self::Head(_) | Self::Body | Self::BodyTooLarge => {
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        response
    }
}
