//! One-second panes that are not saved yet, and the seconds that every gateway has reported.

use std::collections::BTreeMap;

use contract::frame::{DeploymentFrame, Frame, Outcomes, Role, SourceKind};
use contract::histogram::Histogram;
use contract::ids::{Bucket, EndpointKey, Name};
use contract::time::{Span, Timestamp};
use domain::measure::{InstanceReport, METRICS};
use serde::{Deserialize, Serialize};

use crate::coverage::{Measured, SourceCoverage};

/// How long a second waits for slow gateways before its coverage is decided.
const SETTLE_AFTER: Span = Span::from_secs(3);

/// The measurements of one deployment in one second.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pane {
    pub arrivals: u64,
    pub outcomes: Outcomes,
    pub in_flight_us: u64,
    pub in_flight_max: u32,
    pub queued_us: u64,
    pub queued_max: u32,
    pub latency: Histogram,
    /// Age of the oldest request that had not ended, in microseconds.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub oldest_in_flight_us: u64,
    /// The oldest definitions that it was measured by; `None` in panes of releases that did not save them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub definitions: Option<u32>,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Pane {
    /// Adds another gateway's part of the same second.
    pub fn add_concurrent(&mut self, other: &Self) {
        self.in_flight_max += other.in_flight_max;
        self.queued_max += other.queued_max;
        self.sum(other);
    }

    /// Adds a later second.
    pub fn add_later(&mut self, other: &Self) {
        self.in_flight_max = self.in_flight_max.max(other.in_flight_max);
        self.queued_max = self.queued_max.max(other.queued_max);
        self.sum(other);
    }

    fn sum(&mut self, other: &Self) {
        self.arrivals += other.arrivals;
        self.outcomes.add(&other.outcomes);
        self.in_flight_us += other.in_flight_us;
        self.queued_us += other.queued_us;
        self.latency.merge(&other.latency);
        self.oldest_in_flight_us = self.oldest_in_flight_us.max(other.oldest_in_flight_us);
        let definitions = [self.definitions, other.definitions];
        self.definitions = definitions.into_iter().flatten().min();
    }

    /// Whether there was nothing to measure.
    fn is_empty(&self) -> bool {
        let empty = Self {
            definitions: self.definitions,
            ..Self::default()
        };
        *self == empty
    }
}

impl From<&DeploymentFrame> for Pane {
    fn from(frame: &DeploymentFrame) -> Self {
        Self {
            arrivals: frame.arrivals,
            outcomes: frame.outcomes,
            in_flight_us: frame.in_flight_us,
            in_flight_max: frame.in_flight_max,
            queued_us: frame.queued_us,
            queued_max: frame.queued_max,
            latency: frame.latency.clone(),
            oldest_in_flight_us: frame.oldest_in_flight_us,
            definitions: Some(frame.definitions),
        }
    }
}

/// Identifies a pane.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PaneKey {
    pub endpoint: EndpointKey,
    pub deployment: Name,
    pub role: Role,
    pub second: i64,
}

/// Half-open ranges of seconds.
pub(crate) type SecondRanges = Vec<(i64, i64)>;

/// The instances of a deployment over some seconds, for windows of rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InstanceChunk {
    pub endpoint: EndpointKey,
    pub deployment: Name,
    /// The first second.
    pub start: i64,
    /// The second after the last one; those without an entry had no instance.
    pub end: i64,
    pub seconds: BTreeMap<i64, Vec<InstanceReport>>,
}

#[derive(Default)]
pub(crate) struct Panes {
    panes: BTreeMap<PaneKey, Pane>,
    /// Reports of instances that have not been taken, by deployment and second.
    instances: BTreeMap<(EndpointKey, Name), BTreeMap<i64, Vec<InstanceReport>>>,
    measured: BTreeMap<(Bucket, SourceKind), SourceCoverage>,
    /// The first second to collect: earlier ones are in the history already.
    starts: BTreeMap<Bucket, i64>,
}

