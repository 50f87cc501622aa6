//! Panes: the measurements of a period of time, in rings of bounded length. One second per pane for
//! windows up to 2 minutes, ten seconds up to 30 minutes, a minute beyond.
//!
//! Invariant: panes hold integers only, so that merging is exact in any order.

use std::collections::VecDeque;
use std::sync::Arc;

use contract::frame::{DeploymentFrame, Outcomes};
use contract::histogram::Histogram;

use super::report::{InstanceReading, InstanceReport};

/// Merging of panes of one resolution.
pub(super) trait Merge: Clone + Default + PartialEq {
    fn merge(&mut self, other: &Self);
}

/// Requests and resources of one deployment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Load {
    /// Requests that ended, by outcome.
    pub outcomes: Outcomes,
    /// Requests that arrived.
    pub arrivals: u64,
    /// Sum over requests of the time each was being served, in microseconds.
    pub in_flight_us: u64,
    /// Sum over requests of the time each waited for an instance, in microseconds.
    pub queued_us: u64,
    /// Age of the oldest request that had not ended, in microseconds.
    pub oldest_in_flight_us: u64,
    /// Latencies of requests that the model answered or that timed out.
    pub latency: Histogram,
    /// CPU time of measured instances, in microseconds.
    pub cpu_us: u64,
    /// Instance-time over which CPU was counted.
    pub cpu_length_us: u64,
    /// Sum of memory readings, each in millionths of the memory that the instance may use.
    pub memory_share_ppm: u64,
    /// Number of memory readings: instance-seconds.
    pub memory_samples: u64,
    /// The oldest definitions that any of it was measured by; `None` if nothing was measured.
    pub definitions: Option<u32>,
}

impl Load {
    /// Adds one source's part of a second. Roles are not distinguished: mirrored requests are load
    /// too. Instances are measured if they were ready for the whole second, after `initialization_us`:
    /// what one uses to start, or while it gets no requests, is no load.
    pub fn add(&mut self, frame: &DeploymentFrame, length_us: u64, initialization_us: u64) {
        self.measured_by(Some(frame.definitions));
        self.outcomes.add(&frame.outcomes);
        self.arrivals += frame.arrivals;
        self.in_flight_us += frame.in_flight_us;
        self.queued_us += frame.queued_us;
        self.oldest_in_flight_us = self.oldest_in_flight_us.max(frame.oldest_in_flight_us);
        self.latency.merge(&frame.latency);
        let readings = frame.instances.iter().map(InstanceReading::from);
        self.add_readings(frame.definitions, readings, length_us, initialization_us);
    }

    /// Adds what one source reported of the instances in a second, as [`add`](Self::add) does.
    pub fn add_instances(&mut self, report: &InstanceReport, initialization_us: u64) {
        self.measured_by(Some(report.definitions));
        let readings = report.instances.iter().copied();
        self.add_readings(
            report.definitions,
            readings,
            report.length_us,
            initialization_us,
        );
    }

    fn add_readings(
        &mut self,
        definitions: u32,
        readings: impl Iterator<Item = InstanceReading>,
        length_us: u64,
        initialization_us: u64,
    ) {
        let ready_min_us = length_us.saturating_add(initialization_us);
        for instance in readings {
            // Definitions before the first did not include readiness.
            let is_measured = definitions == 0
                || (instance.ready_for_us).is_some_and(|ready_us| ready_us >= ready_min_us);
            if !is_measured {
                continue;
            }
            if let Some(cpu_us) = instance.cpu_us {
                self.cpu_us += cpu_us;
                self.cpu_length_us += length_us;
            }
            let limit = instance.memory_limit_bytes.filter(|limit| *limit > 0);
            if let (Some(bytes), Some(limit)) = (instance.memory_bytes, limit) {
                let share = u128::from(bytes) * 1_000_000 / u128::from(limit);
                self.memory_share_ppm +=
                    u64::try_from(share).unwrap_or(u64::MAX).min(SHARE_PPM_MAX);
                self.memory_samples += 1;
            }
        }
    }
}

impl Merge for Load {
    fn merge(&mut self, other: &Self) {
        Self::merge(self, other);
    }
}

impl Load {
    /// Adds the load of another time or source.
    pub fn merge(&mut self, other: &Self) {
        self.latency.merge(&other.latency);
        self.merge_numbers(other);
    }

    /// Whether there were requests for the model, finished or not. Those refused because of the client are
    /// none, but one whose client left may have waited in vain.
    pub(super) fn has_traffic(&self) -> bool {
        self.in_flight_us + self.queued_us + self.oldest_in_flight_us > 0
            || self.outcomes.counted() + self.outcomes.client_left > 0
    }

    fn measured_by(&mut self, definitions: Option<u32>) {
        self.definitions = [self.definitions, definitions].into_iter().flatten().min();
    }

