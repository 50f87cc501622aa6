//! `kind: Endpoint`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ids::Name;

/// Percentages over deployments, as written in `traffic` and `mirror`.
pub type Percentages = BTreeMap<Name, u8>;

/// Who may send requests to an endpoint, and which of its deployments serve them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EndpointSpec {
    /// How clients authenticate.
    #[serde(default)]
    pub auth: AuthMode,
    /// Traffic shares in percent, which sum to 0 or 100. If omitted, the shares are unchanged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic: Option<Percentages>,
    /// Shares in percent of live requests that are mirrored; at most 100 each. If omitted, the shares are
    /// unchanged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<Percentages>,
    /// How a 4xx response of the model counts in SLIs and error ratios; good by default. That hides the faults
    /// of a server that answers 400 for its own, such as MLflow for any exception of a model: use bad there.
    #[serde(default)]
    pub model_client_errors: ModelClientErrors,
    /// Limits on requests.
    #[serde(default)]
    pub limits: EndpointLimits,
}

/// How clients of an endpoint authenticate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AuthMode {
    /// With one of its two keys, as `authorization: Bearer KEY`.
    #[default]
    Key,
    /// Not at all: requests need no key.
    None,
}

/// How a 4xx response of a model counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ModelClientErrors {
    /// As good: the client's fault.
    #[default]
    Good,
    /// As bad.
    Bad,
}

/// Limits on requests to an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct EndpointLimits {
    /// Maximum size of a request body in bytes; 413 if exceeded.
    pub request_bytes_max: u64,
}

impl Default for EndpointLimits {
    fn default() -> Self {
        // The limit of Azure's inference image; models with image inputs need much of it.
        Self {
            request_bytes_max: 100 * 1024 * 1024,
        }
    }
}
