//! What an operator can set.

use std::path::{Path, PathBuf};

use contract::time::Span;

#[derive(Clone, Debug)]
pub struct Config {
    /// The file that history and open minutes are kept in.
    pub history: PathBuf,
    /// Panes older than this are deleted.
    pub retention: Span,
}

impl Config {
    /// The defaults: `history.db` in the data folder, 14 days.
    pub fn new(data: &Path) -> Self {
        Self {
            history: data.join("history.db"),
            retention: Span::from_secs(14 * 24 * 3600),
        }
    }
}
