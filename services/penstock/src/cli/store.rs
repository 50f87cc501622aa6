//! `store`: looks after the store itself, without a server: brings it up to date, copies it, makes it
//! again, and proves that two are the same.
//!
//! Invariant: nothing is made, moved or migrated that was not asked for; a store that is not there is
//! an error.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use contract::ids::Position;
use domain::views::MODELS;
use serde::Serialize;
use store::{LogHash, RawRecord, Store, StoreError};

use super::error::CliError;
use super::output::{print, remark};
use crate::client::config::default_data_dir;

/// Migrate, back up, rebuild and compare stores, without a server
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store migrate --check
  penstock store backup penstock-backup.db
  penstock store rebuild
  penstock store rebuild --from penstock-backup.db --store postgres://penstock@localhost/penstock
  penstock store hash
  penstock store compare sqlite:a.db sqlite:b.db

A store in a file must not be in use: stop the server first.")]
pub struct StoreArgs {
    #[command(subcommand)]
    command: StoreCommand,
}

#[derive(Debug, clap::Subcommand)]
enum StoreCommand {
    Migrate(MigrateArgs),
    Backup(BackupArgs),
    Rebuild(RebuildArgs),
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
    #[arg(long, value_name = "DIR", default_value_os_t = default_data_dir())]
    data: PathBuf,
}

