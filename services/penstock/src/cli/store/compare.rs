//! Whether two logs are the same, wherever they stand.
//!
//! Invariant: both are read once, side by side, in order of position. Where one of them is Kafka's,
//! both are taken as this release writes events: what an earlier one published it may have written
//! anew.

use std::collections::VecDeque;

use contract::ids::{Bucket, Position};
use runtime::relay::RELAY;
use serde::Serialize;
use store::{LogHash, LogHasher, RawRecord, Store};

use super::kafka::KafkaLog;
use super::{CompareArgs, Extent, HashArgs, Progress, failed, is_kafka, line, open, url_of};
use crate::cli::error::CliError;

const PAGE: usize = 2_000;

const NO_LIMIT: Position = Position(u64::MAX);

/// A log that is read once.
enum Log {
    Store(StoreLog),
    Kafka(Box<KafkaLog>),
}

struct StoreLog {
    store: Store,
    head: Position,
    /// The relay has had everything up to here confirmed.
    carried: Position,
}

impl Log {
    async fn of_store(store: Store) -> Result<Self, CliError> {
        let carried = store.cursor(RELAY, Bucket::GLOBAL).await.map_err(failed)?;
        let head = store.head().await.map_err(failed)?;
        Ok(Self::Store(StoreLog {
            store,
            head,
            carried,
        }))
    }

    async fn open(place: &str) -> Result<Self, CliError> {
        match is_kafka(place) {
            true => Ok(Self::Kafka(Box::new(KafkaLog::read(place).await?))),
            false => Self::of_store(open(&url_of(place)).await?).await,
        }
    }

    /// Where it ends without a hole.
    fn whole(&self) -> Position {
        match self {
            Self::Store(log) => log.head,
            Self::Kafka(log) => log.extent.whole,
        }
    }

    fn last(&self) -> Position {
        match self {
            Self::Store(log) => log.head,
            Self::Kafka(log) => log.extent.last,
        }
    }

    fn extent(&self) -> Option<&Extent> {
        match self {
            Self::Store(_) => None,
            Self::Kafka(log) => Some(&log.extent),
        }
    }

    async fn page(&mut self, after: Position) -> Result<Vec<RawRecord>, CliError> {
        match self {
            Self::Store(log) => log.store.read_raw(after, PAGE).await.map_err(failed),
            Self::Kafka(log) => log.page(PAGE),
        }
    }

    async fn close(self) {
        if let Self::Store(log) = self {
            log.store.close().await;
        }
    }
}

/// One of the logs on its way.
struct Side {
    log: Log,
    page: VecDeque<RawRecord>,
    after: Position,
    as_written_now: bool,
    hasher: LogHasher,
    more: Option<u64>,
}

impl Side {
    fn new(log: Log, as_written_now: bool) -> Self {
        Self {
            log,
            page: VecDeque::new(),
            after: Position::START,
            as_written_now,
            hasher: LogHasher::default(),
            more: None,
        }
    }

    async fn fill(&mut self) -> Result<bool, CliError> {
        if self.page.is_empty() {
            let page = self.log.page(self.after).await?;
            self.after = page.last().map_or(self.after, |event| event.position);
            self.page = page.into();
        }
        Ok(!self.page.is_empty())
    }

    /// Takes the next event into the hash; none above `up_to`.
    async fn next(&mut self, up_to: Position) -> Result<Option<RawRecord>, CliError> {
        if !self.fill().await? {
            return Ok(None);
        }
        let within = self
            .page
            .front()
            .is_some_and(|event| event.position <= up_to);
        let event = within.then(|| self.page.pop_front()).flatten();
        let event = event.map(|event| match self.as_written_now {
            true => as_written_now(event),
            false => event,
        });
        if let Some(event) = &event {
            self.hasher.take_in(event);
        }
        Ok(event)
    }

