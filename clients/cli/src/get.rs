//! `get` and `delete`: resources by kind and name.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::error::CliError;
use super::kinds::{Kind, KindParser, name_of_deployment, path_of, table};
use super::names::Scope;
use super::output::{Format, Screen, items, print, print_notice, text, yaml};
use crate::client::{ApiResponse, Client, ClientError};

/// Show resources: a list, or one by its name
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock get endpoints
  penstock get deployments iris
  penstock get deployment iris/blue -o yaml
  penstock get instances iris/blue
  penstock get instances --all
  penstock get autoscale iris/blue -o json
  penstock get decisions iris --limit 20
  penstock get access

Kinds: endpoints (endpoint, ep), deployments, autoscales, instances, decisions, access (tokens).
The table of instances shows live ones, and failed ones until a replacement is started; --all shows
terminated ones too, as -o json and -o yaml always do.")]
pub struct GetArgs {
    /// What to show: endpoints, deployments, autoscales, instances, decisions or access
    #[arg(value_name = "KIND", hide_possible_values = true, value_parser = KindParser { command: "get" })]
    kind: Kind,
    /// ENDPOINT, ENDPOINT/DEPLOYMENT, or the id of an instance or decision
    name: Option<String>,
    /// Output format
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
    /// Include terminated instances
    #[arg(long)]
    all: bool,
    /// Maximum number of rows
    #[arg(long, value_name = "N")]
    limit: Option<u32>,
}

/// Delete a resource
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock delete deployment iris/green
  penstock delete autoscale iris/blue
  penstock delete endpoint iris            with its deployments

A deployment with traffic is not deleted: take its share away first (penstock traffic).")]
pub struct DeleteArgs {
    /// What it is: endpoint, deployment, autoscale or access (a token)
    #[arg(value_name = "KIND", hide_possible_values = true, value_parser = KindParser { command: "delete" })]
    kind: Kind,
    /// ENDPOINT or ENDPOINT/DEPLOYMENT
    name: String,
}

pub async fn get(client: &Client, args: &GetArgs, screen: Screen) -> Result<(), CliError> {
    if args.all && args.kind != Kind::Instances {
        let usage = "--all applies to instances only: lists of other kinds are complete";
        return Err(CliError::Usage(usage.into()));
    }
    let filtered = args.kind == Kind::Instances && !args.all;
    let fetched = match (args.output, args.limit) {
        // What is filtered here must be fetched completely to apply the limit.
        (Format::Table, limit) if limit.is_none() && args.kind != Kind::Decisions || filtered => {
            fetch_all_pages(client, args).await?
        }
        _ => fetch(client, args, args.limit, None).await?,
    };
    let shown = match args.output {
        Format::Json => fetched.text,
        Format::Yaml => yaml(&fetched.body),
        Format::Table => {
            let mut rows = items(&fetched.body);
            let found = rows.len();
            if filtered {
                rows = retain_live(rows, args);
            }
            if rows.is_empty() {
                print_notice(&empty_message(args, found));
                return Ok(());
            }
            if args.kind == Kind::Instances
                && let Some(failure) = newest_failure(&rows)
            {
                print_notice(&failure);
            }
            if args.kind == Kind::Deployments {
                unavailable(&rows)
                    .iter()
                    .for_each(|line| print_notice(line));
            }
            table(args.kind, &rows, screen.now).render(screen.tty)
        }
    };
    print(&shown)
}

/// The message instead of an empty table: there is nothing, or nothing by that name.
fn empty_message(args: &GetArgs, hidden: usize) -> String {
    if hidden > 0 {
        return format!("no live instances; --all shows {hidden} terminated");
    }
    let kind = args.kind.plural();
    match &args.name {
        Some(name) => format!("no {kind} of {name} yet"),
        None => format!("no {kind} yet"),
    }
}

/// The newest failure that has a reason.
pub fn newest_failure(instances: &[Value]) -> Option<String> {
    let mut failed = instances
        .iter()
        .filter(|row| text(row, "/state") == "failed" && !text(row, "/detail").is_empty());
    let newest = failed.next()?;
    let (id, detail) = (text(newest, "/id"), text(newest, "/detail"));
    Some(format!("{id} failed: {detail}"))
}

/// Deployments whose newest failure is shown; the table has the others too.
const UNAVAILABLE_MAX: usize = 10;

