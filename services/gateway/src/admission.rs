//! Admission and the queue of one deployment, across all threads. Invariants: never more pending
//! requests than the limit, never more on an instance than its slots, and the queue is FIFO. The
//! queue's lock is only taken while requests are waiting.

use std::collections::{BTreeSet, VecDeque};
use std::future::Future as _;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use arc_swap::ArcSwap;
use contract::{EndpointKey, InstanceId, Name, Uid};
use tokio::sync::oneshot;

use crate::instance::ServedInstance;
use crate::timer::now_us;

/// State of one incarnation of a deployment, kept across route updates.
#[derive(Debug)]
pub struct DeploymentState {
    pub endpoint: EndpointKey,
    pub name: Name,
    pub uid: Uid,
    /// Index of its counters in the threads' shards.
    pub meter_slot: usize,
    /// Requests that were admitted and have not ended: queued or being served.
    pending: AtomicU32,
    pub serving: PeakGauge,
    pub queued: PeakGauge,
    instances: ArcSwap<InstanceSet>,
    /// No longer in the route, with requests still on them.
    removed: Mutex<Vec<Arc<ServedInstance>>>,
    queue: Mutex<VecDeque<oneshot::Sender<Slot>>>,
    is_retired: AtomicBool,
}

#[derive(Debug, Default)]
struct InstanceSet {
    /// All instances in the route, including draining ones.
    all: Vec<Arc<ServedInstance>>,
    /// Instances that accept requests.
    active: Vec<Arc<ServedInstance>>,
    /// This gateway's slots on all instances, including draining ones.
    slots: u32,
}

/// A number of requests and its peak since the meter last took it.
#[derive(Debug, Default)]
pub struct PeakGauge {
    current: AtomicU32,
    peak: AtomicU32,
}

impl PeakGauge {
    pub fn enter(&self) {
        let current = self.current.fetch_add(1, Ordering::SeqCst) + 1;
        if current > self.peak.load(Ordering::Relaxed) {
            self.peak.fetch_max(current, Ordering::Relaxed);
        }
    }

    pub fn leave(&self) {
        self.current.fetch_sub(1, Ordering::SeqCst);
    }

    pub fn current(&self) -> u32 {
        self.current.load(Ordering::SeqCst)
    }

    /// Returns the peak since the last call and resets it to the current value.
    pub fn take_max(&self) -> u32 {
        let current = self.current();
        self.peak.swap(current, Ordering::Relaxed).max(current)
    }
}

/// An instance in a route, with its slots for this gateway.
#[derive(Clone, Debug)]
pub struct RoutedInstance {
    pub id: InstanceId,
    pub address: String,
    pub draining: bool,
    pub slots: u32,
}

/// Permission for one request on an instance; released when dropped.
#[derive(Debug)]
pub struct Slot {
    pub instance: Arc<ServedInstance>,
    deployment: Arc<DeploymentState>,
    /// When its request ended, if known.
    ended_us: Option<u64>,
}

impl Slot {
    /// Releases the slot, where the clock has just been read.
    pub fn release_at(mut self, at_us: u64) {
        self.ended_us = Some(at_us);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.instance.release(self.ended_us.unwrap_or_else(now_us));
        // Sequentially consistent with `enqueue`: either we see the waiter or it sees our slot.
        if self.deployment.queued.current() > 0 {
            self.deployment.dispatch();
        }
    }
}

/// Counts a request among its deployment's pending ones until dropped.
#[derive(Debug)]
pub struct PendingGuard(Arc<DeploymentState>);

