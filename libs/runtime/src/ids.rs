//! Ids and secrets, as an argument.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use contract::time::Timestamp;
use uuid::{Builder, Uuid};

/// A source of ids and secrets.
pub trait Ids: Send + Sync + fmt::Debug + 'static {
    /// Returns a time-ordered id (UUIDv7) for an event; later calls return greater ids.
    fn event_id(&self, now: Timestamp) -> Uuid;
    /// Returns a random id (UUIDv4) for an incarnation.
    fn uid(&self) -> Uuid;
    /// Returns 256 unpredictable bits.
    fn secret(&self) -> [u8; 32];
}

/// The last id issued, so that ids of one millisecond stay in order.
#[derive(Debug, Default)]
struct IdSequence {
    millis: u64,
    counter: u64,
}

impl IdSequence {
    /// Returns the millisecond and counter of the next id; the counter takes the 42 bits after the
    /// version.
    fn next(&mut self, now: Timestamp) -> (u64, u64) {
        let millis = u64::try_from(now.millis()).unwrap_or(0);
        if millis > self.millis {
            self.millis = millis;
            self.counter = 0;
        } else {
            self.counter += 1;
        }
        (self.millis, self.counter)
    }
}

/// Builds a UUIDv7 from 12 bits of counter, then 32 more, then 30 random ones: `rand_a` and
/// `rand_b` of RFC 9562.
fn v7(millis: u64, counter: u64, random: u32) -> Uuid {
    let mut bytes = [0u8; 10];
    let high = ((counter >> 32) & 0x0fff) as u16;
    bytes[..2].copy_from_slice(&high.to_be_bytes());
    // The variant takes the two top bits of this word, so the counter is shifted below them.
    let low = ((counter & 0xffff_ffff) << 30) | u64::from(random & 0x3fff_ffff);
    bytes[2..].copy_from_slice(&low.to_be_bytes());
    Builder::from_unix_timestamp_millis(millis, &bytes).into_uuid()
}

/// Ids and secrets from the system's random number generator.
#[derive(Debug, Default)]
pub struct SystemIds {
    sequence: Mutex<IdSequence>,
}

impl SystemIds {
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the source of random numbers"
    )]
    fn random<const N: usize>() -> [u8; N] {
        let mut bytes = [0; N];
        // Without randomness there are no keys and no tokens: nothing useful can continue.
        getrandom::fill(&mut bytes).expect("the operating system gives random numbers");
        bytes
    }
}

impl Ids for SystemIds {
    fn event_id(&self, now: Timestamp) -> Uuid {
        let (millis, counter) = self
            .sequence
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .next(now);
        v7(millis, counter, u32::from_be_bytes(Self::random()))
    }

    fn uid(&self) -> Uuid {
        Builder::from_random_bytes(Self::random()).into_uuid()
    }

    fn secret(&self) -> [u8; 32] {
        Self::random()
    }
}

/// Deterministic ids for a seed. For tests and simulation; its secrets are not secret.
#[derive(Debug)]
pub struct SeededIds {
    state: Mutex<(IdSequence, u64)>,
}

impl SeededIds {
    /// Creates the sequence of ids for a seed.
    pub fn new(seed: u64) -> Self {
        Self {
            state: Mutex::new((IdSequence::default(), seed)),
        }
    }

    fn next_u64(&self) -> u64 {
        // SplitMix64 (Steele, Lea, Flood 2014).
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.1 = state.1.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state.1;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

impl Ids for SeededIds {
    fn event_id(&self, now: Timestamp) -> Uuid {
        let random = self.next_u64() as u32;
        let (millis, counter) = self
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .next(now);
        v7(millis, counter, random)
    }

    fn uid(&self) -> Uuid {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.next_u64().to_be_bytes());
        bytes[8..].copy_from_slice(&self.next_u64().to_be_bytes());
        Builder::from_random_bytes(bytes).into_uuid()
    }

    fn secret(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for chunk in bytes.chunks_exact_mut(8) {
            chunk.copy_from_slice(&self.next_u64().to_be_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_ids_rise_within_a_millisecond_and_when_the_clock_steps_back() {
        let ids = SystemIds::default();
        let mut previous = ids.event_id(Timestamp::from_millis(1000));
        for millis in [1000, 1000, 1001, 900, 1001, 1002] {
            let next = ids.event_id(Timestamp::from_millis(millis));
            assert!(next > previous, "{next} after {previous}");
            assert_eq!(next.get_version_num(), 7);
            previous = next;
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_ids() {
        let (a, b) = (SeededIds::new(7), SeededIds::new(7));
        assert_eq!(a.uid(), b.uid());
        assert_eq!(
            a.event_id(Timestamp::default()),
            b.event_id(Timestamp::default())
        );
        assert_ne!(a.uid(), SeededIds::new(8).uid());
    }
}
