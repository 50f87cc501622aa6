//! Compute backends, which run instances. Every call concerns a single instance, never a count.

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

/// An instance to be started. Starting the same one twice results in one instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StartSpec {
    /// Unique to the instance; never reused, not even by its replacement.
    pub id: InstanceId,
    /// Counts the requests about this instance; one older than the newest is refused.
    pub generation: u64,
    /// `endpoint/deployment`, for logs and process listings.
    pub deployment: String,
    /// What the instance runs: a program with its probes, or a simulation.
    pub spec: DeploymentSpec,
}

/// The state of an instance as its backend sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct ObservedInstance {
    /// As in its [`StartSpec`].
    pub id: InstanceId,
    /// The generation of the newest request that was carried out.
    pub generation: u64,
    /// The id of the node that it runs on.
    pub node: String,
    /// The `HOST:PORT` at which gateways reach it; `None` until it has a port.
    pub address: Option<String>,
    /// The process id, while it has a process.
    pub pid: Option<u32>,
    /// The current phase.
    pub phase: ObservedPhase,
    /// Whether it was found running after a restart of Penstock.
    pub adopted: bool,
    /// What it waits for before it is ready, if that takes long.
    pub progress: Option<String>,
    /// Why it fails its liveness probe, if so: it runs on until its removal is requested.
    pub unhealthy: Option<String>,
}

/// The phase of an instance, from its start request to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObservedPhase {
    /// Requested; its readiness probe has not succeeded yet.
    Starting,
    /// Running, and its readiness probe succeeds.
    Ready,
    /// Running, but its readiness probe fails.
    Unready {
        /// Why the probe failed, as a sentence.
        reason: String,
    },
    /// Exited by itself, failed to start, or was ended because it did not become ready. The code is unknown
    /// for adopted processes and for those ended by a signal.
    Exited {
        /// The exit code of the process.
        code: Option<i32>,
        /// Why it ended, as a sentence.
        reason: String,
    },
    /// Ended because its removal was requested.
    Removed {
        /// The exit code of the process; `None` if a signal ended it or it never ran.
        code: Option<i32>,
    },
}

/// Resources used by an instance since its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResourceSample {
    /// The instance.
    pub id: InstanceId,
    /// CPU time of all its processes, in microseconds.
    pub cpu_us_total: u64,
    /// Current resident memory of all its processes.
    pub memory_bytes: u64,
    /// Memory that it may use: its own limit, or else the memory of the machine or container; `None` if
    /// unknown.
    pub memory_limit_bytes: Option<u64>,
}

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A newer request about the instance was carried out first. Do not retry.
    #[error(
        "instance {id}: request {requested} is older than {newest}, which was carried out already"
    )]
    Stale {
        /// The instance.
        id: InstanceId,
        /// The generation of this request.
        requested: u64,
        /// The newest generation that was carried out.
        newest: u64,
    },
    /// The instance cannot be started as specified; a retry will fail again.
    #[error("instance {id} cannot be started: {detail}")]
    CannotStart {
        /// The instance.
        id: InstanceId,
        /// Why not, as a sentence.
        detail: String,
    },
    /// This process is out of descriptors or memory, which says nothing about the instance: retry after
    /// a pause. The shortage has already been reported to the [`process::ShortageListener`].
    #[error("instance {id} has to wait: {source}")]
    OutOfResources {
        /// The instance.
        id: InstanceId,
        /// The error from the system.
        source: std::io::Error,
    },
    /// The backend does not work or has been released; the sentence says why. Can be retried.
    #[error("{0}")]
    Unavailable(String),
    /// The backend cannot use something that it depends on, such as its folder. Can be retried.
    #[error("{what}: {source}")]
    Unusable {
        /// What cannot be used, and for what.
        what: String,
        /// The error from the system.
        source: std::io::Error,
    },
    /// A task of the backend panicked; the log has the details.
    #[error("the process backend failed: {0}")]
    Crashed(#[source] tokio::task::JoinError),
}

/// Runs instances. Each call concerns one instance and is idempotent.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Ensures that the instance runs. Returns once the request is durable, not once the instance is
    /// ready: its progress is reported through [`watch`](Backend::watch).
    ///
    /// # Errors
    ///
    /// [`BackendError::Stale`] after a newer request or a removal, [`BackendError::CannotStart`] if the
    /// specification is at fault, others if a retry may succeed.
    async fn ensure(&self, start: StartSpec) -> Result<(), BackendError>;

    /// Ensures that the instance does not run: asks it to terminate, and kills it after `grace`. Leaves
    /// a tombstone: an `ensure` at or below this generation is refused.
    ///
    /// # Errors
    ///
    /// [`BackendError::Stale`] after a newer request, others if the removal cannot be recorded: retry.
    async fn remove(
        &self,
        id: &InstanceId,
        generation: u64,
        grace: Span,
    ) -> Result<(), BackendError>;

    /// Returns all instances of this installation that have not been removed, also those that ended.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if the backend cannot list them: retry.
    async fn list(&self) -> Result<Vec<ObservedInstance>, BackendError>;

    /// Subscribes to changes from now on, in order for each instance. A receiver that lags too far behind
    /// is closed after the queued changes: subscribe again, then call [`list`](Backend::list).
    fn watch(&self) -> mpsc::Receiver<ObservedInstance>;

    /// Returns CPU and memory of the running instances, without those that it cannot measure.
    async fn resources(&self) -> Vec<ResourceSample>;

    /// Releases all instances without ending them, so that they can be adopted.
    async fn release(&self);
}
