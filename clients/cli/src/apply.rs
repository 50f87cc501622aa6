//! `apply`: documents become resources.
//!
//! Order: endpoints, deployments, autoscales; a split that names deployments which do not exist yet
//! is set after them. The whole set is read and checked before anything is sent; the first refusal
//! stops the rest, and what was applied before it is said.

use std::collections::BTreeSet;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use ::documents::Backends;
use contract::resources::Resource;
use contract::time::Span;
use serde_json::{Value, json};

use super::documents::{self, Document};
use super::error::CliError;
use super::get::ready_of_wanted;
use super::output::{items, print, remark, text};
use crate::client::{Answer, Client};

/// Create or update resources from files
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock apply -f deploy/examples/quickstart
  penstock apply -f iris.yaml --set level=3 --wait
  penstock apply -f iris.yaml -f rules.yaml --dry-run
  penstock apply -f - < iris.yaml

One line per resource says created, changed or unchanged; with --dry-run, what it would be. The
documents may stand in any order.")]
pub struct ApplyArgs {
    /// Files or directories of documents, or - for standard input
    #[arg(short, long = "file", value_name = "FILE|DIR|-", required = true)]
    file: Vec<PathBuf>,
    /// Let the server check everything, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Wait until every endpoint and deployment has succeeded or failed
    #[arg(long, conflicts_with = "dry_run")]
    wait: bool,
    /// How long to wait
    #[arg(long, value_name = "DURATION", default_value = "5m")]
    timeout: Span,
    /// Values for placeholders ({{name}}) in the documents
    #[arg(long, value_name = "KEY=VALUE", value_parser = documents::setting)]
    set: Vec<(String, String)>,
}

/// Resources that are named again when an apply stops; of more their number says more. The lines above
/// name them all.
const NAMED_MAX: usize = 20;

/// How often a state is asked for while waiting.
const POLL: Duration = Duration::from_millis(250);

pub async fn apply(client: &Client, args: &ApplyArgs) -> Result<(), CliError> {
    let documents = in_order(documents::load(
        &args.file,
        &args.set,
        &Backends::left_to_a_server(),
    )?);
    let mut sender = Sender::new(client, args.dry_run);
    let mut journal = Journal {
        dry_run: args.dry_run,
        done: Vec::new(),
    };
    for document in &documents {
        match sender.put(document).await {
            Ok(put) => journal.say(&document.title(), &put)?,
            Err(error) => return Err(journal.stopped(&document.title(), &error)),
        }
    }
    for split in std::mem::take(&mut sender.later) {
        match sender.put_split(&split).await {
            Ok(put) => journal.say(&split.title(), &put)?,
            Err(error) => return Err(journal.stopped(&split.title(), &error)),
        }
    }
    if args.wait {
        wait(client, &documents, args.timeout).await?;
    }
    Ok(())
}

/// Endpoints, then deployments, then autoscales; each kind in the order it was written.
pub fn in_order(mut documents: Vec<Document>) -> Vec<Document> {
    documents.sort_by_key(|document| document.resource.rank());
    documents
}

/// A split that waits for its deployments.
pub struct Split {
    pub endpoint: String,
    body: Value,
    /// Deployments that it names and that do not exist.
    absent: BTreeSet<String>,
}

impl Split {
    pub fn title(&self) -> String {
        format!("traffic of {}", self.endpoint)
    }
}

/// What a PUT did, or would do.
pub struct Put {
    /// `created`, `changed` or `unchanged`.
    pub result: String,
    /// Each `{pointer, from, to}`.
    pub changes: Vec<Value>,
}

impl Put {
    fn of(answer: &Answer) -> Result<Self, CliError> {
        let body = answer.json()?;
        let changes = body.get("changes").and_then(Value::as_array);
        Ok(Self {
            result: text(&body, "/result"),
            changes: changes.cloned().unwrap_or_default(),
        })
    }

    fn planned(result: &str) -> Self {
        Self {
            result: result.to_owned(),
            changes: Vec::new(),
        }
    }
}

/// Sends documents one by one, in order.
pub struct Sender<'a> {
    client: &'a Client,
    dry_run: bool,
    /// Splits that wait for deployments of the same set.
    pub later: Vec<Split>,
    /// Resources that would be made, in a dry run.
    planned: BTreeSet<String>,
}

