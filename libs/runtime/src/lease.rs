//! Work that one process does at a time, guarded by a lease in the store.
//!
//! Invariants: the work runs only while the lease is believed to be held, and is told when it is
//! lost; belief can be wrong (a process that was paused), so every commit of the work carries the
//! fence, which the store refuses once somebody else holds the lease.

use std::time::Duration;

use store::{Fence, Store, StoreError};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

/// How long a holder that says nothing keeps its lease.
pub const TTL: Duration = Duration::from_secs(5);
/// How often it is renewed, and asked for by those who wait for it.
pub const RENEW_EVERY: Duration = Duration::from_secs(1);

/// Does `work` whenever the lease is held, until `shutdown`; then gives it back, so that the next
/// holder need not wait. The work gets the fence for its commits, and a token that is cancelled when
/// the lease is lost or `shutdown` has come: it shall return soon then. Work that returns earlier is
/// begun again after a pause, under a new generation.
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
    let mut troubled = false;
    while !shutdown.is_cancelled() {
        let asked = Instant::now();
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
                troubled = false;
                let lost = shutdown.child_token();
                let doing = work(fence.clone(), lost.clone());
                while_held(store, &fence, holder, asked, lost, doing).await;
                if let Err(error) = store.release_lease(&fence).await {
                    tracing::debug!(lease = name, %error, "lease not given back, it will end by itself");
                }
            }
            Ok(None) => troubled = false,
            Err(StoreError::Closed) => return,
            Err(error) => {
                if !troubled {
                    tracing::warn!(lease = name, %error, "lease cannot be asked for, trying again");
                }
                troubled = true;
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = sleep(RENEW_EVERY) => {}
        }
    }
}

/// Renews the lease beside the work, and tells the work when it is over.
async fn while_held(
    store: &Store,
    fence: &Fence,
    holder: &str,
    acquired: Instant,
    lost: CancellationToken,
    work: impl Future<Output = ()>,
) {
    let renewing = async {
        let mut renewals = interval(RENEW_EVERY);
        renewals.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The lease counts from before it was asked for: our belief ends first.
        let mut until = acquired + TTL;
        loop {
            renewals.tick().await;
            let asked = Instant::now();
            let renewed = tokio::time::timeout_at(until, store.renew_lease(fence, holder, TTL));
            match renewed.await {
                Ok(Ok(true)) => until = asked + TTL,
                Ok(Ok(false)) => {
                    tracing::warn!(lease = fence.name, "lease lost to another holder");
                    return lost.cancel();
                }
                Ok(Err(error)) if asked < until => {
                    tracing::debug!(lease = fence.name, %error, "lease not renewed yet");
                }
                Ok(Err(_)) | Err(_) => {
                    tracing::warn!(
                        lease = fence.name,
                        "lease ran out, the store cannot be reached"
                    );
                    return lost.cancel();
                }
            }
        }
    };
    tokio::pin!(work);
    tokio::select! {
        () = &mut work => return,
        () = renewing => {}
    }
    work.await;
}
