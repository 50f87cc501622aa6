//! Measurements: what each thread counts, and the frames made of it.
//!
//! Each serving thread has a shard of its own, behind a lock that only the meter shares with it and
//! only for the time of copying one deployment. In-flight time is kept as the sum of moments: a
//! request that begins subtracts its moment, one that ends adds it, and the number in flight times
//! the moment of reading makes up for those that run. So the integral is exact at any moment, and
//! no request touches more than a few integers.
//!
//! Invariants: every request is counted in exactly one frame for its arrival and exactly one for
//! its end; sequences have no holes; the windows of a bucket's frames touch without overlapping.

use std::cell::Cell as Slate;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use contract::frame::{
    DeploymentFrame, Frame, Hello, InstanceFrame, Measure, Outcomes, Role, Source, SourceKind,
    StatusClasses,
};
use contract::histogram::Histogram;
use contract::ids::BUCKETS;
use contract::resources::ModelClientErrors;
use contract::{Bucket, Timestamp};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::admission::{DeploymentState, Slot};
use crate::arrivals::{Arrivals, Place};
use crate::body::Upload;
use crate::router::{Deployment, Endpoint, Router, Snapshot};
use crate::timer::now_us;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Success,
    ModelClientError,
    ModelServerError,
    Timeout,
    Unreachable,
    Unavailable,
    Internal,
    TooManyPending,
    Refused,
    ClientLeft,
}

impl Outcome {
    fn count(self, outcomes: &mut Outcomes) {
        let counter = match self {
            Self::Success => &mut outcomes.success,
            Self::ModelClientError => &mut outcomes.model_client_error,
            Self::ModelServerError => &mut outcomes.model_server_error,
            Self::Timeout => &mut outcomes.timeout,
            Self::Unreachable => &mut outcomes.unreachable,
            Self::Unavailable => &mut outcomes.unavailable,
            Self::Internal => &mut outcomes.internal,
            Self::TooManyPending => &mut outcomes.too_many_pending,
            Self::Refused => &mut outcomes.refused,
            Self::ClientLeft => &mut outcomes.client_left,
        };
        *counter += 1;
    }

    /// Of an answer that a model gave.
    pub fn of(status: http::StatusCode) -> Self {
        if status.is_client_error() {
            Self::ModelClientError
        } else if status.as_u16() >= 500 {
            Self::ModelServerError
        } else {
            Self::Success
        }
    }

    const fn counts(self) -> bool {
        !matches!(self, Self::Refused | Self::ClientLeft)
    }
}

/// A number of requests and the integral of it over time, both exact at any moment.
#[derive(Clone, Copy, Debug, Default)]
struct Gauge {
    now: u32,
    sum_us: i64,
}

impl Gauge {
    fn enter(&mut self, at_us: u64) {
        self.now += 1;
        self.sum_us -= at_us as i64;
    }

    fn leave(&mut self, at_us: u64) {
        self.now -= 1;
        self.sum_us += at_us as i64;
    }

    /// The integral since the last call, up to `at_us`. A request that began a moment after the
    /// reading of the clock would make it negative; that is made up for next time.
    fn take(&mut self, at_us: u64) -> u64 {
        let running = i64::from(self.now) * at_us as i64;
        let taken = (self.sum_us + running).max(0);
        self.sum_us -= taken;
        taken as u64
    }
}

/// One deployment on one thread, since the meter last came by.
#[derive(Debug, Default)]
struct Cell {
    outcomes: Outcomes,
    arrivals: u64,
    /// By the first digit of the status that the client got; 0: it got none.
    status_classes: [u64; 6],
    request_bytes: u64,
    response_bytes: u64,
    /// Latencies.
    at_or_below: BTreeMap<u64, u64>,
    latency: Histogram,
    open: Arrivals,
    serving: Gauge,
    queued: Gauge,
    /// Of `serving`, what is on each instance, by its index.
    on_instances: Vec<Gauge>,
}

