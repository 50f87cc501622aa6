//! Connects the planning engine (`domain::instances::plan`) to the log.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use contract::frame::Frame;
use contract::ids::{Bucket, EndpointKey};
use contract::log::{Record, StreamKind, StreamName};
use contract::time::Timestamp;
use domain::fold::{EndpointFold, FOLD_VERSION};
use domain::instances::drain::DrainWatch;
use domain::instances::plan::{PlanContext, plan};
use domain::members::Members;
use runtime::consumer::Fold;
use runtime::health::HealthRegistry;
use runtime::ids::Ids;
use runtime::reconcile::{Deps, Outputs, Reconciler};
use store::StoreError;
use tokio_util::sync::CancellationToken;

/// What a planner knows of the node in its process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnNode {
    /// Its id.
    pub id: String,
    /// Whether there can be no other node, since store and bus belong to this process.
    pub is_only: bool,
}

/// The planner half of the actuator.
pub struct Planner {
    /// The node in this process, used until any node is a member.
    own_node: Option<OwnNode>,
    ids: Arc<dyn Ids>,
    drain_watch: DrainWatch,
}

impl Planner {
    pub fn new(own_node: Option<OwnNode>, ids: Arc<dyn Ids>) -> Self {
        Self {
            own_node,
            ids,
            drain_watch: DrainWatch::default(),
        }
    }
}

/// Runs the planner until `shutdown`. `own_node` is the node in this process, if any; it gets instances
/// before any node is a member.
pub async fn run(
    own_node: Option<OwnNode>,
    deps: Deps,
    health: &HealthRegistry,
    shutdown: CancellationToken,
) -> Result<(), StoreError> {
    let planner = Planner::new(own_node, deps.ids.clone());
    runtime::reconcile::run(planner, deps, health.component("planner"), shutdown).await
}

/// The fold of the planner's state of an endpoint.
pub struct PlannerFold;

impl Fold for PlannerFold {
    type State = EndpointFold;
    type Effect = ();

    const VERSION: u32 = FOLD_VERSION;
    const READS: &'static [StreamKind] = &[
        StreamKind::Endpoint,
        StreamKind::Scaling,
        StreamKind::Instances,
        StreamKind::Node,
        StreamKind::Members,
    ];

    fn apply(&self, _key: &EndpointKey, state: &mut EndpointFold, record: &Record) {
        state.apply(record);
    }

    fn writes(&self, stream: &StreamName) -> bool {
        stream.kind() == Some(StreamKind::Instances)
    }
}

impl Reconciler for Planner {
    type Fold = PlannerFold;
    type Global = Members;

    const SERVICE: &'static str = "actuator";
    const STREAM: StreamKind = StreamKind::Instances;
    /// Backoffs and drain deadlines are whole seconds, so a quarter of a second is precise enough.
    const TICK: Duration = Duration::from_millis(250);
    /// A new owner of a bucket must know every gateway that may still use an instance.
    const OBSERVES_ALL_BUCKETS: bool = true;

    fn fold(&self) -> PlannerFold {
        PlannerFold
    }

    fn apply_global(members: &mut Members, record: &Record) {
        members.apply(record);
    }

    fn evaluate(
        &mut self,
        key: &EndpointKey,
        state: &EndpointFold,
        members: &Members,
        now: Timestamp,
    ) -> Outputs {
        let context = PlanContext {
            granted: &state.granted,
            drained: &|instance| self.drain_watch.is_drained(key, instance, members, now),
            members,
            own_node: self.own_node.as_ref().map(|own| own.id.as_str()),
            is_only_node: self.own_node.as_ref().is_some_and(|own| own.is_only),
            now,
        };
        let mut new_id = || self.ids.uid();
        let events = plan(
            &key.endpoint(),
            state.endpoint.as_ref(),
            &state.instances,
            &context,
            &mut new_id,
        );
        Outputs::to(StreamName::of(Self::STREAM, key), events)
    }

    fn observe(&mut self, frame: &Frame, now: Timestamp) -> bool {
        self.drain_watch.observe(frame, now);
        true
    }

    fn due(&mut self, _now: Timestamp) -> BTreeSet<Bucket> {
        Bucket::of_endpoints().collect()
    }
}
