//! Responses of Penstock itself: a problem document, or an error as the protocol's clients read it, with a
//! stable code in `penstock-error-code` and the status from the contract's table.

use contract::problem::Problem;
use contract::resources::{ErrorMapping, Protocol};
use http::header::{
    CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, RETRY_AFTER,
    WWW_AUTHENTICATE,
};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use serde_json::json;

use crate::framing::HeadError;
use crate::outcome::RequestOutcome;

pub const DEPLOYMENT: HeaderName = HeaderName::from_static("penstock-deployment");
pub const AZURE_DEPLOYMENT: HeaderName = HeaderName::from_static("azureml-model-deployment");
pub const ERROR_CODE: HeaderName = HeaderName::from_static("penstock-error-code");
pub const MODEL_STATUS: HeaderName = HeaderName::from_static("penstock-model-status");
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// In `penstock-error-code`: the model failed, and this is its own response.
pub const MODEL_ERROR: HeaderValue = HeaderValue::from_static("model-error");
/// Some clients do not wait for longer, and give up instead.
pub const RETRY_AFTER_SECS_MAX: u64 = 120;

/// Why a request gets no response from the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    Head(HeadError),
    /// No such endpoint, or a path that no endpoint has without `routes`.
    UnknownEndpoint,
    /// The `routes` of the deployments that the request may reach do not open the path.
    UnknownPath,
    UnknownDeployment,
    /// No deployment has a share of the traffic.
    NoTraffic,
    /// The path escapes from what it begins with.
    Path,
    NoKey,
    WrongKey,
    BodyTooLarge,
    /// The body was malformed, or the client did not send it in time.
    Body,
    TooManyPending {
        retry_after_secs: u64,
    },
    QueuedTooLong {
        retry_after_secs: u64,
    },
    NoInstance {
        retry_after_secs: u64,
    },
    Timeout,
    Unreachable,
    BadResponse,
    /// The gateway is at its limit of client connections.
    TooManyConnections,
    /// There is no file descriptor left for a connection to an instance.
    OutOfDescriptors,
    Internal,
}