impl<'a> Sender<'a> {
    pub fn new(client: &'a Client, dry_run: bool) -> Self {
        Self {
            client,
            dry_run,
            later: Vec::new(),
            planned: BTreeSet::new(),
        }
    }

    fn query(&self) -> [(&'static str, Option<String>); 1] {
        [("dryRun", self.dry_run.then(|| "true".to_owned()))]
    }

    pub async fn put(&mut self, document: &Document) -> Result<Put, CliError> {
        if self.parent_is_only_planned(document) {
            self.planned.insert(document.title());
            return Ok(Put::planned("created"));
        }
        let mut body = document.written.clone();
        if matches!(document.resource, Resource::Endpoint(_)) {
            self.postpone_split(document, &mut body).await?;
        }
        let path = document.path();
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        let put = Put::of(&self.client.put(&path, &self.query(), &body).await?)?;
        if self.dry_run && put.result == "created" {
            self.planned.insert(document.title());
        }
        Ok(put)
    }

    /// In a dry run nothing is made, so what belongs to a planned resource cannot be asked about.
    fn parent_is_only_planned(&self, document: &Document) -> bool {
        let parent = match (&document.resource, document.resource.deployment()) {
            (Resource::Autoscale(_), Some(of)) => format!("deployment {of}"),
            (Resource::Deployment(_), _) => format!("endpoint {}", document.endpoint()),
            _ => return false,
        };
        self.dry_run && self.planned.contains(&parent)
    }

    /// Takes the split out of the body where it names a deployment that does not exist yet.
    async fn postpone_split(
        &mut self,
        document: &Document,
        body: &mut Value,
    ) -> Result<(), CliError> {
        let named = names_in_split(body);
        if named.is_empty() {
            return Ok(());
        }
        let existing = deployments_of(self.client, document.endpoint().as_str()).await?;
        if named.is_subset(&existing) {
            return Ok(());
        }
        let mut split = serde_json::Map::new();
        if let Some(Value::Object(spec)) = body.get_mut("spec") {
            for field in ["traffic", "mirror"] {
                if let Some(shares) = spec.remove(field) {
                    split.insert(field.into(), shares);
                }
            }
        }
        self.later.push(Split {
            endpoint: document.endpoint().to_string(),
            body: Value::Object(split),
            absent: named.difference(&existing).cloned().collect(),
        });
        Ok(())
    }

    /// In a dry run: whether the set makes what the split waits for.
    fn check_split(&self, split: &Split) -> Result<(), CliError> {
        let endpoint = &split.endpoint;
        let planned = |name: &&String| {
            let title = format!("deployment {endpoint}/{name}");
            self.planned.contains(&title)
        };
        match split.absent.iter().find(|name| !planned(name)) {
            None => Ok(()),
            Some(name) => Err(CliError::Failed(format!(
                "it names `{name}`, which is neither a deployment of {endpoint} nor in these documents; add it, or take it out of the split"
            ))),
        }
    }

    pub async fn put_split(&mut self, split: &Split) -> Result<Put, CliError> {
        if self.dry_run {
            // Its deployments do not exist yet, so the server could only refuse it.
            return self.check_split(split).map(|()| Put::planned("changed"));
        }
        let path = ["v1", "endpoints", split.endpoint.as_str(), "traffic"];
        Put::of(&self.client.put(&path, &[], &split.body).await?)
    }
}

impl Put {
    /// What a dry run or a comparison says: `would be created`, `would change`, `would stay unchanged`.
    pub fn would_be(&self) -> &'static str {
        match self.result.as_str() {
            "created" => "would be created",
            "unchanged" => "would stay unchanged",
            _ => "would be changed",
        }
    }
}

/// One line per resource, and on a refusal what stands already.
struct Journal {
    dry_run: bool,
    done: Vec<String>,
}

impl Journal {
    fn say(&mut self, title: &str, put: &Put) -> Result<(), CliError> {
        if self.dry_run {
            return print(&format!("{title} {}", put.would_be()));
        }
        let line = format!("{title} {}", put.result);
        print(&line)?;
        self.done.push(line);
        Ok(())
    }

    fn stopped(&self, title: &str, error: &CliError) -> CliError {
        remark(&format!("penstock: {title}: {error}"));
        if self.dry_run {
            remark("An apply would stop there. Nothing was changed.");
        } else {
            remark(&format!(
                "Applied before that: {}. What follows was not sent.",
                self.before()
            ));
        }
        CliError::Quiet(error.exit_code())
    }
}

