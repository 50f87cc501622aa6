//! What the log says about the usage of one endpoint.

use std::collections::BTreeMap;

use contract::events::Event;
use contract::ids::Uid;
use contract::log::{Record, StreamKind};
use contract::time::Timestamp;
use contract::usage::{UsageGap, UsageMinute};
use serde::{Deserialize, Serialize};

use super::frames::{Boot, ToldFrames};
use super::ranges::Ranges;
use super::{BOOT_KEPT, MINUTE, pairs};

/// What has been told of one endpoint's usage, as the log has it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "Saved")]
pub struct EndpointUsage {
    pub(super) alive: bool,
    /// Version of its usage stream.
    pub(super) version: u64,
    pub(super) deployments: BTreeMap<Uid, Told>,
    /// Frames that its events say are missing.
    #[serde(skip_serializing_if = "ToldFrames::is_empty")]
    pub(super) missing: ToldFrames,
}

/// What events tell of one deployment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Told {
    /// End of the last minute that was closed: what comes for an earlier one is a correction.
    pub closed: Timestamp,
    /// End of the last minute that anything was told of.
    pub last: Timestamp,
    pub counted: ToldFrames,
}

/// As it is saved, also by a release that kept what was counted for all deployments together.
#[derive(Deserialize)]
struct Saved {
    alive: bool,
    version: u64,
    #[serde(default)]
    deployments: BTreeMap<Uid, Told>,
    #[serde(default)]
    missing: ToldFrames,
    #[serde(default, with = "pairs")]
    counted: BTreeMap<Boot, (Ranges, Timestamp)>,
    /// The last minute closed.
    #[serde(default)]
    closed: BTreeMap<Uid, Timestamp>,
}

impl From<Saved> for EndpointUsage {
    fn from(saved: Saved) -> Self {
        let mut counted = ToldFrames::default();
        for (boot, (ranges, minute)) in saved.counted {
            for (first, last) in ranges.iter() {
                counted.insert(boot.clone(), first, last, minute);
            }
        }
        let together = saved.closed.into_iter().map(|(uid, minute)| {
            let told = Told {
                closed: minute + MINUTE,
                last: minute + MINUTE,
                counted: counted.clone(),
            };
            (uid, told)
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
    /// Applies an event of the endpoint; false: it has been applied before, or is of no concern.
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
                    Event::UsageClosed(told) => self.apply_minute(told, true),
                    Event::UsageCorrected(told) => self.apply_minute(told, false),
                    Event::UsageGap(gap) => self.apply_gap(gap),
                    _ => {}
                }
            }
            _ => return false,
        }
        true
    }

    /// Version of its usage stream, as far as it was applied.
    pub fn version(&self) -> u64 {
        self.version
    }

    fn apply_minute(&mut self, told: &UsageMinute, closes: bool) {
        let known = self.deployments.entry(told.deployment_uid).or_default();
        if closes {
            known.closed = known.closed.max(told.end());
        }
        known.last = known.last.max(told.end());
        for range in &told.counted {
            let boot = Boot {
                source: range.source.clone(),
                boot: range.boot,
            };
            let (first, last) = (range.first, range.last);
            known.counted.insert(boot, first, last, told.minute);
        }
        known.counted.forget_old(told.minute);
        self.missing.forget_old(told.minute);
        self.deployments
            .retain(|_, known| told.minute.since(known.last) < BOOT_KEPT);
    }

    fn apply_gap(&mut self, gap: &UsageGap) {
        let boot = Boot {
            source: gap.source.clone(),
            boot: gap.boot,
        };
        self.missing.insert(boot, gap.first, gap.last, gap.minute);
        self.missing.forget_old(gap.minute);
    }

    /// End of the last minute of a deployment that was closed.
    pub(super) fn closed(&self, uid: Uid) -> Timestamp {
        let told = self.deployments.get(&uid);
        told.map_or_else(Timestamp::default, |told| told.closed)
    }

    pub(super) fn counted(&self, uid: Uid) -> Option<&ToldFrames> {
        self.deployments.get(&uid).map(|told| &told.counted)
    }

    /// The last frame of a boot that was counted for any of its deployments.
    pub(super) fn last_counted(&self, boot: &Boot) -> Option<u64> {
        let counted = self.deployments.values();
        counted.filter_map(|d| d.counted.of(boot)?.last()).max()
    }

    /// Of frames that did not come to us, those to be told: what an event has counted did come, and what
    /// one says is missing is told. Where a predecessor has heard frames up to `heard_before`, it has
    /// told all but what it held back of a deployment, and that begins after the last it told of that.
    pub(super) fn untold(
        &self,
        boot: &Boot,
        missing: &Ranges,
        heard_before: Option<u64>,
    ) -> Ranges {
        let counted = self.deployments.values();
        let counted = counted.filter_map(|d| d.counted.of(boot));
        let untold = match heard_before {
            None => counted.fold(missing.clone(), |left, told| left.without(told)),
            Some(heard) => {
                let told = counted.filter_map(Ranges::last).min();
                missing.without(&Ranges::of(0, told.unwrap_or(heard)))
            }
        };
        match self.missing.of(boot) {
            Some(told) => untold.without(told),
            None => untold,
        }
    }
}
