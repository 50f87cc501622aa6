//! What a service reads: the records of its buckets, without gaps and in order within each bucket,
//! first the history of a bucket and then what the bus brings.
//!
//! Invariants: each event of an assigned bucket is delivered once, after the one before it in the
//! bucket, as a record or as something unreadable in its place; of a bucket that was revoked nothing
//! is delivered any more. The bus is only a hint: what it drops is found by a record's `prev`, or,
//! at the tail, by comparing with the store every second. While the store cannot be reached the feed
//! tries again, and says so.

mod asked;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bus::{Bus, BusMessage, Subscription};
use contract::ids::{Bucket, Position};
use contract::log::Record;
use store::{Entry, Store, StoreError, Unreadable};
use tokio::sync::mpsc;
use tokio::time::{Instant, Interval, MissedTickBehavior};

use crate::health::Component;
use crate::retry;
use asked::{Question, Reads};

/// Records per read of the store, and per item.
const PAGE: usize = 1000;

/// How often the store is asked whether the bus has lost something.
const RECHECK_EVERY: Duration = Duration::from_secs(1);

/// Positions ahead of what is known to be whole. Past it the next recheck reads them once more.
const AHEAD_MAX: usize = 65_536;

/// From so many buckets on, one read of the whole log is cheaper than a read of each.
const SCAN_MIN: usize = 16;

#[derive(Clone, Debug, PartialEq)]
pub enum FeedItem {
    /// Gapless and in order within each bucket.
    Records(Vec<Arc<Record>>),
    /// An event that cannot be decoded, in its place in the order.
    Unreadable(Unreadable),
    /// The history of these buckets, up to the head at their assignment, has been delivered, and that
    /// of the global bucket with it.
    CaughtUp(Vec<Bucket>),
    /// These buckets are ours from now on; their history follows, from where `from` says. Ownership
    /// taken (fences raised) before the next item is asked for comes before anything is read.
    Assigned(Vec<Bucket>),
    /// These are ours no more. Should they come back, they are read from `from` on again: whoever
    /// folds them must forget what it has folded.
    Revoked(Vec<Bucket>),
}

/// How far one bucket has been delivered.
struct Place {
    /// Everything in the bucket up to here has been delivered.
    cursor: Position,
    goal: Goal,
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
    fn new(from: Position) -> Self {
        Self {
            cursor: from,
            goal: Goal::Head,
            promised: Position::START,
            caught_up: false,
        }
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
    from: BTreeMap<Bucket, Position>,
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
    /// Subscribes at once; reads begin with the first [`next`](Feed::next). A bucket that `from`
    /// does not name is read from the start.
    pub fn open(
        store: Store,
        bus: Arc<dyn Bus>,
        subscription: Subscription,
        from: BTreeMap<Bucket, Position>,
    ) -> Self {
        let global = Place {
            goal: Goal::Nothing,
            ..Place::new(from.get(&Bucket::GLOBAL).copied().unwrap_or_default())
        };
        Self {
            messages: bus.subscribe_records(subscription),
            bus_closed: false,
            reads: Reads::new(store),
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
            places: BTreeMap::from([(Bucket::GLOBAL, global)]),
            from,
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

    /// Delivers the history of these buckets once more, and then that they are caught up with: for
    /// a consumer that has dropped what it had folded of them.
    pub fn read_again(&mut self, buckets: &[Bucket]) {
        self.reads.forget();
        for bucket in buckets {
            let from = self.start_of(*bucket);
            if let Some(place) = self.places.get_mut(bucket) {
                *place = Place::new(from);
                self.leave_out(*bucket);
            }
        }
    }

    fn start_of(&self, bucket: Bucket) -> Position {
        self.from.get(&bucket).copied().unwrap_or_default()
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
                    if self.admit(Entry::Record(record)) {
                        self.delivered(position);
                    }
                }
                BusMessage::Assigned(buckets) => return self.assign(&buckets),
                BusMessage::Revoked(buckets) => return self.revoke(&buckets),
            }
        }
    }

