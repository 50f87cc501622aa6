//! Idle connections to instances, kept per thread and instance.
//!
//! Invariant: the pool returns no connection that has been idle for its deployment's
//! `keepAliveIdle` or longer, or that the instance is known to have closed: a request on it would
//! be lost, and most requests may not be resent.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use crate::instance::ServedInstance;
use crate::upstream::IdleConnection;

/// Idle connections kept per instance and thread.
const IDLE_MAX: usize = 256;
/// A connection that was idle for longer is checked by a system call before its next request. No
/// server times out sooner, and under load connections are idle for less.
const TRUST_IDLE_US: u64 = 20_000;

#[derive(Debug)]
struct PoolEntry {
    idle: IdleConnection,
    idle_since_us: u64,
}

#[derive(Debug)]
struct IdleSet {
    instance: Weak<ServedInstance>,
    /// The one that has been idle longest comes first.
    connections: Vec<PoolEntry>,
    /// The deployment's `keepAliveIdle`.
    idle_max_us: u64,
}

impl IdleSet {
    fn is_fresh(&self, pooled: &PoolEntry, now_us: u64) -> bool {
        now_us.saturating_sub(pooled.idle_since_us) < self.idle_max_us
    }
}

#[derive(Debug, Default)]
pub struct ConnectionPool {
    /// By the instance's serial.
    idle: BTreeMap<u64, IdleSet>,
}

impl ConnectionPool {
    /// Takes the most recently used connection that is alive.
    pub fn take(&mut self, instance: &ServedInstance, now_us: u64) -> Option<IdleConnection> {
        let set = self.idle.get_mut(&instance.serial)?;
        while let Some(pooled) = set.connections.pop() {
            if !set.is_fresh(&pooled, now_us) {
                // The others have been idle for longer.
                set.connections.clear();
                return None;
            }
            let idle_us = now_us.saturating_sub(pooled.idle_since_us);
            let idle = pooled.idle;
            if idle.is_alive() && (idle_us < TRUST_IDLE_US || idle.is_alive_now()) {
                return Some(idle);
            }
        }
        None
    }

    /// Adds a connection that became idle now, if the instance accepts more requests.
    pub fn put(
        &mut self,
        instance: &Arc<ServedInstance>,
        idle: IdleConnection,
        idle_max_us: u64,
        now_us: u64,
    ) {
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
            let idle_since_us = now_us;
            set.connections.push(PoolEntry {
                idle,
                idle_since_us,
            });
        }
    }

    /// Closes the connection that has been idle longest.
    pub fn close_oldest(&mut self) {
        // The first of each set has been idle longest there.
        let since = |set: &IdleSet| set.connections.first().map(|c| c.idle_since_us);
        let sets = self.idle.values_mut().filter(|set| since(set).is_some());
        if let Some(oldest) = sets.min_by_key(|set| since(set)) {
            oldest.connections.remove(0);
        }
    }

    pub fn close_all(&mut self) {
        self.idle.clear();
    }

    /// Closes connections that have been idle too long, were closed by the instance, or lead to an
    /// instance that is draining or gone.
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
    use crate::upstream::CountGuard;

    const IDLE_MAX_US: u64 = 2_000_000;

    /// A pool with a connection that became idle at 0, its instance, and the instance's end.
    async fn pool_with_idle() -> (ConnectionPool, Arc<ServedInstance>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        let instance = ServedInstance::new("i".to_owned().into(), 0, 0, address.to_string());
        instance.update(1, false);
        let (mut pool, instance) = (ConnectionPool::default(), Arc::new(instance));
        let idle = IdleConnection::new(near.unwrap(), CountGuard::new(&Arc::default()));
        let set = IdleSet {
            instance: Arc::downgrade(&instance),
            connections: vec![PoolEntry {
                idle,
                idle_since_us: 0,
            }],
            idle_max_us: IDLE_MAX_US,
        };
        pool.idle.insert(instance.serial, set);
        (pool, instance, far.unwrap().0)
    }

    #[tokio::test]
    async fn a_connection_is_reused_until_its_idle_timeout() {
        let (mut pool, instance, _far) = pool_with_idle().await;
        assert!(pool.take(&instance, IDLE_MAX_US).is_none());
        assert!(pool.idle[&instance.serial].connections.is_empty());
        let (mut pool, instance, _far) = pool_with_idle().await;
        assert!(pool.take(&instance, IDLE_MAX_US - 1).is_some());
    }

    #[tokio::test]
    async fn a_close_that_is_not_yet_reported_is_detected() {
        let (mut pool, instance, far) = pool_with_idle().await;
        drop(far);
        assert!(pool.take(&instance, TRUST_IDLE_US).is_none());
    }

    #[tokio::test]
    async fn a_connection_is_closed_after_its_idle_timeout() {
        let (mut pool, instance, _far) = pool_with_idle().await;
        pool.sweep(IDLE_MAX_US - 1);
        assert_eq!(pool.idle[&instance.serial].connections.len(), 1);
        pool.sweep(IDLE_MAX_US);
        assert!(pool.idle.is_empty());
    }
}
