//! Ownership: fences, and leases, which are fences with a holder and an expiry.
//!
//! Invariants: taking a fence or acquiring a lease raises the generation, so every earlier fence is
//! refused from then on; a lease that has not expired is not given to another holder. Expiry follows
//! the database's clock in PostgreSQL and this machine's in SQLite.

use std::collections::BTreeSet;
use std::time::Duration;

use sqlx::AssertSqlSafe;

use crate::model::commit::Fence;
use crate::model::error::StoreError;
use crate::sql::connection::{Connection, execute, run};
use crate::sql::{postgres, sqlite};
use crate::writing::cache::WriterCache;

pub(crate) enum FenceChange {
    Take {
        name: String,
    },
    Acquire {
        name: String,
        holder: String,
        ttl: Duration,
    },
    Renew {
        fence: Fence,
        holder: String,
        ttl: Duration,
    },
    Release {
        fence: Fence,
    },
}

impl FenceChange {
    /// Returns the fence's generation, or None if the change was not made.
    pub(crate) async fn write(
        &self,
        connection: &mut Connection<'_>,
        cache: &mut WriterCache,
    ) -> Result<Option<u64>, StoreError> {
        match self {
            Self::Take { name } => {
                let generation = acquire_fence(connection, name).await?;
                cache.fences.insert(name.clone(), generation);
                Ok(Some(generation))
            }
            Self::Acquire { name, holder, ttl } => {
                let acquired = acquire(connection, name, holder, *ttl).await?;
                if let Some(generation) = acquired {
                    cache.fences.insert(name.clone(), generation);
                }
                Ok(acquired)
            }
            Self::Renew { fence, holder, ttl } => {
                let renewed = renew(connection, fence, holder, *ttl).await?;
                Ok(renewed.then_some(fence.generation))
            }
            Self::Release { fence } => {
                let released = release(connection, fence).await?;
                Ok(released.then_some(fence.generation))
            }
        }
    }
}

/// Takes fences in the order in which batches lock them, which prevents deadlocks.
pub(crate) async fn acquire_fences(
    connection: &mut Connection<'_>,
    cache: &mut WriterCache,
    names: &[String],
) -> Result<Vec<Fence>, StoreError> {
    let mut fences = Vec::with_capacity(names.len());
    for name in names.iter().collect::<BTreeSet<_>>() {
        let generation = acquire_fence(connection, name).await?;
        cache.fences.insert(name.clone(), generation);
        fences.push(Fence {
            name: name.clone(),
            generation,
        });
    }
    Ok(fences)
}

async fn acquire_fence(connection: &mut Connection<'_>, name: &str) -> Result<u64, StoreError> {
    let generation = run!(
        connection,
        query_scalar<i64>.fetch_one,
        "INSERT INTO fences (name, generation) VALUES ($1, 1) \
         ON CONFLICT (name) DO UPDATE SET generation = fences.generation + 1, \
         holder = NULL, expires = NULL RETURNING generation",
        name
    )?;
    Ok(generation as u64)
}

fn now(connection: &Connection<'_>) -> &'static str {
    match connection {
        Connection::Sqlite(_) => sqlite::NOW,
        Connection::Postgres(..) => postgres::NOW,
    }
}

fn millis(ttl: Duration) -> i64 {
    i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX / 2)
}

async fn acquire(
    connection: &mut Connection<'_>,
    name: &str,
    holder: &str,
    ttl: Duration,
) -> Result<Option<u64>, StoreError> {
    let now = now(connection);
    let text = format!(
        "INSERT INTO fences (name, generation, holder, expires) VALUES ($1, 1, $2, {now} + $3) \
         ON CONFLICT (name) DO UPDATE SET generation = fences.generation + 1, \
         holder = excluded.holder, expires = {now} + $3 \
         WHERE fences.holder IS NULL OR fences.holder = excluded.holder OR fences.expires <= {now} \
         RETURNING generation"
    );
    let generation = run!(
        connection,
        query_scalar<i64>.fetch_optional,
        AssertSqlSafe(text.clone()),
        name,
        holder,
        millis(ttl)
    )?;
    Ok(generation.map(|generation| generation as u64))
}

async fn renew(
    connection: &mut Connection<'_>,
    fence: &Fence,
    holder: &str,
    ttl: Duration,
) -> Result<bool, StoreError> {
    let now = now(connection);
    let text = format!(
        "UPDATE fences SET expires = {now} + $4 \
         WHERE name = $1 AND generation = $2 AND holder = $3"
    );
    let touched = execute!(
        connection,
        AssertSqlSafe(text.clone()),
        &fence.name,
        fence.generation as i64,
        holder,
        millis(ttl)
    )?;
    Ok(touched > 0)
}

async fn release(connection: &mut Connection<'_>, fence: &Fence) -> Result<bool, StoreError> {
    let touched = execute!(
        connection,
        "UPDATE fences SET holder = NULL, expires = NULL WHERE name = $1 AND generation = $2",
        &fence.name,
        fence.generation as i64
    )?;
    Ok(touched > 0)
}
