//! Watches the end of a log in a file: its heads are saved next to it, and compared with it at the next start.

use std::time::Duration;

use runtime::health::Component;
use store::{SavedHeads, Store};
use tokio_util::sync::CancellationToken;

/// How often the heads are saved while the log grows.
const SAVE_INTERVAL: Duration = Duration::from_secs(2);

/// Saves the heads of a store until shutdown.
pub struct LogEnd {
    heads: SavedHeads,
    component: Component,
}

impl LogEnd {
    /// Compares the log with the saved heads, before anything is appended. `None` for a store that keeps none.
    ///
    /// # Errors
    ///
    /// If the store cannot be read or written.
    pub async fn check(store: &Store, component: Component) -> anyhow::Result<Option<Self>> {
        component.ready();
        let Some(mut heads) = SavedHeads::of(store) else {
            return Ok(None);
        };
        if let Some(warning) = heads.check().await? {
            tracing::warn!(
                warning,
                "the end of the log is not confirmed by its saved heads"
            );
            component.set_warning(Some(warning));
        }
        Ok(Some(Self { heads, component }))
    }

    /// Saves the heads periodically, and at shutdown.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(SAVE_INTERVAL);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            self.save().await;
        }
        self.save().await;
    }

    async fn save(&mut self) {
        match self.heads.save().await {
            Ok(true) => self.component.set_warning(None),
            // The warning stays until the file is deleted.
            Ok(false) => {}
            Err(error) => {
                let warning = format!("the heads of the log cannot be saved: {error}");
                self.component.set_warning(Some(warning));
            }
        }
    }
}
