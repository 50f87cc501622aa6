//! When each request is due: the arithmetic from rates to times.
//!
//! A rate is a piecewise constant function of time; its integral is the number of requests due so
//! far. Requests are due where that integral reaches the points of a unit-rate process: 0, 1, 2, …
//! for even spacing, cumulative sums of exponential draws for Poisson arrivals. Invariant: the
//! schedule depends only on its arguments, never on the responses.

use std::time::Duration;

/// A request due this close to the end is dropped: sums of fractions are not exact.
const EPSILON_SECONDS: f64 = 1e-9;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Arrivals {
    /// Equal intervals between requests at the same rate
    #[default]
    Even,
    /// Independent clients: random intervals, with bursts
    Poisson,
}

/// Requests per second over time.
#[derive(Clone, Debug)]
pub enum Rates {
    /// The same rate, without an end.
    Constant(f64),
    /// One rate per step; the schedule ends with the last.
    Steps {
        per_second: Vec<f64>,
        step_seconds: f64,
    },
}

impl Rates {
    /// A trace has one count per `step`. It is played `compress` times faster at the same rates, so
    /// that one in `compress` of its requests is sent; all rates are multiplied by `scale`.
    pub fn from_trace(counts: &[f64], step: Duration, compress: f64, scale: f64) -> Self {
        let step_seconds = step.as_secs_f64();
        Self::Steps {
            per_second: counts
                .iter()
                .map(|count| count / step_seconds * scale)
                .collect(),
            step_seconds: step_seconds / compress,
        }
    }

    /// The rate at an offset; 0 after the end.
    pub fn at(&self, offset: Duration) -> f64 {
        match self {
            Self::Constant(rate) => *rate,
            Self::Steps {
                per_second,
                step_seconds,
            } => {
                let index = (offset.as_secs_f64() / step_seconds) as usize;
                per_second.get(index).copied().unwrap_or(0.0)
            }
        }
    }

    /// `None` if there is no end.
    pub fn length(&self) -> Option<Duration> {
        match self {
            Self::Constant(_) => None,
            Self::Steps {
                per_second,
                step_seconds,
            } => Some(Duration::from_secs_f64(
                step_seconds * per_second.len() as f64,
            )),
        }
    }

    fn step_seconds(&self) -> f64 {
        match self {
            Self::Constant(_) => 1.0,
            Self::Steps { step_seconds, .. } => *step_seconds,
        }
    }

    fn step(&self, index: usize) -> Option<f64> {
        match self {
            Self::Constant(rate) => Some(*rate),
            Self::Steps { per_second, .. } => per_second.get(index).copied(),
        }
    }
}

/// Iterates over the offsets from the start at which requests are due, in order.
pub struct RequestSchedule {
    rates: Rates,
    arrivals: Arrivals,
    rng: SplitMix64,
    end_seconds: f64,
    /// The integral's value at which the next request is due.
    next_due_count: f64,
    /// The step of the last request, and the integral at its start.
    index: usize,
    count_before_step: f64,
}

impl RequestSchedule {
    pub fn new(rates: Rates, end: Option<Duration>, arrivals: Arrivals, seed: u64) -> Self {
        let ends = [end, rates.length()].into_iter().flatten();
        let mut schedule = Self {
            end_seconds: ends.min().map_or(f64::INFINITY, |end| end.as_secs_f64()),
            rates,
            arrivals,
            rng: SplitMix64(seed),
            next_due_count: 0.0,
            index: 0,
            count_before_step: 0.0,
        };
        if arrivals == Arrivals::Poisson {
            schedule.next_due_count = schedule.rng.exponential();
        }
        schedule
    }
}

impl Iterator for RequestSchedule {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let step_seconds = self.rates.step_seconds();
        loop {
            let rate = self.rates.step(self.index)?;
            let started = self.index as f64 * step_seconds;
            if started >= self.end_seconds {
                return None;
            }
            let count_after_step = self.count_before_step + rate * step_seconds;
            if self.next_due_count < count_after_step {
                let due = started + (self.next_due_count - self.count_before_step) / rate;
                if due >= self.end_seconds - EPSILON_SECONDS {
                    return None;
                }
                self.next_due_count += match self.arrivals {
                    Arrivals::Even => 1.0,
                    Arrivals::Poisson => self.rng.exponential(),
                };
                return Some(Duration::from_secs_f64(due.max(0.0)));
            }
            self.count_before_step = count_after_step;
            self.index += 1;
        }
    }
}

