//! The meter's fold of an endpoint: the usage already counted, how many instances are ready, and which metrics
//! rules read.

use contract::ids::{EndpointKey, Name};
use contract::log::{Record, StreamKind, StreamName};
use domain::autoscale::{RULE_METRICS_VERSION, RuleMetrics};
use domain::instances::ready::{READY_VERSION, ReadyCounts};
use domain::usage::{EndpointUsage, USAGE_VERSION};
use runtime::consumer::Fold;
use serde::{Deserialize, Serialize};

/// The meter's state of one endpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MeterState {
    pub usage: EndpointUsage,
    pub ready: ReadyCounts,
    #[serde(default)]
    pub rules: RuleMetrics,
}

/// The fold of [`MeterState`].
pub struct MeterFold;

impl Fold for MeterFold {
    type State = MeterState;
    /// Deployments whose number of ready instances changes with this record.
    type Effect = Vec<(Name, u32)>;

    const VERSION: u32 = (USAGE_VERSION * 1000 + READY_VERSION) * 1000 + RULE_METRICS_VERSION;
    const READS: &'static [StreamKind] = &[
        StreamKind::Endpoint,
        StreamKind::Instances,
        StreamKind::Node,
        StreamKind::Usage,
    ];

    fn apply(&self, _key: &EndpointKey, state: &mut MeterState, record: &Record) -> Self::Effect {
        state.usage.apply(record);
        state.rules.apply(record);
        state.ready.apply(record)
    }

    fn writes(&self, stream: &StreamName) -> bool {
        stream.kind() == Some(StreamKind::Usage)
    }
}
