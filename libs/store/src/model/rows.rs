//! Read models: rows that are folded from the log, and can be dropped and made again ([`rebuild`]).
//!
//! [`rebuild`]: crate::rebuild

use std::collections::BTreeMap;

use contract::ids::{Bucket, Position};
use contract::log::{Record, RowChange};
use contract::time::Timestamp;

use crate::model::raw::Unreadable;

/// The consumer that keeps the rows of read models.
pub(crate) const VIEWS: &str = "views";

/// Rows per read.
pub const PAGE_ROWS_MAX: usize = 500;

/// One row of a read model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub key: String,
    pub endpoint: String,
    pub deployment: String,
    pub position: Position,
    pub time: Timestamp,
    /// JSON.
    pub doc: String,
}

/// Which rows, newest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowQuery {
    pub model: String,
    pub endpoint: Option<String>,
    pub deployment: Option<String>,
    pub since: Option<Timestamp>,
    /// Only rows below this position: the last one of the page before.
    pub before: Option<Position>,
    pub limit: usize,
}

/// Makes rows from the log: a pure fold. Events of other endpoints may come in between in any
/// order, those of one bucket come in order.
pub trait Projector: Send {
    fn project(&mut self, record: &Record) -> Vec<RowChange>;

    /// An event that cannot be decoded stands here in the log.
    fn pass_over(&mut self, _unreadable: &Unreadable) {}

    /// What was left for the end of the history, by a projector that was made for a rebuild. None if
    /// that cannot be said any more: then all is to be projected once more, and nothing is left again.
    fn rest(&mut self) -> Option<Vec<RowChange>> {
        Some(Vec::new())
    }

    /// Whether the rows of a model are each written by one record and never changed: a rebuild need not
    /// keep them until it knows how they end.
    fn is_written_once(&self, _model: &str) -> bool {
        false
    }

    /// Under whose cursors the rows are written while the log grows.
    fn consumer(&self) -> &'static str {
        VIEWS
    }
}

/// The rows of some models, by model and key.
pub(crate) type Rows = BTreeMap<String, BTreeMap<String, Row>>;

/// The rows as the log has them.
pub(crate) struct Folded {
    pub rows: Rows,
}

impl Folded {
    pub(crate) fn new(models: &[&str]) -> Self {
        let models = models.iter();
        Self {
            rows: models
                .map(|model| ((*model).to_owned(), BTreeMap::new()))
                .collect(),
        }
    }

    pub(crate) fn take_in(&mut self, changes: Vec<RowChange>) {
        for change in changes {
            let Some(rows) = self.rows.get_mut(change.model) else {
                continue;
            };
            let Some(doc) = change.doc else {
                rows.remove(&change.key);
                continue;
            };
            let row = Row {
                key: change.key.clone(),
                endpoint: change.endpoint,
                deployment: change.deployment,
                position: change.position,
                time: change.time,
                doc,
            };
            rows.insert(change.key, row);
        }
    }
}

/// Whether a consumer with these cursors has taken in the event at a place. One without any cursor is taken to
/// have read everything: its rows were made by a rebuild.
pub(crate) fn covers(
    cursors: &BTreeMap<Bucket, Position>,
    bucket: Bucket,
    position: Position,
) -> bool {
    cursors.is_empty()
        || cursors
            .get(&bucket)
            .is_some_and(|cursor| position <= *cursor)
}
