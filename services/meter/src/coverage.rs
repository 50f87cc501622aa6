//! The seconds that sources of one kind have reported of a bucket, until they are saved.

use std::collections::BTreeMap;

use contract::frame::{Frame, Source};

/// A source that is silent for this long is no longer expected to report.
const SILENT_SECONDS_MAX: i64 = 60;

/// Seconds in a row that were measured alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Measured {
    pub start: i64,
    /// The second after the last one.
    pub end: i64,
    /// Whether some source that was expected has not reported them.
    pub is_partial: bool,
    /// Their actual length together, in microseconds.
    pub length_us: u64,
}

#[derive(Default)]
pub(crate) struct SourceCoverage {
    /// The first and last second that each source has reported.
    sources: BTreeMap<Source, (i64, i64)>,
    /// The length that each source has reported of a second, in microseconds.
    reported_by: BTreeMap<i64, BTreeMap<Source, u64>>,
}

impl SourceCoverage {
    pub(crate) fn record(&mut self, frame: &Frame, second: i64) {
        let reported_by = self.reported_by.entry(second).or_default();
        *reported_by.entry(frame.source.clone()).or_default() += frame.length_us;
        if frame.goodbye {
            self.sources.remove(&frame.source);
            return;
        }
        let reported = self
            .sources
            .entry(frame.source.clone())
            .or_insert((second, second));
        *reported = (reported.0.min(second), reported.1.max(second));
    }

    /// Drops the seconds before this one.
    pub(crate) fn start_from(&mut self, second: i64) {
        self.reported_by = self.reported_by.split_off(&second);
    }

    /// Takes the seconds before `settled`.
    pub(crate) fn take(&mut self, settled: i64) -> Vec<Measured> {
        let later = self.reported_by.split_off(&settled);
        let ready = std::mem::replace(&mut self.reported_by, later);
        self.sources
            .retain(|_, (_, last)| settled - *last < SILENT_SECONDS_MAX);
        let mut spans: Vec<Measured> = Vec::new();
        for (second, reported_by) in ready {
            let expected = self.sources.iter();
            let is_partial = expected
                .filter(|(_, (first, _))| *first <= second)
                .any(|(source, _)| !reported_by.contains_key(source));
            let length_us = reported_by.values().copied().max().unwrap_or_default();
            match spans.last_mut() {
                Some(last) if last.end == second && last.is_partial == is_partial => {
                    last.end += 1;
                    last.length_us += length_us;
                }
                _ => spans.push(Measured {
                    start: second,
                    end: second + 1,
                    is_partial,
                    length_us,
                }),
            }
        }
        spans
    }
}
