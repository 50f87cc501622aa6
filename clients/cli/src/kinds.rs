//! Kinds of resources: their command line names, their paths in the API and their tables.

use clap::ValueEnum;
use clap::builder::{EnumValueParser, PossibleValue, TypedValueParser};
use clap::error::ErrorKind;
use contract::ids::DeploymentRef;
use contract::time::Timestamp;
use serde_json::Value;

use super::decisions;
use super::error::CliError;
use super::names::{Scope, full_name};
use super::output::{Table, age, shares, text};

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    #[value(name = "endpoints", aliases = ["endpoint", "ep"])]
    Endpoints,
    #[value(name = "deployments", aliases = ["deployment", "dep"])]
    Deployments,
    #[value(name = "autoscales", aliases = ["autoscale", "as"])]
    Autoscales,
    #[value(name = "instances", aliases = ["instance", "inst"])]
    Instances,
    #[value(name = "decisions", aliases = ["decision"])]
    Decisions,
    #[value(name = "access", aliases = ["tokens", "token"])]
    Access,
}

impl Kind {
    /// The word for several of them, as in `no tokens yet`.
    pub const fn plural(self) -> &'static str {
        match self {
            Self::Endpoints => "endpoints",
            Self::Deployments => "deployments",
            Self::Autoscales => "autoscales",
            Self::Instances => "instances",
            Self::Decisions => "decisions",
            Self::Access => "tokens",
        }
    }

    /// The singular.
    pub const fn singular(self) -> &'static str {
        match self {
            Self::Endpoints => "endpoint",
            Self::Deployments => "deployment",
            Self::Autoscales => "autoscale",
            Self::Instances => "instance",
            Self::Decisions => "decision",
            Self::Access => "token",
        }
    }
}

/// For clap: a kind, with a hint if a name was typed in its place.
#[derive(Clone, Debug)]
pub struct KindParser {
    /// `get`, `describe` or `delete`.
    pub command: &'static str,
}

impl TypedValueParser for KindParser {
    type Value = Kind;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<Kind, clap::Error> {
        let known = EnumValueParser::<Kind>::new().parse_ref(command, argument, value);
        let typed = value.to_string_lossy();
        known.map_err(|error| match typed.parse::<Scope>() {
            Ok(scope) if scope.deployment.is_some() => self.hint(command, &typed, "deployment"),
            _ => error,
        })
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let kinds = Kind::value_variants().iter();
        Some(Box::new(kinds.filter_map(ValueEnum::to_possible_value)))
    }
}

impl KindParser {
    fn hint(&self, command: &clap::Command, typed: &str, kind: &str) -> clap::Error {
        let message = format!(
            "`{typed}` is a name, and a kind comes before it: write `penstock {} {kind} {typed}`\n",
            self.command
        );
        clap::Error::raw(ErrorKind::InvalidValue, message).with_cmd(command)
    }
}

/// The path of a resource in the API.
pub fn path_of(kind: Kind, name: Option<&str>) -> Result<Vec<String>, CliError> {
    let path = |parts: &[&str]| parts.iter().map(|part| (*part).to_owned()).collect();
    let deployment = |name: &str| -> Result<DeploymentRef, CliError> { full_name(name) };
    Ok(match (kind, name) {
        (Kind::Endpoints, None) => path(&["v1", "endpoints"]),
        (Kind::Endpoints, Some(name)) => path(&["v1", "endpoints", name]),
        (Kind::Deployments, Some(name)) => {
            let of = deployment(name)?;
            let (endpoint, name) = (of.endpoint.as_str(), of.deployment.as_str());
            path(&["v1", "endpoints", endpoint, "deployments", name])
        }
        (Kind::Deployments, None) => path(&["v1", "deployments"]),
        (Kind::Autoscales, None) => path(&["v1", "autoscale"]),
        (Kind::Autoscales, Some(name)) => {
            let of = deployment(name)?;
            path(&[
                "v1",
                "autoscale",
                of.endpoint.as_str(),
                of.deployment.as_str(),
            ])
        }
        (Kind::Access, None) => path(&["v1", "access"]),
        (Kind::Access, Some(name)) => path(&["v1", "access", name]),
        (Kind::Instances, None) => path(&["v1", "instances"]),
        (Kind::Decisions, None) => path(&["v1", "decisions"]),
        (Kind::Decisions, Some(id)) => path(&["v1", "decisions", id]),
        (kind, _) => {
            return Err(CliError::Usage(format!(
                "an {} cannot be named here",
                kind.singular()
            )));
        }
    })
}

/// The table of a kind.
pub fn table(kind: Kind, rows: &[Value], now: Timestamp) -> Table {
    match kind {
        Kind::Endpoints => endpoints(rows, now),
        Kind::Deployments => deployments(rows, now),
        Kind::Autoscales => autoscales(rows),
        Kind::Instances => instances(rows, now),
        Kind::Decisions => decisions::table(rows),
        Kind::Access => access(rows, now),
    }
}

fn endpoints(rows: &[Value], now: Timestamp) -> Table {
    let mut table = Table::new(&[
        "NAME",
        "STATE",
        "AUTH",
        "TRAFFIC",
        "MIRROR",
        "SCORING URI",
        "AGE",
    ]);
    for row in rows {
        table.row(vec![
            text(row, "/metadata/name"),
            text(row, "/status/provisioningState"),
            text(row, "/spec/auth"),
            shares(row.pointer("/spec/traffic")),
            shares(row.pointer("/spec/mirror")),
            text(row, "/status/scoringUri"),
            age(&text(row, "/metadata/createdAt"), now),
        ]);
    }
    table
}

