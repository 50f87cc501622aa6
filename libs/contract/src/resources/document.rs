//! A resource of any kind, as its document describes it.

use schemars::generate::SchemaGenerator;
use schemars::{JsonSchema, Schema, json_schema};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::schema::document;
use super::{API_VERSION, AutoscaleSpec, DeploymentSpec, EndpointSpec, Labels};
use crate::ids::{DeploymentRef, Name};

/// The `metadata` fields that the server sets; ignored in input.
pub const READ_ONLY_METADATA: [&str; 3] = ["uid", "revision", "createdAt"];

/// Deserializes the two parts of a document into the types of its kind.
pub trait PartsReader {
    /// Returns metadata and spec; `None` if one of them cannot be read, which the implementor reports.
    fn read<M: DeserializeOwned, S: DeserializeOwned>(&mut self) -> Option<(M, S)>;
}

/// Declares the kinds of documents, and generates the code that reads, writes and describes them. All
/// other properties are exhaustive matches, here and at their use, which do not compile if one is missing.
macro_rules! documents {
    ($($(#[$doc:meta])* $kind:ident is $resource:ident of $metadata:ty, $spec:ty;)*) => {
        /// A resource as a user wrote it.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Resource { $($(#[$doc])* $kind(Box<$resource>),)* }

        /// Kinds that this release can read.
        pub const KINDS: &[&str] = &[$(stringify!($kind)),*];

        impl Resource {
            /// The `kind` of the document.
            pub fn kind(&self) -> &'static str {
                match self { $(Self::$kind(_) => stringify!($kind),)* }
            }

            /// The labels in the metadata.
            pub fn labels(&self) -> &Labels {
                match self { $(Self::$kind(resource) => &resource.metadata.labels,)* }
            }

            /// Reads a resource of this kind; `None` if there is no such kind or a part cannot be read.
            pub fn read(kind: &str, parts: &mut impl PartsReader) -> Option<Self> {
                $(if kind == stringify!($kind) {
                    let (metadata, spec) = parts.read()?;
                    return Some(Self::$kind(Box::new($resource { metadata, spec })));
                })*
                None
            }

            fn parts(&self) -> (Value, Value) {
                match self { $(Self::$kind(r) => (json!(r.metadata), json!(r.spec)),)* }
            }
        }

        /// Returns the schema of one of [`KINDS`]; for any other kind, a schema that accepts everything.
        pub fn document_schema(kind: &str, generator: &mut SchemaGenerator) -> Schema {
            $(if kind == stringify!($kind) {
                return document::<$metadata, $spec>(kind, generator);
            })*
            json_schema!(true)
        }
    };
}

documents! {
    /// `kind: Endpoint`.
    Endpoint is EndpointResource of EndpointMetadata, EndpointSpec;
    /// `kind: Deployment`.
    Deployment is DeploymentResource of DeploymentMetadata, DeploymentSpec;
    /// `kind: Autoscale`.
    Autoscale is AutoscaleResource of AutoscaleMetadata, AutoscaleSpec;
}

/// An endpoint as written.
#[derive(Clone, Debug, PartialEq)]
pub struct EndpointResource {
    /// Its name and labels.
    pub metadata: EndpointMetadata,
    /// The desired state.
    pub spec: EndpointSpec,
}

/// A deployment as written.
#[derive(Clone, Debug, PartialEq)]
pub struct DeploymentResource {
    /// Its name, endpoint and labels.
    pub metadata: DeploymentMetadata,
    /// The desired state.
    pub spec: DeploymentSpec,
}

/// An Autoscale as written.
#[derive(Clone, Debug, PartialEq)]
pub struct AutoscaleResource {
    /// An optional name, without meaning, and labels.
    pub metadata: AutoscaleMetadata,
    /// The policy.
    pub spec: AutoscaleSpec,
}

/// The metadata of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EndpointMetadata {
    /// Unique in the installation.
    pub name: Name,
    /// For users and their tools; Penstock does not interpret them.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}

/// The metadata of a deployment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DeploymentMetadata {
    /// Unique within its endpoint.
    pub name: Name,
    /// The endpoint that it belongs to.
    pub endpoint: Name,
    /// For users and their tools; Penstock does not interpret them.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}

/// The metadata of an Autoscale, which is identified by its target. A name is allowed and ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AutoscaleMetadata {
    /// Ignored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// For users and their tools; Penstock does not interpret them.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}

impl Resource {
    /// The endpoint that it is or belongs to.
    pub fn endpoint(&self) -> &Name {
        match self {
            Self::Endpoint(resource) => &resource.metadata.name,
            Self::Deployment(resource) => &resource.metadata.endpoint,
            Self::Autoscale(resource) => &resource.spec.target.endpoint,
        }
    }

    /// The deployment that it is or refers to.
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

    /// The full name, such as `iris` or `iris/blue`.
    pub fn full_name(&self) -> String {
        self.deployment()
            .map_or_else(|| self.endpoint().to_string(), |name| name.to_string())
    }

    /// The segments of its path in the API.
    pub fn path(&self) -> Vec<String> {
        let (endpoint, deployment) = (self.endpoint(), self.deployment());
        let deployment = deployment.map(|name| name.deployment.to_string());
        let collection = match self {
            Self::Endpoint(_) | Self::Deployment(_) => "endpoints",
            Self::Autoscale(_) => "autoscale",
        };
        let mut path = vec!["v1".to_owned(), collection.to_owned(), endpoint.to_string()];
        path.extend(matches!(self, Self::Deployment(_)).then(|| "deployments".to_owned()));
        path.extend(deployment);
        path
    }

    /// The order in which kinds are applied, so that each resource finds the one it belongs to.
    pub fn rank(&self) -> u8 {
        match self {
            Self::Endpoint(_) => 0,
            Self::Deployment(_) => 1,
            Self::Autoscale(_) => 2,
        }
    }

    /// The pointer to the field that identifies it.
    pub fn identifying_pointer(&self) -> &'static str {
        match self {
            Self::Endpoint(_) | Self::Deployment(_) => "/metadata/name",
            Self::Autoscale(_) => "/spec/target",
        }
    }

    /// Returns the document with defaults filled in.
    pub fn to_value(&self) -> Value {
        let (metadata, spec) = self.parts();
        json!({"apiVersion": API_VERSION, "kind": self.kind(), "metadata": metadata, "spec": spec})
    }
}
