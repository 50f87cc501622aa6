//! Rebuilds read models from the log, and optionally the log itself from a backup or from Kafka.

use contract::ids::{Bucket, Position};
use domain::views::MODELS;
use runtime::clock::{Clock, SystemClock};
use runtime::parking::{self, ParkedView};
use runtime::relay::RELAY;
use serde::Serialize;
use store::{Commit, CursorMove, LogHash, LogHasher, RawRecord, Store, StoreError};

use super::kafka::KafkaLog;
use super::{Extent, Progress, RebuildArgs, describe_hash, failed, is_kafka_url, open, store_url};
use cli::error::CliError;

const PAGE: usize = 2_000;

/// What was imported into the store.
#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct ImportSummary {
    /// The events that were copied.
    #[serde(skip_serializing_if = "Option::is_none")]
    copied: Option<LogHash>,
    /// The extent of the log on Kafka.
    #[serde(skip_serializing_if = "Option::is_none")]
    kafka: Option<Extent>,
    /// Events beyond the first gap, which were not imported.
    #[serde(skip_serializing_if = "Option::is_none")]
    left_out: Option<u64>,
    /// Events that were imported without being decoded.
    #[serde(skip_serializing_if = "Option::is_none")]
    not_known: Option<UndecodableEvents>,
}

/// Events that this release cannot decode, because a newer one wrote them.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct UndecodableEvents {
    events: u64,
    /// The position of the first one; `detail` says why it cannot be decoded.
    first: Position,
    detail: String,
}

impl UndecodableEvents {
    fn count(undecodable: &mut Option<Self>, event: &RawRecord) {
        let Err(error) = store::decode(event) else {
            return;
        };
        let undecodable = undecodable.get_or_insert_with(|| Self {
            events: 0,
            first: event.position,
            detail: match error {
                StoreError::Unreadable { detail, .. } => detail.to_string(),
                error => error.to_string(),
            },
        });
        undecodable.events += 1;
    }
}

impl ImportSummary {
    /// Whether nothing is known to be missing.
    fn is_complete(&self) -> bool {
        let kafka = self.kafka.as_ref();
        kafka.is_none_or(|extent| is_complete(extent, self.left_out.unwrap_or(0)))
    }
}

