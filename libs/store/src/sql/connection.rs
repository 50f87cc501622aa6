//! A connection to whichever database the store stands on, and the macros that run one SQL text on
//! either.
//!
//! Invariant: nothing waits for a database server longer than the limit that goes with its
//! connection, also when the server has vanished without a word.

use std::future::Future;
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::{Connection as _, PgConnection, PgPool, SqliteConnection, SqlitePool};

use crate::model::error::StoreError;

/// Borrowed from a pool, a transaction or the writer.
pub enum Connection<'c> {
    Sqlite(&'c mut SqliteConnection),
    /// With how long one statement may take.
    Postgres(&'c mut PgConnection, Duration),
}

/// Runs one text on either database: `run!(connection, query_as<Row>.fetch_all, SQL, bindings…)`.
macro_rules! run {
    ($connection:expr, $kind:ident<$row:ty>.$fetch:ident, $sql:expr $(, $bind:expr)* $(,)?) => {
        match $connection {
            $crate::sql::connection::Connection::Sqlite(connection) => {
                sqlx::$kind::<sqlx::Sqlite, $row>($sql)
                    $(.bind($bind))*
                    .$fetch(&mut **connection)
                    .await
            }
            $crate::sql::connection::Connection::Postgres(connection, limit) => {
                let running = sqlx::$kind::<sqlx::Postgres, $row>($sql)
                    $(.bind($bind))*
                    .$fetch(&mut **connection);
                $crate::sql::connection::limited(*limit, running).await
            }
        }
    };
}

/// Runs a text that returns nothing; gives how many rows it touched.
macro_rules! execute {
    ($connection:expr, $sql:expr $(, $bind:expr)* $(,)?) => {
        match $connection {
            $crate::sql::connection::Connection::Sqlite(connection) => {
                let running = sqlx::query::<sqlx::Sqlite>($sql)
                    $(.bind($bind))*
                    .execute(&mut **connection);
                running.await.map(|done| done.rows_affected())
            }
            $crate::sql::connection::Connection::Postgres(connection, limit) => {
                let running = sqlx::query::<sqlx::Postgres>($sql)
                    $(.bind($bind))*
                    .execute(&mut **connection);
                let running = $crate::sql::connection::limited(*limit, running);
                running.await.map(|done| done.rows_affected())
            }
        }
    };
}

pub(crate) use {execute, run};

/// Gives up on a server that does not answer.
pub async fn limited<T>(
    limit: Duration,
    running: impl Future<Output = sqlx::Result<T>>,
) -> sqlx::Result<T> {
    match tokio::time::timeout(limit, running).await {
        Ok(done) => done,
        Err(_) => Err(sqlx::Error::Io(std::io::Error::new(
            std::io::ErrorKind::TimedOut,
            format!("no answer from the database server within {limit:?}"),
        ))),
    }
}

/// The writer's own connection.
pub enum Owned {
    Sqlite(SqliteConnection),
    Postgres(PgConnection, Duration),
}

impl Owned {
    pub fn get(&mut self) -> Connection<'_> {
        match self {
            Self::Sqlite(connection) => Connection::Sqlite(connection),
            Self::Postgres(connection, limit) => Connection::Postgres(connection, *limit),
        }
    }

    pub async fn begin(&mut self) -> sqlx::Result<Transaction<'_>> {
        match self {
            Self::Sqlite(connection) => Ok(Transaction::Sqlite(connection.begin().await?)),
            Self::Postgres(connection, limit) => {
                let begun = limited(*limit, connection.begin()).await?;
                Ok(Transaction::Postgres(begun, *limit))
            }
        }
    }

    /// In SQLite this folds the write-ahead log into the database.
    pub(crate) async fn close(self) {
        let closed = match self {
            Self::Sqlite(connection) => connection.close().await,
            Self::Postgres(connection, limit) => limited(limit, connection.close()).await,
        };
        if let Err(error) = closed {
            tracing::warn!(%error, "the store's connection did not close cleanly");
        }
    }

    /// Lets go of a connection that something went wrong on. A broken one cannot say goodbye.
    pub(crate) async fn discard(self) {
        match self {
            Self::Sqlite(_) => self.close().await,
            Self::Postgres(connection, _) => drop(connection),
        }
    }
}

/// Undone when dropped, unless it was committed.
pub enum Transaction<'c> {
    Sqlite(sqlx::Transaction<'c, sqlx::Sqlite>),
    Postgres(sqlx::Transaction<'c, sqlx::Postgres>, Duration),
}

impl Transaction<'_> {
    pub fn get(&mut self) -> Connection<'_> {
        match self {
            Self::Sqlite(transaction) => Connection::Sqlite(transaction),
            Self::Postgres(transaction, limit) => Connection::Postgres(transaction, *limit),
        }
    }

    pub async fn commit(self) -> sqlx::Result<()> {
        match self {
            Self::Sqlite(transaction) => transaction.commit().await,
            Self::Postgres(transaction, limit) => limited(limit, transaction.commit()).await,
        }
    }

    pub(crate) async fn rollback(self) -> sqlx::Result<()> {
        match self {
            Self::Sqlite(transaction) => transaction.rollback().await,
            Self::Postgres(transaction, limit) => limited(limit, transaction.rollback()).await,
        }
    }
}

/// Connections for reading.
#[derive(Clone)]
pub enum Pool {
    Sqlite(SqlitePool),
    Postgres(PgPool, Duration),
}

impl Pool {
    pub async fn acquire(&self) -> Result<Pooled, StoreError> {
        Ok(match self {
            Self::Sqlite(pool) => Pooled::Sqlite(pool.acquire().await?),
            Self::Postgres(pool, limit) => Pooled::Postgres(pool.acquire().await?, *limit),
        })
    }

    pub(crate) async fn close(&self) {
        match self {
            Self::Sqlite(pool) => pool.close().await,
            Self::Postgres(pool, limit) => {
                // Goodbyes to a server that has vanished are not waited for.
                let _ = tokio::time::timeout(*limit, pool.close()).await;
            }
        }
    }
}

/// A connection of a pool; goes back to it when dropped.
pub enum Pooled {
    Sqlite(PoolConnection<sqlx::Sqlite>),
    Postgres(PoolConnection<sqlx::Postgres>, Duration),
}

impl Pooled {
    pub fn get(&mut self) -> Connection<'_> {
        match self {
            Self::Sqlite(connection) => Connection::Sqlite(connection),
            Self::Postgres(connection, limit) => Connection::Postgres(connection, *limit),
        }
    }

    pub async fn begin(&mut self) -> sqlx::Result<Transaction<'_>> {
        match self {
            Self::Sqlite(connection) => Ok(Transaction::Sqlite(connection.begin().await?)),
            Self::Postgres(connection, limit) => {
                let begun = limited(*limit, connection.begin()).await?;
                Ok(Transaction::Postgres(begun, *limit))
            }
        }
    }

    /// A transaction whose reads all see one moment.
    pub async fn snapshot(&mut self) -> sqlx::Result<Transaction<'_>> {
        match self {
            Self::Sqlite(connection) => Ok(Transaction::Sqlite(connection.begin().await?)),
            Self::Postgres(connection, limit) => {
                let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
                let begun = limited(*limit, connection.begin_with(begin)).await?;
                Ok(Transaction::Postgres(begun, *limit))
            }
        }
    }
}
