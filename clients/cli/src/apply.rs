//! `apply`: creates or updates resources from documents.
//!
//! Order: endpoints, deployments, autoscales; a split that names deployments which do not exist yet
//! is set after them. All documents are read and checked before anything is sent; the first refusal
//! aborts the rest, and what was applied before is reported.

use std::collections::BTreeSet;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use ::documents::Backends;
use contract::ids::DeploymentRef;
use contract::problem::Finding;
use contract::resources::{AutoscaleMode, Resource};
use contract::time::Span;
use serde_json::{Value, json};

use super::documents::{self, SourceDocument};
use super::engine;
use super::error::CliError;
use super::kinds::ready_ratio;
use super::output::{items, print, print_notice, text};
use crate::client::{ApiResponse, Client};

/// Create or update resources from files
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock apply -f deploy/examples/quickstart
  penstock apply -f iris.yaml --set level=3 --wait
  penstock apply -f iris.yaml -f rules.yaml --dry-run
  penstock apply -f - < iris.yaml

One line per resource says created, changed or unchanged; with --dry-run, what it would be. The
documents may be in any order.")]
pub struct ApplyArgs {
    /// Files or directories of documents, or - for standard input
    #[arg(short, long = "file", value_name = "FILE|DIR|-", required = true)]
    file: Vec<PathBuf>,
    /// Let the server check everything without changing anything
    #[arg(long)]
    dry_run: bool,
    /// Wait until every deployment, also of an Autoscale, is Ready or ScaledToZero at the new revision, or has failed
    #[arg(long, conflicts_with = "dry_run")]
    wait: bool,
    /// How long to wait
    #[arg(long, value_name = "DURATION", default_value = "5m")]
    timeout: Span,
    /// Values for placeholders ({{name}}) in the documents
    #[arg(long, value_name = "KEY=VALUE", value_parser = documents::setting)]
    set: Vec<(String, String)>,
}

/// Maximum number of resources listed when an apply aborts; beyond that only their number is shown, since
/// they are all printed above.
const LISTED_MAX: usize = 20;

/// How often states are polled while waiting.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

pub async fn apply(client: &Client, args: &ApplyArgs) -> Result<(), CliError> {
    let documents = sort_for_apply(documents::load(
        &args.file,
        &args.set,
        &Backends::deferred_to_server(),
    )?);
    let mut sender = Applier::new(client, args.dry_run);
    let mut reporter = ApplyReporter {
        dry_run: args.dry_run,
        done: Vec::new(),
    };
    for document in &documents {
        match sender.put(document).await {
            Ok(put) => {
                reporter.print_result(&document.title(), &put)?;
                put.print_warnings(&document.title());
            }
            Err(error) => return Err(reporter.abort(&document.title(), &error)),
        }
    }
    for split in std::mem::take(&mut sender.postponed) {
        match sender.put_split(&split).await {
            Ok(put) => reporter.print_result(&split.title(), &put)?,
            Err(error) => return Err(reporter.abort(&split.title(), &error)),
        }
    }
    if args.wait {
        wait(client, &documents, args.timeout).await?;
    }
    Ok(())
}

/// Sorts documents into endpoints, deployments, autoscales; each kind stays in the order given.
pub fn sort_for_apply(mut documents: Vec<SourceDocument>) -> Vec<SourceDocument> {
    documents.sort_by_key(|document| document.resource.rank());
    documents
}

/// A traffic split to be set after its deployments have been created.
pub struct PostponedSplit {
    pub endpoint: String,
    body: Value,
    /// Deployments in the split that do not exist yet.
    absent: BTreeSet<String>,
}

impl PostponedSplit {
    pub fn title(&self) -> String {
        format!("traffic of {}", self.endpoint)
    }
}

/// The effect of a PUT, or the expected effect in a dry run.
pub struct PutResult {
    /// `created`, `changed` or `unchanged`.
    pub result: String,
    /// Each `{pointer, from, to}`.
    pub changes: Vec<Value>,
    /// What is valid in the document and probably not intended.
    pub warnings: Vec<Finding>,
}

impl PutResult {
    fn of(answer: &ApiResponse) -> Result<Self, CliError> {
        let body = answer.json()?;
        let changes = body.get("changes").and_then(Value::as_array);
        let warnings = body.get("warnings").cloned().unwrap_or_default();
        Ok(Self {
            result: text(&body, "/result"),
            changes: changes.cloned().unwrap_or_default(),
            // Those of servers without warnings, or of a later form, are not worth failing for.
            warnings: serde_json::from_value(warnings).unwrap_or_default(),
        })
    }

    fn planned(result: &str) -> Self {
        Self {
            result: result.to_owned(),
            changes: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Prints the warnings of a document to standard error.
    pub fn print_warnings(&self, title: &str) {
        for Finding { pointer, detail } in &self.warnings {
            print_notice(&format!("warning: {title}: {pointer}: {detail}"));
        }
    }
}

/// Sends documents one by one, in order.
pub struct Applier<'a> {
    client: &'a Client,
    dry_run: bool,
    /// Splits to be set after the deployments.
    pub postponed: Vec<PostponedSplit>,
    /// Resources that would be created, in a dry run.
    planned: BTreeSet<String>,
}

impl<'a> Applier<'a> {
    pub fn new(client: &'a Client, dry_run: bool) -> Self {
        Self {
            client,
            dry_run,
            postponed: Vec::new(),
            planned: BTreeSet::new(),
        }
    }

