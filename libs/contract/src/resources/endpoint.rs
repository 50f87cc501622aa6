//! `kind: Endpoint`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ids::Name;

/// Percentages over deployments, as written in `traffic` and `mirror`.
pub type Percentages = BTreeMap<Name, u8>;

/// Who may ask an endpoint, and which of its deployments answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EndpointSpec {
    /// What clients must show.
    #[serde(default)]
    pub auth: AuthMode,
    /// Shares in percent; they sum to 0 or 100. Left out: stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic: Option<Percentages>,
    /// Shares in percent of live requests that are copied; at most 100 each. Left out: stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<Percentages>,
    /// How a 4xx answer of the model counts in SLIs and error ratios.
    #[serde(default)]
    pub model_client_errors: ModelClientErrors,
    /// What clients may send.
    #[serde(default)]
    pub limits: EndpointLimits,
}

/// What clients of an endpoint must show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AuthMode {
    /// One of its two keys, as `authorization: Bearer KEY`.
    #[default]
    Key,
    /// Nothing: everybody may ask.
    None,
}

/// How an answer of 400 to 499 that a model gave counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ModelClientErrors {
    /// As a good one: the client's fault.
    #[default]
    Good,
    /// As a bad one.
    Bad,
}

/// What clients of an endpoint may send.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct EndpointLimits {
    /// Largest request body in bytes; more is answered 413.
    pub request_bytes_max: u64,
}

impl Default for EndpointLimits {
    fn default() -> Self {
        // Azure's inference image takes 100 MiB; models that take images need a good part of it.
        Self {
            request_bytes_max: 100 * 1024 * 1024,
        }
    }
}
