//! Compares two logs, each in a store or on Kafka.
//!
//! Invariant: both are read once, side by side, in order of position, and every event is compared byte
//! for byte as stored or published, whether or not this release can decode it.

use std::collections::VecDeque;

use contract::ids::{Bucket, Position};
use runtime::relay::RELAY;
use serde::Serialize;
use store::{LogHash, LogHasher, RawRecord, Store};

use super::comparison::{ComparedLog, Difference, LogComparison, UnmatchedEvents};
use super::kafka::KafkaLog;
use super::{
    CompareArgs, Extent, HashArgs, Progress, describe_hash, failed, is_kafka_url, open, store_url,
};
use cli::error::CliError;

const PAGE: usize = 2_000;

const NO_LIMIT: Position = Position(u64::MAX);

/// One of the two logs.
enum ComparableLog {
    Store(StoreLog),
    Kafka(Box<KafkaLog>),
}

struct StoreLog {
    store: Store,
    head: Position,
    /// The relay's cursor: everything up to here is confirmed by Kafka.
    relayed: Position,
}

impl ComparableLog {
    async fn from_store(store: Store) -> Result<Self, CliError> {
        let relayed = store.cursor(RELAY, Bucket::GLOBAL).await.map_err(failed)?;
        let head = store.head().await.map_err(failed)?;
        Ok(Self::Store(StoreLog {
            store,
            head,
            relayed,
        }))
    }

    async fn open(location: &str) -> Result<Self, CliError> {
        match is_kafka_url(location) {
            true => Ok(Self::Kafka(Box::new(KafkaLog::read(location).await?))),
            false => Self::from_store(open(&store_url(location)).await?).await,
        }
    }

    /// Includes a store's newest events: everything that was read from Kafka was in the store before.
    async fn refresh_head(&mut self) -> Result<(), CliError> {
        if let Self::Store(log) = self {
            log.head = log.store.head().await.map_err(failed)?;
        }
        Ok(())
    }

