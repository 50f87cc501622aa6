//! Work that only one process does at a time, guarded by a lease in the store.
//!
//! Invariants: the work runs only while this process believes that it holds the lease, and is
//! cancelled when the lease is lost. That belief can be wrong (after a pause of the process), so
//! every commit of the work carries the fence, which the store rejects once another process holds
//! the lease.

use std::time::Duration;

use store::{Fence, Store, StoreError};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

/// How long a lease lasts without renewal.
pub const TTL: Duration = Duration::from_secs(5);
/// How often a lease is renewed by its holder, and requested by others.
pub const RENEW_EVERY: Duration = Duration::from_secs(1);

/// Runs `work` whenever the lease is held, until `shutdown`; then releases it, so that the next
/// holder need not wait. The work receives the fence for its commits and a token that is cancelled
/// when the lease is lost or on `shutdown`, after which it must return soon. If it returns earlier,
/// it is restarted after a pause, under a new generation.
pub async fn hold<W, F>(
    store: &Store,
    name: &str,
    holder: &str,
    shutdown: &CancellationToken,
    mut work: W,
) where
    W: FnMut(Fence, CancellationToken) -> F,
    F: Future<Output = ()>,
{
    let mut is_failing = false;
    while !shutdown.is_cancelled() {
        let requested_at = Instant::now();
        let acquired = tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            acquired = store.acquire_lease(name, holder, TTL) => acquired,
        };
        match acquired {
            Ok(Some(fence)) => {
                tracing::info!(
                    lease = name,
                    generation = fence.generation,
                    "lease acquired"
                );
                is_failing = false;
                let lost = shutdown.child_token();
                let running = work(fence.clone(), lost.clone());
                run_while_held(store, &fence, holder, requested_at, lost, running).await;
                if let Err(error) = store.release_lease(&fence).await {
                    tracing::debug!(lease = name, %error, "failed to release the lease, it will expire");
                }
            }
            Ok(None) => is_failing = false,
            Err(StoreError::Closed) => return,
            Err(error) => {
                if !is_failing {
                    tracing::warn!(lease = name, %error, "failed to acquire the lease, retrying");
                }
                is_failing = true;
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = sleep(RENEW_EVERY) => {}
        }
    }
}

/// Acquires a lease for one piece of work. Waits at most this long; `None` if another process holds it
/// until then.
///
/// # Errors
///
/// If the store fails, or is closed.
pub async fn acquire(
    store: &Store,
    name: &str,
    holder: &str,
    within: Duration,
) -> Result<Option<Fence>, StoreError> {
    let deadline = Instant::now() + within;
    loop {
        let acquired = store.acquire_lease(name, holder, TTL).await?;
        if acquired.is_some() || Instant::now() >= deadline {
            return Ok(acquired);
        }
        sleep(RENEW_EVERY).await;
    }
}

/// Runs `work` while it renews the [acquired](acquire) lease, then releases that. `None` if the lease was
/// lost to another holder, at which point the work is dropped.
///
/// # Errors
///
/// If the store fails, or is closed.
pub async fn keep<T>(
    store: &Store,
    fence: &Fence,
    holder: &str,
    work: impl Future<Output = T>,
) -> Result<Option<T>, StoreError> {
    let until_lost = async {
        loop {
            sleep(RENEW_EVERY).await;
            match store.renew_lease(fence, holder, TTL).await {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    };
    let done = tokio::select! {
        done = work => Some(done),
        lost = until_lost => lost.map(|()| None)?,
    };
    store.release_lease(fence).await?;
    Ok(done)
}

/// Renews the lease while the work runs, and cancels the work when the lease is lost.
async fn run_while_held(
    store: &Store,
    fence: &Fence,
    holder: &str,
    acquired: Instant,
    lost: CancellationToken,
    work: impl Future<Output = ()>,
) {
    let renewal = async {
        let mut renewals = interval(RENEW_EVERY);
        renewals.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Counted from before the request, so our belief ends before the lease does.
        let mut until = acquired + TTL;
        loop {
            renewals.tick().await;
            let requested_at = Instant::now();
            let renewed = tokio::time::timeout_at(until, store.renew_lease(fence, holder, TTL));
            match renewed.await {
                Ok(Ok(true)) => until = requested_at + TTL,
                Ok(Ok(false)) => {
                    tracing::warn!(lease = fence.name, "lease lost to another holder");
                    return lost.cancel();
                }
                Ok(Err(error)) if requested_at < until => {
                    tracing::debug!(lease = fence.name, %error, "lease not renewed yet");
                }
                Ok(Err(_)) | Err(_) => {
                    tracing::warn!(
                        lease = fence.name,
                        "lease expired, the store is unavailable"
                    );
                    return lost.cancel();
                }
            }
        }
    };
    tokio::pin!(work);
    tokio::select! {
        () = &mut work => return,
        () = renewal => {}
    }
    work.await;
}
