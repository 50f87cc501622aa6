//! Seals the beginning of the log into archives, and lists them.

use cli::client::Client;
use cli::client::config::{self, CLIENT_FILE, ConnectArgs, Environment};
use contract::ids::Position;
use contract::time::Timestamp;
use control::api::archive::{ArchiveReport, ArchiveRequest};
use store::{ARCHIVE_LEASE, Archive, SealLimits, SealedFile, Store, StoreError, seal, sealable};

use super::lease::{LeaseRequest, run_under_lease};
use super::{ArchiveArgs, ArchivesArgs, failed};
use cli::error::CliError;
use cli::output::{Screen, Table, print_notice};

pub async fn archive(args: &ArchiveArgs, connect: &ConnectArgs) -> Result<(), CliError> {
    let request = request(args);
    let report = match args.selector.open().await {
        Ok(store) => {
            let outcome = run(&store, &request, Screen::of_process().now).await;
            store.close().await;
            outcome?
        }
        Err(error) if is_in_use(&error) => run_on_server(args, connect, &request).await?,
        Err(error) => return Err(error),
    };
    args.output.print(&render(&report), &report)
}

fn request(args: &ArchiveArgs) -> ArchiveRequest {
    ArchiveRequest {
        older_than: args.older_than,
        before: args.before.map(Position),
        min_events: 0,
        dry_run: args.dry_run,
    }
}

/// Whether a server has the store in a file open.
fn is_in_use(error: &CliError) -> bool {
    let CliError::Caused { source, .. } = error else {
        return false;
    };
    matches!(source.downcast_ref(), Some(StoreError::InUse(_)))
}

/// Has the server that holds the store archive it.
async fn run_on_server(
    args: &ArchiveArgs,
    connect: &ConnectArgs,
    request: &ArchiveRequest,
) -> Result<ArchiveReport, CliError> {
    let beside_store = args.selector.beside_file(CLIENT_FILE);
    let beside_store = beside_store.filter(|file| file.exists());
    // Another server that the environment names would archive its own log.
    let connect = match beside_store {
        Some(_) => &ConnectArgs::default(),
        None => connect,
    };
    let mut environment = Environment::read();
    environment.config = beside_store.or(environment.config);
    let client = Client::new(config::resolve(connect, &environment)?)?;
    let body = serde_json::to_value(request).map_err(failed)?;
    let response = client.post(&["v1", "archive"], &body).await?;
    serde_json::from_value(response.json()?).map_err(failed)
}

async fn run(
    store: &Store,
    request: &ArchiveRequest,
    now: Timestamp,
) -> Result<ArchiveReport, CliError> {
    let limits = request.limits(now);
    let sealable = sealable(store, &limits).await.map_err(failed)?;
    let sealed = match request.dry_run {
        true => Vec::new(),
        false => sealed(store, &limits, now).await?,
    };
    Ok(ArchiveReport {
        sealed,
        sealable,
        is_dry_run: request.dry_run,
    })
}

async fn sealed(
    store: &Store,
    limits: &SealLimits,
    now: Timestamp,
) -> Result<Vec<SealedFile>, CliError> {
    let lease = LeaseRequest {
        name: ARCHIVE_LEASE,
        busy_message: format!(
            "another process archives this store's log (it holds the lease `{ARCHIVE_LEASE}`): run this \
             again when it has finished"
        ),
        lost_message: format!(
            "another process has taken the lease `{ARCHIVE_LEASE}` and archives: run this again when it \
             has finished"
        ),
    };
    let on_sealed = |file: &SealedFile| {
        print_notice(&format!(
            "archived up to position {}: {}",
            file.archive.last, file.archive.file
        ));
    };
    run_under_lease(store, &lease, async |fence| {
        let sealed = seal(store, &fence, limits, now, on_sealed).await;
        sealed.map_err(failed)
    })
    .await
}

fn render(report: &ArchiveReport) -> String {
    let ArchiveReport {
        sealed, sealable, ..
    } = report;
    let mut text = match (report.is_dry_run, sealable.events) {
        (_, 0) if sealable.after == Position::START => "nothing to archive\n".to_owned(),
        (_, 0) => format!(
            "nothing more to archive: everything up to position {} is archived\n",
            sealable.after
        ),
        (true, events) => format!(
            "{events} events would be archived, up to position {}\n",
            sealable.through
        ),
        (false, _) => {
            let mut table = Table::new(&["FIRST", "LAST", "EVENTS", "TEXT", "BYTES", "FILE"]);
            for file in sealed {
                let Archive {
                    first,
                    last,
                    events,
                    ..
                } = &file.archive;
                table.row(vec![
                    first.to_string(),
                    last.to_string(),
                    events.to_string(),
                    file.bytes_before.to_string(),
                    file.archive.bytes.to_string(),
                    file.archive.file.clone(),
                ]);
            }
            table.render(false)
        }
    };
    if let Some(held_back) = &sealable.held_back {
        text.push_str(&format!("cannot archive more now: {held_back}\n"));
    }
    text
}

