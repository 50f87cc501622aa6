//! Documents: a tree interpreted as one resource, or everything that is wrong with it.

use std::collections::BTreeSet;
use std::fmt;

use contract::problem::{Finding, escape};
use contract::resources::{self, API_VERSION, KINDS, READ_ONLY_METADATA, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::check;
use crate::check::backends::{self, Backends};
use crate::message::nearest;
use crate::presets::{self, SERVER_POINTER};
use crate::repair::{FINDINGS_MAX, Repaired, read_repairing};
use crate::syntax::{self, Location, SyntaxError, Tree};

/// Kinds that Penstock reserves and this release cannot read yet.
const UNAVAILABLE_KINDS: &[&str] = &[
    "PriceSheet",
    "NotificationTarget",
    "Budget",
    "ShadowTest",
    "Rollout",
    "BatchEndpoint",
    "BatchDeployment",
    "SLO",
    "SLI",
    "AlertPolicy",
    "AlertCondition",
    "AlertNotificationTarget",
    "Service",
    "DataSource",
];

/// A parsed tree, not yet interpreted as a resource.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// The parsed text, with the location of each value.
    pub tree: Tree,
}

/// A finding with its location in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocatedFinding {
    /// The location of the field, or of the object that lacks it.
    pub location: Location,
    /// What is wrong.
    pub finding: Finding,
}

impl fmt::Display for LocatedFinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finding { pointer, detail } = &self.finding;
        match pointer.as_str() {
            "" => write!(f, "{}: {detail}", self.location),
            pointer => write!(f, "{}: {pointer}: {detail}", self.location),
        }
    }
}

impl From<SyntaxError> for LocatedFinding {
    fn from(error: SyntaxError) -> Self {
        Self {
            location: error.location,
            finding: Finding::new(error.pointer, error.detail),
        }
    }
}

/// A resource with the document it was read from, so that later findings can be located too.
#[derive(Clone, Debug, PartialEq)]
pub struct ParsedResource {
    /// The document it was read from.
    pub document: Document,
    /// The resource.
    pub resource: Resource,
}

/// Reads every document of a text. Returns the resources and all findings, ordered by location.
pub fn read(text: &str) -> (Vec<ParsedResource>, Vec<LocatedFinding>) {
    read_with_checks(text, &Backends::known(), |_| Vec::new())
}

/// Like [`read`], with the given backends and an additional check of each resource.
pub fn read_with_checks(
    text: &str,
    backends: &Backends,
    extra: impl Fn(&Resource) -> Vec<Finding>,
) -> (Vec<ParsedResource>, Vec<LocatedFinding>) {
    let (trees, faults) = syntax::read(text);
    let mut faults: Vec<LocatedFinding> = faults.into_iter().map(LocatedFinding::from).collect();
    let reported: BTreeSet<Location> = faults.iter().map(|fault| fault.location).collect();
    let mut resources = Vec::new();
    for tree in trees {
        let document = Document { tree };
        match document.checked(backends, &extra) {
            Ok(resource) => resources.push(ParsedResource { document, resource }),
            Err(findings) => {
                let found = document.locate_all(findings).into_iter();
                // A syntax error here has already been reported.
                faults.extend(found.filter(|fault| !reported.contains(&fault.location)));
            }
        }
    }
    faults.sort_by_key(|fault| fault.location);
    (resources, faults)
}

impl Document {
    /// A document without text, such as a request body: every value is located at the start.
    pub fn new(value: Value) -> Self {
        let locations = Default::default();
        Self {
            tree: Tree { value, locations },
        }
    }

    /// Returns the finding with its location.
    pub fn locate(&self, finding: Finding) -> LocatedFinding {
        LocatedFinding {
            location: self.tree.location(&finding.pointer),
            finding,
        }
    }

    /// Returns each finding with its location.
    pub fn locate_all(&self, findings: Vec<Finding>) -> Vec<LocatedFinding> {
        findings.into_iter().map(|f| self.locate(f)).collect()
    }

    /// Returns the resource, validated as far as the document alone allows. The rules of an Autoscale
    /// are compiled by the engine.
    ///
    /// # Errors
    ///
    /// As [`checked`](Self::checked).
    pub fn resource(&self) -> Result<Resource, Vec<Finding>> {
        self.checked(&Backends::known(), |_| Vec::new())
    }