/// SplitMix64 of Steele, Lea and Flood: the same seed gives the same schedule in every version.
struct SplitMix64(u64);

impl SplitMix64 {
    fn exponential(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let unit = ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64;
        -(1.0 - unit).ln()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seconds(value: u64) -> Duration {
        Duration::from_secs(value)
    }

    fn millis(schedule: RequestSchedule) -> Vec<u128> {
        schedule.map(|due| due.as_millis()).collect()
    }

    fn even(rates: Rates, end: Option<Duration>) -> RequestSchedule {
        RequestSchedule::new(rates, end, Arrivals::Even, 0)
    }

    #[test]
    fn a_constant_rate_spaces_requests_evenly_from_the_start() {
        let due = millis(even(Rates::Constant(4.0), Some(seconds(2))));
        assert_eq!(due, [0, 250, 500, 750, 1000, 1250, 1500, 1750]);
    }

    #[test]
    fn a_rate_below_one_per_second_spans_steps() {
        let due = millis(even(Rates::Constant(0.4), Some(seconds(10))));
        assert_eq!(due, [0, 2500, 5000, 7500]);
    }

    #[test]
    fn a_trace_follows_its_steps() {
        let rates = Rates::from_trace(&[2.0, 0.0, 4.0], seconds(1), 1.0, 1.0);
        assert_eq!(millis(even(rates, None)), [0, 500, 2000, 2250, 2500, 2750]);
    }

    #[test]
    fn compression_keeps_the_rate_and_shortens_the_time() {
        let rates = Rates::from_trace(&[100.0; 60], seconds(1), 60.0, 1.0);
        assert_eq!(rates.length(), Some(seconds(1)));
        assert_eq!(even(rates.clone(), None).count(), 100);
        assert_eq!(rates.at(Duration::from_millis(500)), 100.0);
    }

    #[test]
    fn counts_of_longer_steps_become_rates_per_second() {
        let rates = Rates::from_trace(&[600.0], seconds(60), 1.0, 0.5);
        assert_eq!(rates.at(Duration::ZERO), 5.0);
        assert_eq!(even(rates, None).count(), 300);
    }

    #[test]
    fn the_rate_after_the_end_is_zero() {
        let rates = Rates::from_trace(&[7.0], seconds(1), 1.0, 1.0);
        assert_eq!(rates.at(seconds(1)), 0.0);
    }

    #[test]
    fn poisson_arrivals_depend_on_the_seed_only() {
        let arrivals = |seed| {
            let rates = Rates::Constant(50.0);
            millis(RequestSchedule::new(
                rates,
                Some(seconds(10)),
                Arrivals::Poisson,
                seed,
            ))
        };
        assert_eq!(arrivals(1), arrivals(1));
        assert_ne!(arrivals(1), arrivals(2));
    }

    #[test]
    fn poisson_arrivals_have_the_rate_and_exponential_gaps() {
        let rates = Rates::Constant(100.0);
        let due: Vec<f64> = RequestSchedule::new(rates, Some(seconds(1000)), Arrivals::Poisson, 7)
            .map(|due| due.as_secs_f64())
            .collect();
        // 100,000 expected, with a standard deviation of 316.
        assert!((98_500..101_500).contains(&due.len()), "{}", due.len());
        let gaps: Vec<f64> = due.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        // For exponential gaps the standard deviation equals the mean.
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.05);
    }

    proptest! {
        #[test]
        fn requests_are_due_in_order_and_as_many_as_the_trace_says(
            counts in proptest::collection::vec(0.0_f64..50.0, 1..60),
            compress in 1.0_f64..100.0,
        ) {
            let rates = Rates::from_trace(&counts, seconds(1), compress, 1.0);
            let length = rates.length().unwrap();
            let due: Vec<Duration> = even(rates, None).collect();
            prop_assert!(due.is_sorted());
            prop_assert!(due.iter().all(|due| *due <= length));
            let expected = counts.iter().sum::<f64>() / compress;
            prop_assert!((due.len() as f64 - expected).abs() <= 1.0 + 1e-6);
        }
    }
}
