//! `diff`: what an apply would change, field by field, without changing anything.

use ::documents::Backends;
use std::path::PathBuf;

use super::apply::{Applier, PutResult, sort_for_apply};
use super::documents;
use super::error::CliError;
use super::output::{print, text};
use crate::client::Client;

/// Show what an apply would change
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock diff -f deploy/examples/quickstart
  penstock diff -f iris.yaml --set level=3
  penstock diff -f iris.yaml --exit-code      exit 1 where something differs")]
pub struct DiffArgs {
    /// Files or directories of documents, or - for standard input
    #[arg(short, long = "file", value_name = "FILE|DIR|-", required = true)]
    file: Vec<PathBuf>,
    /// Values for placeholders in the documents
    #[arg(long, value_name = "KEY=VALUE", value_parser = documents::setting)]
    set: Vec<(String, String)>,
    /// Exit 1 if anything differs
    #[arg(long)]
    exit_code: bool,
}

pub async fn diff(client: &Client, args: &DiffArgs) -> Result<(), CliError> {
    let documents = sort_for_apply(documents::load(
        &args.file,
        &args.set,
        &Backends::deferred_to_server(),
    )?);
    let mut sender = Applier::new(client, true);
    let mut differs = false;
    for document in &documents {
        let put = sender.put(document).await?;
        differs |= put.result != "unchanged";
        print(&section(&document.title(), &put))?;
        put.print_warnings(&document.title());
    }
    for split in std::mem::take(&mut sender.postponed) {
        let put = sender.put_split(&split).await?;
        differs = true;
        print(&section(&split.title(), &put))?;
    }
    if differs && args.exit_code {
        return Err(CliError::Quiet(1));
    }
    Ok(())
}

/// `+ field: value`, `- field: value` and `~ field: old -> new` under what would happen.
fn section(title: &str, put: &PutResult) -> String {
    let mut out = format!("{title} {}\n", put.describe_planned());
    if put.result == "created" {
        return out;
    }
    for change in &put.changes {
        let pointer = text(change, "/pointer");
        let line = match (change.get("from"), change.get("to")) {
            (None, Some(new)) => format!("+ {pointer}: {new}"),
            (Some(old), None) => format!("- {pointer}: {old}"),
            (Some(old), Some(new)) => format!("~ {pointer}: {old} -> {new}"),
            (None, None) => continue,
        };
        out.push_str(&format!("  {line}\n"));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_difference_is_shown_field_by_field() {
        let put = PutResult {
            result: "changed".into(),
            changes: vec![
                json!({"pointer": "/spec/instances", "from": 1, "to": 2}),
                json!({"pointer": "/spec/env/LEVEL", "to": "3"}),
                json!({"pointer": "/metadata/labels/team", "from": "ml"}),
            ],
            warnings: Vec::new(),
        };
        assert_eq!(
            section("deployment iris/blue", &put),
            "deployment iris/blue would be changed
  ~ /spec/instances: 1 -> 2
  + /spec/env/LEVEL: \"3\"
  - /metadata/labels/team: \"ml\"
"
        );
    }
}
