//! The feed of a service: the records of its buckets, without gaps and in order within each bucket;
//! first a bucket's history, then what the bus delivers.
//!
//! Invariants: each event of an assigned bucket is delivered once, after its predecessor in the
//! bucket, as a record or as an unreadable event; once a bucket is revoked, nothing more of it is
//! delivered. The bus is only a hint: what it drops is detected by a record's `prev` or, at the
//! tail, by comparing with the store every second. While the store is unavailable, the feed retries
//! and reports it.
//!
//! A consumer may filter events. Excluded events are not even read: only their positions are
//! delivered.

mod store_reader;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bus::{Bus, BusMessage, Subscription};
use contract::ids::{Bucket, Position};
use contract::log::Record;
use contract::time::Timestamp;
use store::{Store, StoreError, Unreadable};
use tokio::sync::mpsc;
use tokio::time::{Instant, Interval, MissedTickBehavior};

use crate::health::{Component, READING_LOG};
use crate::retry;
pub use store_reader::EventFilter;
use store_reader::{FeedPage, ReadEvent, ReadOutcome, StoreReader};

/// The most records per read of the store, and per item. Smaller pages cost more queries, larger ones
/// memory while the log is folded: several readers each hold some.
const PAGE: usize = 500;

/// How often to check the store for records that the bus has lost.
const RECHECK_EVERY: Duration = Duration::from_secs(1);

/// The most delivered positions kept above the contiguous part. Beyond that, the next recheck reads
/// them again.
const AHEAD_MAX: usize = 65_536;

/// From this many buckets on, one scan of the log is cheaper than a read per bucket.
const SCAN_BUCKETS_MIN: usize = 16;

/// An item of a feed.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedItem {
    /// Records, without gaps and in order within each bucket.
    Records(Vec<Arc<Record>>),
    /// An event that cannot be decoded, in its place in the order.
    Unreadable(Unreadable),
    /// There was nothing more to deliver up to these positions of their buckets.
    Advanced(BTreeMap<Bucket, Position>),
    /// The history of these buckets, up to the head at their assignment, has been delivered,
    /// together with that of the global bucket.
    CaughtUp(Vec<Bucket>),
    /// These buckets are now ours; their history follows, from the start or from the position set
    /// by [`Feed::start_from`]. Fences raised before the next item is requested take effect before
    /// anything is read.
    Assigned(Vec<Bucket>),
    /// These buckets are no longer ours. If they are assigned again, they are read from the start:
    /// the consumer must discard their state.
    Revoked(Vec<Bucket>),
}

/// How far one bucket has been delivered.
struct BucketProgress {
    /// Everything in the bucket up to here has been delivered or skipped.
    cursor: Position,
    /// The last delivered position.
    delivered: Position,
    goal: Goal,
    /// The bucket's newest event when the head was queried.
    newest: Position,
    /// The highest position that the bus delivered after a gap, so the store must have it.
    announced: Position,
    /// The history up to the assignment has been delivered.
    is_caught_up: bool,
}

/// What must be read from the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goal {
    Nothing,
    /// Up to the head, which has not been queried yet.
    Head,
    UpTo(Position),
}

impl BucketProgress {
    fn new() -> Self {
        Self {
            cursor: Position::START,
            delivered: Position::START,
            goal: Goal::Head,
            newest: Position::START,
            announced: Position::START,
            is_caught_up: false,
        }
    }

    fn range(&self) -> Option<ReadRange> {
        Some(ReadRange {
            from: self.cursor,
            newest: self.newest.max(self.announced),
            end: self.up_to()?,
        })
    }

    fn up_to(&self) -> Option<Position> {
        match self.goal {
            Goal::UpTo(position) => Some(position),
            Goal::Nothing | Goal::Head => None,
        }
    }

    /// There is an event at this position, and something before it is missing.
    fn require_up_to(&mut self, position: Position) {
        self.announced = self.announced.max(position);
        self.goal = match self.goal {
            Goal::Nothing => Goal::UpTo(position),
            Goal::Head => Goal::Head,
            Goal::UpTo(goal) => Goal::UpTo(goal.max(position)),
        };
    }
}

/// The range to be read of one bucket.
struct ReadRange {
    from: Position,
    newest: Position,
    end: Position,
}

