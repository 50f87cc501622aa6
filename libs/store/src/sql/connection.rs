//! Connections to either database, and macros that run one SQL text on both.
//!
//! Invariant: nothing waits for a database server longer than the time limit of its connection, even if
//! the server becomes unreachable without closing it.

use std::future::Future;
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::{Connection as _, PgConnection, PgPool, SqliteConnection, SqlitePool};

use crate::model::error::StoreError;

/// A connection borrowed from a pool, a transaction or the writer.
pub enum Connection<'c> {
    /// To an SQLite file.
    Sqlite(&'c mut SqliteConnection),
    /// With the time limit per statement.
    Postgres(&'c mut PgConnection, Duration),
}

/// Runs a query on either database: `run!(connection, query_as<Row>.fetch_all, SQL, bindings…)`.
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
                let query = sqlx::$kind::<sqlx::Postgres, $row>($sql)
                    $(.bind($bind))*
                    .$fetch(&mut **connection);
                $crate::sql::connection::with_timeout(*limit, query).await
            }
        }
    };
}

/// Runs a statement without results; returns the number of affected rows.
macro_rules! execute {
    ($connection:expr, $sql:expr $(, $bind:expr)* $(,)?) => {
        match $connection {
            $crate::sql::connection::Connection::Sqlite(connection) => {
                let query = sqlx::query::<sqlx::Sqlite>($sql)
                    $(.bind($bind))*
                    .execute(&mut **connection);
                query.await.map(|done| done.rows_affected())
            }
            $crate::sql::connection::Connection::Postgres(connection, limit) => {
                let query = sqlx::query::<sqlx::Postgres>($sql)
                    $(.bind($bind))*
                    .execute(&mut **connection);
                let query = $crate::sql::connection::with_timeout(*limit, query);
                query.await.map(|done| done.rows_affected())
            }
        }
    };
}

pub(crate) use {execute, run};

/// Fails with a timeout if the server does not answer within the limit.
///
/// # Errors
///
/// That of the query, or an [`sqlx::Error::Io`] of kind `TimedOut`.
pub async fn with_timeout<T>(
    limit: Duration,
    query: impl Future<Output = sqlx::Result<T>>,
) -> sqlx::Result<T> {
    match tokio::time::timeout(limit, query).await {
        Ok(done) => done,
        Err(_) => Err(sqlx::Error::Io(std::io::Error::new(
            std::io::ErrorKind::TimedOut,
            format!("no answer from the database server within {limit:?}"),
        ))),
    }
}

/// An owned connection, such as the writer's.
pub enum OwnedConnection {
    /// To an SQLite file.
    Sqlite(SqliteConnection),
    /// With the time limit per statement.
    Postgres(PgConnection, Duration),
}

impl OwnedConnection {
    /// Borrows it to run statements.
    pub fn get(&mut self) -> Connection<'_> {
        match self {
            Self::Sqlite(connection) => Connection::Sqlite(connection),
            Self::Postgres(connection, limit) => Connection::Postgres(connection, *limit),
        }
    }

    /// Begins a transaction.
    ///
    /// # Errors
    ///
    /// If the database fails or does not answer in time.
    pub async fn begin(&mut self) -> sqlx::Result<Transaction<'_>> {
        match self {
            Self::Sqlite(connection) => Ok(Transaction::Sqlite(connection.begin().await?)),
            Self::Postgres(connection, limit) => {
                let transaction = with_timeout(*limit, connection.begin()).await?;
                Ok(Transaction::Postgres(transaction, *limit))
            }
        }
    }

    /// Closes the connection. In SQLite this checkpoints the write-ahead log.
    pub async fn close(self) {
        let closed = match self {
            Self::Sqlite(connection) => connection.close().await,
            Self::Postgres(connection, limit) => with_timeout(limit, connection.close()).await,
        };
        if let Err(error) = closed {
            tracing::warn!(%error, "failed to close a store connection cleanly");
        }
    }

    /// Drops a connection after an error. A broken server connection is not closed gracefully.
    pub(crate) async fn discard(self) {
        match self {
            Self::Sqlite(_) => self.close().await,
            Self::Postgres(connection, _) => drop(connection),
        }
    }
}

