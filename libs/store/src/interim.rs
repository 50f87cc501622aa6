//! Reads that survive an event that cannot be decoded, the watch on the head, and leases, for a
//! store that one process has for itself.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use contract::ids::{Bucket, Position};
use contract::log::{Record, RowChange};
use contract::time::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::statements::{self, RawEvent};
use crate::{Commit, CommitError, Fence, READ_LIMIT_MAX, Store, StoreError};

/// One place in the log, whether or not its event can be read.
#[derive(Clone, Debug, PartialEq)]
pub enum Entry {
    Record(Arc<Record>),
    Unreadable(Unreadable),
}

/// An event that cannot be decoded, with all that can be said about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    pub position: Position,
    pub prev: Position,
    pub bucket: Bucket,
    pub stream: String,
    pub version: u64,
    pub type_name: String,
    pub detail: String,
}

impl Entry {
    pub fn position(&self) -> Position {
        match self {
            Self::Record(record) => record.position,
            Self::Unreadable(unreadable) => unreadable.position,
        }
    }
}

impl From<RawEvent> for Entry {
    fn from(raw: RawEvent) -> Self {
        let mut unreadable = Unreadable {
            position: raw.position(),
            prev: Position(raw.prev as u64),
            bucket: Bucket(u16::try_from(raw.bucket).unwrap_or(u16::MAX)),
            stream: raw.stream.clone(),
            version: raw.version as u64,
            type_name: raw.r#type.clone(),
            detail: String::new(),
        };
        match raw.decode() {
            Ok(record) => Self::Record(Arc::new(record)),
            Err(error) => {
                unreadable.detail = match error {
                    StoreError::Unreadable { detail, .. } => detail,
                    error => error.to_string(),
                };
                Self::Unreadable(unreadable)
            }
        }
    }
}

const LEASES: &str = "leases";

#[derive(Serialize, Deserialize)]
struct Lease {
    holder: String,
    generation: u64,
    /// Milliseconds since 1970.
    expires: u64,
}

fn millis_now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_millis() as u64
}

impl Store {
    pub async fn read_bucket_entries(
        &self,
        bucket: Bucket,
        after: Position,
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError> {
        let limit = limit.min(READ_LIMIT_MAX);
        let mut reader = self.reader().await?;
        let raw = statements::read_bucket_raw(&mut reader, bucket, after, limit).await?;
        Ok(raw.into_iter().map(Entry::from).collect())
    }

    pub async fn read_all_entries(
        &self,
        after: Position,
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError> {
        let limit = limit.min(READ_LIMIT_MAX);
        let raw = statements::read_all_raw(&mut *self.reader().await?, after, limit).await?;
        Ok(raw.into_iter().map(Entry::from).collect())
    }

    /// The newest position known to be committed.
    pub fn head_watch(&self) -> watch::Receiver<Position> {
        let mut committed = self.committed();
        let (sender, receiver) = watch::channel(Position::START);
        tokio::spawn(async move {
            while let Some(records) = committed.recv().await {
                let Some(last) = records.last() else { continue };
                if sender.send(last.position).is_err() {
                    return;
                }
            }
        });
        receiver
    }

    pub async fn acquire_lease(
        &self,
        name: &str,
        holder: &str,
        ttl: Duration,
    ) -> Result<Option<Fence>, StoreError> {
        if let Some(lease) = self.lease(name).await?
            && lease.holder != holder
            && lease.expires > millis_now()
        {
            return Ok(None);
        }
        let fence = self.take(name).await?;
        let written = self.write_lease(&fence, holder, ttl).await?;
        Ok(written.then_some(fence))
    }

    pub async fn renew_lease(
        &self,
        fence: &Fence,
        holder: &str,
        ttl: Duration,
    ) -> Result<bool, StoreError> {
        let lease = self.lease(&fence.name).await?;
        if lease.is_none_or(|l| l.holder != holder || l.generation != fence.generation) {
            return Ok(false);
        }
        self.write_lease(fence, holder, ttl).await
    }

    pub async fn release_lease(&self, fence: &Fence) -> Result<(), StoreError> {
        self.write_lease(fence, "", Duration::ZERO).await?;
        Ok(())
    }

    async fn lease(&self, name: &str) -> Result<Option<Lease>, StoreError> {
        let row = self.row(LEASES, name).await?;
        Ok(row.and_then(|row| serde_json::from_str(&row.doc).ok()))
    }

    async fn write_lease(
        &self,
        fence: &Fence,
        holder: &str,
        ttl: Duration,
    ) -> Result<bool, StoreError> {
        let lease = Lease {
            holder: holder.to_owned(),
            generation: fence.generation,
            expires: millis_now() + ttl.as_millis() as u64,
        };
        let row = RowChange {
            model: LEASES,
            key: fence.name.clone(),
            endpoint: String::new(),
            deployment: String::new(),
            position: Position::START,
            time: Timestamp::default(),
            doc: serde_json::to_string(&lease).ok(),
        };
        let commit = Commit {
            rows: vec![row],
            fence: Some(fence.clone()),
            ..Commit::default()
        };
        match self.commit(commit).await {
            Ok(_) => Ok(true),
            Err(CommitError::Fenced { .. }) => Ok(false),
            Err(CommitError::Store(error)) => Err(error),
            Err(error) => Err(StoreError::Refused(error.to_string())),
        }
    }
}