impl Cell {
    fn on_instance(&mut self, slot: &Slot) -> &mut Gauge {
        let index = slot.instance.index;
        if self.on_instances.len() <= index {
            self.on_instances.resize_with(index + 1, Gauge::default);
        }
        &mut self.on_instances[index]
    }

    /// What was counted; what still runs goes on.
    fn take(&mut self) -> Self {
        let running = Self {
            open: std::mem::take(&mut self.open),
            serving: self.serving,
            queued: self.queued,
            on_instances: std::mem::take(&mut self.on_instances),
            ..Self::default()
        };
        std::mem::replace(self, running)
    }
}

/// Refused before a deployment was chosen: by endpoint (empty where none is known) and status.
pub type Refusals = BTreeMap<(String, u16), u64>;

#[derive(Debug, Default)]
pub struct Shard {
    /// By the deployment's meter slot.
    cells: Vec<Option<Box<Cell>>>,
    refusals: Refusals,
}

pub type SharedShard = Arc<Mutex<Shard>>;

/// A panic cannot leave a shard worse than one count short.
fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shard {
    fn cell(&mut self, slot: usize) -> &mut Cell {
        if self.cells.len() <= slot {
            self.cells.resize_with(slot + 1, || None);
        }
        self.cells[slot].get_or_insert_default()
    }
}

pub fn count_refusal(shard: &SharedShard, endpoint: &str, status: u16) {
    *lock(shard)
        .refusals
        .entry((endpoint.to_owned(), status))
        .or_default() += 1;
}

/// Says which buckets want a frame before the second is over.
#[derive(Debug, Default)]
pub struct Early {
    buckets: AtomicU64,
    notify: Notify,
}

impl Early {
    pub fn ask(&self, bucket: Bucket) {
        self.buckets.fetch_or(1 << bucket.0, Ordering::SeqCst);
        self.notify.notify_one();
    }

    /// Waits until a bucket is asked for.
    pub async fn asked(&self) -> Vec<Bucket> {
        loop {
            let buckets = self.buckets.swap(0, Ordering::SeqCst);
            if buckets != 0 {
                return Bucket::of_endpoints()
                    .filter(|bucket| buckets & (1 << bucket.0) != 0)
                    .collect();
            }
            self.notify.notified().await;
        }
    }
}

/// What the flights of one thread share.
#[derive(Debug)]
pub struct ThreadMeter {
    pub shard: SharedShard,
    /// Set when requests that are still running are cut off: they did not leave, we did.
    pub cutting: Rc<Slate<bool>>,
}

#[derive(Debug)]
enum Phase {
    Arrived,
    Queued,
    Serving(Slot),
}

/// One request from the choice of its deployment to its end. Dropped without a word on its
/// outcome, the client has left. Its slot is given back, and it is counted, exactly once.
#[derive(Debug)]
pub struct Flight {
    meter: Rc<ThreadMeter>,
    endpoint: Arc<Endpoint>,
    deployment: usize,
    arrived_us: u64,
    /// Where its arrival stands among those that have not ended.
    place: Place,
    phase: Phase,
    admitted: bool,
    outcome: Option<Outcome>,
    /// The first digit of the status that the client gets; 0: none so far.
    status_class: u8,
    ended_us: Option<u64>,
    upload: Rc<Upload>,
    pub response_bytes: u64,
}

