//! Carries what this process commits from the store to the bus, in order of position.
//!
//! The bus may lose what it was given: a [`Feed`](crate::feed::Feed) finds it in the store.

use std::sync::Arc;

use bus::Bus;
use store::Store;
use tokio_util::sync::CancellationToken;

/// Publishes every commit made after this call, until the store is closed or `shutdown` is
/// cancelled; what was committed by then is published first.
pub fn run(
    store: Store,
    bus: Arc<dyn Bus>,
    shutdown: CancellationToken,
) -> impl Future<Output = ()> + Send + use<> {
    // Subscribed here and not when the future first runs, so that no commit falls in between.
    let mut committed = store.committed();
    // A handle kept here would keep the store open.
    drop(store);
    async move {
        loop {
            tokio::select! {
                biased;
                records = committed.recv() => match records {
                    Some(records) => {
                        if let Err(error) = bus.publish_records(&records).await {
                            tracing::warn!(%error, "could not publish");
                        }
                    }
                    None => return,
                },
                () = shutdown.cancelled() => return,
            }
        }
    }
}
