//! Allocation of an instance's slots to gateways, so that its limit holds across all of them.
//!
//! Invariants: allocated slots sum to the limit, or to one per gateway if there are more gateways
//! than slots. When the set of gateways changes, no grant grows before all gateways have yielded:
//! first each gets the smaller of its current and its next grant, then its next grant. With one
//! gateway, or none known, nothing is divided: whoever serves has the whole limit.

use std::collections::{BTreeMap, BTreeSet};

use contract::frame::{Frame, SourceKind};
use contract::ids::{Bucket, InstanceId, Position};
use contract::route::ANY_GATEWAY;
use contract::time::{Span, Timestamp};
use sha2::{Digest, Sha256};

use crate::members::{Members, SILENT_AFTER};

/// Slots of one instance by gateway, as a route carries them.
pub type Slots = BTreeMap<String, u32>;

/// A gateway that has not yielded after this time is cut off, and the others stop waiting for it.
/// Frames arrive every second and routes faster, so this is far more than a healthy gateway takes.
pub const YIELD_TIMEOUT: Span = Span::from_secs(10);

/// Returns how many concurrent requests a route lets a gateway have on an instance.
pub fn granted(slots: &Slots, gateway: &str, limit: u32) -> u32 {
    let own = slots.get(gateway).or_else(|| slots.get(ANY_GATEWAY));
    own.copied().unwrap_or(limit)
}

/// Returns the final allocation. A gateway that is not named gets one slot, so that a new one can
/// serve at once.
pub fn allocate(limit: u32, instance: &InstanceId, gateways: &BTreeSet<String>) -> Slots {
    let count = gateways.len() as u32;
    if count <= 1 {
        return Slots::from([(ANY_GATEWAY.to_owned(), limit)]);
    }
    let (share, rest) = (limit / count, limit % count);
    let mut ordered: Vec<&String> = gateways.iter().collect();
    if rest > 0 {
        // Ordered per instance, so that the remainder does not always go to the same gateway.
        ordered.sort_by_cached_key(|gateway| remainder_order(instance, gateway));
    }
    let mut slots = Slots::from([(ANY_GATEWAY.to_owned(), 1)]);
    for (index, gateway) in ordered.into_iter().enumerate() {
        let own = share + u32::from((index as u32) < rest);
        slots.insert(gateway.clone(), own.max(1));
    }
    slots
}

/// The order in which gateways get a share of the remainder.
fn remainder_order(instance: &InstanceId, gateway: &str) -> [u8; 32] {
    Sha256::new()
        .chain_update(instance.as_str())
        .chain_update([0])
        .chain_update(gateway)
        .finalize()
        .into()
}

/// Returns the transitional allocation between `current` and `next`. No slot is free during it,
/// since every allocation is complete; so `newcomers`, which the current one does not include, get
/// one slot each.
pub fn yield_slots(
    limit: u32,
    current: &Slots,
    next: &Slots,
    gateways: &BTreeSet<String>,
    newcomers: &BTreeSet<String>,
) -> Slots {
    let smaller =
        |gateway: &str| granted(current, gateway, limit).min(granted(next, gateway, limit));
    let any = smaller(ANY_GATEWAY);
    let mut slots = Slots::from([(ANY_GATEWAY.to_owned(), any)]);
    for gateway in gateways {
        let own = match newcomers.contains(gateway) {
            true => smaller(gateway).min(1),
            false => smaller(gateway),
        };
        if own != any || next.contains_key(gateway) {
            slots.insert(gateway.clone(), own);
        }
    }
    slots
}

/// Tracks from frames whether the gateways have yielded slots since the set of gateways last
/// changed.
#[derive(Clone, Debug, Default)]
pub struct YieldTracker {
    /// The allocation that each gateway has reached, by its last frame of the bucket.
    reached: BTreeMap<(Bucket, String), Position>,
    last_seen: BTreeMap<String, Timestamp>,
    /// The current allocation, and the buckets where all gateways have yielded to it.
    allocation: Position,
    done: BTreeSet<Bucket>,
}

impl YieldTracker {
    /// Observes a frame that arrived at `now`.
    pub fn observe(&mut self, frame: &Frame, now: Timestamp) {
        if frame.source.kind != SourceKind::GATEWAY {
            return;
        }
        let id = &frame.source.id;
        if frame.goodbye {
            self.last_seen.remove(id);
            self.reached.remove(&(frame.bucket, id.clone()));
            return;
        }
        self.last_seen.insert(id.clone(), now);
        self.reached
            .insert((frame.bucket, id.clone()), frame.members);
    }

    /// Returns the buckets where all gateways have yielded since the last call. Publish their
    /// routes again, with the final allocation.
    pub fn due(&mut self, members: &Members, now: Timestamp) -> BTreeSet<Bucket> {
        let allocation = members.gateway_set_position();
        if self.allocation != allocation {
            self.allocation = allocation;
            self.done.clear();
        }
        let open = Bucket::of_endpoints().filter(|bucket| !self.done.contains(bucket));
        let yielded = |bucket: &Bucket| {
            let reached = |gateway: &String| self.has_reached(*bucket, gateway, allocation);
            is_late(members, now) || members.gateways.keys().all(reached)
        };
        let due: BTreeSet<Bucket> = open.filter(yielded).collect();
        self.done.extend(&due);
        due
    }

    /// Whether the current allocation may be granted in full.
    pub fn is_done(&self, bucket: Bucket, members: &Members, now: Timestamp) -> bool {
        let reached =
            self.allocation == members.gateway_set_position() && self.done.contains(&bucket);
        reached || is_late(members, now)
    }

    /// Returns how far the gateways together may exceed an instance's limit at worst: live gateways
    /// that are not part of the allocation have their own slots, and one that did not follow in
    /// time may use the whole limit.
    pub fn excess(
        &self,
        bucket: Bucket,
        members: &Members,
        slots: &Slots,
        limit: u32,
        now: Timestamp,
    ) -> u32 {
        let is_live = |at: &Timestamp| now.since(*at) < SILENT_AFTER;
        let live = self.last_seen.iter().filter(|(_, at)| is_live(at));
        let mut gateways: BTreeSet<&String> = live.map(|(gateway, _)| gateway).collect();
        gateways.extend(members.gateways.keys());
        let held = gateways.into_iter().map(|gateway| {
            let cut_off = members.gateways.contains_key(gateway)
                && is_late(members, now)
                && !self.has_reached(bucket, gateway, members.gateway_set_position());
            let most = if cut_off {
                limit
            } else {
                granted(slots, gateway, limit)
            };
            u64::from(most)
        });
        let excess = held.sum::<u64>().saturating_sub(u64::from(limit));
        u32::try_from(excess).unwrap_or(u32::MAX)
    }

    fn has_reached(&self, bucket: Bucket, gateway: &str, allocation: Position) -> bool {
        self.reached
            .get(&(bucket, gateway.to_owned()))
            .is_some_and(|reached| *reached >= allocation)
    }
}

fn is_late(members: &Members, now: Timestamp) -> bool {
    now.since(members.gateway_set_since()) >= YIELD_TIMEOUT
}
