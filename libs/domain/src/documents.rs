//! Documents as a whole: checks that only the engines can make, and diffs.

use std::collections::{BTreeMap, BTreeSet};

use contract::problem::{Finding, escape};
use contract::resources::{AutoscaleSpec, EndpointSpec, Percentages, Resource};
use contract::views::FieldChange;
use serde_json::Value;

use crate::autoscale::Policy;
use crate::zones::ZoneData;

/// Returns what the engines find wrong with a document that is valid by itself.
pub fn validate(resource: &Resource, zones: &ZoneData) -> Vec<Finding> {
    match resource {
        Resource::Autoscale(autoscale) => autoscale_findings(&autoscale.spec, zones),
        Resource::Endpoint(_) | Resource::Deployment(_) => Vec::new(),
    }
}

/// Returns the faults in rules and schedules, with pointers from the document's root.
pub fn autoscale_findings(spec: &AutoscaleSpec, zones: &ZoneData) -> Vec<Finding> {
    Policy::compile(spec, zones).err().unwrap_or_default()
}

/// Returns what is valid in a document and probably not intended, with pointers from its root; none for a
/// document with faults.
pub fn warnings(resource: &Resource, zones: &ZoneData) -> Vec<Finding> {
    match resource {
        Resource::Autoscale(autoscale) => Policy::compile(&autoscale.spec, zones)
            .map_or_else(|_| Vec::new(), |policy| policy.warnings()),
        Resource::Endpoint(_) | Resource::Deployment(_) => Vec::new(),
    }
}

/// Returns the endpoint's spec as one document, including its shares.
pub fn full_spec(spec: &EndpointSpec, traffic: &Percentages, mirror: &Percentages) -> EndpointSpec {
    EndpointSpec {
        traffic: Some(traffic.clone()),
        mirror: Some(mirror.clone()),
        ..spec.clone()
    }
}

/// Returns every field in which two documents differ, ordered by pointer.
pub fn diff(from: Option<&Value>, to: Option<&Value>) -> Vec<FieldChange> {
    let (mut old, mut new) = (BTreeMap::new(), BTreeMap::new());
    if let Some(value) = from {
        collect_leaves("", value, &mut old);
    }
    if let Some(value) = to {
        collect_leaves("", value, &mut new);
    }
    let pointers: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let changed = pointers.into_iter().filter(|p| old.get(*p) != new.get(*p));
    changed
        .map(|pointer| FieldChange {
            pointer: pointer.clone(),
            from: old.get(pointer).map(|value| (*value).clone()),
            to: new.get(pointer).map(|value| (*value).clone()),
        })
        .collect()
}

/// Collects fields that hold no other fields; a list counts as one field, since its items have no
/// names.
fn collect_leaves<'a>(pointer: &str, value: &'a Value, into: &mut BTreeMap<String, &'a Value>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, field) in fields {
                collect_leaves(&format!("{pointer}/{}", escape(name)), field, into);
            }
        }
        _ => {
            into.insert(pointer.to_owned(), value);
        }
    }
}
