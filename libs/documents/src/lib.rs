//! Parses user input: YAML or JSON with the location of every value, resource documents and request
//! bodies. Reports every fault as a sentence.
//!
//! Owns the syntax, placeholders, presets, faults and their wording, and the validation that needs nothing
//! but the document. The contents of documents are defined in `contract::resources`; the rules of an
//! Autoscale are interpreted by the engines. Invariant: reading terminates within limits for any text,
//! and each fault names its field.

#![warn(missing_docs, clippy::missing_errors_doc)]

mod check;
mod document;
mod fault;
mod message;
mod presets;
mod repair;
mod syntax;
mod template;
mod typed;
mod yaml;

pub use check::MIRROR_UNSUPPORTED;
pub use check::backends::{BACKENDS, BackendField, BackendRules, Backends};
pub use document::{Document, LocatedFinding, ParsedResource, read, read_with_checks};
pub use presets::warnings;
pub use repair::{FINDINGS_MAX, read_typed};
pub use syntax::{
    DEPTH_MAX, DOCUMENTS_MAX, Location, NODES_MAX, SyntaxError, TEXT_BYTES_MAX, Tree,
    read as read_trees,
};
pub use template::{UnresolvedPlaceholder, substitute};
pub use yaml::to_yaml;
