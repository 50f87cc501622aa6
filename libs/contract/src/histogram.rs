//! A mergeable histogram of durations: base-2 exponential buckets at scale 5 (32 buckets per
//! doubling, so a quantile is known within 2.2 %), as in OpenTelemetry's exponential histogram.
//! Bounds come from an integer table, so merging and quantiles are exact and the same everywhere.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Buckets per doubling.
const SUB_BUCKETS: u32 = 32;

/// `round(2^(i/32) * 2^32)` for i in 0..32: lower bounds within one doubling, in 32.32 fixed point.
const MANTISSA_BOUNDS: [u64; SUB_BUCKETS as usize] = [
    4294967296, 4389014833, 4485121744, 4583333121, 4683695048, 4786254615, 4891059943, 4998160210,
    5107605667, 5219447668, 5333738689, 5450532358, 5569883475, 5691848042, 5816483285, 5943847684,
    6074001000, 6207004303, 6342919999, 6481811861, 6623745059, 6768786189, 6917003306, 7068465956,
    7223245206, 7381413680, 7543045592, 7708216783, 7877004752, 8049488696, 8225749546, 8405870007,
];

/// Counts of durations in whole microseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// Counts by bucket index; non-empty buckets only.
    #[serde(rename = "b")]
    buckets: BTreeMap<u16, u64>,
    /// Sum of all recorded values, for averages.
    #[serde(rename = "s")]
    sum_us: u64,
}

impl Histogram {
    /// Records a duration in microseconds.
    pub fn record(&mut self, micros: u64) {
        *self.buckets.entry(bucket_of(micros)).or_default() += 1;
        self.sum_us = self.sum_us.saturating_add(micros);
    }

    /// Adds the other's counts.
    pub fn merge(&mut self, other: &Self) {
        for (bucket, count) in &other.buckets {
            *self.buckets.entry(*bucket).or_default() += count;
        }
        self.sum_us = self.sum_us.saturating_add(other.sum_us);
    }

    /// The number of recorded durations.
    pub fn count(&self) -> u64 {
        self.buckets.values().sum()
    }

    /// The exact sum of all durations in microseconds; saturates.
    pub fn sum_micros(&self) -> u64 {
        self.sum_us
    }

    /// Whether nothing has been recorded.
    pub fn is_empty(&self) -> bool {
        self.buckets.is_empty()
    }

    /// Returns the upper bound in microseconds of the bucket that contains the quantile, such as 9900
    /// `per_10000` for p99; `None` for an empty histogram.
    pub fn quantile_micros(&self, per_10000: u32) -> Option<u64> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let rank = (u128::from(count) * u128::from(per_10000.min(10_000)))
            .div_ceil(10_000)
            .max(1);
        let mut seen: u128 = 0;
        for (bucket, in_bucket) in &self.buckets {
            seen += u128::from(*in_bucket);
            if seen >= rank {
                return Some(upper_bound(*bucket));
            }
        }
        None
    }

    /// Iterates over `(upper bound in microseconds, count)` of the non-empty buckets, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.buckets
            .iter()
            .map(|(bucket, count)| (upper_bound(*bucket), *count))
    }
}

/// Returns the index of the bucket that contains a value: `[2^(i/32), 2^((i+1)/32))` microseconds; 0 and 1 share
/// the first.
fn bucket_of(micros: u64) -> u16 {
    let value = micros.max(1);
    let exponent = value.ilog2();
    // The mantissa in [1, 2) as 32.32 fixed point.
    let mantissa = if exponent >= 32 {
        value >> (exponent - 32)
    } else {
        value << (32 - exponent)
    };
    let sub = MANTISSA_BOUNDS.partition_point(|bound| *bound <= mantissa) - 1;
    (exponent * SUB_BUCKETS) as u16 + sub as u16
}

/// Returns the largest whole number of microseconds in the bucket.
fn upper_bound(bucket: u16) -> u64 {
    let next = u32::from(bucket) + 1;
    let exponent = next / SUB_BUCKETS;
    if exponent >= 64 {
        return u64::MAX;
    }
    let mantissa = u128::from(MANTISSA_BOUNDS[(next % SUB_BUCKETS) as usize]);
    let bound = (mantissa << exponent).div_ceil(1 << 32);
    u64::try_from(bound.saturating_sub(1))
        .unwrap_or(u64::MAX)
        .max(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_value_is_at_most_its_buckets_bound_and_within_the_error(micros in 1u64..1 << 40) {
            let bound = upper_bound(bucket_of(micros));
            prop_assert!(bound >= micros);
            // 2^(1/32) - 1 = 2.19 %
            prop_assert!(u128::from(bound - micros) * 10_000 <= u128::from(micros) * 219);
        }

        #[test]
        fn merging_equals_recording_in_one_histogram(a in prop::collection::vec(0u64..1 << 30, 0..50), b in prop::collection::vec(0u64..1 << 30, 0..50)) {
            let record = |values: &[u64]| {
                let mut histogram = Histogram::default();
                values.iter().for_each(|v| histogram.record(*v));
                histogram
            };
            let mut merged = record(&a);
            merged.merge(&record(&b));
            prop_assert_eq!(merged, record(&[a, b].concat()));
        }
    }

    #[test]
    fn quantiles_are_bucket_bounds() {
        let mut histogram = Histogram::default();
        for micros in 1..=100 {
            histogram.record(micros * 1000);
        }
        let p99 = histogram.quantile_micros(9900).unwrap();
        assert!((99_000..=101_200).contains(&p99), "{p99}");
        assert_eq!(Histogram::default().quantile_micros(5000), None);
    }
}