/// The deployments that lack instances because these fail, each with the newest failure.
fn unavailable(deployments: &[Value]) -> Vec<String> {
    let of = |row: &Value, field: &str| text(row, &format!("/status/available/{field}"));
    let mut lines: Vec<String> = deployments
        .iter()
        .filter(|row| matches!(of(row, "reason").as_str(), "Failing" | "Degraded"))
        .map(|row| {
            let (reason, message) = (of(row, "reason"), of(row, "message"));
            format!("{} is {reason}: {message}", name_of_deployment(row))
        })
        .collect();
    let hidden = lines.len().saturating_sub(UNAVAILABLE_MAX);
    lines.truncate(UNAVAILABLE_MAX);
    if hidden > 0 {
        lines.push(format!(
            "{hidden} more deployments lack instances; see AVAILABLE"
        ));
    }
    lines
}

/// Removes terminated instances: stopped ones, and failed ones with a replacement requested later, one for
/// one.
fn retain_live(rows: Vec<Value>, args: &GetArgs) -> Vec<Value> {
    if args
        .name
        .as_deref()
        .is_some_and(|id| rows.iter().any(|row| text(row, "/id") == id))
    {
        return rows;
    }
    let mut kept = Vec::new();
    // Newest first: later requests have been seen already.
    let mut requested_later: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for row in rows {
        let requested = requested_later
            .entry(text(&row, "/deploymentUid"))
            .or_default();
        let is_live = match text(&row, "/state").as_str() {
            "stopped" => false,
            "failed" => {
                let ended = text(&row, "/endedAt");
                let replacement = requested.iter().position(|at| *at >= ended);
                replacement.map(|index| requested.remove(index)).is_none()
            }
            _ => true,
        };
        requested.push(text(&row, "/requestedAt"));
        if is_live {
            kept.push(row);
        }
    }
    kept.truncate(args.limit.map_or(usize::MAX, |limit| limit as usize));
    kept
}

/// A body, with the exact text that the API sent.
struct Fetched {
    text: String,
    body: Value,
}

impl Fetched {
    fn of(answer: &ApiResponse) -> Result<Self, ClientError> {
        Ok(Self {
            text: answer.text.clone(),
            body: answer.json()?,
        })
    }

    fn from_body(body: Value) -> Self {
        Self {
            text: body.to_string(),
            body,
        }
    }
}

/// All pages of a list, for table output. Programs get one page and its cursor.
async fn fetch_all_pages(client: &Client, args: &GetArgs) -> Result<Fetched, CliError> {
    let mut fetched = fetch(client, args, None, None).await?;
    let mut rows = items(&fetched.body);
    loop {
        let cursor = text(&fetched.body, "/nextCursor");
        if cursor.is_empty() {
            return Ok(Fetched::from_body(json!({"items": rows})));
        }
        fetched = fetch(client, args, None, Some(cursor)).await?;
        rows.extend(items(&fetched.body));
    }
}

async fn fetch(
    client: &Client,
    args: &GetArgs,
    limit: Option<u32>,
    cursor: Option<String>,
) -> Result<Fetched, CliError> {
    let limit = [
        ("limit", limit.map(|limit| limit.to_string())),
        ("cursor", cursor),
    ];
    let name = args.name.as_deref();
    match (args.kind, name) {
        (Kind::Deployments, Some(name)) if !name.contains('/') => {
            let path = ["v1", "endpoints", name, "deployments"];
            Ok(Fetched::of(&client.get(&path, &limit).await?)?)
        }
        (Kind::Instances | Kind::Decisions, name) => {
            let collection = if args.kind == Kind::Instances {
                "instances"
            } else {
                "decisions"
            };
            match name.map(str::parse::<Scope>) {
                Some(Err(_)) | None => by_id(client, args.kind, collection, name, &limit).await,
                Some(Ok(scope)) => {
                    let [limit, cursor] = limit;
                    let named = scope.clone();
                    let query = [
                        ("endpoint", Some(scope.endpoint.to_string())),
                        ("deployment", scope.deployment.map(|name| name.to_string())),
                        limit,
                        cursor,
                    ];
                    let fetched = Fetched::of(&client.get(&["v1", collection], &query).await?)?;
                    let is_first_page = query[3].1.is_none();
                    if !items(&fetched.body).is_empty() || !is_first_page {
                        return Ok(fetched);
                    }
                    // Ids of instances look like names of endpoints.
                    let may_be_id = query[1].1.is_none();
                    if args.kind == Kind::Instances
                        && may_be_id
                        && let Ok(found) = by_id(client, args.kind, collection, name, &[]).await
                    {
                        return Ok(found);
                    }
                    named.must_exist(client).await?;
                    Ok(fetched)
                }
            }
        }
        (Kind::Access, Some(name)) => {
            by_id(client, Kind::Access, "access", Some(name), &limit).await
        }
        (kind, name) => {
            let path = path_of(kind, name)?;
            let path: Vec<&str> = path.iter().map(String::as_str).collect();
            Ok(Fetched::of(&client.get(&path, &limit).await?)?)
        }
    }
}

