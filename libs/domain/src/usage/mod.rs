//! Usage of the endpoints of one bucket: frames in, closed minutes and identified gaps out.
//!
//! A minute with a request is reported once it has ended. Minutes without one are collected per
//! deployment and reported in one event, when the hour (in UTC) ends or a minute with a request
//! follows.
//!
//! Invariants: each frame is counted once per deployment, however often it arrives and whoever
//! counted it before; a deployment's events add up to what its frames reported; a frame that never
//! arrived is identified; no minute of a deployment is closed twice. `usage.corrected` adds to the
//! minutes that it names.
//!
//! [`Usage::due`] returns what to append; [`Usage::apply`] applies what was appended. So what a
//! failed commit contained is simply due again.

mod endpoint;
mod frames;
mod gaps;
mod idle;
mod ingest;
mod minute;
mod pairs;
mod ranges;
mod report;

use std::collections::BTreeMap;

use contract::events::Event;
use contract::frame::{Frame, FrameHeader, Source, SourceKind};
use contract::ids::{EndpointKey, Uid};
use contract::log::Record;
use contract::time::{Span, Timestamp};
use contract::usage::{UsageMinute, UsageSlice};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use endpoint::EndpointUsage;
pub use frames::Boot;
use frames::FrameSet;
use gaps::Gap;
use idle::{IdleSpan, hour_of};
use minute::OpenMinute;
pub use ranges::Ranges;
use report::DueEvents;

/// How long past its end a minute waits for silent members.
pub const GRACE: Span = Span::from_secs(5);

/// How long late frames are collected before one correction reports them.
pub const LATE_FLUSH_DELAY: Span = Span::from_secs(10);

/// State is saved at least this often; a crash can lose this many seconds of frames.
pub const SAVE_INTERVAL: Span = Span::from_secs(10);

/// A frame from further ahead is counted in the current minute of the owner's clock: otherwise a
/// source whose clock is wrong would keep minutes open for as long as it is off.
const AHEAD_MAX: Span = Span::from_secs(60);

/// How long minutes wait for a silent source (by the grace period) before it is forgotten.
const MEMBER_SILENT_MAX: Span = Span::from_secs(600);

/// How long after a start of a source its frames may arrive again; past it, the start is forgotten.
const BOOT_RETENTION: Span = Span::from_secs(24 * 3600);

/// How long after an hour some deployments without requests may not have been reported for it yet.
const HOUR_REPORTED_WITHIN: Span = Span::from_secs(120);

/// Kinds of sources that measure usage: requests and resources. Frames of other sources are
/// recorded as received and are not usage.
const SOURCES: [SourceKind; 2] = [SourceKind::GATEWAY, SourceKind::NODE];

const MINUTE: Span = Span::from_secs(60);
const SECOND: Span = Span::from_secs(1);

/// How a frame was counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameOutcome {
    /// In an open minute.
    InTime,
    /// In a minute that is already closed: a correction follows.
    Late,
    /// Not at all: it has been counted before.
    Duplicate,
}

/// Events to append to the usage stream of one endpoint, in one commit.
#[derive(Clone, Debug, PartialEq)]
pub struct PendingUsage {
    /// The endpoint.
    pub endpoint: EndpointKey,
    /// The version that the stream must have; any other means that another writer has appended to
    /// it.
    pub expected_version: u64,
    /// In order; never empty.
    pub events: Vec<Event>,
}

/// Version of [`EndpointUsage`]. Raise it with any change to what it makes of recorded events or to
/// its serialized form; consumers that snapshot it derive their versions from it.
pub const USAGE_VERSION: u32 = 2;

