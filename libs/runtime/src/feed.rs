//! What a service reads: the records of its buckets, without gaps and in order within each bucket,
//! first the log's history and then what the bus brings.
//!
//! Invariant: each record of an assigned bucket is delivered once, after the one before it in the
//! bucket. The bus is only a hint: what it drops is found by a record's `prev`, or, at the tail, by
//! comparing with the store every second.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bus::{Bus, BusMessage, Subscription};
use contract::ids::{Bucket, Position};
use contract::log::Record;
use store::{Store, StoreError};
use tokio::sync::mpsc;
use tokio::time::{Interval, MissedTickBehavior};

/// Records per read of the store, and per item.
const PAGE: usize = 1000;

/// How often the store is asked whether the bus has lost something.
const RECHECK_EVERY: Duration = Duration::from_secs(1);

/// Positions ahead of what is known to be whole. Past it the next recheck reads them once more.
const AHEAD_MAX: usize = 65_536;

#[derive(Clone, Debug, PartialEq)]
pub enum FeedItem {
    /// Gapless and in order within each bucket.
    Records(Vec<Arc<Record>>),
    /// The history up to the moment of the first assignment has been delivered. Comes once.
    CaughtUp,
    /// These buckets are ours from now on; their history follows. Ownership taken (fences raised)
    /// before the next item is asked for comes before anything is read.
    Assigned(Vec<Bucket>),
    Revoked(Vec<Bucket>),
}

/// A consumer's view of the log. [`next`](Feed::next) may be cancelled (in a `select!`) without
/// losing anything.
pub struct Feed {
    store: Store,
    messages: mpsc::Receiver<BusMessage>,
    bus_closed: bool,
    /// Taken from the bus, not dealt with yet.
    inbox: VecDeque<BusMessage>,
    from: BTreeMap<Bucket, Position>,
    /// How far each assigned bucket has been delivered; the global one is always assigned.
    cursors: BTreeMap<Bucket, Position>,
    /// Everything of the assigned buckets up to here has been delivered.
    whole: Position,
    /// Positions above it that have been delivered too.
    ahead: BTreeSet<Position>,
    /// Where the read of the store that is under way ends.
    reading: Option<Reading>,
    caught_up: bool,
    recheck: Interval,
}

/// A read of all buckets from `whole` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    /// The head has not been asked for yet.
    Asked,
    UpTo(Position),
}

impl Feed {
    /// Subscribes at once; reads begin with the first [`next`](Feed::next). A bucket that `from`
    /// does not name is read from the start.
    pub fn open(
        store: Store,
        bus: Arc<dyn Bus>,
        group: &'static str,
        from: BTreeMap<Bucket, Position>,
    ) -> Self {
        let global = from.get(&Bucket::GLOBAL).copied().unwrap_or_default();
        Self {
            messages: bus.subscribe_records(Subscription::Group(group)),
            bus_closed: false,
            store,
            inbox: VecDeque::new(),
            cursors: BTreeMap::from([(Bucket::GLOBAL, global)]),
            from,
            whole: Position::START,
            ahead: BTreeSet::new(),
            reading: None,
            caught_up: false,
            recheck: every(RECHECK_EVERY),
        }
    }

    /// Looks for what the bus has lost at another interval than every second.
    pub fn recheck_every(mut self, interval: Duration) -> Self {
        self.recheck = every(interval);
        self
    }

    /// The next item; waits until there is one. After an error the same is tried again.
    pub async fn next(&mut self) -> Result<FeedItem, StoreError> {
        // Whatever is awaited here leaves the state as it is until it has succeeded.
        loop {
            if let Some(reading) = self.reading {
                if let Some(item) = self.read_on(reading).await? {
                    return Ok(item);
                }
                continue;
            }
            if let Some(item) = self.deal_with_inbox().await? {
                return Ok(item);
            }
            self.wait().await;
        }
    }

    /// Positions up to which each assigned bucket has been delivered.
    pub fn cursors(&self) -> &BTreeMap<Bucket, Position> {
        &self.cursors
    }

    /// Takes what the bus has, or notices that it is time to look into the store.
    async fn wait(&mut self) {
        tokio::select! {
            biased;
            _ = self.recheck.tick() => {
                if self.caught_up {
                    self.reading = Some(Reading::Asked);
                }
            }
            message = self.messages.recv(), if !self.bus_closed => match message {
                Some(message) => {
                    self.inbox.push_back(message);
                    while self.inbox.len() < PAGE {
                        let Ok(message) = self.messages.try_recv() else { break };
                        self.inbox.push_back(message);
                    }
                }
                None => self.bus_closed = true,
            },
        }
    }

