//! Frames that did not come, and that are told by name.

use std::collections::BTreeSet;

use contract::events::Event;
use contract::ids::EndpointKey;
use contract::time::Timestamp;
use contract::usage::UsageGap;
use serde::{Deserialize, Serialize};

use super::endpoint::EndpointUsage;
use super::frames::Boot;
use super::ranges::Ranges;

/// Frames that did not come, before one that did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Hole {
    pub boot: Boot,
    pub missing: Ranges,
    /// The minute of the last of them.
    pub minute: Timestamp,
    /// Endpoints in whose streams it stands already.
    pub told: BTreeSet<EndpointKey>,
    /// Up to here a predecessor has heard the frames of the boot; see [`EndpointUsage::untold`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heard_before: Option<u64>,
}

impl Hole {
    /// What is still to be told of it in the stream of an endpoint. What an earlier owner has counted
    /// for the endpoint is not missing there.
    pub(super) fn gaps(&self, key: &EndpointKey, endpoint: &EndpointUsage) -> Vec<Event> {
        if !endpoint.alive || self.told.contains(key) {
            return Vec::new();
        }
        let missing = endpoint.untold(&self.boot, &self.missing, self.heard_before);
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
