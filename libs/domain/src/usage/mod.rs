//! Usage of the endpoints of one bucket: frames in, closed minutes and named gaps out.
//!
//! A minute with a request is told when it is over. Minutes without one are gathered, per deployment,
//! until the hour (in UTC) is over or a minute with a request comes, and told in one event.
//!
//! Invariants: each frame is counted once per deployment, however often it comes and whoever counted
//! it before; what the events of a deployment say adds up to what its frames said; a frame that
//! never came is named; no minute of a deployment is closed twice. `usage.corrected` adds to the
//! minutes that it names.
//!
//! [`Usage::due`] says what is to be appended; [`Usage::apply`] takes in what has been. So a commit
//! that failed is simply due again.

mod endpoint;
mod frames;
mod hear;
mod holes;
mod idle;
mod minute;
mod pairs;
mod ranges;
mod tell;

use std::collections::BTreeMap;

use contract::events::Event;
use contract::frame::{Frame, FrameHead, Source, SourceKind};
use contract::ids::{EndpointKey, Uid};
use contract::log::Record;
use contract::time::{Span, Timestamp};
use contract::usage::{UsageMinute, UsageSlice};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use endpoint::EndpointUsage;
pub use frames::Boot;
use frames::FrameSet;
use holes::Hole;
use idle::{IdleSpan, hour_of};
use minute::OpenMinute;
pub use ranges::Ranges;
use tell::Events;

/// How long a minute waits, past its end, for members that are silent.
pub const GRACE: Span = Span::from_secs(5);

/// Late frames are gathered for this long before they are told as one correction.
pub const LATE_GATHERED: Span = Span::from_secs(10);

/// State is saved at least this often; so many seconds of frames can be lost with it.
pub const SAVED_EVERY: Span = Span::from_secs(10);

/// A frame from further ahead is counted in the minute that the owner's clock shows: otherwise a
/// source whose clock is wrong would keep minutes open for as long as it is.
const AHEAD_MAX: Span = Span::from_secs(60);

/// A silent source is waited for (by the grace) until it is forgotten.
const MEMBER_SILENT_MAX: Span = Span::from_secs(600);

/// Frames of a start of a source may come again within this time; past it, it is forgotten.
const BOOT_KEPT: Span = Span::from_secs(24 * 3600);

/// So long after the hour it may be that not all deployments without requests have been told of it.
const HOUR_TOLD_WITHIN: Span = Span::from_secs(120);

/// Who counts what is used: requests, and resources. Frames of other sources are told to have come, and
/// are not usage.
const SOURCES: [SourceKind; 2] = [SourceKind::GATEWAY, SourceKind::NODE];

const MINUTE: Span = Span::from_secs(60);
const SECOND: Span = Span::from_secs(1);

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// In a minute that is open.
    InTime,
    /// Its minute was closed: a correction follows.
    Late,
    /// It has been counted before.
    Before,
}

/// Events to append to the usage stream of one endpoint, in one commit.
#[derive(Clone, Debug, PartialEq)]
pub struct Due {
    /// Whose usage it is.
    pub endpoint: EndpointKey,
    /// The version that the stream must have; another has been appended to it if it has not.
    pub expected_version: u64,
    /// In order; not empty.
    pub events: Vec<Event>,
}

/// Changed together with whatever changes what [`EndpointUsage`] makes of recorded events, or how it is written:
/// consumers that keep it in snapshots build their versions on it.
pub const USAGE_VERSION: u32 = 2;

/// The usage of one bucket: minutes that are open, and what has been told of others.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Sources that have joined (by their first frame) and not said goodbye.
    #[serde(with = "pairs")]
    members: BTreeMap<Source, Member>,
    #[serde(with = "pairs")]
    boots: BTreeMap<Boot, Heard>,
    /// By start of the minute. Those before `closed_through` take in no more.
    open: BTreeMap<Timestamp, OpenMinute>,
    /// What came for minutes that took in no more.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    late: BTreeMap<Timestamp, OpenMinute>,
    /// Minutes without a request that are not told yet.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    idle: BTreeMap<EndpointKey, BTreeMap<Uid, IdleSpan>>,
    /// Frames counted in the minutes that are in `idle`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    idle_counted: BTreeMap<Timestamp, FrameSet>,
    holes: Vec<Hole>,
    endpoints: BTreeMap<EndpointKey, EndpointUsage>,
    /// End of the last minute that was closed.
    closed_through: Timestamp,
    /// Another owner has counted what came before; see [`Usage::taken_over`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    since: Option<Timestamp>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Member {
    boot: Uuid,
    /// End of the last second that it has told of.
    through: Timestamp,
    /// Known from saved state; not heard of since.
    restored: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Heard {
    seen: Ranges,
    through: Timestamp,
}

