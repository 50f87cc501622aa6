//! Deserializes a tree and collects every fault, although serde stops at the first: each fault is
//! reported, repaired in a copy (the value is removed, or replaced by one that is accepted), and
//! deserialization starts again.
//!
//! Invariant: no fault is reported that a repair caused. Repaired pointers are remembered, and later
//! findings about them are dropped.

use contract::problem::{Finding, escape};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::fault::{ExpectedType, Fault, FaultKind};
use crate::message::{describe, nearest};
use crate::syntax::count_nodes;
use crate::typed::from_tree;

/// Maximum number of reported faults per document.
pub const FINDINGS_MAX: usize = 100;
/// Maximum number of values read over all attempts. A document of usual size allows hundreds of
/// attempts; a huge one fewer, after which the faults found so far are reported.
const VALUES_READ_MAX: usize = 1_000_000;
/// Maximum depth of nested repairs.
const DEPTH_MAX: usize = 6;

/// The result of [`read_repairing`].
pub struct RepairedRead<T> {
    /// The value, repaired where necessary; `None` if that failed.
    pub value: Option<T>,
    pub findings: Vec<Finding>,
    pub repaired: Repaired,
}

/// The pointers that were repaired.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Repaired {
    pointers: Vec<String>,
    /// Objects whose expected fields are uncertain: a field was removed that may be a misspelled one, or
    /// the object names no known variant.
    uncertain_objects: Vec<String>,
}

impl Repaired {
    pub fn add(&mut self, other: Self) {
        self.pointers.extend(other.pointers);
        self.uncertain_objects.extend(other.uncertain_objects);
    }

    /// Whether a finding about the repaired value also holds for the original.
    pub fn is_reliable(&self, finding: &Finding, original: &Value) -> bool {
        let pointer = &finding.pointer;
        let missing = original.pointer(pointer).is_none();
        let misspelled = missing
            && self
                .uncertain_objects
                .iter()
                .any(|object| object == parent(pointer));
        !misspelled
            && !self
                .pointers
                .iter()
                .any(|repaired| are_related(repaired, pointer))
    }

    /// Whether this value or one of its ancestors was repaired.
    pub fn covers(&self, pointer: &str) -> bool {
        self.pointers
            .iter()
            .any(|repaired| is_within(pointer, repaired))
    }
}

fn parent(pointer: &str) -> &str {
    pointer.rfind('/').map_or("", |end| &pointer[..end])
}