impl Drop for PendingGuard {
    fn drop(&mut self) {
        self.0.pending.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A request's place in the queue. Dropping it leaves the queue.
#[derive(Debug)]
pub struct QueueTicket {
    receiver: oneshot::Receiver<Slot>,
    deployment: Arc<DeploymentState>,
}

impl QueueTicket {
    /// Ready with a slot when it is this request's turn. Never ready with `None`: only a deployment
    /// that nothing references drops its queue.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Slot>> {
        Pin::new(&mut self.receiver).poll(cx).map(Result::ok)
    }
}

impl Drop for QueueTicket {
    fn drop(&mut self) {
        self.deployment.queued.leave();
    }
}

impl DeploymentState {
    pub fn new(endpoint: EndpointKey, name: Name, uid: Uid, meter_slot: usize) -> Self {
        Self {
            endpoint,
            name,
            uid,
            meter_slot,
            pending: AtomicU32::new(0),
            serving: PeakGauge::default(),
            queued: PeakGauge::default(),
            instances: ArcSwap::default(),
            removed: Mutex::default(),
            queue: Mutex::default(),
            is_retired: AtomicBool::new(false),
        }
    }

    /// Admits a request unless that would exceed twice what the instances can serve at once. Only
    /// this gateway's share of allocated slots counts, so the bound holds across all gateways.
    pub fn admit(self: &Arc<Self>, limit: u32) -> Option<PendingGuard> {
        let instances = self.instances.load();
        let capacity = match instances.all.is_empty() {
            true => limit,
            false => instances.slots,
        };
        let max = capacity.saturating_mul(2);
        self.pending
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |pending| {
                (pending < max).then_some(pending + 1)
            })
            .is_ok()
            .then(|| PendingGuard(self.clone()))
    }

    pub fn pending(&self) -> u32 {
        self.pending.load(Ordering::SeqCst)
    }

    /// Whether any instance accepts requests.
    pub fn has_instances(&self) -> bool {
        !self.instances.load().active.is_empty()
    }

    /// Acquires a slot if one is free and no request is queued.
    pub fn try_acquire_slot(self: &Arc<Self>, rotation: usize, now_us: u64) -> Option<Slot> {
        if self.queued.current() > 0 {
            return None;
        }
        self.acquire(rotation, now_us, None)
    }

    /// Acquires a slot on an instance other than `excluded`, for a second attempt. It takes
    /// precedence over the queue: the request has already waited its turn.
    pub fn acquire_other_slot(
        self: &Arc<Self>,
        excluded: &ServedInstance,
        rotation: usize,
    ) -> Option<Slot> {
        self.acquire(rotation, now_us(), Some(excluded.serial))
    }

    /// Joins the queue. The request is counted, here and by `count`, before it can get a slot.
    pub fn enqueue(self: &Arc<Self>, count: impl FnOnce()) -> QueueTicket {
        self.queued.enter();
        count();
        let (sender, receiver) = oneshot::channel();
        self.queue().push_back(sender);
        self.dispatch();
        QueueTicket {
            receiver,
            deployment: self.clone(),
        }
    }

    /// Applies the instances of a route. Those that drain or are no longer listed accept nothing
    /// from here on, on any thread.
    pub fn set_instances(
        self: &Arc<Self>,
        routed: &[RoutedInstance],
        mut serial: impl FnMut() -> u64,
    ) {
        let old = self.instances.load_full();
        let mut measured: BTreeSet<usize> = old.all.iter().map(|instance| instance.index).collect();
        measured.extend(lock(&self.removed).iter().map(|instance| instance.index));
        let mut index = || {
            let free = (0..).find(|index| !measured.contains(index));
            let free = free.unwrap_or_default();
            measured.insert(free);
            free
        };
        let all: Vec<Arc<ServedInstance>> = routed
            .iter()
            .map(|entry| {
                let existing = old
                    .all
                    .iter()
                    .find(|existing| existing.id == entry.id && existing.address == entry.address);
                let instance = existing.cloned().unwrap_or_else(|| {
                    Arc::new(ServedInstance::new(
                        entry.id.clone(),
                        serial(),
                        index(),
                        entry.address.clone(),
                    ))
                });
                instance.update(entry.slots, entry.draining);
                instance
            })
            .collect();
        let is_kept =
            |instance: &Arc<ServedInstance>| all.iter().any(|kept| Arc::ptr_eq(kept, instance));
        let removed: Vec<Arc<ServedInstance>> =
            old.all.iter().filter(|i| !is_kept(i)).cloned().collect();
        for instance in &removed {
            instance.update(0, true);
        }
        lock(&self.removed).extend(removed);
        let active = all.iter().filter(|i| !i.is_draining()).cloned().collect();
        let slots = routed.iter().map(|entry| entry.slots);
        let slots = slots.fold(0, u32::saturating_add);
        let set = InstanceSet { all, active, slots };
        self.instances.store(Arc::new(set));
        self.dispatch();
    }