/// Unreadable messages count too: if the last event of a bucket cannot be read, nothing refers to it, so
/// there is neither a gap nor anything beyond it.
fn is_complete(extent: &Extent, left_out: u64) -> bool {
    left_out == 0 && extent.gaps.is_empty() && extent.unreadable.is_empty()
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Rebuilt {
    #[serde(flatten)]
    import: ImportSummary,
    rows_changed: usize,
    /// Endpoints that are parked because of an event that cannot be applied.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    parked: Vec<ParkedView>,
}

pub async fn rebuild(args: &RebuildArgs) -> Result<(), CliError> {
    let url = args.selector.url();
    let (store, import) = match &args.from {
        None => (args.selector.open().await?, ImportSummary::default()),
        Some(from) if is_kafka_url(from) => {
            // Check the store first: reading Kafka takes a while.
            store::inspect(&url).await.map_err(failed)?;
            // Read Kafka before the store is created: it may be unreachable.
            let log = KafkaLog::read(from).await?;
            let archives = args.selector.archive.as_deref();
            let store = Store::open_with(&url, archives).await.map_err(failed)?;
            let import = import_from_kafka(log, &store).await;
            (store, import?)
        }
        Some(from) => {
            let from = open(&store_url(from)).await?;
            let archives = args.selector.archive.as_deref();
            let store = Store::open_with(&url, archives).await.map_err(failed)?;
            let import = import_from_store(&from, &store).await;
            from.close().await;
            (store, import?)
        }
    };
    let models = rebuild_models(&store).await;
    store.close().await;
    let (rows_changed, parked) = models?;
    let rebuilt = Rebuilt {
        import,
        rows_changed,
        parked,
    };
    args.output.print(&render(args, &rebuilt), &rebuilt)?;
    match rebuilt.import.is_complete() {
        true => Ok(()),
        false => Err(CliError::Quiet(1)),
    }
}

fn render(args: &RebuildArgs, rebuilt: &Rebuilt) -> String {
    let import = &rebuilt.import;
    let mut lines = Vec::new();
    if let (Some(from), Some(extent)) = (&args.from, &import.kafka) {
        lines.extend(extent.lines(from));
    }
    lines.extend(import.copied.as_ref().map(describe_hash));
    if let (Some(left_out @ 1..), Some(extent)) = (import.left_out, &import.kafka) {
        lines.push(format!(
            "left out: {left_out} events above position {}. These topics no longer match the restored \
             log: publish it to new ones with `penstock store republish`",
            extent.contiguous
        ));
    }
    let unreadable = import
        .kafka
        .as_ref()
        .map_or(0, |kafka| kafka.unreadable.len());
    if unreadable > 0 {
        lines.push(format!(
            "left out: {unreadable} messages that this release cannot read as events; they are missing in the \
             store. A release that knows the format can import them into an empty store"
        ));
    }
    if let Some(UndecodableEvents {
        events,
        first,
        detail,
    }) = &import.not_known
    {
        lines.push(format!(
            "imported without decoding: {events} events that this release cannot read, the first at position \
             {first} ({detail})"
        ));
    }
    lines.push(format!(
        "{} rows of read models changed",
        rebuilt.rows_changed
    ));
    lines.extend(rebuilt.parked.iter().map(|parked| {
        let (position, detail) = (parked.position, &parked.detail);
        match &parked.endpoint {
            Some(endpoint) => format!(
                "parked: {endpoint}, whose event at position {position} cannot be applied ({detail}); its \
                 rows are those before it. See `penstock events parked`"
            ),
            None => format!(
                "skipped: the event at position {position}, which belongs to no endpoint and cannot be \
                 applied ({detail}). See `penstock events parked`"
            ),
        }
    }));
    lines.join("\n")
}

async fn import_from_store(from: &Store, to: &Store) -> Result<ImportSummary, CliError> {
    let mut progress = Progress::new("events copied");
    let copied = store::copy(from, to, |done, of| progress.report(done, of)).await;
    Ok(ImportSummary {
        copied: Some(copied.map_err(failed)?),
        ..ImportSummary::default()
    })
}

/// Imports Kafka's log byte for byte, up to the first gap. New events get positions above all that were
/// found.
async fn import_from_kafka(mut log: KafkaLog, store: &Store) -> Result<ImportSummary, CliError> {
    let contiguous_end = log.extent.contiguous;
    let mut hasher = LogHasher::default();
    let (mut imported, mut left_out) = (0, 0);
    let mut not_known = None;
    let mut progress = Progress::new("events copied");
    loop {
        let mut page: Vec<RawRecord> = log.page(PAGE)?;
        if page.is_empty() {
            break;
        }
        let above = page.split_off(page.partition_point(|event| event.position <= contiguous_end));
        left_out += above.len() as u64;
        imported += page.len() as u64;
        for event in &page {
            hasher.update(event);
            UndecodableEvents::count(&mut not_known, event);
        }
        store::append_raw(store, page).await.map_err(failed)?;
        progress.report(imported, log.extent.records);
    }
    let last = log.extent.last;
    store::skip_positions_above(store, last)
        .await
        .map_err(failed)?;
    // The relay must not continue after a gap or an unreadable message.
    if is_complete(&log.extent, left_out) {
        advance_relay(store, contiguous_end).await?;
    }
    Ok(ImportSummary {
        copied: Some(hasher.finish()),
        left_out: Some(left_out),
        not_known,
        kafka: Some(log.extent),
    })
}

/// Moves the relay's cursor: what came from Kafka need not be published there again.
async fn advance_relay(store: &Store, to: Position) -> Result<(), CliError> {
    let from = store.cursor(RELAY, Bucket::GLOBAL).await.map_err(failed)?;
    if from >= to {
        return Ok(());
    }
    let commit = Commit {
        cursor: Some(CursorMove {
            consumer: RELAY,
            bucket: Bucket::GLOBAL,
            from,
            to,
        }),
        ..Commit::default()
    };
    store.commit(commit).await.map(|_| ()).map_err(failed)
}

/// Rebuilds the read models, and lists parked endpoints and skipped events as a running consumer does:
/// otherwise a release that can apply the event would take the rows for complete.
async fn rebuild_models(store: &Store) -> Result<(usize, Vec<ParkedView>), CliError> {
    let head = store.head().await.map_err(failed)?;
    let mut progress = Progress::new("log read up to position");
    let mut projector = control::ViewsProjector::for_rebuild();
    let say = |at: Position| progress.report(at.0, head.0);
    let changed = store::rebuild_with(store, &mut projector, MODELS, say).await;
    let changed = changed.map_err(failed)?;
    let mut parked = Vec::new();
    let endpoints = projector.parked().iter();
    let endpoints = endpoints.map(|(key, view)| (Some(key), view));
    let others = projector.unprocessed().iter().map(|view| (None, view));
    for (key, view) in endpoints.chain(others) {
        let view = ParkedView {
            since: SystemClock.now(),
            ..view.clone()
        };
        let listed = parking::record_parked(store, key, view.clone()).await;
        listed.map_err(failed)?;
        parked.push(view);
    }
    Ok((changed, parked))
}
