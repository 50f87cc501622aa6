//! The routes as one immutable snapshot that is swapped atomically. Invariants: an update older
//! than the endpoint's newest (by revision, then by slot allocation) changes nothing; draining
//! instances are marked, and surrendered slots closed, before the snapshot that says so becomes
//! visible; a request uses the snapshot it began with. A snapshot consists of partitions, of which
//! an update copies only its own: the cost of an update must not grow with the number of endpoints.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use contract::ids::BUCKETS;
use contract::resources::{AuthMode, Authorization, ErrorMapping, ModelClientErrors, Protocol};
use contract::route::{ANY_GATEWAY, DeploymentRoute, InstanceRoute, Route, RouteUpdate};
use contract::{Bucket, EndpointKey, Name, Position, Uid};
use http::{HeaderValue, Method};

use crate::admission::{DeploymentState, RoutedInstance};
use crate::limits::TimeLimits;
use crate::paths::{DeploymentPaths, PathKind, PathShares, RoutedShares};
use crate::reply::{RETRY_AFTER_SECS_MAX, Refusal};
use crate::timer::now_us;

/// Partitions that endpoints are distributed over. A power of two.
const PARTITIONS: usize = 256;

type Partition = HashMap<Box<str>, Arc<ServedEndpoint>>;

/// All routes at one moment.
#[derive(Clone, Debug)]
pub struct RouteSet {
    partitions: Box<[Arc<Partition>]>,
    /// By bucket: what has been applied for each endpoint, including recently deleted ones.
    applied: Box<[Arc<AppliedRoutes>]>,
}

/// What has been applied of one endpoint's route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct AppliedRoute {
    revision: Position,
    /// Position of the slot allocation; `None` if the endpoint is deleted.
    members: Option<Position>,
}

/// What has been applied of the routes of one bucket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AppliedRoutes {
    endpoints: BTreeMap<EndpointKey, AppliedRoute>,
}

impl AppliedRoutes {
    pub fn revisions(&self) -> BTreeMap<EndpointKey, Position> {
        let endpoints = self.endpoints.iter();
        endpoints
            .map(|(endpoint, applied)| (endpoint.clone(), applied.revision))
            .collect()
    }

    /// The oldest slot allocation among the bucket's routes.
    pub fn members(&self) -> Option<Position> {
        let endpoints = self.endpoints.values();
        endpoints.filter_map(|applied| applied.members).min()
    }
}

#[derive(Debug)]
pub struct ServedEndpoint {
    pub uid: Uid,
    pub auth: AuthMode,
    /// SHA-256 of the valid keys.
    pub keys: Vec<[u8; 32]>,
    pub model_client_errors: ModelClientErrors,
    pub request_bytes_max: u64,
    /// How requests are refused before a deployment is chosen: as by the one with the largest share.
    pub error_mapping: ErrorMapping,
    pub protocol: Protocol,
    /// Of requests to `/score`; of all if no deployment has `routes`.
    pub shares: PathShares,
    /// Of other requests; `None` if no deployment has `routes`.
    pub routed: Option<Box<RoutedShares>>,
    pub deployments: Vec<ServedDeployment>,
}

#[derive(Debug)]
pub struct ServedDeployment {
    /// The name as a header value.
    pub name_header: HeaderValue,
    pub limits: TimeLimits,
    pub queue_wait_us: u64,
    /// Whether instances get a client's `authorization`.
    pub passes_authorization: bool,
    /// How long a connection to an instance may be idle and still be reused.
    pub keep_alive_idle_us: u64,
    /// Concurrent requests per instance, across all gateways.
    pub limit: u32,
    pub thresholds_us: Vec<u64>,
    pub error_mapping: ErrorMapping,
    pub protocol: Protocol,
    /// Its `routes`, if it has any.
    pub paths: Option<Box<DeploymentPaths>>,
    pub state: Arc<DeploymentState>,
}

impl ServedDeployment {
    /// Seconds after which a refused client may retry, rounded up.
    pub fn retry_after_secs(&self) -> u64 {
        let secs = self.queue_wait_us.div_ceil(1_000_000);
        secs.clamp(1, RETRY_AFTER_SECS_MAX)
    }

