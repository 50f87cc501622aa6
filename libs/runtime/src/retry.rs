//! Trying again while the store cannot be reached: a service outlives its store's outages.

use std::time::Duration;

use store::StoreError;

use crate::health::Component;

/// Between two tries.
pub const PAUSE: Duration = Duration::from_secs(1);

/// What readiness says meanwhile.
pub fn unreachable(error: &StoreError) -> String {
    format!("the store cannot be reached: {error}")
}

/// Opens what a server keeps, however long it takes until the server is there. What waiting cannot mend
/// comes back at once: who is not let in, a store of a newer format.
///
/// # Errors
///
/// What waiting cannot mend: every error but [`StoreError::Database`].
pub async fn until_opened<T, F>(mut open: impl FnMut() -> F) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let mut troubled = false;
    loop {
        match open().await {
            Err(StoreError::Database(why)) => {
                if !troubled {
                    tracing::warn!(%why, "the store is not there yet, trying again");
                }
                troubled = true;
                tokio::time::sleep(PAUSE).await;
            }
            done => {
                if troubled && done.is_ok() {
                    tracing::info!("the store is there");
                }
                return done;
            }
        }
    }
}

/// Repeats until the store has answered. The only error that comes back is that the store has been
/// closed by this process itself.
///
/// # Errors
///
/// [`StoreError::Closed`] only.
pub async fn until_answered<T, F>(
    component: &Component,
    mut ask: impl FnMut() -> F,
) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let mut troubled = false;
    loop {
        match ask().await {
            Ok(answer) => {
                if troubled {
                    component.trouble(None);
                }
                return Ok(answer);
            }
            Err(StoreError::Closed) => return Err(StoreError::Closed),
            Err(error) => {
                if !troubled {
                    tracing::warn!(%error, "the store cannot be reached, trying again");
                }
                troubled = true;
                component.trouble(Some(unreachable(&error)));
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}
