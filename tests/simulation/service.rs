//! A simulated service: two replicas that share the buckets, each with the parts of the real loop.
//!
//! Buckets move between the replicas at random, also before the former owner knows of it, and commits of a
//! former owner arrive late. A restarted replica starts from snapshots taken at random times, or from none.

use std::collections::BTreeMap;
use std::sync::Arc;

use contract::frame::Frame;
use contract::ids::{Bucket, EndpointKey};
use contract::log::StreamKind;
use contract::time::{Span, Timestamp};
use runtime::consumer::{AppliedRecord, ApplyOutcome, Core, Fold, Initial, Step};
use runtime::health::HealthRegistry;
use runtime::ids::SeededIds;
use runtime::parking::Parking;
use runtime::reconcile::{CommitResult, Evaluator, Reconciler, Write};
use store::{Fence, LogEntry, Snapshot};

use crate::log::{Log, Refusal};
use crate::rng::Rng;

/// The consumer name of snapshots.
const SNAPSHOTS: &str = "simulation";

/// As long as the loop waits.
const REACQUIRE_AFTER: Span = Span::from_secs(1);

pub type Snapshots = BTreeMap<Bucket, Snapshot>;

/// What feeds a consumer's core from the log.
pub struct Reader<F: Fold> {
    pub core: Core<F>,
    /// Number of records read of each bucket.
    read: BTreeMap<Bucket, usize>,
    /// Buckets to catch up with: the number of records at their assignment.
    goals: BTreeMap<Bucket, usize>,
}

impl<F: Fold> Reader<F> {
    pub fn new(consumer: &'static str, fold: F) -> Self {
        let component = HealthRegistry::default().component(consumer);
        Self {
            core: Core::new(Arc::new(fold), Parking::detached(consumer, component)),
            read: BTreeMap::from([(Bucket::GLOBAL, 0)]),
            goals: BTreeMap::new(),
        }
    }

    /// Starts a bucket from its snapshot, if there is one. Returns the endpoints that are parked.
    pub fn acquire(
        &mut self,
        bucket: Bucket,
        fence: Fence,
        log: &Log,
        snapshots: &Snapshots,
    ) -> Vec<EndpointKey> {
        let initial = snapshots
            .get(&bucket)
            .map_or_else(Initial::default, |snapshot| {
                let position = snapshot.meta.position;
                Initial::decode(snapshot, |key| log.history(key, position)).unwrap()
            });
        let records = log.bucket(bucket);
        let behind = records.partition_point(|record| record.position <= initial.position);
        self.read.insert(bucket, behind);
        self.goals.insert(bucket, records.len());
        let now = Timestamp::default();
        self.core.acquire(bucket, Some(fence), initial, now)
    }

    /// Continues a bucket under a new fence.
    fn reacquire(&mut self, bucket: Bucket, fence: Fence, log: &Log) {
        self.core.set_fence(bucket, Some(fence));
        self.goals.insert(bucket, log.bucket(bucket).len());
    }

    fn release(&mut self, bucket: Bucket) {
        self.core.release(bucket);
        self.read.remove(&bucket);
        self.goals.remove(&bucket);
    }

    /// Reads up to `limit` records of each bucket, buckets in random order.
    pub fn read(&mut self, log: &Log, rng: &mut Rng, limit: usize) -> Vec<Step<F::Effect>> {
        let mut buckets = log.buckets();
        rng.shuffle(&mut buckets);
        let mut steps = Vec::new();
        for bucket in buckets {
            let Some(read) = self.read.get(&bucket).copied() else {
                continue;
            };
            for record in log.bucket(bucket)[read..].iter().take(limit) {
                *self.read.entry(bucket).or_default() += 1;
                steps.extend(self.apply(log, log.entry(record)));
            }
        }
        let is_reached = |bucket: &Bucket, goal: &mut usize| self.read[bucket] >= *goal;
        let reached = self.goals.extract_if(.., is_reached);
        let reached: Vec<Bucket> = reached.map(|(bucket, _)| bucket).collect();
        if !reached.is_empty() {
            self.core.caught_up(&reached);
            steps.push(Step::CaughtUp(reached));
        }
        steps
    }

