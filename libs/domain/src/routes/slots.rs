//! Dealing an instance's slots to the gateways, so that its limit holds over all of them.
//!
//! Invariants: dealt slots sum up to the limit, or to one for each gateway where there are more
//! gateways than slots. When the gateways become others, no grant grows before all of them have
//! given way: first everybody gets the lesser of what it had and what it will have, then what it is
//! to have. With one gateway, or none known, nothing is dealt: whoever serves has the whole limit.

use std::collections::{BTreeMap, BTreeSet};

use contract::frame::{Frame, SourceKind};
use contract::ids::{Bucket, InstanceId, Position};
use contract::route::ANY_GATEWAY;
use contract::time::{Span, Timestamp};
use sha2::{Digest, Sha256};

use crate::members::{Members, SILENT_AFTER};

/// Slots of one instance, by gateway, as a route carries them.
pub type Slots = BTreeMap<String, u32>;

/// A gateway that has not given way after this time is cut off, and the others need not wait longer.
/// Frames come every second and routes in less, so it is far more than a healthy one takes.
pub const GIVE_WAY_WITHIN: Span = Span::from_secs(10);

/// What a gateway may have at once on an instance, by a route.
pub fn granted(slots: &Slots, gateway: &str, limit: u32) -> u32 {
    let own = slots.get(gateway).or_else(|| slots.get(ANY_GATEWAY));
    own.copied().unwrap_or(limit)
}

/// The slots as they are to be once everybody has them. A gateway that is not named gets one, so
/// that a newcomer serves at once.
pub fn deal(limit: u32, instance: &InstanceId, gateways: &BTreeSet<String>) -> Slots {
    let count = gateways.len() as u32;
    if count <= 1 {
        return Slots::from([(ANY_GATEWAY.to_owned(), limit)]);
    }
    let (share, rest) = (limit / count, limit % count);
    let mut in_turn: Vec<&String> = gateways.iter().collect();
    if rest > 0 {
        // By instance, so that what is left over does not always go to the same gateway.
        in_turn.sort_by_cached_key(|gateway| turn(instance, gateway));
    }
    let mut slots = Slots::from([(ANY_GATEWAY.to_owned(), 1)]);
    for (place, gateway) in in_turn.into_iter().enumerate() {
        let own = share + u32::from((place as u32) < rest);
        slots.insert(gateway.clone(), own.max(1));
    }
    slots
}

/// Decides who is served first where slots do not come out even.
fn turn(instance: &InstanceId, gateway: &str) -> [u8; 32] {
    Sha256::new()
        .chain_update(instance.as_str())
        .chain_update([0])
        .chain_update(gateway)
        .finalize()
        .into()
}

/// The slots on the way from what was given to what is to be. Nothing is free then, since a deal
/// gives everything away; so `newcomers`, whom the former deal did not count, get one each.
pub fn give_way(
    limit: u32,
    given: &Slots,
    next: &Slots,
    gateways: &BTreeSet<String>,
    newcomers: &BTreeSet<String>,
) -> Slots {
    let lesser = |gateway: &str| granted(given, gateway, limit).min(granted(next, gateway, limit));
    let any = lesser(ANY_GATEWAY);
    let mut slots = Slots::from([(ANY_GATEWAY.to_owned(), any)]);
    for gateway in gateways {
        let own = match newcomers.contains(gateway) {
            true => lesser(gateway).min(1),
            false => lesser(gateway),
        };
        if own != any || next.contains_key(gateway) {
            slots.insert(gateway.clone(), own);
        }
    }
    slots
}

/// Knows from frames whether the gateways have given way since they last became others.
#[derive(Clone, Debug, Default)]
pub struct GivenWay {
    /// How far each gateway has followed the deals, by its last frame of the bucket.
    reached: BTreeMap<(Bucket, String), Position>,
    heard: BTreeMap<String, Timestamp>,
    /// The deal that is followed, and the buckets where all have given way to it.
    deal: Position,
    done: BTreeSet<Bucket>,
}

impl GivenWay {
    /// Takes in a frame that arrived at `now`.
    pub fn observe(&mut self, frame: &Frame, now: Timestamp) {
        if frame.source.kind != SourceKind::GATEWAY {
            return;
        }
        let id = &frame.source.id;
        if frame.goodbye {
            self.heard.remove(id);
            self.reached.remove(&(frame.bucket, id.clone()));
            return;
        }
        self.heard.insert(id.clone(), now);
        self.reached
            .insert((frame.bucket, id.clone()), frame.members);
    }

    /// Buckets where everybody has given way since the last call. Their routes are to be published
    /// again, with what their gateways are to have.
    pub fn due(&mut self, members: &Members, now: Timestamp) -> BTreeSet<Bucket> {
        let deal = members.dealt_as_of();
        if self.deal != deal {
            self.deal = deal;
            self.done.clear();
        }
        let open = Bucket::of_endpoints().filter(|bucket| !self.done.contains(bucket));
        let given_way = |bucket: &Bucket| {
            let reached = |gateway: &String| self.has_reached(*bucket, gateway, deal);
            is_late(members, now) || members.gateways.keys().all(reached)
        };
        let due: BTreeSet<Bucket> = open.filter(given_way).collect();
        self.done.extend(&due);
        due
    }

    /// Whether the present deal may be given out in full.
    pub fn is_done(&self, bucket: Bucket, members: &Members, now: Timestamp) -> bool {
        let reached = self.deal == members.dealt_as_of() && self.done.contains(&bucket);
        reached || is_late(members, now)
    }

    /// What the gateways together may have on an instance beyond its limit, at worst: gateways that
    /// are heard and not counted in the deal have theirs, and one that has not followed in time may
    /// have the whole limit.
    pub fn excess(
        &self,
        bucket: Bucket,
        members: &Members,
        slots: &Slots,
        limit: u32,
        now: Timestamp,
    ) -> u32 {
        let is_heard = |at: &Timestamp| now.since(*at) < SILENT_AFTER;
        let heard = self.heard.iter().filter(|(_, at)| is_heard(at));
        let mut gateways: BTreeSet<&String> = heard.map(|(gateway, _)| gateway).collect();
        gateways.extend(members.gateways.keys());
        let held = gateways.into_iter().map(|gateway| {
            let cut_off = members.gateways.contains_key(gateway)
                && is_late(members, now)
                && !self.has_reached(bucket, gateway, members.dealt_as_of());
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

    fn has_reached(&self, bucket: Bucket, gateway: &str, deal: Position) -> bool {
        self.reached
            .get(&(bucket, gateway.to_owned()))
            .is_some_and(|reached| *reached >= deal)
    }
}

fn is_late(members: &Members, now: Timestamp) -> bool {
    now.since(members.dealt_since()) >= GIVE_WAY_WITHIN
}
