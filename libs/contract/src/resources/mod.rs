//! Resource documents, as people write them. Unknown fields are errors.

mod autoscale;
mod deployment;
mod document;
mod endpoint;
pub mod limits;
mod schema;
mod view;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use autoscale::*;
pub use deployment::*;
pub use document::*;
pub use endpoint::*;
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
    /// It is new, and not yet there.
    Creating,
    /// Its document has changed, and what there is follows.
    Updating,
    /// What there is, is what its document says.
    Succeeded,
    /// It cannot be made so; the reason says why.
    Failed,
    /// It goes.
    Deleting,
}
