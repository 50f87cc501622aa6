//! Connections to instances at rest, kept per thread and instance.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::instance::Instance;
use crate::timer::now_us;
use crate::upstream::Upstream;

/// Idle connections kept per instance and thread.
const IDLE_MAX: usize = 256;

/// One of the connections that are counted together, until it is dropped.
#[derive(Debug)]
pub struct Counted(Arc<AtomicUsize>);

impl Counted {
    pub fn among(all: &Arc<AtomicUsize>) -> Self {
        all.fetch_add(1, Ordering::Relaxed);
        Self(all.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug)]
#[allow(clippy::vec_box, reason = "connections are large, and move in and out")]
struct IdleSet {
    instance: Weak<Instance>,
    connections: Vec<Box<Upstream>>,
}

#[derive(Debug, Default)]
pub struct Pool {
    /// By the instance's serial.
    idle: BTreeMap<u64, IdleSet>,
}

impl Pool {
    /// The connection that was used last, if one is alive.
    pub fn take(&mut self, instance: &Instance) -> Option<Box<Upstream>> {
        let set = self.idle.get_mut(&instance.serial)?;
        while let Some(upstream) = set.connections.pop() {
            if upstream.is_alive() {
                return Some(upstream);
            }
        }
        None
    }

    /// Keeps a connection whose answer is whole, if it can be used again.
    pub fn put(&mut self, instance: &Arc<Instance>, mut upstream: Box<Upstream>, now_us: u64) {
        if instance.is_draining() || !upstream.is_reusable() {
            return;
        }
        upstream.reused = true;
        upstream.idle_since_us = now_us;
        let set = self.idle.entry(instance.serial).or_insert_with(|| IdleSet {
            instance: Arc::downgrade(instance),
            connections: Vec::new(),
        });
        if set.connections.len() < IDLE_MAX {
            set.connections.push(upstream);
        }
    }

    /// Closes the connection that has rested longest, to make room for another.
    pub fn close_oldest(&mut self) {
        // The first of each set has rested longest there.
        let since = |set: &IdleSet| set.connections.first().map(|c| c.idle_since_us);
        let sets = self.idle.values_mut().filter(|set| since(set).is_some());
        if let Some(oldest) = sets.min_by_key(|set| since(set)) {
            oldest.connections.remove(0);
        }
    }

    pub fn close_all(&mut self) {
        self.idle.clear();
    }

    /// Closes what rested too long, what the instance has closed, and what leads to an instance
    /// that drains or is gone.
    pub fn sweep(&mut self, idle_timeout: Duration) {
        let oldest = now_us().saturating_sub(idle_timeout.as_micros() as u64);
        self.idle.retain(|_, set| {
            let usable = set.instance.upgrade().is_some_and(|i| !i.is_draining());
            if usable {
                set.connections
                    .retain(|c| c.idle_since_us >= oldest && c.is_alive());
            }
            usable && !set.connections.is_empty()
        });
    }
}
