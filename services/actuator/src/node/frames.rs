//! CPU and memory of this node's instances, as a frame per bucket and second, also an empty one.

use std::collections::BTreeMap;
use std::time::Duration;

use backends::ResourceSample;
use contract::frame::{DeploymentFrame, Frame, Hello, InstanceFrame, Role, Source, SourceKind};
use contract::ids::{Bucket, EndpointKey, InstanceId, Name, Position, Uid};
use contract::time::{Span, Timestamp};
use tokio::time::Instant;
use uuid::Uuid;

use super::state::NodeState;

const SECOND: Span = Span::from_secs(1);
/// The bucket in whose frames a source says who it is.
const HELLOS: Bucket = Bucket(0);

#[derive(Debug)]
pub(super) struct Frames {
    source: Source,
    hello: Hello,
    boot: Uuid,
    /// The same for all buckets, because each gets a frame each second.
    sequence: u64,
    /// The last second that was sent.
    last_start: Option<Timestamp>,
    closed_at: Instant,
    /// CPU totals when the last second closed.
    cpu_us: BTreeMap<InstanceId, u64>,
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
        }
    }

    /// When the second that runs by the clock will be over.
    pub(super) fn next_second(&self, now: Timestamp) -> Instant {
        let over = now.millis().rem_euclid(SECOND.millis() as i64) as u64;
        Instant::now() + Duration::from_millis(SECOND.millis() - over)
    }

    /// The frames of the second that has just ended; with `goodbye`, of the part that has run. None
    /// while the clock stands still or goes back: a second is sent once.
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
        let mut deployments = self.deployments(samples, state);
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
                hello: (bucket == HELLOS).then(|| self.hello.clone()),
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
    ) -> BTreeMap<Bucket, Vec<DeploymentFrame>> {
        let mut instances = BTreeMap::<(EndpointKey, Uid), (Name, Vec<InstanceFrame>)>::new();
        let mut totals = BTreeMap::new();
        for sample in samples {
            let Some((endpoint, uid, deployment)) = state.deployment_of(&sample.id) else {
                continue;
            };
            // What an adopted instance used before we looked belongs to no second of ours.
            let before = self.cpu_us.get(&sample.id).copied();
            let before = before.unwrap_or(if state.is_adopted(&sample.id) {
                sample.cpu_us_total
            } else {
                0
            });
            totals.insert(sample.id.clone(), sample.cpu_us_total);
            let of_deployment = instances
                .entry((endpoint, uid))
                .or_insert_with(|| (deployment, Vec::new()));
            of_deployment.1.push(InstanceFrame {
                cpu_us: Some(sample.cpu_us_total.saturating_sub(before)),
                memory_bytes: Some(sample.memory_bytes),
                ..InstanceFrame::new(sample.id.clone())
            });
        }
        self.cpu_us = totals;
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