    fn apply(&mut self, log: &Log, entry: LogEntry) -> Option<Step<F::Effect>> {
        let now = Timestamp::default();
        let record = match entry {
            LogEntry::Record(record) => record,
            LogEntry::Unreadable(unreadable) => {
                let parked = self.core.park_unreadable(&unreadable, now);
                return parked.map(Step::Parked);
            }
        };
        let kind = record.stream.kind();
        if kind.is_some_and(|kind| kind != StreamKind::Parking && !F::READS.contains(&kind)) {
            self.core.advance(record.bucket, record.position);
            return None;
        }
        let effect = match self.core.apply(&record, now) {
            ApplyOutcome::Applied(effect) => Some(effect),
            ApplyOutcome::Skipped => None,
            ApplyOutcome::Parked(key) => panic!("{key} was parked at {}", record.position),
            ApplyOutcome::Rebuild(key) => {
                let history = log.history(&key, record.position);
                return Some(match self.core.rebuild(&key, history, now) {
                    Some(applied) => Step::Rebuilt {
                        key,
                        by: record,
                        applied,
                    },
                    None => Step::Parked(key),
                });
            }
        };
        Some(Step::Applied(vec![AppliedRecord { record, effect }]))
    }

    /// Stores a snapshot of a bucket under its fence. Returns whether the fence was refused.
    pub fn save(&mut self, bucket: Bucket, log: &Log, snapshots: &mut Snapshots) -> bool {
        let Some(fence) = self.core.fence(bucket).cloned() else {
            return false;
        };
        // There is no store with earlier parts, so the snapshot must be complete.
        self.core.stored(bucket, None);
        let Some(draft) = self.core.draft(bucket) else {
            return false;
        };
        if !log.is_current(&fence) {
            return true;
        }
        let snapshot = draft.into_snapshot(SNAPSHOTS, bucket, F::VERSION);
        let before = snapshots.insert(bucket, snapshot);
        let position = snapshots[&bucket].meta.position;
        assert!(before.is_none_or(|before| before.meta.position <= position));
        false
    }

    /// The states of all endpoints, encoded.
    fn states(&self) -> BTreeMap<EndpointKey, String> {
        let entries = self.core.folds().lock();
        let encoded = entries
            .iter()
            .map(|(key, entry)| (key.clone(), serde_json::to_string(entry).unwrap()));
        encoded.collect()
    }
}

/// Asserts that folding the log from its start and from the snapshots gives the same states.
pub fn assert_snapshots_match_log<F: Fold>(
    consumer: &'static str,
    fold: impl Fn() -> F,
    snapshots: &Snapshots,
    log: &Log,
    context: &str,
) {
    let folded = |snapshots: &Snapshots| {
        let mut reader = Reader::new(consumer, fold());
        for bucket in Bucket::of_endpoints() {
            let (name, generation) = (bucket.to_string(), 1);
            reader.acquire(bucket, Fence { name, generation }, log, snapshots);
        }
        reader.read(log, &mut Rng::new(1), usize::MAX);
        reader.states()
    };
    let from_start = folded(&Snapshots::new());
    assert!(!from_start.is_empty(), "{consumer} ({context})");
    assert_eq!(folded(snapshots), from_start, "{consumer} ({context})");
}

/// One replica of a service.
struct Replica<R: Reconciler> {
    reader: Reader<R::Fold>,
    evaluator: Evaluator<R>,
    /// Commits that have not reached the log yet.
    writing: Vec<(Write, Fence)>,
    /// Buckets whose fence was taken while they were assigned: when to acquire it again.
    unfenced: BTreeMap<Bucket, Timestamp>,
    /// Whether it acquired a bucket, whose former frames it must be sent again.
    wants_frames: bool,
}

impl<R: Reconciler> Replica<R> {
    fn new(reconciler: R) -> Self {
        Self {
            reader: Reader::new(R::SERVICE, reconciler.fold()),
            evaluator: Evaluator::new(reconciler),
            writing: Vec::new(),
            unfenced: BTreeMap::new(),
            wants_frames: false,
        }
    }

    fn acquire(&mut self, bucket: Bucket, log: &mut Log, snapshots: &Snapshots) {
        let fence = log.acquire_fence(fence_name::<R>(bucket));
        let parked = self.reader.acquire(bucket, fence, log, snapshots);
        self.evaluator.forget_pending(bucket);
        for key in parked {
            self.evaluator.forget_endpoint(&key);
        }
        self.wants_frames = true;
    }

    fn release(&mut self, bucket: Bucket) {
        self.unfenced.remove(&bucket);
        self.reader.release(bucket);
        self.evaluator.forget(bucket);
    }