    /// One step of a read of the store. None: nothing new came of it.
    async fn read_on(&mut self, reading: Reading) -> Result<Option<FeedItem>, StoreError> {
        let Reading::UpTo(target) = reading else {
            let head = self.store.head().await?;
            self.reading = Some(Reading::UpTo(head));
            return Ok(None);
        };
        if self.whole >= target {
            self.reading = None;
            if self.caught_up {
                return Ok(None);
            }
            self.caught_up = true;
            return Ok(Some(FeedItem::CaughtUp));
        }
        let page = self.store.read_all(self.whole, PAGE).await?;
        let Some(last) = page.last().map(|record| record.position) else {
            return Err(StoreError::Database(format!(
                "the log ends before its head {target}: nothing follows {}",
                self.whole
            )));
        };
        let mut fresh = Vec::new();
        for record in page {
            let Some(cursor) = self.cursors.get_mut(&record.bucket) else {
                continue;
            };
            if record.position > *cursor {
                *cursor = record.position;
                fresh.push(Arc::new(record));
            }
        }
        self.whole_up_to(last);
        Ok(records(fresh))
    }

    /// Deals with messages of the bus until there is something to deliver or to read first.
    async fn deal_with_inbox(&mut self) -> Result<Option<FeedItem>, StoreError> {
        let mut fresh = Vec::new();
        while let Some(message) = self.inbox.front() {
            let record = match message {
                BusMessage::Record(record) => record.clone(),
                // What came before is delivered first.
                _ if !fresh.is_empty() => break,
                BusMessage::Assigned(buckets) => {
                    let buckets = buckets.clone();
                    self.assign(&buckets);
                    self.inbox.pop_front();
                    return Ok(Some(FeedItem::Assigned(buckets)));
                }
                BusMessage::Revoked(buckets) => {
                    let buckets = buckets.clone();
                    for bucket in buckets.iter().filter(|b| **b != Bucket::GLOBAL) {
                        self.cursors.remove(bucket);
                    }
                    self.inbox.pop_front();
                    return Ok(Some(FeedItem::Revoked(buckets)));
                }
            };
            let cursor = self.cursors.get(&record.bucket).copied();
            match cursor {
                Some(cursor) if record.position > cursor && record.prev > cursor => {
                    if !fresh.is_empty() {
                        break;
                    }
                    // The record stays in the inbox until what is missing before it has come.
                    return self.fill_gap(&record, cursor).await.map(Some);
                }
                Some(cursor) if record.position > cursor => {
                    self.cursors.insert(record.bucket, record.position);
                    self.delivered(record.position);
                    fresh.push(record);
                }
                _ => {}
            }
            self.inbox.pop_front();
        }
        Ok(records(fresh))
    }

    /// Reads what is missing in the bucket of a record, as far as one page goes.
    async fn fill_gap(
        &mut self,
        record: &Record,
        cursor: Position,
    ) -> Result<FeedItem, StoreError> {
        let page = self.store.read_bucket(record.bucket, cursor, PAGE).await?;
        let Some(last) = page.last() else {
            return Err(StoreError::Database(format!(
                "the bus has position {} of bucket {}, and the store has nothing after {cursor}",
                record.position, record.bucket
            )));
        };
        self.cursors.insert(record.bucket, last.position);
        for record in &page {
            self.delivered(record.position);
        }
        Ok(FeedItem::Records(page.into_iter().map(Arc::new).collect()))
    }

    /// New buckets have all their history before them, so the log is read again from the earliest
    /// of their positions; what other buckets have had is dropped by their cursors.
    fn assign(&mut self, buckets: &[Bucket]) {
        let mut earliest = self.cursors.get(&Bucket::GLOBAL).copied();
        for bucket in buckets {
            let from = self.from.get(bucket).copied().unwrap_or_default();
            let cursor = *self.cursors.entry(*bucket).or_insert(from);
            earliest = earliest.map(|earliest| earliest.min(cursor));
        }
        self.whole = earliest.unwrap_or_default();
        self.ahead.clear();
        self.reading = Some(Reading::Asked);
    }

    fn delivered(&mut self, position: Position) {
        if position <= self.whole {
            return;
        }
        if self.ahead.len() >= AHEAD_MAX {
            self.ahead.clear();
        }
        self.ahead.insert(position);
        self.absorb_ahead();
    }

    fn whole_up_to(&mut self, position: Position) {
        self.whole = self.whole.max(position);
        self.ahead = self.ahead.split_off(&Position(self.whole.0 + 1));
        self.absorb_ahead();
    }

    fn absorb_ahead(&mut self) {
        while self.ahead.remove(&Position(self.whole.0 + 1)) {
            self.whole = Position(self.whole.0 + 1);
        }
    }
}

fn records(records: Vec<Arc<Record>>) -> Option<FeedItem> {
    (!records.is_empty()).then_some(FeedItem::Records(records))
}

fn every(duration: Duration) -> Interval {
    let mut interval = tokio::time::interval(duration);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}
