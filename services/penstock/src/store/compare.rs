//! Whether two logs are the same, wherever they stand.
//!
//! Invariant: both are read once, side by side, in order of position, and every event is compared byte
//! for byte as it is stored or was published, whether or not this release can read it.

use std::collections::VecDeque;

use contract::ids::{Bucket, Position};
use runtime::relay::RELAY;
use serde::Serialize;
use store::{LogHash, LogHasher, RawRecord, Store};

use super::kafka::KafkaLog;
use super::verdict::{Compared, Comparison, Only, What};
use super::{CompareArgs, Extent, HashArgs, Progress, failed, is_kafka, line, open, url_of};
use cli::error::CliError;

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

    /// Takes a store's newest events in as well: what Kafka has been read to have, its store has had.
    async fn look_again(&mut self) -> Result<(), CliError> {
        if let Self::Store(log) = self {
            log.head = log.store.head().await.map_err(failed)?;
        }
        Ok(())
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

    /// None where there is no relay to speak of.
    fn carried(&self) -> Option<Position> {
        match self {
            Self::Store(log) => Some(log.carried.min(log.head)),
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

/// One of the logs on its way.
struct Side {
    log: Log,
    page: VecDeque<RawRecord>,
    after: Position,
    hasher: LogHasher,
    more: Option<u64>,
    only: Option<Only>,
}

impl Side {
    fn new(log: Log) -> Self {
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
    async fn at(&mut self) -> Result<Option<Position>, CliError> {
        if self.page.is_empty() {
            let page = self.log.page(self.after).await?;
            self.after = page.last().map_or(self.after, |event| event.position);
            self.page = page.into();
        }
        Ok(self.page.front().map(|event| event.position))
    }

    /// The next event, if this is its position.
    fn take(&mut self, at: Position) -> Option<RawRecord> {
        let is_next = self.page.front().is_some_and(|event| event.position == at);
        is_next.then(|| self.page.pop_front()).flatten()
    }

    async fn finish(self) -> Compared {
        let compared = Compared {
            hash: self.hasher.finish(),
            more: self.more,
            only: self.only,
            last: self.log.last(),
            carried: self.log.carried(),
            kafka: self.log.extent().cloned(),
        };
        self.log.close().await;
        compared
    }
}

pub async fn hash(args: &HashArgs) -> Result<(), CliError> {
    let place = args.which.url();
    let log = match is_kafka(&place) {
        true => Log::open(&place).await?,
        false => Log::of_store(args.which.open().await?).await?,
    };
    let up_to = args.up_to.map_or_else(|| log.whole(), Position);
    let done = hash_of(log, up_to).await?;
    let text = match &done.kafka {
        None => line(&done.hash),
        Some(extent) => format!("{}\n{}", line(&done.hash), extent.lines(&place).join("\n")),
    };
    args.output.show(&text, &done)
}

#[derive(Serialize)]
struct Hashed {
    #[serde(flatten)]
    hash: LogHash,
    #[serde(skip_serializing_if = "Option::is_none")]
    kafka: Option<Extent>,
}

async fn hash_of(log: Log, up_to: Position) -> Result<Hashed, CliError> {
    let mut side = Side::new(log);
    let of = side.log.last().min(up_to);
    let mut progress = Progress::new("log read up to position");
    while let Some(at) = side.at().await?.filter(|at| *at <= up_to) {
        if let Some(event) = side.take(at) {
            side.hasher.take_in(&event);
        }
        progress.say(at.0, of.0);
    }
    let Compared { hash, kafka, .. } = side.finish().await;
    Ok(Hashed { hash, kafka })
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
    let (mut a, mut b) = match is_kafka(&args.a) {
        false => {
            let a = Log::open(&args.a).await?;
            (a, Log::open(&args.b).await?)
        }
        true => {
            let b = Log::open(&args.b).await?;
            (Log::open(&args.a).await?, b)
        }
    };
    a.look_again().await?;
    b.look_again().await?;
    let compared = compare_logs(a, b, extend).await?;
    let text = compared.text([&args.a, &args.b]);
    args.output.show(&text, &compared)?;
    match compared.equal {
        true => Ok(()),
        false => Err(CliError::Quiet(1)),
    }
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
    let mut walk = Walk::of(a, b);
    walk.compare(up_to).await?;
    if !matches!(extend, Extend::UpTo(_)) {
        walk.compare_rest().await?;
    }
    Ok(walk.finish(hole).await)
}

/// Where both are whole; but what a relay has carried must be there.
fn common(a: &Log, b: &Log) -> Position {
    let carried = [a, b].into_iter().filter_map(Log::carried);
    let whole = a.whole().min(b.whole());
    carried.fold(whole, Position::max)
}

/// Both logs, read side by side.
struct Walk {
    sides: [Side; 2],
    /// The last position before any difference.
    same_up_to: Position,
    /// Where the first difference is, and what it is.
    parting: Option<(Position, What)>,
}

impl Walk {
    fn of(a: Log, b: Log) -> Self {
        Self {
            sides: [Side::new(a), Side::new(b)],
            same_up_to: Position::START,
            parting: None,
        }
    }

    /// The next position at which one of them has an event, with what each has there.
    async fn next(&mut self, up_to: Position) -> Result<Option<Place>, CliError> {
        let [a, b] = &mut self.sides;
        let next = [a.at().await?, b.at().await?].into_iter().flatten().min();
        let place = next.filter(|at| *at <= up_to).map(|at| Place {
            at,
            events: [a.take(at), b.take(at)],
        });
        Ok(place)
    }

    /// Takes what both have up to a position into their hashes.
    async fn compare(&mut self, up_to: Position) -> Result<(), CliError> {
        let [a, b] = &self.sides;
        let of = up_to.min(a.log.last().max(b.log.last()));
        let mut progress = Progress::new("compared up to position");
        while let Some(place) = self.next(up_to).await? {
            for (side, event) in self.sides.iter_mut().zip(&place.events) {
                event.iter().for_each(|event| side.hasher.take_in(event));
            }
            self.count_only(&place);
            match (place.difference(), &self.parting) {
                (Some(what), None) => self.parting = Some((place.at, what)),
                (None, None) => self.same_up_to = place.at,
                (_, Some(_)) => {}
            }
            progress.say(place.at.0, of.0);
        }
        Ok(())
    }

    /// Above that, one of them may have what the other has not yet; but not something else.
    async fn compare_rest(&mut self) -> Result<(), CliError> {
        let mut more = [0, 0];
        while let Some(place) = self.next(NO_LIMIT).await? {
            for (more, event) in more.iter_mut().zip(&place.events) {
                *more += u64::from(event.is_some());
            }
            self.count_only(&place);
            let difference = place.difference();
            if let Some(what) = difference.filter(|what| self.is_for_good(place.at, what)) {
                self.parting.get_or_insert((place.at, what));
            }
        }
        for (side, more) in self.sides.iter_mut().zip(more) {
            side.more = Some(more);
        }
        Ok(())
    }

    /// Not what lies above the other's end, nor what a relay has still to carry there, in any order.
    fn is_for_good(&self, at: Position, what: &What) -> bool {
        let [a, b] = &self.sides;
        let (of, other) = match what {
            What::OnlyIn("a") => (&a.log, &b.log),
            What::OnlyIn(_) => (&b.log, &a.log),
            _ => return true,
        };
        let may_come = of.carried().is_some() && other.extent().is_some();
        !may_come && at < other.last()
    }

    fn count_only(&mut self, place: &Place) {
        let [a, b] = &mut self.sides;
        let side = match &place.events {
            [Some(_), None] => a,
            [None, Some(_)] => b,
            _ => return,
        };
        side.only.get_or_insert_default().count(place.at);
    }

    async fn finish(self, hole: Option<Position>) -> Comparison {
        let hole = hole.map(|at| (at, What::Hole));
        let parting = self.parting.or(hole);
        let [a, b] = self.sides;
        // That one has nothing yet proves nothing of the other.
        let only = |name, side: &Side| Some((side.only?.first, What::OnlyIn(name)));
        let nothing = (self.same_up_to == Position::START)
            .then(|| only("a", &a).or_else(|| only("b", &b)))
            .flatten();
        let parting = parting.or(nothing);
        Comparison {
            equal: parting.is_none(),
            same_up_to: self.same_up_to,
            a: a.finish().await,
            b: b.finish().await,
            differs_at: parting.as_ref().map(|(at, _)| *at),
            difference: parting.map(|(_, what)| what),
        }
    }
}

struct Place {
    at: Position,
    events: [Option<RawRecord>; 2],
}

impl Place {
    fn difference(&self) -> Option<What> {
        match &self.events {
            [Some(a), Some(b)] => What::of(a, b),
            [Some(_), None] => Some(What::OnlyIn("a")),
            [None, Some(_)] => Some(What::OnlyIn("b")),
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
        assert_eq!(shorter.same_up_to, Position(3));
        let only = shorter.a.only.map(|only| (only.events, only.last));
        assert_eq!(only, Some((2, Position(5))));
        let up_to = Extend::UpTo(Position(3));
        assert!(compared(&folder, ["a.db", "c.db"], up_to).await.equal);
    }

    #[tokio::test]
    async fn a_hash_is_the_one_that_the_store_itself_has() {
        let folder = tempfile::tempdir().unwrap();
        let store = store_of(&folder, "a.db", 5).await;
        let expected = store::log_hash(&store, Position(4)).await.unwrap();
        let log = Log::of_store(store).await.unwrap();
        assert_eq!(hash_of(log, Position(4)).await.unwrap().hash, expected);
    }
}
