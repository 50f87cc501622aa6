//! Resource documents, as users write them. Unknown fields are errors.

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
