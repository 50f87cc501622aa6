//! One-second panes that are not saved yet, and which seconds every gateway has told of.

use std::collections::{BTreeMap, BTreeSet};

use contract::frame::{DeploymentFrame, Frame, Outcomes, Role, Source, SourceKind};
use contract::histogram::Histogram;
use contract::ids::{Bucket, EndpointKey, Name};
use contract::time::{Span, Timestamp};
use serde::{Deserialize, Serialize};

/// How long a second waits for slow gateways before it is said whether it is covered.
const SETTLED_AFTER: Span = Span::from_secs(3);

/// A gateway that is silent for this long is not expected any more.
const SILENT_MAX_SECONDS: i64 = 60;

/// What one deployment did in one second.
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
    /// Another gateway's part of the same second.
    pub fn add(&mut self, other: &Self) {
        self.in_flight_max += other.in_flight_max;
        self.queued_max += other.queued_max;
        self.sum(other);
    }

    /// A later second.
    pub fn follow(&mut self, other: &Self) {
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

/// Where a pane belongs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub endpoint: EndpointKey,
    pub deployment: Name,
    pub role: Role,
    pub second: i64,
}

/// Seconds from the first up to but without the second.
pub(crate) type Spans = Vec<(i64, i64)>;

#[derive(Default)]
pub(crate) struct Panes {
    panes: BTreeMap<Place, Pane>,
    buckets: BTreeMap<Bucket, Coverage>,
    /// Seconds before these are in the history already, whoever counts them again.
    begin: BTreeMap<Bucket, i64>,
}

#[derive(Default)]
struct Coverage {
    /// First and last second that each gateway has told of.
    gateways: BTreeMap<Source, (i64, i64)>,
    heard: BTreeMap<i64, BTreeSet<Source>>,
}

impl Panes {
    /// Takes in a frame that has not been taken in before.
    pub(crate) fn add(&mut self, frame: &Frame) {
        if frame.source.kind != SourceKind::GATEWAY {
            return;
        }
        let second = frame.start.secs();
        let begin = self.begin.get(&frame.bucket);
        if begin.is_some_and(|begin| second < *begin) {
            return;
        }
        self.buckets
            .entry(frame.bucket)
            .or_default()
            .hear(frame, second);
        for deployment in &frame.deployments {
            let pane = Pane::from(deployment);
            if pane == Pane::default() {
                continue;
            }
            let place = Place {
                endpoint: deployment.endpoint.clone(),
                deployment: deployment.deployment.clone(),
                role: deployment.role.clone(),
                second,
            };
            self.panes.entry(place).or_default().add(&pane);
        }
    }

    /// A bucket has been somebody else's, who has saved panes of all before this second and may have
    /// counted the same frames: seconds before it are left as they are.
    pub(crate) fn begin(&mut self, bucket: Bucket, second: i64) {
        self.begin.insert(bucket, second);
        let earlier = |place: &Place| place.endpoint.bucket() == bucket && place.second < second;
        self.panes.retain(|place, _| !earlier(place));
        if let Some(coverage) = self.buckets.get_mut(&bucket) {
            coverage.heard = coverage.heard.split_off(&second);
        }
    }

    /// Lets go of a bucket that is not ours.
    pub(crate) fn forget(&mut self, bucket: Bucket) {
        self.begin.remove(&bucket);
        self.buckets.remove(&bucket);
        self.panes.retain(|p, _| p.endpoint.bucket() != bucket);
    }

    /// The panes of some buckets, and the seconds of which it is now known that they are covered. Who
    /// is leaving will not know more.
    pub(crate) fn take(
        &mut self,
        now: Timestamp,
        of: impl Fn(Bucket) -> bool,
        leaving: impl Fn(Bucket) -> bool,
    ) -> (BTreeMap<Place, Pane>, BTreeMap<Bucket, Spans>) {
        let settled = now.secs() - SETTLED_AFTER.secs() as i64;
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
    fn hear(&mut self, frame: &Frame, second: i64) {
        let heard = self.heard.entry(second).or_default();
        heard.insert(frame.source.clone());
        if frame.goodbye {
            self.gateways.remove(&frame.source);
            return;
        }
        let told = self
            .gateways
            .entry(frame.source.clone())
            .or_insert((second, second));
        *told = (told.0.min(second), told.1.max(second));
    }

    fn take(&mut self, settled: i64) -> Spans {
        let later = self.heard.split_off(&settled);
        let ready = std::mem::replace(&mut self.heard, later);
        self.gateways
            .retain(|_, (_, last)| settled - *last < SILENT_MAX_SECONDS);
        let mut spans = Spans::new();
        for (second, heard) in ready {
            let expected = self
                .gateways
                .iter()
                .filter(|(_, (first, _))| *first <= second);
            if expected
                .map(|(source, _)| source)
                .any(|s| !heard.contains(s))
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
    fn a_second_is_covered_once_every_gateway_that_was_there_has_told_of_it() {
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
    fn a_second_that_may_still_be_told_of_is_kept() {
        let mut panes = Panes::default();
        panes.add(&frame("a", 0));
        panes.add(&frame("a", 1));
        assert_eq!(spans(&mut panes, 4), [(0, 1)]);
        assert_eq!(spans(&mut panes, 5), [(1, 2)]);
    }

    #[test]
    fn seconds_that_a_former_owner_has_saved_are_not_told_again() {
        let mut panes = Panes::default();
        panes.add(&frame("a", 4));
        panes.begin(Bucket(7), 5);
        for second in 3..8 {
            panes.add(&frame("a", second));
        }
        assert_eq!(spans(&mut panes, 20), [(5, 8)]);
    }

    #[test]
    fn who_leaves_waits_for_nobody() {
        let mut panes = Panes::default();
        panes.add(&frame("a", 8));
        panes.add(&frame("b", 8));
        panes.add(&frame("a", 9));
        let (_, covered) = panes.take(Timestamp::from_secs(10), |_| true, |_| true);
        assert_eq!(covered[&Bucket(7)], [(8, 9)]);
    }

    #[test]
    fn only_what_is_to_be_saved_is_taken() {
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
