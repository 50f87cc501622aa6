//! Work on a store that one process at a time does, held by a lease for as long as it takes.

use std::time::Duration;

use runtime::lease::{RENEW_EVERY, TTL};
use store::{Fence, Store};
use tokio::time::{Instant, sleep};

use super::failed;
use super::waiting::told;
use cli::error::CliError;

/// A holder that has died keeps its lease for [`TTL`].
const LEASE_PATIENCE: Duration = Duration::from_secs(10);

/// A lease, and what is said where it is somebody else's.
pub struct Lease {
    pub name: &'static str,
    /// Before the work.
    pub taken: String,
    /// During it.
    pub lost: String,
}

/// Does the work under the lease. Refused where another process holds it.
#[expect(
    clippy::disallowed_methods,
    reason = "the holder of a lease has a name of its own"
)]
pub async fn holding<T, F>(
    store: &Store,
    lease: &Lease,
    work: impl FnOnce(Fence) -> F,
) -> Result<T, CliError>
where
    F: Future<Output = Result<T, CliError>>,
{
    let holder = format!("store {} {}", lease.name, uuid::Uuid::new_v4());
    let waiting = || {
        format!(
            "waiting for the lease `{}`, which another process holds or has held: gives up after {} s",
            lease.name,
            LEASE_PATIENCE.as_secs()
        )
    };
    let fence = told(acquire(store, lease, &holder), waiting).await?;
    let done = tokio::select! {
        done = work(fence.clone()) => done,
        lost = keep(store, lease, &fence, &holder) => Err(lost),
    };
    let released = store.release_lease(&fence).await.map_err(failed);
    let done = done?;
    released.map(|()| done)
}

async fn acquire(store: &Store, lease: &Lease, holder: &str) -> Result<Fence, CliError> {
    let until = Instant::now() + LEASE_PATIENCE;
    loop {
        let acquired = store.acquire_lease(lease.name, holder, TTL).await;
        if let Some(fence) = acquired.map_err(failed)? {
            return Ok(fence);
        }
        if Instant::now() >= until {
            return Err(failed(&lease.taken));
        }
        sleep(RENEW_EVERY).await;
    }
}

/// Holds the lease until it is lost.
async fn keep(store: &Store, lease: &Lease, fence: &Fence, holder: &str) -> CliError {
    loop {
        sleep(RENEW_EVERY).await;
        match store.renew_lease(fence, holder, TTL).await {
            Ok(true) => {}
            Ok(false) => return failed(&lease.lost),
            Err(error) => return failed(error),
        }
    }
}
