//! `logs`: what the instances of a deployment wrote to their standard output and error.

use std::io::Write;

use contract::ids::DeploymentRef;
use futures::StreamExt;

use super::decisions::since;
use super::error::CliError;
use super::names::deployment_ref;
use crate::client::{Client, ClientError};

/// Show the logs of a deployment's instances
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock logs iris/blue
  penstock logs iris/blue --since 10m
  penstock logs iris/blue --follow --timestamps
  penstock logs iris/blue --instance iris-blue-0a1b2c3d4e5f --limit 100

Instances write to files directly, and their lines carry no time. --timestamps shows when
Penstock first saw a line, with a `~`: at most about ten seconds after it was written, and later only
if Penstock was not running. --since uses the same times.

The last lines are shown, at most 32 MiB per node; if older lines are cut without --limit, a line says
so.")]
pub struct LogsArgs {
    /// ENDPOINT/DEPLOYMENT
    #[arg(value_parser = deployment_ref)]
    deployment: DeploymentRef,
    /// Keep running and show new lines
    #[arg(short, long)]
    follow: bool,
    /// How far back: a duration (10m) or an instant (RFC 3339)
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<String>,
    /// Begin each line with when it was first seen
    #[arg(long)]
    timestamps: bool,
    /// Maximum number of existing lines; 100000 by default
    #[arg(long, value_name = "N")]
    limit: Option<u32>,
    /// Only of this instance
    #[arg(long, value_name = "ID")]
    instance: Option<String>,
}

pub async fn logs(client: &Client, args: &LogsArgs) -> Result<(), CliError> {
    let (endpoint, deployment) = (&args.deployment.endpoint, &args.deployment.deployment);
    let path = ["v1", "logs", endpoint.as_str(), deployment.as_str()];
    let query = [
        ("since", args.since.clone()),
        ("limit", args.limit.map(|limit| limit.to_string())),
        ("instance", args.instance.clone()),
        ("timestamps", args.timestamps.then(|| "true".to_owned())),
        ("follow", args.follow.then(|| "true".to_owned())),
    ];
    let response = client.stream(&path, &query, &[]).await?;
    let mut chunks = response.bytes_stream();
    while let Some(chunk) = chunks.next().await {
        print_raw(&chunk.map_err(|error| disconnected(client, &error))?)?;
    }
    Ok(())
}

/// Writes raw bytes: instance output need not be UTF-8.
fn print_raw(chunk: &[u8]) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    out.write_all(chunk)
        .and_then(|()| out.flush())
        .map_err(|_| CliError::Quiet(0))
}

/// The error for a stream that ended without being closed.
pub fn disconnected(client: &Client, error: &dyn std::fmt::Display) -> CliError {
    CliError::Client(ClientError::Unreachable {
        server: client.server().to_owned(),
        reason: format!("it closed the stream ({error})"),
        source: None,
    })
}