impl Usage {
    /// Takes in a frame of this bucket.
    pub fn count(&mut self, frame: &Frame, now: Timestamp) -> Counted {
        let head = FrameHead::from(frame);
        let boot = boot_of(&head);
        let Some(expected) = self.expected(&boot, &head) else {
            return Counted::Before;
        };
        if head.sequence < expected {
            self.fill(&boot, head.sequence);
        }
        self.note(&boot, &head, frame.goodbye);
        self.add(boot, frame, now)
    }

    /// A frame of this bucket has come, and what it says cannot be read: it is missing.
    pub fn count_unreadable(&mut self, head: &FrameHead) {
        let boot = boot_of(head);
        let expected = self.expected(&boot, head);
        // An earlier one is missing already.
        if expected.is_none_or(|expected| head.sequence < expected) {
            return;
        }
        let (sequence, end) = (head.sequence, head.start + SECOND);
        self.miss(&boot, sequence, sequence, end, None);
        self.note(&boot, head, false);
    }

    /// What is to be appended, by endpoint. Minutes that are over take in no more from here on.
    pub fn due(&mut self, now: Timestamp) -> Vec<Due> {
        self.close(now);
        let busy = self.gather_idle();
        let mut due = Events::new();
        self.tell_idle(&busy, now, &mut due);
        self.tell_minutes(&mut due);
        self.tell_late(now, &mut due);
        for hole in self.holes.iter().filter(|h| self.is_over(h.minute, now)) {
            for (key, endpoint) in &self.endpoints {
                due.entry(key).or_default().extend(hole.gaps(key, endpoint));
            }
        }
        let of_endpoint = |(endpoint, events): (&EndpointKey, Vec<Event>)| Due {
            endpoint: endpoint.clone(),
            expected_version: self.endpoints.get(endpoint).map_or(0, |e| e.version),
            events,
        };
        let told = due.into_iter().filter(|(_, events)| !events.is_empty());
        told.map(of_endpoint).collect()
    }

    /// Takes in an event of the log: also our own, also again.
    pub fn apply(&mut self, record: &Record) {
        let Some(key) = record.endpoint() else {
            return;
        };
        let endpoint = self.endpoints.entry(key.clone()).or_default();
        if endpoint.apply(record) {
            self.apply_usage(&key, &record.event);
        }
    }

    /// Goes on from what was applied of an endpoint's events elsewhere. What open minutes hold of these
    /// events must have been applied.
    pub fn know(&mut self, key: &EndpointKey, endpoint: &EndpointUsage) {
        self.endpoints.insert(key.clone(), endpoint.clone());
    }

    /// Up to which version an endpoint's usage stream has been applied.
    pub fn version(&self, key: &EndpointKey) -> u64 {
        self.endpoints.get(key).map_or(0, EndpointUsage::version)
    }

    /// Lets go of minutes and holes that have been told whole, and of what is too old to matter.
    /// Call it after what was due has been appended.
    pub fn settle(&mut self, now: Timestamp) {
        self.open
            .retain(|minute, open| *minute >= self.closed_through || !open.deployments.is_empty());
        self.late
            .retain(|_, late| !late.is_gathered(now) || !late.deployments.is_empty());
        let holes = std::mem::take(&mut self.holes);
        let is_untold = |hole: &Hole| {
            let mut endpoints = self.endpoints.iter();
            !self.is_over(hole.minute, now)
                || endpoints.any(|(key, endpoint)| !hole.gaps(key, endpoint).is_empty())
        };
        self.holes = holes.into_iter().filter(is_untold).collect();
        self.members.retain(|_, member| {
            // One from saved state is not waited for; it is kept so that its lost tail is named.
            let kept = if member.restored {
                BOOT_KEPT
            } else {
                MEMBER_SILENT_MAX
            };
            now.since(member.through) < kept
        });
        self.boots
            .retain(|_, heard| now.since(heard.through) < BOOT_KEPT);
    }

