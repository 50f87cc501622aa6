//! `describe`: one resource with its related resources, for people.

use serde_json::Value;

use super::decisions;
use super::error::CliError;
use super::get::newest_failure;
use super::kinds::{Kind, KindParser};
use super::kinds::{path_of, table};
use super::names::Scope;
use super::output::{Screen, items, print, text, yaml};
use crate::client::Client;

/// Show one resource with its state, instances and latest decisions
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock describe endpoint iris
  penstock describe deployment iris/blue
  penstock describe autoscale iris/blue")]
pub struct DescribeArgs {
    /// What it is: endpoint, deployment, autoscale or decision
    #[arg(value_name = "KIND", hide_possible_values = true, value_parser = KindParser { command: "describe" })]
    kind: Kind,
    /// ENDPOINT or ENDPOINT/DEPLOYMENT
    name: String,
}

/// Number of latest decisions shown.
const DECISIONS: u32 = 5;

pub async fn describe(
    client: &Client,
    args: &DescribeArgs,
    screen: Screen,
) -> Result<(), CliError> {
    if matches!(args.kind, Kind::Instances | Kind::Access) {
        return Err(CliError::Usage(format!(
            "{} has nothing beyond its row: use `penstock get`",
            args.kind.singular()
        )));
    }
    let path = path_of(args.kind, Some(&args.name))?;
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    let body = client.get(&path, &[]).await?.json()?;
    let mut sections = document_sections(args.kind, &args.name, &body);
    if let Ok(scope) = args.name.parse::<Scope>() {
        sections.push_str(&related_sections(client, args.kind, &scope, screen).await?);
    }
    print(&sections)
}

fn document_sections(kind: Kind, name: &str, body: &Value) -> String {
    let mut out = format!("{} {name}\n", kind.singular());
    for part in ["metadata", "status", "spec"] {
        if let Some(value) = body.get(part).filter(|value| !value.is_null()) {
            out.push_str(&format!("\n{part}:\n{}", indented(&yaml(value))));
        }
    }
    if body.get("metadata").is_none() {
        out.push_str(&format!("\n{}", indented(&yaml(body))));
    }
    out
}

fn indented(text: &str) -> String {
    let lines = text.lines().map(|line| format!("  {line}\n"));
    lines.collect()
}

/// Deployments, instances and decisions under a title each.
async fn related_sections(
    client: &Client,
    kind: Kind,
    scope: &Scope,
    screen: Screen,
) -> Result<String, CliError> {
    let endpoint = scope.endpoint.to_string();
    let of = [
        ("endpoint", Some(endpoint.clone())),
        (
            "deployment",
            scope.deployment.as_ref().map(ToString::to_string),
        ),
    ];
    let mut out = String::new();
    let mut section = |title: &str, shown: String| {
        out.push_str(&format!("\n{title}:\n{}", indented(&shown)));
    };
    if kind == Kind::Endpoints {
        let path = ["v1", "endpoints", &endpoint, "deployments"];
        let body = client.get(&path, &[]).await?.json()?;
        let rows = items(&body);
        section(
            "deployments",
            table(Kind::Deployments, &rows, screen.now).render(false),
        );
    }
    let instances = items(&client.get(&["v1", "instances"], &of).await?.json()?);
    if !instances.is_empty() {
        section(
            "instances",
            table(Kind::Instances, &instances, screen.now).render(false),
        );
        if let Some(failure) = newest_failure(&instances) {
            section("newest failure", failure);
        }
    }
    let [endpoint, deployment] = of;
    let query = [endpoint, deployment, ("limit", Some(DECISIONS.to_string()))];
    let latest = items(&client.get(&["v1", "decisions"], &query).await?.json()?);
    if !latest.is_empty() {
        section("latest decisions", decisions::table(&latest).render(false));
        section(
            "explain the newest with",
            format!("penstock explain {}", text(&latest[0], "/id")),
        );
    }
    Ok(out)
}
