//! The sources of one kind in one bucket: which are members, which seconds are open, and when they
//! close.

use std::collections::BTreeMap;

use contract::frame::{DeploymentFrame, Frame, Source, SourceKind};
use contract::ids::Uid;
use contract::time::{Span, Timestamp};
use uuid::Uuid;

use super::pane::{Coverage, Load, Rings, step_of};
use super::spans::Spans;
use super::{ClosedSecond, Counters, WINDOW_MAX};

/// How much longer than the slowest member's usual delay a second stays open.
pub const GRACE: Span = Span::from_millis(50);
/// The same for a second without any frame: there is nothing to decide on yet, and a short stall of
/// the only member must not become a gap.
const GRACE_WITHOUT_FRAMES: Span = Span::from_millis(2000);
/// A silent member is dropped after this time; until then every second that it lacks is partial.
pub const LOST_AFTER: Span = Span::from_secs(60);
/// Frames further ahead of the owner's clock are skewed.
pub const AHEAD_MAX: Span = Span::from_millis(2000);
/// Frames further behind the owner's clock are skewed.
pub const BEHIND_MAX: Span = Span::from_secs(60);

/// Upper bound of a member's usual delay: frames that were held up and arrive all at once must not
/// make every second wait as long.
const USUAL_DELAY_MAX_MS: u64 = 2000;

/// How long the covered seconds are known one by one: the longest window, and the pane that it begins in.
const COVERED_KEPT_SECONDS: i64 = WINDOW_MAX.secs() as i64 + 120;

const SECOND: Span = Span::from_secs(1);

#[derive(Clone, Debug)]
struct GroupMember {
    boot: Uuid,
    sequence: u64,
    /// The first second it is expected for.
    from: i64,
    /// The last second it sent a frame for.
    last: i64,
    /// Whether its last frame said goodbye.
    has_left: bool,
    /// Usual delay from a second's end to its frame's arrival: a moving average, in ms.
    usual_delay_ms: u64,
}

impl GroupMember {
    fn is_expected(&self, second: i64) -> bool {
        self.from <= second && !(self.has_left && second > self.last)
    }
}

/// How long after it has become ready an instance of a deployment is not measured.
#[derive(Clone, Copy, Debug)]
struct Initialization {
    period: Span,
    /// The first second to which the period applies without exception.
    from: i64,
}

#[derive(Clone, Debug, Default)]
pub(super) struct OpenSecond {
    /// By source, so that the order of merging does not depend on the order of arrival.
    frames: BTreeMap<Source, (u64, Vec<DeploymentFrame>)>,
}

#[derive(Clone, Debug)]
pub(super) struct Group {
    kind: SourceKind,
    members: BTreeMap<Source, GroupMember>,
    pub(super) open: BTreeMap<i64, OpenSecond>,
    /// The last closed second.
    pub(super) closed: Option<i64>,
    pub(super) started: i64,
    pub(super) coverage: Rings<Coverage>,
    /// The seconds that `coverage` counts.
    pub(super) covered: Spans,
    /// The second before which coverage was not refilled; `None` if it never was.
    pub(super) refilled_from: Option<i64>,
    pub(super) loads: BTreeMap<Uid, Rings<Load>>,
    initializations: BTreeMap<Uid, Initialization>,
    /// The first whole second of each deployment, after the one in which it was created.
    pub(super) first_whole: BTreeMap<Uid, i64>,
    pub counters: Counters,
}

impl Group {
    pub fn new(kind: SourceKind, now: Timestamp) -> Self {
        let started = now.secs();
        let longest = WINDOW_MAX.secs() as i64;
        Self {
            kind,
            members: BTreeMap::new(),
            open: BTreeMap::new(),
            closed: None,
            started,
            coverage: Rings::with_all_tiers(started, longest),
            covered: Spans::default(),
            refilled_from: None,
            loads: BTreeMap::new(),
            initializations: BTreeMap::new(),
            first_whole: BTreeMap::new(),
            counters: Counters::default(),
        }
    }

    pub fn members(&self) -> impl Iterator<Item = &Source> {
        self.members.keys()
    }

    /// The first second from which windows of this length are complete; nothing is known before it, not
    /// even zeros.
    pub fn complete_since(&self, deployment: Uid, window_seconds: i64) -> i64 {
        let Some(rings) = self.loads.get(&deployment) else {
            return self.started;
        };
        let since = rings.since(window_seconds);
        let into_pane = since.rem_euclid(step_of(window_seconds));
        // A window includes whole panes, and their coverage counts seconds whose load is not in them.
        match since != i64::MAX && self.covered.overlaps(since - into_pane, since) {
            true => since - into_pane + step_of(window_seconds),
            false => since,
        }
    }

