//! Makes read models anew, and before that the log itself from a backup or from Kafka alone.

use contract::ids::{Bucket, Position};
use domain::views::MODELS;
use runtime::clock::{Clock, SystemClock};
use runtime::parking::{self, ParkedView};
use runtime::relay::RELAY;
use serde::Serialize;
use store::{Commit, CursorMove, LogHash, LogHasher, RawRecord, Store, StoreError};

use super::kafka::KafkaLog;
use super::{Extent, Progress, RebuildArgs, failed, is_kafka, line, open, url_of};
use cli::error::CliError;

const PAGE: usize = 2_000;

/// What a store was made from.
#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Taken {
    /// What was copied first.
    #[serde(skip_serializing_if = "Option::is_none")]
    copied: Option<LogHash>,
    /// What Kafka had.
    #[serde(skip_serializing_if = "Option::is_none")]
    kafka: Option<Extent>,
    /// Events above the first hole.
    #[serde(skip_serializing_if = "Option::is_none")]
    left_out: Option<u64>,
    /// Events that were taken as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    not_known: Option<NotKnown>,
}

/// Events that this release cannot read: another one has written them.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct NotKnown {
    events: u64,
    /// The first of them, and why.
    first: Position,
    detail: String,
}

impl NotKnown {
    fn count(counted: &mut Option<Self>, event: &RawRecord) {
        let Err(error) = store::decode(event) else {
            return;
        };
        let counted = counted.get_or_insert_with(|| Self {
            events: 0,
            first: event.position,
            detail: match error {
                StoreError::Unreadable { detail, .. } => detail,
                error => error.to_string(),
            },
        });
        counted.events += 1;
    }
}

impl Taken {
    /// Whether nothing is known that was there once and was not taken.
    fn is_all(&self) -> bool {
        let kafka = self.kafka.as_ref();
        kafka.is_none_or(|extent| is_all(extent, self.left_out.unwrap_or(0)))
    }
}

