//! What the meter keeps of an endpoint's events: what has been counted of its usage, and how many instances
//! are ready.

use contract::ids::{EndpointKey, Name};
use contract::log::{Record, StreamKind, StreamName};
use domain::instances::ready::{READY_VERSION, ReadyCounts};
use domain::usage::{EndpointUsage, USAGE_VERSION};
use runtime::consumer::Fold;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct MeterState {
    pub usage: EndpointUsage,
    pub ready: ReadyCounts,
}

pub(crate) struct MeterFold;

impl Fold for MeterFold {
    type State = MeterState;
    /// Deployments of which so many instances are ready from this record on.
    type Effect = Vec<(Name, u32)>;

    const VERSION: u32 = USAGE_VERSION * 1000 + READY_VERSION;
    const READS: &'static [StreamKind] = &[
        StreamKind::Endpoint,
        StreamKind::Instances,
        StreamKind::Node,
        StreamKind::Usage,
    ];

    fn apply(&self, _key: &EndpointKey, state: &mut MeterState, record: &Record) -> Self::Effect {
        state.usage.apply(record);
        state.ready.apply(record)
    }

    fn writes(&self, stream: &StreamName) -> bool {
        stream.kind() == Some(StreamKind::Usage)
    }
}