impl ReadRange {
    fn length(&self) -> u64 {
        self.newest.0.saturating_sub(self.from.0)
    }
}

/// A scan of the log.
struct LogScan {
    start: Position,
    position: Position,
    end: Position,
    /// Buckets that reach their goals by this scan; empty if it only looks for lost records.
    buckets: BTreeSet<Bucket>,
}

/// A consumer's view of the log. [`next`](Feed::next) is cancel safe.
pub struct Feed {
    reader: StoreReader,
    messages: mpsc::Receiver<BusMessage>,
    is_bus_closed: bool,
    /// Received from the bus, not handled yet.
    inbox: VecDeque<BusMessage>,
    /// Items to be delivered.
    outbox: VecDeque<FeedItem>,
    /// The assigned buckets and the global one, which is always assigned.
    buckets: BTreeMap<Bucket, BucketProgress>,
    scan: Option<LogScan>,
    /// Caught up, and not reported yet.
    newly_caught_up: Vec<Bucket>,
    /// An empty assignment must be reported as caught up, too.
    is_empty_assignment_pending: bool,
    /// Everything of the assigned buckets up to here has been delivered, or is within a bucket's
    /// goal.
    contiguous: Position,
    /// Positions above it that have been delivered too.
    ahead: BTreeSet<Position>,
    recheck: Interval,
    is_recheck_due: bool,
    /// Whether it is the bus's turn, or the store's.
    is_bus_turn: bool,
    component: Option<Component>,
    is_failing: bool,
    paused_until: Option<Instant>,
}

impl Feed {
    /// Subscribes at once; reads start with the first [`next`](Feed::next), each bucket from its
    /// start.
    pub fn open(store: Store, bus: Arc<dyn Bus>, subscription: Subscription) -> Self {
        let global = BucketProgress {
            goal: Goal::Nothing,
            ..BucketProgress::new()
        };
        Self {
            messages: bus.subscribe_records(subscription),
            is_bus_closed: false,
            reader: StoreReader::new(store),
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
            buckets: BTreeMap::from([(Bucket::GLOBAL, global)]),
            scan: None,
            newly_caught_up: Vec::new(),
            is_empty_assignment_pending: false,
            contiguous: Position::START,
            ahead: BTreeSet::new(),
            recheck: every(RECHECK_EVERY),
            is_recheck_due: false,
            is_bus_turn: true,
            component: None,
            is_failing: false,
            paused_until: None,
        }
    }

    /// Reads and delivers only events that the filter includes.
    pub fn with_filter(mut self, filter: EventFilter) -> Self {
        self.reader.filter = filter;
        self
    }

    /// Sets how often to look for records that the bus has lost; every second by default.
    pub fn with_recheck_interval(mut self, interval: Duration) -> Self {
        self.recheck = every(interval);
        self
    }

    /// Reports an unavailable store to readiness.
    pub fn with_component(mut self, component: &Component) -> Self {
        self.component = Some(component.clone());
        self
    }

    /// Returns the next item; waits until there is one, also while the store is unavailable. The
    /// only error is that this process has closed the store.
    ///
    /// # Errors
    ///
    /// [`StoreError::Closed`] only.
    pub async fn next(&mut self) -> Result<FeedItem, StoreError> {
        // Nothing awaited here changes the state before it has succeeded.
        loop {
            if let Some(item) = self.outbox.pop_front() {
                return Ok(item);
            }
            if let Some(until) = self.paused_until {
                tokio::time::sleep_until(until).await;
                self.paused_until = None;
            }
            match self.advance().await {
                Ok(()) => {}
                Err(StoreError::Closed) => return Err(StoreError::Closed),
                Err(error) => self.handle_store_error(&error),
            }
        }
    }

    /// The consumer has everything of an assigned bucket up to here. Must be called before the next
    /// item is requested.
    pub fn start_from(&mut self, bucket: Bucket, position: Position) {
        if let Some(progress) = self.buckets.get_mut(&bucket) {
            progress.cursor = progress.cursor.max(position);
            progress.delivered = progress.cursor;
        }
    }

    /// From the next page of the store on, usage that ended by `from` is read without its slices, which are
    /// most of a long log; with [`Timestamp::MIN`] all slices are read. Records from the bus are complete.
    pub fn slices_from(&mut self, from: Timestamp) {
        self.reader.slices_from = from;
    }

