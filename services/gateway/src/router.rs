//! The routes as one immutable snapshot, swapped whole. Invariants: an update older than the
//! endpoint's newest (by revision, then by the deal of its slots) changes nothing; what drains is
//! marked, and slots that are given up are closed, before the snapshot that says so can be seen; a
//! request uses the one snapshot it began with. A snapshot is made of parts, of which an update copies
//! only its own: its cost must not grow with the number of endpoints.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use contract::ids::BUCKETS;
use contract::resources::{AuthMode, ModelClientErrors};
use contract::route::{ANY_GATEWAY, DeploymentRoute, InstanceRoute, Route, RouteUpdate};
use contract::{Bucket, EndpointKey, Name, Position, Uid};
use http::HeaderValue;

use crate::admission::{DeploymentState, Wanted};
use crate::split::Split;
use crate::timer::now_us;

/// Parts that endpoints are spread over. A power of two.
const PARTS: usize = 256;

type Part = HashMap<Box<str>, Arc<Endpoint>>;

/// All routes at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    parts: Box<[Arc<Part>]>,
    /// By bucket: what each endpoint's route has reached, of those that went lately too.
    reached: Box<[Arc<BucketReached>]>,
}

/// What the route of one endpoint has reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reached {
    revision: Position,
    /// The deal of its slots; none where the endpoint is gone.
    members: Option<Position>,
}

/// What the routes of one bucket have reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BucketReached {
    endpoints: BTreeMap<EndpointKey, Reached>,
}

impl BucketReached {
    pub fn revisions(&self) -> BTreeMap<EndpointKey, Position> {
        let endpoints = self.endpoints.iter();
        endpoints
            .map(|(endpoint, reached)| (endpoint.clone(), reached.revision))
            .collect()
    }

    /// The oldest deal that any of them stands at.
    pub fn members(&self) -> Option<Position> {
        let endpoints = self.endpoints.values();
        endpoints.filter_map(|reached| reached.members).min()
    }
}

#[derive(Debug)]
pub struct Endpoint {
    pub uid: Uid,
    pub auth: AuthMode,
    /// SHA-256 of the valid keys.
    pub keys: Vec<[u8; 32]>,
    pub model_client_errors: ModelClientErrors,
    pub request_bytes_max: u64,
    pub split: Option<Split>,
    /// Requests that went through the split; shared by all snapshots of this incarnation.
    pub count: Arc<AtomicU64>,
    pub deployments: Vec<Deployment>,
}

#[derive(Debug)]
pub struct Deployment {
    /// The name as a header value.
    pub header: HeaderValue,
    pub timeout_us: u64,
    pub queue_wait_us: u64,
    /// How long a connection to an instance may rest and still be used.
    pub keep_alive_idle_us: u64,
    /// Requests at once per instance, over all gateways.
    pub limit: u32,
    pub thresholds_us: Vec<u64>,
    pub state: Arc<DeploymentState>,
}

impl Deployment {
    /// Whole seconds after which who was refused may find room.
    pub fn retry_after_secs(&self) -> u64 {
        self.queue_wait_us.div_ceil(1_000_000).max(1)
    }
}

impl Default for Snapshot {
    fn default() -> Self {
        Self {
            parts: vec![Arc::default(); PARTS].into(),
            reached: vec![Arc::default(); usize::from(BUCKETS)].into(),
        }
    }
}

/// FNV-1a: a few instructions for each letter of a short name.
fn part_of(name: &str) -> usize {
    let hash = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    (hash ^ (hash >> 16)) as usize % PARTS
}

impl Snapshot {
    pub fn endpoint(&self, name: &str) -> Option<&Arc<Endpoint>> {
        self.parts[part_of(name)].get(name)
    }

    /// What has been reached in a bucket of endpoints.
    pub fn reached(&self, bucket: Bucket) -> Option<Arc<BucketReached>> {
        self.reached.get(usize::from(bucket.0)).cloned()
    }

    fn part(&mut self, name: &str) -> &mut Part {
        Arc::make_mut(&mut self.parts[part_of(name)])
    }

    fn set_reached(&mut self, endpoint: &EndpointKey, reached: Option<Reached>) {
        let Some(bucket) = self.reached.get_mut(usize::from(endpoint.bucket().0)) else {
            return;
        };
        let endpoints = &mut Arc::make_mut(bucket).endpoints;
        match reached {
            Some(reached) => {
                endpoints.insert(endpoint.clone(), reached);
            }
            None => {
                endpoints.remove(endpoint);
            }
        }
    }
}

