//! Counters of one worker thread, until the meter collects them.
//!
//! Each worker thread has its own shard, behind a lock that only the meter shares with it, and only
//! while it copies one deployment. In-flight time is kept as a sum of timestamps: a request
//! subtracts its start time and later adds its end time; the number in flight times the current
//! time accounts for those still running. So the integral is exact at any moment, and a request
//! touches only a few integers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use contract::frame::Outcomes;
use contract::histogram::Histogram;
use http::StatusCode;

use crate::admission::{DeploymentState, Slot};
use crate::arrival_times::ArrivalTimes;
use crate::cut::CutReason;

/// A number of requests and its integral over time, both exact at any moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct TimeIntegral {
    current: u32,
    sum_us: i64,
}

impl TimeIntegral {
    pub fn enter(&mut self, at_us: u64) {
        self.current += 1;
        self.sum_us -= at_us as i64;
    }

    pub fn leave(&mut self, at_us: u64) {
        self.current -= 1;
        self.sum_us += at_us as i64;
    }

    /// Returns the integral since the last call, up to `at_us`. A request that began just after the
    /// clock was read would make it negative; the difference is carried over to the next call.
    pub fn take(&mut self, at_us: u64) -> u64 {
        let elapsed = i64::from(self.current) * at_us as i64;
        let taken = (self.sum_us + elapsed).max(0);
        self.sum_us -= taken;
        taken as u64
    }
}

/// Counters of one deployment on one thread, since the meter last collected them.
#[derive(Debug, Default)]
pub struct DeploymentCounters {
    pub outcomes: Outcomes,
    pub arrivals: u64,
    /// By the first digit of the status that the client received; 0 if it received none.
    pub status_classes: [u64; 6],
    pub request_bytes: u64,
    pub response_bytes: u64,
    /// Requests with a latency at or below each threshold in microseconds.
    pub at_or_below: BTreeMap<u64, u64>,
    pub latency: Histogram,
    pub arrival_times: ArrivalTimes,
    pub serving: TimeIntegral,
    pub queued: TimeIntegral,
    /// The part of `serving` on each instance, by instance index.
    pub serving_by_instance: Vec<TimeIntegral>,
}

impl DeploymentCounters {
    pub fn serving_on(&mut self, slot: &Slot) -> &mut TimeIntegral {
        let index = slot.instance.index;
        if self.serving_by_instance.len() <= index {
            self.serving_by_instance
                .resize_with(index + 1, TimeIntegral::default);
        }
        &mut self.serving_by_instance[index]
    }

    /// Counts the status that the client received, if any.
    pub fn count_status(&mut self, status: Option<StatusCode>) {
        let class = status.map_or(0, |status| status.as_u16() / 100);
        if let Some(count) = self.status_classes.get_mut(usize::from(class)) {
            *count += 1;
        }
    }

    /// Takes what was counted so far. Requests that are still running stay.
    pub fn take(&mut self) -> Self {
        let carried_over = Self {
            arrival_times: std::mem::take(&mut self.arrival_times),
            serving: self.serving,
            queued: self.queued,
            serving_by_instance: std::mem::take(&mut self.serving_by_instance),
            ..Self::default()
        };
        std::mem::replace(self, carried_over)
    }
}

/// Requests refused before a deployment was chosen, by endpoint (empty if unknown) and status.
pub type RefusalCounts = BTreeMap<(String, u16), u64>;

/// Responses that were cut, by endpoint, deployment and reason.
pub type CutCounts = BTreeMap<(String, String, CutReason), u64>;

#[derive(Debug, Default)]
pub struct Shard {
    /// By the deployment's meter slot.
    pub deployments: Vec<Option<Box<DeploymentCounters>>>,
    pub refusals: RefusalCounts,
    pub cuts: CutCounts,
}

pub type SharedShard = Arc<Mutex<Shard>>;

/// Recovers from poisoning: a panic leaves a shard at most one count short.
pub fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shard {
    pub fn counters(&mut self, slot: usize) -> &mut DeploymentCounters {
        if self.deployments.len() <= slot {
            self.deployments.resize_with(slot + 1, || None);
        }
        self.deployments[slot].get_or_insert_default()
    }
}

pub fn count_cut(shard: &SharedShard, deployment: &DeploymentState, reason: CutReason) {
    let endpoint = deployment.endpoint.endpoint().to_string();
    let key = (endpoint, deployment.name.to_string(), reason);
    *lock(shard).cuts.entry(key).or_default() += 1;
}

pub fn count_refusal(shard: &SharedShard, endpoint: &str, status: u16) {
    *lock(shard)
        .refusals
        .entry((endpoint.to_owned(), status))
        .or_default() += 1;
}