    /// The consumer has nothing of an assigned bucket. Must be called before the next item is
    /// requested.
    pub fn read_from_start(&mut self, bucket: Bucket) {
        if let Some(progress) = self.buckets.get_mut(&bucket) {
            *progress = BucketProgress::new();
            self.discard(bucket);
        }
    }

    /// Reads these buckets up to the current head, then reports them as caught up again: for a
    /// consumer that has not owned them continuously.
    pub fn catch_up_again(&mut self, buckets: &[Bucket]) {
        self.reader.cancel();
        for bucket in buckets {
            if let Some(progress) = self.buckets.get_mut(bucket) {
                progress.goal = Goal::Head;
                progress.is_caught_up = false;
                self.newly_caught_up.retain(|of| of != bucket);
                if let Some(scan) = &mut self.scan {
                    scan.buckets.remove(bucket);
                }
            }
        }
    }

    /// One step: a few messages of the bus, one page of the store, or a wait for either.
    async fn advance(&mut self) -> Result<(), StoreError> {
        self.receive_pending();
        let must_read = self.is_recheck_due
            || self.scan.is_some()
            || self
                .buckets
                .values()
                .any(|progress| progress.goal != Goal::Nothing);
        if !self.inbox.is_empty() && (self.is_bus_turn || !must_read) {
            self.is_bus_turn = false;
            self.drain_inbox();
            return Ok(());
        }
        self.is_bus_turn = true;
        if !must_read {
            self.wait().await;
            return Ok(());
        }
        self.read().await?;
        if self.is_failing {
            self.is_failing = false;
            self.report(None);
        }
        Ok(())
    }

    fn receive_pending(&mut self) {
        while self.inbox.len() < PAGE {
            let Ok(message) = self.messages.try_recv() else {
                return;
            };
            self.inbox.push_back(message);
        }
    }

    /// Waits for a message of the bus or for the next recheck.
    async fn wait(&mut self) {
        tokio::select! {
            biased;
            _ = self.recheck.tick() => self.is_recheck_due = self.is_global_caught_up(),
            message = self.messages.recv(), if !self.is_bus_closed => match message {
                Some(message) => self.inbox.push_back(message),
                None => self.is_bus_closed = true,
            },
        }
    }

    fn is_global_caught_up(&self) -> bool {
        let global = self.buckets.get(&Bucket::GLOBAL);
        global.is_some_and(|progress| progress.is_caught_up)
    }

    fn handle_store_error(&mut self, error: &StoreError) {
        if !self.is_failing {
            tracing::warn!(%error, "failed to read the log, retrying");
        }
        self.is_failing = true;
        self.report(Some(retry::unreachable_message(error)));
        self.paused_until = Some(Instant::now() + retry::RETRY_INTERVAL);
    }

    fn report(&self, problem: Option<String>) {
        if let Some(component) = &self.component {
            component.set_problem(problem);
        }
    }

    /// Handles messages of the bus, up to a change of the assignment.
    fn drain_inbox(&mut self) {
        while let Some(message) = self.inbox.pop_front() {
            match message {
                BusMessage::Record(record) => {
                    let position = record.position;
                    if self.accept(self.reader.classify(record)) {
                        self.record_delivered(position);
                    }
                }
                BusMessage::Assigned(buckets) => return self.assign(&buckets),
                BusMessage::Revoked(buckets) => return self.revoke(&buckets),
            }
        }
    }

    /// Delivers a record from the bus if it is the next of its bucket; a record after a gap becomes
    /// a goal.
    fn accept(&mut self, read: ReadEvent) -> bool {
        let Some(progress) = self.buckets.get_mut(&read.bucket) else {
            return false;
        };
        if read.position <= progress.cursor {
            return false;
        }
        if read.prev > progress.cursor {
            progress.require_up_to(read.position);
            return false;
        }
        progress.cursor = read.position;
        self.deliver(read.bucket, read.position, read.outcome);
        true
    }

