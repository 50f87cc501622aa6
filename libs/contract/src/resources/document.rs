//! One resource of any kind, as its document holds it.

use schemars::generate::SchemaGenerator;
use schemars::{JsonSchema, Schema, json_schema};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::schema::document;
use super::{API_VERSION, AutoscaleSpec, DeploymentSpec, EndpointSpec, Labels};
use crate::ids::{DeploymentRef, Name};

/// What the server writes into `metadata`; ignored when it comes back.
pub const READ_ONLY_METADATA: [&str; 3] = ["uid", "revision", "createdAt"];

/// Reads the two parts of a document, into whatever types its kind has.
pub trait Parts {
    /// Metadata and spec. None: one of them cannot be read, and whoever reads knows why.
    fn read<M: DeserializeOwned, S: DeserializeOwned>(&mut self) -> Option<(M, S)>;
}

/// Declares the kinds of documents. What reads, writes or describes them follows; what else must be known
/// of each is a match over all of them, here and where it is used, which does not compile without one.
macro_rules! documents {
    ($($(#[$doc:meta])* $kind:ident is $resource:ident of $metadata:ty, $spec:ty;)*) => {
        /// One resource as a person wrote it.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Resource { $($(#[$doc])* $kind(Box<$resource>),)* }

        /// Kinds that this release can read.
        pub const KINDS: &[&str] = &[$(stringify!($kind)),*];

        impl Resource {
            /// The document's `kind`.
            pub fn kind(&self) -> &'static str {
                match self { $(Self::$kind(_) => stringify!($kind),)* }
            }

            /// Its labels.
            pub fn labels(&self) -> &Labels {
                match self { $(Self::$kind(resource) => &resource.metadata.labels,)* }
            }

            /// The resource of this kind. None: there is no such kind, or a part of it cannot be read.
            pub fn read(kind: &str, parts: &mut impl Parts) -> Option<Self> {
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

        /// The schema of one of [`KINDS`]; anything for a kind that is none of them.
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

    /// Where it lives in the API: the parts of the path.
    pub fn path(&self) -> Vec<String> {
        let (endpoint, deployment) = (self.endpoint(), self.deployment());
        let deployment = deployment.map(|of| of.deployment.to_string());
        let collection = match self {
            Self::Endpoint(_) | Self::Deployment(_) => "endpoints",
            Self::Autoscale(_) => "autoscale",
        };
        let mut path = vec!["v1".to_owned(), collection.to_owned(), endpoint.to_string()];
        path.extend(matches!(self, Self::Deployment(_)).then(|| "deployments".to_owned()));
        path.extend(deployment);
        path
    }

    /// In which order the kinds of one set are applied, so that each finds what it belongs to.
    pub fn rank(&self) -> u8 {
        match self {
            Self::Endpoint(_) => 0,
            Self::Deployment(_) => 1,
            Self::Autoscale(_) => 2,
        }
    }

    /// The field by which it is known.
    pub fn named_by(&self) -> &'static str {
        match self {
            Self::Endpoint(_) | Self::Deployment(_) => "/metadata/name",
            Self::Autoscale(_) => "/spec/target",
        }
    }

    /// The document again, with defaults filled in.
    pub fn to_value(&self) -> Value {
        let (metadata, spec) = self.parts();
        json!({"apiVersion": API_VERSION, "kind": self.kind(), "metadata": metadata, "spec": spec})
    }
}
