//! A document: a tree read as one resource, or everything that is wrong with it.

use std::fmt;

use saphyr::{Yaml, YamlEmitter};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::syntax::{self, Place, SyntaxError, Tree};
use super::{API_VERSION, AutoscaleSpec, DeploymentSpec, EndpointSpec, Labels, check, sentence};
use crate::ids::{DeploymentRef, Name};
use crate::problem::Finding;

/// Kinds that this release can read.
pub const KINDS: [&str; 3] = ["Endpoint", "Deployment", "Autoscale"];

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

/// What the server writes into `metadata`; ignored when it comes back.
pub(super) const READ_ONLY_METADATA: [&str; 3] = ["uid", "revision", "createdAt"];

/// One resource as a person wrote it.
#[derive(Clone, Debug, PartialEq)]
pub enum Resource {
    Endpoint(EndpointResource),
    Deployment(DeploymentResource),
    Autoscale(AutoscaleResource),
}

#[derive(Clone, Debug, PartialEq)]
pub struct EndpointResource {
    pub metadata: EndpointMetadata,
    pub spec: EndpointSpec,
}

#[derive(Clone, Debug, PartialEq)]
pub struct DeploymentResource {
    pub metadata: DeploymentMetadata,
    pub spec: DeploymentSpec,
}

#[derive(Clone, Debug, PartialEq)]
pub struct AutoscaleResource {
    pub metadata: AutoscaleMetadata,
    pub spec: AutoscaleSpec,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EndpointMetadata {
    pub name: Name,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DeploymentMetadata {
    pub name: Name,
    /// The endpoint that it belongs to.
    pub endpoint: Name,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}

/// An Autoscale is known by its target; a name is allowed, and means nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AutoscaleMetadata {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}

impl Resource {
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Endpoint(_) => "Endpoint",
            Self::Deployment(_) => "Deployment",
            Self::Autoscale(_) => "Autoscale",
        }
    }

    /// The endpoint that it is or belongs to.
    pub fn endpoint(&self) -> &Name {
        match self {
            Self::Endpoint(resource) => &resource.metadata.name,
            Self::Deployment(resource) => &resource.metadata.endpoint,
            Self::Autoscale(resource) => &resource.spec.target.endpoint,
        }
    }

    /// The deployment that it is or is about.
    pub fn deployment(&self) -> Option<DeploymentRef> {
        let deployment = match self {
            Self::Endpoint(_) => return None,
            Self::Deployment(resource) => resource.metadata.name.clone(),
            Self::Autoscale(resource) => return Some(resource.spec.target.clone()),
        };
        let endpoint = self.endpoint().clone();
        Some(DeploymentRef {
            endpoint,
            deployment,
        })
    }

    /// `iris` or `iris/blue`.
    pub fn full_name(&self) -> String {
        self.deployment()
            .map_or_else(|| self.endpoint().to_string(), |of| of.to_string())
    }

    /// The document again, with defaults filled in.
    pub fn to_value(&self) -> Value {
        let (metadata, spec) = match self {
            Self::Endpoint(r) => (json!(r.metadata), json!(r.spec)),
            Self::Deployment(r) => (json!(r.metadata), json!(r.spec)),
            Self::Autoscale(r) => (json!(r.metadata), json!(r.spec)),
        };
        json!({"apiVersion": API_VERSION, "kind": self.kind(), "metadata": metadata, "spec": spec})
    }
}

/// A tree of one text, still to be read.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    pub tree: Tree,
}

/// A finding with its place in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    pub place: Place,
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
    pub document: Document,
    pub resource: Resource,
}

/// Reads every document of a text: the resources, and everything that is wrong, in order of place.
pub fn read(text: &str) -> (Vec<Read>, Vec<Located>) {
    let trees = match syntax::trees(text) {
        Ok(trees) => trees,
        Err(error) => return (Vec::new(), vec![error.into()]),
    };
    let mut resources = Vec::new();
    let mut faults = Vec::new();
    for tree in trees {
        let document = Document { tree };
        match document.resource() {
            Ok(resource) => resources.push(Read { document, resource }),
            Err(findings) => faults.extend(document.locate_all(findings)),
        }
    }
    faults.sort_by_key(|fault| fault.place);
    (resources, faults)
}

impl Document {
    pub fn new(value: Value) -> Self {
        let places = Default::default();
        Self {
            tree: Tree { value, places },
        }
    }

    pub fn locate(&self, finding: Finding) -> Located {
        Located {
            place: self.tree.place(&finding.pointer),
            finding,
        }
    }

    pub fn locate_all(&self, findings: Vec<Finding>) -> Vec<Located> {
        findings.into_iter().map(|f| self.locate(f)).collect()
    }