    /// Delivers a page that was read after a position, for buckets of which it is the continuation.
    fn accept_page(&mut self, of: Option<Bucket>, after: Position, page: FeedPage) {
        for read in page.events {
            let Some(progress) = self.buckets.get_mut(&read.bucket) else {
                continue;
            };
            // A bucket that has not reached the page lacks what is between.
            if progress.cursor < after || read.position <= progress.cursor {
                continue;
            }
            progress.cursor = read.position;
            self.deliver(read.bucket, read.position, read.outcome);
            if of.is_some() {
                self.record_delivered(read.position);
            }
        }
        let is_reached = |(bucket, progress): &(&Bucket, &mut BucketProgress)| {
            progress.cursor >= after && of.is_none_or(|of| of == **bucket)
        };
        for (_, progress) in self.buckets.iter_mut().filter(is_reached) {
            progress.cursor = progress.cursor.max(page.through);
        }
    }

    fn deliver(&mut self, bucket: Bucket, position: Position, outcome: ReadOutcome) {
        if let Some(progress) = self.buckets.get_mut(&bucket) {
            progress.delivered = position;
        }
        match (outcome, self.outbox.back_mut()) {
            (ReadOutcome::Record(record), Some(FeedItem::Records(records))) => records.push(record),
            (ReadOutcome::Record(record), _) => {
                self.outbox.push_back(FeedItem::Records(vec![record]));
            }
            (ReadOutcome::Unreadable(unreadable), _) => {
                self.outbox.push_back(FeedItem::Unreadable(*unreadable));
            }
            (ReadOutcome::Filtered, Some(FeedItem::Advanced(positions))) => {
                positions.insert(bucket, position);
            }
            (ReadOutcome::Filtered, _) => {
                let positions = BTreeMap::from([(bucket, position)]);
                self.outbox.push_back(FeedItem::Advanced(positions));
            }
        }
    }

    fn assign(&mut self, buckets: &[Bucket]) {
        self.reader.cancel();
        if let Some(global) = self.buckets.get_mut(&Bucket::GLOBAL)
            && !global.is_caught_up
            && global.goal == Goal::Nothing
        {
            global.goal = Goal::Head;
            self.is_empty_assignment_pending = buckets.is_empty();
        }
        let new = |bucket: &&Bucket| !self.buckets.contains_key(bucket);
        let new: Vec<Bucket> = buckets.iter().filter(new).copied().collect();
        for bucket in &new {
            self.buckets.insert(*bucket, BucketProgress::new());
        }
        self.outbox.push_back(FeedItem::Assigned(new));
    }

    fn revoke(&mut self, buckets: &[Bucket]) {
        self.reader.cancel();
        let ours =
            |bucket: &&Bucket| **bucket != Bucket::GLOBAL && self.buckets.contains_key(bucket);
        let ours: Vec<Bucket> = buckets.iter().filter(ours).copied().collect();
        for bucket in &ours {
            self.buckets.remove(bucket);
            self.discard(*bucket);
        }
        self.outbox.push_back(FeedItem::Revoked(ours));
    }

    /// Discards everything of the bucket that has not been delivered or reported.
    fn discard(&mut self, bucket: Bucket) {
        self.newly_caught_up.retain(|of| *of != bucket);
        if let Some(scan) = &mut self.scan {
            scan.buckets.remove(&bucket);
        }
        for item in &mut self.outbox {
            match item {
                FeedItem::Records(records) => records.retain(|record| record.bucket != bucket),
                FeedItem::CaughtUp(buckets) => buckets.retain(|of| *of != bucket),
                FeedItem::Advanced(positions) => {
                    positions.remove(&bucket);
                }
                _ => {}
            }
        }
        self.outbox.retain(|item| match item {
            FeedItem::Records(records) => !records.is_empty(),
            FeedItem::CaughtUp(buckets) => !buckets.is_empty(),
            FeedItem::Advanced(positions) => !positions.is_empty(),
            FeedItem::Unreadable(unreadable) => unreadable.bucket != bucket,
            FeedItem::Assigned(_) | FeedItem::Revoked(_) => true,
        });
    }

    /// One query to the store.
    async fn read(&mut self) -> Result<(), StoreError> {
        let awaiting: Vec<Bucket> = self.buckets_awaiting_head().collect();
        if !awaiting.is_empty() {
            let (head, heads) = self.reader.heads(awaiting).await?;
            self.set_goals(head, &heads);
        } else if let Some(bucket) = self.next_single_bucket() {
            self.read_bucket(bucket).await?;
        } else if self.scan.is_some() {
            self.read_scan_page().await?;
        } else {
            self.start_recheck().await?;
        }
        self.report_caught_up();
        Ok(())
    }

