//! What comes: which frame it is, which of them are missing, who sends them, and which minute they count
//! in.

use std::collections::BTreeSet;

use contract::frame::{Frame, FrameHead};
use contract::time::{Span, Timestamp};

use super::frames::Boot;
use super::holes::Hole;
use super::minute::{OpenMinute, minute_of};
use super::ranges::Ranges;
use super::{AHEAD_MAX, Counted, Member, SAVED_EVERY, SECOND, SOURCES, Usage};

impl Usage {
    /// The sequence that was to come next, if this one has not come before. What lies between them is
    /// missing from now on.
    pub(super) fn expected(&mut self, boot: &Boot, head: &FrameHead) -> Option<u64> {
        let heard = self.boots.get(boot).map(|heard| &heard.seen);
        if heard.is_some_and(|seen| seen.contains(head.sequence)) {
            return None;
        }
        let (expected, heard_before) = match heard.and_then(Ranges::last) {
            Some(last) => (last + 1, None),
            None => self.first_expected(boot, head),
        };
        if head.sequence > expected {
            let last = head.sequence - 1;
            self.miss(boot, expected, last, head.start, heard_before);
        }
        Some(expected)
    }

    /// The first sequence of a boot that should come, if none has come yet, and up to where a
    /// predecessor has heard the boot.
    fn first_expected(&self, boot: &Boot, head: &FrameHead) -> (u64, Option<u64>) {
        let Some(since) = self.since else {
            return (0, None);
        };
        let ours = head.start.since(since).secs();
        let counted = self.endpoints.values();
        let heard = counted.filter_map(|e| e.last_counted(boot)).max();
        (head.sequence.saturating_sub(ours), heard)
    }

    /// Notes frames that should have come before one that starts at `before`.
    pub(super) fn miss(
        &mut self,
        boot: &Boot,
        first: u64,
        last: u64,
        before: Timestamp,
        heard_before: Option<u64>,
    ) {
        self.holes.push(Hole {
            boot: boot.clone(),
            missing: Ranges::of(first, last),
            minute: minute_of(before - SECOND),
            told: BTreeSet::new(),
            heard_before,
        });
    }

    /// A frame came after one that follows it.
    pub(super) fn fill(&mut self, boot: &Boot, sequence: u64) {
        for hole in self.holes.iter_mut().filter(|hole| hole.boot == *boot) {
            hole.missing.remove(sequence);
        }
        self.holes.retain(|hole| !hole.missing.is_empty());
    }

    /// Notes that a frame has come.
    pub(super) fn note(&mut self, boot: &Boot, head: &FrameHead, goodbye: bool) {
        let heard = self.boots.entry(boot.clone()).or_default();
        heard.seen.insert(head.sequence, head.sequence);
        heard.through = heard.through.max(head.start + SECOND);
        self.meet(head, goodbye);
    }

    fn meet(&mut self, head: &FrameHead, goodbye: bool) {
        let through = head.start + SECOND;
        let Some(member) = self.members.get_mut(&head.source) else {
            if !goodbye {
                let member = Member {
                    boot: head.boot,
                    through,
                    restored: false,
                };
                self.members.insert(head.source.clone(), member);
            }
            return;
        };
        if member.boot == head.boot {
            member.through = member.through.max(through);
            member.restored = false;
            if goodbye {
                self.members.remove(&head.source);
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
                boot: head.boot,
                through,
                restored: false,
            },
        );
        if before.restored {
            self.miss_tail(head, &before);
        }
        if goodbye {
            self.members.remove(&head.source);
        }
    }

    /// A source has started anew while we were away, without a goodbye. What it sent after our
    /// state was saved is lost with it: at most what fits between two saves.
    fn miss_tail(&mut self, head: &FrameHead, before: &Member) {
        let boot = Boot {
            source: head.source.clone(),
            boot: before.boot,
        };
        let Some(last) = self.boots.get(&boot).and_then(|heard| heard.seen.last()) else {
            return;
        };
        let lost = head
            .start
            .since(before.through)
            .secs()
            .min(SAVED_EVERY.secs());
        if lost > 0 {
            let end = before.through + Span::from_secs(lost);
            self.miss(&boot, last + 1, last + lost, end, None);
        }
    }

    pub(super) fn add(&mut self, boot: Boot, frame: &Frame, now: Timestamp) -> Counted {
        let ahead = frame.start.since(now) > AHEAD_MAX;
        let start = if ahead { now } else { frame.start };
        let minute = minute_of(start);
        let late = minute < self.closed_through;
        let open = match late {
            true => self.late.entry(minute).or_insert_with(|| OpenMinute {
                late_since: Some(now),
                ..OpenMinute::default()
            }),
            false => self.open.entry(minute).or_default(),
        };
        let counts = SOURCES.contains(&frame.source.kind);
        for deployment in frame.deployments.iter().filter(|_| counts) {
            let endpoint = self.endpoints.get(&deployment.endpoint);
            let told = endpoint.and_then(|endpoint| endpoint.counted(deployment.deployment_uid));
            if told.is_none_or(|told| !told.contains(&boot, frame.sequence)) {
                open.add(start, frame.length_us, deployment);
            }
        }
        open.counted.insert(boot, frame.sequence);
        if late { Counted::Late } else { Counted::InTime }
    }
}