    pub fn opens(&self, kind: PathKind) -> bool {
        match &self.paths {
            Some(paths) => paths.opens(kind),
            None => kind != PathKind::Other,
        }
    }

    /// Whether requests with this method count in frames.
    pub fn counts(&self, method: &Method) -> bool {
        let paths = self.paths.as_ref();
        paths.is_none_or(|paths| paths.counts(method))
    }
}

impl Default for RouteSet {
    fn default() -> Self {
        Self {
            partitions: vec![Arc::default(); PARTITIONS].into(),
            applied: vec![Arc::default(); usize::from(BUCKETS)].into(),
        }
    }
}

/// FNV-1a: a few instructions per byte of a short name.
fn partition_of(name: &str) -> usize {
    let hash = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    (hash ^ (hash >> 16)) as usize % PARTITIONS
}

impl RouteSet {
    pub fn endpoint(&self, name: &str) -> Option<&Arc<ServedEndpoint>> {
        self.partitions[partition_of(name)].get(name)
    }

    /// Returns what has been applied of a bucket's routes.
    pub fn applied(&self, bucket: Bucket) -> Option<Arc<AppliedRoutes>> {
        self.applied.get(usize::from(bucket.0)).cloned()
    }

    fn partition(&mut self, name: &str) -> &mut Partition {
        Arc::make_mut(&mut self.partitions[partition_of(name)])
    }

    fn set_applied(&mut self, endpoint: &EndpointKey, applied: Option<AppliedRoute>) {
        let Some(bucket) = self.applied.get_mut(usize::from(endpoint.bucket().0)) else {
            return;
        };
        let endpoints = &mut Arc::make_mut(bucket).endpoints;
        match applied {
            Some(applied) => {
                endpoints.insert(endpoint.clone(), applied);
            }
            None => {
                endpoints.remove(endpoint);
            }
        }
    }
}

impl ServedEndpoint {
    pub fn deployment(&self, name: &[u8]) -> Option<usize> {
        self.deployments
            .iter()
            .position(|deployment| deployment.name_header.as_bytes() == name)
    }

    /// How requests for this kind of path are shared.
    pub fn shares(&self, kind: PathKind) -> Result<&PathShares, Refusal> {
        match (kind, &self.routed) {
            (PathKind::Scoring, _) | (PathKind::BelowScoring, None) => Ok(&self.shares),
            (PathKind::BelowScoring, Some(routed)) => Ok(&routed.below_scoring),
            (PathKind::Other, Some(routed)) => Ok(&routed.other),
            (PathKind::Other, None) => Err(Refusal::UnknownEndpoint),
        }
    }
}

/// Turns updates into snapshots.
#[derive(Debug)]
pub struct Router {
    gateway: String,
    current: ArcSwap<RouteSet>,
    index: Mutex<RouteIndex>,
}

#[derive(Debug, Default)]
struct RouteIndex {
    /// The newest update of each endpoint, including recently deleted ones, so that an old one
    /// changes nothing.
    updates: BTreeMap<EndpointKey, Arc<RouteUpdate>>,
    /// Deletions and when they were received, in that order.
    deleted: VecDeque<(u64, Arc<RouteUpdate>)>,
    /// Deployments that may still have something to report, by bucket.
    deployments: BTreeMap<Bucket, Vec<Arc<DeploymentState>>>,
    next_serial: u64,
    next_meter_slot: usize,
    /// Whether there are changes that have not been saved.
    has_unsaved: bool,
}

impl Router {
    pub fn new(gateway: String) -> Self {
        Self {
            gateway,
            current: ArcSwap::default(),
            index: Mutex::default(),
        }
    }

    pub fn current(&self) -> &ArcSwap<RouteSet> {
        &self.current
    }

