//! What a deployment's document must hold for each backend.
//!
//! Invariant: a backend is known by its row in [`BACKENDS`]. What no row knows is refused by name, unless
//! nodes offer it; then the document is left to them.

use std::collections::BTreeSet;

use contract::problem::Finding;
use contract::resources::limits::{ARGUMENT_BYTES_MAX, COMMAND_ARGUMENTS_MAX, PROBE_SPAN_MAX};
use contract::resources::{BackendKind, DeploymentSpec, EnvValue, SimulatedSpec};

use super::Check;
use crate::sentence::nearest;

/// What is known of a backend's documents.
#[derive(Debug)]
pub struct BackendRules {
    /// Its name.
    pub kind: BackendKind,
    /// The field of the spec that is for this backend alone.
    pub part: Option<Part>,
    /// What is wrong with a spec for this backend; pointers begin with `/spec`.
    pub check: fn(&DeploymentSpec) -> Vec<Finding>,
}

/// A field of the spec that is for one backend alone.
#[derive(Debug)]
pub struct Part {
    /// The field of the spec, as it is written.
    pub field: &'static str,
    /// Whether a spec has it.
    pub is_given: fn(&DeploymentSpec) -> bool,
}

/// The backends that this release knows, a row each.
pub const BACKENDS: &[BackendRules] = &[
    BackendRules {
        kind: BackendKind::PROCESS,
        part: None,
        check: process,
    },
    BackendRules {
        kind: BackendKind::SIMULATED,
        part: Some(Part {
            field: "simulated",
            is_given: |spec| spec.simulated.is_some(),
        }),
        check: simulated,
    },
];

/// Names of backends that a later release will have.
const NOT_YET: &[&str] = &["container", "kubernetes"];

/// The backends that a document may name.
#[derive(Clone, Debug)]
pub struct Backends {
    rules: &'static [BackendRules],
    others: Others,
}

/// What becomes of backends without rules.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Others {
    Refused,
    /// Those that nodes offer may be named.
    Offered(BTreeSet<BackendKind>),
    /// Somebody else knows.
    Passed,
}

impl Backends {
    /// Those of this release, where nothing is known of nodes.
    pub fn known() -> Self {
        Self::of(BACKENDS)
    }

    /// Those with these rules.
    pub fn of(rules: &'static [BackendRules]) -> Self {
        Self {
            rules,
            others: Others::Refused,
        }
    }

    /// Those of this release, and what the nodes offer.
    pub fn offered(kinds: BTreeSet<BackendKind>) -> Self {
        Self {
            others: Others::Offered(kinds),
            ..Self::known()
        }
    }

    /// Those of this release; others are for a server to know.
    pub fn left_to_a_server() -> Self {
        Self {
            others: Others::Passed,
            ..Self::known()
        }
    }

    pub(crate) fn check(&self, spec: &DeploymentSpec) -> Vec<Finding> {
        let row = self.rules.iter().find(|row| row.kind == spec.backend);
        let mut findings = match row {
            Some(row) => (row.check)(spec),
            None => self.unknown(&spec.backend),
        };
        // A misspelt backend does not make its own part wrong.
        let meant = row.map_or_else(|| self.near(&spec.backend), |row| Some(&row.kind));
        let foreign = self
            .rules
            .iter()
            .filter(|row| Some(&row.kind) != meant)
            .filter_map(|row| Some((row, row.part.as_ref()?)))
            .filter(|(_, part)| (part.is_given)(spec));
        findings.extend(foreign.map(|(row, part)| {
            let (field, kind) = (part.field, &row.kind);
            let detail = format!(
                "`{field}` belongs to the {kind} backend; remove it, or set `backend: {kind}`"
            );
            Finding::new(format!("/spec/{field}"), detail)
        }));
        findings
    }

    fn near(&self, kind: &BackendKind) -> Option<&BackendKind> {
        let names: Vec<&str> = self.rules.iter().map(|row| row.kind.as_str()).collect();
        let near = nearest(kind.as_str(), &names)?;
        let kinds = self.rules.iter().map(|row| &row.kind);
        kinds.into_iter().find(|kind| kind.as_str() == near)
    }

