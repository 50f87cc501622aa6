//! `store`: looks after the store itself, without a server: brings it up to date, copies it, makes it
//! again, from Kafka too, proves that two are the same, and moves what is old of the log into files.
//!
//! Invariant: nothing is made, moved or migrated that was not asked for; a store that is not there is
//! an error.

mod archive;
mod compare;
// The same without Kafka, where the binary is built without it.
#[cfg_attr(not(feature = "kafka"), path = "no_kafka.rs")]
mod kafka;
mod lease;
mod rebuild;
mod republish;
#[cfg(feature = "kafka")]
mod spool;
mod verdict;
mod waiting;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use contract::ids::{Bucket, Position};
use contract::time::Span;
use serde::Serialize;
use store::{LogHash, Store};

use cli::client::config::default_data_dir;
use cli::error::CliError;
use cli::output::{print, remark};

/// Migrate, back up, archive, rebuild and compare stores, without a server; make them from Kafka, and Kafka from them
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store migrate --check
  penstock store backup penstock-backup.db
  penstock store rebuild
  penstock store rebuild --from penstock-backup.db --store postgres://penstock@localhost/penstock
  penstock store rebuild --from kafka://localhost:9092/penstock --store sqlite:again.db
  penstock store republish --to kafka://localhost:9092/penstock
  penstock store archive --older-than 90d
  penstock store hash
  penstock store compare sqlite:a.db sqlite:b.db
  penstock store compare penstock-backup.db kafka://localhost:9092/penstock

A store in a file must not be in use: stop the server first.")]
pub struct StoreArgs {
    #[command(subcommand)]
    command: StoreCommand,
}

#[derive(Debug, clap::Subcommand)]
enum StoreCommand {
    Migrate(MigrateArgs),
    Backup(BackupArgs),
    Archive(ArchiveArgs),
    Archives(ArchivesArgs),
    Rebuild(RebuildArgs),
    Republish(RepublishArgs),
    Hash(HashArgs),
    Compare(CompareArgs),
}

/// Which store.
#[derive(Debug, clap::Args)]
struct Which {
    /// sqlite:PATH or postgres://USER:PASSWORD@HOST/DATABASE; in the data directory unless given
    #[arg(
        long,
        value_name = "URL",
        env = "PENSTOCK_STORE",
        hide_env_values = true
    )]
    store: Option<String>,
    /// The data directory
    #[arg(long, value_name = "DIR", env = "PENSTOCK_DATA", default_value_os_t = default_data_dir())]
    data: PathBuf,
    /// Where the store's archives are; `archive` beside a file, and where they were sealed unless given
    #[arg(long, value_name = "DIR", env = "PENSTOCK_ARCHIVE")]
    archive: Option<PathBuf>,
}

impl Which {
    /// The store, which is there and up to date.
    async fn open(&self) -> Result<Store, CliError> {
        open_in(&self.url(), self.archive.as_deref()).await
    }