    /// Applies a batch as one swap.
    pub fn apply(&self, batch: impl IntoIterator<Item = Arc<RouteUpdate>>) {
        let mut index = self.index();
        let mut next: Option<RouteSet> = None;
        for update in batch {
            let newest = index.updates.get(&update.endpoint);
            // Of equal versions the later one wins: slots are allocated in two steps.
            if newest.is_some_and(|newest| version(newest) > version(&update) || *newest == update)
            {
                continue;
            }
            let next = next.get_or_insert_with(|| RouteSet::clone(&self.current.load()));
            self.apply_one(&mut index, next, &update);
            if update.route.is_none() {
                index.deleted.push_back((now_us(), update.clone()));
            }
            index.updates.insert(update.endpoint.clone(), update);
            index.has_unsaved = true;
        }
        // Swapped under the lock, so that of two batches the later one stays.
        if let Some(next) = next {
            self.current.store(Arc::new(next));
        }
    }

    /// Forgets endpoints that were deleted at least `retention` ago.
    pub fn expire_deleted(&self, retention: Duration) {
        let mut index = self.index();
        let oldest = now_us().saturating_sub(retention.as_micros() as u64);
        let mut next: Option<RouteSet> = None;
        while let Some((_, update)) = index.deleted.pop_front_if(|(at_us, _)| *at_us <= oldest) {
            let newest = index.updates.get(&update.endpoint);
            // It may have been recreated or deleted again.
            if !newest.is_some_and(|newest| Arc::ptr_eq(newest, &update)) {
                continue;
            }
            index.updates.remove(&update.endpoint);
            index.has_unsaved = true;
            let next = next.get_or_insert_with(|| RouteSet::clone(&self.current.load()));
            next.set_applied(&update.endpoint, None);
        }
        if let Some(next) = next {
            self.current.store(Arc::new(next));
        }
    }

    /// Returns the deployments of a bucket that may have something to report.
    pub fn deployments(&self, bucket: Bucket) -> Vec<Arc<DeploymentState>> {
        let index = self.index();
        index.deployments.get(&bucket).cloned().unwrap_or_default()
    }