impl Flight {
    pub fn new(
        meter: Rc<ThreadMeter>,
        endpoint: Arc<Endpoint>,
        deployment: usize,
        arrived_us: u64,
        upload: Rc<Upload>,
    ) -> Self {
        let slot = endpoint.deployments[deployment].state.meter_slot;
        let mut shard = lock(&meter.shard);
        let cell = shard.cell(slot);
        cell.arrivals += 1;
        let place = cell.open.enter(arrived_us);
        drop(shard);
        Self {
            meter,
            endpoint,
            deployment,
            arrived_us,
            place,
            phase: Phase::Arrived,
            admitted: false,
            outcome: None,
            status_class: 0,
            ended_us: None,
            upload,
            response_bytes: 0,
        }
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// When a body that is read whole must have come.
    pub fn body_deadline_us(&self) -> u64 {
        self.arrived_us + self.deployment().timeout_us
    }

    pub fn deployment(&self) -> &Deployment {
        &self.endpoint.deployments[self.deployment]
    }

    fn state(&self) -> &Arc<DeploymentState> {
        &self.endpoint.deployments[self.deployment].state
    }

    pub fn admit(&mut self) -> bool {
        let deployment = self.deployment();
        self.admitted = deployment.state.admit(deployment.limit);
        self.admitted
    }

    pub fn queue(&mut self) {
        let state = self.state().clone();
        state.queued.enter();
        lock(&self.meter.shard)
            .cell(state.meter_slot)
            .queued
            .enter(now_us());
        self.phase = Phase::Queued;
    }

    pub fn serve(&mut self, slot: Slot, at_us: u64) {
        let state = self.state().clone();
        {
            let mut shard = lock(&self.meter.shard);
            let cell = shard.cell(state.meter_slot);
            match &self.phase {
                Phase::Queued => {
                    cell.queued.leave(at_us);
                    cell.serving.enter(at_us);
                }
                Phase::Arrived => cell.serving.enter(at_us),
                // A second try: the request is being served all along.
                Phase::Serving(first) => cell.on_instance(first).leave(at_us),
            }
            cell.on_instance(&slot).enter(at_us);
        }
        match self.phase {
            Phase::Queued => {
                state.queued.leave();
                state.serving.enter();
            }
            Phase::Arrived => state.serving.enter(),
            Phase::Serving(_) => {}
        }
        self.phase = Phase::Serving(slot);
    }

    pub fn slot(&self) -> Option<&Slot> {
        match &self.phase {
            Phase::Serving(slot) => Some(slot),
            _ => None,
        }
    }

    /// What the client gets, or has got by now if it gets only a part of the answer.
    pub fn answer(&mut self, status: http::StatusCode) {
        self.status_class = (status.as_u16() / 100) as u8;
    }

    /// The first word counts.
    pub fn set_outcome(&mut self, outcome: Outcome) {
        self.outcome.get_or_insert(outcome);
    }

    pub fn end(mut self, outcome: Outcome) {
        self.set_outcome(outcome);
    }

    /// The same, where the clock has just been read.
    pub fn end_at(mut self, outcome: Outcome, at_us: u64) {
        self.set_outcome(outcome);
        self.ended_us = Some(at_us);
    }

    pub fn arrived_us(&self) -> u64 {
        self.arrived_us
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let cut = self.meter.cutting.get();
        let left = if cut {
            Outcome::Internal
        } else {
            Outcome::ClientLeft
        };
        let outcome = self.outcome.unwrap_or(left);
        let at_us = self.ended_us.unwrap_or_else(now_us);
        let latency = at_us.saturating_sub(self.arrived_us);
        let endpoint = &self.endpoint;
        let deployment = &endpoint.deployments[self.deployment];
        let good = match outcome {
            Outcome::Success => true,
            Outcome::ModelClientError => endpoint.model_client_errors == ModelClientErrors::Good,
            _ => false,
        };
        let mut shard = lock(&self.meter.shard);
        let cell = shard.cell(deployment.state.meter_slot);
        outcome.count(&mut cell.outcomes);
        if let Some(count) = cell.status_classes.get_mut(usize::from(self.status_class)) {
            *count += 1;
        }
        cell.open.leave(self.place);
        cell.request_bytes += self.upload.bytes.get();
        cell.response_bytes += self.response_bytes;
        if outcome.counts() {
            cell.latency.record(latency);
        }
        if good {
            for threshold in &deployment.thresholds_us {
                if latency <= *threshold {
                    *cell.at_or_below.entry(*threshold).or_default() += 1;
                }
            }
        }
        match &self.phase {
            Phase::Arrived => {}
            Phase::Queued => cell.queued.leave(at_us),
            Phase::Serving(slot) => {
                cell.serving.leave(at_us);
                cell.on_instance(slot).leave(at_us);
            }
        }
        drop(shard);
        let state = &deployment.state;
        match self.phase {
            Phase::Arrived => {}
            Phase::Queued => state.queued.leave(),
            Phase::Serving(_) => state.serving.leave(),
        }
        if self.admitted {
            state.leave();
        }
        if let Phase::Serving(slot) = &mut self.phase {
            slot.ended_us = Some(at_us);
        }
        // The slot goes last, with the phase: whoever gets it finds us gone from the counts.
    }
}

/// The bucket in whose frames a source says who it is.
const HELLOS: Bucket = Bucket(0);

/// Makes frames of what the threads counted.
#[derive(Debug)]
pub struct Meter {
    source: Source,
    hello: Hello,
    boot: Uuid,
    router: Arc<Router>,
    shards: Vec<SharedShard>,
    buckets: Vec<Window>,
}

#[derive(Clone, Copy, Debug)]
struct Window {
    sequence: u64,
    /// The whole second that the window lies in, on the wall clock.
    start: Timestamp,
    from_us: u64,
}

impl Meter {
    pub fn new(
        id: &str,
        hello: Hello,
        boot: Uuid,
        router: Arc<Router>,
        shards: Vec<SharedShard>,
        now: Timestamp,
    ) -> Self {
        let window = Window {
            sequence: 0,
            start: Timestamp::from_secs(now.secs()),
            from_us: now_us(),
        };
        Self {
            source: Source {
                kind: SourceKind::Gateway,
                id: id.to_owned(),
            },
            hello,
            boot,
            router,
            shards,
            buckets: vec![window; usize::from(BUCKETS)],
        }
    }

