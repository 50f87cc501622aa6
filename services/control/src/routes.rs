//! Routes for the gateways: published when something changes, and all again from time to time, since
//! the bus may lose them. Slots are dealt here, in two steps when the gateways become others.
//!
//! Invariant: what is published follows from the log, from what we published before and from what the
//! gateways say they have reached. A predecessor that was not done with a deal is assumed to have
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
use domain::routes::slots::GivenWay;
use domain::routes::{Dealing, gone, route};
use domain::views::EndpointModel;
use runtime::clock::Clock;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::metrics::{ControlMetrics, DeploymentLabels};
use crate::views::Views;

pub const REPUBLISH_EVERY: Duration = Duration::from_secs(30);
/// How often it is looked whether gateways have given way.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Makes routes of models, and keeps what slots depend on beside them.
pub struct Routes {
    bus: Arc<dyn Bus>,
    clock: Arc<dyn Clock>,
    metrics: ControlMetrics,
    dealt: Mutex<Dealt>,
}

#[derive(Default)]
struct Dealt {
    members: Members,
    given_way: GivenWay,
    /// The newest update of each endpoint.
    given: BTreeMap<EndpointKey, Arc<RouteUpdate>>,
}

impl Routes {
    pub fn new(bus: Arc<dyn Bus>, clock: Arc<dyn Clock>, metrics: ControlMetrics) -> Arc<Self> {
        Arc::new(Self {
            bus,
            clock,
            metrics,
            dealt: Mutex::default(),
        })
    }

    /// Takes in a record that belongs to no endpoint; true if all routes are to be published again.
    pub fn apply(&self, record: &Record) -> bool {
        let mut dealt = self.dealt();
        let before = dealt.members.dealt_as_of();
        dealt.members.apply(record);
        dealt.members.dealt_as_of() != before
    }

    pub fn members(&self) -> Members {
        self.dealt().members.clone()
    }

    pub fn publish(&self, key: &EndpointKey, model: &EndpointModel) {
        let mut dealt = self.dealt();
        let update = dealt.update(key, model, self.clock.now());
        self.give(&mut dealt, update);
    }

    fn give(&self, dealt: &mut Dealt, update: RouteUpdate) {
        let update = Arc::new(update);
        let before = dealt.given.insert(update.endpoint.clone(), update.clone());
        self.export(dealt, before.as_deref(), &update);
        if update.route.is_none() {
            dealt.given.remove(&update.endpoint);
        }
        self.bus.publish_route(update);
    }

    /// Publishes again where everybody has given way, and slots grow by it.
    fn deal_on(&self, views: &Views, now: Timestamp) {
        // In this order everywhere: the models, then what is dealt.
        let models = views.models();
        let mut dealt = self.dealt();
        let Dealt {
            given_way, members, ..
        } = &mut *dealt;
        let due = given_way.due(members, now);
        if due.is_empty() {
            return;
        }
        for (key, entry) in due.iter().flat_map(|bucket| models.of(*bucket)) {
            let update = dealt.update(key, &entry.state, now);
            let given = dealt.given.get(key);
            if given.is_some_and(|given| update.route.is_some() && **given != update) {
                self.give(&mut dealt, update);
            }
        }
    }

    fn export(&self, dealt: &Dealt, before: Option<&RouteUpdate>, update: &RouteUpdate) {
        let of = |update: &RouteUpdate| -> BTreeSet<Name> {
            let route = update.route.iter();
            route.flat_map(|r| r.deployments.keys().cloned()).collect()
        };
        let labels = |deployment: &Name| DeploymentLabels {
            endpoint: update.endpoint.endpoint().to_string(),
            deployment: deployment.to_string(),
        };
        let gone = before.map(of).unwrap_or_default();
        for deployment in gone.difference(&of(update)) {
            self.metrics.slots_excess.remove(&labels(deployment));
        }
        let now = self.clock.now();
        for (name, deployment) in update.route.iter().flat_map(|route| &route.deployments) {
            let limit = deployment
                .request_settings
                .max_concurrent_requests_per_instance;
            let excess = deployment.instances.iter().map(|instance| {
                dealt
                    .given_way
                    .excess(update.bucket(), &dealt.members, &instance.slots, limit, now)
            });
            let excess = i64::from(excess.max().unwrap_or(0));
            self.metrics
                .slots_excess
                .get_or_create(&labels(name))
                .set(excess);
        }
    }

    fn dealt(&self) -> MutexGuard<'_, Dealt> {
        // Each change is whole in itself, so a panic elsewhere leaves nothing half done.
        self.dealt.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Dealt {
    fn update(&self, key: &EndpointKey, model: &EndpointModel, now: Timestamp) -> RouteUpdate {
        let Some(endpoint) = &model.endpoint else {
            return gone(key, model.position, &self.members);
        };
        let dealing = Dealing {
            members: &self.members,
            given: self.given.get(key).map(AsRef::as_ref),
            given_way: self.given_way.is_done(key.bucket(), &self.members, now),
        };
        route(endpoint, &model.instances, model.position, &dealing)
    }
}

/// Follows what gateways say they have reached, until `shutdown`.
pub async fn run(routes: Arc<Routes>, views: Views, shutdown: CancellationToken) {
    let mut frames = routes.bus.subscribe_frames();
    let mut looks = tokio::time::interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            Some(frame) = frames.recv() => {
                let now = routes.clock.now();
                let mut dealt = routes.dealt();
                dealt.given_way.observe(&frame, now);
                while let Ok(frame) = frames.try_recv() {
                    dealt.given_way.observe(&frame, now);
                }
            }
            _ = looks.tick() => {
                if views.progress().borrow().caught_up {
                    routes.deal_on(&views, routes.clock.now());
                }
            }
        }
    }
}
