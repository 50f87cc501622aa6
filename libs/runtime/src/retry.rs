//! Retries while the store is unavailable: a service outlives its store's outages.

use std::time::Duration;

use store::StoreError;

use crate::health::Component;

/// The pause between attempts.
pub const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The sentence for readiness while the store is unavailable.
pub fn unreachable_message(error: &StoreError) -> String {
    format!("the store cannot be reached: {error}")
}

/// Opens a store on a server, waiting until the server is available. Errors that waiting cannot fix
/// are returned at once: rejected credentials, a store of a newer format.
///
/// # Errors
///
/// Every error but [`StoreError::Database`].
pub async fn open_when_available<T, F>(mut open: impl FnMut() -> F) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let mut is_failing = false;
    loop {
        match open().await {
            Err(StoreError::Database(why)) => {
                if !is_failing {
                    tracing::warn!(%why, "store unavailable, retrying");
                }
                is_failing = true;
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
            done => {
                if is_failing && done.is_ok() {
                    tracing::info!("store available");
                }
                return done;
            }
        }
    }
}

/// Retries until the store has replied. The only error is that this process has closed the store.
///
/// # Errors
///
/// [`StoreError::Closed`] only.
pub async fn retry_while_unavailable<T, F>(
    component: &Component,
    mut ask: impl FnMut() -> F,
) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let mut is_failing = false;
    loop {
        match ask().await {
            Ok(answer) => {
                if is_failing {
                    component.set_problem(None);
                }
                return Ok(answer);
            }
            Err(StoreError::Closed) => return Err(StoreError::Closed),
            Err(error) => {
                if !is_failing {
                    tracing::warn!(%error, "store unavailable, retrying");
                }
                is_failing = true;
                component.set_problem(Some(unreachable_message(&error)));
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
        }
    }
}
