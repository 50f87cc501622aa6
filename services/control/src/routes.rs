//! Routes for the gateways: published on every change, and periodically all over again, since the bus may
//! lose them. Also allocates slots to gateways, in two phases when the set of gateways changes.
//!
//! Invariant: what is published follows from the log, from what was published before and from the
//! progress that gateways report. An allocation that a predecessor left unfinished is assumed to have
//! just begun.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bus::Bus;
use contract::ids::{EndpointKey, Name};
use contract::log::Record;
use contract::route::RouteUpdate;
use contract::time::Timestamp;
use domain::members::Members;
use domain::routes::slots::YieldTracker;
use domain::routes::{AllocationInputs, route, tombstone};
use domain::views::EndpointModel;
use runtime::clock::Clock;
use runtime::consumer::{Entries, SharedEntries};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::metrics::{ControlMetrics, DeploymentLabels};

pub const REPUBLISH_INTERVAL: Duration = Duration::from_secs(30);
/// How often to check whether gateways have yielded slots.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);

/// Builds routes from models, and tracks what the allocation of slots depends on.
pub struct RoutePublisher {
    bus: Arc<dyn Bus>,
    clock: Arc<dyn Clock>,
    metrics: ControlMetrics,
    allocation: Mutex<SlotAllocation>,
}

#[derive(Default)]
struct SlotAllocation {
    members: Members,
    yielded: YieldTracker,
    /// The newest published update of each endpoint.
    published: BTreeMap<EndpointKey, Arc<RouteUpdate>>,
}

impl RoutePublisher {
    pub fn new(bus: Arc<dyn Bus>, clock: Arc<dyn Clock>, metrics: ControlMetrics) -> Arc<Self> {
        Arc::new(Self {
            bus,
            clock,
            metrics,
            allocation: Mutex::default(),
        })
    }

    /// Applies a record that belongs to no endpoint. Returns whether all routes must be published again.
    pub fn apply(&self, record: &Record) -> bool {
        let mut allocation = self.allocation();
        let before = allocation.members.gateway_set_position();
        allocation.members.apply(record);
        allocation.members.gateway_set_position() != before
    }

    pub fn members(&self) -> Members {
        self.allocation().members.clone()
    }

    pub fn publish(&self, key: &EndpointKey, model: &EndpointModel) {
        let mut allocation = self.allocation();
        let update = allocation.update(key, model, self.clock.now());
        self.publish_update(&mut allocation, update);
    }

    fn publish_update(&self, allocation: &mut SlotAllocation, update: RouteUpdate) {
        let update = Arc::new(update);
        let before = allocation
            .published
            .insert(update.endpoint.clone(), update.clone());
        self.export(allocation, before.as_deref(), &update);
        if update.route.is_none() {
            allocation.published.remove(&update.endpoint);
        }
        self.bus.publish_route(update);
    }

    /// Publishes routes whose slots can grow because all gateways have yielded.
    fn publish_increases(&self, models: &Entries<EndpointModel>, now: Timestamp) {
        let mut allocation = self.allocation();
        let SlotAllocation {
            yielded, members, ..
        } = &mut *allocation;
        let due = yielded.due(members, now);
        if due.is_empty() {
            return;
        }
        for (key, entry) in due.iter().flat_map(|bucket| models.of(*bucket)) {
            let update = allocation.update(key, &entry.state, now);
            let published = allocation.published.get(key);
            if published.is_some_and(|old| update.route.is_some() && **old != update) {
                self.publish_update(&mut allocation, update);
            }
        }
    }

    fn export(
        &self,
        allocation: &SlotAllocation,
        before: Option<&RouteUpdate>,
        update: &RouteUpdate,
    ) {
        let deployments = |update: &RouteUpdate| -> BTreeSet<Name> {
            let route = update.route.iter();
            route.flat_map(|r| r.deployments.keys().cloned()).collect()
        };
        let labels = |deployment: &Name| DeploymentLabels {
            endpoint: update.endpoint.endpoint().to_string(),
            deployment: deployment.to_string(),
        };
        let previous = before.map(deployments).unwrap_or_default();
        for deployment in previous.difference(&deployments(update)) {
            self.metrics.slots_excess.remove(&labels(deployment));
        }
        let now = self.clock.now();
        for (name, deployment) in update.route.iter().flat_map(|route| &route.deployments) {
            let limit = deployment
                .request_settings
                .max_concurrent_requests_per_instance;
            let excess = deployment.instances.iter().map(|instance| {
                allocation.yielded.excess(
                    update.bucket(),
                    &allocation.members,
                    &instance.slots,
                    limit,
                    now,
                )
            });
            let excess = i64::from(excess.max().unwrap_or(0));
            self.metrics
                .slots_excess
                .get_or_create(&labels(name))
                .set(excess);
        }
    }

    fn allocation(&self) -> MutexGuard<'_, SlotAllocation> {
        // Every change is complete under the lock, so a poisoned one holds consistent state.
        self.allocation
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl SlotAllocation {
    fn update(&self, key: &EndpointKey, model: &EndpointModel, now: Timestamp) -> RouteUpdate {
        let Some(endpoint) = &model.endpoint else {
            return tombstone(key, model.position, &self.members);
        };
        let dealing = AllocationInputs {
            members: &self.members,
            published: self.published.get(key).map(AsRef::as_ref),
            yielded: self.yielded.is_done(key.bucket(), &self.members, now),
        };
        route(endpoint, &model.instances, model.position, &dealing)
    }
}

/// Follows the progress that gateways report, until `shutdown`. Nothing is published of models that are
/// not caught up.
pub async fn run(
    routes: Arc<RoutePublisher>,
    models: SharedEntries<EndpointModel>,
    are_caught_up: impl Fn() -> bool,
    shutdown: CancellationToken,
) {
    let mut frames = routes.bus.subscribe_frames();
    let mut ticks = tokio::time::interval(CHECK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            Some(frame) = frames.recv() => {
                let now = routes.clock.now();
                let mut allocation = routes.allocation();
                allocation.yielded.observe(&frame, now);
                while let Ok(frame) = frames.try_recv() {
                    allocation.yielded.observe(&frame, now);
                }
            }
            _ = ticks.tick() => {
                if are_caught_up() {
                    // Lock order everywhere: first the models, then the allocation.
                    routes.publish_increases(&models.lock(), routes.clock.now());
                }
            }
        }
    }
}
