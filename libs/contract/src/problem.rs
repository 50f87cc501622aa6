//! Faults in user input: one finding per fault, which names the field by JSON Pointer and says what to
//! do. Control turns findings into RFC 9457 problem documents, the command line into
//! `file:line:column` lines.

use serde::{Deserialize, Serialize};

/// One fault in a document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Finding {
    /// JSON Pointer (RFC 6901) of the field; empty for the document as a whole.
    pub pointer: String,
    /// A sentence: what is wrong and what to do.
    pub detail: String,
}

impl Finding {
    /// A fault in the field at a JSON Pointer.
    pub fn new(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            pointer: pointer.into(),
            detail: detail.into(),
        }
    }
}

/// Escapes a member name as a step of a JSON Pointer (RFC 6901).
pub fn escape(step: &str) -> String {
    step.replace('~', "~0").replace('/', "~1")
}

/// An RFC 9457 problem document, as the API sends it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Problem {
    /// A URI that identifies the problem type: `about:blank`, since `code` identifies it.
    #[serde(rename = "type")]
    pub kind: String,
    /// The reason phrase of the HTTP status.
    pub title: String,
    /// The HTTP status, 400 to 599.
    pub status: u16,
    /// A sentence: what is wrong and what to do.
    pub detail: String,
    /// A stable code for programs: `invalid-document`, `not-found`, `conflict`, …
    pub code: String,
    /// The faults of a document; empty for other problems.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<Finding>,
}
