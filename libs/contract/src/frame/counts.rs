//! The counters in frames and usage, and how they add up.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::open_names::Measure;

/// Requests by outcome. The methods say which of them SLIs count, and which as bad.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "camelCase")]
pub struct Outcomes {
    /// The model answered 2xx or 3xx.
    pub success: u64,
    /// The model answered 4xx (424).
    pub model_client_error: u64,
    /// The model answered 5xx (424).
    pub model_server_error: u64,
    /// The request exceeded the timeout (408).
    pub timeout: u64,
    /// The instance was unreachable or closed the connection early (502).
    pub unreachable: u64,
    /// No instance was ready in time (503).
    pub unavailable: u64,
    /// Internal error of Penstock (500).
    pub internal: u64,
    /// Too many requests pending, the queue full or the wait too long (429).
    pub too_many_pending: u64,
    /// Refused because of the client (400 401 403 404 413 429).
    pub refused: u64,
    /// The client disconnected before the response was complete.
    pub client_left: u64,
    /// No instance was ready, and the hold queue was full (429).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub hold_full: u64,
    /// No instance became ready within the maximum hold time (503).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub hold_expired: u64,
}

impl Outcomes {
    /// All requests, whether SLIs count them or not.
    pub fn total(&self) -> u64 {
        self.counted() + self.refused + self.client_left
    }

    /// The requests that SLIs and error ratios count.
    pub fn counted(&self) -> u64 {
        self.success + self.model_client_error + self.bad()
    }

    /// The requests that the model answered, or that reached their time-out: those with a latency.
    pub fn answered(&self) -> u64 {
        self.success + self.model_client_error + self.model_server_error + self.timeout
    }

    /// The requests that are bad however the endpoint counts 4xx responses of the model.
    pub fn bad(&self) -> u64 {
        self.model_server_error
            + self.timeout
            + self.unreachable
            + self.unavailable
            + self.internal
            + self.too_many_pending
            + self.hold_full
            + self.hold_expired
    }

    /// The requests refused for lack of capacity; divided by [`counted`](Self::counted), the
    /// `refused_ratio`. Refusals because of the client are in `refused` only, and not counted.
    pub fn refused_for_capacity(&self) -> u64 {
        self.too_many_pending + self.unavailable + self.hold_full + self.hold_expired
    }
}

/// Requests by class of the HTTP status.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
pub struct StatusClasses {
    /// 100 to 199.
    #[serde(rename = "1xx", default, skip_serializing_if = "is_zero")]
    pub informational: u64,
    /// 200 to 299.
    #[serde(rename = "2xx", default, skip_serializing_if = "is_zero")]
    pub successful: u64,
    /// 300 to 399.
    #[serde(rename = "3xx", default, skip_serializing_if = "is_zero")]
    pub redirection: u64,
    /// 400 to 499, including 424 for an error of the model.
    #[serde(rename = "4xx", default, skip_serializing_if = "is_zero")]
    pub client_error: u64,
    /// 500 to 599.
    #[serde(rename = "5xx", default, skip_serializing_if = "is_zero")]
    pub server_error: u64,
}

/// Tokens, as the `usage` of OpenAI's API counts them.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
pub struct Tokens {
    /// Tokens of requests, including cached ones.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub input: u64,
    /// Input tokens that were found in a cache.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cached: u64,
    /// Tokens of responses.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub output: u64,
}

/// Counts of requests by measure and threshold (microseconds).
pub type AtOrBelow = BTreeMap<Measure, BTreeMap<u64, u64>>;

/// Implements field-wise addition and cancellation of counters.
macro_rules! counters {
    ($type:ty: $($field:ident)*) => {
        impl $type {
            /// Adds each of the other's counts.
            pub fn add(&mut self, other: &Self) {
                $(self.$field += other.$field;)*
            }

            /// Subtracts the smaller of the two counts from both, for each counter.
            pub fn cancel(&mut self, other: &mut Self) {
                $(cancel(&mut self.$field, &mut other.$field);)*
            }

            /// Whether all counts are zero.
            pub fn is_empty(&self) -> bool {
                *self == Self::default()
            }
        }
    };
}

counters!(Outcomes: success model_client_error model_server_error timeout unreachable unavailable
    internal too_many_pending refused client_left hold_full hold_expired);
counters!(StatusClasses: informational successful redirection client_error server_error);
counters!(Tokens: input cached output);

pub(crate) fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Subtracts the smaller of the two counts from both.
pub(crate) fn cancel(ours: &mut u64, theirs: &mut u64) {
    let common = (*ours).min(*theirs);
    *ours -= common;
    *theirs -= common;
}

pub(crate) fn add_each<K: Ord + Clone>(ours: &mut BTreeMap<K, u64>, theirs: &BTreeMap<K, u64>) {
    for (key, count) in theirs {
        *ours.entry(key.clone()).or_default() += count;
    }
}

/// Applies [`cancel`] to each count, and removes those of `ours` that become zero.
pub(crate) fn cancel_each<K: Ord>(ours: &mut BTreeMap<K, u64>, theirs: &mut BTreeMap<K, u64>) {
    for (key, theirs) in theirs {
        if let Some(ours) = ours.get_mut(key) {
            cancel(ours, theirs);
        }
    }
    ours.retain(|_, count| *count > 0);
}

pub(crate) fn add_thresholds(ours: &mut AtOrBelow, theirs: &AtOrBelow) {
    for (measure, counts) in theirs {
        add_each(ours.entry(measure.clone()).or_default(), counts);
    }
}

pub(crate) fn cancel_thresholds(ours: &mut AtOrBelow, theirs: &mut AtOrBelow) {
    for (measure, theirs) in theirs {
        if let Some(ours) = ours.get_mut(measure) {
            cancel_each(ours, theirs);
        }
    }
    ours.retain(|_, counts| !counts.is_empty());
}
