//! What a service reads: the records of its buckets, without gaps and in order within each bucket,
//! first the history of a bucket and then what the bus brings.
//!
//! Invariants: each event of an assigned bucket is delivered once, after the one before it in the
//! bucket, as a record or as something unreadable in its place; of a bucket that was revoked nothing
//! is delivered any more. The bus is only a hint: what it drops is found by a record's `prev`, or,
//! at the tail, by comparing with the store every second. While the store cannot be reached the feed
//! tries again, and says so.
//!
//! A consumer may say which events it wants. The others are not even read: of them only the position is
//! delivered.

mod asked;

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

use crate::health::{Component, READS_THE_LOG};
use crate::retry;
pub use asked::Wants;
use asked::{Page, Read, ReadOutcome, Reads};

/// Records per read of the store, and per item.
const PAGE: usize = 1000;

/// How often the store is asked whether the bus has lost something.
const RECHECK_EVERY: Duration = Duration::from_secs(1);

/// Positions ahead of what is known to be whole. Past it the next recheck reads them once more.
const AHEAD_MAX: usize = 65_536;

/// From so many buckets on, one read of the whole log is cheaper than a read of each.
const SCAN_MIN: usize = 16;

/// What a feed brings.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedItem {
    /// Gapless and in order within each bucket.
    Records(Vec<Arc<Record>>),
    /// An event that cannot be decoded, in its place in the order.
    Unreadable(Unreadable),
    /// Up to these positions of their buckets there was nothing more that is wanted.
    Passed(BTreeMap<Bucket, Position>),
    /// The history of these buckets, up to the head at their assignment, has been delivered, and that
    /// of the global bucket with it.
    CaughtUp(Vec<Bucket>),
    /// These buckets are ours from now on; their history follows, from the start or from where
    /// [`Feed::begin_at`] says. Ownership taken (fences raised) before the next item is asked for comes
    /// before anything is read.
    Assigned(Vec<Bucket>),
    /// These are ours no more. Should they come back, they are read from the start again: whoever
    /// folds them must forget what it has folded.
    Revoked(Vec<Bucket>),
}

/// How far one bucket has been delivered.
struct Place {
    /// Everything in the bucket up to here has been delivered.
    cursor: Position,
    /// The last position that was delivered of it.
    delivered: Position,
    goal: Goal,
    /// The bucket's newest event when the head was asked for.
    newest: Position,
    /// The bus has shown this position, so the store must have it.
    promised: Position,
    /// The history from before the assignment is over.
    caught_up: bool,
}

/// What is to be read from the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goal {
    Nothing,
    /// Up to the head, which has not been asked for yet.
    Head,
    UpTo(Position),
}

impl Place {
    fn new() -> Self {
        Self {
            cursor: Position::START,
            delivered: Position::START,
            goal: Goal::Head,
            newest: Position::START,
            promised: Position::START,
            caught_up: false,
        }
    }

    fn stretch(&self) -> Option<Stretch> {
        Some(Stretch {
            from: self.cursor,
            newest: self.newest.max(self.promised),
            to: self.up_to()?,
        })
    }

    fn up_to(&self) -> Option<Position> {
        match self.goal {
            Goal::UpTo(position) => Some(position),
            Goal::Nothing | Goal::Head => None,
        }
    }

    /// There is an event at this position, and something before it is missing.
    fn promise(&mut self, position: Position) {
        self.promised = self.promised.max(position);
        self.goal = match self.goal {
            Goal::Nothing => Goal::UpTo(position),
            Goal::Head => Goal::Head,
            Goal::UpTo(goal) => Goal::UpTo(goal.max(position)),
        };
    }
}

/// What is to be read of one bucket.
struct Stretch {
    from: Position,
    newest: Position,
    to: Position,
}

impl Stretch {
    fn length(&self) -> u64 {
        self.newest.0.saturating_sub(self.from.0)
    }
}

/// A read of the whole log.
struct Scan {
    begun: Position,
    at: Position,
    to: Position,
    /// Buckets that reach their goals by it; none if it only looks for what the bus has lost.
    covers: BTreeSet<Bucket>,
}