/// A transaction; rolled back when dropped, unless committed.
pub enum Transaction<'c> {
    /// In an SQLite file.
    Sqlite(sqlx::Transaction<'c, sqlx::Sqlite>),
    /// With the time limit per statement.
    Postgres(sqlx::Transaction<'c, sqlx::Postgres>, Duration),
}

impl Transaction<'_> {
    /// Borrows its connection to run statements.
    pub fn get(&mut self) -> Connection<'_> {
        match self {
            Self::Sqlite(transaction) => Connection::Sqlite(transaction),
            Self::Postgres(transaction, limit) => Connection::Postgres(transaction, *limit),
        }
    }

    /// Commits the transaction.
    ///
    /// # Errors
    ///
    /// If the database fails or does not answer in time. Whether the transaction was committed may then be
    /// unknown.
    pub async fn commit(self) -> sqlx::Result<()> {
        match self {
            Self::Sqlite(transaction) => transaction.commit().await,
            Self::Postgres(transaction, limit) => with_timeout(limit, transaction.commit()).await,
        }
    }

    pub(crate) async fn rollback(self) -> sqlx::Result<()> {
        match self {
            Self::Sqlite(transaction) => transaction.rollback().await,
            Self::Postgres(transaction, limit) => with_timeout(limit, transaction.rollback()).await,
        }
    }
}

/// A connection pool, for reads.
#[derive(Clone)]
pub enum Pool {
    /// Of an SQLite file.
    Sqlite(SqlitePool),
    /// With the time limit per statement.
    Postgres(PgPool, Duration),
}

impl Pool {
    /// Takes a connection, and waits for one if all are in use.
    ///
    /// # Errors
    ///
    /// [`StoreError::Closed`] if the pool is closed, others if no connection can be opened in time.
    pub async fn acquire(&self) -> Result<PooledConnection, StoreError> {
        Ok(match self {
            Self::Sqlite(pool) => PooledConnection::Sqlite(pool.acquire().await?),
            Self::Postgres(pool, limit) => {
                PooledConnection::Postgres(pool.acquire().await?, *limit)
            }
        })
    }

    pub(crate) async fn close(&self) {
        match self {
            Self::Sqlite(pool) => pool.close().await,
            Self::Postgres(pool, limit) => {
                // The server may be unreachable: bound the wait for a graceful close.
                let _ = tokio::time::timeout(*limit, pool.close()).await;
            }
        }
    }
}

/// A pooled connection; returned to its pool when dropped.
pub enum PooledConnection {
    /// To an SQLite file.
    Sqlite(PoolConnection<sqlx::Sqlite>),
    /// With the time limit per statement.
    Postgres(PoolConnection<sqlx::Postgres>, Duration),
}

impl PooledConnection {
    /// Borrows it to run statements.
    pub fn get(&mut self) -> Connection<'_> {
        match self {
            Self::Sqlite(connection) => Connection::Sqlite(connection),
            Self::Postgres(connection, limit) => Connection::Postgres(connection, *limit),
        }
    }

    /// Begins a transaction.
    ///
    /// # Errors
    ///
    /// If the database fails or does not answer in time.
    pub async fn begin(&mut self) -> sqlx::Result<Transaction<'_>> {
        match self {
            Self::Sqlite(connection) => Ok(Transaction::Sqlite(connection.begin().await?)),
            Self::Postgres(connection, limit) => {
                let transaction = with_timeout(*limit, connection.begin()).await?;
                Ok(Transaction::Postgres(transaction, *limit))
            }
        }
    }

    /// Begins a transaction whose reads all see the same database snapshot.
    ///
    /// # Errors
    ///
    /// If the database fails or does not answer in time.
    pub async fn snapshot(&mut self) -> sqlx::Result<Transaction<'_>> {
        match self {
            Self::Sqlite(connection) => Ok(Transaction::Sqlite(connection.begin().await?)),
            Self::Postgres(connection, limit) => {
                let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
                let transaction = with_timeout(*limit, connection.begin_with(begin)).await?;
                Ok(Transaction::Postgres(transaction, *limit))
            }
        }
    }
}