    /// Adds everything except the latencies, which most metrics do not need.
    pub(super) fn merge_numbers(&mut self, other: &Self) {
        self.measured_by(other.definitions);
        self.outcomes.add(&other.outcomes);
        self.arrivals += other.arrivals;
        self.in_flight_us += other.in_flight_us;
        self.queued_us += other.queued_us;
        self.oldest_in_flight_us = self.oldest_in_flight_us.max(other.oldest_in_flight_us);
        self.cpu_us += other.cpu_us;
        self.cpu_length_us += other.cpu_length_us;
        self.memory_share_ppm += other.memory_share_ppm;
        self.memory_samples += other.memory_samples;
    }
}

/// Bounds what one reading adds, so that sums over the longest window cannot overflow.
const SHARE_PPM_MAX: u64 = 1_000_000_000;

/// How much of a period was measured at all; the same for every deployment of a bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Seconds with at least one frame.
    pub seconds: u32,
    /// Actual length of those seconds.
    pub length_us: u64,
    /// Seconds in which some member was missing.
    pub partial_seconds: u32,
}

impl Merge for Coverage {
    fn merge(&mut self, other: &Self) {
        self.seconds += other.seconds;
        self.length_us += other.length_us;
        self.partial_seconds += other.partial_seconds;
    }
}

/// Resolutions, finest first: (seconds per pane, longest window in seconds).
pub(super) const TIERS: [(i64, i64); 3] = [(1, 120), (10, 1800), (60, i64::MAX)];

/// The tier that serves a window.
pub(super) fn tier_of(window_seconds: i64) -> usize {
    TIERS
        .iter()
        .position(|(_, longest)| window_seconds <= *longest)
        .unwrap_or(TIERS.len() - 1)
}

/// The length of the panes that serve a window, in seconds.
pub(super) fn step_of(window_seconds: i64) -> i64 {
    TIERS[tier_of(window_seconds)].0
}

/// A window ends with the last closed second, but at most this long ago: when frames stop arriving,
/// the window moves on and empties.
pub(super) const STALE_AFTER_SECONDS: i64 = 3;

/// Panes of one resolution, oldest first. Absent panes (nothing was added) are not kept, and neighbors that
/// are equal share their value: most deployments have the same load, none, second after second.
#[derive(Clone, Debug)]
pub(super) struct Ring<T> {
    step: i64,
    /// Seconds to look back; 0: nothing is kept.
    keep: i64,
    panes: VecDeque<(i64, Arc<T>)>,
}

impl<T: Merge> Ring<T> {
    fn new(step: i64, keep: i64) -> Self {
        Self {
            step,
            keep,
            panes: VecDeque::new(),
        }
    }

    /// Adds the measurements of a second. Seconds arrive in ascending order.
    fn add(&mut self, second: i64, part: &T) {
        if self.keep == 0 {
            return;
        }
        let start = second - second.rem_euclid(self.step);
        match self.panes.back_mut() {
            Some((last, pane)) if *last == start => Arc::make_mut(pane).merge(part),
            _ => {
                self.share_newest();
                let pane = shared(part, self.panes.back());
                self.panes.push_back((start, pane));
            }
        }
        self.trim(second);
    }

    /// Lets the newest pane, which is complete, share the value of the one before.
    fn share_newest(&mut self) {
        let mut newest = self.panes.iter_mut().rev();
        if let (Some((_, last)), Some((_, previous))) = (newest.next(), newest.next())
            && last == previous
        {
            *last = previous.clone();
        }
    }

    /// Adds the measurements of a second from before all that were added.
    fn prepend(&mut self, second: i64, part: &T) {
        let start = second - second.rem_euclid(self.step);
        match self.panes.front_mut() {
            Some((first, pane)) if *first == start => Arc::make_mut(pane).merge(part),
            _ => {
                let pane = shared(part, self.panes.front());
                self.panes.push_front((start, pane));
            }
        }
    }

    /// The first second that any window may still need.
    fn oldest_needed(&self, now: i64) -> i64 {
        let oldest = now - self.keep - self.step - STALE_AFTER_SECONDS;
        oldest - oldest.rem_euclid(self.step)
    }

    fn trim(&mut self, second: i64) {
        // One pane more than the window, which need not start on a pane's boundary.
        let oldest = second - self.keep - self.step;
        while self.panes.front().is_some_and(|(start, _)| *start < oldest) {
            self.panes.pop_front();
        }
    }

    /// Panes that overlap `[from, to)`, oldest first. A window that starts inside a pane includes
    /// all of it.
    fn between(&self, from: i64, to: i64) -> impl Iterator<Item = (i64, &T)> {
        let from = from - from.rem_euclid(self.step);
        let first = self.panes.partition_point(|(start, _)| *start < from);
        self.panes
            .range(first..)
            .take_while(move |(start, _)| *start < to)
            .map(|(start, pane)| (*start, pane.as_ref()))
    }
}