pub async fn archives(args: &ArchivesArgs) -> Result<(), CliError> {
    let store = args.selector.open().await?;
    let listed = store.archives().await;
    store.close().await;
    let listed = listed.map_err(failed)?;
    let mut table = Table::new(&["FIRST", "LAST", "EVENTS", "BYTES", "SEALED", "FILE"]);
    for archive in &listed {
        table.row(vec![
            archive.first.to_string(),
            archive.last.to_string(),
            archive.events.to_string(),
            archive.bytes.to_string(),
            archive.sealed_at.to_string(),
            archive.file.clone(),
        ]);
    }
    args.output
        .print(&table.render(false), &serde_json::json!({"items": listed}))
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use contract::events::{Empty, Event};
    use contract::log::{Actor, NewEvent, StreamName};
    use control::api::archive::DEFAULT_AGE;
    use store::{Append, Commit, CursorMove};

    use super::*;

    #[derive(Parser)]
    struct TestCommand {
        #[command(flatten)]
        args: ArchiveArgs,
    }

    fn args(folder: &tempfile::TempDir, more: &[&str]) -> ArchiveArgs {
        let url = format!("sqlite:{}", folder.path().join("log.db").display());
        let line = ["archive", "--store", &url].into_iter();
        TestCommand::parse_from(line.chain(more.iter().copied())).args
    }

    /// Events at these seconds.
    async fn store(folder: &tempfile::TempDir, seconds: &[i64]) -> Store {
        let stream: StreamName = "endpoint/default/iris".parse().unwrap();
        let event = |second: &i64| NewEvent {
            id: uuid::Uuid::from_u128(*second as u128),
            time: Timestamp::from_secs(*second),
            actor: Actor::service("test"),
            event: Event::EndpointDeletionRequested(Empty {}),
        };
        let store = Store::open(&args(folder, &[]).selector.url())
            .await
            .unwrap();
        let append = Append {
            stream,
            expected_version: 0,
            events: seconds.iter().map(event).collect(),
        };
        let commit = Commit {
            appends: vec![append],
            ..Commit::default()
        };
        store.commit(commit).await.unwrap();
        store
    }

    #[tokio::test]
    async fn a_dry_run_reports_what_would_be_sealed_and_what_blocks_more() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(&folder, &[1, 2, 3, 4]).await;
        let relay = CursorMove {
            consumer: "relay",
            bucket: contract::ids::Bucket::GLOBAL,
            from: Position::START,
            to: Position(2),
        };
        let commit = Commit {
            cursor: Some(relay),
            ..Commit::default()
        };
        store.commit(commit).await.unwrap();
        let dry_run = request(&args(&folder, &["--before", "4", "--dry-run"]));
        let report = run(&store, &dry_run, Timestamp::from_secs(9))
            .await
            .unwrap();
        assert_eq!(
            render(&report),
            "2 events would be archived, up to position 2\n\
             cannot archive more now: `relay` is at position 2\n"
        );
        assert_eq!(store.archives().await.unwrap(), []);
    }

    #[tokio::test]
    async fn without_limits_only_what_is_older_than_a_month_is_sealed() {
        let folder = tempfile::tempdir().unwrap();
        let now = Timestamp::from_secs(1_000) + DEFAULT_AGE;
        let store = store(&folder, &[998, 999, 1_000, 1_001]).await;
        let report = run(&store, &request(&args(&folder, &[])), now)
            .await
            .unwrap();
        assert_eq!(report.sealed.len(), 1);
        let text = render(&report);
        assert!(text.starts_with("FIRST  LAST  EVENTS  TEXT"), "{text}");
        assert!(text.contains("1-2.penstock-events.gz"), "{text}");
        let second_run = run(&store, &request(&args(&folder, &[])), now)
            .await
            .unwrap();
        assert_eq!(
            render(&second_run),
            "nothing more to archive: everything up to position 2 is archived\n"
        );
    }

    #[tokio::test]
    async fn a_backup_carries_archives_and_history() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(&folder, &[1, 2, 3]).await;
        run(
            &store,
            &request(&args(&folder, &["--before", "3"])),
            Timestamp::from_secs(9),
        )
        .await
        .unwrap();
        store.close().await;
        let history = format!("sqlite:{}", folder.path().join("history.db").display());
        let of_history = Store::open(&history).await.unwrap();
        of_history.acquire_fence("known").await.unwrap();
        of_history.close().await;
        let to = tempfile::tempdir().unwrap();
        let backed_up = super::super::BackupArgs {
            to: to.path().join("monday.db"),
            selector: args(&folder, &[]).selector,
            output: super::super::Format::Text,
        };
        super::super::backup(&backed_up).await.unwrap();
        drop(folder);
        let copied = to.path().join("monday.history.db");
        let copied = Store::open(&format!("sqlite:{}", copied.display())).await;
        let fence = copied.unwrap().acquire_fence("known").await.unwrap();
        assert_eq!(fence.generation, 2, "the content was copied");
        let url = format!("sqlite:{}", to.path().join("monday.db").display());
        let copied = Store::open(&url).await.unwrap();
        let events = copied.read_raw(Position::START, 10).await.unwrap();
        assert_eq!(events.len(), 3);
    }
}
