//! Follows the head of a log that other processes write: by notifications of the server, and by polling
//! in case one is missed.

use std::time::Duration;

use contract::ids::Position;
use sqlx::PgPool;
use sqlx::postgres::PgListener;

use crate::model::error::StoreError;
use crate::sql::connection::{Connection, with_timeout};
use crate::sql::postgres::inserts::CHANNEL;
use crate::sql::statements;
use crate::writing::head::LogHead;

/// How often the head is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Runs until the pool is closed or the task is aborted.
pub(crate) async fn follow(pool: PgPool, limit: Duration, head: LogHead) {
    let mut listener = None;
    while !pool.is_closed() {
        if listener.is_none() {
            listener = listen(&pool, limit).await;
        }
        match read(&pool, limit).await {
            Ok(position) => head.advance(position),
            Err(StoreError::Closed) => return,
            Err(error) => tracing::debug!(%error, "failed to read the head of the log"),
        }
        let receiving = tokio::time::timeout(POLL_INTERVAL, receive(listener.as_mut(), &head));
        if let Ok(Err(error)) = receiving.await {
            tracing::debug!(%error, "lost the listener for new positions");
            listener = None;
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}

async fn listen(pool: &PgPool, limit: Duration) -> Option<PgListener> {
    let listening = with_timeout(limit, async {
        let mut listener = PgListener::connect_with(pool).await?;
        listener.listen(CHANNEL).await?;
        Ok(listener)
    });
    listening.await.ok()
}

/// Receives notifications. Commits are serialized, so everything up to a notified position is committed.
async fn receive(listener: Option<&mut PgListener>, head: &LogHead) -> sqlx::Result<()> {
    let Some(listener) = listener else {
        return std::future::pending().await;
    };
    loop {
        let notification = listener.recv().await?;
        if let Ok(position) = notification.payload().parse() {
            head.advance(Position(position));
        }
    }
}

async fn read(pool: &PgPool, limit: Duration) -> Result<Position, StoreError> {
    let mut connection = pool.acquire().await?;
    statements::head(&mut Connection::Postgres(&mut connection, limit)).await
}
