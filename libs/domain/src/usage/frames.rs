//! Sets of frames: sequence numbers by start of a source.

use std::collections::BTreeMap;

use contract::frame::Source;
use contract::time::Timestamp;
use contract::usage::FrameRange;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::BOOT_RETENTION;
use super::pairs;
use super::ranges::Ranges;

/// One start of a source, which numbers its frames.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Boot {
    /// The source.
    pub source: Source,
    /// Unique to each start.
    pub boot: Uuid,
}

impl Boot {
    pub(super) fn range(&self, first: u64, last: u64) -> FrameRange {
        FrameRange {
            source: self.source.clone(),
            boot: self.boot,
            first,
            last,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct FrameSet(#[serde(with = "pairs")] BTreeMap<Boot, Ranges>);

impl FrameSet {
    pub(super) fn insert(&mut self, boot: Boot, sequence: u64) {
        self.0.entry(boot).or_default().insert(sequence, sequence);
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (boot, ranges) in &other.0 {
            let ours = self.0.entry(boot.clone()).or_default();
            ranges
                .iter()
                .for_each(|(first, last)| ours.insert(first, last));
        }
    }

    /// Whether the first frame of a range is in the set.
    pub(super) fn contains(&self, range: &FrameRange) -> bool {
        let boot = Boot {
            source: range.source.clone(),
            boot: range.boot,
        };
        let ranges = self.0.get(&boot);
        ranges.is_some_and(|ranges| ranges.contains(range.first))
    }

    /// The frames of the set that are not recorded yet.
    pub(super) fn without(&self, recorded: Option<&RecordedFrames>) -> Vec<FrameRange> {
        let of_boot = |(boot, ranges): (&Boot, &Ranges)| {
            let range = |(first, last)| boot.range(first, last);
            match recorded.and_then(|recorded| recorded.of(boot)) {
                Some(recorded) => ranges.without(recorded).iter().map(range).collect(),
                None => ranges.iter().map(range).collect::<Vec<_>>(),
            }
        };
        self.0.iter().flat_map(of_boot).collect()
    }
}

/// Frames that recorded events name, with the last minute they were named in, kept for as long as
/// they may arrive again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct RecordedFrames(#[serde(with = "pairs")] BTreeMap<Boot, (Ranges, Timestamp)>);

impl RecordedFrames {
    pub(super) fn insert(&mut self, boot: Boot, first: u64, last: u64, minute: Timestamp) {
        let (ranges, newest) = self.0.entry(boot).or_default();
        ranges.insert(first, last);
        *newest = (*newest).max(minute);
    }

    pub(super) fn of(&self, boot: &Boot) -> Option<&Ranges> {
        self.0.get(boot).map(|(ranges, _)| ranges)
    }

    pub(super) fn contains(&self, boot: &Boot, sequence: u64) -> bool {
        self.of(boot)
            .is_some_and(|recorded| recorded.contains(sequence))
    }

    pub(super) fn forget_old(&mut self, now: Timestamp) {
        self.0
            .retain(|_, (_, newest)| now.since(*newest) < BOOT_RETENTION);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
