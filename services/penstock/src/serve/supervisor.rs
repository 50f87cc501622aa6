//! Keeps a service running: an error or a panic in it affects neither the process nor other services;
//! it is restarted, with exponential backoff while it keeps failing.

use std::future::Future;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio_util::sync::CancellationToken;

/// Delays before restarts.
const RESTART_BACKOFF: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_secs(1))
    .with_max_delay(Duration::from_secs(30))
    .without_max_times();

/// Runs `start` repeatedly until `shutdown`. Returns when the last run has finished.
pub async fn supervise<F, E>(
    name: &'static str,
    shutdown: CancellationToken,
    mut start: impl FnMut() -> F,
) where
    F: Future<Output = Result<(), E>> + Send + 'static,
    E: std::fmt::Display + Send + 'static,
{
    for delay in RESTART_BACKOFF.build() {
        let run = tokio::spawn(start());
        let ended = run.await;
        if shutdown.is_cancelled() {
            return;
        }
        match ended {
            Ok(Ok(())) => {
                tracing::warn!(service = name, "service exited, restarting")
            }
            Ok(Err(error)) => {
                tracing::error!(service = name, %error, "service failed, restarting")
            }
            Err(panic) => {
                tracing::error!(service = name, %panic, "service panicked, restarting")
            }
        }
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_service_that_panics_or_fails_is_restarted() {
        let (runs, shutdown) = (Arc::new(AtomicU32::new(0)), CancellationToken::new());
        let (counted, stop) = (runs.clone(), shutdown.clone());
        supervise("test", shutdown, move || {
            let run = counted.fetch_add(1, Ordering::SeqCst);
            let stop = stop.clone();
            async move {
                match run {
                    0 => panic!("first run"),
                    1 => return Err("second run"),
                    _ => stop.cancel(),
                }
                Ok(())
            }
        })
        .await;
        assert_eq!(runs.load(Ordering::SeqCst), 3);
    }
}
