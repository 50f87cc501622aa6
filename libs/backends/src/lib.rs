//! Compute backends: where instances run. The port is about one instance, never about a count.

pub mod logs;
pub mod process;
pub mod simulated;
mod watchers;

use async_trait::async_trait;
use contract::ids::InstanceId;
use contract::resources::DeploymentSpec;
use contract::time::Span;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

/// An instance that there shall be. The same order twice is one instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Order {
    pub id: InstanceId,
    pub generation: u64,
    /// `endpoint/deployment`, for logs and for people who look at processes.
    pub deployment: String,
    pub spec: DeploymentSpec,
}

/// What a backend knows of an instance.
#[derive(Clone, Debug, PartialEq)]
pub struct Observed {
    pub id: InstanceId,
    pub generation: u64,
    pub node: String,
    pub address: Option<String>,
    pub pid: Option<u32>,
    pub phase: ObservedPhase,
    /// Found running after a restart of Penstock.
    pub adopted: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObservedPhase {
    Starting,
    /// Runs and answers its readiness probe.
    Ready,
    /// Runs; the readiness probe fails.
    Unready {
        reason: String,
    },
    /// Ended by itself, could not start, or was ended because its liveness probe failed.
    /// The code is unknown for adopted processes and for those that a signal ended.
    Exited {
        code: Option<i32>,
        reason: String,
    },
    /// Ended because it was to be removed.
    Removed {
        code: Option<i32>,
    },
}

/// Resources that an instance used, counted from its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResourceSample {
    pub id: InstanceId,
    pub cpu_us_total: u64,
    pub memory_bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    #[error("instance {id}: order {ours} is older than {newest}, which was carried out already")]
    Stale {
        id: InstanceId,
        ours: u64,
        newest: u64,
    },
    #[error("instance {id} cannot be started: {detail}")]
    CannotStart { id: InstanceId, detail: String },
    /// This process lacks descriptors or memory. Says nothing about the instance: give the same order
    /// again after a while. Whoever looks after the means has been told.
    #[error("instance {id} has to wait: {source}")]
    Lacking {
        id: InstanceId,
        source: std::io::Error,
    },
    #[error("{0}")]
    Unavailable(String),
}

#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Sees to it that the instance runs. Returns when the order is durable, not when it is ready:
    /// what becomes of it is told by [`watch`](Backend::watch).
    async fn ensure(&self, order: Order) -> Result<(), BackendError>;

    /// Sees to it that the instance does not run: asks politely, and after `grace` does not ask any
    /// more. Leaves a tombstone: an `ensure` at or below this generation is refused.
    async fn remove(
        &self,
        id: &InstanceId,
        generation: u64,
        grace: Span,
    ) -> Result<(), BackendError>;

    /// Everything that this installation runs, or ran and was not told to remove.
    async fn list(&self) -> Result<Vec<Observed>, BackendError>;

    /// Changes from now on, in order for each instance. A receiver that lags behind is closed once
    /// it has drained what fits: it must then watch anew and call [`list`](Backend::list).
    fn watch(&self) -> mpsc::Receiver<Observed>;

    /// CPU and memory of what runs now.
    async fn resources(&self) -> Vec<ResourceSample>;

    /// Lets go of everything without ending it; instances live on and can be adopted.
    async fn release(&self);
}
