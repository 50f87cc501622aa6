//! Runs work on a store under a lease, so that one process at a time does it.

use std::time::Duration;

use runtime::lease::{RENEW_EVERY, TTL};
use store::{Fence, Store};
use tokio::time::{Instant, sleep};

use super::failed;
use super::slow_notice::notice_if_slow;
use cli::error::CliError;

/// How long to wait for the lease; a crashed holder keeps it for [`TTL`].
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);

/// A lease to acquire, and the error messages for when another process holds it.
pub struct LeaseRequest {
    pub name: &'static str,
    /// If it cannot be acquired.
    pub busy_message: String,
    /// If it is lost during the work.
    pub lost_message: String,
}

/// Runs `work` under the lease.
///
/// # Errors
/// If another process holds the lease or takes it over, or if `work` fails.
#[expect(
    clippy::disallowed_methods,
    reason = "the holder of a lease has a unique name"
)]
pub async fn run_under_lease<T, F>(
    store: &Store,
    lease: &LeaseRequest,
    work: impl FnOnce(Fence) -> F,
) -> Result<T, CliError>
where
    F: Future<Output = Result<T, CliError>>,
{
    let holder = format!("store {} {}", lease.name, uuid::Uuid::new_v4());
    let notice = || {
        format!(
            "waiting for the lease `{}`, which another process holds or has held: gives up after {} s",
            lease.name,
            ACQUIRE_TIMEOUT.as_secs()
        )
    };
    let fence = notice_if_slow(acquire(store, lease, &holder), notice).await?;
    let outcome = tokio::select! {
        outcome = work(fence.clone()) => outcome,
        lost = renew_until_lost(store, lease, &fence, &holder) => Err(lost),
    };
    let released = store.release_lease(&fence).await.map_err(failed);
    let outcome = outcome?;
    released.map(|()| outcome)
}

async fn acquire(store: &Store, lease: &LeaseRequest, holder: &str) -> Result<Fence, CliError> {
    let deadline = Instant::now() + ACQUIRE_TIMEOUT;
    loop {
        let acquired = store.acquire_lease(lease.name, holder, TTL).await;
        if let Some(fence) = acquired.map_err(failed)? {
            return Ok(fence);
        }
        if Instant::now() >= deadline {
            return Err(CliError::Failed(lease.busy_message.clone()));
        }
        sleep(RENEW_EVERY).await;
    }
}

/// Renews the lease; returns when it is lost.
async fn renew_until_lost(
    store: &Store,
    lease: &LeaseRequest,
    fence: &Fence,
    holder: &str,
) -> CliError {
    loop {
        sleep(RENEW_EVERY).await;
        match store.renew_lease(fence, holder, TTL).await {
            Ok(true) => {}
            Ok(false) => return CliError::Failed(lease.lost_message.clone()),
            Err(error) => return failed(error),
        }
    }
}
