//! Events to report: closed minutes, spans of minutes without a request, and late frames.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use contract::events::Event;
use contract::ids::{EndpointKey, Uid};
use contract::time::Timestamp;

use super::endpoint::EndpointUsage;
use super::frames::{FrameSet, RecordedFrames};
use super::idle::IdleSpan;
use super::minute::UsageReport;
use super::{GRACE, MINUTE, Usage};

/// Events that are due, by endpoint.
pub(super) type DueEvents<'a> = BTreeMap<&'a EndpointKey, Vec<Event>>;

impl Usage {
    /// Closes minutes that have ended.
    pub(super) fn close(&mut self, now: Timestamp) {
        let open = self.open.range(self.closed_through..);
        let over = open
            .take_while(|(minute, _)| self.is_over(**minute, now))
            .last();
        if let Some((minute, _)) = over {
            self.closed_through = *minute + MINUTE;
            self.forget_idle_frames();
        }
    }

    fn forget_idle_frames(&mut self) {
        let spans = self.idle.values().flat_map(BTreeMap::values);
        let first = spans.map(|span| span.from).min();
        match first {
            Some(first) => self.idle_counted = self.idle_counted.split_off(&first),
            None => self.idle_counted.clear(),
        }
    }

    /// Moves closed minutes without a request into spans. A minute that must be reported first
    /// holds back the later ones of its deployment; returns the deployments that have such a
    /// minute.
    pub(super) fn collect_idle(&mut self) -> BTreeSet<Uid> {
        let mut kept = BTreeSet::new();
        for (minute, open) in self.open.range_mut(..self.closed_through) {
            let mut any = false;
            for (key, deployments) in &mut open.deployments {
                deployments.retain(|uid, sums| {
                    if *minute < closed(&self.endpoints, key, *uid) {
                        // A correction holds nothing back.
                        return true;
                    }
                    if kept.contains(uid) || !sums.is_idle() {
                        kept.insert(*uid);
                        return true;
                    }
                    let spans = self.idle.entry(key.clone()).or_default();
                    match spans.entry(*uid) {
                        Entry::Vacant(none) => {
                            none.insert(IdleSpan::new(*minute, sums));
                        }
                        Entry::Occupied(mut span) if span.get().accepts(*minute) => {
                            span.get_mut().extend(*minute, sums);
                        }
                        Entry::Occupied(_) => {
                            kept.insert(*uid);
                            return true;
                        }
                    }
                    any = true;
                    false
                });
            }
            open.deployments
                .retain(|_, of_endpoint| !of_endpoint.is_empty());
            if any {
                let counted = self.idle_counted.entry(*minute);
                counted.or_insert_with(|| open.counted.clone());
            }
        }
        kept
    }

    /// Reports spans that can grow no further: the hour is over, a minute with a request follows,
    /// or another owner has closed their minutes.
    pub(super) fn report_idle<'a>(
        &'a self,
        busy: &BTreeSet<Uid>,
        now: Timestamp,
        due: &mut DueEvents<'a>,
    ) {
        // Most spans have the same bounds.
        let mut counted: BTreeMap<(Timestamp, Timestamp), FrameSet> = BTreeMap::new();
        for (key, spans) in &self.idle {
            for (uid, span) in spans {
                let closes = closed(&self.endpoints, key, *uid) <= span.from;
                let hour = span.end_of_hour();
                let hour_is_over = self.closed_through >= hour || now >= hour + GRACE;
                if closes && !hour_is_over && !busy.contains(uid) {
                    continue;
                }
                let bounds = (span.from, span.through);
                let frames = counted
                    .entry(bounds)
                    .or_insert_with(|| self.idle_frames(bounds));
                let report = UsageReport {
                    deployment: &span.deployment,
                    uid: *uid,
                    minute: span.from,
                    minutes: span.minutes(),
                    slices: &span.slices,
                    closes,
                };
                let frames = frames.without(self.counted(key, *uid));
                due.entry(key).or_default().extend(report.events(&frames));
            }
        }
    }

    fn idle_frames(&self, (from, through): (Timestamp, Timestamp)) -> FrameSet {
        let mut all = FrameSet::default();
        let minutes = self.idle_counted.range(from..through);
        minutes.for_each(|(_, counted)| all.add(counted));
        all
    }

    /// Reports closed minutes with a request, and those without one that correct recorded minutes.
    pub(super) fn report_minutes<'a>(&'a self, due: &mut DueEvents<'a>) {
        // Deployments whose next minute joins a span once what is due has been recorded.
        let mut waiting = BTreeSet::new();
        for (minute, open) in self.open.range(..self.closed_through) {
            for (key, deployments) in &open.deployments {
                for (uid, sums) in deployments {
                    let closes = closed(&self.endpoints, key, *uid) <= *minute;
                    if closes && (sums.is_idle() || waiting.contains(uid)) {
                        waiting.insert(*uid);
                        continue;
                    }
                    let report = sums.report(*uid, *minute, closes);
                    let frames = open.counted.without(self.counted(key, *uid));
                    due.entry(key).or_default().extend(report.events(&frames));
                }
            }
        }
    }

    pub(super) fn report_late<'a>(&'a self, now: Timestamp, due: &mut DueEvents<'a>) {
        for (minute, late) in self.late.iter().filter(|(_, late)| late.is_flushable(now)) {
            for (key, deployments) in &late.deployments {
                for (uid, sums) in deployments {
                    let report = sums.report(*uid, *minute, false);
                    let frames = late.counted.without(self.counted(key, *uid));
                    due.entry(key).or_default().extend(report.events(&frames));
                }
            }
        }
    }

    /// Frames that events have already recorded: these are counted for other deployments only.
    fn counted(&self, key: &EndpointKey, uid: Uid) -> Option<&RecordedFrames> {
        self.endpoints.get(key)?.counted(uid)
    }
}

/// End of the last closed minute of a deployment.
fn closed(
    endpoints: &BTreeMap<EndpointKey, EndpointUsage>,
    key: &EndpointKey,
    uid: Uid,
) -> Timestamp {
    let endpoint = endpoints.get(key);
    endpoint.map_or_else(Timestamp::default, |endpoint| endpoint.closed(uid))
}