impl Journal {
    fn before(&self) -> String {
        let count = self.done.len();
        match self.done.last() {
            None => "nothing".into(),
            Some(_) if count <= NAMED_MAX => self.done.join(", "),
            Some(last) => format!("{count} resources, the last of them {last}"),
        }
    }
}

/// Deployments that `traffic` and `mirror` name with a share above zero.
fn names_in_split(body: &Value) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for field in ["/spec/traffic", "/spec/mirror"] {
        if let Some(Value::Object(shares)) = body.pointer(field) {
            let named = shares.iter().filter(|(_, share)| share.as_u64() != Some(0));
            names.extend(named.map(|(name, _)| name.clone()));
        }
    }
    names
}

/// None at all where the endpoint does not exist.
async fn deployments_of(client: &Client, endpoint: &str) -> Result<BTreeSet<String>, CliError> {
    let path = ["v1", "endpoints", endpoint, "deployments"];
    let Some(answer) = client.find(&path).await? else {
        return Ok(BTreeSet::new());
    };
    let body = answer.json()?;
    let names = items(&body)
        .iter()
        .map(|one| text(one, "/metadata/name"))
        .collect();
    Ok(names)
}

/// Polls endpoints and deployments of the set until each has succeeded or failed.
async fn wait(client: &Client, documents: &[Document], timeout: Span) -> Result<(), CliError> {
    let deadline = tokio::time::Instant::now() + timeout.to_std();
    let mut progress = Progress::new();
    let mut failed = false;
    for document in documents {
        if matches!(document.resource, Resource::Autoscale(_)) {
            continue;
        }
        failed |= !wait_for(client, document, deadline, timeout, &mut progress).await?;
    }
    if failed {
        return Err(CliError::Quiet(1));
    }
    Ok(())
}

/// Whether it succeeded.
async fn wait_for(
    client: &Client,
    document: &Document,
    deadline: tokio::time::Instant,
    timeout: Span,
    progress: &mut Progress,
) -> Result<bool, CliError> {
    let path = document.path();
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    loop {
        let body = client.get(&path, &[]).await?.json()?;
        let state = text(&body, "/status/provisioningState");
        let reason = text(&body, "/status/reason");
        match state.as_str() {
            "Succeeded" => {
                progress.done(&format!("{} Succeeded{}", document.title(), ready(&body)));
                return Ok(true);
            }
            "Failed" => {
                progress.done(&format!("{} Failed: {reason}", document.title()));
                return Ok(false);
            }
            _ => progress.show(&format!("{} {state}{}", document.title(), ready(&body))),
        }
        if tokio::time::Instant::now() >= deadline {
            progress.end();
            return Err(CliError::Failed(format!(
                "{} is still {state} after {timeout}{}; look at `penstock describe {}` and `penstock logs`, or wait longer with --timeout",
                document.title(),
                ready(&body),
                document.title()
            )));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// `, instances ready 1/2`.
fn ready(body: &Value) -> String {
    match ready_of_wanted(body).as_str() {
        "" => String::new(),
        ready => format!(", instances ready {ready}"),
    }
}

/// One line on standard error that is written over on a terminal, and repeated only when it
/// changes elsewhere.
struct Progress {
    tty: bool,
    last: String,
}

impl Progress {
    fn new() -> Self {
        Self {
            tty: std::io::stderr().is_terminal(),
            last: String::new(),
        }
    }

    fn show(&mut self, line: &str) {
        if line == self.last {
            return;
        }
        if self.tty {
            // Clear the line, write, stay on it.
            let _ = write!(std::io::stderr(), "\r\x1b[2K{line}");
        } else {
            remark(line);
        }
        line.clone_into(&mut self.last);
    }

    fn done(&mut self, line: &str) {
        self.show(line);
        self.end();
    }

    fn end(&mut self) {
        if self.tty && !self.last.is_empty() {
            remark("");
        }
        self.last.clear();
    }
}

/// The body of `PUT …/traffic` from shares as they were typed.
pub fn split_body(traffic: Option<Value>, mirror: Option<Value>) -> Value {
    let mut body = json!({});
    if let Some(traffic) = traffic {
        body["traffic"] = traffic;
    }
    if let Some(mirror) = mirror {
        body["mirror"] = mirror;
    }
    body
}
