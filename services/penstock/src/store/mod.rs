//! `store`: maintains the store itself, without a server: migrates it, backs it up, rebuilds it (also from
//! Kafka), compares two stores, and moves old events of the log into archives. The last is done by the
//! server if one holds the store.
//!
//! Invariant: nothing is created, moved or migrated implicitly; a store that does not exist is an error.

mod archive;
mod compare;
mod comparison;
#[cfg(feature = "kafka")]
mod external_sort;
// Without Kafka, a stub.
#[cfg_attr(not(feature = "kafka"), path = "no_kafka.rs")]
mod kafka;
mod lease;
mod rebuild;
mod republish;
mod slow_notice;
mod verify;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use contract::ids::{Bucket, Position};
use contract::time::Span;
use meter::HistoryLocation;
use serde::Serialize;
use store::{LogHash, Store};

use cli::client::config::{ConnectArgs, default_data_dir};
use cli::error::{BoxedError, CliError};
use cli::output::{print, print_notice};

/// Migrate, verify, back up, archive, rebuild and compare stores without a server; restore them from Kafka, and Kafka from them
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store migrate --check
  penstock store verify
  penstock store backup penstock-backup.db
  penstock store rebuild
  penstock store rebuild --from penstock-backup.db --store postgres://penstock@localhost/penstock
  penstock store rebuild --from kafka://localhost:9092/penstock --store sqlite:restored.db
  penstock store republish --to kafka://localhost:9092/penstock
  penstock store archive --older-than 90d
  penstock store hash
  penstock store compare sqlite:a.db sqlite:b.db
  penstock store compare penstock-backup.db kafka://localhost:9092/penstock

Except for archive, a store in a file must not be in use: stop the server first.")]
pub struct StoreArgs {
    #[command(subcommand)]
    command: StoreCommand,
}

#[derive(Debug, clap::Subcommand)]
enum StoreCommand {
    Migrate(MigrateArgs),
    Verify(verify::VerifyArgs),
    Backup(BackupArgs),
    Archive(ArchiveArgs),
    Archives(ArchivesArgs),
    Rebuild(RebuildArgs),
    Republish(RepublishArgs),
    Hash(HashArgs),
    Compare(CompareArgs),
}

/// Selects the store.
#[derive(Debug, clap::Args)]
struct StoreSelector {
    /// sqlite:PATH or postgres://USER:PASSWORD@HOST/DATABASE; in the data folder by default
    #[arg(
        long,
        value_name = "URL",
        env = "PENSTOCK_STORE",
        hide_env_values = true
    )]
    store: Option<String>,
    /// The data folder
    #[arg(long, value_name = "DIR", env = "PENSTOCK_DATA", default_value_os_t = default_data_dir())]
    data: PathBuf,
    /// The folder of the store's archives; by default where they were sealed, or `archive` next to a store in a file
    #[arg(long, value_name = "DIR", env = "PENSTOCK_ARCHIVE")]
    archive: Option<PathBuf>,
}

impl StoreSelector {
    /// Opens the store, which must exist and be up to date.
    async fn open(&self) -> Result<Store, CliError> {
        open_with_archives(&self.url(), self.archive.as_deref()).await
    }

    /// Where `serve` with the same arguments keeps the chart history; in a file next to the store if there
    /// is one, as with the data folder of another installation.
    fn history(&self) -> HistoryLocation {
        match self.beside_file("history.db").filter(|file| file.exists()) {
            Some(file) => HistoryLocation::File(file),
            None => HistoryLocation::for_store(&self.url(), &self.data),
        }
    }

    /// The path of a file next to the store, if that is in a file.
    fn beside_file(&self, name: &str) -> Option<PathBuf> {
        let url = self.url();
        let path = url.strip_prefix("sqlite:")?;
        Some(Path::new(path).with_file_name(name))
    }

    fn url(&self) -> String {
        let in_data = || format!("sqlite:{}", self.data.join("penstock.db").display());
        self.store.clone().unwrap_or_else(in_data)
    }
}

