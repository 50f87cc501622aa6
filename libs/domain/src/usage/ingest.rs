//! Receiving frames: which ones are missing, who sends them, and which minute they count in.

use std::collections::BTreeSet;

use contract::frame::{Frame, FrameHeader, SourceKind};
use contract::time::{Span, Timestamp};

use super::frames::Boot;
use super::gaps::Gap;
use super::minute::{OpenMinute, minute_of};
use super::ranges::Ranges;
use super::{AHEAD_MAX, FrameOutcome, MemberState, SAVE_INTERVAL, SECOND, SOURCES, Usage};

impl Usage {
    /// Returns the sequence that was expected next, or `None` if this frame is a repeat. Records
    /// the frames between as missing.
    pub(super) fn expected(&mut self, boot: &Boot, head: &FrameHeader) -> Option<u64> {
        let seen = self.boots.get(boot).map(|progress| &progress.seen);
        if seen.is_some_and(|seen| seen.contains(head.sequence)) {
            return None;
        }
        let (expected, received_before) = match seen.and_then(Ranges::last) {
            Some(last) => (last + 1, None),
            None => self.first_expected(boot, head),
        };
        if head.sequence > expected {
            let last = head.sequence - 1;
            self.record_missing(boot, expected, last, head.start, received_before);
        }
        Some(expected)
    }

    /// The first sequence expected of a boot that has sent none yet, and how far a predecessor
    /// received its frames.
    fn first_expected(&self, boot: &Boot, head: &FrameHeader) -> (u64, Option<u64>) {
        let Some(since) = self.since else {
            return (0, None);
        };
        let ours = head.start.since(since).secs();
        let counted = self.endpoints.values();
        let received = counted.filter_map(|e| e.last_counted(boot)).max();
        (head.sequence.saturating_sub(ours), received)
    }

    /// Records frames that should have arrived before one that starts at `before`.
    pub(super) fn record_missing(
        &mut self,
        boot: &Boot,
        first: u64,
        last: u64,
        before: Timestamp,
        received_before: Option<u64>,
    ) {
        self.gaps.push(Gap {
            boot: boot.clone(),
            missing: Ranges::of(first, last),
            minute: minute_of(before - SECOND),
            recorded: BTreeSet::new(),
            received_before,
        });
    }

    /// Removes a frame that arrived out of order from its gap.
    pub(super) fn fill_gap(&mut self, boot: &Boot, sequence: u64) {
        for gap in self.gaps.iter_mut().filter(|gap| gap.boot == *boot) {
            gap.missing.remove(sequence);
        }
        self.gaps.retain(|gap| !gap.missing.is_empty());
    }

    /// Marks a frame as received.
    pub(super) fn mark_received(&mut self, boot: &Boot, head: &FrameHeader, goodbye: bool) {
        let progress = self.boots.entry(boot.clone()).or_default();
        progress.seen.insert(head.sequence, head.sequence);
        progress.through = progress.through.max(head.start + SECOND);
        self.update_source(head, goodbye);
    }

    fn update_source(&mut self, head: &FrameHeader, goodbye: bool) {
        let through = head.start + SECOND;
        let Some(member) = self.members.get_mut(&head.source) else {
            if !goodbye {
                let member = MemberState {
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
            // A late frame of an earlier start.
            return;
        }
        let before = std::mem::replace(
            member,
            MemberState {
                boot: head.boot,
                through,
                restored: false,
            },
        );
        if before.restored {
            self.record_lost_tail(head, &before);
        }
        if goodbye {
            self.members.remove(&head.source);
        }
    }

    /// Handles a source that restarted without a goodbye while we were away. The frames that it
    /// sent after our state was saved are lost: at most as many as fit between two saves.
    fn record_lost_tail(&mut self, head: &FrameHeader, before: &MemberState) {
        let boot = Boot {
            source: head.source.clone(),
            boot: before.boot,
        };
        let Some(last) = self
            .boots
            .get(&boot)
            .and_then(|progress| progress.seen.last())
        else {
            return;
        };
        let lost = head
            .start
            .since(before.through)
            .secs()
            .min(SAVE_INTERVAL.secs());
        if lost > 0 {
            let end = before.through + Span::from_secs(lost);
            self.record_missing(&boot, last + 1, last + lost, end, None);
        }
    }

    pub(super) fn add(&mut self, boot: Boot, frame: &Frame, now: Timestamp) -> FrameOutcome {
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
        let reported_us = match frame.source.kind == SourceKind::NODE {
            true => frame.length_us,
            false => 0,
        };
        for deployment in frame.deployments.iter().filter(|_| counts) {
            let endpoint = self.endpoints.get(&deployment.endpoint);
            let recorded =
                endpoint.and_then(|endpoint| endpoint.counted(deployment.deployment_uid));
            if recorded.is_none_or(|recorded| !recorded.contains(&boot, frame.sequence)) {
                open.add(start, reported_us, deployment);
            }
        }
        open.counted.insert(boot, frame.sequence);
        if late {
            FrameOutcome::Late
        } else {
            FrameOutcome::InTime
        }
    }
}
