//! The weighted split. Every run of 100 consecutive requests (the sum of the percentages) contains
//! exactly the configured number for each deployment, spread evenly: picks step through a slot
//! table by about its size divided by the golden ratio. Threads share one counter per endpoint, so
//! the shares are exact across all of them.

/// Maps a request's number to the index of a deployment.
#[derive(Debug)]
pub struct Split {
    /// One entry per percent, holding the deployment's index.
    slots: Vec<u16>,
    /// Coprime with the number of slots, so that every slot is visited once per round.
    step: u64,
}

impl Split {
    /// Returns `None` if no deployment has a share.
    pub fn new(percentages: impl IntoIterator<Item = u8>) -> Option<Self> {
        let slots: Vec<u16> = percentages
            .into_iter()
            .enumerate()
            .flat_map(|(index, percent)| std::iter::repeat_n(index as u16, usize::from(percent)))
            .collect();
        if slots.is_empty() {
            return None;
        }
        let step = golden_step(slots.len() as u64);
        Some(Self { slots, step })
    }

    pub fn pick(&self, count: u64) -> usize {
        let size = self.slots.len() as u64;
        // Reduced before multiplying, so that it cannot overflow.
        let slot = (count % size) * self.step % size;
        usize::from(self.slots[slot as usize])
    }
}

/// The number closest to `size` divided by the golden ratio that is coprime with `size`.
fn golden_step(size: u64) -> u64 {
    let ideal = (size * 618).div_ceil(1000).max(1);
    (0..size)
        .flat_map(|distance| [ideal.saturating_sub(distance), ideal + distance])
        .find(|step| *step > 0 && coprime(*step, size))
        .unwrap_or(1)
}

fn coprime(mut a: u64, mut b: u64) -> bool {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a == 1
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use proptest::prelude::*;

    use super::*;

    fn counts(split: &Split, picks: impl Iterator<Item = u64>, deployments: usize) -> Vec<u64> {
        let mut counts = vec![0; deployments];
        picks.for_each(|count| counts[split.pick(count)] += 1);
        counts
    }

    proptest! {
        #[test]
        fn every_hundred_requests_hold_the_exact_shares(first in 0u8..=100, from in 0u64..1 << 60) {
            let split = Split::new([first, 100 - first]).unwrap();
            let counts = counts(&split, from..from + 100, 2);
            // A run that crosses a multiple of 100 still takes each slot once.
            prop_assert_eq!(counts, vec![u64::from(first), u64::from(100 - first)]);
        }

        #[test]
        fn shares_stay_close_at_any_time(first in 1u8..100) {
            let split = Split::new([first, 100 - first]).unwrap();
            let mut got = 0.0;
            for count in 0..1000u32 {
                got += f64::from(u8::from(split.pick(u64::from(count)) == 0));
                let due = f64::from(count + 1) * f64::from(first) / 100.0;
                prop_assert!((got - due).abs() < 3.0, "{got} of {due} at {count}");
            }
        }
    }

    #[test]
    fn shares_are_within_a_twentieth_of_a_point_over_100_000_requests_on_several_threads() {
        let split = Split::new([90, 9, 1]).unwrap();
        let counter = AtomicU64::new(12_345);
        let totals = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        let picks = (0..25_000).map(|_| counter.fetch_add(1, Ordering::Relaxed));
                        counts(&split, picks, 3)
                    })
                })
                .collect();
            workers.into_iter().fold(vec![0; 3], |mut sum, worker| {
                let part = worker.join().unwrap();
                sum.iter_mut().zip(part).for_each(|(s, p)| *s += p);
                sum
            })
        });
        for (count, percent) in totals.into_iter().zip([90.0, 9.0, 1.0]) {
            let points = count as f64 / 1000.0;
            assert!((points - percent).abs() <= 0.05, "{points} of {percent}");
        }
    }

    #[test]
    fn a_split_without_shares_is_rejected() {
        assert!(Split::new([0, 0]).is_none());
        assert!(Split::new([]).is_none());
    }
}
