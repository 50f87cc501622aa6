//! Reading a typed value out of a tree with everything that is wrong, although serde stops at the
//! first fault: each fault is reported, what is faulty is mended in a copy (left out, or replaced by
//! something that fits), and the reading begins anew.
//!
//! Invariant: nothing is reported that only the mending caused. What was mended is remembered, and
//! nothing about it is believed any more.

use contract::problem::{Finding, escape};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::fault::{Fault, Kind, Wanted};
use crate::sentence::{in_words, nearest};
use crate::syntax::nodes_of;
use crate::typed::from_tree;

/// Most faults of one document that are reported.
pub const FINDINGS_MAX: usize = 100;
/// Values that are read in all attempts together. A document of usual size takes some hundreds of
/// attempts; a huge one is given up after fewer, with the faults found so far.
const VALUES_MAX: usize = 1_000_000;
/// How deep what is put in place of something missing may be.
const DEPTH_MAX: usize = 6;

/// What came of reading a tree.
pub struct Reading<T> {
    /// The value, mended where it had to be; none where that did not succeed.
    pub value: Option<T>,
    pub findings: Vec<Finding>,
    pub mended: Mended,
}

/// Pointers of what was mended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mended {
    pointers: Vec<String>,
    /// Objects of which it is not known which fields they should have: from which a field was removed
    /// that may be a misspelt one, or that say in no known word what kind they are.
    stripped: Vec<String>,
}

impl Mended {
    pub fn add(&mut self, other: Self) {
        self.pointers.extend(other.pointers);
        self.stripped.extend(other.stripped);
    }

    /// Whether something found in the mended value would be found in a right one too.
    pub fn trusts(&self, finding: &Finding, original: &Value) -> bool {
        let pointer = &finding.pointer;
        let missing = original.pointer(pointer).is_none();
        let misspelt = missing && self.stripped.iter().any(|object| object == parent(pointer));
        !misspelt && !self.pointers.iter().any(|mended| related(mended, pointer))
    }

    /// Whether this, or something around it, was mended.
    pub fn has(&self, pointer: &str) -> bool {
        self.pointers.iter().any(|mended| within(pointer, mended))
    }
}

fn parent(pointer: &str) -> &str {
    pointer.rfind('/').map_or("", |end| &pointer[..end])
}

