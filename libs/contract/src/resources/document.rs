//! One resource of any kind, as its document holds it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{API_VERSION, AutoscaleSpec, DeploymentSpec, EndpointSpec, Labels};
use crate::ids::{DeploymentRef, Name};

/// Kinds that this release can read.
pub const KINDS: [&str; 3] = ["Endpoint", "Deployment", "Autoscale"];

/// What the server writes into `metadata`; ignored when it comes back.
pub const READ_ONLY_METADATA: [&str; 3] = ["uid", "revision", "createdAt"];

/// One resource as a person wrote it.
#[derive(Clone, Debug, PartialEq)]
pub enum Resource {
    /// `kind: Endpoint`.
    Endpoint(EndpointResource),
    /// `kind: Deployment`.
    Deployment(Box<DeploymentResource>),
    /// `kind: Autoscale`.
    Autoscale(AutoscaleResource),
}

/// An endpoint as written.
#[derive(Clone, Debug, PartialEq)]
pub struct EndpointResource {
    /// What it is called.
    pub metadata: EndpointMetadata,
    /// What it shall be.
    pub spec: EndpointSpec,
}

/// A deployment as written.
#[derive(Clone, Debug, PartialEq)]
pub struct DeploymentResource {
    /// What it is called, and whose it is.
    pub metadata: DeploymentMetadata,
    /// What it shall be.
    pub spec: DeploymentSpec,
}

/// An Autoscale as written.
#[derive(Clone, Debug, PartialEq)]
pub struct AutoscaleResource {
    /// Nothing that it is known by.
    pub metadata: AutoscaleMetadata,
    /// What it shall do.
    pub spec: AutoscaleSpec,
}

/// What an endpoint is called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EndpointMetadata {
    /// Unique in the installation.
    pub name: Name,
    /// For people and their tools; nothing here goes by them.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}

/// What a deployment is called, and whose it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DeploymentMetadata {
    /// Unique within its endpoint.
    pub name: Name,
    /// The endpoint that it belongs to.
    pub endpoint: Name,
    /// For people and their tools; nothing here goes by them.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}

/// An Autoscale is known by its target; a name is allowed, and means nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AutoscaleMetadata {
    /// Not looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// For people and their tools; nothing here goes by them.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}

impl Resource {
    /// `Endpoint`, `Deployment` or `Autoscale`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Endpoint(_) => "Endpoint",
            Self::Deployment(_) => "Deployment",
            Self::Autoscale(_) => "Autoscale",
        }
    }

    /// The endpoint that it is or belongs to.
    pub fn endpoint(&self) -> &Name {
        match self {
            Self::Endpoint(resource) => &resource.metadata.name,
            Self::Deployment(resource) => &resource.metadata.endpoint,
            Self::Autoscale(resource) => &resource.spec.target.endpoint,
        }
    }

    /// The deployment that it is or is about.
    pub fn deployment(&self) -> Option<DeploymentRef> {
        let deployment = match self {
            Self::Endpoint(_) => return None,
            Self::Deployment(resource) => resource.metadata.name.clone(),
            Self::Autoscale(resource) => return Some(resource.spec.target.clone()),
        };
        let endpoint = self.endpoint().clone();
        Some(DeploymentRef {
            endpoint,
            deployment,
        })
    }

    /// `iris` or `iris/blue`.
    pub fn full_name(&self) -> String {
        self.deployment()
            .map_or_else(|| self.endpoint().to_string(), |of| of.to_string())
    }

    /// The document again, with defaults filled in.
    pub fn to_value(&self) -> Value {
        let (metadata, spec) = match self {
            Self::Endpoint(r) => (json!(r.metadata), json!(r.spec)),
            Self::Deployment(r) => (json!(r.metadata), json!(r.spec)),
            Self::Autoscale(r) => (json!(r.metadata), json!(r.spec)),
        };
        json!({"apiVersion": API_VERSION, "kind": self.kind(), "metadata": metadata, "spec": spec})
    }
}
