//! `events head`: prints the heads of the log's hash chains, for safekeeping elsewhere, and reads them back.

use std::io::IsTerminal;
use std::path::Path;

use serde_json::{Value, json};

use super::error::CliError;
use super::output::{Format, Table, items, print, text, yaml};
use crate::client::Client;

/// Print the heads of the log's hash chains, for safekeeping elsewhere
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock events head
  penstock events head -o json > heads.json
  penstock events verify --heads heads.json

With them you can prove later that nothing up to there was changed, removed or inserted, and that
the end was not truncated.")]
pub struct HeadArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

pub async fn heads(client: &Client, args: &HeadArgs) -> Result<(), CliError> {
    let answer = client.get(&["v1", "events", "heads"], &[]).await?;
    match args.output {
        Format::Json => print(&answer.text),
        Format::Yaml => print(&yaml(&answer.json()?)),
        Format::Table => {
            let mut table = Table::new(&["BUCKET", "POSITION", "HASH"]);
            for row in items(&answer.json()?) {
                table.row(vec![
                    row.get("bucket").map(Value::to_string).unwrap_or_default(),
                    row.get("position")
                        .map(Value::to_string)
                        .unwrap_or_default(),
                    text(&row, "/hash").to_string(),
                ]);
            }
            print(&table.render(std::io::stdout().is_terminal()))
        }
    }
}

/// Reads the output of `events head -o json` into a request body for the server.
pub fn read_heads(file: &Path) -> Result<Value, CliError> {
    let name = file.display();
    let text = std::fs::read_to_string(file).map_err(|error| {
        CliError::Failed(format!("{name} cannot be read: {error}")).caused_by(error)
    })?;
    let kept: Value = serde_json::from_str(&text).unwrap_or_default();
    match kept.get("items") {
        Some(items @ Value::Array(heads)) if !heads.is_empty() => Ok(json!({"heads": items})),
        _ => Err(CliError::Failed(format!(
            "{name} holds no heads: write it with `penstock events head -o json > {name}`"
        ))),
    }
}
