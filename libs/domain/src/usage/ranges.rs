//! Sets of sequence numbers, kept as ranges: sources count without gaps, so there are few.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// First to last (inclusive) of each range; ranges neither touch nor overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ranges {
    ranges: BTreeMap<u64, u64>,
}

impl Ranges {
    /// Returns the range from first to last (inclusive), which is empty if last is less than first.
    pub fn of(first: u64, last: u64) -> Self {
        Self {
            ranges: BTreeMap::from([(first, last)]),
        }
    }

    /// Whether the set contains a number.
    pub fn contains(&self, number: u64) -> bool {
        let below = self.ranges.range(..=number).next_back();
        below.is_some_and(|(_, last)| *last >= number)
    }

    /// Adds a range from first to last (inclusive), merging it with ranges that it touches.
    pub fn insert(&mut self, first: u64, last: u64) {
        let (mut first, mut last) = (first, last);
        // Absorb every range that overlaps or touches.
        loop {
            let near = self.ranges.range(..=last.saturating_add(1)).next_back();
            let Some((start, end)) = near.map(|(start, end)| (*start, *end)) else {
                break;
            };
            if end.saturating_add(1) < first {
                break;
            }
            self.ranges.remove(&start);
            first = first.min(start);
            last = last.max(end);
        }
        self.ranges.insert(first, last);
    }

    /// Removes one number, splitting the range around it.
    pub fn remove(&mut self, number: u64) {
        let below = self.ranges.range(..=number).next_back();
        let Some((first, last)) = below.map(|(first, last)| (*first, *last)) else {
            return;
        };
        if last < number {
            return;
        }
        self.ranges.remove(&first);
        if first < number {
            self.ranges.insert(first, number - 1);
        }
        if number < last {
            self.ranges.insert(number + 1, last);
        }
    }

    /// Returns the numbers in this set that are not in the other.
    pub fn without(&self, other: &Self) -> Self {
        let mut rest = Self::default();
        for (first, last) in self.iter() {
            let mut next = first;
            let overlapping = other.ranges.range(..=last).map(|(f, l)| (*f, *l));
            for (start, end) in overlapping.filter(|(_, end)| *end >= first) {
                if start > next {
                    rest.ranges.insert(next, start - 1);
                }
                next = next.max(end.saturating_add(1));
            }
            if next <= last {
                rest.ranges.insert(next, last);
            }
        }
        rest
    }

    /// The largest number in the set.
    pub fn last(&self) -> Option<u64> {
        self.ranges.values().next_back().copied()
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// First and last of each range, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.ranges.iter().map(|(first, last)| (*first, *last))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn numbers(ranges: &Ranges) -> BTreeSet<u64> {
        ranges
            .iter()
            .flat_map(|(first, last)| first..=last)
            .collect()
    }

    fn of(pairs: &[(u64, u64)]) -> (Ranges, BTreeSet<u64>) {
        let (mut ranges, mut set) = (Ranges::default(), BTreeSet::new());
        for (first, length) in pairs {
            ranges.insert(*first, first + length);
            set.extend(*first..=first + length);
        }
        (ranges, set)
    }

    proptest! {
        #[test]
        fn ranges_behave_as_a_set_of_numbers(
            a in prop::collection::vec((0u64..60, 0u64..10), 0..12),
            b in prop::collection::vec((0u64..60, 0u64..10), 0..12),
            removed in prop::collection::vec(0u64..70, 0..12),
        ) {
            let (mut ranges, mut set) = of(&a);
            let (other, other_set) = of(&b);
            prop_assert_eq!(numbers(&ranges.without(&other)), &set - &other_set);
            for number in removed {
                ranges.remove(number);
                set.remove(&number);
            }
            prop_assert_eq!(numbers(&ranges), set.clone());
            prop_assert_eq!(ranges.last(), set.last().copied());
            for number in 0..80 {
                prop_assert_eq!(ranges.contains(number), set.contains(&number));
            }
            let pairs: Vec<_> = ranges.iter().collect();
            prop_assert!(pairs.windows(2).all(|pair| pair[0].1 + 1 < pair[1].0), "{:?}", pairs);
        }
    }
}