    async fn count_rest(&mut self) -> Result<(), CliError> {
        let mut more = 0;
        while self.fill().await? {
            more += self.page.len() as u64;
            self.page.clear();
        }
        self.more = Some(more);
        Ok(())
    }

    async fn finish(self) -> Compared {
        let compared = Compared {
            hash: self.hasher.finish(),
            more: self.more,
            kafka: self.log.extent().cloned(),
        };
        self.log.close().await;
        compared
    }
}

/// An event that cannot be read stays as it is.
fn as_written_now(event: RawRecord) -> RawRecord {
    let decoded = store::decode(&event).ok();
    let written = decoded.and_then(|record| RawRecord::of(&record).ok());
    written.unwrap_or(event)
}

pub async fn hash(args: &HashArgs) -> Result<(), CliError> {
    let place = args.which.url();
    let log = Log::open(&place).await?;
    let up_to = args.up_to.map_or_else(|| log.whole(), Position);
    let mut side = Side::new(log, false);
    let of = side.log.last().min(up_to);
    let mut progress = Progress::new("log read up to position");
    while let Some(event) = side.next(up_to).await? {
        progress.say(event.position.0, of.0);
    }
    let done = side.finish().await;
    let text = match &done.kafka {
        None => line(&done.hash),
        Some(extent) => format!("{}\n{}", line(&done.hash), extent.lines(&place).join("\n")),
    };
    args.output.show(&text, &done)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Compared {
    #[serde(flatten)]
    hash: LogHash,
    /// Events above those that were compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    more: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kafka: Option<Extent>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Comparison {
    equal: bool,
    a: Compared,
    b: Compared,
    /// The first position that is not the same in both.
    #[serde(skip_serializing_if = "Option::is_none")]
    differs_at: Option<Position>,
}

/// How far two logs shall be the same.
#[derive(Clone, Copy)]
enum Extend {
    /// As far as both can be expected to.
    Common,
    UpTo(Position),
    Exact,
}

pub async fn compare(args: &CompareArgs) -> Result<(), CliError> {
    let extend = match (args.up_to, args.exact) {
        (Some(up_to), _) => Extend::UpTo(Position(up_to)),
        (None, true) => Extend::Exact,
        (None, false) => Extend::Common,
    };
    // A store first: what its relay has carried by then must be on Kafka when that is read.
    let (a, b) = match is_kafka(&args.a) {
        false => {
            let a = Log::open(&args.a).await?;
            (a, Log::open(&args.b).await?)
        }
        true => {
            let b = Log::open(&args.b).await?;
            (Log::open(&args.a).await?, b)
        }
    };
    let compared = compare_logs(a, b, extend).await?;
    args.output.show(&text_of(args, &compared), &compared)?;
    match compared.equal {
        true => Ok(()),
        false => Err(CliError::Quiet(1)),
    }
}

fn text_of(args: &CompareArgs, compared: &Comparison) -> String {
    let sides = [("a", &args.a, &compared.a), ("b", &args.b, &compared.b)];
    let mut lines = match compared.differs_at {
        None => vec![format!("equal: {}", line(&compared.a.hash))],
        Some(at) => {
            let mut lines = vec![format!("not the same: they part at position {at}")];
            let hashes = sides.iter();
            lines.extend(hashes.map(|(name, _, side)| format!("{name}: {}", line(&side.hash))));
            lines
        }
    };
    for (name, place, side) in sides {
        if let Some(more @ 1..) = side.more {
            lines.push(format!("{name} has {more} more events above"));
        }
        if let Some(extent) = &side.kafka {
            lines.extend(extent.lines(place));
        }
    }
    lines.join("\n")
}

async fn compare_logs(a: Log, b: Log, extend: Extend) -> Result<Comparison, CliError> {
    let with_kafka = a.extent().is_some() || b.extent().is_some();
    let up_to = match extend {
        Extend::UpTo(up_to) => up_to,
        Extend::Common if with_kafka => common(&a, &b),
        Extend::Common | Extend::Exact => NO_LIMIT,
    };
    // Also a hole above what is whole is a difference, unless it was not asked for.
    let limit = match extend {
        Extend::UpTo(up_to) => up_to,
        Extend::Common | Extend::Exact => a.last().min(b.last()),
    };
    let hole = [&a, &b]
        .into_iter()
        .filter_map(Log::extent)
        .flat_map(|extent| &extent.holes)
        .map(|hole| hole.missing)
        .filter(|missing| *missing <= limit)
        .min();
    let (mut a, mut b) = (Side::new(a, with_kafka), Side::new(b, with_kafka));
    let parting = parting(&mut a, &mut b, up_to).await?;
    if !matches!(extend, Extend::UpTo(_)) {
        a.count_rest().await?;
        b.count_rest().await?;
    }
    let differs_at = parting.or(hole);
    Ok(Comparison {
        equal: differs_at.is_none(),
        a: a.finish().await,
        b: b.finish().await,
        differs_at,
    })
}

/// Where both are whole; but what a relay has carried must be there.
fn common(a: &Log, b: &Log) -> Position {
    let carried = [a, b].into_iter().filter_map(|log| match log {
        Log::Store(log) => Some(log.carried.min(log.head)),
        Log::Kafka(_) => None,
    });
    let whole = a.whole().min(b.whole());
    carried.fold(whole, Position::max)
}

/// Reads both up to a position, and says where they part.
async fn parting(
    a: &mut Side,
    b: &mut Side,
    up_to: Position,
) -> Result<Option<Position>, CliError> {
    let of = up_to.min(a.log.last().max(b.log.last()));
    let mut progress = Progress::new("compared up to position");
    let mut differs_at = None;
    loop {
        let of_a = a.next(up_to).await?;
        let of_b = b.next(up_to).await?;
        let both = [&of_a, &of_b].into_iter().flatten();
        let Some(at) = both.map(|event| event.position).min() else {
            return Ok(differs_at);
        };
        if differs_at.is_none() && of_a != of_b {
            differs_at = Some(at);
        }
        progress.say(at.0, of.0);
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

    async fn compared(folder: &tempfile::TempDir, names: [&str; 2], extend: Extend) -> Comparison {
        let open = async |name: &str| {
            let url = folder.path().join(name).display().to_string();
            Log::open(&url).await.unwrap()
        };
        let (a, b) = (open(names[0]).await, open(names[1]).await);
        compare_logs(a, b, extend).await.unwrap()
    }

    #[tokio::test]
    async fn a_comparison_says_where_two_logs_part() {
        let folder = tempfile::tempdir().unwrap();
        for (name, events) in [("a.db", 5), ("b.db", 5), ("c.db", 3)] {
            store_of(&folder, name, events).await.close().await;
        }
        let same = compared(&folder, ["a.db", "b.db"], Extend::Common).await;
        assert!(same.equal && same.differs_at.is_none());
        assert_eq!(same.a.hash, same.b.hash);
        assert_eq!(same.a.hash.events, 5);
        let shorter = compared(&folder, ["a.db", "c.db"], Extend::Common).await;
        assert!(!shorter.equal);
        assert_eq!(shorter.differs_at, Some(Position(4)));
        let up_to = Extend::UpTo(Position(3));
        assert!(compared(&folder, ["a.db", "c.db"], up_to).await.equal);
    }

    #[tokio::test]
    async fn a_hash_is_the_one_that_the_store_itself_has() {
        let folder = tempfile::tempdir().unwrap();
        let store = store_of(&folder, "a.db", 5).await;
        let expected = store::log_hash(&store, Position(4)).await.unwrap();
        let mut side = Side::new(Log::of_store(store).await.unwrap(), false);
        while side.next(Position(4)).await.unwrap().is_some() {}
        assert_eq!(side.finish().await.hash, expected);
    }
}
