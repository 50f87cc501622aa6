//! The folds of all consumers over a simulated log, with snapshots at random positions and without any.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use actuator::node::NodeFold;
use actuator::planner::PlannerFold;
use autoscaler::AutoscalerFold;
use contract::ids::EndpointKey;
use contract::log::{Record, RowChange, StreamKind, StreamName};
use domain::views::{EndpointModel, MODEL_VERSION};
use meter::MeterFold;
use runtime::consumer::Fold;

use crate::rng::Rng;
use crate::world::NODES;

/// Asserts that every fold gives the same states and effects wherever its snapshots were taken.
pub fn assert_independent_of_snapshots(records: &[Arc<Record>], rng: &mut Rng, context: &str) {
    assert_same(&AutoscalerFold, records, rng, context);
    assert_same(&PlannerFold, records, rng, context);
    assert_same(&NodeFold::for_node(NODES[0], false), records, rng, context);
    assert_same(&MeterFold, records, rng, context);
    assert_same(&ModelFold, records, rng, context);
}

/// The fold of the read models with all of their rows.
struct ModelFold;

impl Fold for ModelFold {
    type State = EndpointModel;
    type Effect = Vec<RowChange>;

    const VERSION: u32 = MODEL_VERSION;
    const READS: &'static [StreamKind] = StreamKind::ALL;

    fn apply(&self, key: &EndpointKey, state: &mut Self::State, record: &Record) -> Self::Effect {
        state.apply(key, record)
    }

    fn writes(&self, _stream: &StreamName) -> bool {
        false
    }
}

fn assert_same<F: Fold>(fold: &F, records: &[Arc<Record>], rng: &mut Rng, context: &str)
where
    F::Effect: PartialEq + Debug,
{
    let mut states: BTreeMap<EndpointKey, (F::State, F::State)> = BTreeMap::new();
    for record in records {
        let is_read = record
            .stream
            .kind()
            .is_some_and(|kind| F::READS.contains(&kind));
        let Some(key) = record.endpoint().filter(|_| is_read) else {
            continue;
        };
        let (folded, resumed) = states.entry(key.clone()).or_default();
        if rng.below(40) == 0 {
            let snapshot = serde_json::to_string(resumed).unwrap();
            *resumed = serde_json::from_str(&snapshot).unwrap();
        }
        let effect = fold.apply(&key, folded, record);
        let resumed_effect = fold.apply(&key, resumed, record);
        assert_eq!(effect, resumed_effect, "at {} ({context})", record.position);
    }
    assert!(!states.is_empty(), "{context}");
    for (key, (folded, resumed)) in &states {
        let written = |state: &F::State| serde_json::to_string(state).unwrap();
        assert_eq!(written(folded), written(resumed), "{key} ({context})");
    }
}