    /// Returns the resource, with what its `server` sets, validated against `backends` and by `extra`, or everything that is wrong
    /// with it. A fault in one field does not hide faults in others.
    ///
    /// # Errors
    ///
    /// Returns the findings: at least one, at most [`FINDINGS_MAX`].
    pub fn checked(
        &self,
        backends: &Backends,
        extra: impl Fn(&Resource) -> Vec<Finding>,
    ) -> Result<Resource, Vec<Finding>> {
        let resolved = presets::resolve(&self.tree.value);
        let Value::Object(fields) = resolved.value.as_ref() else {
            let detail =
                "a resource is a mapping with apiVersion, kind, metadata and spec; write one";
            return Err(vec![Finding::new("", detail)]);
        };
        let mut parts = DocumentParts {
            fields,
            findings: Vec::new(),
            repaired: Repaired::default(),
        };
        let kind = header(fields, &mut parts.findings);
        let resource = kind.and_then(|kind| Resource::read(kind, &mut parts));
        let DocumentParts {
            mut findings,
            repaired,
            ..
        } = parts;
        if let Some(resource) = &resource {
            // An unknown server may give instances their port.
            let is_unclear = [backends::BACKEND_POINTER, SERVER_POINTER]
                .iter()
                .any(|pointer| repaired.covers(pointer));
            let backends = (!is_unclear).then_some(backends);
            let found = check::resource(resource, backends);
            let found = found.into_iter().chain(extra(resource));
            findings.extend(found.filter(|finding| repaired.is_reliable(finding, &resolved.value)));
        }
        let findings = findings.into_iter().map(|one| resolved.attribute(one));
        let mut findings: Vec<Finding> = findings.collect();
        findings.truncate(FINDINGS_MAX);
        match resource {
            Some(resource) if findings.is_empty() => Ok(resource),
            _ => Err(findings),
        }
    }
}

fn is_unavailable(kind: &str) -> bool {
    UNAVAILABLE_KINDS.contains(&kind) && !KINDS.contains(&kind)
}

/// Checks the fields that all kinds share. Returns the kind if this release can read it.
fn header<'a>(fields: &'a Map<String, Value>, findings: &mut Vec<Finding>) -> Option<&'a str> {
    const FIELDS: [&str; 5] = ["apiVersion", "kind", "metadata", "spec", "status"];
    for field in fields
        .keys()
        .filter(|field| !FIELDS.contains(&field.as_str()))
    {
        let detail = match nearest(field, &FIELDS) {
            Some(near) => format!("`{field}` is not a field here; did you mean `{near}`?"),
            None => format!(
                "`{field}` is not a field here; remove it, or use one of: apiVersion, kind, metadata, spec"
            ),
        };
        findings.push(Finding::new(format!("/{}", escape(field)), detail));
    }
    let kind = match fields.get("kind") {
        Some(Value::String(kind)) => Some(kind.as_str()),
        Some(_) => {
            findings.push(Finding::new(
                "/kind",
                format!("`kind` must be text; write one of: {}", KINDS.join(", ")),
            ));
            None
        }
        None => {
            findings.push(Finding::new(
                "/kind",
                format!("`kind` is missing; write one of: {}", KINDS.join(", ")),
            ));
            None
        }
    };
    if let Some(kind) = kind.filter(|kind| is_unavailable(kind)) {
        let detail = format!(
            "kind `{kind}` is known but not available yet in this release; leave the document out"
        );
        findings.push(Finding::new("/kind", detail));
        return None;
    }
    if let Some(kind) = kind.filter(|kind| !KINDS.contains(kind)) {
        let detail = match nearest(kind, KINDS) {
            Some(near) => format!("`{kind}` is not a kind; did you mean `{near}`?"),
            None => format!("`{kind}` is not a kind; use one of: {}", KINDS.join(", ")),
        };
        findings.push(Finding::new("/kind", detail));
        return None;
    }
    match fields.get("apiVersion") {
        Some(Value::String(version)) if version == API_VERSION => {}
        Some(other) => {
            let detail = format!("apiVersion {other} is not known; write `{API_VERSION}`");
            findings.push(Finding::new("/apiVersion", detail));
        }
        None => {
            let detail = format!("`apiVersion` is missing; write `apiVersion: {API_VERSION}`");
            findings.push(Finding::new("/apiVersion", detail));
        }
    }
    kind
}

fn metadata_of(fields: &Map<String, Value>) -> Value {
    let mut metadata = fields.get("metadata").cloned().unwrap_or_else(|| json!({}));
    if let Value::Object(fields) = &mut metadata {
        fields.retain(|field, _| !READ_ONLY_METADATA.contains(&field.as_str()));
    }
    metadata
}

/// Deserializes metadata and spec, and collects the findings.
struct DocumentParts<'a> {
    fields: &'a Map<String, Value>,
    findings: Vec<Finding>,
    repaired: Repaired,
}

impl resources::PartsReader for DocumentParts<'_> {
    fn read<M: DeserializeOwned, S: DeserializeOwned>(&mut self) -> Option<(M, S)> {
        let metadata = self.part(&metadata_of(self.fields), "/metadata");
        let spec = match self.fields.get("spec") {
            Some(spec) => self.part(spec, "/spec"),
            None => {
                let finding = Finding::new("/spec", "`spec` is missing; add it");
                self.findings.push(finding);
                None
            }
        };
        Some((metadata?, spec?))
    }
}

impl DocumentParts<'_> {
    fn part<T: DeserializeOwned>(&mut self, value: &Value, base: &str) -> Option<T> {
        let result = read_repairing(value, base);
        self.findings.extend(result.findings);
        self.repaired.add(result.repaired);
        result.value
    }
}