/// A consumer's view of the log. [`next`](Feed::next) may be cancelled (in a `select!`) without
/// losing anything.
pub struct Feed {
    reads: Reads,
    messages: mpsc::Receiver<BusMessage>,
    bus_closed: bool,
    /// Taken from the bus, not dealt with yet.
    inbox: VecDeque<BusMessage>,
    /// To be delivered.
    outbox: VecDeque<FeedItem>,
    /// The assigned buckets, and the global one, which always is.
    places: BTreeMap<Bucket, Place>,
    scan: Option<Scan>,
    /// Caught up with, and not told yet.
    done: Vec<Bucket>,
    /// An assignment of nothing is to be told as caught up, too.
    nothing_assigned: bool,
    /// Everything of the assigned buckets up to here has been delivered, or is a bucket's goal.
    whole: Position,
    /// Positions above it that have been delivered too.
    ahead: BTreeSet<Position>,
    recheck: Interval,
    recheck_due: bool,
    /// The bus has its turn; else the store.
    bus_first: bool,
    component: Option<Component>,
    troubled: bool,
    paused_until: Option<Instant>,
}

impl Feed {
    /// Subscribes at once; reads begin with the first [`next`](Feed::next), each bucket from its start.
    pub fn open(store: Store, bus: Arc<dyn Bus>, subscription: Subscription) -> Self {
        let global = Place {
            goal: Goal::Nothing,
            ..Place::new()
        };
        Self {
            messages: bus.subscribe_records(subscription),
            bus_closed: false,
            reads: Reads::new(store),
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
            places: BTreeMap::from([(Bucket::GLOBAL, global)]),
            scan: None,
            done: Vec::new(),
            nothing_assigned: false,
            whole: Position::START,
            ahead: BTreeSet::new(),
            recheck: every(RECHECK_EVERY),
            recheck_due: false,
            bus_first: true,
            component: None,
            troubled: false,
            paused_until: None,
        }
    }

    /// Reads and delivers only events that are wanted.
    pub fn wanting(mut self, wants: Wants) -> Self {
        self.reads.wants = wants;
        self
    }

    /// Looks for what the bus has lost at another interval than every second.
    pub fn recheck_every(mut self, interval: Duration) -> Self {
        self.recheck = every(interval);
        self
    }

    /// Readiness shall say when the store cannot be reached.
    pub fn reporting(mut self, component: &Component) -> Self {
        self.component = Some(component.clone());
        self
    }

