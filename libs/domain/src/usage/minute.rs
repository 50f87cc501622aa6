//! One minute that is still open: what its frames add up to, per deployment.

use std::collections::BTreeMap;

use contract::frame::{DeploymentFrame, Outcomes, Role};
use contract::ids::{EndpointKey, Name, Uid};
use contract::time::Timestamp;
use contract::usage::{
    FrameRange, InstanceUsage, SLICES_PER_MINUTE, UsageCounts, UsageMinute, UsageSlice,
};
use serde::{Deserialize, Serialize};

use super::ranges::Ranges;
use super::{Boot, pairs};

const SLICE_MILLIS: i64 = 10_000;
const MINUTE_MILLIS: i64 = 60_000;

/// Instances in one event; six slices of these stay below the largest event. What is more follows
/// as corrections, which add up.
const INSTANCES_PER_EVENT: usize = 200;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct OpenMinute {
    /// Frames counted in this minute.
    #[serde(with = "pairs")]
    pub counted: BTreeMap<Boot, Ranges>,
    pub deployments: BTreeMap<EndpointKey, BTreeMap<Uid, Sums>>,
    /// Set when the minute had been closed before its frames came.
    pub late_since: Option<Timestamp>,
}

/// What one deployment used in the minute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Sums {
    deployment: Name,
    slices: Vec<UsageSlice>,
}

/// The start of the minute in which an instant lies.
pub(super) fn minute_of(instant: Timestamp) -> Timestamp {
    Timestamp::from_millis(instant.millis() - instant.millis().rem_euclid(MINUTE_MILLIS))
}

/// Whether a frame says anything about a deployment.
fn says_something(frame: &DeploymentFrame) -> bool {
    frame.outcomes != Outcomes::default()
        || frame.arrivals > 0
        || frame.in_flight_us > 0
        || frame.queued_us > 0
        || frame.request_bytes > 0
        || frame.response_bytes > 0
        || !frame.instances.is_empty()
}

impl OpenMinute {
    pub(super) fn add(&mut self, start: Timestamp, frame: &DeploymentFrame) {
        if !says_something(frame) {
            return;
        }
        let sums = self
            .deployments
            .entry(frame.endpoint.clone())
            .or_default()
            .entry(frame.deployment_uid)
            .or_insert_with(|| Sums {
                deployment: frame.deployment.clone(),
                slices: vec![UsageSlice::default(); SLICES_PER_MINUTE],
            });
        let slice = start.millis().rem_euclid(MINUTE_MILLIS) / SLICE_MILLIS;
        if let Some(slice) = sums.slices.get_mut(slice as usize) {
            add_frame(slice, frame);
        }
    }

    /// Takes away what an event of the log has told already; exact, because all counts add up.
    pub(super) fn subtract(&mut self, endpoint: &EndpointKey, told: &UsageMinute) {
        let Some(deployments) = self.deployments.get_mut(endpoint) else {
            return;
        };
        if let Some(sums) = deployments.get_mut(&told.deployment_uid) {
            for (slice, told) in sums.slices.iter_mut().zip(&told.slices) {
                subtract_slice(slice, told);
            }
            if sums.slices.iter().all(is_nothing) {
                deployments.remove(&told.deployment_uid);
            }
        }
        if deployments.is_empty() {
            self.deployments.remove(endpoint);
        }
    }

    /// The events' data for one deployment: one, or more if it has very many instances.
    pub(super) fn tell(
        &self,
        minute: Timestamp,
        uid: Uid,
        sums: &Sums,
        frames: &[FrameRange],
    ) -> Vec<UsageMinute> {
        let parts = sums
            .slices
            .iter()
            .map(|slice| slice.by_instance.len().div_ceil(INSTANCES_PER_EVENT))
            .max()
            .unwrap_or(0)
            .max(1);
        let part = |index: usize| UsageMinute {
            deployment: sums.deployment.clone(),
            deployment_uid: uid,
            minute,
            slices: sums.slices.iter().map(|s| part_of(s, index)).collect(),
            counted: frames.to_vec(),
        };
        (0..parts).map(part).collect()
    }

    /// The frames of this minute, but for those that are told already.
    pub(super) fn frames_without<'a>(
        &self,
        told: impl Fn(&Boot) -> Option<&'a Ranges>,
    ) -> Vec<FrameRange> {
        let of_boot = |(boot, ranges): (&Boot, &Ranges)| {
            let range = |(first, last)| boot.range(first, last);
            let ranges = match told(boot) {
                Some(told) => ranges.without(told),
                None => ranges.clone(),
            };
            ranges.iter().map(range).collect::<Vec<_>>()
        };
        self.counted.iter().flat_map(of_boot).collect()
    }
}

