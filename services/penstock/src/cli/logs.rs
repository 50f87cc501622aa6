//! `logs`: what the instances of a deployment wrote to their standard output and error.

use contract::ids::DeploymentRef;
use futures::StreamExt;
use reqwest::header::HeaderName;
use serde_json::Value;

use super::decisions::since;
use super::error::CliError;
use super::kinds::deployment_ref;
use super::output::{Screen, items, print, text};
use crate::client::sse::SseReader;
use crate::client::{Client, ClientError};

/// Show the logs of a deployment's instances
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock logs iris/blue
  penstock logs iris/blue --since 10m
  penstock logs iris/blue --follow")]
pub struct LogsArgs {
    /// ENDPOINT/DEPLOYMENT
    #[arg(value_parser = deployment_ref)]
    deployment: DeploymentRef,
    /// Stay, and show what comes
    #[arg(short, long)]
    follow: bool,
    /// How far back: a duration (10m) or an instant (RFC 3339)
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<String>,
    /// At most so many lines of the past
    #[arg(long, value_name = "N")]
    limit: Option<u32>,
}

pub async fn logs(client: &Client, args: &LogsArgs, _screen: Screen) -> Result<(), CliError> {
    let (endpoint, deployment) = (&args.deployment.endpoint, &args.deployment.deployment);
    let path = ["v1", "logs", endpoint.as_str(), deployment.as_str()];
    let query = [
        ("since", args.since.clone()),
        ("limit", args.limit.map(|limit| limit.to_string())),
        ("follow", args.follow.then(|| "true".to_owned())),
    ];
    if args.follow {
        return follow(client, &path, &query).await;
    }
    let answer = client.get(&path, &query).await?;
    match answer.json() {
        Ok(body) => print(&lines(&items(&body))),
        // Plain text is shown as it is.
        Err(_) => print(&answer.text),
    }
}

fn lines(rows: &[Value]) -> String {
    rows.iter().map(line).collect()
}

/// `TIME INSTANCE text`, as far as the row says them.
fn line(row: &Value) -> String {
    let words = ["/time", "/instance", "/line"].map(|pointer| text(row, pointer));
    let words: Vec<&str> = words
        .iter()
        .map(String::as_str)
        .filter(|w| !w.is_empty())
        .collect();
    words.join(" ") + "\n"
}

async fn follow(
    client: &Client,
    path: &[&str],
    query: &[(&str, Option<String>)],
) -> Result<(), CliError> {
    let accept = (
        HeaderName::from_static("accept"),
        "text/event-stream".to_owned(),
    );
    let response = client.stream(path, query, &[accept]).await?;
    let events = response
        .headers()
        .get("content-type")
        .and_then(|value| value.to_str().ok())
        .is_some_and(|kind| kind.starts_with("text/event-stream"));
    let mut chunks = response.bytes_stream();
    let mut reader = SseReader::default();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| broken_off(client, &error))?;
        if !events {
            print_raw(&chunk)?;
            continue;
        }
        for event in reader.feed(&chunk) {
            match serde_json::from_str::<Value>(&event.data) {
                Ok(row @ Value::Object(_)) => print(&line(&row))?,
                _ => print(&event.data)?,
            }
        }
    }
    Ok(())
}

fn print_raw(chunk: &[u8]) -> Result<(), CliError> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    out.write_all(chunk)
        .and_then(|()| out.flush())
        .map_err(|_| CliError::Quiet(0))
}

/// A stream that was open and ended without being closed.
pub fn broken_off(client: &Client, error: &reqwest::Error) -> CliError {
    CliError::Client(ClientError::Unreachable {
        server: client.server().to_owned(),
        reason: format!("it broke off the stream ({error})"),
    })
}
