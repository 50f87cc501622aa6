//! Minutes of a deployment without a request, collected and reported in one event at the end of the
//! hour, or when a minute with a request follows.

use contract::ids::Name;
use contract::time::{Span, Timestamp};
use contract::usage::UsageSlice;
use serde::{Deserialize, Serialize};

use super::MINUTE;
use super::minute::Sums;

const HOUR: Span = Span::from_secs(3600);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct IdleSpan {
    pub deployment: Name,
    /// Start of the first minute.
    pub from: Timestamp,
    /// End of the last minute.
    pub through: Timestamp,
    /// Six for a single minute, one for more.
    pub slices: Vec<UsageSlice>,
}

impl IdleSpan {
    pub(super) fn new(minute: Timestamp, sums: &Sums) -> Self {
        Self {
            deployment: sums.deployment.clone(),
            from: minute,
            through: minute + MINUTE,
            slices: sums.slices.clone(),
        }
    }

    /// Whether a minute continues the span. Minutes without any data may lie between.
    pub(super) fn accepts(&self, minute: Timestamp) -> bool {
        minute >= self.through && minute < self.end_of_hour()
    }

    pub(super) fn extend(&mut self, minute: Timestamp, sums: &Sums) {
        let mut whole = UsageSlice::default();
        for slice in self.slices.iter().chain(&sums.slices) {
            whole.add(slice);
        }
        self.slices = vec![whole];
        self.through = minute + MINUTE;
    }

    pub(super) fn end_of_hour(&self) -> Timestamp {
        hour_of(self.from) + HOUR
    }

    pub(super) fn minutes(&self) -> u32 {
        let minutes = self.through.since(self.from).secs() / MINUTE.secs();
        u32::try_from(minutes).unwrap_or(u32::MAX)
    }
}

/// Returns the start of the hour (in UTC) that contains an instant.
pub(super) fn hour_of(instant: Timestamp) -> Timestamp {
    let hour = HOUR.millis() as i64;
    Timestamp::from_millis(instant.millis() - instant.millis().rem_euclid(hour))
}
