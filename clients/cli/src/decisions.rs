//! `decisions` and `explain`: what the autoscaler decided, and why.

use contract::views::DecisionView;
use serde_json::Value;

use super::engine;
use super::error::CliError;
use super::names::Scope;
use super::output::{Format, Screen, Table, items, print, print_notice, text, yaml};
use crate::client::{ApiResponse, Client};

/// Show scaling decisions, newest first
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock decisions
  penstock decisions iris/blue --since 1h
  penstock decisions iris --since 2026-10-10T09:00:00Z --limit 500 -o json")]
pub struct DecisionsArgs {
    /// ENDPOINT or ENDPOINT/DEPLOYMENT
    scope: Option<Scope>,
    /// How far back: a duration (1h) or an instant (RFC 3339)
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<String>,
    /// Maximum number of decisions
    #[arg(long, value_name = "N", default_value_t = 50)]
    limit: u32,
    /// The end of the previous page (nextCursor)
    #[arg(long)]
    cursor: Option<String>,
    /// Output format
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

/// Explain one decision: measurements, rules, profile, cooldowns and the outcome
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock explain 0199d1c2-7a40-7c11-9d5e-0f6f6c1f3a01
  penstock explain 0199d1c2-7a40-7c11-9d5e-0f6f6c1f3a01 -o json")]
pub struct ExplainArgs {
    /// The decision's id, as `penstock decisions` shows it
    id: String,
    /// Output format
    #[arg(short, long, value_enum, default_value = "text")]
    output: ExplainFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum ExplainFormat {
    /// For people
    Text,
    /// The API's body, unchanged
    Json,
}

/// For clap: a duration back from now, or an instant; passed to the server unchanged.
pub fn since(text: &str) -> Result<String, String> {
    let span = text.parse::<contract::Span>();
    let instant = text.parse::<contract::Timestamp>();
    if span.is_ok() || instant.is_ok() {
        return Ok(text.to_owned());
    }
    Err(format!(
        "`{text}` is neither a duration (such as 10m or 1h) nor an instant (such as 2026-10-10T09:00:00Z)"
    ))
}

pub async fn decisions(
    client: &Client,
    args: &DecisionsArgs,
    screen: Screen,
) -> Result<(), CliError> {
    let scope = args.scope.as_ref();
    let deployment = scope.and_then(|scope| scope.deployment.as_ref());
    let query = [
        ("endpoint", scope.map(|scope| scope.endpoint.to_string())),
        ("deployment", deployment.map(ToString::to_string)),
        ("since", args.since.clone()),
        ("limit", Some(args.limit.to_string())),
        ("cursor", args.cursor.clone()),
    ];
    let answer = client.get(&["v1", "decisions"], &query).await?;
    let rows = items(&answer.json()?);
    if let (Some(scope), true, None) = (scope, rows.is_empty(), &args.cursor) {
        scope.must_exist(client).await?;
    }
    match args.output {
        Format::Json => print(&answer.text),
        Format::Yaml => print(&yaml(&answer.json()?)),
        Format::Table if rows.is_empty() => {
            print_notice(&empty_message(args));
            Ok(())
        }
        Format::Table => print(&table(&rows).render(screen.tty)),
    }
}

fn empty_message(args: &DecisionsArgs) -> String {
    let of = args.scope.as_ref();
    let of = of.map_or(String::new(), |scope| format!(" for {scope}"));
    match (&args.since, &args.cursor) {
        (_, Some(_)) => format!("no older decisions{of}"),
        // A duration reaches back from now, an instant is a start.
        (Some(since), None) if since.parse::<contract::Span>().is_ok() => {
            format!("no decisions{of} in the last {since}")
        }
        (Some(since), None) => format!("no decisions{of} since {since}"),
        (None, None) => format!("no decisions{of} yet"),
    }
}

/// The table of decisions.
pub fn table(rows: &[Value]) -> Table {
    let mut table = Table::new(&[
        "ID",
        "TIME",
        "DEPLOYMENT",
        "COUNT",
        "OUTCOME",
        "PROFILE",
        "BECAUSE",
    ]);
    for row in rows {
        table.row(vec![
            text(row, "/id"),
            text(row, "/time"),
            format!("{}/{}", text(row, "/endpoint"), text(row, "/deployment")),
            count(row),
            text(row, "/outcome"),
            text(row, "/profile"),
            because(row),
        ]);
    }
    table
}

/// `2 -> 4`, with the recommendation if it was not granted in full: `2 -> 4 (wanted 6)`.
pub fn count(row: &Value) -> String {
    let (from, wanted, granted) = (
        text(row, "/from"),
        text(row, "/wanted"),
        text(row, "/granted"),
    );
    let change = if from == granted {
        granted.clone()
    } else {
        format!("{from} -> {granted}")
    };
    if wanted == granted {
        change
    } else {
        format!("{change} (wanted {wanted})")
    }
}

/// What changed the count or keeps it: the sentence of `explain`, for decisions of older releases too.
pub fn because(row: &Value) -> String {
    let cause = text(row, "/cause/detail");
    if !cause.is_empty() {
        return cause;
    }
    let view: Result<DecisionView, _> = serde_json::from_value(row.clone());
    view.map_or(String::new(), engine::sentence)
}

pub async fn explain(client: &Client, args: &ExplainArgs) -> Result<(), CliError> {
    let answer = client.get(&["v1", "decisions", &args.id], &[]).await?;
    match args.output {
        ExplainFormat::Json => print(&answer.text),
        ExplainFormat::Text => {
            let mut explanation = render_explanation(&answer)?;
            explanation.push_str(&now(client, &answer.json()?).await);
            print(&explanation)
        }
    }
}

/// What keeps the deployment from serving now: instances may have failed since the decision. Empty if
/// nothing does.
async fn now(client: &Client, decision: &Value) -> String {
    let (endpoint, deployment) = (text(decision, "/endpoint"), text(decision, "/deployment"));
    let path = ["v1", "endpoints", &endpoint, "deployments", &deployment];
    // The deployment may be gone, and the decision is explained nevertheless.
    let Ok(answer) = client.get(&path, &[]).await else {
        return String::new();
    };
    answer.json().map_or(String::new(), |body| {
        let part = |field| text(&body, &format!("/status/available/{field}"));
        match part("reason").as_str() {
            "" | "Ready" | "ScaledToZero" => String::new(),
            reason => format!("\nNow {reason}: {}\n", part("message")),
        }
    })
}

/// The explanation as text, from the engine of this binary.
fn render_explanation(body: &ApiResponse) -> Result<String, CliError> {
    let view: DecisionView = serde_json::from_str(&body.text).map_err(|error| {
        CliError::Failed(format!(
            "the decision cannot be explained by this client ({error}); use one of the server's release, or -o json"
        ))
        .caused_by(error)
    })?;
    let id = view.id;
    Ok(format!("Decision {id}\n{}", engine::explanation(view)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn decisions_are_a_table_with_their_cause() {
        let rows = [
            json!({"id": "d2", "time": "2026-10-10T12:00:01.000Z", "endpoint": "iris", "deployment": "blue",
                "from": 2, "wanted": 4, "granted": 4, "outcome": "applied", "profile": "day",
                "cause": {"kind": "profile", "name": "day", "detail": "profile `day` has begun"},
                "rules": [{"name": "follow", "verdict": "triggered", "because": "x"}]}),
            json!({"id": "d1", "time": "2026-10-10T12:00:00.000Z", "endpoint": "iris", "deployment": "green",
                "from": 1, "wanted": 1, "granted": 1, "outcome": "steady", "profile": null, "rules": []}),
        ];
        assert_eq!(
            table(&rows).render(false),
            "\
ID  TIME                      DEPLOYMENT  COUNT   OUTCOME  PROFILE  BECAUSE
d2  2026-10-10T12:00:01.000Z  iris/blue   2 -> 4  applied  day      profile `day` has begun
d1  2026-10-10T12:00:00.000Z  iris/green  1       steady   -        -
"
        );
    }

    #[test]
    fn the_cause_of_a_decision_of_an_older_release_is_that_of_its_explanation() {
        let text = include_str!("../../../libs/contract/tests/golden/decision.json");
        let mut row: Value = serde_json::from_str(text).unwrap();
        assert_eq!(row.get("cause"), None);
        let more = json!({"id": "0199d1c2-7a40-7c11-9d5e-0f6f6c1f3a01", "endpoint": "iris",
            "time": "2026-10-10T12:00:00.000Z"});
        for (name, value) in more.as_object().unwrap() {
            row[name] = value.clone();
        }
        row["deployment"] = json!("blue");
        let cause = because(&row);
        assert!(cause.starts_with("`busy`: 6.175 > 4"), "{cause}");
        let explained = engine::explanation(serde_json::from_value(row).unwrap());
        assert!(explained.contains(&format!("\n{cause}.\n")), "{explained}");
    }

    #[test]
    fn since_is_a_duration_or_an_instant() {
        assert!(since("1h").is_ok());
        assert!(since("2026-10-10T09:00:00Z").is_ok());
        assert!(since("yesterday").is_err());
    }
}
