//! Sets of seconds as half-open ranges, ascending and apart.

use std::collections::VecDeque;

/// Seconds as ranges from a start up to but without an end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spans(VecDeque<(i64, i64)>);

impl Spans {
    /// Adds a range that does not begin before the end of the last one.
    pub fn push_back(&mut self, start: i64, end: i64) {
        match self.0.back_mut() {
            Some((_, last)) if *last >= start => *last = (*last).max(end),
            _ if start < end => self.0.push_back((start, end)),
            _ => {}
        }
    }

    /// Adds a range that does not end after the start of the first one.
    pub fn push_front(&mut self, start: i64, end: i64) {
        match self.0.front_mut() {
            Some((first, _)) if *first <= end => *first = (*first).min(start),
            _ if start < end => self.0.push_front((start, end)),
            _ => {}
        }
    }

    /// Removes ranges that end before this second.
    pub fn trim(&mut self, before: i64) {
        while self.0.front().is_some_and(|(_, end)| *end < before) {
            self.0.pop_front();
        }
    }

    /// The first second.
    pub fn first(&self) -> Option<i64> {
        self.0.front().map(|(start, _)| *start)
    }

    /// Whether it has this second.
    pub fn has(&self, second: i64) -> bool {
        self.overlaps(second, second + 1)
    }

    /// How many seconds it has from `start` up to but without `end`.
    pub fn count(&self, start: i64, end: i64) -> i64 {
        let next = self.0.partition_point(|(_, last)| *last <= start);
        let ranges = self.0.range(next..);
        let within = ranges.map(|(first, last)| (start.max(*first), end.min(*last)));
        let within = within.take_while(|(first, last)| first < last);
        within.map(|(first, last)| last - first).sum()
    }

    /// Whether it has any second from `start` up to but without `end`.
    pub fn overlaps(&self, start: i64, end: i64) -> bool {
        let next = self.0.partition_point(|(_, last)| *last <= start);
        start < end && self.0.get(next).is_some_and(|(first, _)| *first < end)
    }
}

impl FromIterator<(i64, i64)> for Spans {
    /// Collects ascending ranges.
    fn from_iter<I: IntoIterator<Item = (i64, i64)>>(ranges: I) -> Self {
        let mut spans = Self::default();
        for (start, end) in ranges {
            spans.push_back(start, end);
        }
        spans
    }
}