    /// Called by the meter after the final report of a removed deployment.
    pub fn forget(&self, state: &DeploymentState) {
        let mut index = self.index();
        if let Some(deployments) = index.deployments.get_mut(&state.endpoint.bucket()) {
            deployments.retain(|deployment| deployment.meter_slot != state.meter_slot);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.index().updates.is_empty()
    }

    /// Returns the routes to save if they changed since the last call.
    pub fn take_unsaved(&self) -> Option<Vec<Arc<RouteUpdate>>> {
        let mut index = self.index();
        std::mem::take(&mut index.has_unsaved).then(|| index.updates.values().cloned().collect())
    }

    fn apply_one(&self, index: &mut RouteIndex, next: &mut RouteSet, update: &RouteUpdate) {
        let name = update.endpoint.endpoint();
        let previous = next.partition(name.as_str()).remove(name.as_str());
        let endpoint = update
            .route
            .as_ref()
            .map(|route| self.endpoint(index, update, route, previous.as_deref()));
        let kept_uids: Vec<Uid> = endpoint
            .iter()
            .flat_map(|endpoint| endpoint.deployments.iter().map(|d| d.state.uid))
            .collect();
        for deployment in previous.iter().flat_map(|endpoint| &endpoint.deployments) {
            if !kept_uids.contains(&deployment.state.uid) {
                deployment.state.retire();
            }
        }
        if let Some(endpoint) = endpoint {
            next.partition(name.as_str())
                .insert(name.as_str().into(), Arc::new(endpoint));
        }
        let applied = AppliedRoute {
            revision: update.revision,
            members: update.route.as_ref().map(|_| update.members),
        };
        next.set_applied(&update.endpoint, Some(applied));
    }

    fn endpoint(
        &self,
        index: &mut RouteIndex,
        update: &RouteUpdate,
        route: &Route,
        previous: Option<&ServedEndpoint>,
    ) -> ServedEndpoint {
        let previous = previous.filter(|previous| previous.uid == route.endpoint_uid);
        let deployments: Vec<ServedDeployment> = route
            .deployments
            .iter()
            .map(|(name, deployment)| {
                let state = previous
                    .into_iter()
                    .flat_map(|endpoint| &endpoint.deployments)
                    .map(|old| &old.state)
                    .find(|state| state.uid == deployment.uid && state.name == *name)
                    .cloned()
                    .unwrap_or_else(|| {
                        index.add_deployment(&update.endpoint, name, deployment.uid)
                    });
                self.set_instances(index, &state, deployment);
                new_deployment(name, deployment, state)
            })
            .collect();
        let shares = |kind, previous| {
            let with_share = deployments.iter().zip(route.deployments.values());
            let percentages = with_share
                .map(|(deployment, route)| deployment.opens(kind).then_some(route.percent));
            PathShares::new(percentages, previous)
        };
        let is_routed = deployments.iter().any(|d| d.paths.is_some());
        let routed = is_routed.then(|| {
            let previous = previous.and_then(|previous| previous.routed.as_deref());
            Box::new(RoutedShares {
                below_scoring: shares(
                    PathKind::BelowScoring,
                    previous.map(|routed| &routed.below_scoring),
                ),
                other: shares(PathKind::Other, previous.map(|routed| &routed.other)),
            })
        });
        let by_share = route.deployments.values().max_by_key(|d| d.percent);
        ServedEndpoint {
            uid: route.endpoint_uid,
            auth: route.auth,
            keys: route
                .key_hashes
                .iter()
                .filter_map(|h| parse_key_hash(h))
                .collect(),
            model_client_errors: route.model_client_errors,
            request_bytes_max: route.request_bytes_max,
            error_mapping: by_share.map_or_else(Default::default, |d| d.error_mapping),
            protocol: by_share.map_or_else(Default::default, |d| d.protocol),
            shares: shares(PathKind::Scoring, previous.map(|previous| &previous.shares)),
            routed,
            deployments,
        }
    }

    fn set_instances(
        &self,
        index: &mut RouteIndex,
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
        let routed: Vec<RoutedInstance> = route
            .instances
            .iter()
            .map(|instance| RoutedInstance {
                id: instance.id.clone(),
                address: instance.address.clone(),
                draining: instance.draining,
                slots: slots(instance),
            })
            .collect();
        state.set_instances(&routed, || {
            index.next_serial += 1;
            index.next_serial
        });
    }

    fn index(&self) -> MutexGuard<'_, RouteIndex> {
        // Updates are applied one by one and can be reapplied, so a panic leaves nothing
        // inconsistent.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Orders the updates of one endpoint.
fn version(update: &RouteUpdate) -> (Position, Position) {
    (update.revision, update.members)
}

impl RouteIndex {
    fn add_deployment(
        &mut self,
        endpoint: &EndpointKey,
        name: &Name,
        uid: Uid,
    ) -> Arc<DeploymentState> {
        let slot = self.next_meter_slot;
        self.next_meter_slot += 1;
        let state = DeploymentState::new(endpoint.clone(), name.clone(), uid, slot);
        let state = Arc::new(state);
        let of_bucket = self.deployments.entry(endpoint.bucket()).or_default();
        of_bucket.push(state.clone());
        state
    }
}

fn new_deployment(
    name: &Name,
    route: &DeploymentRoute,
    state: Arc<DeploymentState>,
) -> ServedDeployment {
    let settings = &route.request_settings;
    ServedDeployment {
        // A name contains only letters, digits and dashes.
        name_header: HeaderValue::from_str(name.as_str())
            .unwrap_or_else(|_| HeaderValue::from_static("")),
        limits: TimeLimits::new(settings),
        queue_wait_us: settings.max_queue_wait.millis() * 1000,
        passes_authorization: route.authorization == Authorization::Pass,
        keep_alive_idle_us: settings.keep_alive_idle.millis() * 1000,
        limit: settings.max_concurrent_requests_per_instance,
        thresholds_us: route.latency_thresholds_us.clone(),
        error_mapping: route.error_mapping,
        protocol: route.protocol,
        paths: route
            .routes
            .as_ref()
            .map(|routes| Box::new(DeploymentPaths::new(routes))),
        state,
    }
}

/// Parses a key hash. One that is not 64 hexadecimal digits matches no key.
fn parse_key_hash(text: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    match hex::decode_to_slice(text, &mut digest) {
        Ok(()) => Some(digest),
        Err(error) => {
            tracing::warn!(%error, effect = "the key is refused", "invalid key hash in a route");
            None
        }
    }
}
