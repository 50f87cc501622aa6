//! Connections to instances at rest, kept per thread and instance.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::instance::Instance;
use crate::timer::now_us;
use crate::upstream::Upstream;

/// Idle connections kept per instance and thread.
const IDLE_MAX: usize = 256;

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
