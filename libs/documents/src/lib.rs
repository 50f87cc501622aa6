//! Reads what people write: YAML or JSON with the place of every value, resource documents and bodies of
//! requests, and everything that is wrong with them, in sentences.
//!
//! Owns the syntax, placeholders, faults and their wording, and the rules that a document must keep by
//! itself. What documents hold is `contract::resources`; what rules of an Autoscale mean, the engines
//! say. Invariant: whatever the text is, reading it ends within limits, and each fault names its field.

#![warn(missing_docs, clippy::missing_errors_doc)]

mod check;
mod document;
mod fault;
mod repair;
mod sentence;
mod syntax;
mod template;
mod typed;
mod yaml;

pub use check::backends::{BACKENDS, BackendRules, Backends, Part};
pub use document::{Document, Located, Read, read, read_checking};
pub use repair::{FINDINGS_MAX, read_typed};
pub use syntax::{
    DEPTH_MAX, DOCUMENTS_MAX, NODES_MAX, Place, SyntaxError, TEXT_BYTES_MAX, Tree,
    read as read_trees,
};
pub use template::{Unresolved, substitute};
pub use yaml::to_yaml;
