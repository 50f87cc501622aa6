//! Asks for what was measured before this process measured itself, to refill the windows of rules after a
//! start, a takeover or a change of a policy.
//!
//! Invariants: reading never delays the loop, and a source that fails changes nothing until it is read again:
//! its windows are meanwhile as long as this process has measured.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use contract::ids::{EndpointKey, Name, Uid};
use contract::time::Timestamp;
use domain::measure::Past;
use futures::StreamExt;
use futures::stream;
use tokio::sync::mpsc;

/// Most deployments that wait to be read; further ones ask again at their next evaluation.
const WAITING_MAX: usize = 4096;

/// Most deployments read concurrently.
const CONCURRENT_MAX: usize = 4;

/// Most results that wait to be used; they may be large.
const RESULTS_MAX: usize = 16;

/// The measurements that the windows of a deployment lack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PastRequest {
    /// The endpoint.
    pub endpoint: EndpointKey,
    /// The deployment.
    pub deployment: Name,
    /// Its incarnation.
    pub uid: Uid,
    /// When it was created; what is older belongs to another incarnation.
    pub created_at: Timestamp,
    /// The first second of its longest window.
    pub from: Timestamp,
}

/// Why the source could not be read.
pub type PastError = Box<dyn std::error::Error + Send + Sync>;

/// Has measurements from before this process began.
#[async_trait::async_trait]
pub trait PastSource: Send + Sync + 'static {
    /// Returns what was measured.
    ///
    /// # Errors
    ///
    /// It cannot be read; it is asked again after a while.
    async fn past(&self, request: &PastRequest) -> Result<Past, PastError>;
}

/// What was read for a request; `None` if reading failed.
pub(crate) struct Refill {
    pub request: PastRequest,
    pub past: Option<Past>,
}

/// Requests to the source and their results.
pub(crate) struct Refills {
    wanted: mpsc::Sender<PastRequest>,
    done: mpsc::Receiver<Refill>,
}

impl Refills {
    /// Starts the task that reads; it ends with this handle.
    pub(crate) fn start(source: Arc<dyn PastSource>) -> Self {
        let (wanted, waiting) = mpsc::channel(WAITING_MAX);
        let (results, done) = mpsc::channel(RESULTS_MAX);
        tokio::spawn(read(source, waiting, results));
        Self { wanted, done }
    }

    /// Returns false if too many requests are waiting.
    pub(crate) fn ask(&self, request: PastRequest) -> bool {
        self.wanted.try_send(request).is_ok()
    }

    /// The next result that has arrived.
    pub(crate) fn next(&mut self) -> Option<Refill> {
        self.done.try_recv().ok()
    }
}

async fn read(
    source: Arc<dyn PastSource>,
    waiting: mpsc::Receiver<PastRequest>,
    results: mpsc::Sender<Refill>,
) {
    let is_failing = AtomicBool::new(false);
    let requests = stream::unfold(waiting, |mut waiting| async move {
        waiting.recv().await.map(|request| (request, waiting))
    });
    let read = requests.for_each_concurrent(CONCURRENT_MAX, |request| {
        let (source, results, is_failing) = (&source, &results, &is_failing);
        async move {
            let past = source.past(&request).await;
            let was_failing = is_failing.swap(past.is_err(), Ordering::Relaxed);
            if let Err(error) = &past
                && !was_failing
            {
                let deployment = &request.deployment;
                tracing::warn!(
                    endpoint = %request.endpoint, %deployment, %error,
                    scale_in = "waits until they are read or windows are measured again",
                    "failed to read earlier measurements, retrying"
                );
            }
            let past = past.ok();
            // The loop may have ended.
            let _ = results.send(Refill { request, past }).await;
        }
    });
    read.await;
}
