//! Admission and the queue of one deployment, over all threads. Invariants: never more pending
//! requests than asked for, never more on an instance than its slots, and who waits longest is
//! served first. The queue's lock is only touched while somebody waits.

use std::collections::{BTreeSet, VecDeque};
use std::future::Future as _;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use arc_swap::ArcSwap;
use contract::{EndpointKey, InstanceId, Name, Uid};
use tokio::sync::oneshot;

use crate::instance::Instance;
use crate::timer::now_us;

/// What one incarnation of a deployment keeps over all its routes.
#[derive(Debug)]
pub struct DeploymentState {
    pub endpoint: EndpointKey,
    pub name: Name,
    pub uid: Uid,
    /// Index of its cells in the threads' shards.
    pub meter_slot: usize,
    /// Admitted and not yet ended: queued or served.
    pending: AtomicU32,
    pub serving: Level,
    pub queued: Level,
    instances: ArcSwap<InstanceSet>,
    /// Gone from the route with requests still on them.
    leaving: Mutex<Vec<Arc<Instance>>>,
    queue: Mutex<VecDeque<oneshot::Sender<Slot>>>,
    gone: AtomicBool,
}

#[derive(Debug, Default)]
struct InstanceSet {
    /// As the route names them, those that drain too.
    all: Vec<Arc<Instance>>,
    /// Those that take requests.
    active: Vec<Arc<Instance>>,
    /// This gateway's slots on all of them, those that drain too.
    slots: u32,
}

/// A number of requests and the highest it was since the meter asked.
#[derive(Debug, Default)]
pub struct Level {
    now: AtomicU32,
    max: AtomicU32,
}

impl Level {
    pub fn enter(&self) {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        if now > self.max.load(Ordering::Relaxed) {
            self.max.fetch_max(now, Ordering::Relaxed);
        }
    }

    pub fn leave(&self) {
        self.now.fetch_sub(1, Ordering::SeqCst);
    }

    pub fn now(&self) -> u32 {
        self.now.load(Ordering::SeqCst)
    }

    /// The highest since the last call; it starts again from what is there now.
    pub fn take_max(&self) -> u32 {
        let now = self.now();
        self.max.swap(now, Ordering::Relaxed).max(now)
    }
}

/// An instance that a route names, with its slots for this gateway.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub id: InstanceId,
    pub address: String,
    pub draining: bool,
    pub slots: u32,
}

/// The right to have one request on an instance; given back when dropped.
#[derive(Debug)]
pub struct Slot {
    pub instance: Arc<Instance>,
    deployment: Arc<DeploymentState>,
    /// When the request on it ended, where that is known.
    ended_us: Option<u64>,
}

impl Slot {
    /// Gives it back, where the clock has just been read.
    pub fn end(mut self, at_us: u64) {
        self.ended_us = Some(at_us);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.instance.release(self.ended_us.unwrap_or_else(now_us));
        // Sequentially consistent with `wait`: either we see the waiter or it sees our slot.
        if self.deployment.queued.now() > 0 {
            self.deployment.dispatch();
        }
    }
}

/// A request among the pending of its deployment, until this is dropped.
#[derive(Debug)]
pub struct Pending(Arc<DeploymentState>);

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.pending.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A request's place in the queue. Dropped, it has left.
#[derive(Debug)]
pub struct Waiting {
    turn: oneshot::Receiver<Slot>,
    deployment: Arc<DeploymentState>,
}

impl Waiting {
    /// A slot, once it is this request's turn; none never comes, since only a deployment that nobody
    /// knows closes its queue.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Slot>> {
        Pin::new(&mut self.turn).poll(cx).map(Result::ok)
    }
}

