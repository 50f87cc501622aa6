//! Resource documents, as users write them. Unknown fields are errors.

mod autoscale;
mod deployment;
mod document;
mod endpoint;
pub mod limits;
pub mod placeholders;
mod schema;

use std::collections::BTreeMap;

use schemars::generate::SchemaGenerator;
use schemars::{JsonSchema, Schema, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::document::documents;
use self::schema::document;
use crate::ids::{DeploymentRef, Name};

pub use autoscale::*;
pub use deployment::*;
pub use document::*;
pub use endpoint::*;

documents! {
    /// `kind: Endpoint`.
    Endpoint is EndpointResource of EndpointMetadata, EndpointSpec;
    /// `kind: Deployment`.
    Deployment is DeploymentResource of DeploymentMetadata, DeploymentSpec;
    /// `kind: Autoscale`.
    Autoscale is AutoscaleResource of AutoscaleMetadata, AutoscaleSpec;
}

/// The only version of the documents so far.
pub const API_VERSION: &str = "penstock/v1";

/// Labels of a resource; at most 32, each key and value at most 63 bytes.
pub type Labels = BTreeMap<String, String>;

/// The progress of a resource towards the state that its document describes.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
pub enum ProvisioningState {
    /// It is being created.
    Creating,
    /// Its document has changed and is being applied.
    Updating,
    /// It matches its document.
    Succeeded,
    /// It cannot be made to match its document; the reason says why.
    Failed,
    /// It is being deleted.
    Deleting,
}

impl Resource {
    /// The endpoint that it is or belongs to; None for a kind that belongs to none.
    pub fn endpoint(&self) -> Option<&Name> {
        match self {
            Self::Endpoint(resource) => Some(&resource.metadata.name),
            Self::Deployment(resource) => Some(&resource.metadata.endpoint),
            Self::Autoscale(resource) => Some(&resource.spec.target.endpoint),
        }
    }

    /// The deployment that it is or refers to.
    pub fn deployment(&self) -> Option<DeploymentRef> {
        match self {
            Self::Endpoint(_) => None,
            Self::Deployment(resource) => Some(DeploymentRef {
                endpoint: resource.metadata.endpoint.clone(),
                deployment: resource.metadata.name.clone(),
            }),
            Self::Autoscale(resource) => Some(resource.spec.target.clone()),
        }
    }

    /// The full name, such as `iris` or `iris/blue`.
    pub fn full_name(&self) -> String {
        match self {
            Self::Endpoint(resource) => resource.metadata.name.to_string(),
            Self::Deployment(resource) => {
                format!("{}/{}", resource.metadata.endpoint, resource.metadata.name)
            }
            Self::Autoscale(resource) => resource.spec.target.to_string(),
        }
    }

    /// The segments of its path in the API.
    pub fn path(&self) -> Vec<String> {
        let segments = match self {
            Self::Endpoint(resource) => vec!["endpoints", resource.metadata.name.as_str()],
            Self::Deployment(resource) => vec![
                "endpoints",
                resource.metadata.endpoint.as_str(),
                "deployments",
                resource.metadata.name.as_str(),
            ],
            Self::Autoscale(resource) => {
                let target = &resource.spec.target;
                vec![
                    "autoscale",
                    target.endpoint.as_str(),
                    target.deployment.as_str(),
                ]
            }
        };
        let segments = ["v1"].into_iter().chain(segments);
        segments.map(str::to_owned).collect()
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

#[cfg(test)]
mod tests {
    /// A release with one more kind.
    mod toy {
        use super::super::*;

        #[derive(Clone, Debug, PartialEq)]
        pub struct BudgetResource {
            pub metadata: AutoscaleMetadata,
            pub spec: BudgetSpec,
        }

        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
        pub struct BudgetSpec {
            pub limit: u64,
        }

        documents! {
            /// `kind: Endpoint`.
            Endpoint is EndpointResource of EndpointMetadata, EndpointSpec;
            /// `kind: Budget`.
            Budget is BudgetResource of AutoscaleMetadata, BudgetSpec;
        }

        impl Resource {
            pub fn spec(&self) -> Value {
                self.parts().1
            }
        }
    }

    use super::PartsReader;
    use serde::de::DeserializeOwned;
    use serde_json::{Value, from_value, json};

    struct Parts(Value);

    impl PartsReader for Parts {
        fn read<M: DeserializeOwned, S: DeserializeOwned>(&mut self) -> Option<(M, S)> {
            let parts = from_value((self.0)["metadata"].take()).ok();
            Some((parts?, from_value((self.0)["spec"].take()).ok()?))
        }
    }

    #[test]
    fn a_row_makes_a_kind_readable_named_and_described() {
        let document = json!({"metadata": {"labels": {"team": "a"}}, "spec": {"limit": 3}});
        let read = toy::Resource::read("Budget", &mut Parts(document)).unwrap();
        assert_eq!(
            (read.kind(), &read.labels()["team"]),
            ("Budget", &"a".to_owned())
        );
        assert_eq!(read.spec(), json!({"limit": 3}));
        assert_eq!(toy::KINDS, ["Endpoint", "Budget"]);
        let mut generator = schemars::SchemaGenerator::default();
        let schema = toy::document_schema("Budget", &mut generator);
        assert_eq!(schema.to_value()["title"], "Budget");
    }
}