    fn query(&self) -> [(&'static str, Option<String>); 1] {
        [("dryRun", self.dry_run.then(|| "true".to_owned()))]
    }

    pub async fn put(&mut self, document: &SourceDocument) -> Result<PutResult, CliError> {
        if self.parent_is_only_planned(document) {
            self.planned.insert(document.title());
            return Ok(PutResult {
                warnings: engine::warnings(&document.resource),
                ..PutResult::planned("created")
            });
        }
        let mut body = document.written.clone();
        if matches!(document.resource, Resource::Endpoint(_)) {
            self.postpone_split(document, &mut body).await?;
        }
        let path = document.path();
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        let put = PutResult::of(&self.client.put(&path, &self.query(), &body).await?)?;
        if self.dry_run && put.result == "created" {
            self.planned.insert(document.title());
        }
        Ok(put)
    }

    /// Whether the parent would be created by this dry run, so that the server cannot check the document.
    fn parent_is_only_planned(&self, document: &SourceDocument) -> bool {
        let parent = match (&document.resource, document.resource.deployment()) {
            (Resource::Autoscale(_), Some(of)) => format!("deployment {of}"),
            (Resource::Deployment(deployment), _) => {
                format!("endpoint {}", deployment.metadata.endpoint)
            }
            _ => return false,
        };
        self.dry_run && self.planned.contains(&parent)
    }

    /// Moves the split out of the body if it names a deployment that does not exist yet.
    async fn postpone_split(
        &mut self,
        document: &SourceDocument,
        body: &mut Value,
    ) -> Result<(), CliError> {
        let named = names_in_split(body);
        if named.is_empty() {
            return Ok(());
        }
        let endpoint = document.resource.full_name();
        let existing = deployments_of(self.client, &endpoint).await?;
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
        self.postponed.push(PostponedSplit {
            endpoint,
            body: Value::Object(split),
            absent: named.difference(&existing).cloned().collect(),
        });
        Ok(())
    }

    /// In a dry run: checks that the documents create the missing deployments of the split.
    fn check_split(&self, split: &PostponedSplit) -> Result<(), CliError> {
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

    pub async fn put_split(&mut self, split: &PostponedSplit) -> Result<PutResult, CliError> {
        if self.dry_run {
            // The deployments do not exist yet, so the server would refuse it.
            return self
                .check_split(split)
                .map(|()| PutResult::planned("changed"));
        }
        let path = ["v1", "endpoints", split.endpoint.as_str(), "traffic"];
        PutResult::of(&self.client.put(&path, &[], &split.body).await?)
    }
}

impl PutResult {
    /// `would be created`, `would be changed` or `would stay unchanged`.
    pub fn describe_planned(&self) -> &'static str {
        match self.result.as_str() {
            "created" => "would be created",
            "unchanged" => "would stay unchanged",
            _ => "would be changed",
        }
    }
}

/// Prints one line per resource, and on a refusal what was applied before.
struct ApplyReporter {
    dry_run: bool,
    done: Vec<String>,
}

impl ApplyReporter {
    fn print_result(&mut self, title: &str, put: &PutResult) -> Result<(), CliError> {
        if self.dry_run {
            return print(&format!("{title} {}", put.describe_planned()));
        }
        let line = format!("{title} {}", put.result);
        print(&line)?;
        self.done.push(line);
        Ok(())
    }