    /// The position up to which there is no gap.
    fn contiguous_end(&self) -> Position {
        match self {
            Self::Store(log) => log.head,
            Self::Kafka(log) => log.extent.contiguous,
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

    /// The position of the relay; `None` for Kafka.
    fn relayed(&self) -> Option<Position> {
        match self {
            Self::Store(log) => Some(log.relayed.min(log.head)),
            Self::Kafka(_) => None,
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

/// A log being read.
struct ComparisonScan {
    log: ComparableLog,
    page: VecDeque<RawRecord>,
    after: Position,
    hasher: LogHasher,
    more: Option<u64>,
    only: Option<UnmatchedEvents>,
}

impl ComparisonScan {
    fn new(log: ComparableLog) -> Self {
        Self {
            log,
            page: VecDeque::new(),
            after: Position::START,
            hasher: LogHasher::default(),
            more: None,
            only: None,
        }
    }

    /// The position of the next event.
    async fn peek_position(&mut self) -> Result<Option<Position>, CliError> {
        if self.page.is_empty() {
            let page = self.log.page(self.after).await?;
            self.after = page.last().map_or(self.after, |event| event.position);
            self.page = page.into();
        }
        Ok(self.page.front().map(|event| event.position))
    }

    /// The next event, if it has this position.
    fn next_if_at(&mut self, at: Position) -> Option<RawRecord> {
        let is_next = self.page.front().is_some_and(|event| event.position == at);
        is_next.then(|| self.page.pop_front()).flatten()
    }

    async fn finish(self) -> ComparedLog {
        let compared = ComparedLog {
            hash: self.hasher.finish(),
            more: self.more,
            only: self.only,
            last: self.log.last(),
            carried: self.log.relayed(),
            kafka: self.log.extent().cloned(),
        };
        self.log.close().await;
        compared
    }
}

pub async fn hash(args: &HashArgs) -> Result<(), CliError> {
    let location = args.selector.url();
    let log = match is_kafka_url(&location) {
        true => ComparableLog::open(&location).await?,
        false => ComparableLog::from_store(args.selector.open().await?).await?,
    };
    let up_to = args.up_to.map_or_else(|| log.contiguous_end(), Position);
    let done = hash_of(log, up_to).await?;
    let text = match &done.kafka {
        None => describe_hash(&done.hash),
        Some(extent) => format!(
            "{}\n{}",
            describe_hash(&done.hash),
            extent.lines(&location).join("\n")
        ),
    };
    args.output.print(&text, &done)
}

#[derive(Serialize)]
struct HashReport {
    #[serde(flatten)]
    hash: LogHash,
    #[serde(skip_serializing_if = "Option::is_none")]
    kafka: Option<Extent>,
}

async fn hash_of(log: ComparableLog, up_to: Position) -> Result<HashReport, CliError> {
    let mut scan = ComparisonScan::new(log);
    let of = scan.log.last().min(up_to);
    let mut progress = Progress::new("log read up to position");
    while let Some(at) = scan.peek_position().await?.filter(|at| *at <= up_to) {
        if let Some(event) = scan.next_if_at(at) {
            scan.hasher.update(&event);
        }
        progress.report(at.0, of.0);
    }
    let ComparedLog { hash, kafka, .. } = scan.finish().await;
    Ok(HashReport { hash, kafka })
}

/// How far two logs must be equal.
#[derive(Clone, Copy)]
enum CompareRange {
    /// As far as both should be complete.
    Common,
    UpTo(Position),
    Exact,
}

pub async fn compare(args: &CompareArgs) -> Result<(), CliError> {
    let range = match (args.up_to, args.exact) {
        (Some(up_to), _) => CompareRange::UpTo(Position(up_to)),
        (None, true) => CompareRange::Exact,
        (None, false) => CompareRange::Common,
    };
    // The store first: what its relay has published by then must be on Kafka when that is read.
    let (mut a, mut b) = match is_kafka_url(&args.a) {
        false => {
            let a = ComparableLog::open(&args.a).await?;
            (a, ComparableLog::open(&args.b).await?)
        }
        true => {
            let b = ComparableLog::open(&args.b).await?;
            (ComparableLog::open(&args.a).await?, b)
        }
    };
    a.refresh_head().await?;
    b.refresh_head().await?;
    let compared = compare_logs(a, b, range).await?;
    let text = compared.text([&args.a, &args.b]);
    args.output.print(&text, &compared)?;
    match compared.equal {
        true => Ok(()),
        false => Err(CliError::Quiet(1)),
    }
}

async fn compare_logs(
    a: ComparableLog,
    b: ComparableLog,
    range: CompareRange,
) -> Result<LogComparison, CliError> {
    let with_kafka = a.extent().is_some() || b.extent().is_some();
    let up_to = match range {
        CompareRange::UpTo(up_to) => up_to,
        CompareRange::Common if with_kafka => common_end(&a, &b),
        CompareRange::Common | CompareRange::Exact => NO_LIMIT,
    };
    // A gap beyond the contiguous part is a difference too, if it is in the requested range.
    let limit = match range {
        CompareRange::UpTo(up_to) => up_to,
        CompareRange::Common | CompareRange::Exact => a.last().min(b.last()),
    };
    let gap = [&a, &b]
        .into_iter()
        .filter_map(ComparableLog::extent)
        .flat_map(|extent| &extent.gaps)
        .map(|gap| gap.missing)
        .filter(|missing| *missing <= limit)
        .min();
    let mut comparer = LogComparer::of(a, b);
    comparer.compare(up_to).await?;
    if !matches!(range, CompareRange::UpTo(_)) {
        comparer.compare_rest().await?;
    }
    Ok(comparer.finish(gap).await)
}

/// The end of the part that both have without gaps, and at least the relay's position.
fn common_end(a: &ComparableLog, b: &ComparableLog) -> Position {
    let relayed = [a, b].into_iter().filter_map(ComparableLog::relayed);
    let contiguous_end = a.contiguous_end().min(b.contiguous_end());
    relayed.fold(contiguous_end, Position::max)
}

/// Reads both logs side by side.
struct LogComparer {
    scans: [ComparisonScan; 2],
    /// The last position before any difference.
    same_up_to: Position,
    /// The position and kind of the first difference.
    first_difference: Option<(Position, Difference)>,
}

impl LogComparer {
    fn of(a: ComparableLog, b: ComparableLog) -> Self {
        Self {
            scans: [ComparisonScan::new(a), ComparisonScan::new(b)],
            same_up_to: Position::START,
            first_difference: None,
        }
    }

    /// The next position at which either log has an event, with the events there.
    async fn next(&mut self, up_to: Position) -> Result<Option<EventPair>, CliError> {
        let [a, b] = &mut self.scans;
        let next = [a.peek_position().await?, b.peek_position().await?]
            .into_iter()
            .flatten()
            .min();
        let pair = next.filter(|at| *at <= up_to).map(|at| EventPair {
            at,
            events: [a.next_if_at(at), b.next_if_at(at)],
        });
        Ok(pair)
    }

    /// Compares and hashes both logs up to a position.
    async fn compare(&mut self, up_to: Position) -> Result<(), CliError> {
        let [a, b] = &self.scans;
        let of = up_to.min(a.log.last().max(b.log.last()));
        let mut progress = Progress::new("compared up to position");
        while let Some(pair) = self.next(up_to).await? {
            for (scan, event) in self.scans.iter_mut().zip(&pair.events) {
                event.iter().for_each(|event| scan.hasher.update(event));
            }
            self.count_unmatched(&pair);
            match (pair.difference(), &self.first_difference) {
                (Some(difference), None) => self.first_difference = Some((pair.at, difference)),
                (None, None) => self.same_up_to = pair.at,
                (_, Some(_)) => {}
            }
            progress.report(pair.at.0, of.0);
        }
        Ok(())
    }

    /// Compares the rest, where one log may have events that the other does not have yet.
    async fn compare_rest(&mut self) -> Result<(), CliError> {
        let mut more = [0, 0];
        while let Some(pair) = self.next(NO_LIMIT).await? {
            for (more, event) in more.iter_mut().zip(&pair.events) {
                *more += u64::from(event.is_some());
            }
            self.count_unmatched(&pair);
            let difference = pair.difference();
            if let Some(difference) =
                difference.filter(|difference| self.is_definite(pair.at, difference))
            {
                self.first_difference.get_or_insert((pair.at, difference));
            }
        }
        for (scan, more) in self.scans.iter_mut().zip(more) {
            scan.more = Some(more);
        }
        Ok(())
    }

    /// Whether a difference is final: not if the event lies beyond the other's end, or if a relay may still
    /// publish it there, in any order.
    fn is_definite(&self, at: Position, difference: &Difference) -> bool {
        let [a, b] = &self.scans;
        let (of, other) = match difference {
            Difference::OnlyIn("a") => (&a.log, &b.log),
            Difference::OnlyIn(_) => (&b.log, &a.log),
            _ => return true,
        };
        let may_come = of.relayed().is_some() && other.extent().is_some();
        !may_come && at < other.last()
    }

    fn count_unmatched(&mut self, pair: &EventPair) {
        let [a, b] = &mut self.scans;
        let scan = match &pair.events {
            [Some(_), None] => a,
            [None, Some(_)] => b,
            _ => return,
        };
        scan.only.get_or_insert_default().count(pair.at);
    }

    async fn finish(self, gap: Option<Position>) -> LogComparison {
        let gap = gap.map(|at| (at, Difference::Hole));
        let first_difference = self.first_difference.or(gap);
        let [a, b] = self.scans;
        // An empty log proves nothing about the other.
        let only = |name, scan: &ComparisonScan| Some((scan.only?.first, Difference::OnlyIn(name)));
        let one_is_empty = (self.same_up_to == Position::START)
            .then(|| only("a", &a).or_else(|| only("b", &b)))
            .flatten();
        let first_difference = first_difference.or(one_is_empty);
        LogComparison {
            equal: first_difference.is_none(),
            same_up_to: self.same_up_to,
            a: a.finish().await,
            b: b.finish().await,
            differs_at: first_difference.as_ref().map(|(at, _)| *at),
            difference: first_difference.map(|(_, difference)| difference),
        }
    }
}

struct EventPair {
    at: Position,
    events: [Option<RawRecord>; 2],
}

impl EventPair {
    fn difference(&self) -> Option<Difference> {
        match &self.events {
            [Some(a), Some(b)] => Difference::of(a, b),
            [Some(_), None] => Some(Difference::OnlyIn("a")),
            [None, Some(_)] => Some(Difference::OnlyIn("b")),
            [None, None] => None,
        }
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

    async fn compared(
        folder: &tempfile::TempDir,
        names: [&str; 2],
        range: CompareRange,
    ) -> LogComparison {
        let open = async |name: &str| {
            let url = folder.path().join(name).display().to_string();
            ComparableLog::open(&url).await.unwrap()
        };
        let (a, b) = (open(names[0]).await, open(names[1]).await);
        compare_logs(a, b, range).await.unwrap()
    }

    #[tokio::test]
    async fn a_comparison_finds_where_two_logs_diverge() {
        let folder = tempfile::tempdir().unwrap();
        for (name, events) in [("a.db", 5), ("b.db", 5), ("c.db", 3)] {
            store_of(&folder, name, events).await.close().await;
        }
        let same = compared(&folder, ["a.db", "b.db"], CompareRange::Common).await;
        assert!(same.equal && same.differs_at.is_none());
        assert_eq!(same.a.hash, same.b.hash);
        assert_eq!(same.a.hash.events, 5);
        let shorter = compared(&folder, ["a.db", "c.db"], CompareRange::Common).await;
        assert!(!shorter.equal);
        assert_eq!(shorter.differs_at, Some(Position(4)));
        assert_eq!(shorter.same_up_to, Position(3));
        let only = shorter.a.only.map(|only| (only.events, only.last));
        assert_eq!(only, Some((2, Position(5))));
        let up_to = CompareRange::UpTo(Position(3));
        assert!(compared(&folder, ["a.db", "c.db"], up_to).await.equal);
    }

    #[tokio::test]
    async fn the_hash_equals_the_one_of_the_store() {
        let folder = tempfile::tempdir().unwrap();
        let store = store_of(&folder, "a.db", 5).await;
        let expected = store::log_hash(&store, Position(4)).await.unwrap();
        let log = ComparableLog::from_store(store).await.unwrap();
        assert_eq!(hash_of(log, Position(4)).await.unwrap().hash, expected);
    }
}
