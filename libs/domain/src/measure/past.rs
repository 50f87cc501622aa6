//! What was measured before this process began, or before a window needed it.

use std::collections::BTreeMap;

use contract::frame::SourceKind;

use super::pane::{Coverage, Load};
use super::report::InstanceReport;
use super::spans::Spans;

/// Earlier measurements of one deployment, and which seconds of its bucket were measured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Past {
    /// By kind of source.
    pub kinds: BTreeMap<SourceKind, PastOfKind>,
}

/// Earlier measurements by sources of one kind.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PastOfKind {
    /// The first second that was asked for.
    pub from: i64,
    /// The seconds that were measured in the bucket, ascending.
    pub measured: Vec<MeasuredSpan>,
    /// The seconds of which the load is known: without an entry, it is none.
    pub known: Spans,
    /// Requests to the deployment by second.
    pub loads: BTreeMap<i64, Load>,
    /// Its instances by second, as each source reported them.
    pub instances: BTreeMap<i64, Vec<InstanceReport>>,
}

/// Seconds that were measured alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MeasuredSpan {
    /// The first second.
    pub start: i64,
    /// The second after the last one.
    pub end: i64,
    /// Whether some member was missing.
    pub is_partial: bool,
    /// The actual length of each second, in microseconds.
    pub length_us: u64,
}

impl MeasuredSpan {
    pub(super) fn coverage(&self) -> Coverage {
        Coverage {
            seconds: 1,
            length_us: self.length_us,
            partial_seconds: u32::from(self.is_partial),
        }
    }
}

impl PastOfKind {
    /// The load of each second, of instances that are measured by now.
    pub(super) fn loads(&self, initialization_us: u64) -> BTreeMap<i64, Load> {
        let mut loads = self.loads.clone();
        for (second, reports) in &self.instances {
            let load = loads.entry(*second).or_default();
            for report in reports {
                load.add_instances(report, initialization_us);
            }
        }
        loads
    }
}
