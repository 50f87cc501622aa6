//! What the handlers share.

use std::sync::Arc;
use std::time::Duration;

use contract::ids::{Bucket, Position};
use store::StoreError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::access::AccessTokens;
use crate::commands::Commands;
use crate::config::ControlConfig;
use crate::deps::ControlDeps;
use crate::error::ApiError;
use crate::metrics::ControlMetrics;
use crate::routes::RoutePublisher;
use crate::seal::Seal;
use crate::views::{CONSUMER, Views, ViewsProgress};

/// How long a GET waits for the read models to reach the position that it requires.
pub const POSITION_WAIT: Duration = Duration::from_secs(2);
/// How often a waiting GET polls the cursor of rows that another replica writes.
const CURSOR_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// State shared by the handlers.
pub struct App {
    pub config: ControlConfig,
    pub deps: ControlDeps,
    pub commands: Arc<Commands>,
    pub access: Arc<AccessTokens>,
    pub seal: Seal,
    pub views: Views,
    /// The routes and the members, as far as this replica has read.
    pub routes: Arc<RoutePublisher>,
    pub metrics: ControlMetrics,
    pub openapi: String,
    /// Permits for event and log streams.
    pub streams: Arc<Semaphore>,
    /// Ends the streams when cancelled.
    pub shutdown: CancellationToken,
}

impl App {
    /// Acquires a permit for one more stream, or fails if the limit is reached.
    pub fn acquire_stream_permit(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        self.streams.clone().try_acquire_owned().map_err(|_| {
            ApiError::too_many_streams(format!(
                "all {} event and log streams are in use; close one, or try again later",
                self.config.limits.streams
            ))
        })
    }

    /// Waits until the rows reflect the event at a position, at most for [`POSITION_WAIT`].
    pub async fn wait_for(&self, position: Position) -> Result<(), ApiError> {
        let after = Position(position.0.saturating_sub(1));
        let event = self.deps.store.read_raw(after, 1).await?;
        let Some(bucket) = event.first().map(|event| event.bucket) else {
            return Ok(());
        };
        let reached = async {
            self.wait_until_folded(bucket, position).await;
            self.wait_until_written(bucket, position).await
        };
        // A timeout is no error: the response shows what is there.
        match tokio::time::timeout(POSITION_WAIT, reached).await {
            Ok(Err(error)) => Err(error.into()),
            Ok(Ok(())) | Err(_) => Ok(()),
        }
    }

    /// Waits until this replica has folded the event.
    async fn wait_until_folded(&self, bucket: Bucket, position: Position) {
        let mut progress = self.views.progress();
        let reached = |progress: &ViewsProgress| {
            let folded = progress.folded.get(&bucket);
            folded.is_some_and(|folded| *folded >= position)
        };
        // The consumer runs as long as the server.
        let _ = progress.wait_for(reached).await;
    }

    /// Waits until the rows reflect the event, whichever replica writes them.
    async fn wait_until_written(
        &self,
        bucket: Bucket,
        position: Position,
    ) -> Result<(), StoreError> {
        let mut progress = self.views.progress();
        loop {
            let own = progress.borrow_and_update().written.get(&bucket).copied();
            match own {
                Some(written) if written >= position => return Ok(()),
                Some(_) => {
                    let _ = progress.changed().await;
                }
                None => {
                    if self.deps.store.cursor(CONSUMER, bucket).await? >= position {
                        return Ok(());
                    }
                    tokio::time::sleep(CURSOR_POLL_INTERVAL).await;
                }
            }
        }
    }
}