async fn by_id(
    client: &Client,
    kind: Kind,
    collection: &str,
    id: Option<&str>,
    limit: &[(&str, Option<String>)],
) -> Result<Fetched, CliError> {
    let Some(id) = id else {
        return Ok(Fetched::of(&client.get(&["v1", collection], limit).await?)?);
    };
    if kind == Kind::Decisions {
        return Ok(Fetched::of(
            &client.get(&["v1", collection, id], &[]).await?,
        )?);
    }
    // Instances and tokens cannot be fetched by path.
    let most = [("limit", Some("1000".to_owned()))];
    let body = client.get(&["v1", collection], &most).await?.json()?;
    let field = if kind == Kind::Access { "/name" } else { "/id" };
    let found = items(&body).into_iter().find(|one| text(one, field) == id);
    let nothing = || CliError::Failed(format!("there is no {} `{id}`", kind.singular()));
    found.map(Fetched::from_body).ok_or_else(nothing)
}

pub async fn delete(client: &Client, args: &DeleteArgs) -> Result<(), CliError> {
    match args.kind {
        Kind::Instances => {
            return Err(CliError::Usage(
                "instances are not deleted one by one: change their number with `penstock scale ENDPOINT/DEPLOYMENT --instances N`".into(),
            ));
        }
        Kind::Decisions => {
            return Err(CliError::Usage(
                "decisions are part of the log, and nothing is deleted from it".into(),
            ));
        }
        _ => {}
    }
    let path = path_of(args.kind, Some(&args.name))?;
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    let answer = client.delete(&path).await?;
    let verb = if answer.status == 202 {
        "is being deleted"
    } else {
        "deleted"
    };
    let then = answer
        .json()
        .map_or(String::new(), |body| count_after(&body));
    let kind = args.kind.singular();
    print(&format!("{kind} {} {verb}{then}", args.name))
}

/// What the count becomes after the deletion of an Autoscale; empty for other kinds.
fn count_after(body: &Value) -> String {
    let Some(own) = body.get("instances").and_then(Value::as_u64) else {
        return String::new();
    };
    match text(body, "/heldBy").as_str() {
        "" => format!(": the count becomes {own}, the deployment's own"),
        "pin" => format!(": the count stays pinned, and becomes {own} once it is released"),
        "pause" => {
            format!(": scaling is paused, so the count stays, and becomes {own} once it is resumed")
        }
        "pause-of-scale-in" => format!(
            ": the count becomes {own}, the deployment's own; a higher one stays until scaling in is resumed"
        ),
        _ => format!(
            ": the count becomes {own}, the deployment's own; a lower one stays until scaling out is resumed"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deployment(name: &str, reason: &str) -> Value {
        json!({
            "metadata": {"endpoint": "iris", "name": name},
            "status": {"available": {"reason": reason, "message": "1 of 2 instances is ready"}}
        })
    }

    #[test]
    fn deployments_that_lack_instances_are_listed_with_why() {
        let rows = ["Ready", "Failing", "ScaledToZero", "Starting"]
            .map(|reason| deployment("blue", reason));
        assert_eq!(
            unavailable(&rows),
            ["iris/blue is Failing: 1 of 2 instances is ready"]
        );
    }

    #[test]
    fn of_many_deployments_that_lack_instances_some_are_listed() {
        let rows = vec![deployment("blue", "Degraded"); 12];
        let lines = unavailable(&rows);
        assert_eq!(lines.len(), 11);
        assert!(lines[10].starts_with("2 more "), "{}", lines[10]);
    }
}