/// Whether `pointer` is `above` or a descendant of it.
fn is_within(pointer: &str, above: &str) -> bool {
    let rest = pointer.strip_prefix(above);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Whether one contains the other, or both are fields of one small object, whose values depend on each
/// other: a minimum and a maximum, a rule's condition and its step.
fn are_related(repaired: &str, pointer: &str) -> bool {
    let object = parent(repaired);
    let small = !["", "/spec", "/metadata"].contains(&object);
    is_within(repaired, pointer)
        || is_within(pointer, repaired)
        || small && object == parent(pointer)
}

/// Deserializes a tree, or returns everything that is wrong with it.
///
/// # Errors
///
/// Returns all faults, at most [`FINDINGS_MAX`]. Pointers begin with `base`.
pub fn read_typed<T: DeserializeOwned>(value: &Value, base: &str) -> Result<T, Vec<Finding>> {
    let result = read_repairing(value, base);
    match result.value {
        Some(value) if result.findings.is_empty() => Ok(value),
        _ => Err(result.findings),
    }
}

/// Deserializes a tree, repairing a copy of it at every fault. Pointers begin with `base`.
pub fn read_repairing<T: DeserializeOwned>(value: &Value, base: &str) -> RepairedRead<T> {
    let mut repairer = Repairer {
        value: value.clone(),
        budget: VALUES_READ_MAX,
        read: std::marker::PhantomData::<T>,
    };
    let mut findings = Vec::new();
    // `base` is prepended at the end.
    let mut repaired = Repaired::default();
    let value = loop {
        let fault = match repairer.read() {
            Attempt::Complete(value) => break Some(value),
            Attempt::OutOfBudget => break None,
            Attempt::Faulty(fault) => fault,
        };
        let pointer = pointer_of(&fault.steps);
        if !repaired.covers(&pointer) {
            let full_pointer = format!("{base}{pointer}");
            let detail = describe(&fault, &full_pointer, repairer.value.pointer(&pointer));
            findings.push(Finding::new(full_pointer, detail));
        }
        if findings.len() >= FINDINGS_MAX {
            break None;
        }
        let Some(at) = repairer.repair(&fault) else {
            break None;
        };
        if matches!(fault.kind, FaultKind::UnknownField(_)) || is_ambiguous_variant(&fault) {
            repaired.uncertain_objects.push(parent(&pointer).to_owned());
        }
        repaired.pointers.push(pointer);
        repaired.pointers.push(at);
    };
    for pointer in repaired
        .pointers
        .iter_mut()
        .chain(&mut repaired.uncertain_objects)
    {
        pointer.insert_str(0, base);
    }
    RepairedRead {
        value,
        findings,
        repaired,
    }
}

fn pointer_of(steps: &[String]) -> String {
    let steps = steps.iter().map(|step| format!("/{}", escape(step)));
    steps.collect()
}

/// Whether the fault is an unknown variant that resembles none of the known ones.
fn is_ambiguous_variant(fault: &Fault) -> bool {
    match &fault.kind {
        FaultKind::UnknownVariant { variant, known } => nearest(variant, known).is_none(),
        _ => false,
    }
}

/// Returns the values that the fault suggests.
fn candidates_for(fault: &Fault) -> Vec<Value> {
    let value = match &fault.kind {
        FaultKind::UnknownVariant { variant, known } => {
            let meant = nearest(variant, known).or(known.first().copied());
            return meant.map(|meant| json!(meant)).into_iter().collect();
        }
        FaultKind::Mismatch { expected, .. } => match expected {
            ExpectedType::U8
            | ExpectedType::U16
            | ExpectedType::Unsigned
            | ExpectedType::Signed
            | ExpectedType::Number => {
                json!(1)
            }
            ExpectedType::Boolean => json!(true),
            ExpectedType::List => json!([]),
            ExpectedType::Mapping | ExpectedType::Fields => json!({}),
            ExpectedType::Text | ExpectedType::Other(_) => return Vec::new(),
        },
        _ => return Vec::new(),
    };
    vec![value]
}

enum Attempt<T> {
    Complete(T),
    Faulty(Fault),
    /// [`VALUES_READ_MAX`] is reached.
    OutOfBudget,
}

/// The copy that is repaired.
struct Repairer<T> {
    value: Value,
    budget: usize,
    read: std::marker::PhantomData<T>,
}

impl<T: DeserializeOwned> Repairer<T> {
    fn read(&mut self) -> Attempt<T> {
        let Some(budget) = self.budget.checked_sub(count_nodes(&self.value)) else {
            return Attempt::OutOfBudget;
        };
        self.budget = budget;
        match from_tree(&self.value) {
            Ok(value) => Attempt::Complete(value),
            Err(fault) => Attempt::Faulty(fault),
        }
    }

    /// Changes the value so that this fault disappears. Returns where: at the fault or at one of its
    /// ancestors.
    fn repair(&mut self, fault: &Fault) -> Option<String> {
        if matches!(fault.kind, FaultKind::UnknownField(_)) {
            self.set_value(&fault.steps, None);
            return Some(pointer_of(&fault.steps));
        }
        for length in (1..=fault.steps.len()).rev() {
            let steps = &fault.steps[..length];
            if self.try_candidates(steps, &candidates_for(fault), DEPTH_MAX) {
                return Some(pointer_of(steps));
            }
        }
        None
    }

    /// Finds a value for `steps` with which deserialization gets past it.
    fn try_candidates(&mut self, steps: &[String], candidates: &[Value], depth: usize) -> bool {
        let original = self.value.pointer(&pointer_of(steps)).cloned();
        // First what the fault suggests; then removal, as most fields are optional (list items are not
        // removed: the rest would shift); then a value of each type.
        let absent = original.is_some().then_some(None);
        let any = [
            json!("a"),
            json!("1s"),
            json!(1),
            json!({}),
            json!([]),
            json!(true),
        ];
        let candidates = candidates.iter().cloned().map(Some);
        let candidates = candidates.chain(absent).chain(any.map(Some));
        for candidate in candidates {
            if self.set_value(steps, candidate) && self.clears_faults(steps, depth) {
                return true;
            }
        }
        self.set_value(steps, original);
        false
    }

    /// Whether the next fault, if any, is elsewhere. Missing values inside are filled in.
    fn clears_faults(&mut self, steps: &[String], depth: usize) -> bool {
        loop {
            let fault = match self.read() {
                Attempt::Complete(_) => return true,
                Attempt::OutOfBudget => return false,
                Attempt::Faulty(fault) => fault,
            };
            if steps.starts_with(&fault.steps) {
                return false;
            }
            if !fault.steps.starts_with(steps) {
                return true;
            }
            if depth == 0 || !self.try_candidates(&fault.steps, &candidates_for(&fault), depth - 1)
            {
                return false;
            }
        }
    }

    /// Sets or removes a value. Returns false if that is not possible.
    fn set_value(&mut self, steps: &[String], value: Option<Value>) -> bool {
        let Some((last, parents)) = steps.split_last() else {
            return false;
        };
        match (self.value.pointer_mut(&pointer_of(parents)), value) {
            (Some(Value::Object(fields)), Some(value)) => {
                fields.insert(last.clone(), value);
                true
            }
            (Some(Value::Object(fields)), None) => fields.remove(last).is_some(),
            (Some(Value::Array(items)), Some(value)) => {
                let index = last.parse::<usize>().ok();
                let item = index.and_then(|index| items.get_mut(index));
                item.map(|item| *item = value).is_some()
            }
            _ => false,
        }
    }
}
