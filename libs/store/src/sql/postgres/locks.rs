//! The locks that order the writers of one database.
//!
//! Invariant: fences are locked first, in order of their names; then the lock that orders all commits of
//! the store. So there are no deadlocks, and positions become visible in order.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection as _, PgConnection, Postgres};

use crate::model::error::StoreError;
use crate::sql::connection::{OwnedConnection, Transaction, with_timeout};

/// The commit lock (`penstock` in ASCII): its holder may assign positions.
const COMMIT_LOCK: i64 = 0x7065_6e73_746f_636b;

impl OwnedConnection {
    /// Begins the transaction of a batch of commits. If fences have to be locked first, the commit lock is
    /// taken together with them instead.
    pub(crate) async fn begin_batch(&mut self, fenced: bool) -> sqlx::Result<Transaction<'_>> {
        if fenced {
            return self.begin().await;
        }
        match self {
            Self::Sqlite(connection) => Ok(Transaction::Sqlite(connection.begin().await?)),
            Self::Postgres(connection, limit) => {
                let begun = begin_locked(connection, *limit).await?;
                Ok(Transaction::Postgres(begun, *limit))
            }
        }
    }
}

/// Begins a transaction and takes the commit lock, in one round trip. Not for batches with fences, which
/// must be locked first.
async fn begin_locked(
    connection: &mut PgConnection,
    limit: Duration,
) -> sqlx::Result<sqlx::Transaction<'_, Postgres>> {
    let text = format!("BEGIN; SELECT pg_advisory_xact_lock({COMMIT_LOCK})");
    with_timeout(limit, connection.begin_with(AssertSqlSafe(text))).await
}

/// Takes the commit lock: until the end of the transaction no other process writes events, cursors,
/// snapshots or idempotency keys.
pub(crate) async fn lock_commits(
    connection: &mut PgConnection,
    limit: Duration,
) -> sqlx::Result<()> {
    let locking = sqlx::query("SELECT pg_advisory_xact_lock($1)")
        .bind(COMMIT_LOCK)
        .execute(connection);
    with_timeout(limit, locking).await.map(|_| ())
}

/// Locks these fences until the end of the transaction so that nobody can take them, then takes the commit
/// lock. Returns their generations.
pub(crate) async fn lock_fences(
    connection: &mut PgConnection,
    limit: Duration,
    names: BTreeSet<&str>,
) -> Result<HashMap<String, u64>, StoreError> {
    let names: Vec<&str> = names.into_iter().collect();
    // The commit lock depends on all rows of the first query, so it cannot be taken before them; counting
    // the rows ensures that it is taken even if there are none.
    let locking = sqlx::query_as::<_, (Option<String>, i64)>(
        "WITH held AS MATERIALIZED \
         (SELECT name, generation FROM fences WHERE name = ANY($1) ORDER BY name FOR SHARE), \
         ordered AS MATERIALIZED \
         (SELECT pg_advisory_xact_lock($2) FROM (SELECT COUNT(*) FROM held) AS all_held) \
         SELECT name, generation FROM held UNION ALL SELECT NULL, COUNT(*) FROM ordered",
    )
    .bind(&names)
    .bind(COMMIT_LOCK)
    .fetch_all(connection);
    let stored = with_timeout(limit, locking).await?;
    let mut fences: HashMap<String, u64> =
        names.into_iter().map(|name| (name.to_owned(), 0)).collect();
    let stored = stored.into_iter();
    fences.extend(stored.filter_map(|(name, at)| Some((name?, at as u64))));
    Ok(fences)
}
