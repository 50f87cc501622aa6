//! Closed minutes of usage: what costs, budgets and SLA reports rest on. Integers only.
//!
//! A deployment without a request for longer is told in one event for all those minutes, an hour of
//! the clock (in UTC) at most. Slices add up ([`UsageSlice::add`]), over minutes, deployments and the
//! corrections of a minute.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::frame::{
    AtOrBelow, Measure, Outcomes, Role, Source, StatusClasses, Tokens, add_each, add_thresholds,
    cancel, cancel_each, cancel_thresholds, is_zero,
};
use crate::ids::{InstanceId, Name, Uid};
use crate::time::{Span, Timestamp};

/// Slices of a single minute, ten seconds each.
pub const SLICES_PER_MINUTE: usize = 6;

/// Most minutes in one event; they lie in one hour of the clock.
pub const MINUTES_MAX: u32 = 60;

/// One minute of one deployment, or more if it had no request in them; the data of `usage.closed` and
/// `usage.corrected`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UsageMinute {
    /// Which deployment, by its name within the endpoint.
    pub deployment: Name,
    /// Its incarnation.
    pub deployment_uid: Uid,
    /// Start of the first minute.
    pub minute: Timestamp,
    /// How many minutes this is about, 1 to 60.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub minutes: u32,
    /// Six of a single minute; one for the whole of more minutes.
    pub slices: Vec<UsageSlice>,
    /// Frames counted, so that a successor counts nothing twice: (source, boot, first, last sequence).
    pub counted: Vec<FrameRange>,
}

impl UsageMinute {
    /// The start of the minute after it.
    pub fn end(&self) -> Timestamp {
        self.minute + Span::from_secs(60 * u64::from(self.minutes))
    }
}

const fn one() -> u32 {
    1
}

const fn is_one(minutes: &u32) -> bool {
    *minutes == 1
}

/// A [`UsageMinute`] of any version without its slices, which are most of its text: skipping them costs a
/// fraction of decoding them.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Outline {
    deployment: Name,
    deployment_uid: Uid,
    minute: Timestamp,
    #[serde(default = "one")]
    minutes: u32,
    counted: Vec<FrameRange>,
}

pub(crate) fn decode_without_slices(data: &str) -> serde_json::Result<UsageMinute> {
    let outline: Outline = serde_json::from_str(data)?;
    Ok(UsageMinute {
        deployment: outline.deployment,
        deployment_uid: outline.deployment_uid,
        minute: outline.minute,
        minutes: outline.minutes,
        slices: Vec::new(),
        counted: outline.counted,
    })
}

/// What was used in ten seconds, or in the whole of several minutes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UsageSlice {
    /// Requests by what they were for.
    pub by_role: BTreeMap<Role, UsageCounts>,
    /// What each instance did and took.
    pub by_instance: BTreeMap<InstanceId, InstanceUsage>,
}

/// Requests of one role.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UsageCounts {
    /// Requests that ended, by what became of them.
    pub outcomes: Outcomes,
    /// Requests that arrived.
    pub arrivals: u64,
    /// Requests that ended, by the class of the status that the client got.
    #[serde(default, skip_serializing_if = "StatusClasses::is_empty")]
    pub status_classes: StatusClasses,
    /// Sum over requests of the time each was being served, in microseconds.
    pub in_flight_us: u64,
    /// Sum over requests of the time each waited for an instance, in microseconds.
    pub queued_us: u64,
    /// Bytes of the bodies of requests.
    pub request_bytes: u64,
    /// Bytes of the bodies of answers.
    pub response_bytes: u64,
    /// Largest age, at the end of a second, of a request that had not ended; in microseconds.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub oldest_in_flight_us_max: u64,
    /// Good answers at or below each threshold that an objective names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub at_or_below: AtOrBelow,
    /// Tokens of the requests in which somebody looked for them.
    #[serde(default, skip_serializing_if = "Tokens::is_empty")]
    pub tokens: Tokens,
}

/// What one instance did and took.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceUsage {
    /// Requests that ended on it.
    pub requests: u64,
    /// Time with at least one request on it, in microseconds.
    pub busy_us: u64,
    /// Sum over requests of the time each was on it, in microseconds.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub in_flight_us: BTreeMap<Role, u64>,
    /// CPU time that it used, in microseconds.
    pub cpu_us: u64,
    /// Largest seen.
    pub memory_bytes_max: u64,
    /// For how long its node has told of it, in microseconds; 0 in what version 1 has written.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub measured_us: u64,
    /// Sum over its GPUs of the time each was busy, in microseconds.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gpu_us: u64,
    /// Largest seen.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gpu_memory_bytes_max: u64,
}

impl UsageSlice {
    /// Adds the other's counts, one by one; of what is a maximum the larger one stays.
    pub fn add(&mut self, other: &Self) {
        for (role, counts) in &other.by_role {
            self.by_role.entry(role.clone()).or_default().add(counts);
        }
        for (id, usage) in &other.by_instance {
            self.by_instance.entry(id.clone()).or_default().add(usage);
        }
    }

