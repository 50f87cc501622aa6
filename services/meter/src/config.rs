//! Configuration of the meter.

use std::path::Path;

use contract::time::Span;

use crate::history::HistoryLocation;

#[derive(Clone, Debug)]
pub struct Config {
    /// Where history and open minutes are stored.
    pub history: HistoryLocation,
    /// Panes older than this are deleted.
    pub retention: Span,
}

impl Config {
    /// Returns the defaults: `history.db` in the data folder, kept for 14 days.
    pub fn new(data: &Path) -> Self {
        Self::with_history(HistoryLocation::File(data.join("history.db")))
    }

    /// Returns the defaults with the history at another location.
    pub fn with_history(history: HistoryLocation) -> Self {
        Self {
            history,
            retention: Span::from_secs(14 * 24 * 3600),
        }
    }
}
