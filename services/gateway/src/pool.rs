//! Connections to instances at rest, kept per thread and instance.
//!
//! Invariant: no connection is given away that has rested for as long as its deployment's
//! `keepAliveIdle`, or that the instance is known to have closed: a request on it would be lost, and
//! most may not be sent again.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use crate::instance::Instance;
use crate::upstream::Idle;

/// Idle connections kept per instance and thread.
const IDLE_MAX: usize = 256;
/// A connection that rested for longer is looked at by a system call before its next request. No
/// server times a connection out sooner, and under load they rest for less.
const TRUSTED_US: u64 = 20_000;

#[derive(Debug)]
struct Rested {
    idle: Idle,
    since_us: u64,
}

#[derive(Debug)]
struct IdleSet {
    instance: Weak<Instance>,
    /// The one that has rested longest comes first.
    connections: Vec<Rested>,
    /// The deployment's `keepAliveIdle`.
    idle_max_us: u64,
}

impl IdleSet {
    fn is_fresh(&self, rested: &Rested, now_us: u64) -> bool {
        now_us.saturating_sub(rested.since_us) < self.idle_max_us
    }
}

#[derive(Debug, Default)]
pub struct Pool {
    /// By the instance's serial.
    idle: BTreeMap<u64, IdleSet>,
}

impl Pool {
    /// The connection that was used last, if one is alive.
    pub fn take(&mut self, instance: &Instance, now_us: u64) -> Option<Idle> {
        let set = self.idle.get_mut(&instance.serial)?;
        while let Some(rested) = set.connections.pop() {
            if !set.is_fresh(&rested, now_us) {
                // The others have rested for longer.
                set.connections.clear();
                return None;
            }
            let rested_us = now_us.saturating_sub(rested.since_us);
            let idle = rested.idle;
            if idle.is_alive() && (rested_us < TRUSTED_US || idle.is_alive_now()) {
                return Some(idle);
            }
        }
        None
    }

    /// Keeps a connection that came to rest now, if the instance takes more requests.
    pub fn put(&mut self, instance: &Arc<Instance>, idle: Idle, idle_max_us: u64, now_us: u64) {
        if idle_max_us == 0 || instance.is_draining() {
            return;
        }
        let set = self.idle.entry(instance.serial).or_insert_with(|| IdleSet {
            instance: Arc::downgrade(instance),
            connections: Vec::new(),
            idle_max_us,
        });
        set.idle_max_us = idle_max_us;
        if set.connections.len() < IDLE_MAX {
            let since_us = now_us;
            set.connections.push(Rested { idle, since_us });
        }
    }

    /// Closes the connection that has rested longest, to make room for another.
    pub fn close_oldest(&mut self) {
        // The first of each set has rested longest there.
        let since = |set: &IdleSet| set.connections.first().map(|c| c.since_us);
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
    pub fn sweep(&mut self, now_us: u64) {
        self.idle.retain(|_, set| {
            let usable = set.instance.upgrade().is_some_and(|i| !i.is_draining());
            let mut connections = std::mem::take(&mut set.connections);
            connections.retain(|c| set.is_fresh(c, now_us) && c.idle.is_alive());
            set.connections = connections;
            usable && !set.connections.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::upstream::Counted;

    const IDLE_MAX_US: u64 = 2_000_000;

    /// A pool with a connection that came to rest at 0, its instance, and the instance's end.
    async fn rested() -> (Pool, Arc<Instance>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        let instance = Instance::new("i".to_owned().into(), 0, 0, address.to_string());
        instance.set(1, false);
        let (mut pool, instance) = (Pool::default(), Arc::new(instance));
        let idle = Idle::new(near.unwrap(), Counted::among(&Arc::default()));
        let set = IdleSet {
            instance: Arc::downgrade(&instance),
            connections: vec![Rested { idle, since_us: 0 }],
            idle_max_us: IDLE_MAX_US,
        };
        pool.idle.insert(instance.serial, set);
        (pool, instance, far.unwrap().0)
    }

    #[tokio::test]
    async fn a_connection_is_given_until_it_has_rested_for_its_time() {
        let (mut pool, instance, _far) = rested().await;
        assert!(pool.take(&instance, IDLE_MAX_US).is_none());
        assert!(pool.idle[&instance.serial].connections.is_empty());
        let (mut pool, instance, _far) = rested().await;
        assert!(pool.take(&instance, IDLE_MAX_US - 1).is_some());
    }

    #[tokio::test]
    async fn a_close_that_nobody_was_told_of_yet_is_seen() {
        let (mut pool, instance, far) = rested().await;
        drop(far);
        assert!(pool.take(&instance, TRUSTED_US).is_none());
    }

    #[tokio::test]
    async fn what_has_rested_for_its_time_is_closed() {
        let (mut pool, instance, _far) = rested().await;
        pool.sweep(IDLE_MAX_US - 1);
        assert_eq!(pool.idle[&instance.serial].connections.len(), 1);
        pool.sweep(IDLE_MAX_US);
        assert!(pool.idle.is_empty());
    }
}
