//! Open minutes as they are saved: with the generation of the ownership under which they were
//! counted.
//!
//! Invariant: what was saved is used only by the very next owner of the bucket. Had there been another
//! one in between, it has counted the same frames, and the log says so.

use contract::time::Timestamp;
use domain::usage::Usage;
use serde::{Deserialize, Serialize};
use store::Fence;

#[derive(Debug, Deserialize)]
pub(crate) struct Open {
    /// None: saved by a release that did not know it, when there was one meter only.
    generation: Option<u64>,
    /// When it was saved, where the release that did it said so.
    #[serde(default)]
    at: Option<Timestamp>,
    usage: Usage,
}

#[derive(Serialize)]
struct Written<'a> {
    generation: u64,
    at: Timestamp,
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
            at: None,
            usage: serde_json::from_value(value)?,
        })
    }

    pub(crate) fn encode(
        fence: &Fence,
        at: Timestamp,
        usage: &Usage,
    ) -> serde_json::Result<String> {
        serde_json::to_string(&Written {
            generation: fence.generation,
            at,
            usage,
        })
    }

    /// The minutes, and when they were saved, if nobody has owned the bucket since.
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
    fn what_was_saved_is_for_the_very_next_owner_only() {
        let saved = Open::encode(&fence(3), Timestamp::from_secs(7), &Usage::default()).unwrap();
        let open = || Open::decode(&saved).unwrap();
        let (_, at) = open().for_owner(&fence(4)).unwrap();
        assert_eq!(at, Some(Timestamp::from_secs(7)));
        assert!(open().for_owner(&fence(5)).is_none());
    }

    #[test]
    fn what_an_older_release_saved_is_used() {
        let saved = serde_json::to_string(&Usage::default()).unwrap();
        let open = Open::decode(&saved).unwrap();
        assert!(open.for_owner(&fence(9)).is_some());
    }
}
