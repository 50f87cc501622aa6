//! A resource of any kind, as its document describes it.

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{AutoscaleSpec, DeploymentSpec, EndpointSpec, Labels};
use crate::ids::Name;

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
pub(super) use documents;

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
