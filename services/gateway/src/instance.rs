//! One instance, shared by all threads of the gateway. One word holds the number in flight and the
//! draining flag, so acquiring a slot and checking the flag are one atomic step: once the flag is
//! set, no thread can acquire a slot, whatever snapshot it still holds.

use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};

use contract::InstanceId;
use http::HeaderValue;

const DRAINING: u64 = 1 << 63;
const COUNT_MASK: u64 = u32::MAX as u64;

#[derive(Debug)]
pub struct ServedInstance {
    pub id: InstanceId,
    /// Unique within this process; the key of the connection pools.
    pub serial: u64,
    /// Unique among the measured instances of its deployment; small, and reused.
    pub index: usize,
    pub address: String,
    /// The `host` header of requests to it.
    pub host: HeaderValue,
    /// Requests in flight, and `DRAINING`.
    state: AtomicU64,
    limit: AtomicU32,
    /// While idle: total busy time. While busy: total busy time minus the time it became busy,
    /// which is negative because the clock starts above any busy time. So the sign tells which.
    busy: AtomicI64,
    requests: AtomicU64,
    /// Busy time as of the meter's last reading.
    reported_busy_us: AtomicU64,
    /// Set after a refused connection; until then other instances are preferred.
    suspect_until_us: AtomicU64,
}

/// What the meter reads of an instance, since the previous reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatewayReading {
    pub in_flight: u32,
    /// Requests that ended.
    pub requests: u64,
    pub busy_us: u64,
}

impl ServedInstance {
    pub fn new(id: InstanceId, serial: u64, index: usize, address: String) -> Self {
        // An address that is not a valid header value cannot be connected to either.
        let host =
            HeaderValue::from_str(&address).unwrap_or_else(|_| HeaderValue::from_static("invalid"));
        Self {
            id,
            serial,
            index,
            address,
            host,
            state: AtomicU64::new(DRAINING),
            limit: AtomicU32::new(0),
            busy: AtomicI64::new(0),
            requests: AtomicU64::new(0),
            reported_busy_us: AtomicU64::new(0),
            suspect_until_us: AtomicU64::new(0),
        }
    }

    pub fn update(&self, limit: u32, draining: bool) {
        self.limit.store(limit, Ordering::SeqCst);
        if draining {
            self.state.fetch_or(DRAINING, Ordering::SeqCst);
        } else {
            self.state.fetch_and(!DRAINING, Ordering::SeqCst);
        }
    }

    pub fn is_draining(&self) -> bool {
        self.state.load(Ordering::SeqCst) & DRAINING != 0
    }

    pub fn in_flight(&self) -> u32 {
        (self.state.load(Ordering::SeqCst) & COUNT_MASK) as u32
    }

    pub fn mark_suspect(&self, until_us: u64) {
        self.suspect_until_us.store(until_us, Ordering::Relaxed);
    }

    pub fn is_suspect(&self, now_us: u64) -> bool {
        self.suspect_until_us.load(Ordering::Relaxed) > now_us
    }

    /// Acquires a slot if one is free and the instance is not draining.
    pub fn try_acquire(&self, now_us: u64) -> bool {
        let limit = u64::from(self.limit.load(Ordering::SeqCst));
        let mut state = self.state.load(Ordering::SeqCst);
        loop {
            if state & DRAINING != 0 || state & COUNT_MASK >= limit {
                return false;
            }
            let taken = self.state.compare_exchange_weak(
                state,
                state + 1,
                Ordering::SeqCst,
                Ordering::SeqCst,
            );
            match taken {
                Ok(_) => break,
                Err(current) => state = current,
            }
        }
        if state & COUNT_MASK == 0 {
            self.busy.fetch_sub(now_us as i64, Ordering::SeqCst);
        }
        true
    }

    /// Releases a slot acquired with `try_acquire`.
    pub fn release(&self, now_us: u64) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let before = self.state.fetch_sub(1, Ordering::SeqCst);
        if before & COUNT_MASK == 1 {
            self.busy.fetch_add(now_us as i64, Ordering::SeqCst);
        }
    }

    /// Returns what happened since the last reading. Only the meter takes readings.
    pub fn take_reading(&self, now_us: u64) -> GatewayReading {
        let busy = self.busy.load(Ordering::SeqCst);
        let busy_us = if busy < 0 { busy + now_us as i64 } else { busy };
        let before = self.reported_busy_us.load(Ordering::Relaxed);
        // A slot acquired just after the clock was read would make busy time go backwards.
        let busy_us = (busy_us.max(0) as u64).max(before);
        self.reported_busy_us.store(busy_us, Ordering::Relaxed);
        GatewayReading {
            in_flight: self.in_flight(),
            requests: self.requests.swap(0, Ordering::Relaxed),
            busy_us: busy_us - before,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(limit: u32) -> ServedInstance {
        let instance = ServedInstance::new("i".to_owned().into(), 0, 0, "127.0.0.1:1".into());
        instance.update(limit, false);
        instance
    }

    #[test]
    fn slots_are_never_exceeded_across_threads() {
        let instance = instance(3);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        if instance.try_acquire(10) {
                            assert!(instance.in_flight() <= 3);
                            instance.release(10);
                        }
                    }
                });
            }
        });
        assert_eq!(instance.in_flight(), 0);
    }

    #[test]
    fn a_draining_instance_grants_no_slot_and_still_counts_its_requests() {
        let instance = instance(2);
        assert!(instance.try_acquire(1));
        instance.update(2, true);
        assert!(!instance.try_acquire(1));
        assert_eq!(instance.in_flight(), 1);
        instance.release(2);
        assert_eq!(instance.in_flight(), 0);
    }

    #[test]
    fn busy_time_is_the_time_with_at_least_one_request() {
        let instance = instance(2);
        assert!(instance.try_acquire(100));
        assert!(instance.try_acquire(110));
        assert_eq!(instance.take_reading(150).busy_us, 50);
        instance.release(160);
        instance.release(200);
        assert!(instance.try_acquire(1000));
        let reading = instance.take_reading(1010);
        assert_eq!((reading.busy_us, reading.requests), (60, 2));
        assert_eq!(instance.take_reading(1015).busy_us, 5);
    }
}