impl Endpoint {
    pub fn deployment(&self, name: &[u8]) -> Option<usize> {
        self.deployments
            .iter()
            .position(|deployment| deployment.header.as_bytes() == name)
    }
}

/// Turns updates into snapshots.
#[derive(Debug)]
pub struct Router {
    gateway: String,
    current: ArcSwap<Snapshot>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// The newest update of each endpoint, lately deleted ones too, so that an old one changes
    /// nothing.
    updates: BTreeMap<EndpointKey, Arc<RouteUpdate>>,
    /// Deletions and when they were heard of, in that order.
    deleted: VecDeque<(u64, Arc<RouteUpdate>)>,
    /// Everything that may still have something to be measured, by bucket.
    deployments: BTreeMap<Bucket, Vec<Arc<DeploymentState>>>,
    next_serial: u64,
    next_meter_slot: usize,
    /// Not yet saved.
    changed: bool,
}

impl Router {
    pub fn new(gateway: String) -> Self {
        Self {
            gateway,
            current: ArcSwap::default(),
            known: Mutex::default(),
        }
    }

    pub fn current(&self) -> &ArcSwap<Snapshot> {
        &self.current
    }

    /// Applies a batch as one swap.
    pub fn apply(&self, batch: impl IntoIterator<Item = Arc<RouteUpdate>>) {
        let mut known = self.known();
        let mut next: Option<Snapshot> = None;
        for update in batch {
            let newest = known.updates.get(&update.endpoint);
            // Of one age the later one counts: slots are dealt in two steps.
            if newest.is_some_and(|newest| age(newest) > age(&update) || *newest == update) {
                continue;
            }
            let next = next.get_or_insert_with(|| Snapshot::clone(&self.current.load()));
            self.apply_one(&mut known, next, &update);
            if update.route.is_none() {
                known.deleted.push_back((now_us(), update.clone()));
            }
            known.updates.insert(update.endpoint.clone(), update);
            known.changed = true;
        }
        // Swapped under the lock, so that of two batches the later one stays.
        if let Some(next) = next {
            self.current.store(Arc::new(next));
        }
    }

    /// Forgets the endpoints that were deleted so long ago.
    pub fn expire(&self, kept: Duration) {
        let mut known = self.known();
        let oldest = now_us().saturating_sub(kept.as_micros() as u64);
        let mut next: Option<Snapshot> = None;
        while let Some((_, update)) = known.deleted.pop_front_if(|(at_us, _)| *at_us <= oldest) {
            let newest = known.updates.get(&update.endpoint);
            // It may have been created anew, or deleted again.
            if !newest.is_some_and(|newest| Arc::ptr_eq(newest, &update)) {
                continue;
            }
            known.updates.remove(&update.endpoint);
            known.changed = true;
            let next = next.get_or_insert_with(|| Snapshot::clone(&self.current.load()));
            next.set_reached(&update.endpoint, None);
        }
        if let Some(next) = next {
            self.current.store(Arc::new(next));
        }
    }

    /// Everything of a bucket that may have something to report.
    pub fn deployments(&self, bucket: Bucket) -> Vec<Arc<DeploymentState>> {
        let known = self.known();
        known.deployments.get(&bucket).cloned().unwrap_or_default()
    }