/// What is to be saved of some buckets.
#[derive(Default)]
pub(crate) struct TakenPanes {
    pub panes: BTreeMap<PaneKey, Pane>,
    /// The seconds now known to be measured.
    pub measured: BTreeMap<(Bucket, SourceKind), Vec<Measured>>,
    pub instances: Vec<InstanceChunk>,
}

impl TakenPanes {
    /// The seconds that every gateway has reported, by bucket.
    pub(crate) fn covered(&self) -> BTreeMap<Bucket, SecondRanges> {
        let of_gateways = self.measured.iter();
        let of_gateways = of_gateways.filter(|((_, kind), _)| *kind == SourceKind::GATEWAY);
        of_gateways
            .map(|((bucket, _), measured)| (*bucket, whole(measured)))
            .filter(|(_, spans)| !spans.is_empty())
            .collect()
    }
}

fn whole(measured: &[Measured]) -> SecondRanges {
    let whole = measured.iter().filter(|span| !span.is_partial);
    whole.map(|span| (span.start, span.end)).collect()
}

/// Whether rules read what sources of this kind measure.
fn is_read_by_rules(kind: &SourceKind) -> bool {
    METRICS.iter().any(|row| row.source == *kind)
}

impl Panes {
    /// Adds a frame, which must not have been added before.
    pub(crate) fn add(&mut self, frame: &Frame) {
        let kind = &frame.source.kind;
        if !is_read_by_rules(kind) {
            return;
        }
        let second = frame.start.secs();
        let start = self.starts.get(&frame.bucket);
        if start.is_some_and(|start| second < *start) {
            return;
        }
        self.measured
            .entry((frame.bucket, kind.clone()))
            .or_default()
            .record(frame, second);
        for deployment in &frame.deployments {
            match *kind == SourceKind::GATEWAY {
                true => self.add_requests(deployment, second),
                false => self.add_instances(deployment, second, frame.length_us),
            }
        }
    }

    fn add_requests(&mut self, deployment: &DeploymentFrame, second: i64) {
        let pane = Pane::from(deployment);
        if pane.is_empty() {
            return;
        }
        let key = PaneKey {
            endpoint: deployment.endpoint.clone(),
            deployment: deployment.deployment.clone(),
            role: deployment.role.clone(),
            second,
        };
        self.panes.entry(key).or_default().add_concurrent(&pane);
    }

    fn add_instances(&mut self, deployment: &DeploymentFrame, second: i64, length_us: u64) {
        if deployment.instances.is_empty() {
            return;
        }
        let key = (deployment.endpoint.clone(), deployment.deployment.clone());
        let seconds = self.instances.entry(key).or_default();
        let report = InstanceReport::of(deployment, length_us);
        seconds.entry(second).or_default().push(report);
    }

    /// Ignores seconds of a bucket before this one: another owner has saved their panes, possibly from the
    /// same frames.
    pub(crate) fn start_from(&mut self, bucket: Bucket, second: i64) {
        self.starts.insert(bucket, second);
        let earlier = |key: &PaneKey| key.endpoint.bucket() == bucket && key.second < second;
        self.panes.retain(|key, _| !earlier(key));
        for ((endpoint, _), seconds) in &mut self.instances {
            if endpoint.bucket() == bucket {
                *seconds = seconds.split_off(&second);
            }
        }
        for ((of, _), coverage) in &mut self.measured {
            if *of == bucket {
                coverage.start_from(second);
            }
        }
    }

    /// Drops a released bucket.
    pub(crate) fn forget(&mut self, bucket: Bucket) {
        self.starts.remove(&bucket);
        self.measured.retain(|(of, _), _| *of != bucket);
        self.panes.retain(|p, _| p.endpoint.bucket() != bucket);
        self.instances.retain(|(e, _), _| e.bucket() != bucket);
    }

