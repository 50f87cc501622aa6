//! Verifies a store without a server, as `events verify` does with one.

use std::path::PathBuf;

use contract::ids::Position;
use control::ViewsProjector;
use domain::views::MODELS;
use serde::{Deserialize, Serialize};
use store::{BucketHead, VerifyReport};

use super::{Format, StoreSelector, failed};
use cli::error::CliError;

/// Verify that the log is intact and that the read models match it
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store verify
  penstock store verify --store sqlite:restored.db --heads heads.json

Checks what `penstock events verify` checks, without a server: every event, the hash chains, the read models,
and that no page of a store in a file is damaged.

Exit 1 if anything is wrong.")]
pub struct VerifyArgs {
    #[command(flatten)]
    pub(super) selector: StoreSelector,
    /// Saved heads, which the log must still contain
    #[arg(long, value_name = "FILE")]
    heads: Option<PathBuf>,
    /// Output format
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// The output of `events head -o json`.
#[derive(Deserialize)]
struct HeadsDocument {
    items: Vec<BucketHead>,
}

#[derive(Serialize)]
struct VerifyOutput {
    ok: bool,
    #[serde(flatten)]
    report: VerifyReport,
}

pub async fn verify(args: &VerifyArgs) -> Result<(), CliError> {
    let recorded = args.heads.as_ref().map(read_heads).transpose()?;
    let store = args.selector.open().await?;
    let mut projector = ViewsProjector::default();
    let recorded = recorded.unwrap_or_default();
    let report = store::verify_against(&store, &mut projector, MODELS, &recorded).await;
    store.close().await;
    let report = report.map_err(failed)?;
    let ok = report.is_sound();
    args.output
        .print(&render(&report), &VerifyOutput { ok, report })?;
    match ok {
        true => Ok(()),
        false => Err(CliError::Quiet(1)),
    }
}

fn read_heads(file: &PathBuf) -> Result<Vec<BucketHead>, CliError> {
    let name = file.display();
    let text = std::fs::read_to_string(file).map_err(|error| {
        CliError::Failed(format!("{name} cannot be read: {error}")).caused_by(error)
    })?;
    let saved: HeadsDocument = serde_json::from_str(&text).map_err(|error| {
        CliError::Failed(format!(
            "{name} holds no heads: write it with `penstock events head -o json > {name}`"
        ))
        .caused_by(error)
    })?;
    Ok(saved.items)
}

fn render(report: &VerifyReport) -> String {
    let VerifyReport {
        events,
        streams,
        buckets,
        rows,
        head,
        problems,
    } = report;
    if *head == Position::START && !problems.is_empty() {
        return problems.join("\n");
    }
    let mut lines = vec![format!(
        "{events} events in {streams} streams and {buckets} buckets up to position {head}, and {rows} rows"
    )];
    match problems.is_empty() {
        true => lines.push("no problems".to_owned()),
        false => lines.extend(problems.iter().cloned()),
    }
    lines.join("\n")
}
