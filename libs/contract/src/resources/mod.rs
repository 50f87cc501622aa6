//! Resource documents, as people write them. Unknown fields are errors.

mod autoscale;
pub mod check;
mod deployment;
pub mod document;
mod endpoint;
mod repair;
mod schema;
mod sentence;
pub mod syntax;
pub mod template;
mod view;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use autoscale::*;
pub use deployment::*;
pub use document::*;
pub use endpoint::*;
pub use repair::FINDINGS_MAX;
pub use schema::document_schema;
pub use sentence::read_typed;
pub use syntax::{Place, SyntaxError, TEXT_BYTES_MAX, Tree};
pub use template::{Unresolved, substitute};
pub use view::*;

/// The only version of the documents so far.
pub const API_VERSION: &str = "penstock/v1";

/// Labels of a resource; at most 32, each key and value at most 63 bytes.
pub type Labels = BTreeMap<String, String>;

/// Where a resource stands on its way to what its document asks for.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
pub enum ProvisioningState {
    Creating,
    Updating,
    Succeeded,
    Failed,
    Deleting,
}