    fn fenced(&mut self, bucket: Bucket, clock: Timestamp) {
        if self.reader.core.has(bucket) {
            self.reader.core.mark_lost(bucket);
            let at = clock + REACQUIRE_AFTER;
            self.unfenced.entry(bucket).or_insert(at);
        }
    }

    fn reacquire_due(&mut self, log: &mut Log, clock: Timestamp) {
        let due = self.unfenced.extract_if(.., |_, at| *at <= clock);
        for (bucket, _) in due {
            let fence = log.acquire_fence(fence_name::<R>(bucket));
            self.reader.reacquire(bucket, fence, log);
            self.evaluator.forget_pending(bucket);
        }
    }

    fn handle(&mut self, step: Step<<R::Fold as Fold>::Effect>) {
        match step {
            Step::Applied(applied) => {
                let unprocessed = self.evaluator.applied(&self.reader.core, applied);
                assert!(unprocessed.is_empty(), "{unprocessed:?}");
            }
            Step::Parked(key) => self.evaluator.forget_endpoint(&key),
            Step::Rebuilt { key, .. } => {
                self.evaluator.forget_endpoint(&key);
                self.evaluator.mark_one_due(key);
            }
            Step::CaughtUp(buckets) => self.evaluator.mark_due(buckets),
            _ => {}
        }
    }

    /// Handles a frame that arrives; it comes again if those of an acquired bucket are still to come.
    fn receive(&mut self, frame: &Frame, clock: Timestamp) {
        if !self.awaits_frames() {
            self.observe(frame, clock);
        }
    }

    fn awaits_frames(&self) -> bool {
        self.wants_frames && R::FRAMES_AGAIN > Span::ZERO
    }

    fn observe(&mut self, frame: &Frame, clock: Timestamp) {
        let is_observed = R::OBSERVES_ALL_BUCKETS || self.reader.core.has(frame.bucket);
        if is_observed && self.evaluator.reconciler.observe(frame, clock) {
            self.evaluator.mark_due([frame.bucket]);
        }
    }

    fn evaluate(&mut self, log: &Log, clock: Timestamp, ids: &SeededIds) {
        let due = self.evaluator.reconciler.due(clock);
        // The others have no endpoints.
        let used = log.buckets().into_iter();
        self.evaluator
            .mark_due(used.filter(|bucket| due.contains(bucket)));
        let core = &self.reader.core;
        let (writes, failed) = self.evaluator.evaluate_due(core, ids, clock);
        assert!(failed.is_empty(), "{failed:?}");
        for write in writes {
            let fence = core.fence(write.subject.bucket()).cloned();
            self.writing.extend(fence.map(|fence| (write, fence)));
        }
    }

    /// Commits what was evaluated. Returns how many commits were refused because of their fence.
    fn commit(&mut self, log: &mut Log, clock: Timestamp) -> u32 {
        let mut refused = 0;
        for (write, fence) in std::mem::take(&mut self.writing) {
            let Write {
                subject,
                now,
                mut appends,
                ..
            } = write;
            let append = appends.pop().unwrap();
            assert!(appends.is_empty(), "a commit to several streams");
            let written = log.append(append, &fence);
            refused += u32::from(written == Err(Refusal::Fenced));
            let bucket = subject.bucket();
            if self.reader.core.fence(bucket) != Some(&fence) {
                // From an earlier ownership.
                continue;
            }
            let result = match written {
                Ok(records) => CommitResult::Written(records.last().unwrap().position),
                // This replica lags behind its own stream: it reads on and retries.
                Err(Refusal::Conflict) => CommitResult::Refused,
                Err(Refusal::Fenced) => {
                    self.evaluator.forget_pending(bucket);
                    self.fenced(bucket, clock);
                    continue;
                }
            };
            self.evaluator.settle(subject, now, result);
        }
        refused
    }
}

fn fence_name<R: Reconciler>(bucket: Bucket) -> String {
    format!("{}/{bucket}", R::SERVICE)
}

/// A service with two replicas.
pub struct Service<R: Reconciler> {
    replicas: [Replica<R>; 2],
    make: Box<dyn Fn() -> R>,
    /// The replica to which each bucket is assigned.
    owners: BTreeMap<Bucket, usize>,
    /// Former owners that do not know of it yet, and when they learn it.
    revocations: Vec<(Timestamp, usize, Bucket)>,
    snapshots: Snapshots,
    /// Number of starts from a snapshot.
    pub resumed: u32,
    /// Number of commits that were refused because another replica had taken the bucket.
    pub refused: u32,
}

