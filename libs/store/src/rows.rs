//! Read models: rows that are folded from the log, and can be dropped and made again.

use std::collections::BTreeMap;

use contract::ids::{Bucket, Position};
use contract::log::{Record, RowChange};
use contract::time::Timestamp;
use tokio::task::{JoinError, JoinSet};

use crate::{Commit, CommitError, Store, StoreError, statements};

/// Rows per read.
pub const PAGE_ROWS_MAX: usize = 500;

/// Rows per commit of a rebuild: enough that few pages of the indexes are written more than once, few
/// enough that others who write wait for less than a second.
const COMMIT_ROWS_MAX: usize = 5_000;

/// Commits of a rebuild that are on their way together.
const COMMITS_AT_ONCE: usize = 2;

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

    /// Under whose cursors the rows are written while the log grows.
    fn consumer(&self) -> &'static str {
        "views"
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

    pub(crate) fn take_in(&mut self, record: &Record, projector: &mut dyn Projector) {
        for change in projector.project(record) {
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

/// Whether a consumer with these cursors has taken in a record. One without any cursor is taken to
/// have read everything: its rows were made by a rebuild.
pub(crate) fn covers(cursors: &BTreeMap<Bucket, Position>, record: &Record) -> bool {
    cursors.is_empty()
        || cursors
            .get(&record.bucket)
            .is_some_and(|cursor| record.position <= *cursor)
}

/// Makes the rows of these models anew from the log, as far as their consumer's cursors stand, in
/// short transactions. Readers never see them empty: only what differs is written. Refused while
/// the consumer runs. Returns how many rows were changed.
pub async fn rebuild(
    store: &Store,
    projector: &mut dyn Projector,
    models: &[&'static str],
) -> Result<usize, StoreError> {
    rebuild_with(store, projector, models, |_| {}).await
}

/// The same; `progress` hears up to which position the log was folded.
pub async fn rebuild_with(
    store: &Store,
    projector: &mut dyn Projector,
    models: &[&'static str],
    mut progress: impl FnMut(Position),
) -> Result<usize, StoreError> {
    let consumer = projector.consumer();
    let cursors = store.cursors(consumer).await?;
    let folded = fold_all(store, projector, models, &cursors, &mut progress).await?;
    let changes = differences(store, folded, models).await?;
    let changed = changes.len();
    write(store, changes).await?;
    if store.cursors(consumer).await? != cursors {
        return Err(StoreError::Refused(format!(
            "`{consumer}` wrote read models while they were rebuilt: stop it and rebuild again"
        )));
    }
    Ok(changed)
}

async fn write(store: &Store, changes: Vec<RowChange>) -> Result<(), StoreError> {
    let mut changes = changes.into_iter();
    let mut writing = JoinSet::new();
    loop {
        let rows: Vec<RowChange> = changes.by_ref().take(COMMIT_ROWS_MAX).collect();
        if rows.is_empty() {
            break;
        }
        if writing.len() >= COMMITS_AT_ONCE
            && let Some(written) = writing.join_next().await
        {
            ended(written)?;
        }
        let commit = Commit {
            rows,
            ..Commit::default()
        };
        let store = store.clone();
        writing.spawn(async move { store.commit(commit).await.map(|_| ()) });
    }
    while let Some(written) = writing.join_next().await {
        ended(written)?;
    }
    Ok(())
}

fn ended(written: Result<Result<(), CommitError>, JoinError>) -> Result<(), StoreError> {
    match written {
        Ok(Ok(())) => Ok(()),
        Ok(Err(CommitError::Store(error))) => Err(error),
        Ok(Err(error)) => Err(StoreError::Refused(error.to_string())),
        Err(error) => Err(StoreError::Database(format!(
            "rows were not written: {error}"
        ))),
    }
}

async fn fold_all(
    store: &Store,
    projector: &mut dyn Projector,
    models: &[&'static str],
    cursors: &BTreeMap<Bucket, Position>,
    progress: &mut impl FnMut(Position),
) -> Result<Folded, StoreError> {
    let mut folded = Folded::new(models);
    let mut replay = store.replay(Position::START);
    while let Some(page) = replay.next().await {
        let page = page?;
        for record in page.iter().filter(|record| covers(cursors, record)) {
            folded.take_in(record, projector);
        }
        if let Some(last) = page.last() {
            progress(last.position);
        }
    }
    Ok(folded)
}

/// What has to be written for the stored rows to be those of the log.
async fn differences(
    store: &Store,
    mut folded: Folded,
    models: &[&'static str],
) -> Result<Vec<RowChange>, StoreError> {
    let mut changes = Vec::new();
    for model in models {
        let mut stored = BTreeMap::new();
        let mut reader = store.reader().await?;
        let mut after: Option<String> = None;
        loop {
            let page =
                statements::rows_by_key(&mut reader.get(), model, after.as_deref(), PAGE_ROWS_MAX)
                    .await?;
            let Some(last) = page.last() else { break };
            after = Some(last.key.clone());
            stored.extend(page.into_iter().map(|row| (row.key.clone(), row)));
        }
        for (key, row) in folded.rows.remove(*model).unwrap_or_default() {
            if stored.remove(&key).as_ref() != Some(&row) {
                changes.push(change(model, row, Keep::Yes));
            }
        }
        let stray = stored.into_values();
        changes.extend(stray.map(|row| change(model, row, Keep::No)));
    }
    Ok(changes)
}

enum Keep {
    Yes,
    No,
}

fn change(model: &'static str, row: Row, keep: Keep) -> RowChange {
    RowChange {
        model,
        key: row.key,
        endpoint: row.endpoint,
        deployment: row.deployment,
        position: row.position,
        time: row.time,
        doc: match keep {
            Keep::Yes => Some(row.doc),
            Keep::No => None,
        },
    }
}