/// A pane that begins with this part; the neighbor's if it is equal.
fn shared<T: Merge>(part: &T, neighbor: Option<&(i64, Arc<T>)>) -> Arc<T> {
    let mut pane = T::default();
    pane.merge(part);
    match neighbor {
        Some((_, neighbor)) if **neighbor == pane => neighbor.clone(),
        _ => Arc::new(pane),
    }
}

/// Rings of all three resolutions.
#[derive(Clone, Debug)]
pub(super) struct Rings<T> {
    rings: [Ring<T>; TIERS.len()],
    /// The first second from which each resolution is complete, and before which it holds nothing;
    /// `i64::MAX` for one that is not kept.
    since: [i64; TIERS.len()],
}

impl<T: Merge> Rings<T> {
    /// The finest resolution is always kept, the others once a window needs them.
    pub fn new(since: i64) -> Self {
        let keep = |tier: usize| if tier == 0 { TIERS[0].1 } else { 0 };
        Self {
            rings: [0, 1, 2].map(|tier| Ring::new(TIERS[tier].0, keep(tier))),
            since: [since, i64::MAX, i64::MAX],
        }
    }

    pub fn with_all_tiers(since: i64, longest: i64) -> Self {
        let mut rings = Self::new(since);
        for (_, longest_of_tier) in TIERS {
            rings.retain(longest_of_tier.min(longest), since);
        }
        rings
    }

    /// Keeps windows of this length from `now` on. A resolution that was not kept before begins with what
    /// the finest one still holds.
    pub fn retain(&mut self, window_seconds: i64, now: i64) {
        let tier = tier_of(window_seconds);
        let ring = &mut self.rings[tier];
        if ring.keep == 0 {
            ring.keep = window_seconds;
            self.take_over_finest(tier, now);
        } else if ring.keep < window_seconds {
            // Anything older than the previous length is already gone, except for the rest of a pane.
            let oldest = now - ring.keep;
            if self.since[tier] < oldest {
                let oldest = oldest + (-oldest).rem_euclid(ring.step);
                let kept = ring.panes.partition_point(|(start, _)| *start < oldest);
                ring.panes.drain(..kept);
                self.since[tier] = oldest;
            }
            ring.keep = window_seconds;
        }
    }

    fn take_over_finest(&mut self, tier: usize, now: i64) {
        let [finest, coarser @ ..] = &mut self.rings;
        let Some(ring) = tier.checked_sub(1) else {
            return;
        };
        let Some(ring) = coarser.get_mut(ring) else {
            return;
        };
        let last = finest.panes.back().map(|(last, _)| *last);
        let since = match last {
            Some(last) => self.since[0].max(now.max(last) - finest.keep),
            // Nothing was ever measured of it, so nothing is gone.
            None => self.since[0],
        };
        let is_whole = since == self.since[0];
        for (second, part) in &finest.panes {
            if is_whole || *second >= since {
                ring.add(*second, part);
            }
        }
        self.since[tier] = since;
    }

    /// The resolutions that are kept.
    pub fn tiers(&self) -> impl Iterator<Item = usize> + use<T> {
        let kept = [0, 1, 2].map(|tier| self.rings[tier].keep > 0);
        (0..TIERS.len()).filter(move |tier| kept[*tier])
    }

    /// The seconds before those that a resolution holds and that windows may still need, from `from` on.
    pub fn lacking(&self, tier: usize, from: i64, now: i64) -> std::ops::Range<i64> {
        from.max(self.rings[tier].oldest_needed(now))..self.since[tier]
    }

    /// Adds a second from before all that a resolution holds.
    pub fn prepend(&mut self, tier: usize, second: i64, part: &T) {
        self.rings[tier].prepend(second, part);
    }

    /// Records that a resolution is complete from this second on.
    pub fn complete_from(&mut self, tier: usize, second: i64) {
        self.since[tier] = self.since[tier].min(second);
    }

    /// Moves the first second that was measured at all.
    pub fn begin_at(&mut self, started: i64, moved: i64) {
        for since in &mut self.since {
            let has_begun_then = *since == started || *since < moved;
            if *since != i64::MAX && has_begun_then {
                *since = moved;
            }
        }
    }

    /// Whether nothing was ever added.
    pub fn is_empty(&self) -> bool {
        self.rings[0].panes.is_empty()
    }

    pub fn add(&mut self, second: i64, part: &T) {
        for ring in &mut self.rings {
            ring.add(second, part);
        }
    }

    pub fn between(
        &self,
        window_seconds: i64,
        from: i64,
        to: i64,
    ) -> impl Iterator<Item = (i64, &T)> {
        self.rings[tier_of(window_seconds)].between(from, to)
    }

    /// The second from which windows of this length are complete.
    pub fn since(&self, window_seconds: i64) -> i64 {
        self.since[tier_of(window_seconds)]
    }
}
