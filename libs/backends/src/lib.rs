//! Compute backends: where instances run. The port is about one instance, never about a count.

#![warn(missing_docs, clippy::missing_errors_doc)]

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
    /// Made once per instance and never used again, also not by its successor.
    pub id: InstanceId,
    /// Counts the orders about this instance; an older one is refused after a newer one.
    pub generation: u64,
    /// `endpoint/deployment`, for logs and for people who look at processes.
    pub deployment: String,
    /// What the instance runs: a program with its probes, or a simulation.
    pub spec: DeploymentSpec,
}

/// What a backend knows of an instance.
#[derive(Clone, Debug, PartialEq)]
pub struct Observed {
    /// As in its order.
    pub id: InstanceId,
    /// Of the newest order that was carried out.
    pub generation: u64,
    /// Where it runs, by the node's id.
    pub node: String,
    /// `HOST:PORT` that it listens on, as gateways reach it; none before it has a port, and for
    /// simulated ones.
    pub address: Option<String>,
    /// Of its process, as long as it has one.
    pub pid: Option<u32>,
    /// Where it stands.
    pub phase: ObservedPhase,
    /// Found running after a restart of Penstock.
    pub adopted: bool,
}

/// Where an instance stands, from its order to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObservedPhase {
    /// Ordered; it has not answered its readiness probe yet.
    Starting,
    /// Runs and answers its readiness probe.
    Ready,
    /// Runs; the readiness probe fails.
    Unready {
        /// What the probe met, as a sentence.
        reason: String,
    },
    /// Ended by itself, could not start, or was ended because its liveness probe failed.
    /// The code is unknown for adopted processes and for those that a signal ended.
    Exited {
        /// Exit code of the process.
        code: Option<i32>,
        /// Why it ended, as a sentence for people.
        reason: String,
    },
    /// Ended because it was to be removed.
    Removed {
        /// Exit code of the process; none where a signal ended it, or it never ran.
        code: Option<i32>,
    },
}

/// Resources that an instance used, counted from its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResourceSample {
    /// Whose resources these are.
    pub id: InstanceId,
    /// CPU time in microseconds, of all its processes together.
    pub cpu_us_total: u64,
    /// Resident memory at the moment, of all its processes together.
    pub memory_bytes: u64,
}

/// Why an order was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A newer order about the instance came first; this one is to be forgotten.
    #[error("instance {id}: order {ours} is older than {newest}, which was carried out already")]
    Stale {
        /// Of the instance.
        id: InstanceId,
        /// The generation that was asked for.
        ours: u64,
        /// The generation that was carried out.
        newest: u64,
    },
    /// The order cannot be carried out as it stands; the same order will fail again.
    #[error("instance {id} cannot be started: {detail}")]
    CannotStart {
        /// Of the instance.
        id: InstanceId,
        /// What stands in the way, as a sentence.
        detail: String,
    },
    /// This process lacks descriptors or memory. Says nothing about the instance: give the same order
    /// again after a while. Whoever looks after the means has been told.
    #[error("instance {id} has to wait: {source}")]
    Lacking {
        /// Of the instance.
        id: InstanceId,
        /// What the system said.
        source: std::io::Error,
    },
    /// The backend itself does not work, or has been released; the sentence says why. Try again.
    #[error("{0}")]
    Unavailable(String),
    /// The backend cannot use something that it rests on, such as its folder. Try again.
    #[error("{what}: {source}")]
    Unusable {
        /// What, and what cannot be done with it.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A task of the backend panicked; its log says where.
    #[error("the process backend failed: {0}")]
    Crashed(#[source] tokio::task::JoinError),
}

/// The port to where instances run. Each call is about one instance, and may be made again.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Sees to it that the instance runs. Returns when the order is durable, not when it is ready:
    /// what becomes of it is told by [`watch`](Backend::watch).
    ///
    /// # Errors
    ///
    /// [`BackendError::Stale`] after a newer order or a removal, [`BackendError::CannotStart`]
    /// where the order itself is at fault, the others where the same order
    /// may work later.
    async fn ensure(&self, order: Order) -> Result<(), BackendError>;

    /// Sees to it that the instance does not run: asks politely, and after `grace` does not ask any
    /// more. Leaves a tombstone: an `ensure` at or below this generation is refused.
    ///
    /// # Errors
    ///
    /// [`BackendError::Stale`] after a newer order, the others where the removal cannot be
    /// written down: try again.
    async fn remove(
        &self,
        id: &InstanceId,
        generation: u64,
        grace: Span,
    ) -> Result<(), BackendError>;

    /// Everything that this installation runs, or ran and was not told to remove.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] where the backend cannot tell: try again.
    async fn list(&self) -> Result<Vec<Observed>, BackendError>;

    /// Changes from now on, in order for each instance. A receiver that lags behind is closed once
    /// it has drained what fits: it must then watch anew and call [`list`](Backend::list).
    fn watch(&self) -> mpsc::Receiver<Observed>;

    /// CPU and memory of what runs now.
    async fn resources(&self) -> Vec<ResourceSample>;

    /// Lets go of everything without ending it; instances live on and can be adopted.
    async fn release(&self);
}