    /// Called by the meter once the last word of a deployment that is gone has been reported.
    pub fn forget(&self, state: &DeploymentState) {
        let mut known = self.known();
        if let Some(deployments) = known.deployments.get_mut(&state.endpoint.bucket()) {
            deployments.retain(|deployment| deployment.meter_slot != state.meter_slot);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.known().updates.is_empty()
    }

    /// The routes to save, if they changed since the last call.
    pub fn take_changed(&self) -> Option<Vec<Arc<RouteUpdate>>> {
        let mut known = self.known();
        std::mem::take(&mut known.changed).then(|| known.updates.values().cloned().collect())
    }

    fn apply_one(&self, known: &mut Known, next: &mut Snapshot, update: &RouteUpdate) {
        let name = update.endpoint.endpoint();
        let previous = next.part(name.as_str()).remove(name.as_str());
        let endpoint = update
            .route
            .as_ref()
            .map(|route| self.endpoint(known, update, route, previous.as_deref()));
        let stays: Vec<Uid> = endpoint
            .iter()
            .flat_map(|endpoint| endpoint.deployments.iter().map(|d| d.state.uid))
            .collect();
        for deployment in previous.iter().flat_map(|endpoint| &endpoint.deployments) {
            if !stays.contains(&deployment.state.uid) {
                deployment.state.retire();
            }
        }
        if let Some(endpoint) = endpoint {
            next.part(name.as_str())
                .insert(name.as_str().into(), Arc::new(endpoint));
        }
        let reached = Reached {
            revision: update.revision,
            members: update.route.as_ref().map(|_| update.members),
        };
        next.set_reached(&update.endpoint, Some(reached));
    }

    fn endpoint(
        &self,
        known: &mut Known,
        update: &RouteUpdate,
        route: &Route,
        previous: Option<&Endpoint>,
    ) -> Endpoint {
        let previous = previous.filter(|previous| previous.uid == route.endpoint_uid);
        let deployments = route
            .deployments
            .iter()
            .map(|(name, deployment)| {
                let state = previous
                    .into_iter()
                    .flat_map(|endpoint| &endpoint.deployments)
                    .map(|old| &old.state)
                    .find(|state| state.uid == deployment.uid && state.name == *name)
                    .cloned()
                    .unwrap_or_else(|| known.new_state(&update.endpoint, name, deployment.uid));
                self.set_instances(known, &state, deployment);
                new_deployment(name, deployment, state)
            })
            .collect();
        Endpoint {
            uid: route.endpoint_uid,
            auth: route.auth,
            keys: route.key_hashes.iter().filter_map(|h| digest(h)).collect(),
            model_client_errors: route.model_client_errors,
            request_bytes_max: route.request_bytes_max,
            split: Split::new(route.deployments.values().map(|d| d.percent)),
            count: previous.map_or_else(Arc::default, |previous| previous.count.clone()),
            deployments,
        }
    }

    fn set_instances(
        &self,
        known: &mut Known,
        state: &Arc<DeploymentState>,
        route: &DeploymentRoute,
    ) {
        let limit = route.request_settings.max_concurrent_requests_per_instance;
        let slots = |instance: &InstanceRoute| {
            let own = instance.slots.get(&self.gateway);
            own.or_else(|| instance.slots.get(ANY_GATEWAY))
                .copied()
                .unwrap_or(limit)
        };
        let wanted: Vec<Wanted> = route
            .instances
            .iter()
            .map(|instance| Wanted {
                id: instance.id.clone(),
                address: instance.address.clone(),
                draining: instance.draining,
                slots: slots(instance),
            })
            .collect();
        state.set_instances(&wanted, || {
            known.next_serial += 1;
            known.next_serial
        });
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Updates are applied one by one and each can be applied again, so nothing is half done.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Orders the updates of one endpoint.
fn age(update: &RouteUpdate) -> (Position, Position) {
    (update.revision, update.members)
}

impl Known {
    fn new_state(&mut self, endpoint: &EndpointKey, name: &Name, uid: Uid) -> Arc<DeploymentState> {
        let slot = self.next_meter_slot;
        self.next_meter_slot += 1;
        let state = DeploymentState::new(endpoint.clone(), name.clone(), uid, slot);
        let state = Arc::new(state);
        let of_bucket = self.deployments.entry(endpoint.bucket()).or_default();
        of_bucket.push(state.clone());
        state
    }
}

fn new_deployment(name: &Name, route: &DeploymentRoute, state: Arc<DeploymentState>) -> Deployment {
    let settings = &route.request_settings;
    Deployment {
        // A name holds letters, digits and dashes only.
        header: HeaderValue::from_str(name.as_str())
            .unwrap_or_else(|_| HeaderValue::from_static("")),
        timeout_us: settings.timeout.millis() * 1000,
        queue_wait_us: settings.max_queue_wait.millis() * 1000,
        keep_alive_idle_us: settings.keep_alive_idle.millis() * 1000,
        limit: settings.max_concurrent_requests_per_instance,
        thresholds_us: route.latency_thresholds_us.clone(),
        state,
    }
}

/// A key's hash; one that is not 64 hexadecimal digits matches nothing.
fn digest(text: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    match hex::decode_to_slice(text, &mut digest) {
        Ok(()) => Some(digest),
        Err(error) => {
            tracing::warn!(%error, "a key hash in a route is not a SHA-256 in hexadecimal; that key is refused");
            None
        }
    }
}