impl<R: Reconciler> Service<R> {
    pub fn new(make: impl Fn() -> R + 'static, log: &mut Log) -> Self {
        let mut service = Self {
            replicas: [Replica::new(make()), Replica::new(make())],
            make: Box::new(make),
            owners: BTreeMap::new(),
            revocations: Vec::new(),
            snapshots: Snapshots::new(),
            resumed: 0,
            refused: 0,
        };
        for bucket in Bucket::of_endpoints() {
            let owner = usize::from(bucket.0 % 2);
            service.owners.insert(bucket, owner);
            service.replicas[owner].acquire(bucket, log, &service.snapshots);
        }
        service
    }

    /// A replica loses all state, as in a crash; it reads the log from the snapshots' positions, or from the
    /// start.
    pub fn restart(&mut self, log: &mut Log, rng: &mut Rng) {
        let restarted = rng.below(2) as usize;
        self.replicas[restarted] = Replica::new((self.make)());
        self.revocations.retain(|(_, of, _)| *of != restarted);
        if rng.percent(30) {
            self.snapshots.clear();
        }
        self.resumed += u32::from(!self.snapshots.is_empty());
        for (bucket, owner) in &self.owners {
            if *owner == restarted {
                self.replicas[restarted].acquire(*bucket, log, &self.snapshots);
            }
        }
    }

    /// Assigns a random bucket to the other replica; the former owner may learn of it only later.
    pub fn rebalance(&mut self, log: &mut Log, rng: &mut Rng, clock: Timestamp) {
        let buckets = log.buckets();
        let bucket = buckets[rng.below(buckets.len() as u64) as usize];
        let Some(owner) = self.owners.get_mut(&bucket) else {
            return;
        };
        let former = *owner;
        *owner = 1 - former;
        // If it has not yet learned that it lost the bucket, it keeps what it has of it.
        let revoked = self.revocations.iter();
        let is_known = revoked
            .clone()
            .all(|(_, of, what)| (*of, *what) != (*owner, bucket));
        if !is_known {
            self.replicas[*owner].release(bucket);
            let new = (*owner, bucket);
            self.revocations.retain(|(_, of, what)| (*of, *what) != new);
        }
        match rng.below(5) {
            0 => self.replicas[former].release(bucket),
            seconds => {
                let at = clock + Span::from_secs(seconds);
                self.revocations.push((at, former, bucket));
            }
        }
        self.replicas[self.owners[&bucket]].acquire(bucket, log, &self.snapshots);
    }

    /// One turn of both replicas. `frames` are those that the bus has kept.
    pub fn turn(
        &mut self,
        log: &mut Log,
        rng: &mut Rng,
        clock: Timestamp,
        ids: &SeededIds,
        frames: &[(Timestamp, Arc<Frame>)],
        faults: &crate::world::Faults,
    ) {
        for (_, of, bucket) in self.revocations.extract_if(.., |(at, ..)| *at <= clock) {
            self.replicas[of].release(bucket);
        }
        for replica in &mut self.replicas {
            let limit = match rng.percent(faults.lagging_reads) {
                true => 1,
                false => usize::MAX,
            };
            // Late commits of the last turn.
            self.refused += replica.commit(log, clock);
            replica.reacquire_due(log, clock);
            if replica.awaits_frames() {
                replica.wants_frames = false;
                for (_, frame) in frames {
                    replica.observe(frame, clock);
                }
            }
            for step in replica.reader.read(log, rng, limit) {
                replica.handle(step);
            }
            let bucket = Bucket(rng.below(64) as u16);
            if replica.reader.save(bucket, log, &mut self.snapshots) {
                self.refused += 1;
                replica.fenced(bucket, clock);
            }
            replica.evaluate(log, clock, ids);
            if !rng.percent(faults.late_commits) {
                self.refused += replica.commit(log, clock);
            }
        }
    }

    pub fn observe(&mut self, frame: &Frame, clock: Timestamp) {
        for replica in &mut self.replicas {
            replica.receive(frame, clock);
        }
    }

    pub fn assert_snapshots_match_log(&self, log: &Log, context: &str) {
        let fold = || (self.make)().fold();
        assert_snapshots_match_log(R::SERVICE, fold, &self.snapshots, log, context);
    }
}
