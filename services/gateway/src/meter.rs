//! Builds frames from the threads' counters.
//!
//! Invariants: every request is counted in exactly one frame for its arrival and exactly one for
//! its end; sequences have no gaps; the windows of a bucket's frames are adjacent and do not
//! overlap.

use std::collections::BTreeMap;
use std::sync::Arc;

use contract::frame::{
    DeploymentFrame, Frame, Hello, InstanceFrame, Measure, Role, Source, SourceKind, StatusClasses,
};
use contract::ids::BUCKETS;
use contract::{Bucket, Timestamp};
use uuid::Uuid;

use crate::admission::DeploymentState;
use crate::router::{RouteSet, Router};
use crate::shard::{CutCounts, RefusalCounts, SharedShard, lock};
use crate::timer::now_us;

/// The bucket whose frames carry the hello.
const HELLO_BUCKET: Bucket = Bucket(0);

/// Builds frames from the threads' counters.
#[derive(Debug)]
pub struct FrameBuilder {
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
    /// Start of the wall-clock second that contains the window.
    start: Timestamp,
    from_us: u64,
}

impl FrameBuilder {
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
                kind: SourceKind::GATEWAY,
                id: id.to_owned(),
            },
            hello,
            boot,
            router,
            shards,
            buckets: vec![window; usize::from(BUCKETS)],
        }
    }

    /// Ends the second with a frame for every bucket. The windows that begin now are in second
    /// `next`.
    pub fn close_second(&mut self, next: Timestamp) -> Vec<Frame> {
        let all: Vec<Bucket> = Bucket::of_endpoints().collect();
        self.frames(&all, Some(next), false)
    }

    /// Returns frames of these buckets for part of the second. The next frame has the same start;
    /// lengths add up to the second.
    pub fn early_frames(&mut self, buckets: &[Bucket]) -> Vec<Frame> {
        self.frames(buckets, None, false)
    }

    pub fn goodbye(&mut self) -> Vec<Frame> {
        let all: Vec<Bucket> = Bucket::of_endpoints().collect();
        self.frames(&all, None, true)
    }

    pub fn take_refusals(&self) -> RefusalCounts {
        let mut all = RefusalCounts::new();
        for shard in &self.shards {
            for (key, count) in std::mem::take(&mut lock(shard).refusals) {
                *all.entry(key).or_default() += count;
            }
        }
        all
    }

    pub fn take_cuts(&self) -> CutCounts {
        let mut all = CutCounts::new();
        for shard in &self.shards {
            for (key, count) in std::mem::take(&mut lock(shard).cuts) {
                *all.entry(key).or_default() += count;
            }
        }
        all
    }

    fn frames(&mut self, buckets: &[Bucket], next: Option<Timestamp>, goodbye: bool) -> Vec<Frame> {
        // The routes are read first: what they drained was marked before they became visible, so
        // every slot acquired until then is in the readings below.
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

    fn frame(&self, bucket: Bucket, routes: &RouteSet, at_us: u64, goodbye: bool) -> Option<Frame> {
        let window = self.buckets.get(usize::from(bucket.0))?;
        let applied = routes.applied(bucket)?;
        let mut deployments = Vec::new();
        for state in self.router.deployments(bucket) {
            match self.deployment(&state, at_us) {
                Some(part) => deployments.push(part),
                None if state.is_finished() => self.forget(&state),
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
            routes: applied.revisions(),
            members: applied.members().unwrap_or_default(),
            hello: (bucket == HELLO_BUCKET).then(|| self.hello.clone()),
            goodbye,
            deployments,
        })
    }

    /// Drops a retired deployment after its final report.
    fn forget(&self, state: &DeploymentState) {
        self.router.forget(state);
        for shard in &self.shards {
            if let Some(counters) = lock(shard).deployments.get_mut(state.meter_slot) {
                *counters = None;
            }
        }
    }

    /// Returns one deployment's part, or `None` if everything is zero.
    fn deployment(&self, state: &DeploymentState, at_us: u64) -> Option<DeploymentFrame> {
        let (endpoint, name) = (state.endpoint.clone(), state.name.clone());
        let mut frame = DeploymentFrame {
            in_flight_max: state.serving.take_max(),
            queued_max: state.queued.take_max(),
            ..DeploymentFrame::new(endpoint, name, state.uid, Role::LIVE)
        };
        // Instances are read before the counters: all requests of an instance read for the last
        // time have ended.
        let mut instances = instances(state, at_us);
        let mut latency_at_or_below = BTreeMap::new();
        // Counted as an arrival, and not as an outcome yet.
        let mut has_open = false;
        for shard in &self.shards {
            let mut shard = lock(shard);
            let Some(Some(counters)) = shard.deployments.get_mut(state.meter_slot) else {
                continue;
            };
            frame.in_flight_us += counters.serving.take(at_us);
            frame.queued_us += counters.queued.take(at_us);
            for (index, gauge) in counters.serving_by_instance.iter_mut().enumerate() {
                let taken = gauge.take(at_us);
                let of_instance = (taken > 0).then(|| instances.get_mut(&index));
                if let Some(instance) = of_instance.flatten() {
                    *instance.in_flight_us.entry(Role::LIVE).or_default() += taken;
                }
            }
            has_open |= !counters.arrival_times.is_empty();
            let age = counters
                .arrival_times
                .oldest()
                .map(|at| at_us.saturating_sub(at));
            let taken = counters.take();
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
        let is_active = |instance: &InstanceFrame| {
            instance.busy_us > 0
                || instance.in_flight > 0
                || instance.requests > 0
                || !instance.in_flight_us.is_empty()
        };
        frame.instances = instances.into_values().filter(is_active).collect();
        let has_activity = frame.arrivals > 0
            || frame.outcomes.total() > 0
            || frame.in_flight_max > 0
            || frame.in_flight_us > 0
            || frame.queued_max > 0
            || has_open
            || !frame.instances.is_empty();
        has_activity.then_some(frame)
    }
}

/// Reads every instance, by index.
fn instances(state: &DeploymentState, at_us: u64) -> BTreeMap<usize, InstanceFrame> {
    let readings = state.reported_instances().into_iter().map(|instance| {
        let reading = instance.take_reading(at_us);
        let frame = InstanceFrame {
            busy_us: reading.busy_us,
            in_flight: reading.in_flight,
            requests: reading.requests,
            ..InstanceFrame::new(instance.id.clone())
        };
        (instance.index, frame)
    });
    readings.collect()
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