    /// The second is over: a frame for every bucket. The windows that begin now lie in `next`.
    pub fn close_second(&mut self, next: Timestamp) -> Vec<Frame> {
        let all: Vec<Bucket> = Bucket::of_endpoints().collect();
        self.frames(&all, Some(next), false)
    }

    /// A part of the second for these buckets. The next frame carries the same start; lengths add
    /// up to the second.
    pub fn early(&mut self, buckets: &[Bucket]) -> Vec<Frame> {
        self.frames(buckets, None, false)
    }

    pub fn goodbye(&mut self) -> Vec<Frame> {
        let all: Vec<Bucket> = Bucket::of_endpoints().collect();
        self.frames(&all, None, true)
    }

    pub fn take_refusals(&self) -> Refusals {
        let mut all = Refusals::new();
        for shard in &self.shards {
            for (key, count) in std::mem::take(&mut lock(shard).refusals) {
                *all.entry(key).or_default() += count;
            }
        }
        all
    }

    fn frames(&mut self, buckets: &[Bucket], next: Option<Timestamp>, goodbye: bool) -> Vec<Frame> {
        // The revision is read first: what it drained was marked before it could be seen, so every
        // slot that was taken until then is in the readings below.
        let routes = self.router.current().load_full();
        let at_us = now_us();
        let frame = |bucket: &Bucket| self.frame(*bucket, &routes, at_us, goodbye);
        let frames: Vec<Frame> = buckets.iter().filter_map(frame).collect();
        for frame in &frames {
            if let Some(window) = self.buckets.get_mut(usize::from(frame.bucket.0)) {
                window.sequence += 1;
                window.from_us = at_us;
                window.start = next.unwrap_or(window.start);
            }
        }
        frames
    }

    fn frame(&self, bucket: Bucket, routes: &Snapshot, at_us: u64, goodbye: bool) -> Option<Frame> {
        let window = self.buckets.get(usize::from(bucket.0))?;
        let reached = routes.reached(bucket)?;
        let mut deployments = Vec::new();
        for state in self.router.deployments(bucket) {
            match self.deployment(&state, at_us) {
                Some(part) => deployments.push(part),
                None if state.is_over() => self.forget(&state),
                None => {}
            }
        }
        Some(Frame {
            source: self.source.clone(),
            boot: self.boot,
            sequence: window.sequence,
            bucket,
            start: window.start,
            length_us: at_us.saturating_sub(window.from_us),
            routes: reached.revisions(),
            members: reached.members().unwrap_or_default(),
            hello: (bucket == HELLOS).then(|| self.hello.clone()),
            goodbye,
            deployments,
        })
    }

