//! The dependencies of control: ports, and sources that other services own.

use std::sync::Arc;

use async_trait::async_trait;
use bus::Bus;
use bytes::Bytes;
use contract::ids::{DeploymentRef, InstanceId, Name};
use contract::time::{Span, Timestamp};
use domain::zones::ZoneData;
use futures::stream::BoxStream;
use runtime::clock::Clock;
use runtime::health::HealthRegistry;
use runtime::ids::Ids;
use runtime::metrics::Metrics;
use runtime::token::InternalToken;
use store::Store;

#[derive(Clone)]
pub struct ControlDeps {
    pub store: Store,
    pub bus: Arc<dyn Bus>,
    pub clock: Arc<dyn Clock>,
    pub ids: Arc<dyn Ids>,
    pub metrics: Metrics,
    pub health: HealthRegistry,
    /// The token that gives other processes of this installation access to health and metrics.
    pub internal_token: Option<InternalToken>,
    /// The time zone data for validating, previewing and replaying schedules.
    pub zones: ZoneData,
    pub logs: Arc<dyn LogSource>,
    pub history: Arc<dyn HistorySource>,
}

/// Why a source returns nothing.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// This process has no such source.
    #[error("{0}")]
    Unavailable(String),
    /// The source has reached its limit of concurrent readers.
    #[error("{0}")]
    Busy(String),
    #[error("{0}")]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogQuery {
    pub since: Option<Timestamp>,
    /// The maximum number of past lines.
    pub lines: Option<usize>,
    /// Keep following new output.
    pub follow: bool,
    pub instance: Option<InstanceId>,
    /// Prefix each line with the time it was first seen.
    pub timestamps: bool,
}

/// Stores the output of instances.
#[async_trait]
pub trait LogSource: Send + Sync + 'static {
    /// Returns lines of text, oldest first. With `follow`, the stream ends only when it is dropped.
    async fn logs(
        &self,
        of: &DeploymentRef,
        query: LogQuery,
    ) -> Result<BoxStream<'static, std::io::Result<Bytes>>, SourceError>;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistoryQuery {
    pub endpoint: Option<Name>,
    pub deployment: Option<Name>,
    pub from: Timestamp,
    pub to: Timestamp,
    pub step: Span,
}

/// Stores past measurements.
#[async_trait]
pub trait HistorySource: Send + Sync + 'static {
    /// Returns points, each an object with `time`, `endpoint` and `deployment`.
    async fn history(&self, query: HistoryQuery) -> Result<Vec<serde_json::Value>, SourceError>;
}

/// A [`LogSource`] for processes whose instances run elsewhere.
pub struct NoLogs;

#[async_trait]
impl LogSource for NoLogs {
    async fn logs(
        &self,
        _of: &DeploymentRef,
        _query: LogQuery,
    ) -> Result<BoxStream<'static, std::io::Result<Bytes>>, SourceError> {
        let detail = "this process keeps no logs; ask one that runs the actuator";
        Err(SourceError::Unavailable(detail.into()))
    }
}

/// A [`HistorySource`] for processes without a meter.
pub struct NoHistory;

#[async_trait]
impl HistorySource for NoHistory {
    async fn history(&self, _query: HistoryQuery) -> Result<Vec<serde_json::Value>, SourceError> {
        let detail = "this process keeps no history; ask one that runs the meter";
        Err(SourceError::Unavailable(detail.into()))
    }
}