/// Bring a store up to this release's format
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store migrate
  penstock store migrate --check --store postgres://penstock@localhost/penstock

With --check nothing is changed; exit 1 if migrations are pending.")]
struct MigrateArgs {
    #[command(flatten)]
    selector: StoreSelector,
    /// Only report what would be done
    #[arg(long)]
    check: bool,
    /// Output format
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// Move old events from the store into archives, from which they are read as before
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store archive
  penstock store archive --older-than 90d --dry-run
  penstock store archive --before 120000
  penstock store archive --store postgres://penstock@localhost/penstock --archive /srv/penstock/archive

A store in a file that a running server holds is archived by that server, found through client.json next
to the file (else as by all commands), with an administrator's token. Events are sealed up to the lowest position that a service would resume from; what prevents sealing more
is reported. Reports, replay, verify, export and backups read archives like the store. Archives must stay
in place, reachable by every process with the store: a missing file is an error that names it. A SQLite
file keeps its size and reuses the free space; a backup of it is small.

Once events are sealed, releases without support for archives refuse the store (its format is 3). A
server can also do it daily by itself: `penstock serve --archive-after 30d`.

Exit codes:
  0  done, or nothing to do
  1  refused, or failed: archives sealed so far stay, and the next run continues
  2  usage")]
struct ArchiveArgs {
    #[command(flatten)]
    selector: StoreSelector,
    /// Only events older than this; 30d unless --before is given
    #[arg(long, value_name = "AGE")]
    older_than: Option<Span>,
    /// Only events below this position
    #[arg(long, value_name = "POSITION")]
    before: Option<u64>,
    /// Only report what would be sealed
    #[arg(long)]
    dry_run: bool,
    /// Output format
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// List the archives that hold the beginning of the log
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store archives
  penstock store archives -o json

`penstock events verify` checks that the archives are unchanged.")]
struct ArchivesArgs {
    #[command(flatten)]
    selector: StoreSelector,
    /// Output format
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// Copy a store into a new file, from which a store of either kind can be restored
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store backup penstock-backup.db
  penstock store backup /backup/monday.db --store postgres://penstock@localhost/penstock

The file is a complete store (sqlite:FILE). Archives are included: for a store in a file they are copied
to the folder `archive` next to the backup, which the backups of one store share. The chart history is
copied to FILE with the extension history.db, also from PostgreSQL: `penstock serve` reads it as
history.db in its data folder.")]
struct BackupArgs {
    /// A file that does not exist yet
    #[arg(value_name = "TO-FILE")]
    to: PathBuf,
    #[command(flatten)]
    selector: StoreSelector,
    /// Output format
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// Rebuild the read models from the log, optionally after restoring the log from a backup or from Kafka
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store rebuild
  penstock store rebuild --from penstock-backup.db --store sqlite:restored.db
  penstock store rebuild --from kafka://localhost:9092/penstock --store sqlite:restored.db

With --from the store must be empty or hold a prefix of the same log, so an interrupted run can be
resumed. Kafka's log is imported up to its first gap; missing events and events left out beyond the
gap are reported with exit 1. Events are imported byte for byte, including those written by a newer
release; an endpoint with an event that this release cannot read is parked. Kafka does not have the
responses for repeated requests (Idempotency-Key); everything else is in the log.

Exit 3 if no broker answers for 30 seconds.")]
struct RebuildArgs {
    #[command(flatten)]
    selector: StoreSelector,
    /// A backup, any other store (URL), or kafka://HOST:PORT/PREFIX
    #[arg(long, value_name = "FILE")]
    from: Option<String>,
    /// Output format
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// Republish the log, to topics that were lost or are new
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store republish --to kafka://localhost:9092/penstock
  penstock store republish --to kafka://localhost:9092/penstock --after 120000

Stop the services that share the store first, so that nothing else publishes. A process that publishes
holds the lease `relay`, and makes this command give up after ten seconds; while the command runs, no
other process publishes. The relay then continues from where the command ended. Events that already
exist are published again, which is harmless.

Exit 3 if no broker answers for 30 seconds.")]
struct RepublishArgs {
    /// kafka://HOST:PORT[,HOST:PORT]/PREFIX; missing topics are created
    #[arg(long, value_name = "URL", env = "PENSTOCK_BUS", hide_env_values = true)]
    to: String,
    #[command(flatten)]
    selector: StoreSelector,
    /// Only events above this position
    #[arg(long, value_name = "POSITION", default_value_t = 0)]
    after: u64,
    /// Output format
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// Print a hash over all events and their positions
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store hash
  penstock store hash --up-to 120000 -o json
  penstock store hash --store kafka://localhost:9092/penstock

Equal logs have equal hashes, whatever the database. Kafka's log is hashed up to its first gap.")]
struct HashArgs {
    #[command(flatten)]
    selector: StoreSelector,
    /// Only events up to this position
    #[arg(long, value_name = "POSITION")]
    up_to: Option<u64>,
    /// Output format
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// Prove that two stores hold the same log, or show where they diverge
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store compare sqlite:penstock.db penstock-backup.db
  penstock store compare sqlite:a.db postgres://penstock@localhost/penstock --up-to 120000
  penstock store compare penstock-backup.db kafka://localhost:9092/penstock
  penstock store compare --exact penstock-backup.db kafka://localhost:9092/penstock

Events are compared byte for byte, including those that this release cannot read. A store and Kafka
are compared up to the first gap in either, and at least up to the position that Kafka has confirmed
to the store's relay. Events beyond that in one of them are counted and reported: while services run,
the newest events are often only in the store for a moment.

Exit codes:
  0  equal in the compared range; newer events in one of them are not a difference
  1  different (also if one has no events at all, and with --exact if one has newer events),
     or one cannot be read
  2  usage
  3  no broker answered for 30 seconds")]
struct CompareArgs {
    /// A file, a URL, or kafka://HOST:PORT/PREFIX
    a: String,
    /// A file, a URL, or kafka://HOST:PORT/PREFIX
    b: String,
    /// Only events up to this position
    #[arg(long, value_name = "POSITION")]
    up_to: Option<u64>,
    /// Both must end at the same position
    #[arg(long, conflicts_with = "up_to")]
    exact: bool,
    /// Output format
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Text,
    Json,
}

impl Format {
    fn print(self, text: &str, value: &impl Serialize) -> Result<(), CliError> {
        match self {
            Self::Text => print(text),
            Self::Json => {
                let json = serde_json::to_string(value);
                print(&json.map_err(|error| CliError::Failed(error.to_string()).caused_by(error))?)
            }
        }
    }
}

pub fn store(connect: &ConnectArgs, args: &StoreArgs) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| {
            CliError::Failed(format!("the command cannot start: {error}")).caused_by(error)
        })?;
    let done = runtime.block_on(async {
        match &args.command {
            StoreCommand::Migrate(args) => migrate(args).await,
            StoreCommand::Verify(args) => Box::pin(verify::verify(args)).await,
            StoreCommand::Backup(args) => Box::pin(backup(args)).await,
            StoreCommand::Archive(args) => Box::pin(archive::archive(args, connect)).await,
            StoreCommand::Archives(args) => archive::archives(args).await,
            StoreCommand::Rebuild(args) => Box::pin(rebuild::rebuild(args)).await,
            StoreCommand::Republish(args) => Box::pin(republish::republish(args)).await,
            StoreCommand::Hash(args) => Box::pin(compare::hash(args)).await,
            StoreCommand::Compare(args) => Box::pin(compare::compare(args)).await,
        }
    });
    match done {
        Ok(()) => Ok(()),
        Err(error) => Err(runtime.block_on(with_damage(error, &args.command.stores()))),
    }
}

/// If the error is that a store is damaged, describes the damage of the first store that is.
async fn with_damage(error: CliError, stores: &[String]) -> CliError {
    let Some(damage) = store::damage_in(&error).cloned() else {
        return error;
    };
    for url in stores {
        if let Some(described) = store::describe_damage(url, &damage).await {
            return failed(described);
        }
    }
    error
}

impl StoreCommand {
    /// The URLs of the stores that it reads or writes.
    fn stores(&self) -> Vec<String> {
        match self {
            Self::Migrate(args) => vec![args.selector.url()],
            Self::Verify(args) => vec![args.selector.url()],
            Self::Backup(args) => vec![args.selector.url()],
            Self::Archive(args) => vec![args.selector.url()],
            Self::Archives(args) => vec![args.selector.url()],
            Self::Rebuild(args) => {
                let from = args.from.as_deref().map(store_url);
                from.into_iter().chain([args.selector.url()]).collect()
            }
            Self::Republish(args) => vec![args.selector.url()],
            Self::Hash(args) => vec![args.selector.url()],
            Self::Compare(args) => vec![store_url(&args.a), store_url(&args.b)],
        }
    }
}

fn failed(error: impl Into<BoxedError>) -> CliError {
    let error = error.into();
    CliError::Failed(error.to_string()).caused_by(error)
}

fn is_kafka_url(location: &str) -> bool {
    location.starts_with("kafka://")
}

/// A URL without its options, which may contain paths that should not be shown.
fn without_options(url: &str) -> &str {
    url.split('?').next().unwrap_or_default()
}

/// The extent of the log on Kafka, as far as it could be read.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(
    not(feature = "kafka"),
    allow(dead_code, reason = "a binary without Kafka makes none")
)]
struct Extent {
    /// There is no gap up to this position.
    #[serde(rename = "whole")]
    contiguous: Position,
    /// The highest position that was found.
    last: Position,
    records: u64,
    /// Identical duplicates.
    repeated: u64,
    #[serde(rename = "holes")]
    gaps: Vec<Gap>,
    /// Locations of messages that could not be read, and why.
    unreadable: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(
    not(feature = "kafka"),
    allow(dead_code, reason = "a binary without Kafka makes none")
)]
struct Gap {
    missing: Position,
    bucket: Bucket,
    needed_by: Position,
}

impl Extent {
    /// Maximum number of gaps and of messages in text output; JSON has all of them.
    const NAMED_MAX: usize = 10;