    /// The deployment is gone, and its last word has been reported.
    fn forget(&self, state: &DeploymentState) {
        self.router.forget(state);
        for shard in &self.shards {
            if let Some(cell) = lock(shard).cells.get_mut(state.meter_slot) {
                *cell = None;
            }
        }
    }

    /// One deployment's part; `None` where everything is zero.
    fn deployment(&self, state: &DeploymentState, at_us: u64) -> Option<DeploymentFrame> {
        let (endpoint, name) = (state.endpoint.clone(), state.name.clone());
        let mut frame = DeploymentFrame {
            in_flight_max: state.serving.take_max(),
            queued_max: state.queued.take_max(),
            ..DeploymentFrame::new(endpoint, name, state.uid, Role::LIVE)
        };
        // Instances are read before the cells: of one that is read a last time all requests have ended.
        let mut instances = instances(state, at_us);
        let mut latency_at_or_below = BTreeMap::new();
        for shard in &self.shards {
            let mut shard = lock(shard);
            let Some(Some(cell)) = shard.cells.get_mut(state.meter_slot) else {
                continue;
            };
            frame.in_flight_us += cell.serving.take(at_us);
            frame.queued_us += cell.queued.take(at_us);
            for (index, gauge) in cell.on_instances.iter_mut().enumerate() {
                let taken = gauge.take(at_us);
                let of_instance = (taken > 0).then(|| instances.get_mut(&index));
                if let Some(instance) = of_instance.flatten() {
                    *instance.in_flight_us.entry(Role::LIVE).or_default() += taken;
                }
            }
            let age = cell.open.oldest().map(|at| at_us.saturating_sub(at));
            let taken = cell.take();
            drop(shard);
            frame.oldest_in_flight_us = frame.oldest_in_flight_us.max(age.unwrap_or(0));
            frame.outcomes.add(&taken.outcomes);
            frame
                .status_classes
                .add(&status_classes(taken.status_classes));
            frame.arrivals += taken.arrivals;
            frame.request_bytes += taken.request_bytes;
            frame.response_bytes += taken.response_bytes;
            frame.latency.merge(&taken.latency);
            for (threshold, count) in taken.at_or_below {
                *latency_at_or_below.entry(threshold).or_default() += count;
            }
        }
        if !latency_at_or_below.is_empty() {
            let of_latency = (Measure::LATENCY, latency_at_or_below);
            frame.at_or_below.extend([of_latency]);
        }
        let reported = |instance: &InstanceFrame| {
            instance.busy_us > 0
                || instance.in_flight > 0
                || instance.requests > 0
                || !instance.in_flight_us.is_empty()
        };
        frame.instances = instances.into_values().filter(reported).collect();
        let something = frame.arrivals > 0
            || frame.outcomes.total() > 0
            || frame.in_flight_max > 0
            || frame.in_flight_us > 0
            || frame.queued_max > 0
            || frame.oldest_in_flight_us > 0
            || !frame.instances.is_empty();
        something.then_some(frame)
    }
}

/// What is read of each instance, by its index.
fn instances(state: &DeploymentState, at_us: u64) -> BTreeMap<usize, InstanceFrame> {
    let reported = state.reported_instances().into_iter().map(|instance| {
        let reading = instance.take_reading(at_us);
        let frame = InstanceFrame {
            busy_us: reading.busy_us,
            in_flight: reading.in_flight,
            requests: reading.requests,
            ..InstanceFrame::new(instance.id.clone())
        };
        (instance.index, frame)
    });
    reported.collect()
}

fn status_classes(by_digit: [u64; 6]) -> StatusClasses {
    let [
        _,
        informational,
        successful,
        redirection,
        client_error,
        server_error,
    ] = by_digit;
    StatusClasses {
        informational,
        successful,
        redirection,
        client_error,
        server_error,
    }
}