/// The first part holds everything but the instances past its share.
fn part_of(slice: &UsageSlice, index: usize) -> UsageSlice {
    let instances = slice.by_instance.iter();
    let share = instances
        .skip(index * INSTANCES_PER_EVENT)
        .take(INSTANCES_PER_EVENT)
        .map(|(id, usage)| (id.clone(), *usage))
        .collect();
    if index > 0 {
        return UsageSlice {
            by_instance: share,
            ..UsageSlice::default()
        };
    }
    UsageSlice {
        by_role: slice.by_role.clone(),
        by_instance: share,
        at_or_below: slice.at_or_below.clone(),
    }
}

fn add_frame(slice: &mut UsageSlice, frame: &DeploymentFrame) {
    let counts = slice.by_role.entry(frame.role).or_default();
    counts.outcomes.add(&frame.outcomes);
    counts.arrivals += frame.arrivals;
    counts.in_flight_us += frame.in_flight_us;
    counts.queued_us += frame.queued_us;
    counts.request_bytes += frame.request_bytes;
    counts.response_bytes += frame.response_bytes;
    // Objectives are about what clients see; a mirror's latency must not count for or against them.
    if frame.role == Role::Live {
        for (threshold, count) in &frame.at_or_below {
            *slice.at_or_below.entry(*threshold).or_default() += count;
        }
    }
    for instance in &frame.instances {
        let usage = slice.by_instance.entry(instance.id.clone()).or_default();
        usage.requests += instance.requests;
        usage.busy_us += instance.busy_us;
        usage.cpu_us += instance.cpu_us.unwrap_or(0);
        let memory = instance.memory_bytes.unwrap_or(0);
        usage.memory_bytes_max = usage.memory_bytes_max.max(memory);
    }
}

fn subtract_slice(slice: &mut UsageSlice, told: &UsageSlice) {
    for (role, told) in &told.by_role {
        if let Some(counts) = slice.by_role.get_mut(role) {
            subtract_counts(counts, told);
        }
    }
    slice.by_role.retain(|_, c| *c != UsageCounts::default());
    for (threshold, told) in &told.at_or_below {
        if let Some(count) = slice.at_or_below.get_mut(threshold) {
            *count = count.saturating_sub(*told);
        }
    }
    slice.at_or_below.retain(|_, count| *count > 0);
    for (id, told) in &told.by_instance {
        if let Some(usage) = slice.by_instance.get_mut(id) {
            usage.requests = usage.requests.saturating_sub(told.requests);
            usage.busy_us = usage.busy_us.saturating_sub(told.busy_us);
            usage.cpu_us = usage.cpu_us.saturating_sub(told.cpu_us);
            if usage.memory_bytes_max <= told.memory_bytes_max {
                usage.memory_bytes_max = 0;
            }
            if *usage == InstanceUsage::default() {
                slice.by_instance.remove(id);
            }
        }
    }
}

fn subtract_counts(counts: &mut UsageCounts, told: &UsageCounts) {
    counts.arrivals = counts.arrivals.saturating_sub(told.arrivals);
    counts.in_flight_us = counts.in_flight_us.saturating_sub(told.in_flight_us);
    counts.queued_us = counts.queued_us.saturating_sub(told.queued_us);
    counts.request_bytes = counts.request_bytes.saturating_sub(told.request_bytes);
    counts.response_bytes = counts.response_bytes.saturating_sub(told.response_bytes);
    let (ours, told) = (&mut counts.outcomes, &told.outcomes);
    for (ours, told) in [
        (&mut ours.success, told.success),
        (&mut ours.model_client_error, told.model_client_error),
        (&mut ours.model_server_error, told.model_server_error),
        (&mut ours.timeout, told.timeout),
        (&mut ours.unreachable, told.unreachable),
        (&mut ours.unavailable, told.unavailable),
        (&mut ours.internal, told.internal),
        (&mut ours.too_many_pending, told.too_many_pending),
        (&mut ours.refused, told.refused),
        (&mut ours.client_left, told.client_left),
    ] {
        *ours = ours.saturating_sub(told);
    }
}

fn is_nothing(slice: &UsageSlice) -> bool {
    slice.by_role.is_empty() && slice.by_instance.is_empty() && slice.at_or_below.is_empty()
}