    pub fn closed(&self) -> Option<i64> {
        self.closed
    }

    pub fn coverage(&self) -> &Rings<Coverage> {
        &self.coverage
    }

    pub fn load(&self, deployment: Uid) -> Option<&Rings<Load>> {
        self.loads.get(&deployment)
    }

    pub fn watch(&mut self, deployment: Uid, window_seconds: i64, now: i64) {
        let started = self.started;
        self.loads
            .entry(deployment)
            .or_insert_with(|| Rings::new(started))
            .retain(window_seconds, now);
    }

    pub fn forget(&mut self, deployment: Uid) {
        self.loads.remove(&deployment);
        self.initializations.remove(&deployment);
        self.first_whole.remove(&deployment);
    }

    /// The first whole second of a deployment, before which it had no load that was not measured; the
    /// earliest one if that is not known.
    pub fn first_whole(&self, deployment: Uid) -> i64 {
        self.first_whole
            .get(&deployment)
            .copied()
            .unwrap_or(i64::MIN)
    }

    /// How many seconds from `start` to `end`, before the first whole one of a deployment, were not
    /// measured for windows of this length.
    pub fn unmeasured_before_creation(
        &self,
        deployment: Uid,
        window_seconds: i64,
        (start, end): (i64, i64),
    ) -> i64 {
        let end = end.min(self.first_whole(deployment));
        if end <= start {
            return 0;
        }
        let since = self.complete_since(deployment, window_seconds);
        end - start - self.covered.count(start.max(since), end)
    }

    /// Leaves instances out for this long after they have become ready, from now on.
    pub fn set_initialization_period(&mut self, deployment: Uid, period: Span, now: i64) {
        if self.initialization_period(deployment) == period {
            return;
        }
        let has_data = |rings: &Rings<Load>| !rings.is_empty();
        let from = match self.loads.get(&deployment).is_some_and(has_data) {
            true => now,
            false => i64::MIN,
        };
        self.initializations
            .insert(deployment, Initialization { period, from });
    }

    pub(super) fn initialization_period(&self, deployment: Uid) -> Span {
        let of = self.initializations.get(&deployment);
        of.map_or(Span::ZERO, |of| of.period)
    }

    /// The first second from which all instances are measured with the present initialization period.
    pub fn initialization_from(&self, deployment: Uid) -> i64 {
        let of = self.initializations.get(&deployment);
        of.map_or(i64::MIN, |of| of.from)
    }

    pub fn frame(&mut self, now: Timestamp, frame: &Frame) -> Vec<ClosedSecond> {
        if frame.start > now + AHEAD_MAX || frame.start + BEHIND_MAX < now {
            self.counters.skewed += 1;
            return Vec::new();
        }
        let second = frame.start.secs();
        if !self.update_member(now, frame, second) {
            self.counters.duplicate += 1;
            return Vec::new();
        }
        if self.closed.is_some_and(|closed| second <= closed) {
            self.counters.late += 1;
            // A late goodbye still ends the waiting.
            return self.close_complete();
        }
        let open = self.open.entry(second).or_default();
        let (length_us, deployments) = open.frames.entry(frame.source.clone()).or_default();
        *length_us += frame.length_us;
        deployments.extend(frame.deployments.iter().cloned());
        self.close_complete()
    }

    /// Returns false if the frame is a repeat.
    fn update_member(&mut self, now: Timestamp, frame: &Frame, second: i64) -> bool {
        let delay_ms = now
            .since(frame.start + SECOND)
            .millis()
            .min(USUAL_DELAY_MAX_MS);
        let Some(member) = self.members.get_mut(&frame.source) else {
            let member = GroupMember {
                boot: frame.boot,
                sequence: frame.sequence,
                from: second,
                last: second,
                has_left: frame.goodbye,
                usual_delay_ms: delay_ms,
            };
            self.members.insert(frame.source.clone(), member);
            return true;
        };
        if member.boot == frame.boot && frame.sequence <= member.sequence {
            return false;
        }
        if member.has_left && member.boot != frame.boot {
            member.from = second;
        }
        member.boot = frame.boot;
        member.sequence = frame.sequence;
        member.last = member.last.max(second);
        member.has_left = frame.goodbye;
        member.usual_delay_ms = (member.usual_delay_ms * 7 + delay_ms) / 8;
        true
    }