    /// Called when the deployment is removed from its route.
    pub fn retire(self: &Arc<Self>) {
        self.set_instances(&[], || 0);
        self.is_retired.store(true, Ordering::SeqCst);
    }

    /// Whether the deployment is retired and has nothing left to report.
    pub fn is_finished(&self) -> bool {
        self.is_retired.load(Ordering::SeqCst)
            && self.pending() == 0
            && lock(&self.removed).is_empty()
    }

    /// Every instance that may have something to report. A removed instance with nothing in flight
    /// is returned one last time.
    pub fn reported_instances(&self) -> Vec<Arc<ServedInstance>> {
        let mut instances = self.instances.load().all.clone();
        let mut removed = lock(&self.removed);
        instances.extend(removed.iter().cloned());
        removed.retain(|instance| instance.in_flight() > 0);
        instances
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<oneshot::Sender<Slot>>> {
        lock(&self.queue)
    }

    /// Hands free slots to queued requests in order.
    fn dispatch(self: &Arc<Self>) {
        let mut unclaimed: Option<Slot> = None;
        let mut queue = self.queue();
        let mut rotation = 0;
        while queue.front().is_some() {
            if queue.front().is_some_and(oneshot::Sender::is_closed) {
                queue.pop_front();
                continue;
            }
            rotation += 1;
            let Some(slot) = unclaimed
                .take()
                .or_else(|| self.acquire(rotation, now_us(), None))
            else {
                break;
            };
            match queue.pop_front() {
                Some(waiter) => unclaimed = waiter.send(slot).err(),
                None => unclaimed = Some(slot),
            }
        }
        // An unclaimed slot is dropped outside the lock, since that dispatches again.
        drop(queue);
        drop(unclaimed);
    }

    /// Acquires a slot on the less loaded of two instances, or else on any with a free slot;
    /// suspects come last.
    fn acquire(
        self: &Arc<Self>,
        rotation: usize,
        now_us: u64,
        excluded: Option<u64>,
    ) -> Option<Slot> {
        let set = self.instances.load();
        let active = &set.active;
        let count = active.len();
        if count == 0 {
            return None;
        }
        let first = rotation % count;
        let second = (first + 1 + (rotation / count) % count.max(2).saturating_sub(1)) % count;
        let (a, b) = (&active[first], &active[second]);
        let better = if b.in_flight() < a.in_flight() {
            second
        } else {
            first
        };
        let is_usable = |instance: &Arc<ServedInstance>| Some(instance.serial) != excluded;
        let in_order = (0..count).map(|offset| &active[(better + offset) % count]);
        let trusted = in_order
            .clone()
            .filter(|i| is_usable(i) && !i.is_suspect(now_us))
            .find(|i| i.try_acquire(now_us));
        let acquired = trusted.or_else(|| {
            in_order
                .filter(|i| is_usable(i) && i.is_suspect(now_us))
                .find(|i| i.try_acquire(now_us))
        });
        acquired.map(|instance| Slot {
            instance: instance.clone(),
            deployment: self.clone(),
            ended_us: None,
        })
    }
}

/// A panic cannot leave inconsistent state here, so poisoning is ignored.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