/// The same, or below it.
fn within(pointer: &str, above: &str) -> bool {
    let rest = pointer.strip_prefix(above);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// One holds the other, or they are fields of one small object, whose values belong together: a
/// minimum and its maximum, a rule's condition and its step.
fn related(mended: &str, pointer: &str) -> bool {
    let object = parent(mended);
    let small = !["", "/spec", "/metadata"].contains(&object);
    within(mended, pointer) || within(pointer, mended) || small && object == parent(pointer)
}

/// Reads a typed value out of a tree, or says everything that is wrong.
///
/// # Errors
///
/// Everything that is wrong, at most [`FINDINGS_MAX`] faults; pointers begin with `base`.
pub fn read_typed<T: DeserializeOwned>(value: &Value, base: &str) -> Result<T, Vec<Finding>> {
    let reading = read_mending(value, base);
    match reading.value {
        Some(value) if reading.findings.is_empty() => Ok(value),
        _ => Err(reading.findings),
    }
}

/// Reads a typed value; pointers begin with `base`.
pub fn read_mending<T: DeserializeOwned>(value: &Value, base: &str) -> Reading<T> {
    let mut bench = Bench {
        value: value.clone(),
        left: VALUES_MAX,
        read: std::marker::PhantomData::<T>,
    };
    let mut findings = Vec::new();
    // Without the base until the end.
    let mut mended = Mended::default();
    let value = loop {
        let fault = match bench.read() {
            Attempt::Whole(value) => break Some(value),
            Attempt::Tired => break None,
            Attempt::Faulty(fault) => fault,
        };
        let pointer = pointer_of(&fault.steps);
        if !mended.has(&pointer) {
            let shown = format!("{base}{pointer}");
            let detail = in_words(&fault, &shown, bench.value.pointer(&pointer));
            findings.push(Finding::new(shown, detail));
        }
        if findings.len() >= FINDINGS_MAX {
            break None;
        }
        let Some(at) = bench.mend(&fault) else {
            break None;
        };
        if matches!(fault.kind, Kind::UnknownField(_)) || is_unclear_choice(&fault) {
            mended.stripped.push(parent(&pointer).to_owned());
        }
        mended.pointers.push(pointer);
        mended.pointers.push(at);
    };
    for pointer in mended.pointers.iter_mut().chain(&mut mended.stripped) {
        pointer.insert_str(0, base);
    }
    Reading {
        value,
        findings,
        mended,
    }
}

fn pointer_of(steps: &[String]) -> String {
    let steps = steps.iter().map(|step| format!("/{}", escape(step)));
    steps.collect()
}

/// A word that is not one of a few, and resembles none of them: what was meant is not known.
fn is_unclear_choice(fault: &Fault) -> bool {
    match &fault.kind {
        Kind::UnknownWord { word, known } => nearest(word, known).is_none(),
        _ => false,
    }
}

/// Values that would fit, as far as the fault says.
fn fitting(fault: &Fault) -> Vec<Value> {
    let value = match &fault.kind {
        Kind::UnknownWord { word, known } => {
            let meant = nearest(word, known).or(known.first().copied());
            return meant.map(|meant| json!(meant)).into_iter().collect();
        }
        Kind::Mismatch { wanted, .. } => match wanted {
            Wanted::U8 | Wanted::U16 | Wanted::Unsigned | Wanted::Signed | Wanted::Number => {
                json!(1)
            }
            Wanted::Boolean => json!(true),
            Wanted::List => json!([]),
            Wanted::Mapping | Wanted::Fields => json!({}),
            Wanted::Text | Wanted::Other(_) => return Vec::new(),
        },
        _ => return Vec::new(),
    };
    vec![value]
}

enum Attempt<T> {
    Whole(T),
    Faulty(Fault),
    /// Too much was tried already.
    Tired,
}

/// The copy that is mended.
struct Bench<T> {
    value: Value,
    left: usize,
    read: std::marker::PhantomData<T>,
}

impl<T: DeserializeOwned> Bench<T> {
    fn read(&mut self) -> Attempt<T> {
        let Some(left) = self.left.checked_sub(nodes_of(&self.value)) else {
            return Attempt::Tired;
        };
        self.left = left;
        match from_tree(&self.value) {
            Ok(value) => Attempt::Whole(value),
            Err(fault) => Attempt::Faulty(fault),
        }
    }

    /// Changes the value so that this fault is gone. Says where the change was made: at the fault, or
    /// at something around it.
    fn mend(&mut self, fault: &Fault) -> Option<String> {
        if matches!(fault.kind, Kind::UnknownField(_)) {
            self.put(&fault.steps, None);
            return Some(pointer_of(&fault.steps));
        }
        for length in (1..=fault.steps.len()).rev() {
            let steps = &fault.steps[..length];
            if self.settle(steps, &fitting(fault), DEPTH_MAX) {
                return Some(pointer_of(steps));
            }
        }
        None
    }

    /// Finds something for this place with which the reading gets past it.
    fn settle(&mut self, steps: &[String], fitting: &[Value], depth: usize) -> bool {
        let original = self.value.pointer(&pointer_of(steps)).cloned();
        // What the fault says would fit; then nothing, as most fields may be left out (items of a list may
        // not, or others would move up); then anything.
        let absent = original.is_some().then_some(None);
        let any = [
            json!("a"),
            json!("1s"),
            json!(1),
            json!({}),
            json!([]),
            json!(true),
        ];
        let fitting = fitting.iter().cloned().map(Some);
        let candidates = fitting.chain(absent).chain(any.map(Some));
        for candidate in candidates {
            if self.put(steps, candidate) && self.passes(steps, depth) {
                return true;
            }
        }
        self.put(steps, original);
        false
    }

    /// Whether the next fault, if any, is elsewhere; what is missing inside is filled in.
    fn passes(&mut self, steps: &[String], depth: usize) -> bool {
        loop {
            let fault = match self.read() {
                Attempt::Whole(_) => return true,
                Attempt::Tired => return false,
                Attempt::Faulty(fault) => fault,
            };
            if steps.starts_with(&fault.steps) {
                return false;
            }
            if !fault.steps.starts_with(steps) {
                return true;
            }
            if depth == 0 || !self.settle(&fault.steps, &fitting(&fault), depth - 1) {
                return false;
            }
        }
    }

    /// Sets or removes a value. False where that cannot be.
    fn put(&mut self, steps: &[String], value: Option<Value>) -> bool {
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
