//! Runs work on a store under a lease, so that one process at a time does it.

use std::time::Duration;

use runtime::lease;
use store::{Fence, Store};

use super::failed;
use super::slow_notice::notice_if_slow;
use cli::error::CliError;

/// How long to wait for the lease; a crashed holder keeps it for [`lease::TTL`].
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
    request: &LeaseRequest,
    work: impl FnOnce(Fence) -> F,
) -> Result<T, CliError>
where
    F: Future<Output = Result<T, CliError>>,
{
    let holder = format!("store {} {}", request.name, uuid::Uuid::new_v4());
    let notice = || {
        format!(
            "waiting for the lease `{}`, which another process holds or has held: gives up after {} s",
            request.name,
            ACQUIRE_TIMEOUT.as_secs()
        )
    };
    let acquiring = lease::acquire(store, request.name, &holder, ACQUIRE_TIMEOUT);
    let acquired = notice_if_slow(acquiring, notice).await.map_err(failed)?;
    let fence = acquired.ok_or_else(|| CliError::Failed(request.busy_message.clone()))?;
    let done = lease::keep(store, &fence, &holder, work(fence.clone())).await;
    let lost = || CliError::Failed(request.lost_message.clone());
    done.map_err(failed)?.ok_or_else(lost)?
}