    /// Closes the seconds that every expected member has sent, and all before them: a source sends
    /// in order, so a frame that has not arrived by then was never sent.
    fn close_complete(&mut self) -> Vec<ClosedSecond> {
        let complete = self.open.iter().rev().find(|(second, open)| {
            self.members
                .iter()
                .filter(|(_, member)| member.is_expected(**second))
                .all(|(source, _)| open.frames.contains_key(source))
        });
        match complete {
            Some((second, _)) => self.close_up_to(*second),
            None => Vec::new(),
        }
    }

    pub fn tick(&mut self, now: Timestamp) -> Vec<ClosedSecond> {
        let mut closed = Vec::new();
        while let Some((second, deadline)) = self.next_close() {
            if deadline > now {
                break;
            }
            closed.extend(self.close_up_to(second));
        }
        closed
    }

    pub fn next_deadline(&self) -> Option<Timestamp> {
        self.next_close().map(|(_, deadline)| deadline)
    }

    /// The next second to close without waiting any longer, and when.
    fn next_close(&self) -> Option<(i64, Timestamp)> {
        let slowest = self
            .members
            .values()
            .filter(|member| !member.has_left)
            .map(|member| member.usual_delay_ms)
            .max();
        let has_open = !self.open.is_empty();
        let slowest = match slowest {
            Some(slowest) => slowest,
            None if has_open => 0,
            None => return None,
        };
        let second = match self.closed {
            Some(closed) => closed + 1,
            None => *self.open.keys().next()?,
        };
        let grace = if self.open.contains_key(&second) {
            GRACE
        } else {
            GRACE_WITHOUT_FRAMES
        };
        let end = Timestamp::from_secs(second + 1);
        Some((second, end + Span::from_millis(slowest) + grace))
    }

    fn close_up_to(&mut self, last: i64) -> Vec<ClosedSecond> {
        let next = match (self.closed, self.open.keys().next()) {
            (Some(closed), _) => closed + 1,
            (None, Some(open)) => *open,
            (None, None) => last,
        };
        // After a long silence of all members, the seconds in between stay unmeasured and
        // unreported.
        let first = next.max(last - 2 * LOST_AFTER.secs() as i64);
        (first..=last).map(|second| self.close(second)).collect()
    }

    fn close(&mut self, second: i64) -> ClosedSecond {
        let open = self.open.remove(&second).unwrap_or_default();
        self.drop_lost_members(second);
        let missing: Vec<Source> = self
            .members
            .iter()
            .filter(|(source, member)| {
                member.is_expected(second) && !open.frames.contains_key(*source)
            })
            .map(|(source, _)| source.clone())
            .collect();
        let empty = open.frames.is_empty();
        let length_us = open.frames.values().map(|(length, _)| *length).max();
        let coverage = Coverage {
            seconds: u32::from(!empty),
            length_us: length_us.unwrap_or(0),
            partial_seconds: u32::from(!missing.is_empty()),
        };
        self.coverage.add(second, &coverage);
        if !empty {
            self.covered.push_back(second, second + 1);
            self.covered.trim(second - COVERED_KEPT_SECONDS);
        }
        self.add_loads(second, &open);
        self.closed = Some(second);
        self.members
            .retain(|_, member| !(member.has_left && member.last <= second));
        ClosedSecond {
            kind: self.kind.clone(),
            start: Timestamp::from_secs(second),
            missing,
            empty,
        }
    }

    fn add_loads(&mut self, second: i64, open: &OpenSecond) {
        let mut sums: BTreeMap<Uid, Load> = BTreeMap::new();
        for (length_us, deployments) in open.frames.values() {
            for frame in deployments {
                let sum = sums.entry(frame.deployment_uid).or_default();
                let period = self.initialization_period(frame.deployment_uid);
                sum.add(frame, *length_us, period.millis() * 1000);
            }
        }
        let started = self.started;
        for (deployment, sum) in sums {
            self.loads
                .entry(deployment)
                .or_insert_with(|| Rings::new(started))
                .add(second, &sum);
        }
    }

    fn drop_lost_members(&mut self, second: i64) {
        let before = self.members.len();
        self.members.retain(|_, member| {
            member.has_left || second - member.last <= LOST_AFTER.secs() as i64
        });
        self.counters.lost += (before - self.members.len()) as u64;
    }
}