    fn buckets_awaiting_head(&self) -> impl Iterator<Item = Bucket> {
        let awaits_head = |(bucket, progress): (&Bucket, &BucketProgress)| {
            (progress.goal == Goal::Head).then_some(*bucket)
        };
        self.buckets.iter().filter_map(awaits_head)
    }

    /// Newly assigned buckets are read up to the head of the log. If the bucket's newest event has
    /// been delivered already, there is nothing to read.
    fn set_goals(&mut self, head: Position, heads: &BTreeMap<Bucket, Position>) {
        if heads.len() == self.buckets.len() {
            self.contiguous = head;
            self.ahead.clear();
        }
        for (bucket, newest) in heads {
            let Some(progress) = self.buckets.get_mut(bucket) else {
                continue;
            };
            progress.newest = (*newest).max(progress.announced);
            if progress.cursor >= progress.newest {
                progress.cursor = progress.cursor.max(head);
                progress.goal = Goal::Nothing;
                self.mark_caught_up(*bucket);
            } else {
                progress.goal = Goal::UpTo(head.max(progress.announced));
            }
        }
    }

    /// The next bucket to be read separately, the global one first. Many buckets that share most of
    /// their ranges become a scan instead.
    fn next_single_bucket(&mut self) -> Option<Bucket> {
        let is_covered = |bucket: &Bucket| {
            let scan = self.scan.as_ref();
            scan.is_some_and(|scan| scan.buckets.contains(bucket))
        };
        let ranges: BTreeMap<Bucket, ReadRange> = self
            .buckets
            .iter()
            .filter(|(bucket, _)| !is_covered(bucket))
            .filter_map(|(bucket, progress)| Some((*bucket, progress.range()?)))
            .collect();
        let mut position = ranges.values().map(|range| range.from).min()?;
        let mut end = ranges.values().map(|range| range.end).max()?;
        let scan_length = ranges.len() as u64 * end.0.saturating_sub(position.0);
        let separate_length: u64 = ranges.values().map(ReadRange::length).sum();
        if ranges.len() < SCAN_BUCKETS_MIN || separate_length < scan_length / 2 {
            let global = ranges.contains_key(&Bucket::GLOBAL);
            return match global {
                true => Some(Bucket::GLOBAL),
                false => ranges.keys().next().copied(),
            };
        }
        let mut buckets: BTreeSet<Bucket> = ranges.into_keys().collect();
        if let Some(scan) = self.scan.take() {
            position = position.min(scan.position);
            end = end.max(scan.end);
            buckets.extend(scan.buckets);
        }
        self.start_scan(LogScan {
            start: position,
            position,
            end,
            buckets,
        });
        None
    }

    /// A bucket without a goal has everything up to the contiguous position, however old its last
    /// event is.
    fn start_scan(&mut self, scan: LogScan) {
        let nothing_missing = |progress: &&mut BucketProgress| progress.goal == Goal::Nothing;
        for progress in self.buckets.values_mut().filter(nothing_missing) {
            progress.cursor = progress.cursor.max(self.contiguous);
        }
        self.scan = Some(scan);
    }

    async fn read_bucket(&mut self, bucket: Bucket) -> Result<(), StoreError> {
        let Some(progress) = self.buckets.get(&bucket) else {
            return Ok(());
        };
        let (after, goal) = (progress.cursor, progress.up_to().unwrap_or_default());
        if after >= goal {
            // A scan got here first.
            self.mark_reached(bucket, goal);
            return Ok(());
        }
        let page = self.reader.page(Some(bucket), after).await?;
        let through = page.through;
        if through <= after {
            return Err(not_in_store(bucket, goal));
        }
        self.accept_page(Some(bucket), after, page);
        if through >= goal {
            self.mark_reached(bucket, goal);
        }
        Ok(())
    }

