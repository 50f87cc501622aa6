//! `autoscale preview`: when schedules will change profiles and capacities.

use std::path::PathBuf;

use ::documents::Backends;
use contract::ids::DeploymentRef;
use contract::resources::AutoscaleSpec;
use contract::resources::Resource;
use contract::time::{Span, Timestamp};
use domain::autoscale::{SchedulePreview, Transition};
use serde_json::{Value, json};

use super::documents;
use super::engine;
use super::error::CliError;
use super::names::deployment_ref;
use super::output::{Format, Screen, Table, print, print_notice, yaml};
use crate::client::Client;

/// Try out autoscale rules
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock autoscale preview iris/blue")]
pub struct AutoscaleArgs {
    #[command(subcommand)]
    command: AutoscaleCommand,
}

#[derive(Debug, clap::Subcommand)]
enum AutoscaleCommand {
    Preview(PreviewArgs),
}

/// Show when the active profile changes, and to which capacity
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock autoscale preview iris/blue
  penstock autoscale preview iris/blue --from 2026-10-24T00:00:00Z --to 2026-10-27T00:00:00Z
  penstock autoscale preview -f rules.yaml --to 30d -o json

With -f no server is needed. The first row is the state at the start.")]
#[command(group(clap::ArgGroup::new("source").required(true).args(["deployment", "file"])))]
struct PreviewArgs {
    /// ENDPOINT/DEPLOYMENT
    #[arg(value_parser = deployment_ref)]
    deployment: Option<DeploymentRef>,
    /// Files or directories of documents, or - for standard input
    #[arg(short, long = "file", value_name = "FILE|DIR|-")]
    file: Vec<PathBuf>,
    /// An instant (RFC 3339); now by default
    #[arg(long, value_name = "TIME")]
    from: Option<Timestamp>,
    /// An instant, or a duration after --from
    #[arg(long, value_name = "TIME", default_value = "7d", value_parser = super::decisions::since)]
    to: String,
    /// Values for placeholders ({{name}}) in the documents
    #[arg(long, value_name = "KEY=VALUE", value_parser = documents::setting, requires = "file")]
    set: Vec<(String, String)>,
    /// Output format
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

impl AutoscaleArgs {
    /// Whether no server is needed.
    pub fn is_offline(&self) -> bool {
        let AutoscaleCommand::Preview(args) = &self.command;
        !args.file.is_empty()
    }
}

pub fn preview_file(args: &AutoscaleArgs, screen: Screen) -> Result<(), CliError> {
    let AutoscaleCommand::Preview(args) = &args.command;
    let documents = documents::load(&args.file, &args.set, &Backends::known())?;
    let specs: Vec<&AutoscaleSpec> = documents
        .iter()
        .filter_map(|document| match &document.resource {
            Resource::Autoscale(resource) => Some(&resource.spec),
            _ => None,
        })
        .collect();
    match specs.as_slice() {
        [] => Err(CliError::Failed(
            "there is no Autoscale document to preview".into(),
        )),
        [spec] => show(&evaluated(spec, args, screen)?, args.output, screen),
        many => Err(CliError::Usage(format!(
            "there are {} Autoscale documents; preview them one file at a time",
            many.len()
        ))),
    }
}

pub async fn preview_live(
    client: &Client,
    args: &AutoscaleArgs,
    screen: Screen,
) -> Result<(), CliError> {
    let AutoscaleCommand::Preview(args) = &args.command;
    let Some(of) = &args.deployment else {
        return preview_file_needed();
    };
    let (from, to) = range(args, screen.now)?;
    let (endpoint, deployment) = (of.endpoint.as_str(), of.deployment.as_str());
    let query = [
        ("from", Some(from.to_string())),
        ("to", Some(to.to_string())),
    ];
    let path = ["v1", "autoscale", endpoint, deployment, "preview"];
    let answer = client.get(&path, &query).await?;
    let body = answer.json()?;
    if args.output == Format::Json {
        if let Some(cut_at) = body.get("cutAt").and_then(Value::as_str) {
            notice_cut(cut_at);
        }
        return print(&answer.text);
    }
    let preview: SchedulePreview = serde_json::from_value(body).map_err(|error| {
        CliError::Failed(format!(
            "the server's preview cannot be read by this client ({error}); use -o json"
        ))
        .caused_by(error)
    })?;
    show(&preview, args.output, screen)
}

fn preview_file_needed() -> Result<(), CliError> {
    Err(CliError::Usage(
        "name a deployment (ENDPOINT/DEPLOYMENT) or a file (-f)".into(),
    ))
}

/// The preview of a document, evaluated locally.
fn evaluated(
    spec: &AutoscaleSpec,
    args: &PreviewArgs,
    screen: Screen,
) -> Result<SchedulePreview, CliError> {
    let (from, to) = range(args, screen.now)?;
    engine::preview(spec, from, to).map_err(|findings| {
        let lines: Vec<String> = findings
            .iter()
            .map(|finding| format!("\n  {}: {}", finding.pointer, finding.detail))
            .collect();
        CliError::Failed(format!(
            "the document cannot be evaluated:{}",
            lines.concat()
        ))
    })
}

/// Maximum number of rows; a schedule that changes every minute has ten thousand transitions a week.
const TABLE_ROWS_MAX: usize = 100;

fn show(preview: &SchedulePreview, format: Format, screen: Screen) -> Result<(), CliError> {
    let transitions = &preview.items;
    if let Some(cut_at) = preview.cut_at {
        notice_cut(&cut_at.to_string());
    }
    match format {
        Format::Json => print(&json!(preview).to_string()),
        Format::Yaml => print(&yaml(&json!(preview))),
        Format::Table => {
            let shown = &transitions[..transitions.len().min(TABLE_ROWS_MAX)];
            print(&table(shown).render(screen.tty))?;
            match transitions.len() - shown.len() {
                0 => Ok(()),
                more => print(&format!(
                    "… and {more} more; an earlier --to shows less, -o json shows all"
                )),
            }
        }
    }
}

fn notice_cut(cut_at: &str) {
    print_notice(&format!(
        "the preview was cut, since there are too many changes: those from {cut_at} on are missing; see them with --from {cut_at}"
    ));
}

fn range(args: &PreviewArgs, now: Timestamp) -> Result<(Timestamp, Timestamp), CliError> {
    let from = args.from.unwrap_or(now);
    Ok((from, end(&args.to, from)?))
}

fn end(to: &str, from: Timestamp) -> Result<Timestamp, CliError> {
    let to = match to.parse::<Span>() {
        Ok(span) => from + span,
        Err(_) => to
            .parse()
            .map_err(|error| CliError::Usage(format!("--to: {error}")).caused_by(error))?,
    };
    if to <= from {
        return Err(CliError::Usage(format!(
            "--to ({to}) must lie after --from ({from})"
        )));
    }
    Ok(to)
}

fn table(transitions: &[Transition]) -> Table {
    let mut table = Table::new(&["AT", "PROFILE", "MIN", "MAX", "DEFAULT"]);
    for one in transitions {
        table.row(vec![
            one.at.to_string(),
            one.profile.clone(),
            one.min.to_string(),
            one.max.to_string(),
            one.default.to_string(),
        ]);
    }
    table
}