    /// Takes the panes of some buckets, the seconds now known to be measured, and the instances in them of
    /// the deployments of which these are recorded. For a bucket being released, coverage is decided at
    /// once.
    pub(crate) fn take(
        &mut self,
        now: Timestamp,
        of: impl Fn(Bucket) -> bool,
        leaving: impl Fn(Bucket) -> bool,
        recorded: &[(EndpointKey, Name)],
    ) -> TakenPanes {
        let settled = |bucket: Bucket| match leaving(bucket) {
            true => now.secs() + 1,
            false => now.secs() - SETTLE_AFTER.secs() as i64,
        };
        let ours = self.measured.iter_mut();
        let ours = ours.filter(|((bucket, _), _)| of(*bucket));
        let measured = ours
            .map(|(key, coverage)| (key.clone(), coverage.take(settled(key.0))))
            .filter(|(_, spans)| !spans.is_empty());
        let measured: BTreeMap<_, _> = measured.collect();
        let all = std::mem::take(&mut self.panes);
        let (panes, kept) = all.into_iter().partition(|(p, _)| of(p.endpoint.bucket()));
        self.panes = kept;
        let instances = self.take_instances(&measured, recorded);
        for ((endpoint, _), seconds) in &mut self.instances {
            if of(endpoint.bucket()) {
                *seconds = seconds.split_off(&settled(endpoint.bucket()));
            }
        }
        self.instances.retain(|_, seconds| !seconds.is_empty());
        TakenPanes {
            panes,
            measured,
            instances,
        }
    }

    fn take_instances(
        &mut self,
        measured: &BTreeMap<(Bucket, SourceKind), Vec<Measured>>,
        recorded: &[(EndpointKey, Name)],
    ) -> Vec<InstanceChunk> {
        let chunk = |(endpoint, deployment): &(EndpointKey, Name)| {
            let spans = measured.get(&(endpoint.bucket(), SourceKind::NODE))?;
            let (start, end) = (spans.first()?.start, spans.last()?.end);
            let key = (endpoint.clone(), deployment.clone());
            let reported = self.instances.get(&key).into_iter().flatten();
            let seconds = reported
                .filter(|(second, _)| (start..end).contains(*second))
                .map(|(second, reports)| (*second, reports.clone()))
                .collect();
            Some(InstanceChunk {
                endpoint: endpoint.clone(),
                deployment: deployment.clone(),
                start,
                end,
                seconds,
            })
        };
        recorded.iter().filter_map(chunk).collect()
    }
}

#[cfg(test)]
mod tests {
    use contract::frame::{InstanceFrame, Source};
    use contract::ids::{InstanceId, Uid};
    use uuid::Uuid;

    use super::*;

    fn frame(gateway: &str, second: i64) -> Frame {
        Frame {
            source: Source {
                kind: SourceKind::GATEWAY,
                id: gateway.to_owned(),
            },
            boot: Uuid::nil(),
            sequence: second as u64,
            bucket: Bucket(7),
            start: Timestamp::from_secs(second),
            length_us: 1_000_000,
            routes: Default::default(),
            members: Default::default(),
            hello: None,
            goodbye: false,
            deployments: Vec::new(),
        }
    }

    fn spans(panes: &mut Panes, now: i64) -> SecondRanges {
        let taken = panes.take(Timestamp::from_secs(now), |_| true, |_| false, &[]);
        taken.covered().remove(&Bucket(7)).unwrap_or_default()
    }

    #[test]
    fn a_second_is_covered_once_every_present_gateway_has_reported_it() {
        let mut panes = Panes::default();
        for second in 0..10 {
            panes.add(&frame("a", second));
        }
        for second in (4..10).filter(|second| *second != 6) {
            panes.add(&frame("b", second));
        }
        assert_eq!(spans(&mut panes, 13), [(0, 6), (7, 10)]);
        assert_eq!(spans(&mut panes, 23), []);
    }

    #[test]
    fn a_gateway_that_has_left_is_not_waited_for() {
        let mut panes = Panes::default();
        panes.add(&frame("a", 0));
        panes.add(&frame("b", 0));
        panes.add(&Frame {
            members: Default::default(),
            hello: None,
            goodbye: true,
            ..frame("b", 1)
        });
        panes.add(&frame("a", 1));
        panes.add(&frame("a", 2));
        assert_eq!(spans(&mut panes, 10), [(0, 3)]);
    }