impl Which {
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
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// Copy a store into a new file, from which one of either kind can be made again
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store backup penstock-backup.db
  penstock store backup /backup/monday.db --store postgres://penstock@localhost/penstock

The file is a store of its own (sqlite:FILE).")]
struct BackupArgs {
    /// A file that does not exist yet
    #[arg(value_name = "TO-FILE")]
    to: PathBuf,
    #[command(flatten)]
    which: Which,
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// Make the read models anew from the log; or first the log from a backup
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store rebuild
  penstock store rebuild --from penstock-backup.db --store sqlite:restored.db

With --from the store must be empty, or hold the beginning of the same log: what was broken off can be
taken up again.")]
struct RebuildArgs {
    #[command(flatten)]
    which: Which,
    /// A backup, or any other store (URL)
    #[arg(long, value_name = "FILE")]
    from: Option<String>,
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// Print a hash over all events and their places
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store hash
  penstock store hash --up-to 120000 -o json

Equal logs have equal hashes, in whatever database they are.")]
struct HashArgs {
    #[command(flatten)]
    which: Which,
    /// Only events up to this position
    #[arg(long, value_name = "POSITION")]
    up_to: Option<u64>,
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// Prove that two stores hold the same log, or say where they part
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock store compare sqlite:penstock.db penstock-backup.db
  penstock store compare sqlite:a.db postgres://penstock@localhost/penstock --up-to 120000

Exit 1 where they are not the same.")]
struct CompareArgs {
    /// A file or a URL
    a: String,
    /// A file or a URL
    b: String,
    /// Only events up to this position
    #[arg(long, value_name = "POSITION")]
    up_to: Option<u64>,
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
            StoreCommand::Rebuild(args) => Box::pin(rebuild(args)).await,
            StoreCommand::Hash(args) => hash(args).await,
            StoreCommand::Compare(args) => Box::pin(compare(args)).await,
        }
    })
}

fn failed(error: StoreError) -> CliError {
    CliError::Failed(error.to_string())
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
    Store::open(url).await.map_err(failed)
}

async fn migrate(args: &MigrateArgs) -> Result<(), CliError> {
    let url = args.which.url();
    if !args.check {
        let done = store::migrate(&url).await.map_err(failed)?;
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
}

async fn backup(args: &BackupArgs) -> Result<(), CliError> {
    let store = open(&args.which.url()).await?;
    let mut progress = Progress::new("events copied");
    let done = store::backup(&store, &args.to, |done, of| progress.say(done, of)).await;
    store.close().await;
    let hash = done.map_err(failed)?;
    let text = format!("{}: {}", args.to.display(), line(&hash));
    args.output.show(&text, &hash)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Rebuilt {
    /// What was copied from a backup first.
    #[serde(skip_serializing_if = "Option::is_none")]
    copied: Option<LogHash>,
    rows_changed: usize,
}

async fn rebuild(args: &RebuildArgs) -> Result<(), CliError> {
    let url = args.which.url();
    let (store, copied) = match &args.from {
        None => (open(&url).await?, None),
        Some(from) => {
            let from = open(&url_of(from)).await?;
            let store = Store::open(&url).await.map_err(failed)?;
            let mut progress = Progress::new("events copied");
            let copied = store::copy(&from, &store, |done, of| progress.say(done, of)).await;
            from.close().await;
            (store, Some(copied.map_err(failed)?))
        }
    };
    let head = store.head().await.map_err(failed)?;
    let mut progress = Progress::new("log read up to position");
    let mut projector = control::ViewsProjector::default();
    let say = |at: Position| progress.say(at.0, head.0);
    let changed = store::rebuild_with(&store, &mut projector, &MODELS, say).await;
    store.close().await;
    let rows_changed = changed.map_err(failed)?;
    let text = match &copied {
        None => format!("{rows_changed} rows of read models changed"),
        Some(hash) => format!("{}\n{rows_changed} rows of read models changed", line(hash)),
    };
    args.output.show(
        &text,
        &Rebuilt {
            copied,
            rows_changed,
        },
    )
}

fn line(hash: &LogHash) -> String {
    format!(
        "{} events up to position {}, sha256 {}",
        hash.events, hash.head, hash.sha256
    )
}

async fn hash_of(store: &Store, up_to: Option<u64>) -> Result<LogHash, CliError> {
    let up_to = match up_to {
        Some(up_to) => Position(up_to),
        None => store.head().await.map_err(failed)?,
    };
    store::log_hash(store, up_to).await.map_err(failed)
}

async fn hash(args: &HashArgs) -> Result<(), CliError> {
    let store = open(&args.which.url()).await?;
    let hash = hash_of(&store, args.up_to).await;
    store.close().await;
    let hash = hash?;
    args.output.show(&line(&hash), &hash)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Compared {
    equal: bool,
    a: LogHash,
    b: LogHash,
    /// The first position that is not the same in both.
    #[serde(skip_serializing_if = "Option::is_none")]
    differs_at: Option<Position>,
}

async fn compare(args: &CompareArgs) -> Result<(), CliError> {
    let a = open(&url_of(&args.a)).await?;
    let b = open(&url_of(&args.b)).await?;
    let compared = compare_open(&a, &b, args.up_to).await;
    a.close().await;
    b.close().await;
    let compared = compared?;
    let text = match compared.differs_at {
        None => format!("equal: {}", line(&compared.a)),
        Some(at) => format!(
            "not the same: they part at position {at}\na: {}\nb: {}",
            line(&compared.a),
            line(&compared.b)
        ),
    };
    args.output.show(&text, &compared)?;
    match compared.equal {
        true => Ok(()),
        false => Err(CliError::Quiet(1)),
    }
}

async fn compare_open(a: &Store, b: &Store, up_to: Option<u64>) -> Result<Compared, CliError> {
    let (of_a, of_b) = (hash_of(a, up_to).await?, hash_of(b, up_to).await?);
    let equal = of_a == of_b;
    let differs_at = match equal {
        true => None,
        false => first_difference(a, b).await?,
    };
    Ok(Compared {
        equal,
        a: of_a,
        b: of_b,
        differs_at,
    })
}

/// Reads both side by side.
async fn first_difference(a: &Store, b: &Store) -> Result<Option<Position>, CliError> {
    const PAGE: usize = 1_000;
    let mut after = Position::START;
    loop {
        let of_a = a.read_raw(after, PAGE).await.map_err(failed)?;
        let of_b = b.read_raw(after, PAGE).await.map_err(failed)?;
        let parting = of_a.iter().zip(&of_b).position(|(a, b)| a != b);
        let parting = parting.unwrap_or(of_a.len().min(of_b.len()));
        let at = |page: &[RawRecord]| page.get(parting).map(|event| event.position);
        if let Some(at) = at(&of_a).into_iter().chain(at(&of_b)).min() {
            return Ok(Some(at));
        }
        let Some(last) = of_a.last() else {
            return Ok(None);
        };
        after = last.position;
    }
}

#[cfg(test)]
mod tests {
    use contract::events::{Empty, Event};
    use contract::ids::EndpointKey;
    use contract::log::{Actor, NewEvent, StreamKind, StreamName};
    use contract::time::Timestamp;
    use store::{Append, Commit};

    use super::*;

    async fn store_of(folder: &tempfile::TempDir, name: &str, events: u64) -> Store {
        let url = format!("sqlite:{}", folder.path().join(name).display());
        let store = Store::open(&url).await.unwrap();
        let endpoint = EndpointKey::new(&"iris".parse().unwrap());
        for version in 0..events {
            let event = NewEvent {
                id: uuid::Uuid::from_u128(u128::from(version)),
                time: Timestamp::from_secs(1),
                actor: Actor::service("test"),
                event: Event::EndpointDeletionRequested(Empty {}),
            };
            let append = Append {
                stream: StreamName::of(StreamKind::Endpoint, &endpoint),
                expected_version: version,
                events: vec![event],
            };
            let commit = Commit {
                appends: vec![append],
                ..Commit::default()
            };
            store.commit(commit).await.unwrap();
        }
        store
    }

    #[tokio::test]
    async fn a_comparison_says_where_two_logs_part() {
        let folder = tempfile::tempdir().unwrap();
        let a = store_of(&folder, "a.db", 5).await;
        let b = store_of(&folder, "b.db", 5).await;
        let c = store_of(&folder, "c.db", 3).await;
        let same = compare_open(&a, &b, None).await.unwrap();
        assert!(same.equal && same.differs_at.is_none());
        let shorter = compare_open(&a, &c, None).await.unwrap();
        assert!(!shorter.equal);
        assert_eq!(shorter.differs_at, Some(Position(4)));
        assert!(compare_open(&a, &c, Some(3)).await.unwrap().equal);
    }

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
