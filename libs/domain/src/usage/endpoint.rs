//! The recorded usage of one endpoint.

use std::collections::BTreeMap;

use contract::events::Event;
use contract::ids::Uid;
use contract::log::{Record, StreamKind};
use contract::time::Timestamp;
use contract::usage::{UsageGap, UsageMinute};
use serde::{Deserialize, Serialize};

use super::frames::{Boot, RecordedFrames};
use super::ranges::Ranges;
use super::{BOOT_RETENTION, MINUTE, pairs};

/// The recorded usage of one endpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "Saved")]
pub struct EndpointUsage {
    pub(super) alive: bool,
    /// Version of its usage stream.
    pub(super) version: u64,
    pub(super) deployments: BTreeMap<Uid, RecordedUsage>,
    /// Frames that its events report missing.
    #[serde(skip_serializing_if = "RecordedFrames::is_empty")]
    pub(super) missing: RecordedFrames,
}

/// The recorded usage of one deployment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct RecordedUsage {
    /// End of the last closed minute: anything for an earlier one is a correction.
    pub closed: Timestamp,
    /// End of the last minute with anything recorded.
    pub last: Timestamp,
    pub counted: RecordedFrames,
}

/// The serialized form, including that of a release that kept counted frames for all deployments
/// together.
#[derive(Deserialize)]
struct Saved {
    alive: bool,
    version: u64,
    #[serde(default)]
    deployments: BTreeMap<Uid, RecordedUsage>,
    #[serde(default)]
    missing: RecordedFrames,
    #[serde(default, with = "pairs")]
    counted: BTreeMap<Boot, (Ranges, Timestamp)>,
    /// The last closed minute.
    #[serde(default)]
    closed: BTreeMap<Uid, Timestamp>,
}

impl From<Saved> for EndpointUsage {
    fn from(saved: Saved) -> Self {
        let mut counted = RecordedFrames::default();
        for (boot, (ranges, minute)) in saved.counted {
            for (first, last) in ranges.iter() {
                counted.insert(boot.clone(), first, last, minute);
            }
        }
        let together = saved.closed.into_iter().map(|(uid, minute)| {
            let recorded = RecordedUsage {
                closed: minute + MINUTE,
                last: minute + MINUTE,
                counted: counted.clone(),
            };
            (uid, recorded)
        });
        Self {
            alive: saved.alive,
            version: saved.version,
            deployments: together.chain(saved.deployments).collect(),
            missing: saved.missing,
        }
    }
}

impl EndpointUsage {
    /// Applies an event of the endpoint. Returns false if it was applied before or is irrelevant.
    pub fn apply(&mut self, record: &Record) -> bool {
        let is_usage = record.stream.kind() == Some(StreamKind::Usage);
        match &record.event {
            Event::EndpointCreated(_) => self.alive = true,
            Event::EndpointDeleted(_) => self.alive = false,
            event if is_usage => {
                if record.version <= self.version {
                    return false;
                }
                self.version = record.version;
                match event {
                    Event::UsageClosed(usage) => self.apply_minute(usage, true),
                    Event::UsageCorrected(usage) => self.apply_minute(usage, false),
                    Event::UsageGap(gap) => self.apply_gap(gap),
                    _ => {}
                }
            }
            _ => return false,
        }
        true
    }

    /// Version of its usage stream, as far as it has been applied.
    pub fn version(&self) -> u64 {
        self.version
    }

    fn apply_minute(&mut self, usage: &UsageMinute, closes: bool) {
        let recorded = self.deployments.entry(usage.deployment_uid).or_default();
        if closes {
            recorded.closed = recorded.closed.max(usage.end());
        }
        recorded.last = recorded.last.max(usage.end());
        for range in &usage.counted {
            let boot = Boot {
                source: range.source.clone(),
                boot: range.boot,
            };
            let (first, last) = (range.first, range.last);
            recorded.counted.insert(boot, first, last, usage.minute);
        }
        recorded.counted.forget_old(usage.minute);
        self.missing.forget_old(usage.minute);
        self.deployments
            .retain(|_, recorded| usage.minute.since(recorded.last) < BOOT_RETENTION);
    }

    fn apply_gap(&mut self, gap: &UsageGap) {
        let boot = Boot {
            source: gap.source.clone(),
            boot: gap.boot,
        };
        self.missing.insert(boot, gap.first, gap.last, gap.minute);
        self.missing.forget_old(gap.minute);
    }

    /// End of the last closed minute of a deployment.
    pub(super) fn closed(&self, uid: Uid) -> Timestamp {
        let recorded = self.deployments.get(&uid);
        recorded.map_or_else(Timestamp::default, |recorded| recorded.closed)
    }

    pub(super) fn counted(&self, uid: Uid) -> Option<&RecordedFrames> {
        self.deployments.get(&uid).map(|recorded| &recorded.counted)
    }

    /// The last frame of a boot that was counted for any deployment.
    pub(super) fn last_counted(&self, boot: &Boot) -> Option<u64> {
        let counted = self.deployments.values();
        counted.filter_map(|d| d.counted.of(boot)?.last()).max()
    }

    /// Returns the frames, of those we are missing, that have yet to be reported: not those that an
    /// event has counted, which did arrive, nor those that an event reports missing. A predecessor
    /// that received frames up to `received_before` has reported everything except what it held
    /// back of a deployment, and that starts after the last frame it reported for that deployment.
    pub(super) fn unreported(
        &self,
        boot: &Boot,
        missing: &Ranges,
        received_before: Option<u64>,
    ) -> Ranges {
        let counted = self.deployments.values();
        let counted = counted.filter_map(|d| d.counted.of(boot));
        let unreported = match received_before {
            None => counted.fold(missing.clone(), |left, recorded| left.without(recorded)),
            Some(received) => {
                let recorded = counted.filter_map(Ranges::last).min();
                missing.without(&Ranges::of(0, recorded.unwrap_or(received)))
            }
        };
        match self.missing.of(boot) {
            Some(recorded) => unreported.without(recorded),
            None => unreported,
        }
    }
}
