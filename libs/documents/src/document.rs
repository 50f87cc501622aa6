//! A document: a tree read as one resource, or everything that is wrong with it.

use std::collections::BTreeSet;
use std::fmt;

use contract::problem::{Finding, escape};
use contract::resources::{self, API_VERSION, KINDS, READ_ONLY_METADATA, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::check;
use crate::check::backends::{self, Backends};
use crate::repair::{FINDINGS_MAX, Mended, read_mending};
use crate::sentence::nearest;
use crate::syntax::{self, Place, SyntaxError, Tree};

/// Kinds that belong to Penstock and that this release cannot read yet.
const KINDS_NOT_YET: &[&str] = &[
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

/// A tree of one text, still to be read.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// What the text says, with the place of each value.
    pub tree: Tree,
}

/// A finding with its place in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// Where the field stands, or what it is missing from.
    pub place: Place,
    /// What is wrong.
    pub finding: Finding,
}

impl fmt::Display for Located {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finding { pointer, detail } = &self.finding;
        match pointer.as_str() {
            "" => write!(f, "{}: {detail}", self.place),
            pointer => write!(f, "{}: {pointer}: {detail}", self.place),
        }
    }
}

impl From<SyntaxError> for Located {
    fn from(error: SyntaxError) -> Self {
        Self {
            place: error.place,
            finding: Finding::new(error.pointer, error.detail),
        }
    }
}

/// A resource with the document it was read from, so that later findings have a place too.
#[derive(Clone, Debug, PartialEq)]
pub struct Read {
    /// What it was read from.
    pub document: Document,
    /// What it says.
    pub resource: Resource,
}

/// Reads every document of a text: the resources, and everything that is wrong, in order of place.
pub fn read(text: &str) -> (Vec<Read>, Vec<Located>) {
    read_checking(text, &Backends::known(), |_| Vec::new())
}

/// The same where these backends are, with what `more` finds wrong with a resource.
pub fn read_checking(
    text: &str,
    backends: &Backends,
    more: impl Fn(&Resource) -> Vec<Finding>,
) -> (Vec<Read>, Vec<Located>) {
    let (trees, faults) = syntax::read(text);
    let mut faults: Vec<Located> = faults.into_iter().map(Located::from).collect();
    let told: BTreeSet<Place> = faults.iter().map(|fault| fault.place).collect();
    let mut resources = Vec::new();
    for tree in trees {
        let document = Document { tree };
        match document.checked(backends, &more) {
            Ok(resource) => resources.push(Read { document, resource }),
            Err(findings) => {
                let found = document.locate_all(findings).into_iter();
                // What is no YAML is no value either, and that is said already.
                faults.extend(found.filter(|fault| !told.contains(&fault.place)));
            }
        }
    }
    faults.sort_by_key(|fault| fault.place);
    (resources, faults)
}

impl Document {
    /// A tree without a text, such as the body of a request: everything is at the start.
    pub fn new(value: Value) -> Self {
        let places = Default::default();
        Self {
            tree: Tree { value, places },
        }
    }

    /// The finding with its place.
    pub fn locate(&self, finding: Finding) -> Located {
        Located {
            place: self.tree.place(&finding.pointer),
            finding,
        }
    }

    /// The same for each of them.
    pub fn locate_all(&self, findings: Vec<Finding>) -> Vec<Located> {
        findings.into_iter().map(|f| self.locate(f)).collect()
    }

    /// The resource, checked as far as the document alone can be; the rules of an Autoscale are
    /// compiled by the engine.
    ///
    /// # Errors
    ///
    /// As [`checked`](Self::checked).
    pub fn resource(&self) -> Result<Resource, Vec<Finding>> {
        self.checked(&Backends::known(), |_| Vec::new())
    }

    /// The resource, checked here and by `more` where these backends are, or everything that is wrong with it (the first
    /// [`FINDINGS_MAX`] faults). A fault of one field does not hide those of others.
    ///
    /// # Errors
    ///
    /// The faults, for whoever wrote the document; at least one.
    pub fn checked(
        &self,
        backends: &Backends,
        more: impl Fn(&Resource) -> Vec<Finding>,
    ) -> Result<Resource, Vec<Finding>> {
        let Value::Object(fields) = &self.tree.value else {
            let detail =
                "a resource is a mapping with apiVersion, kind, metadata and spec; write one";
            return Err(vec![Finding::new("", detail)]);
        };
        let mut parts = Parts {
            fields,
            findings: Vec::new(),
            mended: Mended::default(),
        };
        let kind = header(fields, &mut parts.findings);
        let resource = kind.and_then(|kind| Resource::read(kind, &mut parts));
        let Parts {
            mut findings,
            mended,
            ..
        } = parts;
        if let Some(resource) = &resource {
            let backends = (!mended.has(backends::POINTER)).then_some(backends);
            let found = check::resource(resource, backends);
            let found = found.into_iter().chain(more(resource));
            findings.extend(found.filter(|finding| mended.trusts(finding, &self.tree.value)));
        }
        findings.truncate(FINDINGS_MAX);
        match resource {
            Some(resource) if findings.is_empty() => Ok(resource),
            _ => Err(findings),
        }
    }
}

fn is_for_later(kind: &str) -> bool {
    KINDS_NOT_YET.contains(&kind) && !KINDS.contains(&kind)
}

/// Checks what all kinds share, and says which kind it is if this release can read it.
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
    if let Some(kind) = kind.filter(|kind| is_for_later(kind)) {
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

/// Metadata and spec as they are read, with what is wrong with them.
struct Parts<'a> {
    fields: &'a Map<String, Value>,
    findings: Vec<Finding>,
    mended: Mended,
}

impl resources::Parts for Parts<'_> {
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

impl Parts<'_> {
    fn part<T: DeserializeOwned>(&mut self, value: &Value, base: &str) -> Option<T> {
        let reading = read_mending(value, base);
        self.findings.extend(reading.findings);
        self.mended.add(reading.mended);
        reading.value
    }
}
