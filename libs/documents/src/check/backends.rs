//! Rules for a deployment's document, by backend.
//!
//! Invariant: each known backend has a row in [`BACKENDS`]. Any other is rejected by name, unless nodes
//! offer it; then the nodes check the document.

use std::collections::BTreeSet;

use contract::problem::Finding;
use contract::resources::limits::{ARGUMENT_BYTES_MAX, COMMAND_ARGUMENTS_MAX, PROBE_SPAN_MAX};
use contract::resources::{BackendKind, DeploymentSpec, EnvValue, SimulatedSpec};

use super::Checker;
use crate::message::nearest;
use crate::presets;

/// The rules for documents of one backend.
#[derive(Debug)]
pub struct BackendRules {
    /// The name of the backend.
    pub kind: BackendKind,
    /// The field of the spec that only this backend uses.
    pub field: Option<BackendField>,
    /// Returns what is wrong with a spec for this backend. Pointers begin with `/spec`.
    pub check: fn(&DeploymentSpec) -> Vec<Finding>,
}

/// A field of the spec that only one backend uses.
#[derive(Debug)]
pub struct BackendField {
    /// The name of the field in the document.
    pub name: &'static str,
    /// Whether a spec sets it.
    pub is_set: fn(&DeploymentSpec) -> bool,
}

/// The backends that this release supports, one row each.
pub const BACKENDS: &[BackendRules] = &[
    BackendRules {
        kind: BackendKind::PROCESS,
        field: None,
        check: process,
    },
    BackendRules {
        kind: BackendKind::SIMULATED,
        field: Some(BackendField {
            name: "simulated",
            is_set: |spec| spec.simulated.is_some(),
        }),
        check: simulated,
    },
];

/// Names of backends of later releases.
const UNAVAILABLE: &[&str] = &["container", "kubernetes"];

/// The backends that a document may use.
#[derive(Clone, Debug)]
pub struct Backends {
    rules: &'static [BackendRules],
    unlisted: UnlistedBackends,
}

/// How backends without rules are treated.
#[derive(Clone, Debug, PartialEq, Eq)]
enum UnlistedBackends {
    Rejected,
    /// Accepted if a node offers them.
    Offered(BTreeSet<BackendKind>),
    /// Accepted here; the server checks them.
    Accepted,
}

impl Backends {
    /// The backends of this release, where the nodes are not known.
    pub fn known() -> Self {
        Self::of(BACKENDS)
    }

    /// The backends with the given rules.
    pub fn of(rules: &'static [BackendRules]) -> Self {
        Self {
            rules,
            unlisted: UnlistedBackends::Rejected,
        }
    }

    /// The backends of this release and those that nodes offer.
    pub fn offered(kinds: BTreeSet<BackendKind>) -> Self {
        Self {
            unlisted: UnlistedBackends::Offered(kinds),
            ..Self::known()
        }
    }

    /// The backends of this release; any other is left to the server to check.
    pub fn deferred_to_server() -> Self {
        Self {
            unlisted: UnlistedBackends::Accepted,
            ..Self::known()
        }
    }

    pub(crate) fn check(&self, spec: &DeploymentSpec) -> Vec<Finding> {
        let row = self.rules.iter().find(|row| row.kind == spec.backend);
        let mut findings = match row {
            Some(row) => (row.check)(spec),
            None => self.unknown(&spec.backend),
        };
        // A field is not misplaced if only the name of its backend is misspelled.
        let intended = row.map_or_else(|| self.closest(&spec.backend), |row| Some(&row.kind));
        let misplaced = self
            .rules
            .iter()
            .filter(|row| Some(&row.kind) != intended)
            .filter_map(|row| Some((row, row.field.as_ref()?)))
            .filter(|(_, field)| (field.is_set)(spec));
        findings.extend(misplaced.map(|(row, field)| {
            let (name, kind) = (field.name, &row.kind);
            let detail = format!(
                "`{name}` belongs to the {kind} backend; remove it, or set `backend: {kind}`"
            );
            Finding::new(format!("/spec/{name}"), detail)
        }));
        findings
    }

    fn closest(&self, kind: &BackendKind) -> Option<&BackendKind> {
        let names: Vec<&str> = self.rules.iter().map(|row| row.kind.as_str()).collect();
        let closest = nearest(kind.as_str(), &names)?;
        let kinds = self.rules.iter().map(|row| &row.kind);
        kinds.into_iter().find(|kind| kind.as_str() == closest)
    }