    async fn read_scan_page(&mut self) -> Result<(), StoreError> {
        let Some(scan) = &self.scan else {
            return Ok(());
        };
        let after = scan.position;
        let page = self.reader.page(None, after).await?;
        let through = page.through;
        self.accept_page(None, after, page);
        let Some(scan) = &mut self.scan else {
            return Ok(());
        };
        if through <= after {
            let bucket = scan.buckets.first().copied().unwrap_or(Bucket::GLOBAL);
            return Err(not_in_store(bucket, scan.end));
        }
        scan.position = through;
        if let (Some(component), false) = (&self.component, scan.buckets.is_empty()) {
            component.set_waiting_reason(&format!(
                "{READING_LOG}: at {} of {}",
                scan.position, scan.end
            ));
        }
        if scan.position >= scan.end {
            self.finish_scan();
        }
        Ok(())
    }

    fn finish_scan(&mut self) {
        let Some(scan) = self.scan.take() else {
            return;
        };
        if scan.start <= self.contiguous {
            self.extend_contiguous(scan.end);
        }
        let if_covered = |(bucket, progress): (&Bucket, &BucketProgress)| {
            let is_covered = match scan.buckets.is_empty() {
                // A bucket without a goal has had everything up to here delivered.
                true => progress.goal == Goal::Nothing,
                false => scan.buckets.contains(bucket),
            };
            is_covered.then_some(*bucket)
        };
        let covered: Vec<Bucket> = self.buckets.iter().filter_map(if_covered).collect();
        for bucket in covered {
            self.mark_reached(bucket, scan.end);
        }
    }

    /// Everything in the bucket up to here has been read.
    fn mark_reached(&mut self, bucket: Bucket, end: Position) {
        let Some(progress) = self.buckets.get_mut(&bucket) else {
            return;
        };
        progress.cursor = progress.cursor.max(end);
        let reached = progress.newest.max(progress.announced).min(progress.cursor);
        let has_advanced = progress.delivered < reached;
        if progress.up_to().is_some_and(|goal| goal <= progress.cursor) {
            progress.goal = Goal::Nothing;
        }
        let is_caught_up = progress.goal != Goal::Head;
        if has_advanced {
            self.deliver(bucket, reached, ReadOutcome::Filtered);
        }
        if is_caught_up {
            self.mark_caught_up(bucket);
        }
    }

    fn mark_caught_up(&mut self, bucket: Bucket) {
        if let Some(progress) = self.buckets.get_mut(&bucket)
            && !progress.is_caught_up
        {
            progress.is_caught_up = true;
            if bucket != Bucket::GLOBAL {
                self.newly_caught_up.push(bucket);
            }
        }
    }

    /// Buckets assigned together are reported together: they are mostly read together.
    fn report_caught_up(&mut self) {
        let all = self.buckets.values().all(|progress| progress.is_caught_up);
        if all && (!self.newly_caught_up.is_empty() || self.is_empty_assignment_pending) {
            self.is_empty_assignment_pending = false;
            let mut buckets = std::mem::take(&mut self.newly_caught_up);
            buckets.sort_unstable();
            self.outbox.push_back(FeedItem::CaughtUp(buckets));
        }
    }

    async fn start_recheck(&mut self) -> Result<(), StoreError> {
        let (head, _) = self.reader.heads(Vec::new()).await?;
        self.is_recheck_due = false;
        if head > self.contiguous {
            self.start_scan(LogScan {
                start: self.contiguous,
                position: self.contiguous,
                end: head,
                buckets: BTreeSet::new(),
            });
        }
        Ok(())
    }

    fn record_delivered(&mut self, position: Position) {
        if position <= self.contiguous {
            return;
        }
        if self.ahead.len() >= AHEAD_MAX {
            self.ahead.clear();
        }
        self.ahead.insert(position);
        self.absorb_ahead();
    }

    fn extend_contiguous(&mut self, position: Position) {
        self.contiguous = self.contiguous.max(position);
        self.ahead = self.ahead.split_off(&Position(self.contiguous.0 + 1));
        self.absorb_ahead();
    }

    fn absorb_ahead(&mut self) {
        while self.ahead.remove(&Position(self.contiguous.0 + 1)) {
            self.contiguous = Position(self.contiguous.0 + 1);
        }
    }
}

fn not_in_store(bucket: Bucket, position: Position) -> StoreError {
    StoreError::database(format!(
        "the bus has position {position} of bucket {bucket}, and the store does not: they belong to different installations"
    ))
}

fn every(duration: Duration) -> Interval {
    let mut interval = tokio::time::interval(duration);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}