    /// The history for charts, of a store in a file that has one beside it.
    fn history(&self) -> Option<PathBuf> {
        let url = self.url();
        let history = Path::new(url.strip_prefix("sqlite:")?).with_file_name("history.db");
        history.exists().then_some(history)
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

With --check nothing is changed, and exit 1 says that something would be.")]
struct MigrateArgs {
    #[command(flatten)]
    which: Which,
    /// Only say what would be done
    #[arg(long)]
    check: bool,
    /// How the answer is written
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// Move what is old of the log from the store into files, from which it is read as before
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store archive
  penstock store archive --older-than 90d --dry-run
  penstock store archive --before 120000
  penstock store archive --store postgres://penstock@localhost/penstock --archive /srv/penstock/archive

Sealed is what lies below everything that a service would read on from; what is in the way of more is
said. Everything reads the files as it read the store: reports, replay, verify, export, backups. They
must stay where they are, and every process with the store must reach them: a file that is missing is
an error that names it. A file of SQLite keeps its size and fills the room again; a backup is small.

Once something is sealed, releases that know no archives refuse the store (its format is 3). Beside a
running server on a PostgreSQL this command may run; a server can do it daily by itself:
`penstock serve --archive-after 30d`.

Exit codes:
  0  done, or nothing to do
  1  refused, or failed: what was sealed before stays, and the next run goes on
  2  usage")]
struct ArchiveArgs {
    #[command(flatten)]
    which: Which,
    /// Only events older than this; 30d unless --before is given
    #[arg(long, value_name = "AGE")]
    older_than: Option<Span>,
    /// Only events below this position
    #[arg(long, value_name = "POSITION")]
    before: Option<u64>,
    /// Only say what would be sealed
    #[arg(long)]
    dry_run: bool,
    /// How the answer is written
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// List the files that hold the beginning of the log
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store archives
  penstock store archives -o json

Whether the files are as they were sealed says `penstock events verify`.")]
struct ArchivesArgs {
    #[command(flatten)]
    which: Which,
    /// How the answer is written
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// Copy a store into a new file, from which one of either kind can be made again
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store backup penstock-backup.db
  penstock store backup /backup/monday.db --store postgres://penstock@localhost/penstock

The file is a store of its own (sqlite:FILE). What stands in archives comes with it: of a store in a
file as files in the folder `archive` beside it, which the backups of one store share; the history for
charts, where there is one, as FILE with the ending history.db.")]
struct BackupArgs {
    /// A file that does not exist yet
    #[arg(value_name = "TO-FILE")]
    to: PathBuf,
    #[command(flatten)]
    which: Which,
    /// How the answer is written
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// Make the read models anew from the log; or first the log from a backup, or from Kafka
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store rebuild
  penstock store rebuild --from penstock-backup.db --store sqlite:restored.db
  penstock store rebuild --from kafka://localhost:9092/penstock --store sqlite:again.db

With --from the store must be empty, or hold the beginning of the same log: what was broken off
can be taken up again. Kafka's log is taken up to where it is whole: what is missing and what is
left out above is named, and exit 1 says so. Events are taken byte for byte, also those that a
newer release has written; an endpoint with one that this release cannot read is parked. Kafka
has no answers to repeated requests (Idempotency-Key); all else is in the log.

Exit 3 where no broker answers for 30 seconds.")]
struct RebuildArgs {
    #[command(flatten)]
    which: Which,
    /// A backup, any other store (URL), or kafka://HOST:PORT/PREFIX
    #[arg(long, value_name = "FILE")]
    from: Option<String>,
    /// How the answer is written
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// Publish the log once more, to topics that were lost or are new
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store republish --to kafka://localhost:9092/penstock
  penstock store republish --to kafka://localhost:9092/penstock --after 120000

For when nobody else publishes: stop the services that share the store first. A process that
publishes holds the lease `relay`, and makes this command give up after ten seconds; while it
runs, no other publishes. The relay then goes on from where it ended. Events that are there
already are published again, which does no harm.

Exit 3 where no broker answers for 30 seconds.")]
struct RepublishArgs {
    /// kafka://HOST:PORT[,HOST:PORT]/PREFIX; topics that are missing are made
    #[arg(long, value_name = "URL", env = "PENSTOCK_BUS", hide_env_values = true)]
    to: String,
    #[command(flatten)]
    which: Which,
    /// Only events above this position
    #[arg(long, value_name = "POSITION", default_value_t = 0)]
    after: u64,
    /// How the answer is written
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// Print a hash over all events and their places
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store hash
  penstock store hash --up-to 120000 -o json
  penstock store hash --store kafka://localhost:9092/penstock

Equal logs have equal hashes, in whatever database they are. Kafka's is taken up to where it is whole.")]
struct HashArgs {
    #[command(flatten)]
    which: Which,
    /// Only events up to this position
    #[arg(long, value_name = "POSITION")]
    up_to: Option<u64>,
    /// How the answer is written
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// Prove that two stores hold the same log, or say where they part
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store compare sqlite:penstock.db penstock-backup.db
  penstock store compare sqlite:a.db postgres://penstock@localhost/penstock --up-to 120000
  penstock store compare penstock-backup.db kafka://localhost:9092/penstock
  penstock store compare --exact penstock-backup.db kafka://localhost:9092/penstock

Events are compared byte for byte, also those that this release cannot read. A store and Kafka
are compared up to where both are whole, and at least up to where the store's relay has had
everything confirmed. What one of them has above is counted and said: beside running services
the newest events are often in the store only, for a moment.

Exit codes:
  0  equal as far as they are compared; newer events in one of them are no difference
  1  not the same (also where one has no event at all, and with --exact where one has newer
     events), or one cannot be read
  2  usage
  3  no broker answers for 30 seconds")]
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
    /// How the answer is written
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Text,
    Json,
}

impl Format {
    fn show(self, text: &str, value: &impl Serialize) -> Result<(), CliError> {
        match self {
            Self::Text => print(text),
            Self::Json => {
                let json = serde_json::to_string(value);
                print(&json.map_err(|error| CliError::Failed(error.to_string()))?)
            }
        }
    }
}

pub fn store(args: &StoreArgs) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CliError::Failed(format!("the command cannot start: {error}")))?;
    runtime.block_on(async {
        match &args.command {
            StoreCommand::Migrate(args) => migrate(args).await,
            StoreCommand::Backup(args) => Box::pin(backup(args)).await,
            StoreCommand::Archive(args) => Box::pin(archive::archive(args)).await,
            StoreCommand::Archives(args) => archive::archives(args).await,
            StoreCommand::Rebuild(args) => Box::pin(rebuild::rebuild(args)).await,
            StoreCommand::Republish(args) => Box::pin(republish::republish(args)).await,
            StoreCommand::Hash(args) => Box::pin(compare::hash(args)).await,
            StoreCommand::Compare(args) => Box::pin(compare::compare(args)).await,
        }
    })
}

fn failed(error: impl std::fmt::Display) -> CliError {
    CliError::Failed(error.to_string())
}

fn is_kafka(place: &str) -> bool {
    place.starts_with("kafka://")
}

/// A URL without its options: they may hold paths that nobody needs to see.
fn shown(url: &str) -> &str {
    url.split('?').next().unwrap_or_default()
}

/// What Kafka had, as far as it could be read.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(
    not(feature = "kafka"),
    allow(dead_code, reason = "a binary without Kafka makes none")
)]
struct Extent {
    /// Every position up to here was there.
    whole: Position,
    /// The highest position that was there.
    last: Position,
    records: u64,
    /// Records that were there before, and were the same.
    repeated: u64,
    holes: Vec<Hole>,
    /// Places of messages that could not be read, and why.
    unreadable: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(
    not(feature = "kafka"),
    allow(dead_code, reason = "a binary without Kafka makes none")
)]
struct Hole {
    missing: Position,
    bucket: Bucket,
    needed_by: Position,
}

impl Extent {
    /// Holes and messages that are named one by one; all of them are in the JSON.
    const NAMED_MAX: usize = 10;

    fn lines(&self, of: &str) -> Vec<String> {
        let mut lines = vec![format!(
            "{}: {} events, whole up to position {}, the last at {}",
            shown(of),
            self.records,
            self.whole,
            self.last
        )];
        let missing = self.holes.iter().take(Self::NAMED_MAX).map(|hole| {
            format!(
                "missing: position {} of bucket {}, which the one at {} follows",
                hole.missing, hole.bucket, hole.needed_by
            )
        });
        lines.extend(missing);
        let unreadable = self.unreadable.iter().take(Self::NAMED_MAX);
        lines.extend(unreadable.map(|what| format!("unreadable: {what}")));
        let all = self.holes.len().max(self.unreadable.len());
        if all > Self::NAMED_MAX {
            lines.push("and more: see -o json".to_owned());
        }
        lines
    }
}

/// A file is a store as well.
fn url_of(place: &str) -> String {
    match place.contains("://") || place.starts_with("sqlite:") {
        true => place.to_owned(),
        false => format!("sqlite:{place}"),
    }
}

/// Opens a store that is there, and needs no migration.
async fn open(url: &str) -> Result<Store, CliError> {
    open_in(url, None).await
}

/// The same, with its archives in a folder.
async fn open_in(url: &str, archives: Option<&Path>) -> Result<Store, CliError> {
    let found = store::inspect(url).await.map_err(failed)?;
    if found.format.is_none() {
        return Err(CliError::Failed(format!(
            "there is no store at {}: name another with --store or --data",
            found.store
        )));
    }
    if !found.pending.is_empty() {
        return Err(CliError::Failed(format!(
            "{} is not up to date: run `penstock store migrate` first",
            found.store
        )));
    }
    Store::open_with(url, archives).await.map_err(failed)
}

async fn migrate(args: &MigrateArgs) -> Result<(), CliError> {
    let url = args.which.url();
    if !args.check {
        let mut progress = Progress::new("events chained up to position");
        let say = |up_to: Position, last: Position| progress.say(up_to.0, last.0);
        let done = store::migrate_with(&url, say).await.map_err(failed)?;
        let from = done
            .from
            .map_or("nothing".to_owned(), |from| format!("format {from}"));
        let applied = list(&done.applied, "nothing to do");
        let text = format!(
            "{}: from {from} to format {}: {applied}",
            done.store, done.to
        );
        return args.output.show(&text, &done);
    }
    let found = store::inspect(&url).await.map_err(failed)?;
    let format = found
        .format
        .map_or("no tables".to_owned(), |at| format!("format {at}"));
    let pending = list(&found.pending, "nothing to do");
    let text = format!(
        "{}: {format}; this release writes format {}: {pending}",
        found.store, found.known
    );
    args.output.show(&text, &found)?;
    match found.pending.is_empty() {
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

/// Says how far something is, once in a while.
struct Progress {
    what: &'static str,
    last: Instant,
}

impl Progress {
    const EVERY: Duration = Duration::from_secs(2);

    fn new(what: &'static str) -> Self {
        Self {
            what,
            last: Instant::now(),
        }
    }

    fn say(&mut self, done: u64, of: u64) {
        if self.last.elapsed() < Self::EVERY {
            return;
        }
        self.last = Instant::now();
        let percent = done * 100 / of.max(1);
        remark(&format!("{}: {done} of {of} ({percent} %)", self.what));
    }

    /// The same where nobody knows how many there are.
    #[cfg(feature = "kafka")]
    fn count(&mut self, done: u64) {
        if self.last.elapsed() < Self::EVERY {
            return;
        }
        self.last = Instant::now();
        remark(&format!("{}: {done}", self.what));
    }
}

async fn backup(args: &BackupArgs) -> Result<(), CliError> {
    let store = args.which.open().await?;
    let mut progress = Progress::new("events copied");
    let done = store::backup(&store, &args.to, |done, of| progress.say(done, of)).await;
    store.close().await;
    let hash = done.map_err(failed)?;
    let mut text = format!("{}: {}", args.to.display(), line(&hash));
    if let Some(history) = args.which.history() {
        let to = args.to.with_extension("history.db");
        store::backup_file(&history, &to).await.map_err(failed)?;
        text.push_str(&format!("\n{}: the history for charts", to.display()));
    }
    args.output.show(&text, &hash)
}

fn line(hash: &LogHash) -> String {
    format!(
        "{} events up to position {}, sha256 {}",
        hash.events, hash.head, hash.sha256
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_store_that_is_not_there_is_an_error_and_is_not_made() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("none.db");
        let refused = open(&url_of(&path.display().to_string())).await;
        let refused = refused.err().unwrap().to_string();
        assert!(refused.contains("there is no store at"), "{refused}");
        assert!(!path.exists());
    }

    #[test]
    fn a_file_is_a_store_and_a_url_stays_what_it_is() {
        assert_eq!(url_of("b.db"), "sqlite:b.db");
        for url in ["sqlite:b.db", "postgres://h/d"] {
            assert_eq!(url_of(url), url);
        }
    }
}
