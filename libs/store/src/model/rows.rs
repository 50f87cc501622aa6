//! Read models: rows that are folded from the log and can be dropped and rebuilt ([`rebuild`]).
//!
//! [`rebuild`]: crate::rebuild

use std::collections::BTreeMap;

use contract::ids::{Bucket, Position};
use contract::log::{Record, RowChange};
use contract::time::Timestamp;

use crate::model::raw::Unreadable;

/// The consumer that maintains the rows of read models.
pub(crate) const VIEWS: &str = "views";

/// The maximum number of rows per read.
pub const PAGE_ROWS_MAX: usize = 500;

/// One row of a read model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Unique within the model.
    pub key: String,
    /// Empty if the row belongs to no endpoint.
    pub endpoint: String,
    /// Empty if the row belongs to no deployment.
    pub deployment: String,
    /// The position of the event that the row shows.
    pub position: Position,
    /// The time of that event.
    pub time: Timestamp,
    /// JSON.
    pub doc: String,
}

/// Selects rows, newest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowQuery {
    /// The read model, such as `endpoints`.
    pub model: String,
    /// Only rows of this endpoint.
    pub endpoint: Option<String>,
    /// Only rows of deployments with this name.
    pub deployment: Option<String>,
    /// Only rows of this time and later.
    pub since: Option<Timestamp>,
    /// Only rows below this position: that of the previous page's last row.
    pub before: Option<Position>,
    /// The most rows per page, apart from others of the last one's position.
    pub limit: usize,
}

/// Builds rows from the log: a pure fold. Events of one bucket come in order; those of different
/// buckets may interleave in any way.
pub trait Projector: Send {
    /// Returns the changes to rows that a record causes.
    fn project(&mut self, record: &Record) -> Vec<RowChange>;

    /// Handles an event of the log that cannot be decoded.
    fn skip_unreadable(&mut self, _unreadable: &Unreadable) {}

    /// Returns the changes that a projector for a rebuild deferred until the end of the log. None if they
    /// can no longer be determined: then the entire log has to be projected again, and nothing is
    /// deferred this time.
    fn finish(&mut self) -> Option<Vec<RowChange>> {
        Some(Vec::new())
    }

    /// Whether each row of a model is written by one record and never changed, so that a rebuild does not
    /// have to hold it back until the end of the log.
    fn is_written_once(&self, _model: &str) -> bool {
        false
    }

    /// The consumer under whose cursors the rows are written as the log grows.
    fn consumer(&self) -> &'static str {
        VIEWS
    }
}

/// Rows by model and key.
pub(crate) type Rows = BTreeMap<String, BTreeMap<String, Row>>;

/// The rows that result from folding the log.
pub(crate) struct FoldedRows {
    pub rows: Rows,
}

impl FoldedRows {
    pub(crate) fn new(models: &[&str]) -> Self {
        let models = models.iter();
        Self {
            rows: models
                .map(|model| ((*model).to_owned(), BTreeMap::new()))
                .collect(),
        }
    }

    pub(crate) fn apply(&mut self, changes: Vec<RowChange>) {
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

/// Whether a consumer with these cursors has processed the event at a position. A consumer without any
/// cursor counts as having read everything: its rows come from a rebuild.
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