    fn unknown(&self, kind: &BackendKind) -> Vec<Finding> {
        let known = self.rules.iter().map(|row| &row.kind);
        let detail = match &self.others {
            Others::Passed => return Vec::new(),
            Others::Offered(offered) if offered.contains(kind) => return Vec::new(),
            Others::Offered(offered) if !offered.is_empty() => format!(
                "no node here offers the backend `{kind}`; use one that is offered: {}",
                listed(offered)
            ),
            _ if NOT_YET.contains(&kind.as_str()) => {
                let known: Vec<String> = known.map(|kind| format!("`{kind}`")).collect();
                let known = known.join(" or ");
                format!("the {kind} backend is not available yet; use {known}")
            }
            _ => format!("`{kind}` is not known here; use one of: {}", listed(known)),
        };
        vec![Finding::new(POINTER, detail)]
    }
}

/// Where a document names its backend.
pub(crate) const POINTER: &str = "/spec/backend";

fn listed<'a>(kinds: impl IntoIterator<Item = &'a BackendKind>) -> String {
    let names: Vec<&str> = kinds.into_iter().map(BackendKind::as_str).collect();
    names.join(", ")
}

fn process(spec: &DeploymentSpec) -> Vec<Finding> {
    let mut check = Check::default();
    if spec.command.is_empty() {
        let detail = "the process backend needs a command; write a list such as [\"./scorer\", \"--port\", \"{port}\"]";
        check.fault("/spec/command", detail);
        return check.findings;
    }
    let arguments = spec.command.len();
    check.require(arguments <= COMMAND_ARGUMENTS_MAX, "/spec/command", || {
        format!("{arguments} arguments are too many; keep at most {COMMAND_ARGUMENTS_MAX}")
    });
    check.require(!spec.command[0].is_empty(), "/spec/command/0", || {
        "the program is empty text; name the program to run".into()
    });
    for (index, argument) in spec.command.iter().enumerate() {
        let pointer = format!("/spec/command/{index}");
        check.require(argument.len() <= ARGUMENT_BYTES_MAX, &pointer, || {
            format!(
                "an argument has at most {ARGUMENT_BYTES_MAX} bytes; put long texts into a file"
            )
        });
        check.require(!argument.contains('\0'), &pointer, || {
            "an argument holds no NUL character; remove it".into()
        });
    }
    check.require(takes_port(spec), "/spec/command", || {
        "the instance is not told its port; put {port} into an argument or into a value under env".into()
    });
    check.findings
}

fn simulated(spec: &DeploymentSpec) -> Vec<Finding> {
    let mut check = Check::default();
    if !spec.command.is_empty() {
        let detail = "the simulated backend runs no command; remove it, or set `backend: process`";
        check.fault("/spec/command", detail);
    }
    let SimulatedSpec {
        start_delay,
        start_failures_per_10000,
        capacity_per_second,
        ..
    } = spec.simulated.clone().unwrap_or_default();
    check.at_most(start_delay, PROBE_SPAN_MAX, "/spec/simulated/startDelay");
    check.require(
        start_failures_per_10000 <= 10_000,
        "/spec/simulated/startFailuresPer10000",
        || format!("{start_failures_per_10000} of 10,000 starts cannot fail; use 0 to 10000"),
    );
    check.require(
        capacity_per_second >= 1,
        "/spec/simulated/capacityPerSecond",
        || "an instance that serves nothing cannot be simulated; use 1 or more".into(),
    );
    check.findings
}

/// Whether the command or its environment says on which port to listen.
fn takes_port(spec: &DeploymentSpec) -> bool {
    let in_env =
        |value: &EnvValue| matches!(value, EnvValue::Plain(text) if text.contains("{port}"));
    spec.command
        .iter()
        .any(|argument| argument.contains("{port}"))
        || spec.env.values().any(in_env)
}