impl Refusal {
    /// Status (of `ErrorMapping::Azure`), code, detail and outcome.
    fn parts(self) -> (StatusCode, &'static str, &'static str, RequestOutcome) {
        use RequestOutcome::{
            Internal, Refused, Timeout, TooManyPending, Unavailable, Unreachable,
        };
        const BAD: StatusCode = StatusCode::BAD_REQUEST;
        match self {
            Self::Head(HeadError::Malformed) => (
                BAD,
                "malformed-request",
                "The request is not valid HTTP/1.1; lines must end with CR LF, and headers must not be folded.",
                Refused,
            ),
            Self::Head(HeadError::Framing) => (
                BAD,
                "ambiguous-length",
                "The length of the body is ambiguous: send either a single numeric content-length or, with HTTP/1.1, transfer-encoding: chunked.",
                Refused,
            ),
            Self::Head(HeadError::Host) => (
                BAD,
                "bad-host",
                "The request must have exactly one host header.",
                Refused,
            ),
            Self::Head(HeadError::Method) => (
                BAD,
                "bad-method",
                "This method cannot be forwarded to a model; use POST.",
                Refused,
            ),
            // Not 426: that would ask the client for another protocol.
            Self::Head(HeadError::Upgrade) => (
                StatusCode::NOT_IMPLEMENTED,
                "upgrade-unsupported",
                "WebSocket connections are not forwarded to models; send an ordinary request.",
                Refused,
            ),
            Self::Head(HeadError::TooLarge) => (
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "headers-too-large",
                "The headers are too large: the limit is 32 KiB in total and 100 headers.",
                Refused,
            ),
            Self::Head(HeadError::Slow) => (
                StatusCode::REQUEST_TIMEOUT,
                "headers-too-slow",
                "The headers were not received within 10 seconds.",
                Refused,
            ),
            Self::UnknownEndpoint => (
                StatusCode::NOT_FOUND,
                "unknown-endpoint",
                "There is no such endpoint; scoring URIs are /endpoints/NAME/score.",
                Refused,
            ),
            Self::UnknownPath => (
                StatusCode::NOT_FOUND,
                "unknown-endpoint",
                "No deployment that this request may reach serves this path; the routes of a deployment open paths other than /score.",
                Refused,
            ),
            Self::UnknownDeployment => (
                StatusCode::NOT_FOUND,
                "unknown-deployment",
                "The endpoint has no deployment with the name in the penstock-deployment header.",
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
                "The path must not contain the segments . or .. after the endpoint.",
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
                "The body exceeds the endpoint's size limit.",
                Refused,
            ),
            Self::Body => (
                BAD,
                "bad-body",
                "The body was incomplete, malformed, or not received in time.",
                Refused,
            ),
            Self::TooManyPending { .. } => (
                StatusCode::TOO_MANY_REQUESTS,
                "too-many-pending",
                "Too many requests are pending for the deployment's instances; try again later.",
                TooManyPending,
            ),
            Self::QueuedTooLong { .. } => (
                StatusCode::TOO_MANY_REQUESTS,
                "too-many-pending",
                "No instance became free within maxQueueWait; try again later.",
                TooManyPending,
            ),
            Self::NoInstance { .. } => (
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
                "The instance could not be reached, or closed the connection before it responded.",
                Unreachable,
            ),
            Self::BadResponse => (
                StatusCode::BAD_GATEWAY,
                "bad-answer",
                "The instance's response is not valid HTTP/1.1.",
                Unreachable,
            ),
            Self::TooManyConnections => (
                StatusCode::SERVICE_UNAVAILABLE,
                "too-many-connections",
                "The gateway has reached its limit of connections; try again later.",
                Refused,
            ),
            Self::OutOfDescriptors => (
                StatusCode::SERVICE_UNAVAILABLE,
                "out-of-descriptors",
                "The gateway has no file descriptor left for a connection to an instance; see its log for how to raise the limit.",
                Internal,
            ),
            Self::Internal => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal",
                "The gateway failed; see its log for the cause.",
                Internal,
            ),
        }
    }

    pub fn outcome(self) -> RequestOutcome {
        self.parts().3
    }

    pub fn status(self, mapping: ErrorMapping) -> StatusCode {
        match (self, mapping) {
            (Self::Timeout, ErrorMapping::Pass) => StatusCode::GATEWAY_TIMEOUT,
            _ => self.parts().0,
        }
    }

    /// When the client may retry, if that is soon.
    fn retry_after_secs(self) -> Option<u64> {
        match self {
            Self::TooManyPending { retry_after_secs }
            | Self::QueuedTooLong { retry_after_secs }
            | Self::NoInstance { retry_after_secs } => Some(retry_after_secs),
            Self::TooManyConnections | Self::OutOfDescriptors => Some(1),
            _ => None,
        }
    }

    /// The body and its media type.
    fn body(self, mapping: ErrorMapping, protocol: Protocol) -> (Vec<u8>, &'static str) {
        let status = self.status(mapping);
        let (_, code, detail, _) = self.parts();
        match mapping {
            ErrorMapping::Azure => {
                let problem = Problem {
                    kind: "about:blank".into(),
                    title: status.canonical_reason().unwrap_or_default().into(),
                    status: status.as_u16(),
                    detail: detail.into(),
                    code: code.into(),
                    errors: Vec::new(),
                };
                // A struct of strings and numbers can always be serialized.
                let body = serde_json::to_vec(&problem).unwrap_or_default();
                (body, "application/problem+json")
            }
            ErrorMapping::Pass => {
                let error = match protocol {
                    // Its clients fail to print anything but text.
                    Protocol::OpenInference => json!(detail),
                    Protocol::Http | Protocol::Openai => {
                        json!({"message": detail, "type": error_type(status), "code": code})
                    }
                };
                let error = json!({ "error": error });
                (error.to_string().into_bytes(), "application/json")
            }
        }
    }

    /// Builds the response, with the body in one piece.
    pub fn response(
        self,
        request_id: HeaderValue,
        mapping: ErrorMapping,
        protocol: Protocol,
    ) -> Response<Vec<u8>> {
        let status = self.status(mapping);
        let (_, code, ..) = self.parts();
        let (body, media_type) = self.body(mapping, protocol);
        let mut response = Response::new(body);
        *response.status_mut() = status;
        let length = response.body().len();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(ERROR_CODE, HeaderValue::from_static(code));
        headers.insert(REQUEST_ID, request_id);
        if let Some(secs) = self.retry_after_secs() {
            headers.insert(RETRY_AFTER, HeaderValue::from(secs));
        }
        match self {
            Self::NoKey | Self::WrongKey => {
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            // The model may have done the work already; clients repeat a 5xx unless told otherwise.
            Self::Timeout if mapping == ErrorMapping::Pass => {
                headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
            }
            // What the client still sends cannot be distinguished from another request.
            Self::TooManyConnections | Self::Head(_) | Self::Body | Self::BodyTooLarge => {
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        response
    }
}

/// The type of an error as OpenAI's API names it.
fn error_type(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::GATEWAY_TIMEOUT => "timeout",
        status if status.is_client_error() => "invalid_request_error",
        _ => "server_error",
    }
}

/// Marks a model's response as its error, under `mapping`.
pub fn mark_model_error(headers: &mut HeaderMap, status: StatusCode, mapping: ErrorMapping) {
    match mapping {
        ErrorMapping::Azure => {
            headers.append(MODEL_STATUS, HeaderValue::from(status.as_u16()));
        }
        ErrorMapping::Pass => {
            headers.append(ERROR_CODE, MODEL_ERROR);
            if matches!(
                status,
                StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
            ) {
                let secs = model_retry_after_secs(headers.get(RETRY_AFTER));
                headers.insert(RETRY_AFTER, HeaderValue::from(secs));
            }
        }
    }
}

/// When a client may retry, by the model's own `retry-after`: whole seconds from 1 to the maximum, which
/// also stands for a date.
fn model_retry_after_secs(header: Option<&HeaderValue>) -> u64 {
    let Some(header) = header else { return 1 };
    let secs = header.to_str().ok().and_then(|text| text.parse().ok());
    let secs: f64 = secs.unwrap_or(RETRY_AFTER_SECS_MAX as f64);
    (secs.ceil().max(1.0) as u64).min(RETRY_AFTER_SECS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_models_retry_after_becomes_whole_seconds_from_1_to_120() {
        for (text, expected) in [
            ("7", 7),
            ("0", 1),
            ("0.5", 1),
            ("-3", 1),
            ("nan", 1),
            ("120", 120),
            ("600", 120),
            ("1e300", 120),
            ("Wed, 21 Oct 2026 07:28:00 GMT", 120),
        ] {
            let header = HeaderValue::from_static(text);
            assert_eq!(model_retry_after_secs(Some(&header)), expected, "{text}");
        }
        assert_eq!(model_retry_after_secs(None), 1);
    }

    #[test]
    fn a_full_gateway_says_when_to_retry() {
        for refusal in [Refusal::TooManyConnections, Refusal::OutOfDescriptors] {
            let id = HeaderValue::from_static("id");
            let response = refusal.response(id, ErrorMapping::Azure, Protocol::Http);
            assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
            assert_eq!(response.headers()[RETRY_AFTER], "1");
        }
    }
}