    fn unknown(&self, kind: &BackendKind) -> Vec<Finding> {
        let known = self.rules.iter().map(|row| &row.kind);
        let detail = match &self.unlisted {
            UnlistedBackends::Accepted => return Vec::new(),
            UnlistedBackends::Offered(offered) if offered.contains(kind) => return Vec::new(),
            UnlistedBackends::Offered(offered) if !offered.is_empty() => format!(
                "no node here offers the backend `{kind}`; use one that is offered: {}",
                join_names(offered)
            ),
            _ if UNAVAILABLE.contains(&kind.as_str()) => {
                let known: Vec<String> = known.map(|kind| format!("`{kind}`")).collect();
                let known = known.join(" or ");
                format!("the {kind} backend is not available yet; use {known}")
            }
            _ => format!(
                "`{kind}` is not a known backend; use one of: {}",
                join_names(known)
            ),
        };
        vec![Finding::new(BACKEND_POINTER, detail)]
    }
}

/// The pointer to a deployment's backend.
pub(crate) const BACKEND_POINTER: &str = "/spec/backend";

fn join_names<'a>(kinds: impl IntoIterator<Item = &'a BackendKind>) -> String {
    let names: Vec<&str> = kinds.into_iter().map(BackendKind::as_str).collect();
    names.join(", ")
}

fn process(spec: &DeploymentSpec) -> Vec<Finding> {
    let mut checker = Checker::default();
    if spec.command.is_empty() {
        let detail = "the process backend needs a command; write a list such as [\"./scorer\", \"--port\", \"{port}\"]";
        checker.report("/spec/command", detail);
        return checker.findings;
    }
    let arguments = spec.command.len();
    checker.require(arguments <= COMMAND_ARGUMENTS_MAX, "/spec/command", || {
        format!("{arguments} arguments are too many; keep at most {COMMAND_ARGUMENTS_MAX}")
    });
    checker.require(!spec.command[0].is_empty(), "/spec/command/0", || {
        "the program is empty text; name the program to run".into()
    });
    for (index, argument) in spec.command.iter().enumerate() {
        let pointer = format!("/spec/command/{index}");
        checker.require(argument.len() <= ARGUMENT_BYTES_MAX, &pointer, || {
            format!(
                "an argument has at most {ARGUMENT_BYTES_MAX} bytes; put long texts into a file"
            )
        });
        checker.require(!argument.contains('\0'), &pointer, || {
            "an argument must not contain NUL characters; remove them".into()
        });
    }
    checker.require(references_port(spec), "/spec/command", || {
        let line = presets::line_with_port(spec);
        let line = line.map_or_else(String::new, |line| format!(", or add `{line}`, which does"));
        format!("the instance does not receive its port; put {{port}} into an argument or into a value under env, or $PORT into a shell's{line}")
    });
    checker.findings
}

fn simulated(spec: &DeploymentSpec) -> Vec<Finding> {
    let mut checker = Checker::default();
    if !spec.command.is_empty() {
        let detail = "the simulated backend runs no command; remove it, or set `backend: process`";
        checker.report("/spec/command", detail);
    }
    let SimulatedSpec {
        start_delay,
        start_failures_per_10000,
        capacity_per_second,
        ..
    } = spec.simulated.clone().unwrap_or_default();
    checker.at_most(start_delay, PROBE_SPAN_MAX, "/spec/simulated/startDelay");
    checker.require(
        start_failures_per_10000 <= 10_000,
        "/spec/simulated/startFailuresPer10000",
        || format!("{start_failures_per_10000} of 10,000 starts cannot fail; use 0 to 10000"),
    );
    checker.require(
        capacity_per_second >= 1,
        "/spec/simulated/capacityPerSecond",
        || "an instance that serves nothing cannot be simulated; use 1 or more".into(),
    );
    checker.findings
}

/// Whether the command or an environment variable contains the `{port}` placeholder, or the command the
/// variable that has the port, which a shell replaces.
fn references_port(spec: &DeploymentSpec) -> bool {
    let in_env =
        |value: &EnvValue| matches!(value, EnvValue::Plain(text) if text.contains("{port}"));
    let in_argument = |argument: &String| {
        ["{port}", "$PORT", "${PORT}"]
            .iter()
            .any(|port| argument.contains(port))
    };
    spec.command.iter().any(in_argument) || spec.env.values().any(in_env)
}
