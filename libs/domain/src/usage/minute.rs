//! An open minute: the sums of its frames, per deployment.

use std::collections::BTreeMap;

use contract::events::Event;
use contract::frame::DeploymentFrame;
use contract::ids::{EndpointKey, Name, Uid};
use contract::time::Timestamp;
use contract::usage::{
    FrameRange, InstanceUsage, SLICES_PER_MINUTE, UsageCounts, UsageMinute, UsageSlice,
};
use serde::{Deserialize, Serialize};

use super::LATE_FLUSH_DELAY;
use super::frames::FrameSet;

const SLICE_MILLIS: i64 = 10_000;
const MINUTE_MILLIS: i64 = 60_000;

/// Instances per event: six slices of these stay below the largest event. The rest follows as
/// corrections, which add up.
const INSTANCES_PER_EVENT: usize = 200;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct OpenMinute {
    /// Frames counted in this minute.
    pub counted: FrameSet,
    pub deployments: BTreeMap<EndpointKey, BTreeMap<Uid, Sums>>,
    /// When the first frame arrived after the minute had been closed, if any did.
    pub late_since: Option<Timestamp>,
}

/// The usage of one deployment in the minute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Sums {
    pub deployment: Name,
    pub slices: Vec<UsageSlice>,
}

/// Returns the start of the minute that contains an instant.
pub(super) fn minute_of(instant: Timestamp) -> Timestamp {
    Timestamp::from_millis(instant.millis() - instant.millis().rem_euclid(MINUTE_MILLIS))
}

impl OpenMinute {
    /// Adds one deployment's part of a frame that starts at `start`, and in which a node reports its
    /// instances for `reported_us`.
    pub(super) fn add(&mut self, start: Timestamp, reported_us: u64, frame: &DeploymentFrame) {
        let counts = counts_of(frame);
        if counts == UsageCounts::default() && frame.instances.is_empty() {
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
            add_to(slice, counts, reported_us, frame);
        }
    }

    /// Whether late frames have been collected for long enough to be reported.
    pub(super) fn is_flushable(&self, now: Timestamp) -> bool {
        let since = self.late_since;
        since.is_none_or(|since| now >= since + LATE_FLUSH_DELAY)
    }

    /// Subtracts from each other what this minute holds and what an event recorded.
    pub(super) fn cancel(&mut self, endpoint: &EndpointKey, uid: Uid, recorded: &mut [UsageSlice]) {
        let Some(deployments) = self.deployments.get_mut(endpoint) else {
            return;
        };
        if let Some(sums) = deployments.get_mut(&uid) {
            cancel(&mut sums.slices, recorded);
            if sums.slices.iter().all(UsageSlice::is_empty) {
                deployments.remove(&uid);
            }
        }
        if deployments.is_empty() {
            self.deployments.remove(endpoint);
        }
    }
}

impl Sums {
    pub(super) fn report(&self, uid: Uid, minute: Timestamp, closes: bool) -> UsageReport<'_> {
        UsageReport {
            deployment: &self.deployment,
            uid,
            minute,
            minutes: 1,
            slices: &self.slices,
            closes,
        }
    }

    /// Whether the minute has no request.
    pub(super) fn is_idle(&self) -> bool {
        self.slices.iter().all(|slice| {
            let mut instances = slice.by_instance.values();
            slice.by_role.is_empty() && instances.all(|usage| usage.is_idle())
        })
    }
}

/// Subtracts the common part of both. Exact, because all counts add up; if the sides have different
/// numbers of slices, it does not matter which slice a count is taken from.
pub(super) fn cancel(ours: &mut [UsageSlice], recorded: &mut [UsageSlice]) {
    if ours.len() == recorded.len() {
        for (ours, recorded) in ours.iter_mut().zip(recorded) {
            ours.cancel(recorded);
        }
        return;
    }
    for ours in ours {
        for recorded in &mut *recorded {
            ours.cancel(recorded);
        }
    }
}

/// A report of a deployment's usage, starting at a minute.
pub(super) struct UsageReport<'a> {
    pub deployment: &'a Name,
    pub uid: Uid,
    pub minute: Timestamp,
    pub minutes: u32,
    pub slices: &'a [UsageSlice],
    /// Whether these minutes have not been reported before.
    pub closes: bool,
}

impl UsageReport<'_> {
    /// Returns one event, or several if there are very many instances.
    pub(super) fn events(&self, counted: &[FrameRange]) -> impl Iterator<Item = Event> {
        let parts = self
            .slices
            .iter()
            .map(|slice| slice.by_instance.len().div_ceil(INSTANCES_PER_EVENT))
            .max()
            .unwrap_or(0)
            .max(1);
        (0..parts).map(move |index| {
            let data = UsageMinute {
                deployment: self.deployment.clone(),
                deployment_uid: self.uid,
                minute: self.minute,
                minutes: self.minutes,
                slices: self.slices.iter().map(|s| part_of(s, index)).collect(),
                counted: counted.to_vec(),
            };
            match self.closes && index == 0 {
                true => Event::UsageClosed(data),
                false => Event::UsageCorrected(data),
            }
        })
    }
}

/// Returns one part of a slice; the first holds everything except the instances past its share.
fn part_of(slice: &UsageSlice, index: usize) -> UsageSlice {
    let instances = slice.by_instance.iter();
    let share = instances
        .skip(index * INSTANCES_PER_EVENT)
        .take(INSTANCES_PER_EVENT)
        .map(|(id, usage)| (id.clone(), usage.clone()))
        .collect();
    UsageSlice {
        by_role: match index {
            0 => slice.by_role.clone(),
            _ => BTreeMap::new(),
        },
        by_instance: share,
    }
}

fn counts_of(frame: &DeploymentFrame) -> UsageCounts {
    UsageCounts {
        outcomes: frame.outcomes,
        arrivals: frame.arrivals,
        status_classes: frame.status_classes,
        in_flight_us: frame.in_flight_us,
        queued_us: frame.queued_us,
        request_bytes: frame.request_bytes,
        response_bytes: frame.response_bytes,
        oldest_in_flight_us_max: frame.oldest_in_flight_us,
        at_or_below: frame.at_or_below.clone(),
        tokens: frame.tokens.unwrap_or_default(),
    }
}

fn add_to(slice: &mut UsageSlice, counts: UsageCounts, reported_us: u64, frame: &DeploymentFrame) {
    if counts != UsageCounts::default() {
        let role = slice.by_role.entry(frame.role.clone()).or_default();
        role.add(&counts);
    }
    for instance in &frame.instances {
        let usage = InstanceUsage {
            requests: instance.requests,
            busy_us: instance.busy_us,
            in_flight_us: instance.in_flight_us.clone(),
            cpu_us: instance.cpu_us.unwrap_or(0),
            memory_bytes_max: instance.memory_bytes.unwrap_or(0),
            measured_us: reported_us,
            gpu_us: instance.gpu_us.unwrap_or(0),
            gpu_memory_bytes_max: instance.gpu_memory_bytes.unwrap_or(0),
        };
        let sum = slice.by_instance.entry(instance.id.clone()).or_default();
        sum.add(&usage);
    }
}
