//! `kind: Endpoint`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ids::Name;

/// Percentages over deployments, as written in `traffic` and `mirror`.
pub type Percentages = BTreeMap<Name, u8>;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EndpointSpec {
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
    #[serde(default)]
    pub limits: EndpointLimits,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AuthMode {
    #[default]
    Key,
    None,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ModelClientErrors {
    #[default]
    Good,
    Bad,
}

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
