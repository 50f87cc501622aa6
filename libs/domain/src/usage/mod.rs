//! Usage of the endpoints of one bucket: frames in, closed minutes and named gaps out.
//!
//! Invariants: each frame is counted once per endpoint, however often it comes and whoever counted
//! it before; what the events of an endpoint say adds up to what its frames said; a frame that
//! never came is named. `usage.corrected` adds to the minute that it names.
//!
//! [`Usage::due`] says what is to be appended and changes nothing; [`Usage::apply`] takes in what
//! has been. So a commit that failed is simply due again.

mod minute;
mod pairs;
mod ranges;

use std::collections::{BTreeMap, BTreeSet};

use contract::events::Event;
use contract::frame::{Frame, Source};
use contract::ids::{EndpointKey, Uid};
use contract::log::{Record, StreamKind};
use contract::time::{Span, Timestamp};
use contract::usage::{FrameRange, UsageGap, UsageMinute};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use minute::{OpenMinute, minute_of};
pub use ranges::Ranges;

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

const MINUTE: Span = Span::from_secs(60);
const SECOND: Span = Span::from_secs(1);

/// One start of a source: what sequences are counted in.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Boot {
    pub source: Source,
    pub boot: Uuid,
}

impl Boot {
    fn range(&self, first: u64, last: u64) -> FrameRange {
        FrameRange {
            source: self.source.clone(),
            boot: self.boot,
            first,
            last,
        }
    }
}

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
    pub endpoint: EndpointKey,
    pub expected_version: u64,
    pub events: Vec<Event>,
}

/// Changed together with whatever changes what [`Endpoint`] makes of recorded events, or how it is written:
/// consumers that keep it in snapshots build their versions on it.
pub const USAGE_VERSION: u32 = 1;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Sources that have joined (by their first frame) and not said goodbye.
    #[serde(with = "pairs")]
    members: BTreeMap<Source, Member>,
    #[serde(with = "pairs")]
    boots: BTreeMap<Boot, Heard>,
    /// By start of the minute.
    open: BTreeMap<Timestamp, OpenMinute>,
    holes: Vec<Hole>,
    endpoints: BTreeMap<EndpointKey, Endpoint>,
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

/// Frames that did not come, before one that did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Hole {
    boot: Boot,
    missing: Ranges,
    /// The minute of the last of them.
    minute: Timestamp,
    /// Endpoints in whose streams it stands already.
    told: BTreeSet<EndpointKey>,
}

/// What the log says about the usage of one endpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Endpoint {
    alive: bool,
    /// Version of its usage stream.
    version: u64,
    /// Frames counted by events of its usage stream, and the last minute in which.
    #[serde(with = "pairs")]
    counted: BTreeMap<Boot, (Ranges, Timestamp)>,
    /// Last minute closed, by deployment.
    closed: BTreeMap<Uid, Timestamp>,
}

impl Endpoint {
    /// Applies an event of the endpoint; false: it has been applied before, or is of no concern.
    pub fn apply(&mut self, record: &Record) -> bool {
        let usage = record.stream.kind() == Some(StreamKind::Usage);
        match &record.event {
            Event::EndpointCreated(_) => self.alive = true,
            Event::EndpointDeleted(_) => self.alive = false,
            event if usage => {
                if record.version <= self.version {
                    return false;
                }
                self.version = record.version;
                if let Event::UsageClosed(told) | Event::UsageCorrected(told) = event {
                    self.apply_minute(told);
                }
            }
            _ => return false,
        }
        true
    }

    fn apply_minute(&mut self, told: &UsageMinute) {
        let closed = self.closed.entry(told.deployment_uid).or_default();
        *closed = (*closed).max(told.minute);
        for range in &told.counted {
            let boot = Boot {
                source: range.source.clone(),
                boot: range.boot,
            };
            let (counted, last) = self.counted.entry(boot).or_default();
            counted.insert(range.first, range.last);
            *last = (*last).max(told.minute);
        }
        self.counted
            .retain(|_, (_, last)| told.minute.since(*last) < BOOT_KEPT);
        self.closed
            .retain(|_, last| told.minute.since(*last) < BOOT_KEPT);
    }

    /// Version of its usage stream, as far as it was applied.
    pub fn version(&self) -> u64 {
        self.version
    }
}

impl Usage {
    /// Takes in a frame of this bucket.
    pub fn count(&mut self, frame: &Frame, now: Timestamp) -> Counted {
        let boot = Boot {
            source: frame.source.clone(),
            boot: frame.boot,
        };
        let first = self.first_expected(&boot, frame);
        let heard = self.boots.entry(boot.clone()).or_default();
        if heard.seen.contains(frame.sequence) {
            return Counted::Before;
        }
        let expected = heard.seen.last().map_or(first, |last| last + 1);
        heard.seen.insert(frame.sequence, frame.sequence);
        heard.through = heard.through.max(frame.start + SECOND);
        if frame.sequence > expected {
            self.miss(boot.clone(), expected, frame.sequence - 1, frame.start);
        } else if frame.sequence < expected {
            self.fill(&boot, frame.sequence);
        }
        self.meet(frame);
        self.add(boot, frame, now)
    }

