//! One-second panes that are not saved yet, and the seconds that every gateway has reported.

use std::collections::{BTreeMap, BTreeSet};

use contract::frame::{DeploymentFrame, Frame, Outcomes, Role, Source, SourceKind};
use contract::histogram::Histogram;
use contract::ids::{Bucket, EndpointKey, Name};
use contract::time::{Span, Timestamp};
use serde::{Deserialize, Serialize};

/// How long a second waits for slow gateways before its coverage is decided.
const SETTLE_AFTER: Span = Span::from_secs(3);

/// A gateway that is silent for this long is no longer expected to report.
const SILENT_SECONDS_MAX: i64 = 60;

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
pub(crate) type Spans = Vec<(i64, i64)>;

#[derive(Default)]
pub(crate) struct Panes {
    panes: BTreeMap<PaneKey, Pane>,
    buckets: BTreeMap<Bucket, Coverage>,
    /// The first second to collect: earlier ones are in the history already.
    starts: BTreeMap<Bucket, i64>,
}

#[derive(Default)]
struct Coverage {
    /// The first and last second that each gateway has reported.
    gateways: BTreeMap<Source, (i64, i64)>,
    reported_by: BTreeMap<i64, BTreeSet<Source>>,
}

impl Panes {
    /// Adds a frame, which must not have been added before.
    pub(crate) fn add(&mut self, frame: &Frame) {
        if frame.source.kind != SourceKind::GATEWAY {
            return;
        }
        let second = frame.start.secs();
        let start = self.starts.get(&frame.bucket);
        if start.is_some_and(|start| second < *start) {
            return;
        }
        self.buckets
            .entry(frame.bucket)
            .or_default()
            .record(frame, second);
        for deployment in &frame.deployments {
            let pane = Pane::from(deployment);
            if pane == Pane::default() {
                continue;
            }
            let key = PaneKey {
                endpoint: deployment.endpoint.clone(),
                deployment: deployment.deployment.clone(),
                role: deployment.role.clone(),
                second,
            };
            self.panes.entry(key).or_default().add_concurrent(&pane);
        }
    }

    /// Ignores seconds of a bucket before this one: another owner has saved their panes, possibly from the
    /// same frames.
    pub(crate) fn start_from(&mut self, bucket: Bucket, second: i64) {
        self.starts.insert(bucket, second);
        let earlier = |key: &PaneKey| key.endpoint.bucket() == bucket && key.second < second;
        self.panes.retain(|key, _| !earlier(key));
        if let Some(coverage) = self.buckets.get_mut(&bucket) {
            coverage.reported_by = coverage.reported_by.split_off(&second);
        }
    }

    /// Drops a released bucket.
    pub(crate) fn forget(&mut self, bucket: Bucket) {
        self.starts.remove(&bucket);
        self.buckets.remove(&bucket);
        self.panes.retain(|p, _| p.endpoint.bucket() != bucket);
    }

    /// Takes the panes of some buckets, and the seconds now known to be covered. For a bucket being
    /// released, coverage is decided at once.
    pub(crate) fn take(
        &mut self,
        now: Timestamp,
        of: impl Fn(Bucket) -> bool,
        leaving: impl Fn(Bucket) -> bool,
    ) -> (BTreeMap<PaneKey, Pane>, BTreeMap<Bucket, Spans>) {
        let settled = now.secs() - SETTLE_AFTER.secs() as i64;
        let covered = |(bucket, coverage): (&Bucket, &mut Coverage)| {
            let spans = match leaving(*bucket) {
                true => coverage.take(now.secs() + 1),
                false => coverage.take(settled),
            };
            (!spans.is_empty()).then_some((*bucket, spans))
        };
        let ours = self.buckets.iter_mut().filter(|(bucket, _)| of(**bucket));
        let covered = ours.filter_map(covered).collect();
        let all = std::mem::take(&mut self.panes);
        let (taken, kept) = all.into_iter().partition(|(p, _)| of(p.endpoint.bucket()));
        self.panes = kept;
        (taken, covered)
    }
}

impl Coverage {
    fn record(&mut self, frame: &Frame, second: i64) {
        let reported_by = self.reported_by.entry(second).or_default();
        reported_by.insert(frame.source.clone());
        if frame.goodbye {
            self.gateways.remove(&frame.source);
            return;
        }
        let reported = self
            .gateways
            .entry(frame.source.clone())
            .or_insert((second, second));
        *reported = (reported.0.min(second), reported.1.max(second));
    }

    fn take(&mut self, settled: i64) -> Spans {
        let later = self.reported_by.split_off(&settled);
        let ready = std::mem::replace(&mut self.reported_by, later);
        self.gateways
            .retain(|_, (_, last)| settled - *last < SILENT_SECONDS_MAX);
        let mut spans = Spans::new();
        for (second, reported_by) in ready {
            let expected = self
                .gateways
                .iter()
                .filter(|(_, (first, _))| *first <= second);
            if expected
                .map(|(source, _)| source)
                .any(|s| !reported_by.contains(s))
            {
                continue;
            }
            match spans.last_mut() {
                Some((_, end)) if *end == second => *end += 1,
                _ => spans.push((second, second + 1)),
            }
        }
        spans
    }
}

#[cfg(test)]
mod tests {
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

    fn spans(panes: &mut Panes, now: i64) -> Spans {
        let (_, mut covered) = panes.take(Timestamp::from_secs(now), |_| true, |_| false);
        covered.remove(&Bucket(7)).unwrap_or_default()
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
        let (_, covered) = panes.take(Timestamp::from_secs(10), |_| true, |_| true);
        assert_eq!(covered[&Bucket(7)], [(8, 9)]);
    }

    #[test]
    fn only_selected_buckets_are_taken() {
        let mut panes = Panes::default();
        panes.add(&frame("a", 0));
        let (_, covered) = panes.take(
            Timestamp::from_secs(10),
            |bucket| bucket != Bucket(7),
            |_| false,
        );
        assert!(covered.is_empty());
        assert_eq!(spans(&mut panes, 10), [(0, 1)]);
    }
}