/// `2/3`: ready of wanted instances.
pub fn ready_ratio(row: &Value) -> String {
    let (ready, wanted) = (
        text(row, "/status/instances/ready"),
        text(row, "/status/instances/wanted"),
    );
    match (ready.is_empty(), wanted.is_empty()) {
        (true, _) => String::new(),
        (false, true) => ready,
        (false, false) => format!("{ready}/{wanted}"),
    }
}

fn percent(share: &str) -> String {
    match share {
        "" => String::new(),
        share => format!("{share}%"),
    }
}

/// `ENDPOINT/DEPLOYMENT` of a deployment's document.
pub fn name_of_deployment(row: &Value) -> String {
    format!(
        "{}/{}",
        text(row, "/metadata/endpoint"),
        text(row, "/metadata/name")
    )
}

fn deployments(rows: &[Value], now: Timestamp) -> Table {
    let mut table = Table::new(&[
        "NAME",
        "STATE",
        "AVAILABLE",
        "READY",
        "TRAFFIC",
        "BACKEND",
        "INSTANCE TYPE",
        "AGE",
    ]);
    for row in rows {
        table.row(vec![
            name_of_deployment(row),
            text(row, "/status/provisioningState"),
            text(row, "/status/available/reason"),
            ready_ratio(row),
            percent(&text(row, "/status/traffic")),
            text(row, "/spec/backend"),
            text(row, "/spec/instanceType"),
            age(&text(row, "/metadata/createdAt"), now),
        ]);
    }
    table
}

fn autoscales(rows: &[Value]) -> Table {
    let mut table = Table::new(&[
        "NAME", "MODE", "PROFILES", "MIN", "MAX", "RULES", "PIN", "PAUSED",
    ]);
    for row in rows {
        let profiles = row.pointer("/spec/profiles").and_then(Value::as_array);
        let profiles = profiles.map(Vec::as_slice).unwrap_or_default();
        let capacity = |pointer: &'static str| {
            profiles
                .iter()
                .filter_map(move |profile| profile.pointer(pointer).and_then(Value::as_u64))
        };
        let show = |count: Option<u64>| count.map(|count| count.to_string()).unwrap_or_default();
        let rules: usize = profiles
            .iter()
            .filter_map(|profile| profile.get("rules").and_then(Value::as_array))
            .map(Vec::len)
            .sum();
        table.row(vec![
            format!(
                "{}/{}",
                text(row, "/spec/target/endpoint"),
                text(row, "/spec/target/deployment")
            ),
            text(row, "/spec/mode"),
            names_of(profiles),
            show(capacity("/capacity/min").min()),
            show(capacity("/capacity/max").max()),
            rules.to_string(),
            text(row, "/status/pin/instances"),
            paused(row),
        ]);
    }
    table
}

fn names_of(profiles: &[Value]) -> String {
    let names: Vec<String> = profiles
        .iter()
        .map(|profile| text(profile, "/name"))
        .collect();
    names.join(", ")
}

/// The directions that are paused.
fn paused(row: &Value) -> String {
    let flag = |pointer| row.pointer(pointer).and_then(Value::as_bool) == Some(true);
    match (
        flag("/status/pause/scaleIn"),
        flag("/status/pause/scaleOut"),
    ) {
        (true, true) => "in, out".into(),
        (true, false) => "in".into(),
        (false, true) => "out".into(),
        (false, false) => String::new(),
    }
}

fn instances(rows: &[Value], now: Timestamp) -> Table {
    let mut table = Table::new(&["ID", "DEPLOYMENT", "STATE", "NODE", "ADDRESS", "PID", "AGE"]);
    for row in rows {
        table.row(vec![
            text(row, "/id"),
            format!("{}/{}", text(row, "/endpoint"), text(row, "/deployment")),
            instance_state(row, now),
            text(row, "/node"),
            text(row, "/address"),
            text(row, "/pid"),
            age(&text(row, "/requestedAt"), now),
        ]);
    }
    table
}

/// The state, and for a start that takes long since when and what it waits for.
fn instance_state(row: &Value, now: Timestamp) -> String {
    let (state, detail) = (text(row, "/state"), text(row, "/detail"));
    if state != "starting" || detail.is_empty() || !text(row, "/readyAt").is_empty() {
        return state;
    }
    let since = age(&text(row, "/startedAt"), now);
    format!("{state} {since}, {detail}")
}

fn access(rows: &[Value], now: Timestamp) -> Table {
    let mut table = Table::new(&["NAME", "ROLE", "EXPIRES", "GRANTED BY", "AGE"]);
    for row in rows {
        table.row(vec![
            text(row, "/name"),
            text(row, "/role"),
            text(row, "/expires"),
            text(row, "/grantedBy"),
            age(&text(row, "/grantedAt"), now),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_that_takes_long_says_for_how_long_and_what_it_waits_for() {
        let now: Timestamp = "2026-10-10T12:00:36.000Z".parse().unwrap();
        let starting = serde_json::json!({"state": "starting", "startedAt": "2026-10-10T12:00:00.000Z",
            "detail": "port 4123 is closed"});
        assert_eq!(
            instance_state(&starting, now),
            "starting 36s, port 4123 is closed"
        );
        let ready = serde_json::json!({"state": "ready"});
        assert_eq!(instance_state(&ready, now), "ready");
    }

    #[test]
    fn get_supports_every_kind_of_document() {
        for kind in contract::resources::KINDS {
            let word = kind.to_lowercase();
            let is_known = Kind::value_variants()
                .iter()
                .any(|known| known.singular() == word);
            assert!(
                is_known,
                "`penstock get` does not know `{word}`: add it to `Kind`"
            );
        }
    }
}
