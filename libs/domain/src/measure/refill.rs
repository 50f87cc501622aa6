//! Refilling windows with what was measured before this process began, or before a window needed it.
//!
//! Invariant: refilled seconds are those before what is held already, and only where the load of every
//! second that counts as measured is known: a gap stays a gap, and is never taken for zero.

use contract::ids::Uid;

use super::group::Group;
use super::past::PastOfKind;

impl Group {
    /// Refills the windows of a deployment that lack earlier seconds.
    pub fn refill(&mut self, deployment: Uid, past: &PastOfKind, now: i64) {
        self.refill_coverage(past, now);
        let initialization_us = self.initialization_period(deployment).millis() * 1000;
        let Some(rings) = self.loads.get_mut(&deployment) else {
            return;
        };
        let loads = past.loads(initialization_us);
        for tier in rings.tiers() {
            let lacking = rings.lacking(tier, past.from, now);
            let mut complete_from = lacking.end;
            for second in lacking.rev() {
                if self.covered.has(second) {
                    if !past.known.has(second) {
                        break;
                    }
                    if let Some(load) = loads.get(&second) {
                        rings.prepend(tier, second, load);
                    }
                }
                complete_from = second;
            }
            rings.complete_from(tier, complete_from);
        }
    }

    /// Adds the seconds that were measured before what is counted as measured already.
    fn refill_coverage(&mut self, past: &PastOfKind, now: i64) {
        if past.measured.is_empty() {
            return;
        }
        let before = match self.refilled_from {
            Some(before) => before,
            None => self.begin_live(past),
        };
        for span in past.measured.iter().rev() {
            let (start, end) = (span.start.max(past.from), span.end.min(before));
            if start >= end {
                continue;
            }
            let coverage = span.coverage();
            for tier in self.coverage.tiers() {
                let lacking = self.coverage.lacking(tier, start, now);
                for second in (lacking.start..end).rev() {
                    self.coverage.prepend(tier, second, &coverage);
                }
            }
            self.covered.push_front(start, end);
        }
        self.refilled_from = Some(before.min(past.from));
    }

    /// Separates what this process measures itself from what was measured before, and returns the first
    /// second of its own. Frames of earlier seconds are late from now on.
    fn begin_live(&mut self, past: &PastOfKind) -> i64 {
        let open = self.open.keys().next().copied();
        let own = [self.covered.first(), open].into_iter().flatten().min();
        let begin = own.unwrap_or_else(|| {
            let end = past.measured.last().map(|span| span.end);
            end.map_or(self.started, |end| end.min(self.started))
        });
        self.closed = self.closed.or(Some(begin - 1));
        for rings in self.loads.values_mut() {
            rings.begin_at(self.started, begin);
        }
        self.started = begin;
        begin
    }
}