    /// What is to be appended, by endpoint.
    pub fn due(&self, now: Timestamp) -> Vec<Due> {
        let mut due: BTreeMap<&EndpointKey, Vec<Event>> = BTreeMap::new();
        for (minute, open) in self.ready(now) {
            for (endpoint, deployments) in &open.deployments {
                // A frame that an earlier event has told is counted for others only.
                let told = self.endpoints.get(endpoint).map(|known| &known.counted);
                let frames = open.frames_without(|boot| Some(&told?.get(boot)?.0));
                for (uid, sums) in deployments {
                    let told = open.tell(*minute, *uid, sums, &frames);
                    let events = self.as_events(endpoint, *minute, *uid, told);
                    due.entry(endpoint).or_default().extend(events);
                }
            }
        }
        for hole in self.holes.iter().filter(|h| self.is_ready(h.minute, now)) {
            for (endpoint, gaps) in self.gaps(hole) {
                due.entry(endpoint).or_default().extend(gaps);
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
    pub fn know(&mut self, key: &EndpointKey, endpoint: &Endpoint) {
        self.endpoints.insert(key.clone(), endpoint.clone());
    }

    /// Up to which version an endpoint's usage stream has been applied.
    pub fn version(&self, key: &EndpointKey) -> u64 {
        self.endpoints.get(key).map_or(0, Endpoint::version)
    }

    /// Lets go of minutes and holes that have been told whole, and of what is too old to matter.
    /// Call it after what was due has been appended.
    pub fn settle(&mut self, now: Timestamp) {
        let ready: Vec<Timestamp> = self.ready(now).map(|(minute, _)| *minute).collect();
        for minute in ready {
            if self.open[&minute].deployments.is_empty() {
                self.open.remove(&minute);
                self.closed_through = self.closed_through.max(minute + MINUTE);
            }
        }
        let holes = std::mem::take(&mut self.holes);
        let untold = |hole: &Hole| !self.is_ready(hole.minute, now) || !self.gaps(hole).is_empty();
        self.holes = holes.into_iter().filter(untold).collect();
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
        self
    }

    /// To be called on what was folded from the log alone, by who takes the bucket over from another
    /// owner. Returns from when on frames are to be counted: everything before has been told. Where
    /// the log tells of no minute, that is now.
    pub fn taken_over(&mut self, now: Timestamp) -> Timestamp {
        let closed = self.endpoints.values().flat_map(|e| e.closed.values());
        let since = closed.max().map_or(now, |minute| *minute + MINUTE);
        self.since = Some(since);
        since
    }

    /// The first sequence of a boot that should come, if none has come yet.
    fn first_expected(&self, boot: &Boot, frame: &Frame) -> u64 {
        let Some(since) = self.since else {
            return 0;
        };
        let ours = match frame.start > since {
            true => frame.start.since(since).secs(),
            false => 0,
        };
        let counted = self.endpoints.values().filter_map(|e| e.counted.get(boot));
        let told = counted.filter_map(|(ranges, _)| ranges.last()).max();
        let told = told.map_or(0, |last| last + 1);
        frame
            .sequence
            .saturating_sub(ours)
            .max(told)
            .min(frame.sequence)
    }

    /// Minutes that are still open.
    pub fn open_minutes(&self) -> usize {
        self.open.len()
    }

    fn ready(&self, now: Timestamp) -> impl Iterator<Item = (&Timestamp, &OpenMinute)> {
        self.open
            .iter()
            .filter(move |(minute, open)| match open.late_since {
                Some(since) => now >= since + LATE_GATHERED,
                None => self.is_ready(**minute, now),
            })
    }

    fn is_ready(&self, minute: Timestamp, now: Timestamp) -> bool {
        let end = minute + MINUTE;
        let mut members = self.members.values().filter(|m| !m.restored).peekable();
        let all_past = members.peek().is_some() && members.all(|m| m.through >= end);
        all_past || now >= end + GRACE
    }

    fn as_events(
        &self,
        endpoint: &EndpointKey,
        minute: Timestamp,
        uid: Uid,
        told: Vec<UsageMinute>,
    ) -> Vec<Event> {
        let closed = self
            .endpoints
            .get(endpoint)
            .and_then(|e| e.closed.get(&uid));
        let late = minute < self.closed_through || closed.is_some_and(|closed| minute <= *closed);
        let event = |(index, data): (usize, UsageMinute)| {
            if late || index > 0 {
                Event::UsageCorrected(data)
            } else {
                Event::UsageClosed(data)
            }
        };
        told.into_iter().enumerate().map(event).collect()
    }

    /// What a hole means to each endpoint that does not know of it yet. A frame that an earlier
    /// owner has counted for an endpoint is not missing there.
    fn gaps(&self, hole: &Hole) -> Vec<(&EndpointKey, Vec<Event>)> {
        let mut gaps = Vec::new();
        for (key, endpoint) in &self.endpoints {
            if !endpoint.alive || hole.told.contains(key) {
                continue;
            }
            let counted = endpoint.counted.get(&hole.boot);
            let missing = match counted {
                Some((counted, _)) => hole.missing.without(counted),
                None => hole.missing.clone(),
            };
            let gap = |(first, last)| {
                Event::UsageGap(UsageGap {
                    minute: hole.minute,
                    source: hole.boot.source.clone(),
                    boot: hole.boot.boot,
                    first,
                    last,
                })
            };
            let events: Vec<Event> = missing.iter().map(gap).collect();
            if !events.is_empty() {
                gaps.push((key, events));
            }
        }
        gaps
    }

    fn apply_usage(&mut self, key: &EndpointKey, event: &Event) {
        match event {
            Event::UsageClosed(told) | Event::UsageCorrected(told) => {
                if let Some(open) = self.open.get_mut(&told.minute) {
                    open.subtract(key, told);
                }
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

    /// Notes frames that should have come before one that starts at `before`.
    fn miss(&mut self, boot: Boot, first: u64, last: u64, before: Timestamp) {
        let last_second = Timestamp::from_millis(before.millis() - SECOND.millis() as i64);
        self.holes.push(Hole {
            boot,
            missing: Ranges::of(first, last),
            minute: minute_of(last_second),
            told: BTreeSet::new(),
        });
    }

    /// A frame came after one that follows it.
    fn fill(&mut self, boot: &Boot, sequence: u64) {
        for hole in self.holes.iter_mut().filter(|hole| hole.boot == *boot) {
            hole.missing.remove(sequence);
        }
        self.holes.retain(|hole| !hole.missing.is_empty());
    }

    fn meet(&mut self, frame: &Frame) {
        let through = frame.start + SECOND;
        let Some(member) = self.members.get_mut(&frame.source) else {
            if !frame.goodbye {
                let member = Member {
                    boot: frame.boot,
                    through,
                    restored: false,
                };
                self.members.insert(frame.source.clone(), member);
            }
            return;
        };
        if member.boot == frame.boot {
            member.through = member.through.max(through);
            member.restored = false;
            if frame.goodbye {
                self.members.remove(&frame.source);
            }
            return;
        }
        if through <= member.through {
            // A straggler of an earlier start.
            return;
        }
        let before = std::mem::replace(
            member,
            Member {
                boot: frame.boot,
                through,
                restored: false,
            },
        );
        if before.restored {
            self.miss_tail(frame, &before);
        }
        if frame.goodbye {
            self.members.remove(&frame.source);
        }
    }

    /// A source has started anew while we were away, without a goodbye. What it sent after our
    /// state was saved is lost with it: at most what fits between two saves.
    fn miss_tail(&mut self, frame: &Frame, before: &Member) {
        let boot = Boot {
            source: frame.source.clone(),
            boot: before.boot,
        };
        let Some(last) = self.boots.get(&boot).and_then(|heard| heard.seen.last()) else {
            return;
        };
        let lost = frame
            .start
            .since(before.through)
            .secs()
            .min(SAVED_EVERY.secs());
        if lost > 0 {
            let end = before.through + Span::from_secs(lost);
            self.miss(boot, last + 1, last + lost, end);
        }
    }

    fn add(&mut self, boot: Boot, frame: &Frame, now: Timestamp) -> Counted {
        let ahead = frame.start.since(now) > AHEAD_MAX;
        let start = if ahead { now } else { frame.start };
        let minute = minute_of(start);
        let late = minute + MINUTE <= self.closed_through;
        let open = self.open.entry(minute).or_insert_with(|| OpenMinute {
            late_since: late.then_some(now),
            ..OpenMinute::default()
        });
        for deployment in &frame.deployments {
            let endpoint = self.endpoints.get(&deployment.endpoint);
            let counted = endpoint.and_then(|endpoint| endpoint.counted.get(&boot));
            if counted.is_none_or(|(counted, _)| !counted.contains(frame.sequence)) {
                open.add(start, deployment);
            }
        }
        let counted = open.counted.entry(boot).or_default();
        counted.insert(frame.sequence, frame.sequence);
        if late { Counted::Late } else { Counted::InTime }
    }
}