    #[test]
    fn a_second_that_may_still_be_reported_is_kept() {
        let mut panes = Panes::default();
        panes.add(&frame("a", 0));
        panes.add(&frame("a", 1));
        assert_eq!(spans(&mut panes, 4), [(0, 1)]);
        assert_eq!(spans(&mut panes, 5), [(1, 2)]);
    }

    #[test]
    fn seconds_saved_by_a_former_owner_are_not_reported_again() {
        let mut panes = Panes::default();
        panes.add(&frame("a", 4));
        panes.start_from(Bucket(7), 5);
        for second in 3..8 {
            panes.add(&frame("a", second));
        }
        assert_eq!(spans(&mut panes, 20), [(5, 8)]);
    }

    #[test]
    fn a_released_bucket_does_not_wait_for_gateways() {
        let mut panes = Panes::default();
        panes.add(&frame("a", 8));
        panes.add(&frame("b", 8));
        panes.add(&frame("a", 9));
        let taken = panes.take(Timestamp::from_secs(10), |_| true, |_| true, &[]);
        assert_eq!(taken.covered()[&Bucket(7)], [(8, 9)]);
    }

    #[test]
    fn only_selected_buckets_are_taken() {
        let mut panes = Panes::default();
        panes.add(&frame("a", 0));
        let taken = panes.take(
            Timestamp::from_secs(10),
            |bucket| bucket != Bucket(7),
            |_| false,
            &[],
        );
        assert!(taken.covered().is_empty());
        assert_eq!(spans(&mut panes, 10), [(0, 1)]);
    }

    #[test]
    fn a_second_that_lacks_a_gateway_is_measured_in_part() {
        let mut panes = Panes::default();
        panes.add(&frame("b", 0));
        for second in 0..3 {
            panes.add(&frame("a", second));
        }
        let taken = panes.take(Timestamp::from_secs(10), |_| true, |_| false, &[]);
        let span = |start, end, is_partial| Measured {
            start,
            end,
            is_partial,
            length_us: 1_000_000 * (end - start) as u64,
        };
        let of = (Bucket(7), SourceKind::GATEWAY);
        assert_eq!(taken.measured[&of], [span(0, 1, false), span(1, 3, true)]);
        assert_eq!(taken.covered()[&Bucket(7)], [(0, 1)]);
    }

    /// A node's frame of a second in which a deployment has one instance.
    fn node_frame(endpoint: &EndpointKey, second: i64) -> Frame {
        let mut of = DeploymentFrame::new(
            endpoint.clone(),
            "blue".parse().unwrap(),
            Uid(Uuid::from_u128(1)),
            Role::LIVE,
        );
        let instance = InstanceFrame {
            cpu_us: Some(100),
            ..InstanceFrame::new(InstanceId::from("i".to_owned()))
        };
        of.instances.push(instance);
        Frame {
            source: Source {
                kind: SourceKind::NODE,
                id: "n".to_owned(),
            },
            bucket: endpoint.bucket(),
            deployments: vec![of],
            ..frame("n", second)
        }
    }

    #[test]
    fn instances_are_recorded_of_the_deployments_that_need_it_once_their_second_is_over() {
        let mut panes = Panes::default();
        let endpoint = EndpointKey::new(&"iris".parse().unwrap());
        for second in 0..5 {
            panes.add(&node_frame(&endpoint, second));
        }
        let names: [Name; 2] = ["blue", "green"].map(|name| name.parse().unwrap());
        let recorded = names.map(|name| (endpoint.clone(), name));
        let taken = panes.take(Timestamp::from_secs(6), |_| true, |_| false, &recorded);
        let seconds = |chunk: &InstanceChunk| {
            let seconds = chunk.seconds.keys().copied().collect::<Vec<_>>();
            (chunk.start, chunk.end, seconds)
        };
        let chunks: Vec<_> = taken.instances.iter().map(seconds).collect();
        assert_eq!(chunks, [(0, 3, vec![0, 1, 2]), (0, 3, vec![])]);
        let rest = panes.take(Timestamp::from_secs(9), |_| true, |_| false, &recorded[..1]);
        assert_eq!(seconds(&rest.instances[0]), (3, 5, vec![3, 4]));
    }
}
