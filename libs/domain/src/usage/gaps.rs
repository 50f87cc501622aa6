//! Missing frames, reported by source and sequence.

use std::collections::BTreeSet;

use contract::events::Event;
use contract::ids::EndpointKey;
use contract::time::Timestamp;
use contract::usage::UsageGap;
use serde::{Deserialize, Serialize};

use super::endpoint::EndpointUsage;
use super::frames::Boot;
use super::ranges::Ranges;

/// Frames that are missing before one that arrived.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Gap {
    pub boot: Boot,
    pub missing: Ranges,
    /// The minute of the last missing frame.
    pub minute: Timestamp,
    /// Endpoints whose streams already record this gap.
    #[serde(rename = "told")]
    pub recorded: BTreeSet<EndpointKey>,
    /// How far a predecessor received the frames of the boot; see [`EndpointUsage::unreported`].
    #[serde(
        rename = "heard_before",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub received_before: Option<u64>,
}

impl Gap {
    /// Returns the events that still have to report the gap in an endpoint's stream. Frames that an
    /// earlier owner has counted for the endpoint are not missing there.
    pub(super) fn due_events(&self, key: &EndpointKey, endpoint: &EndpointUsage) -> Vec<Event> {
        if !endpoint.alive || self.recorded.contains(key) {
            return Vec::new();
        }
        let missing = endpoint.unreported(&self.boot, &self.missing, self.received_before);
        let gap = |(first, last)| {
            Event::UsageGap(UsageGap {
                minute: self.minute,
                source: self.boot.source.clone(),
                boot: self.boot.boot,
                first,
                last,
            })
        };
        missing.iter().map(gap).collect()
    }
}