/// The last event of a bucket is missed by none that follows it: where it cannot be read, there is
/// neither a hole nor anything above.
fn is_all(extent: &Extent, left_out: u64) -> bool {
    left_out == 0 && extent.holes.is_empty() && extent.unreadable.is_empty()
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Rebuilt {
    #[serde(flatten)]
    taken: Taken,
    rows_changed: usize,
    /// Endpoints with an event that this release cannot digest.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    parked: Vec<ParkedView>,
}

pub async fn rebuild(args: &RebuildArgs) -> Result<(), CliError> {
    let url = args.which.url();
    let (store, taken) = match &args.from {
        None => (args.which.open().await?, Taken::default()),
        Some(from) if is_kafka(from) => {
            // Before Kafka is read, which takes a while.
            store::inspect(&url).await.map_err(failed)?;
            // Before the store is made: Kafka may not be there.
            let log = KafkaLog::read(from).await?;
            let archives = args.which.archive.as_deref();
            let store = Store::open_with(&url, archives).await.map_err(failed)?;
            let taken = from_kafka(log, &store).await;
            (store, taken?)
        }
        Some(from) => {
            let from = open(&url_of(from)).await?;
            let archives = args.which.archive.as_deref();
            let store = Store::open_with(&url, archives).await.map_err(failed)?;
            let taken = from_store(&from, &store).await;
            from.close().await;
            (store, taken?)
        }
    };
    let models = rebuild_models(&store).await;
    store.close().await;
    let (rows_changed, parked) = models?;
    let rebuilt = Rebuilt {
        taken,
        rows_changed,
        parked,
    };
    args.output.show(&text_of(args, &rebuilt), &rebuilt)?;
    match rebuilt.taken.is_all() {
        true => Ok(()),
        false => Err(CliError::Quiet(1)),
    }
}

fn text_of(args: &RebuildArgs, rebuilt: &Rebuilt) -> String {
    let taken = &rebuilt.taken;
    let mut lines = Vec::new();
    if let (Some(from), Some(extent)) = (&args.from, &taken.kafka) {
        lines.extend(extent.lines(from));
    }
    lines.extend(taken.copied.as_ref().map(line));
    if let (Some(left_out @ 1..), Some(extent)) = (taken.left_out, &taken.kafka) {
        lines.push(format!(
            "left out: {left_out} events above position {}. Topics that hold them are no longer this \
             log's: publish it to others with `penstock store republish`",
            extent.whole
        ));
    }
    let unreadable = taken
        .kafka
        .as_ref()
        .map_or(0, |kafka| kafka.unreadable.len());
    if unreadable > 0 {
        lines.push(format!(
            "left out: {unreadable} messages that are no events as this release publishes them; the store \
             lacks what they were. A release that knows them takes them in, into an empty store"
        ));
    }
    if let Some(NotKnown {
        events,
        first,
        detail,
    }) = &taken.not_known
    {
        lines.push(format!(
            "taken as they are: {events} events that this release cannot read, the first at position \
             {first} ({detail})"
        ));
    }
    lines.push(format!(
        "{} rows of read models changed",
        rebuilt.rows_changed
    ));
    lines.extend(rebuilt.parked.iter().map(|parked| {
        format!(
            "parked: {}, whose event at position {} cannot be digested ({}); its rows are those before \
             it. See `penstock events parked`",
            parked.endpoint, parked.position, parked.detail
        )
    }));
    lines.join("\n")
}

async fn from_store(from: &Store, to: &Store) -> Result<Taken, CliError> {
    let mut progress = Progress::new("events copied");
    let copied = store::copy(from, to, |done, of| progress.say(done, of)).await;
    Ok(Taken {
        copied: Some(copied.map_err(failed)?),
        ..Taken::default()
    })
}

/// Takes in Kafka's log up to where it is whole, byte for byte. New events go on above all that was ever there.
async fn from_kafka(mut log: KafkaLog, store: &Store) -> Result<Taken, CliError> {
    let whole = log.extent.whole;
    let mut hasher = LogHasher::default();
    let (mut taken, mut left_out) = (0, 0);
    let mut not_known = None;
    let mut progress = Progress::new("events copied");
    loop {
        let mut page: Vec<RawRecord> = log.page(PAGE)?;
        if page.is_empty() {
            break;
        }
        let above = page.split_off(page.partition_point(|event| event.position <= whole));
        left_out += above.len() as u64;
        taken += page.len() as u64;
        for event in &page {
            hasher.take_in(event);
            NotKnown::count(&mut not_known, event);
        }
        store::append_raw(store, page).await.map_err(failed)?;
        progress.say(taken, log.extent.records);
    }
    let last = log.extent.last;
    store::go_on_above(store, last).await.map_err(failed)?;
    // Orphans above a hole, or what cannot be read, are nothing that a relay may go on from.
    if is_all(&log.extent, left_out) {
        relay_stands_at(store, whole).await?;
    }
    Ok(Taken {
        copied: Some(hasher.finish()),
        left_out: Some(left_out),
        not_known,
        kafka: Some(log.extent),
    })
}

/// What came from Kafka need not be published there again.
async fn relay_stands_at(store: &Store, to: Position) -> Result<(), CliError> {
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

/// Also lists what is parked, as the running consumer does: without that, a release which can read it
/// would take its rows for whole.
async fn rebuild_models(store: &Store) -> Result<(usize, Vec<ParkedView>), CliError> {
    let head = store.head().await.map_err(failed)?;
    let mut progress = Progress::new("log read up to position");
    let mut projector = control::ViewsProjector::for_rebuild();
    let say = |at: Position| progress.say(at.0, head.0);
    let changed = store::rebuild_with(store, &mut projector, MODELS, say).await;
    let changed = changed.map_err(failed)?;
    let mut parked = Vec::new();
    for (key, view) in projector.parked() {
        let view = ParkedView {
            since: SystemClock.now(),
            ..view.clone()
        };
        let listed = parking::list(store, key, view.clone()).await;
        listed.map_err(failed)?;
        parked.push(view);
    }
    Ok((changed, parked))
}