    fn abort(&self, title: &str, error: &CliError) -> CliError {
        print_notice(&format!("penstock: {title}: {error}"));
        if self.dry_run {
            print_notice("An apply would stop there. Nothing was changed.");
        } else {
            print_notice(&format!(
                "Applied before that: {}. What follows was not sent.",
                self.applied_so_far()
            ));
        }
        CliError::Quiet(error.exit_code())
    }
}

impl ApplyReporter {
    fn applied_so_far(&self) -> String {
        let count = self.done.len();
        match self.done.last() {
            None => "nothing".into(),
            Some(_) if count <= LISTED_MAX => self.done.join(", "),
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

/// The deployments of an endpoint; none if it does not exist.
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

/// What `--wait` waits for.
struct Target {
    title: String,
    path: Vec<String>,
    deployment: Option<DeploymentRef>,
}

impl Target {
    /// An endpoint, or the deployment that a document is about.
    fn of(document: &SourceDocument) -> Self {
        let Some(of) = document.resource.deployment() else {
            return Self {
                title: document.title(),
                path: document.path(),
                deployment: None,
            };
        };
        let (endpoint, name) = (of.endpoint.as_str(), of.deployment.as_str());
        let path = ["v1", "endpoints", endpoint, "deployments", name];
        Self {
            title: format!("deployment {of}"),
            path: path.map(str::to_owned).to_vec(),
            deployment: Some(of),
        }
    }
}

/// The endpoints and deployments of the set, and the deployments whose counts its Autoscales decide.
fn targets(documents: &[SourceDocument]) -> Vec<Target> {
    let mut targets: Vec<Target> = Vec::new();
    for document in documents {
        let decides_nothing = matches!(&document.resource,
            Resource::Autoscale(autoscale) if autoscale.spec.mode != AutoscaleMode::Live);
        let target = Target::of(document);
        if !decides_nothing && targets.iter().all(|known| known.path != target.path) {
            targets.push(target);
        }
    }
    targets
}

/// Polls the targets of the set until each has succeeded or failed.
async fn wait(
    client: &Client,
    documents: &[SourceDocument],
    timeout: Span,
) -> Result<(), CliError> {
    let deadline = tokio::time::Instant::now() + timeout.to_std();
    let mut progress = Progress::new();
    let mut failed = false;
    for target in targets(documents) {
        failed |= !wait_for(client, &target, deadline, timeout, &mut progress).await?;
    }
    if failed {
        return Err(CliError::Quiet(1));
    }
    Ok(())
}

/// Polls one target; returns whether it succeeded.
async fn wait_for(
    client: &Client,
    target: &Target,
    deadline: tokio::time::Instant,
    timeout: Span,
    progress: &mut Progress,
) -> Result<bool, CliError> {
    let title = &target.title;
    let path: Vec<&str> = target.path.iter().map(String::as_str).collect();
    let mut is_decided = false;
    loop {
        // First, so that the state is not older than the decision.
        is_decided = is_decided || !awaits_decision(client, target).await?;
        let body = client.get(&path, &[]).await?.json()?;
        let state = text(&body, "/status/provisioningState");
        let reason = text(&body, "/status/reason");
        let pending = match is_decided {
            true => available(&body),
            false => ", its Autoscale has not decided yet".into(),
        };
        match state.as_str() {
            "Succeeded" if is_decided && is_available(&body) => {
                progress.done(&format!("{title} Succeeded{}", ready(&body)));
                return Ok(true);
            }
            "Failed" => {
                progress.done(&format!("{title} Failed: {reason}"));
                return Ok(false);
            }
            _ => progress.show(&format!("{title} {state}{pending}")),
        }
        if tokio::time::Instant::now() >= deadline {
            progress.end();
            return Err(CliError::Failed(format!(
                "{title} is still {state} after {timeout}{pending}; look at `penstock describe {title}` and `penstock logs`, or wait longer with --timeout"
            )));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Whether the decisions of an Autoscale are carried out for a deployment and its present revision has not
/// been evaluated yet, so that the count may change at once.
async fn awaits_decision(client: &Client, target: &Target) -> Result<bool, CliError> {
    let Some(of) = &target.deployment else {
        return Ok(false);
    };
    let path = [
        "v1",
        "autoscale",
        of.endpoint.as_str(),
        of.deployment.as_str(),
    ];
    let Some(autoscale) = client.find(&path).await? else {
        return Ok(false);
    };
    let autoscale = autoscale.json()?;
    if !matches!(text(&autoscale, "/spec/mode").as_str(), "" | "live") {
        return Ok(false);
    }
    let last = text(&autoscale, "/status/lastDecision/id");
    if last.is_empty() {
        return Ok(true);
    }
    let decision = client.get(&["v1", "decisions", &last], &[]).await?.json()?;
    // The first evaluation of a revision is recorded, whatever it decides.
    let evaluated = decision.pointer("/inputs/policyRevision");
    Ok(evaluated != autoscale.pointer("/metadata/revision"))
}

/// Whether nothing is left to wait for. Endpoints, and servers of earlier releases, show no condition.
fn is_available(body: &Value) -> bool {
    let reason = text(body, "/status/available/reason");
    matches!(reason.as_str(), "" | "Ready" | "ScaledToZero")
}

/// `, Failing: 0 of 1 instance is ready; the last one failed: …`; only the ready count from servers
/// without the condition.
fn available(body: &Value) -> String {
    let part = |field| text(body, &format!("/status/available/{field}"));
    match part("reason").as_str() {
        "" => ready(body),
        reason => format!(", {reason}: {}", part("message")),
    }
}

/// `, instances ready 1/2`.
fn ready(body: &Value) -> String {
    match ready_ratio(body).as_str() {
        "" => String::new(),
        ready => format!(", instances ready {ready}"),
    }
}

/// A progress line on standard error: overwritten on a terminal, otherwise printed only when it changes.
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
            // Clear and rewrite the current line.
            let _ = write!(std::io::stderr(), "\r\x1b[2K{line}");
        } else {
            print_notice(line);
        }
        line.clone_into(&mut self.last);
    }

    fn done(&mut self, line: &str) {
        self.show(line);
        self.end();
    }

    fn end(&mut self) {
        if self.tty && !self.last.is_empty() {
            print_notice("");
        }
        self.last.clear();
    }
}

/// The body of `PUT …/traffic`.
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