/// The usage of one bucket: open minutes, and what has been recorded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Sources that have sent a frame and not said goodbye.
    #[serde(with = "pairs")]
    members: BTreeMap<Source, MemberState>,
    #[serde(with = "pairs")]
    boots: BTreeMap<Boot, BootProgress>,
    /// By start of the minute. Those before `closed_through` are closed.
    open: BTreeMap<Timestamp, OpenMinute>,
    /// Frames that arrived after their minute was closed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    late: BTreeMap<Timestamp, OpenMinute>,
    /// Minutes without a request that are not reported yet.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    idle: BTreeMap<EndpointKey, BTreeMap<Uid, IdleSpan>>,
    /// Frames counted in the minutes in `idle`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    idle_counted: BTreeMap<Timestamp, FrameSet>,
    #[serde(rename = "holes")]
    gaps: Vec<Gap>,
    endpoints: BTreeMap<EndpointKey, EndpointUsage>,
    /// End of the last closed minute.
    closed_through: Timestamp,
    /// Set after a takeover: another owner has counted everything before. See
    /// [`Usage::taken_over`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    since: Option<Timestamp>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct MemberState {
    boot: Uuid,
    /// End of the last second that it reported.
    through: Timestamp,
    /// Loaded from saved state, and not heard from since.
    restored: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct BootProgress {
    seen: Ranges,
    through: Timestamp,
}

impl Usage {
    /// Counts a frame of this bucket.
    pub fn count(&mut self, frame: &Frame, now: Timestamp) -> FrameOutcome {
        let head = FrameHeader::from(frame);
        let boot = boot_of(&head);
        let Some(expected) = self.expected(&boot, &head) else {
            return FrameOutcome::Duplicate;
        };
        if head.sequence < expected {
            self.fill_gap(&boot, head.sequence);
        }
        self.mark_received(&boot, &head, frame.goodbye);
        self.add(boot, frame, now)
    }

    /// Counts a frame of this bucket whose content cannot be read as missing.
    pub fn count_unreadable(&mut self, head: &FrameHeader) {
        let boot = boot_of(head);
        let expected = self.expected(&boot, head);
        // An earlier one is already missing.
        if expected.is_none_or(|expected| head.sequence < expected) {
            return;
        }
        let (sequence, end) = (head.sequence, head.start + SECOND);
        self.record_missing(&boot, sequence, sequence, end, None);
        self.mark_received(&boot, head, false);
    }

    /// Returns what to append, by endpoint, and closes minutes that have ended.
    pub fn due(&mut self, now: Timestamp) -> Vec<PendingUsage> {
        self.close(now);
        let busy = self.collect_idle();
        let mut due = DueEvents::new();
        self.report_idle(&busy, now, &mut due);
        self.report_minutes(&mut due);
        self.report_late(now, &mut due);
        for gap in self.gaps.iter().filter(|g| self.is_over(g.minute, now)) {
            for (key, endpoint) in &self.endpoints {
                due.entry(key)
                    .or_default()
                    .extend(gap.due_events(key, endpoint));
            }
        }
        let of_endpoint = |(endpoint, events): (&EndpointKey, Vec<Event>)| PendingUsage {
            endpoint: endpoint.clone(),
            expected_version: self.endpoints.get(endpoint).map_or(0, |e| e.version),
            events,
        };
        let nonempty = due.into_iter().filter(|(_, events)| !events.is_empty());
        nonempty.map(of_endpoint).collect()
    }

    /// Applies an event of the log, including our own and repeated ones.
    pub fn apply(&mut self, record: &Record) {
        let Some(key) = record.endpoint() else {
            return;
        };
        let endpoint = self.endpoints.entry(key.clone()).or_default();
        if endpoint.apply(record) {
            self.apply_usage(&key, &record.event);
        }
    }

    /// Restores an endpoint from events that were applied elsewhere. Whatever open minutes contain
    /// of these events must have been applied.
    pub fn restore_endpoint(&mut self, key: &EndpointKey, endpoint: &EndpointUsage) {
        self.endpoints.insert(key.clone(), endpoint.clone());
    }

    /// The version up to which an endpoint's usage stream has been applied.
    pub fn version(&self, key: &EndpointKey) -> u64 {
        self.endpoints.get(key).map_or(0, EndpointUsage::version)
    }

    /// Drops minutes and gaps that have been fully recorded, and whatever is too old to matter.
    /// Call it after what was due has been appended.
    pub fn prune(&mut self, now: Timestamp) {
        self.open
            .retain(|minute, open| *minute >= self.closed_through || !open.deployments.is_empty());
        self.late
            .retain(|_, late| !late.is_flushable(now) || !late.deployments.is_empty());
        let gaps = std::mem::take(&mut self.gaps);
        let is_unreported = |gap: &Gap| {
            let mut endpoints = self.endpoints.iter();
            !self.is_over(gap.minute, now)
                || endpoints.any(|(key, endpoint)| !gap.due_events(key, endpoint).is_empty())
        };
        self.gaps = gaps.into_iter().filter(is_unreported).collect();
        self.members.retain(|_, member| {
            // A member from saved state is not waited for; it is kept so that its lost tail can be
            // identified.
            let kept = if member.restored {
                BOOT_RETENTION
            } else {
                MEMBER_SILENT_MAX
            };
            now.since(member.through) < kept
        });
        self.boots
            .retain(|_, progress| now.since(progress.through) < BOOT_RETENTION);
    }