    /// To be called on state that was saved: what came after it may be lost.
    pub fn restored(mut self) -> Self {
        for member in self.members.values_mut() {
            member.restored = true;
        }
        // Releases before kept what was late beside what was not.
        let late = self
            .open
            .extract_if(.., |_, open| open.late_since.is_some());
        self.late.extend(late);
        self
    }

    /// To be called on what was folded from the log alone, by who takes the bucket over from another
    /// owner. Returns from when on frames are to be counted: everything before has been told. That
    /// is the beginning of the hour that the log has come to, or of the present one where it tells of
    /// no minute, since what had no request is told by the hour.
    pub fn taken_over(&mut self, now: Timestamp) -> Timestamp {
        let told = self.endpoints.values().flat_map(|e| e.deployments.values());
        let reached = told.map(|told| told.last).max().unwrap_or(now);
        let since = hour_of(reached - HOUR_TOLD_WITHIN);
        self.since = Some(since);
        since
    }

    /// Minutes that are still open, but for those of deployments without a request.
    pub fn open_minutes(&self) -> usize {
        self.open.len() + self.late.len()
    }

    /// The start of the first minute that is still open; none if nothing is.
    pub fn oldest_open(&self) -> Option<Timestamp> {
        let minutes = self.open.keys().chain(self.late.keys()).copied();
        let idle = self.idle.values().flat_map(BTreeMap::values);
        minutes.chain(idle.map(|span| span.from)).min()
    }

    /// Deployments that had no request for a while, of which nothing is told yet.
    pub fn idle_deployments(&self) -> usize {
        self.idle.values().map(BTreeMap::len).sum()
    }

    fn is_over(&self, minute: Timestamp, now: Timestamp) -> bool {
        let end = minute + MINUTE;
        let mut members = self.members.values().filter(|m| !m.restored).peekable();
        let all_past = members.peek().is_some() && members.all(|m| m.through >= end);
        all_past || now >= end + GRACE
    }

    fn apply_usage(&mut self, key: &EndpointKey, event: &Event) {
        match event {
            Event::UsageClosed(told) | Event::UsageCorrected(told) => {
                self.cancel(key, told);
            }
            Event::UsageGap(gap) => {
                for hole in &mut self.holes {
                    let same = hole.boot.source == gap.source && hole.boot.boot == gap.boot;
                    // Several gaps of one hole stand in one commit.
                    if same && hole.minute == gap.minute {
                        hole.told.insert(key.clone());
                    }
                }
            }
            _ => {}
        }
    }

    /// Takes away what an event has told, from what it was told of first: what another owner told may be
    /// part of several of ours.
    fn cancel(&mut self, key: &EndpointKey, told: &UsageMinute) {
        let mut left = told.slices.clone();
        let is_late = |late: &OpenMinute| told.counted.iter().any(|r| late.counted.contains(r));
        let mut late = self.late.range(told.minute..told.end());
        if late.any(|(_, late)| is_late(late)) {
            cancel_in(&mut self.late, key, told, &mut left);
        }
        self.cancel_idle(key, told, &mut left);
        cancel_in(&mut self.open, key, told, &mut left);
        cancel_in(&mut self.late, key, told, &mut left);
    }

    fn cancel_idle(&mut self, key: &EndpointKey, told: &UsageMinute, left: &mut [UsageSlice]) {
        let Some(spans) = self.idle.get_mut(key) else {
            return;
        };
        let overlaps = |span: &&mut IdleSpan| span.from < told.end() && told.minute < span.through;
        if let Some(span) = spans.get_mut(&told.deployment_uid).filter(overlaps) {
            minute::cancel(&mut span.slices, left);
            if span.slices.iter().all(UsageSlice::is_empty) {
                spans.remove(&told.deployment_uid);
            }
        }
        if spans.is_empty() {
            self.idle.remove(key);
        }
    }
}

fn cancel_in(
    minutes: &mut BTreeMap<Timestamp, OpenMinute>,
    key: &EndpointKey,
    told: &UsageMinute,
    left: &mut [UsageSlice],
) {
    for (_, minute) in minutes.range_mut(told.minute..told.end()) {
        minute.cancel(key, told.deployment_uid, left);
    }
}

fn boot_of(head: &FrameHead) -> Boot {
    Boot {
        source: head.source.clone(),
        boot: head.boot,
    }
}