    /// The resource, checked as far as the document alone can be; the rules of an Autoscale are
    /// compiled by the engine.
    pub fn resource(&self) -> Result<Resource, Vec<Finding>> {
        let Value::Object(fields) = &self.tree.value else {
            let detail =
                "a resource is a mapping with apiVersion, kind, metadata and spec; write one";
            return Err(vec![Finding::new("", detail)]);
        };
        let mut findings = Vec::new();
        let kind = header(fields, &mut findings);
        let metadata = metadata_of(fields);
        let spec = fields.get("spec").unwrap_or(&Value::Null);
        if !fields.contains_key("spec") && kind.is_some() {
            findings.push(Finding::new("/spec", "`spec` is missing; add it"));
            return Err(findings);
        }
        let resource = match kind {
            Some("Endpoint") => parts(&metadata, spec, &mut findings)
                .map(|(metadata, spec)| Resource::Endpoint(EndpointResource { metadata, spec })),
            Some("Deployment") => parts(&metadata, spec, &mut findings).map(|(metadata, spec)| {
                Resource::Deployment(DeploymentResource { metadata, spec })
            }),
            Some("Autoscale") => parts(&metadata, spec, &mut findings)
                .map(|(metadata, spec)| Resource::Autoscale(AutoscaleResource { metadata, spec })),
            _ => None,
        };
        let Some(resource) = resource else {
            return Err(findings);
        };
        findings.extend(check::resource(&resource));
        if findings.is_empty() {
            Ok(resource)
        } else {
            Err(findings)
        }
    }
}

/// Checks what all kinds share, and says which kind it is if this release can read it.
fn header<'a>(fields: &'a Map<String, Value>, findings: &mut Vec<Finding>) -> Option<&'a str> {
    const FIELDS: [&str; 5] = ["apiVersion", "kind", "metadata", "spec", "status"];
    for field in fields
        .keys()
        .filter(|field| !FIELDS.contains(&field.as_str()))
    {
        let detail = match sentence::nearest(field, &FIELDS) {
            Some(near) => format!("`{field}` is not a field here; did you mean `{near}`?"),
            None => format!(
                "`{field}` is not a field here; remove it, or use one of: apiVersion, kind, metadata, spec"
            ),
        };
        findings.push(Finding::new(format!("/{}", syntax::escape(field)), detail));
    }
    let kind = match fields.get("kind") {
        Some(Value::String(kind)) => Some(kind.as_str()),
        Some(_) => {
            findings.push(Finding::new(
                "/kind",
                "`kind` must be text; write one of: Endpoint, Deployment, Autoscale",
            ));
            None
        }
        None => {
            findings.push(Finding::new(
                "/kind",
                "`kind` is missing; write one of: Endpoint, Deployment, Autoscale",
            ));
            None
        }
    };
    if let Some(kind) = kind.filter(|kind| KINDS_NOT_YET.contains(kind)) {
        let detail = format!(
            "kind `{kind}` is known but not available yet in this release; leave the document out"
        );
        findings.push(Finding::new("/kind", detail));
        return None;
    }
    if let Some(kind) = kind.filter(|kind| !KINDS.contains(kind)) {
        let detail = match sentence::nearest(kind, &KINDS) {
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

fn parts<M, S>(metadata: &Value, spec: &Value, findings: &mut Vec<Finding>) -> Option<(M, S)>
where
    M: serde::de::DeserializeOwned,
    S: serde::de::DeserializeOwned,
{
    let metadata =
        sentence::read_typed(metadata, "/metadata").map_err(|found| findings.extend(found));
    let spec = sentence::read_typed(spec, "/spec").map_err(|found| findings.extend(found));
    Some((metadata.ok()?, spec.ok()?))
}

/// Any tree as YAML, for people: the body of `get -o yaml`.
pub fn to_yaml(value: &Value) -> String {
    let mut text = String::new();
    let node = yaml_node(value);
    // Writing to a String cannot fail, and the tree holds nothing that the emitter refuses.
    let _ = YamlEmitter::new(&mut text).dump(&node);
    let body = text.strip_prefix("---\n").unwrap_or(&text);
    format!("{}\n", body.trim_end())
}

fn yaml_node(value: &Value) -> Yaml<'static> {
    use saphyr::Scalar;
    match value {
        Value::Null => Yaml::Value(Scalar::Null),
        Value::Bool(value) => Yaml::Value(Scalar::Boolean(*value)),
        Value::Number(number) => match number.as_i64() {
            Some(whole) => Yaml::Value(Scalar::Integer(whole)),
            None => Yaml::Value(Scalar::FloatingPoint(
                number.as_f64().unwrap_or_default().into(),
            )),
        },
        Value::String(text) => Yaml::Value(Scalar::String(text.clone().into())),
        Value::Array(items) => Yaml::Sequence(items.iter().map(yaml_node).collect()),
        Value::Object(fields) => {
            let entry = |(key, value): (&String, &Value)| {
                (
                    Yaml::Value(Scalar::String(key.clone().into())),
                    yaml_node(value),
                )
            };
            Yaml::Mapping(fields.iter().map(entry).collect())
        }
    }
}