    /// Takes in what comes next in its bucket; what lies behind something missing becomes a goal.
    fn admit(&mut self, entry: Entry) -> bool {
        let (bucket, prev) = match &entry {
            Entry::Record(record) => (record.bucket, record.prev),
            Entry::Unreadable(unreadable) => (unreadable.bucket, unreadable.prev),
        };
        let position = entry.position();
        let Some(place) = self.places.get_mut(&bucket) else {
            return false;
        };
        if position <= place.cursor {
            return false;
        }
        if prev > place.cursor {
            place.promise(position);
            return false;
        }
        place.cursor = position;
        match (entry, self.outbox.back_mut()) {
            (Entry::Record(record), Some(FeedItem::Records(records))) => records.push(record),
            (Entry::Record(record), _) => {
                self.outbox.push_back(FeedItem::Records(vec![record]));
            }
            (Entry::Unreadable(unreadable), _) => {
                self.outbox.push_back(FeedItem::Unreadable(unreadable));
            }
        }
        true
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
            let place = Place::new(self.start_of(*bucket));
            self.places.insert(*bucket, place);
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
                _ => {}
            }
        }
        self.outbox.retain(|item| match item {
            FeedItem::Records(records) => !records.is_empty(),
            FeedItem::CaughtUp(done) => !done.is_empty(),
            FeedItem::Unreadable(unreadable) => unreadable.bucket != bucket,
            FeedItem::Assigned(_) | FeedItem::Revoked(_) => true,
        });
    }

    /// One question to the store.
    async fn read(&mut self) -> Result<(), StoreError> {
        if self.places.values().any(|place| place.goal == Goal::Head) {
            let head = self.reads.head().await?;
            self.aim_at(head);
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

    /// What has just been assigned is read up to here.
    fn aim_at(&mut self, head: Position) {
        let asked = |(_, place): &(&Bucket, &Place)| place.goal == Goal::Head;
        let asked: Vec<Bucket> = self.places.iter().filter(asked).map(|(b, _)| *b).collect();
        if asked.len() == self.places.len() {
            self.whole = head;
            self.ahead.clear();
        }
        for bucket in asked {
            let Some(place) = self.places.get_mut(&bucket) else {
                continue;
            };
            if place.cursor >= head {
                place.goal = Goal::Nothing;
                self.caught_up(bucket);
            } else {
                place.goal = Goal::UpTo(head.max(place.promised));
            }
        }
    }

    /// The next bucket to be read by itself: the global one first. Many at once become a scan.
    fn next_alone(&mut self) -> Option<Bucket> {
        let covered = |bucket: &Bucket| {
            let scan = self.scan.as_ref();
            scan.is_some_and(|scan| scan.covers.contains(bucket))
        };
        let alone: BTreeMap<Bucket, (Position, Position)> = self
            .places
            .iter()
            .filter(|(bucket, _)| !covered(bucket))
            .filter_map(|(bucket, place)| Some((*bucket, (place.cursor, place.up_to()?))))
            .collect();
        if alone.len() < SCAN_MIN {
            let global = alone.contains_key(&Bucket::GLOBAL);
            return match global {
                true => Some(Bucket::GLOBAL),
                false => alone.keys().next().copied(),
            };
        }
        let at = alone.values().map(|(cursor, _)| *cursor).min();
        let to = alone.values().map(|(_, goal)| *goal).max();
        let (mut at, mut to) = (at.unwrap_or_default(), to.unwrap_or_default());
        let mut covers: BTreeSet<Bucket> = alone.into_keys().collect();
        if let Some(scan) = self.scan.take() {
            at = at.min(scan.at);
            to = to.max(scan.to);
            covers.extend(scan.covers);
        }
        self.scan = Some(Scan {
            begun: at,
            at,
            to,
            covers,
        });
        None
    }

    async fn read_bucket(&mut self, bucket: Bucket) -> Result<(), StoreError> {
        let Some(place) = self.places.get(&bucket) else {
            return Ok(());
        };
        let (after, goal) = (place.cursor, place.up_to().unwrap_or_default());
        let page = self.reads.page(Question::Bucket(bucket, after)).await?;
        let ended = page.len() < PAGE;
        for entry in page {
            let position = entry.position();
            if self.admit(entry) {
                self.delivered(position);
            }
        }
        let reached = self.places.get(&bucket).map(|place| place.cursor);
        if ended || reached.is_some_and(|reached| reached >= goal) {
            self.reached(bucket, goal)?;
        }
        Ok(())
    }

    async fn read_on(&mut self) -> Result<(), StoreError> {
        let Some(scan) = &self.scan else {
            return Ok(());
        };
        let page = self.reads.page(Question::All(scan.at)).await?;
        let ended = page.len() < PAGE;
        let last = page.last().map(Entry::position);
        for entry in page {
            self.admit(entry);
        }
        if let Some(scan) = &mut self.scan {
            scan.at = last.unwrap_or(scan.at);
            if ended || scan.at >= scan.to {
                return self.end_scan();
            }
        }
        Ok(())
    }

    fn end_scan(&mut self) -> Result<(), StoreError> {
        let Some(scan) = self.scan.take() else {
            return Ok(());
        };
        let broken = scan.covers.iter().find_map(|bucket| {
            let promised = self.places.get(bucket)?.promised;
            let place = self.places.get(bucket)?;
            (promised <= scan.to && place.cursor < promised).then_some((*bucket, promised))
        });
        if let Some((bucket, promised)) = broken {
            self.scan = Some(scan);
            return Err(not_in_store(bucket, promised));
        }
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
            self.reached(bucket, scan.to)?;
        }
        Ok(())
    }

    /// Everything in the bucket up to here has been read.
    fn reached(&mut self, bucket: Bucket, to: Position) -> Result<(), StoreError> {
        let Some(place) = self.places.get_mut(&bucket) else {
            return Ok(());
        };
        if place.promised <= to && place.cursor < place.promised {
            return Err(not_in_store(bucket, place.promised));
        }
        place.cursor = place.cursor.max(to);
        if place.up_to().is_some_and(|goal| goal <= place.cursor) {
            place.goal = Goal::Nothing;
        }
        if !place.caught_up && place.goal != Goal::Head {
            self.caught_up(bucket);
        }
        Ok(())
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

    fn tell_done(&mut self) {
        if self.is_global_caught_up() && (!self.done.is_empty() || self.nothing_assigned) {
            self.nothing_assigned = false;
            let mut done = std::mem::take(&mut self.done);
            done.sort_unstable();
            self.outbox.push_back(FeedItem::CaughtUp(done));
        }
    }

    async fn look_for_losses(&mut self) -> Result<(), StoreError> {
        let head = self.reads.head().await?;
        self.recheck_due = false;
        if head > self.whole {
            self.scan = Some(Scan {
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