    /// Takes away what both have, from both. What is left of `self` is without entries of nothing.
    pub fn cancel(&mut self, other: &mut Self) {
        for (role, theirs) in &mut other.by_role {
            if let Some(ours) = self.by_role.get_mut(role) {
                ours.cancel(theirs);
            }
        }
        self.by_role.retain(|_, c| *c != UsageCounts::default());
        for (id, theirs) in &mut other.by_instance {
            if let Some(ours) = self.by_instance.get_mut(id) {
                ours.cancel(theirs);
            }
        }
        self.by_instance
            .retain(|_, u| *u != InstanceUsage::default());
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.by_role.is_empty() && self.by_instance.is_empty()
    }
}

impl UsageCounts {
    /// Adds the other's counts; of what is a maximum the larger one stays.
    pub fn add(&mut self, other: &Self) {
        self.outcomes.add(&other.outcomes);
        self.arrivals += other.arrivals;
        self.status_classes.add(&other.status_classes);
        self.in_flight_us += other.in_flight_us;
        self.queued_us += other.queued_us;
        self.request_bytes += other.request_bytes;
        self.response_bytes += other.response_bytes;
        add_max(
            &mut self.oldest_in_flight_us_max,
            other.oldest_in_flight_us_max,
        );
        add_thresholds(&mut self.at_or_below, &other.at_or_below);
        self.tokens.add(&other.tokens);
    }

    fn cancel(&mut self, other: &mut Self) {
        self.outcomes.cancel(&mut other.outcomes);
        cancel(&mut self.arrivals, &mut other.arrivals);
        self.status_classes.cancel(&mut other.status_classes);
        cancel(&mut self.in_flight_us, &mut other.in_flight_us);
        cancel(&mut self.queued_us, &mut other.queued_us);
        cancel(&mut self.request_bytes, &mut other.request_bytes);
        cancel(&mut self.response_bytes, &mut other.response_bytes);
        cancel_max(
            &mut self.oldest_in_flight_us_max,
            other.oldest_in_flight_us_max,
        );
        cancel_thresholds(&mut self.at_or_below, &mut other.at_or_below);
        self.tokens.cancel(&mut other.tokens);
    }
}

impl InstanceUsage {
    /// Adds the other's counts; of what is a maximum the larger one stays.
    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.busy_us += other.busy_us;
        add_each(&mut self.in_flight_us, &other.in_flight_us);
        self.cpu_us += other.cpu_us;
        add_max(&mut self.memory_bytes_max, other.memory_bytes_max);
        self.measured_us += other.measured_us;
        self.gpu_us += other.gpu_us;
        add_max(&mut self.gpu_memory_bytes_max, other.gpu_memory_bytes_max);
    }

    fn cancel(&mut self, other: &mut Self) {
        cancel(&mut self.requests, &mut other.requests);
        cancel(&mut self.busy_us, &mut other.busy_us);
        cancel_each(&mut self.in_flight_us, &mut other.in_flight_us);
        cancel(&mut self.cpu_us, &mut other.cpu_us);
        cancel_max(&mut self.memory_bytes_max, other.memory_bytes_max);
        cancel(&mut self.measured_us, &mut other.measured_us);
        cancel(&mut self.gpu_us, &mut other.gpu_us);
        cancel_max(&mut self.gpu_memory_bytes_max, other.gpu_memory_bytes_max);
    }

    /// Whether it had no request; its resources may have been used all the same.
    pub fn is_idle(&self) -> bool {
        self.requests == 0 && self.busy_us == 0 && self.in_flight_us.is_empty()
    }
}

fn add_max(ours: &mut u64, theirs: u64) {
    *ours = (*ours).max(theirs);
}

/// A maximum is still to be told if it is larger than what has been.
fn cancel_max(ours: &mut u64, theirs: u64) {
    if *ours <= theirs {
        *ours = 0;
    }
}

/// The only member of version 1 that stands elsewhere in version 2.
pub(crate) const MOVED_IN_2: &str = "\"atOrBelow\"";

/// Version 1 counted thresholds of the latency of live requests only, beside the roles.
pub(crate) fn upcast_1(mut data: Value) -> Value {
    let slices = data.get_mut("slices").and_then(Value::as_array_mut);
    let slices = slices
        .into_iter()
        .flatten()
        .filter_map(Value::as_object_mut);
    for slice in slices {
        let Some(counts) = slice.remove("atOrBelow") else {
            continue;
        };
        let by_role = slice.get_mut("byRole").and_then(Value::as_object_mut);
        let live = by_role.map(|roles| roles.entry(Role::LIVE.as_str()).or_insert_with(nothing));
        if let Some(Value::Object(live)) = live {
            let counts = json!({Measure::LATENCY.as_str(): counts});
            live.insert("atOrBelow".to_owned(), counts);
        }
    }
    data
}

fn nothing() -> Value {
    serde_json::to_value(UsageCounts::default()).unwrap_or_default()
}

/// Frames of one start of a source, one after the other.
#[derive(
    Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "camelCase")]
pub struct FrameRange {
    /// Who sent them.
    pub source: Source,
    /// Its start.
    pub boot: Uuid,
    /// The sequence of the first.
    pub first: u64,
    /// The sequence of the last, which is one of them.
    pub last: u64,
}

/// Frames that never came, or could not be read; the data of `usage.gap`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UsageGap {
    /// The minute in which they are missing, by its start.
    pub minute: Timestamp,
    /// Who should have sent them.
    pub source: Source,
    /// Its start.
    pub boot: Uuid,
    /// The sequence of the first.
    pub first: u64,
    /// The sequence of the last, which is one of them.
    pub last: u64,
}
