//! Open minutes as they are saved: with the generation of the ownership under which they were
//! counted.
//!
//! Invariant: what was saved is used only by the very next owner of the bucket. Had there been another
//! one in between, it has counted the same frames, and the log says so.

use domain::usage::Usage;
use serde::{Deserialize, Serialize};
use store::Fence;

#[derive(Debug, Deserialize)]
pub(crate) struct Open {
    /// None: saved by a release that did not know it, when there was one meter only.
    generation: Option<u64>,
    usage: Usage,
}

#[derive(Serialize)]
struct Written<'a> {
    generation: u64,
    usage: &'a Usage,
}

impl Open {
    pub(crate) fn decode(doc: &str) -> serde_json::Result<Self> {
        let value: serde_json::Value = serde_json::from_str(doc)?;
        if value.get("usage").is_some() {
            return serde_json::from_value(value);
        }
        Ok(Self {
            generation: None,
            usage: serde_json::from_value(value)?,
        })
    }

    pub(crate) fn encode(fence: &Fence, usage: &Usage) -> serde_json::Result<String> {
        serde_json::to_string(&Written {
            generation: fence.generation,
            usage,
        })
    }

    /// The minutes, if nobody has owned the bucket since they were saved.
    pub(crate) fn for_owner(self, fence: &Fence) -> Option<Usage> {
        let next = |generation: u64| generation + 1 == fence.generation;
        self.generation
            .is_none_or(next)
            .then(|| self.usage.restored())
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
    fn what_was_saved_is_for_the_very_next_owner_only() {
        let saved = Open::encode(&fence(3), &Usage::default()).unwrap();
        let open = || Open::decode(&saved).unwrap();
        assert!(open().for_owner(&fence(4)).is_some());
        assert!(open().for_owner(&fence(5)).is_none());
    }

    #[test]
    fn what_an_older_release_saved_is_used() {
        let saved = serde_json::to_string(&Usage::default()).unwrap();
        let open = Open::decode(&saved).unwrap();
        assert!(open.for_owner(&fence(9)).is_some());
    }
}
