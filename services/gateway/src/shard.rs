//! What one thread counts, until the meter takes it.
//!
//! Each serving thread has a shard of its own, behind a lock that only the meter shares with it and
//! only for the time of copying one deployment. In-flight time is kept as the sum of moments: a
//! request that begins subtracts its moment, one that ends adds it, and the number in flight times
//! the moment of reading makes up for those that run. So the integral is exact at any moment, and
//! no request touches more than a few integers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use contract::frame::Outcomes;
use contract::histogram::Histogram;
use http::StatusCode;

use crate::admission::Slot;
use crate::arrivals::Arrivals;

/// A number of requests and the integral of it over time, both exact at any moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Gauge {
    now: u32,
    sum_us: i64,
}

impl Gauge {
    pub fn enter(&mut self, at_us: u64) {
        self.now += 1;
        self.sum_us -= at_us as i64;
    }

    pub fn leave(&mut self, at_us: u64) {
        self.now -= 1;
        self.sum_us += at_us as i64;
    }

    /// The integral since the last call, up to `at_us`. A request that began a moment after the
    /// reading of the clock would make it negative; that is made up for next time.
    pub fn take(&mut self, at_us: u64) -> u64 {
        let running = i64::from(self.now) * at_us as i64;
        let taken = (self.sum_us + running).max(0);
        self.sum_us -= taken;
        taken as u64
    }
}

/// One deployment on one thread, since the meter last came by.
#[derive(Debug, Default)]
pub struct Cell {
    pub outcomes: Outcomes,
    pub arrivals: u64,
    /// By the first digit of the status that the client got; 0: it got none.
    pub status_classes: [u64; 6],
    pub request_bytes: u64,
    pub response_bytes: u64,
    /// Latencies.
    pub at_or_below: BTreeMap<u64, u64>,
    pub latency: Histogram,
    pub open: Arrivals,
    pub serving: Gauge,
    pub queued: Gauge,
    /// Of `serving`, what is on each instance, by its index.
    pub on_instances: Vec<Gauge>,
}

impl Cell {
    pub fn on_instance(&mut self, slot: &Slot) -> &mut Gauge {
        let index = slot.instance.index;
        if self.on_instances.len() <= index {
            self.on_instances.resize_with(index + 1, Gauge::default);
        }
        &mut self.on_instances[index]
    }

    /// The status that a client got, if it got any.
    pub fn count_status(&mut self, status: Option<StatusCode>) {
        let class = status.map_or(0, |status| status.as_u16() / 100);
        if let Some(count) = self.status_classes.get_mut(usize::from(class)) {
            *count += 1;
        }
    }

    /// What was counted; what still runs goes on.
    pub fn take(&mut self) -> Self {
        let running = Self {
            open: std::mem::take(&mut self.open),
            serving: self.serving,
            queued: self.queued,
            on_instances: std::mem::take(&mut self.on_instances),
            ..Self::default()
        };
        std::mem::replace(self, running)
    }
}

/// Refused before a deployment was chosen: by endpoint (empty where none is known) and status.
pub type Refusals = BTreeMap<(String, u16), u64>;

#[derive(Debug, Default)]
pub struct Shard {
    /// By the deployment's meter slot.
    pub cells: Vec<Option<Box<Cell>>>,
    pub refusals: Refusals,
}

pub type SharedShard = Arc<Mutex<Shard>>;

/// A panic cannot leave a shard worse than one count short.
pub fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shard {
    pub fn cell(&mut self, slot: usize) -> &mut Cell {
        if self.cells.len() <= slot {
            self.cells.resize_with(slot + 1, || None);
        }
        self.cells[slot].get_or_insert_default()
    }
}

pub fn count_refusal(shard: &SharedShard, endpoint: &str, status: u16) {
    *lock(shard)
        .refusals
        .entry((endpoint.to_owned(), status))
        .or_default() += 1;
}