    fn lines(&self, of: &str) -> Vec<String> {
        let mut lines = vec![format!(
            "{}: {} events, contiguous up to position {}, the last at {}",
            without_options(of),
            self.records,
            self.contiguous,
            self.last
        )];
        let missing = self.gaps.iter().take(Self::NAMED_MAX).map(|gap| {
            format!(
                "missing: position {} of bucket {}, before position {}",
                gap.missing, gap.bucket, gap.needed_by
            )
        });
        lines.extend(missing);
        let unreadable = self.unreadable.iter().take(Self::NAMED_MAX);
        lines.extend(unreadable.map(|message| format!("unreadable: {message}")));
        let all = self.gaps.len().max(self.unreadable.len());
        if all > Self::NAMED_MAX {
            lines.push("and more: see -o json".to_owned());
        }
        lines
    }
}

/// The store URL of a location, which may be a plain file name.
fn store_url(location: &str) -> String {
    match location.contains("://") || location.starts_with("sqlite:") {
        true => location.to_owned(),
        false => format!("sqlite:{location}"),
    }
}

/// Opens a store that exists and needs no migration.
async fn open(url: &str) -> Result<Store, CliError> {
    open_with_archives(url, None).await
}

/// As [`open`], with the folder of its archives.
async fn open_with_archives(url: &str, archives: Option<&Path>) -> Result<Store, CliError> {
    let inspection = store::inspect(url).await.map_err(failed)?;
    if inspection.format.is_none() {
        return Err(CliError::Failed(format!(
            "there is no store at {}: choose another with --store or --data",
            inspection.store
        )));
    }
    if !inspection.pending.is_empty() {
        return Err(CliError::Failed(format!(
            "{} is not up to date: run `penstock store migrate` first",
            inspection.store
        )));
    }
    Store::open_with(url, archives).await.map_err(failed)
}

async fn migrate(args: &MigrateArgs) -> Result<(), CliError> {
    let url = args.selector.url();
    if !args.check {
        let mut progress = Progress::new("events chained up to position");
        let say = |up_to: Position, last: Position| progress.report(up_to.0, last.0);
        let done = store::migrate_with(&url, say).await.map_err(failed)?;
        let from = done
            .from
            .map_or("nothing".to_owned(), |from| format!("format {from}"));
        let applied = list(&done.applied, "nothing to do");
        let text = format!(
            "{}: from {from} to format {}: {applied}",
            done.store, done.to
        );
        return args.output.print(&text, &done);
    }
    let inspection = store::inspect(&url).await.map_err(failed)?;
    let format = inspection
        .format
        .map_or("no tables".to_owned(), |at| format!("format {at}"));
    let pending = list(&inspection.pending, "nothing to do");
    let text = format!(
        "{}: {format}; this release writes format {}: {pending}",
        inspection.store, inspection.known
    );
    args.output.print(&text, &inspection)?;
    match inspection.pending.is_empty() {
        true => Ok(()),
        false => Err(CliError::Quiet(1)),
    }
}

fn list(names: &[String], none: &str) -> String {
    match names.is_empty() {
        true => none.to_owned(),
        false => names.join(", "),
    }
}

/// Reports progress on standard error at intervals.
struct Progress {
    label: &'static str,
    last: Instant,
}

impl Progress {
    const EVERY: Duration = Duration::from_secs(2);