    /// Call this on state that was loaded: frames received after it was saved may be lost.
    pub fn restored(mut self) -> Self {
        for member in self.members.values_mut() {
            member.restored = true;
        }
        // Earlier releases kept late minutes among the open ones.
        let late = self
            .open
            .extract_if(.., |_, open| open.late_since.is_some());
        self.late.extend(late);
        self
    }

    /// Call this on state that was folded from the log alone, when taking the bucket over from
    /// another owner. Returns the instant from which to count frames: everything before has been
    /// reported. That is the start of the hour that the log has reached, or of the current hour if
    /// the log contains no minute, because minutes without a request are reported by the hour.
    pub fn taken_over(&mut self, now: Timestamp) -> Timestamp {
        let recorded = self.endpoints.values().flat_map(|e| e.deployments.values());
        let reached = recorded.map(|recorded| recorded.last).max().unwrap_or(now);
        let since = hour_of(reached - HOUR_REPORTED_WITHIN);
        self.since = Some(since);
        since
    }

    /// The number of open minutes, not counting those of deployments without a request.
    pub fn open_minutes(&self) -> usize {
        self.open.len() + self.late.len()
    }

    /// The start of the first minute that is still open; none if nothing is.
    pub fn oldest_open(&self) -> Option<Timestamp> {
        let minutes = self.open.keys().chain(self.late.keys()).copied();
        let idle = self.idle.values().flat_map(BTreeMap::values);
        minutes.chain(idle.map(|span| span.from)).min()
    }

    /// The number of deployments with minutes without a request that are not reported yet.
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
            Event::UsageClosed(recorded) | Event::UsageCorrected(recorded) => {
                self.cancel(key, recorded);
            }
            Event::UsageGap(recorded) => {
                for gap in &mut self.gaps {
                    let same = gap.boot.source == recorded.source && gap.boot.boot == recorded.boot;
                    // A commit may hold several events for one gap.
                    if same && gap.minute == recorded.minute {
                        gap.recorded.insert(key.clone());
                    }
                }
            }
            _ => {}
        }
    }

    /// Subtracts what an event recorded, starting with the minutes it was reported from: what
    /// another owner reported may span several of ours.
    fn cancel(&mut self, key: &EndpointKey, recorded: &UsageMinute) {
        let mut left = recorded.slices.clone();
        let is_late = |late: &OpenMinute| recorded.counted.iter().any(|r| late.counted.contains(r));
        let mut late = self.late.range(recorded.minute..recorded.end());
        if late.any(|(_, late)| is_late(late)) {
            cancel_in(&mut self.late, key, recorded, &mut left);
        }
        self.cancel_idle(key, recorded, &mut left);
        cancel_in(&mut self.open, key, recorded, &mut left);
        cancel_in(&mut self.late, key, recorded, &mut left);
    }

    fn cancel_idle(&mut self, key: &EndpointKey, recorded: &UsageMinute, left: &mut [UsageSlice]) {
        let Some(spans) = self.idle.get_mut(key) else {
            return;
        };
        let overlaps =
            |span: &&mut IdleSpan| span.from < recorded.end() && recorded.minute < span.through;
        if let Some(span) = spans.get_mut(&recorded.deployment_uid).filter(overlaps) {
            minute::cancel(&mut span.slices, left);
            if span.slices.iter().all(UsageSlice::is_empty) {
                spans.remove(&recorded.deployment_uid);
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
    recorded: &UsageMinute,
    left: &mut [UsageSlice],
) {
    for (_, minute) in minutes.range_mut(recorded.minute..recorded.end()) {
        minute.cancel(key, recorded.deployment_uid, left);
    }
}

fn boot_of(head: &FrameHeader) -> Boot {
    Boot {
        source: head.source.clone(),
        boot: head.boot,
    }
}
