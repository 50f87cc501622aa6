//! Documents from files, directories and standard input, and `validate`.
//!
//! Invariant: `load` returns all documents or an error: one invalid document anywhere aborts before
//! anything is sent.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use contract::problem::Finding;
use contract::resources::Resource;
use documents::{Backends, LocatedFinding, ParsedResource, read_with_checks, substitute};
use serde_json::Value;

use super::engine;
use super::error::CliError;
use super::output::{print, print_notice};

/// Check documents without a server
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock validate -f deploy/examples/quickstart
  penstock validate -f iris.yaml -f rules.yaml --set level=3

Every fault of every document is shown (the first 100) as file:line:column, the field's path and what
to do; exit 1 if there is one. Warnings are about what is valid and probably not intended.")]
pub struct ValidateArgs {
    /// Files or directories of documents, or - for standard input
    #[arg(short, long = "file", value_name = "FILE|DIR|-", required = true)]
    pub file: Vec<PathBuf>,
    /// Values for placeholders ({{name}}) in the documents
    #[arg(long, value_name = "KEY=VALUE", value_parser = setting)]
    pub set: Vec<(String, String)>,
}

/// Maximum number of faults shown; the rest are counted.
const FAULTS_SHOWN_MAX: usize = 100;

/// A resource, with the document's own tree, which is what is sent.
#[derive(Clone, Debug)]
pub struct SourceDocument {
    pub resource: Resource,
    /// The document as written.
    pub written: Value,
    /// What is valid and probably not intended: `file:line:column: field: what to do`.
    pub warnings: Vec<String>,
}

impl SourceDocument {
    /// `endpoint iris`, `deployment iris/blue`, `autoscale iris/blue`.
    pub fn title(&self) -> String {
        let kind = self.resource.kind().to_lowercase();
        format!("{kind} {}", self.resource.full_name())
    }

    /// Its path in the API.
    pub fn path(&self) -> Vec<String> {
        self.resource.path()
    }
}

/// For clap: `KEY=VALUE`.
pub fn setting(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!(
            "`{text}` is not a setting: write KEY=VALUE, such as level=3"
        )),
    }
}

pub fn validate(args: &ValidateArgs) -> Result<(), CliError> {
    let documents = load(&args.file, &args.set, &Backends::known())?;
    let mut text = String::new();
    for document in &documents {
        text.push_str(&format!("{} is valid\n", document.title()));
    }
    print(&text)?;
    for document in &documents {
        for warning in &document.warnings {
            print_notice(&format!("warning: {warning}"));
        }
    }
    Ok(())
}

/// Reads all documents, or prints every fault in them given these backends.
pub fn load(
    files: &[PathBuf],
    set: &[(String, String)],
    backends: &Backends,
) -> Result<Vec<SourceDocument>, CliError> {
    let values: BTreeMap<String, String> = set.iter().cloned().collect();
    let mut loaded = LoadedDocuments::default();
    for source in sources(files)? {
        loaded.add(&source, &values, backends);
    }
    if !loaded.faults.is_empty() {
        for fault in loaded.faults.iter().take(FAULTS_SHOWN_MAX) {
            print_notice(fault);
        }
        let many = if loaded.faults.len() == 1 {
            "fault"
        } else {
            "faults"
        };
        let count = loaded.faults.len();
        let shown = match count > FAULTS_SHOWN_MAX {
            true => format!("; the first {FAULTS_SHOWN_MAX} are shown"),
            false => String::new(),
        };
        print_notice(&format!("penstock: {count} {many} in the documents{shown}"));
        return Err(CliError::Quiet(1));
    }
    if loaded.documents.is_empty() {
        let names: Vec<String> = files
            .iter()
            .map(|file| file.display().to_string())
            .collect();
        return Err(CliError::Failed(format!(
            "there is no document in {}",
            names.join(", ")
        )));
    }
    Ok(loaded.documents)
}

/// A text, with the name used in fault messages.
struct Source {
    name: String,
    text: String,
}

#[derive(Default)]
struct LoadedDocuments {
    documents: Vec<SourceDocument>,
    /// `file:line:column: field: what to do`.
    faults: Vec<String>,
    /// Where each resource appears first.
    first_locations: BTreeMap<String, String>,
}

impl LoadedDocuments {
    fn add(&mut self, source: &Source, values: &BTreeMap<String, String>, backends: &Backends) {
        let text = match substitute(&source.text, values) {
            Ok(text) => text,
            Err(unresolved) => {
                let lines = unresolved
                    .iter()
                    .map(|one| format!("{}:{one}", source.name));
                self.faults.extend(lines);
                return;
            }
        };
        let (read, mut faults) = read_with_checks(&text, backends, engine::findings);
        for one in read {
            faults.extend(self.duplicate(source, &one));
            let warnings = one.document.locate_all(engine::warnings(&one.resource));
            let warnings = warnings.iter().map(|one| format!("{}:{one}", source.name));
            let warnings = warnings.collect();
            self.documents.push(SourceDocument {
                resource: one.resource,
                written: one.document.tree.value,
                warnings,
            });
        }
        faults.sort_by_key(|fault| fault.location);
        let lines = faults
            .iter()
            .map(|fault| format!("{}:{fault}", source.name));
        self.faults.extend(lines);
    }

    fn duplicate(&mut self, source: &Source, read: &ParsedResource) -> Option<LocatedFinding> {
        let title = format!("{} {}", read.resource.kind(), read.resource.full_name());
        let location = read.document.tree.location("");
        let here = format!("{}:{location}", source.name);
        match self.first_locations.get(&title) {
            None => {
                self.first_locations.insert(title, here);
                None
            }
            Some(first) => Some(read.document.locate(Finding::new(
                "",
                format!("{title} is already defined at {first}; keep one of the two"),
            ))),
        }
    }
}

fn sources(files: &[PathBuf]) -> Result<Vec<Source>, CliError> {
    let mut sources = Vec::new();
    for file in files {
        if file.as_os_str() == "-" {
            sources.push(standard_input()?);
        } else if file.is_dir() {
            for file in files_of(file)? {
                sources.push(read_file(&file)?);
            }
        } else {
            sources.push(read_file(file)?);
        }
    }
    Ok(sources)
}

fn standard_input() -> Result<Source, CliError> {
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .map_err(|error| {
            CliError::Failed(format!("standard input cannot be read as text: {error}"))
                .caused_by(error)
        })?;
    Ok(Source {
        name: "<stdin>".into(),
        text,
    })
}

fn read_file(path: &Path) -> Result<Source, CliError> {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|error| {
        CliError::Failed(format!("{name} cannot be read: {error}")).caused_by(error)
    })?;
    Ok(Source { name, text })
}

/// The document files directly in a directory, in order of name.
fn files_of(directory: &Path) -> Result<Vec<PathBuf>, CliError> {
    let shown = directory.display();
    let fail =
        |error| CliError::Failed(format!("{shown} cannot be read: {error}")).caused_by(error);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("yaml" | "yml" | "json")) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(CliError::Failed(format!(
            "there is no .yaml, .yml or .json file in {shown}"
        )));
    }
    Ok(files)
}
