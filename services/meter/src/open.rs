//! Open minutes as saved, with the generation of the ownership under which they were counted.
//!
//! Invariant: saved usage is only used by the very next owner of the bucket. An owner in between would
//! have counted the same frames, and recorded them in the log.

use contract::time::Timestamp;
use domain::usage::Usage;
use serde::{Deserialize, Serialize};
use store::Fence;

#[derive(Debug, Deserialize)]
pub(crate) struct OpenUsage {
    /// `None` if saved by a release without generations, which supported only one meter.
    generation: Option<u64>,
    /// When it was saved, if the release that saved it recorded that.
    #[serde(default)]
    at: Option<Timestamp>,
    usage: Usage,
}

#[derive(Serialize)]
struct SavedUsage<'a> {
    generation: u64,
    at: Timestamp,
    usage: &'a Usage,
}

impl OpenUsage {
    pub(crate) fn decode(doc: &str) -> serde_json::Result<Self> {
        let value: serde_json::Value = serde_json::from_str(doc)?;
        if value.get("usage").is_some() {
            return serde_json::from_value(value);
        }
        Ok(Self {
            generation: None,
            at: None,
            usage: serde_json::from_value(value)?,
        })
    }

    pub(crate) fn encode(
        fence: &Fence,
        at: Timestamp,
        usage: &Usage,
    ) -> serde_json::Result<String> {
        serde_json::to_string(&SavedUsage {
            generation: fence.generation,
            at,
            usage,
        })
    }

    /// Returns the usage and when it was saved, if nobody has owned the bucket since.
    pub(crate) fn for_owner(self, fence: &Fence) -> Option<(Usage, Option<Timestamp>)> {
        let next = |generation: u64| generation + 1 == fence.generation;
        self.generation
            .is_none_or(next)
            .then(|| (self.usage.restored(), self.at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fence(generation: u64) -> Fence {
        Fence {
            name: "meter/7".into(),
            generation,
        }
    }

    #[test]
    fn saved_usage_is_for_the_very_next_owner_only() {
        let saved =
            OpenUsage::encode(&fence(3), Timestamp::from_secs(7), &Usage::default()).unwrap();
        let open = || OpenUsage::decode(&saved).unwrap();
        let (_, at) = open().for_owner(&fence(4)).unwrap();
        assert_eq!(at, Some(Timestamp::from_secs(7)));
        assert!(open().for_owner(&fence(5)).is_none());
    }

    #[test]
    fn usage_saved_by_an_older_release_is_restored() {
        let saved = serde_json::to_string(&Usage::default()).unwrap();
        let open = OpenUsage::decode(&saved).unwrap();
        assert!(open.for_owner(&fence(9)).is_some());
    }
}
