//! Binds the planning engine (`domain::instances::plan`) to the log.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use contract::events::Event;
use contract::frame::Frame;
use contract::ids::{Bucket, EndpointKey};
use contract::log::{Record, StreamKind};
use contract::time::Timestamp;
use domain::fold::EndpointFold;
use domain::instances::drain::DrainWatch;
use domain::instances::plan::{Context, plan};
use runtime::health::Health;
use runtime::ids::Ids;
use runtime::reconcile::{Deps, Reconciler};
use store::StoreError;
use tokio_util::sync::CancellationToken;

/// The planner's owner half of the actuator.
pub struct Planner {
    /// The node that new instances are given to.
    node: String,
    ids: Arc<dyn Ids>,
    drain_watch: DrainWatch,
}

impl Planner {
    pub fn new(node: String, ids: Arc<dyn Ids>) -> Self {
        Self {
            node,
            ids,
            drain_watch: DrainWatch::default(),
        }
    }
}

/// Runs the planner until `shutdown`.
pub async fn run(
    node: String,
    deps: Deps,
    health: &Health,
    shutdown: CancellationToken,
) -> Result<(), StoreError> {
    let planner = Planner {
        node,
        ids: deps.ids.clone(),
        drain_watch: DrainWatch::default(),
    };
    runtime::reconcile::run(planner, deps, health.component("planner"), shutdown).await
}

impl Reconciler for Planner {
    type State = EndpointFold;

    const SERVICE: &'static str = "actuator";
    const STREAM: StreamKind = StreamKind::Instances;
    /// Back-offs and drain deadlines are whole seconds; a quarter is fine enough.
    const TICK: Duration = Duration::from_millis(250);
    /// Who takes a bucket over must know of every gateway that may still use an instance.
    const HEARS_ALL_BUCKETS: bool = true;

    fn apply(&mut self, state: &mut EndpointFold, record: &Record) {
        state.apply(record);
    }

    fn evaluate(
        &mut self,
        key: &EndpointKey,
        state: &mut EndpointFold,
        now: Timestamp,
    ) -> Vec<Event> {
        let granted = state.granted();
        let context = Context {
            granted: &granted,
            drained: &|instance| self.drain_watch.is_drained(key, instance, now),
            node: &self.node,
            now,
        };
        let mut new_id = || self.ids.uid();
        plan(
            &key.endpoint(),
            state.endpoint.as_ref(),
            &state.instances,
            &context,
            &mut new_id,
        )
    }

    fn observe(&mut self, frame: &Frame, now: Timestamp) -> bool {
        self.drain_watch.observe(frame, now);
        true
    }

    fn due(&mut self, _now: Timestamp) -> BTreeSet<Bucket> {
        Bucket::of_endpoints().collect()
    }
}