    /// The next item; waits until there is one, also while the store cannot be reached. The only
    /// error is that this process has closed the store.
    ///
    /// # Errors
    ///
    /// [`StoreError::Closed`] only.
    pub async fn next(&mut self) -> Result<FeedItem, StoreError> {
        // Whatever is awaited here leaves the state as it is until it has succeeded.
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
                Err(error) => self.failed(&error),
            }
        }
    }

    /// The consumer has everything of an assigned bucket up to here. To be called before the next item
    /// is asked for.
    pub fn begin_at(&mut self, bucket: Bucket, position: Position) {
        if let Some(place) = self.places.get_mut(&bucket) {
            place.cursor = place.cursor.max(position);
            place.delivered = place.cursor;
        }
    }

    /// From the next page of the store on, usage that ended by `from` comes without its slices, which are most of
    /// a long log. [`Timestamp::MIN`]: all of it comes whole, as all that the bus brings does.
    pub fn slices_from(&mut self, from: Timestamp) {
        self.reads.slices_from = from;
    }

    /// The consumer has nothing of an assigned bucket. To be called before the next item is asked for.
    pub fn read_from_start(&mut self, bucket: Bucket) {
        if let Some(place) = self.places.get_mut(&bucket) {
            *place = Place::new();
            self.leave_out(bucket);
        }
    }

    /// Reads these buckets up to the present head, and then tells that they are caught up with once
    /// more: for a consumer that has owned them not all the time.
    pub fn catch_up_again(&mut self, buckets: &[Bucket]) {
        self.reads.forget();
        for bucket in buckets {
            if let Some(place) = self.places.get_mut(bucket) {
                place.goal = Goal::Head;
                place.caught_up = false;
                self.done.retain(|done| done != bucket);
                if let Some(scan) = &mut self.scan {
                    scan.covers.remove(bucket);
                }
            }
        }
    }

    /// One step: a few messages of the bus, or one page of the store, or a wait for either.
    async fn advance(&mut self) -> Result<(), StoreError> {
        self.gather();
        let reading = self.recheck_due
            || self.scan.is_some()
            || self
                .places
                .values()
                .any(|place| place.goal != Goal::Nothing);
        if !self.inbox.is_empty() && (self.bus_first || !reading) {
            self.bus_first = false;
            self.deal_with_inbox();
            return Ok(());
        }
        self.bus_first = true;
        if !reading {
            self.wait().await;
            return Ok(());
        }
        self.read().await?;
        if self.troubled {
            self.troubled = false;
            self.report(None);
        }
        Ok(())
    }

    fn gather(&mut self) {
        while self.inbox.len() < PAGE {
            let Ok(message) = self.messages.try_recv() else {
                return;
            };
            self.inbox.push_back(message);
        }
    }

    /// Waits for the bus, or until it is time to look into the store.
    async fn wait(&mut self) {
        tokio::select! {
            biased;
            _ = self.recheck.tick() => self.recheck_due = self.is_global_caught_up(),
            message = self.messages.recv(), if !self.bus_closed => match message {
                Some(message) => self.inbox.push_back(message),
                None => self.bus_closed = true,
            },
        }
    }

    fn is_global_caught_up(&self) -> bool {
        let global = self.places.get(&Bucket::GLOBAL);
        global.is_some_and(|place| place.caught_up)
    }

    fn failed(&mut self, error: &StoreError) {
        if !self.troubled {
            tracing::warn!(%error, "the log cannot be read, trying again");
        }
        self.troubled = true;
        self.report(Some(retry::unreachable(error)));
        self.paused_until = Some(Instant::now() + retry::PAUSE);
    }

    fn report(&self, trouble: Option<String>) {
        if let Some(component) = &self.component {
            component.trouble(trouble);
        }
    }

    /// Deals with messages of the bus, up to a change of the assignment.
    fn deal_with_inbox(&mut self) {
        while let Some(message) = self.inbox.pop_front() {
            match message {
                BusMessage::Record(record) => {
                    let position = record.position;
                    if self.admit(self.reads.sort(record)) {
                        self.delivered(position);
                    }
                }
                BusMessage::Assigned(buckets) => return self.assign(&buckets),
                BusMessage::Revoked(buckets) => return self.revoke(&buckets),
            }
        }
    }

    /// Delivers what the bus has brought, if it comes next in its bucket; what lies behind something missing
    /// becomes a goal.
    fn admit(&mut self, read: Read) -> bool {
        let Some(place) = self.places.get_mut(&read.bucket) else {
            return false;
        };
        if read.position <= place.cursor {
            return false;
        }
        if read.prev > place.cursor {
            place.promise(read.position);
            return false;
        }
        place.cursor = read.position;
        self.deliver(read.bucket, read.position, read.outcome);
        true
    }

    /// Delivers what was read of the store after a position, to where it is what comes next.
    fn admit_page(&mut self, of: Option<Bucket>, after: Position, page: Page) {
        for read in page.reads {
            let Some(place) = self.places.get_mut(&read.bucket) else {
                continue;
            };
            // One that stands before the page lacks what is between.
            if place.cursor < after || read.position <= place.cursor {
                continue;
            }
            place.cursor = read.position;
            self.deliver(read.bucket, read.position, read.outcome);
            if of.is_some() {
                self.delivered(read.position);
            }
        }
        let whole = |(bucket, place): &(&Bucket, &mut Place)| {
            place.cursor >= after && of.is_none_or(|of| of == **bucket)
        };
        for (_, place) in self.places.iter_mut().filter(whole) {
            place.cursor = place.cursor.max(page.through);
        }
    }

    fn deliver(&mut self, bucket: Bucket, position: Position, outcome: ReadOutcome) {
        if let Some(place) = self.places.get_mut(&bucket) {
            place.delivered = position;
        }
        match (outcome, self.outbox.back_mut()) {
            (ReadOutcome::Record(record), Some(FeedItem::Records(records))) => records.push(record),
            (ReadOutcome::Record(record), _) => {
                self.outbox.push_back(FeedItem::Records(vec![record]));
            }
            (ReadOutcome::Unreadable(unreadable), _) => {
                self.outbox.push_back(FeedItem::Unreadable(unreadable));
            }
            (ReadOutcome::Passed, Some(FeedItem::Passed(passed))) => {
                passed.insert(bucket, position);
            }
            (ReadOutcome::Passed, _) => {
                let passed = BTreeMap::from([(bucket, position)]);
                self.outbox.push_back(FeedItem::Passed(passed));
            }
        }
    }

    fn assign(&mut self, buckets: &[Bucket]) {
        self.reads.forget();
        if let Some(global) = self.places.get_mut(&Bucket::GLOBAL)
            && !global.caught_up
            && global.goal == Goal::Nothing
        {
            global.goal = Goal::Head;
            self.nothing_assigned = buckets.is_empty();
        }
        let new = |bucket: &&Bucket| !self.places.contains_key(bucket);
        let new: Vec<Bucket> = buckets.iter().filter(new).copied().collect();
        for bucket in &new {
            self.places.insert(*bucket, Place::new());
        }
        self.outbox.push_back(FeedItem::Assigned(new));
    }

    fn revoke(&mut self, buckets: &[Bucket]) {
        self.reads.forget();
        let ours =
            |bucket: &&Bucket| **bucket != Bucket::GLOBAL && self.places.contains_key(bucket);
        let ours: Vec<Bucket> = buckets.iter().filter(ours).copied().collect();
        for bucket in &ours {
            self.places.remove(bucket);
            self.leave_out(*bucket);
        }
        self.outbox.push_back(FeedItem::Revoked(ours));
    }

    /// Nothing that was read of the bucket is delivered or told any more.
    fn leave_out(&mut self, bucket: Bucket) {
        self.done.retain(|done| *done != bucket);
        if let Some(scan) = &mut self.scan {
            scan.covers.remove(&bucket);
        }
        for item in &mut self.outbox {
            match item {
                FeedItem::Records(records) => records.retain(|record| record.bucket != bucket),
                FeedItem::CaughtUp(done) => done.retain(|done| *done != bucket),
                FeedItem::Passed(passed) => {
                    passed.remove(&bucket);
                }
                _ => {}
            }
        }
        self.outbox.retain(|item| match item {
            FeedItem::Records(records) => !records.is_empty(),
            FeedItem::CaughtUp(done) => !done.is_empty(),
            FeedItem::Passed(passed) => !passed.is_empty(),
            FeedItem::Unreadable(unreadable) => unreadable.bucket != bucket,
            FeedItem::Assigned(_) | FeedItem::Revoked(_) => true,
        });
    }

    /// One question to the store.
    async fn read(&mut self) -> Result<(), StoreError> {
        let asked: Vec<Bucket> = self.asks_for_head().collect();
        if !asked.is_empty() {
            let (head, heads) = self.reads.heads(asked).await?;
            self.aim_at(head, &heads);
        } else if let Some(bucket) = self.next_alone() {
            self.read_bucket(bucket).await?;
        } else if self.scan.is_some() {
            self.read_on().await?;
        } else {
            self.look_for_losses().await?;
        }
        self.tell_done();
        Ok(())
    }

    fn asks_for_head(&self) -> impl Iterator<Item = Bucket> {
        let asks =
            |(bucket, place): (&Bucket, &Place)| (place.goal == Goal::Head).then_some(*bucket);
        self.places.iter().filter_map(asks)
    }

    /// What has just been assigned is read up to the head of the log. Where the bucket's own newest event
    /// has been delivered, nothing is to be read.
    fn aim_at(&mut self, head: Position, heads: &BTreeMap<Bucket, Position>) {
        if heads.len() == self.places.len() {
            self.whole = head;
            self.ahead.clear();
        }
        for (bucket, newest) in heads {
            let Some(place) = self.places.get_mut(bucket) else {
                continue;
            };
            place.newest = (*newest).max(place.promised);
            if place.cursor >= place.newest {
                place.cursor = place.cursor.max(head);
                place.goal = Goal::Nothing;
                self.caught_up(*bucket);
            } else {
                place.goal = Goal::UpTo(head.max(place.promised));
            }
        }
    }

    /// The next bucket to be read by itself: the global one first. Many that have most of the same way to
    /// go become a scan.
    fn next_alone(&mut self) -> Option<Bucket> {
        let covered = |bucket: &Bucket| {
            let scan = self.scan.as_ref();
            scan.is_some_and(|scan| scan.covers.contains(bucket))
        };
        let alone: BTreeMap<Bucket, Stretch> = self
            .places
            .iter()
            .filter(|(bucket, _)| !covered(bucket))
            .filter_map(|(bucket, place)| Some((*bucket, place.stretch()?)))
            .collect();
        let mut at = alone.values().map(|stretch| stretch.from).min()?;
        let mut to = alone.values().map(|stretch| stretch.to).max()?;
        let all_of_it = alone.len() as u64 * to.0.saturating_sub(at.0);
        let of_them: u64 = alone.values().map(Stretch::length).sum();
        if alone.len() < SCAN_MIN || of_them < all_of_it / 2 {
            let global = alone.contains_key(&Bucket::GLOBAL);
            return match global {
                true => Some(Bucket::GLOBAL),
                false => alone.keys().next().copied(),
            };
        }
        let mut covers: BTreeSet<Bucket> = alone.into_keys().collect();
        if let Some(scan) = self.scan.take() {
            at = at.min(scan.at);
            to = to.max(scan.to);
            covers.extend(scan.covers);
        }
        self.begin_scan(Scan {
            begun: at,
            at,
            to,
            covers,
        });
        None
    }

    /// Where nothing is missing everything is known that is whole, however old the bucket's last event is.
    fn begin_scan(&mut self, scan: Scan) {
        let nothing_missing = |place: &&mut Place| place.goal == Goal::Nothing;
        for place in self.places.values_mut().filter(nothing_missing) {
            place.cursor = place.cursor.max(self.whole);
        }
        self.scan = Some(scan);
    }

    async fn read_bucket(&mut self, bucket: Bucket) -> Result<(), StoreError> {
        let Some(place) = self.places.get(&bucket) else {
            return Ok(());
        };
        let (after, goal) = (place.cursor, place.up_to().unwrap_or_default());
        if after >= goal {
            // A scan of the log has come by.
            self.reached(bucket, goal);
            return Ok(());
        }
        let page = self.reads.page(Some(bucket), after).await?;
        let through = page.through;
        if through <= after {
            return Err(not_in_store(bucket, goal));
        }
        self.admit_page(Some(bucket), after, page);
        if through >= goal {
            self.reached(bucket, goal);
        }
        Ok(())
    }

    async fn read_on(&mut self) -> Result<(), StoreError> {
        let Some(scan) = &self.scan else {
            return Ok(());
        };
        let after = scan.at;
        let page = self.reads.page(None, after).await?;
        let through = page.through;
        self.admit_page(None, after, page);
        let Some(scan) = &mut self.scan else {
            return Ok(());
        };
        if through <= after {
            let bucket = scan.covers.first().copied().unwrap_or(Bucket::GLOBAL);
            return Err(not_in_store(bucket, scan.to));
        }
        scan.at = through;
        if let (Some(component), false) = (&self.component, scan.covers.is_empty()) {
            component.waits_on(&format!("{READS_THE_LOG}: at {} of {}", scan.at, scan.to));
        }
        if scan.at >= scan.to {
            self.end_scan();
        }
        Ok(())
    }

    fn end_scan(&mut self) {
        let Some(scan) = self.scan.take() else {
            return;
        };
        if scan.begun <= self.whole {
            self.whole_up_to(scan.to);
        }
        let covered = |(bucket, place): (&Bucket, &Place)| {
            let reached = match scan.covers.is_empty() {
                // Where nothing is missing, everything up to here has been delivered.
                true => place.goal == Goal::Nothing,
                false => scan.covers.contains(bucket),
            };
            reached.then_some(*bucket)
        };
        let covered: Vec<Bucket> = self.places.iter().filter_map(covered).collect();
        for bucket in covered {
            self.reached(bucket, scan.to);
        }
    }

    /// Everything in the bucket up to here has been read.
    fn reached(&mut self, bucket: Bucket, to: Position) {
        let Some(place) = self.places.get_mut(&bucket) else {
            return;
        };
        place.cursor = place.cursor.max(to);
        let passed = place.newest.max(place.promised).min(place.cursor);
        let is_news = place.delivered < passed;
        if place.up_to().is_some_and(|goal| goal <= place.cursor) {
            place.goal = Goal::Nothing;
        }
        let is_caught_up = place.goal != Goal::Head;
        if is_news {
            self.deliver(bucket, passed, ReadOutcome::Passed);
        }
        if is_caught_up {
            self.caught_up(bucket);
        }
    }

    fn caught_up(&mut self, bucket: Bucket) {
        if let Some(place) = self.places.get_mut(&bucket)
            && !place.caught_up
        {
            place.caught_up = true;
            if bucket != Bucket::GLOBAL {
                self.done.push(bucket);
            }
        }
    }

    /// What was assigned together is told together: it is mostly read together.
    fn tell_done(&mut self) {
        let all = self.places.values().all(|place| place.caught_up);
        if all && (!self.done.is_empty() || self.nothing_assigned) {
            self.nothing_assigned = false;
            let mut done = std::mem::take(&mut self.done);
            done.sort_unstable();
            self.outbox.push_back(FeedItem::CaughtUp(done));
        }
    }

    async fn look_for_losses(&mut self) -> Result<(), StoreError> {
        let (head, _) = self.reads.heads(Vec::new()).await?;
        self.recheck_due = false;
        if head > self.whole {
            self.begin_scan(Scan {
                begun: self.whole,
                at: self.whole,
                to: head,
                covers: BTreeSet::new(),
            });
        }
        Ok(())
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

fn not_in_store(bucket: Bucket, position: Position) -> StoreError {
    StoreError::Database(format!(
        "the bus has position {position} of bucket {bucket}, and the store does not: they do not belong together"
    ))
}

fn every(duration: Duration) -> Interval {
    let mut interval = tokio::time::interval(duration);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}