impl Drop for Waiting {
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
            serving: Level::default(),
            queued: Level::default(),
            instances: ArcSwap::default(),
            leaving: Mutex::default(),
            queue: Mutex::default(),
            gone: AtomicBool::new(false),
        }
    }

    /// Counts a request in unless that would make more than twice what instances take at once. Of
    /// dealt slots only our own count, so that the bound holds over all gateways.
    pub fn admit(self: &Arc<Self>, limit: u32) -> Option<Pending> {
        let instances = self.instances.load();
        let at_once = match instances.all.is_empty() {
            true => limit,
            false => instances.slots,
        };
        let max = at_once.saturating_mul(2);
        self.pending
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |pending| {
                (pending < max).then_some(pending + 1)
            })
            .is_ok()
            .then(|| Pending(self.clone()))
    }

    pub fn pending(&self) -> u32 {
        self.pending.load(Ordering::SeqCst)
    }

    /// Whether any instance takes requests.
    pub fn has_instances(&self) -> bool {
        !self.instances.load().active.is_empty()
    }

    /// A slot, if one is free and nobody waits for it.
    pub fn try_slot(self: &Arc<Self>, rotation: usize, now_us: u64) -> Option<Slot> {
        if self.queued.now() > 0 {
            return None;
        }
        self.take(rotation, now_us, None)
    }

    /// A slot on another instance than `not`, for a second try. It goes before those who wait: the
    /// request has waited already.
    pub fn other_slot(self: &Arc<Self>, not: &Instance, rotation: usize) -> Option<Slot> {
        self.take(rotation, now_us(), Some(not.serial))
    }

    /// Stands in the queue. Who waits is counted, here and by `count`, before it can get a slot.
    pub fn wait(self: &Arc<Self>, count: impl FnOnce()) -> Waiting {
        self.queued.enter();
        count();
        let (sender, turn) = oneshot::channel();
        self.queue().push_back(sender);
        self.dispatch();
        Waiting {
            turn,
            deployment: self.clone(),
        }
    }

    /// Puts the instances of a route in place. Those that drain or are no longer named take
    /// nothing from here on, on any thread.
    pub fn set_instances(self: &Arc<Self>, wanted: &[Wanted], mut serial: impl FnMut() -> u64) {
        let old = self.instances.load_full();
        let mut measured: BTreeSet<usize> = old.all.iter().map(|instance| instance.index).collect();
        measured.extend(lock(&self.leaving).iter().map(|instance| instance.index));
        let mut index = || {
            let free = (0..).find(|index| !measured.contains(index));
            let free = free.unwrap_or_default();
            measured.insert(free);
            free
        };
        let all: Vec<Arc<Instance>> = wanted
            .iter()
            .map(|want| {
                let known = old
                    .all
                    .iter()
                    .find(|known| known.id == want.id && known.address == want.address);
                let instance = known.cloned().unwrap_or_else(|| {
                    Arc::new(Instance::new(
                        want.id.clone(),
                        serial(),
                        index(),
                        want.address.clone(),
                    ))
                });
                instance.set(want.slots, want.draining);
                instance
            })
            .collect();
        let stays = |instance: &Arc<Instance>| all.iter().any(|kept| Arc::ptr_eq(kept, instance));
        let left: Vec<Arc<Instance>> = old.all.iter().filter(|i| !stays(i)).cloned().collect();
        for instance in &left {
            instance.set(0, true);
        }
        lock(&self.leaving).extend(left);
        let active = all.iter().filter(|i| !i.is_draining()).cloned().collect();
        let slots = wanted.iter().map(|want| want.slots);
        let slots = slots.fold(0, u32::saturating_add);
        let set = InstanceSet { all, active, slots };
        self.instances.store(Arc::new(set));
        self.dispatch();
    }

    /// The deployment is gone from its route.
    pub fn retire(self: &Arc<Self>) {
        self.set_instances(&[], || 0);
        self.gone.store(true, Ordering::SeqCst);
    }

    /// Gone, and nothing of it is left to be measured.
    pub fn is_over(&self) -> bool {
        self.gone.load(Ordering::SeqCst) && self.pending() == 0 && lock(&self.leaving).is_empty()
    }

    /// Every instance that may have something to report. One that left and has nothing in flight
    /// any more is named a last time.
    pub fn reported_instances(&self) -> Vec<Arc<Instance>> {
        let mut instances = self.instances.load().all.clone();
        let mut leaving = lock(&self.leaving);
        instances.extend(leaving.iter().cloned());
        leaving.retain(|instance| instance.in_flight() > 0);
        instances
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<oneshot::Sender<Slot>>> {
        lock(&self.queue)
    }

    /// Hands free slots to those who wait, the longest first.
    fn dispatch(self: &Arc<Self>) {
        let mut spare: Option<Slot> = None;
        let mut queue = self.queue();
        let mut rotation = 0;
        while queue.front().is_some() {
            if queue.front().is_some_and(oneshot::Sender::is_closed) {
                queue.pop_front();
                continue;
            }
            rotation += 1;
            let Some(slot) = spare.take().or_else(|| self.take(rotation, now_us(), None)) else {
                break;
            };
            match queue.pop_front() {
                Some(waiter) => spare = waiter.send(slot).err(),
                None => spare = Some(slot),
            }
        }
        // A slot that found no taker is given back without the lock, since that dispatches again.
        drop(queue);
        drop(spare);
    }

    /// The less loaded of two instances; failing that any with a free slot, suspects last.
    fn take(self: &Arc<Self>, rotation: usize, now_us: u64, not: Option<u64>) -> Option<Slot> {
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
        let usable = |instance: &Arc<Instance>| Some(instance.serial) != not;
        let in_order = (0..count).map(|offset| &active[(better + offset) % count]);
        let trusted = in_order
            .clone()
            .filter(|i| usable(i) && !i.is_suspect(now_us))
            .find(|i| i.try_acquire(now_us));
        let taken = trusted.or_else(|| {
            in_order
                .filter(|i| usable(i) && i.is_suspect(now_us))
                .find(|i| i.try_acquire(now_us))
        });
        taken.map(|instance| Slot {
            instance: instance.clone(),
            deployment: self.clone(),
            ended_us: None,
        })
    }
}

/// Nothing here can be left half changed by a panic, so a poisoned lock is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
