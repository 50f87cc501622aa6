//! What holds a wish of the rules back: the projection, stabilisation and cool-downs.
//!
//! Invariant: restraint takes a wish nearer to the present count, and never across it.

use contract::decision::{LastChange, Outcome};
use contract::resources::Direction;
use contract::time::{Span, Timestamp};

use super::super::record::{Recorder, stage};
use super::super::rules::{Quality, Reading, Wanted};
use super::super::words;
use super::{Candidate, Run};

impl<R: Recorder> Run<'_, R> {
    /// A scale-in that would make a rule scale out at once goes only as far as it would not.
    pub(super) fn project(
        &mut self,
        readings: &[Reading],
        base: u32,
        wish: Candidate,
    ) -> (Candidate, Option<Outcome>) {
        if wish.count >= base {
            return (wish, None);
        }
        let profile = self.profile;
        // A count below the minimum is never reached, so nothing is learnt from it.
        let lowest = wish.count.max(profile.capacity.min.min(base));
        let fires = |count: u32| {
            profile
                .rules
                .iter()
                .zip(readings)
                .position(|(rule, reading)| rule.would_scale_out(reading, count))
        };
        let mut blocking: Option<(usize, u32)> = None;
        let mut reached = lowest;
        while reached < base {
            match fires(reached) {
                Some(rule) => blocking = Some((rule, reached)),
                None => break,
            }
            reached += 1;
        }
        let after = if reached == lowest {
            wish.count
        } else {
            reached
        };
        self.record.stage(|| {
            let detail = words::projection(profile, readings, blocking, after, base);
            stage("projection", wish.count, after, detail)
        });
        let held = (after == base).then_some(Outcome::HeldByProjection);
        let wish = Candidate {
            count: after,
            rule: wish.rule,
        };
        (wish, held)
    }

    /// Within the window the least eager wish counts: the largest when scaling in, the smallest when
    /// scaling out, and never across the present count.
    pub(super) fn stabilise(&mut self, base: u32, wish: u32) -> u32 {
        if wish == base {
            return wish;
        }
        let scales_in = wish < base;
        let window = if scales_in {
            self.policy.stabilize_in
        } else {
            self.policy.stabilize_out
        };
        let inside = self
            .tick
            .carried
            .wishes
            .iter()
            .filter(|earlier| window > Span::ZERO && self.now.since(earlier.last) < window)
            .map(|earlier| earlier.instances);
        let stabilised = if scales_in {
            inside.fold(wish, u32::max).min(base)
        } else {
            inside.fold(wish, u32::min).max(base)
        };
        self.record.stage(|| {
            let detail = words::stabilisation(window, wish, stabilised);
            stage("stabilization", wish, stabilised, detail)
        });
        stabilised
    }

    /// A rule that scales out acts again only when its cool-down since the last scale-out is over;
    /// scaling in waits for the cool-downs of all rules that agreed, since the last change in either
    /// direction. A scale-in never keeps a scale-out waiting.
    pub(super) fn cool_down(&mut self, readings: &[Reading], base: u32, stabilised: u32) -> u32 {
        if stabilised == base {
            return base;
        }
        let (cooled, until) = if stabilised > base {
            self.cool_down_out(readings, base, stabilised)
        } else {
            self.cool_down_in(base, stabilised)
        };
        self.record.stage(|| {
            let detail = words::cooldown(stabilised, cooled, until);
            stage("cooldown", stabilised, cooled, detail)
        });
        cooled
    }

    fn cool_down_out(
        &self,
        readings: &[Reading],
        base: u32,
        stabilised: u32,
    ) -> (u32, Option<Timestamp>) {
        let last = self.tick.carried.last_out.as_ref().map(|change| change.at);
        let mut free = base;
        let mut until: Option<Timestamp> = None;
        for (rule, reading) in self.profile.rules.iter().zip(readings) {
            if !reading.may_scale_out() {
                continue;
            }
            let Wanted::Out(count) = rule.wanted(reading, base) else {
                continue;
            };
            match cooling(last, rule.cooldown_out, self.now) {
                None => free = free.max(count),
                Some(end) => until = [until, Some(end)].into_iter().flatten().min(),
            }
        }
        let missing = readings
            .iter()
            .any(|reading| reading.quality == Quality::Missing);
        if let Some(floor) = missing.then(|| self.missing_floor()).flatten() {
            free = free.max(floor);
        }
        (stabilised.min(free), until)
    }

    fn cool_down_in(&self, base: u32, stabilised: u32) -> (u32, Option<Timestamp>) {
        let at = |change: &Option<LastChange>| change.as_ref().map(|change| change.at);
        let carried = self.tick.carried;
        let last = at(&carried.last_out).max(at(&carried.last_in));
        let until = self
            .profile
            .rules
            .iter()
            .filter(|rule| rule.direction() != Some(Direction::Out))
            .filter_map(|rule| cooling(last, rule.cooldown_in, self.now))
            .max();
        match until {
            Some(_) => (base, until),
            None => (stabilised, None),
        }
    }
}

/// The end of a cool-down that is still running.
fn cooling(last: Option<Timestamp>, cooldown: Span, now: Timestamp) -> Option<Timestamp> {
    last.map(|last| last + cooldown).filter(|end| now < *end)
}