    fn new(label: &'static str) -> Self {
        Self {
            label,
            last: Instant::now(),
        }
    }

    fn report(&mut self, done: u64, of: u64) {
        if self.last.elapsed() < Self::EVERY {
            return;
        }
        self.last = Instant::now();
        let percent = done * 100 / of.max(1);
        print_notice(&format!("{}: {done} of {of} ({percent} %)", self.label));
    }

    /// As [`report`](Self::report), where the total is unknown.
    #[cfg(feature = "kafka")]
    fn count(&mut self, done: u64) {
        if self.last.elapsed() < Self::EVERY {
            return;
        }
        self.last = Instant::now();
        print_notice(&format!("{}: {done}", self.label));
    }
}

async fn backup(args: &BackupArgs) -> Result<(), CliError> {
    let store = args.selector.open().await?;
    let mut progress = Progress::new("events copied");
    let done = store::backup(&store, &args.to, |done, of| progress.report(done, of)).await;
    store.close().await;
    let hash = done.map_err(failed)?;
    let mut text = format!("{}: {}", args.to.display(), describe_hash(&hash));
    let to = args.to.with_extension("history.db");
    let history = meter::backup_history(&args.selector.history(), &to).await;
    if history.map_err(failed)? {
        text.push_str(&format!("\n{}: the chart history", to.display()));
    }
    args.output.print(&text, &hash)
}

fn describe_hash(hash: &LogHash) -> String {
    format!(
        "{} events up to position {}, sha256 {}",
        hash.events, hash.head, hash.sha256
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_store_is_an_error_and_is_not_created() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("none.db");
        let refused = open(&store_url(&path.display().to_string())).await;
        let refused = refused.err().unwrap().to_string();
        assert!(refused.contains("there is no store at"), "{refused}");
        assert!(!path.exists());
    }

    #[test]
    fn a_file_name_becomes_a_store_url_and_a_url_is_kept() {
        assert_eq!(store_url("b.db"), "sqlite:b.db");
        for url in ["sqlite:b.db", "postgres://h/d"] {
            assert_eq!(store_url(url), url);
        }
    }
}
