//! CPU and memory of this node's instances: one frame per bucket and second, even if empty.
//!
//! Invariant: every instance that runs is in the frame of its bucket, also one whose backend does not
//! measure it: what it uses is then absent, which is not zero.

use std::collections::BTreeMap;
use std::time::Duration;

use backends::ResourceSample;
use contract::frame::{DeploymentFrame, Frame, Hello, InstanceFrame, Role, Source, SourceKind};
use contract::ids::{Bucket, EndpointKey, InstanceId, Name, Position, Uid};
use contract::time::{Span, Timestamp};
use tokio::time::Instant;
use uuid::Uuid;

use super::state::{NodeState, ReadinessPeriod};

const SECOND: Span = Span::from_secs(1);
/// The bucket whose frames carry the hello of a source.
const HELLO_BUCKET: Bucket = Bucket(0);

#[derive(Debug)]
pub(super) struct Frames {
    source: Source,
    hello: Hello,
    boot: Uuid,
    /// Shared by all buckets, because each gets a frame every second.
    sequence: u64,
    /// The last second that was sent.
    last_start: Option<Timestamp>,
    closed_at: Instant,
    /// CPU totals as of when the last second closed.
    cpu_us: BTreeMap<InstanceId, u64>,
    ready: BTreeMap<InstanceId, ReadyPeriod>,
}

/// Since when an instance has been ready.
#[derive(Clone, Copy, Debug)]
struct ReadyPeriod {
    readiness: ReadinessPeriod,
    /// The end of the second in which it became ready.
    seen_at: Instant,
    /// How long it had been ready then, as the log knows.
    before: Span,
}

impl Frames {
    pub(super) fn new(node: &str, hello: Hello, boot: Uuid) -> Self {
        Self {
            source: Source {
                kind: SourceKind::NODE,
                id: node.to_owned(),
            },
            hello,
            boot,
            sequence: 0,
            last_start: None,
            closed_at: Instant::now(),
            cpu_us: BTreeMap::new(),
            ready: BTreeMap::new(),
        }
    }

    /// Returns when the current second of the clock ends.
    pub(super) fn next_second(&self, now: Timestamp) -> Instant {
        let elapsed = now.millis().rem_euclid(SECOND.millis() as i64) as u64;
        Instant::now() + Duration::from_millis(SECOND.millis() - elapsed)
    }

    /// Returns the frames of the second that has just ended or, with `goodbye`, of the current partial one.
    /// Returns none while the clock stands still or goes back: each second is sent once.
    pub(super) fn close_second(
        &mut self,
        now: Timestamp,
        samples: &[ResourceSample],
        state: &NodeState,
        goodbye: bool,
    ) -> Vec<Frame> {
        let running = Timestamp::from_secs(now.secs());
        let mut start = if goodbye { running } else { running - SECOND };
        if let Some(last) = self.last_start.filter(|last| start <= *last) {
            if !goodbye {
                return Vec::new();
            }
            start = last + SECOND;
        }
        let closed_at = Instant::now();
        let length_us = closed_at.duration_since(self.closed_at).as_micros() as u64;
        let mut deployments = self.deployments(samples, state, now, closed_at);
        let frames = Bucket::of_endpoints()
            .map(|bucket| Frame {
                source: self.source.clone(),
                boot: self.boot,
                sequence: self.sequence,
                bucket,
                start,
                length_us,
                routes: BTreeMap::new(),
                members: Position::START,
                hello: (bucket == HELLO_BUCKET).then(|| self.hello.clone()),
                goodbye,
                deployments: deployments.remove(&bucket).unwrap_or_default(),
            })
            .collect();
        self.sequence += 1;
        self.last_start = Some(start);
        self.closed_at = closed_at;
        frames
    }

    fn deployments(
        &mut self,
        samples: &[ResourceSample],
        state: &NodeState,
        now: Timestamp,
        closed_at: Instant,
    ) -> BTreeMap<Bucket, Vec<DeploymentFrame>> {
        let mut instances = BTreeMap::<(EndpointKey, Uid), (Name, Vec<InstanceFrame>)>::new();
        let mut totals = BTreeMap::new();
        let mut ready = BTreeMap::new();
        let unmeasured = state.running().map(|id| (id, None));
        let measured = samples.iter().map(|sample| (&sample.id, Some(sample)));
        let reported: BTreeMap<_, _> = unmeasured.chain(measured).collect();
        for (id, sample) in reported {
            let Some(placement) = state.placement_of(id) else {
                continue;
            };
            let period = placement.readiness.map(|readiness| {
                let known = self.ready.get(id).copied();
                let known = known.filter(|period| period.readiness == readiness);
                known.unwrap_or_else(|| ReadyPeriod::new(readiness, now, closed_at))
            });
            if let Some(period) = period {
                ready.insert(id.clone(), period);
            }
            let total = sample.map(|sample| sample.cpu_us_total);
            let previous = self.cpu_us.get(id).copied();
            if let Some(newest) = total.or(previous) {
                totals.insert(id.clone(), newest);
            }
            // Usage of an adopted instance before the first sample belongs to no second of ours.
            let unseen = total.filter(|_| state.is_adopted(id)).unwrap_or(0);
            let used = |total: u64| total.saturating_sub(previous.unwrap_or(unseen));
            let of_deployment = instances
                .entry((placement.endpoint, placement.deployment_uid))
                .or_insert_with(|| (placement.deployment, Vec::new()));
            of_deployment.1.push(InstanceFrame {
                cpu_us: total.map(used),
                ready_for_us: period.map(|period| period.length_us(closed_at)),
                memory_bytes: sample.map(|sample| sample.memory_bytes),
                memory_limit_bytes: sample.and_then(|sample| sample.memory_limit_bytes),
                ..InstanceFrame::new(id.clone())
            });
        }
        self.cpu_us = totals;
        self.ready = ready;
        let mut frames = BTreeMap::<Bucket, Vec<DeploymentFrame>>::new();
        for ((endpoint, uid), (deployment, instances)) in instances {
            let bucket = endpoint.bucket();
            frames.entry(bucket).or_default().push(DeploymentFrame {
                instances,
                ..DeploymentFrame::new(endpoint, deployment, uid, Role::LIVE)
            });
        }
        frames
    }
}

impl ReadyPeriod {
    fn new(readiness: ReadinessPeriod, now: Timestamp, seen_at: Instant) -> Self {
        Self {
            readiness,
            seen_at,
            before: readiness.before.map_or(Span::ZERO, |at| now.since(at)),
        }
    }

    /// How long it has been ready, in microseconds; 0 in the second in which it became ready, of which
    /// only a part counts.
    fn length_us(&self, now: Instant) -> u64 {
        let seen_us = now.duration_since(self.seen_at).as_micros() as u64;
        match seen_us {
            0 => 0,
            _ => seen_us + self.before.millis() * 1000,
        }
    }
}
