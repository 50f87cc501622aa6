//! Stores with archives, and the results of every way to read one.

#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use contract::log::{RawRecord, Record, RowChange, StreamKind};
use contract::time::Timestamp;
use store::{
    ARCHIVE_LEASE, BucketHead, Fence, LogEntry, LogHash, PageQuery, Projector, SealLimits,
    SealedFile, Store, heads, log_hash, seal,
};

use super::database::*;

/// A database for a store and a folder for its archives.
pub struct ArchiveFixture {
    pub db: TestDatabase,
    pub folder: tempfile::TempDir,
}

impl ArchiveFixture {
    pub fn new(db: TestDatabase) -> Self {
        Self {
            db,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    pub fn archives(&self) -> PathBuf {
        self.folder.path().join("sealed")
    }

    pub async fn open(&self) -> Store {
        let folder = self.archives();
        Store::open_with(&self.db.url(), Some(&folder))
            .await
            .unwrap()
    }
}

pub const NAMES: [&str; 4] = ["iris", "roses", "tulips", "wine"];

/// Appends events to several streams in turn.
pub async fn fill_all(store: &Store, from: u64, to: u64) {
    for version in from..to {
        for (index, name) in NAMES.iter().enumerate() {
            if version % (index as u64 + 1) == 0 {
                let at = version / (index as u64 + 1);
                records(store, commit_to(stream(name), at, 1)).await;
            }
        }
    }
}

pub async fn fill_from(store: &Store, name: &str, from: u64, to: u64) {
    for version in from..to {
        records(store, commit_to(stream(name), version, 1)).await;
    }
}

pub async fn lease(store: &Store) -> Fence {
    let ttl = Duration::from_secs(60);
    let acquired = store.acquire_lease(ARCHIVE_LEASE, "test", ttl).await;
    acquired.unwrap().unwrap()
}

pub fn before(position: u64, events_max: u64) -> SealLimits {
    SealLimits {
        before: Some(Position(position)),
        events_max: Some(events_max),
        ..SealLimits::default()
    }
}

pub async fn sealed(store: &Store, limits: SealLimits) -> Vec<SealedFile> {
    let fence = lease(store).await;
    let now = Timestamp::from_secs(9_000);
    seal(store, &fence, &limits, now, |_| {}).await.unwrap()
}

/// The results of every way to read a store.
#[derive(Debug, PartialEq)]
pub struct AllReads {
    pub raw: Vec<RawRecord>,
    pub buckets: BTreeMap<Bucket, Vec<Record>>,
    pub streams: BTreeMap<String, Vec<Record>>,
    pub without: Vec<LogEntry>,
    pub replayed: Vec<Record>,
    pub hashes: Vec<Option<ChainHash>>,
    pub heads: Vec<BucketHead>,
    pub log: LogHash,
    pub head: Position,
    pub ids: Vec<Option<Record>>,
}

pub async fn read_everything(store: &Store) -> AllReads {
    let head = store.head().await.unwrap();
    let mut raw = Vec::new();
    loop {
        let after = raw
            .last()
            .map_or(Position::START, |e: &RawRecord| e.position);
        let page = store.read_raw(after, 7).await.unwrap();
        if page.is_empty() {
            break;
        }
        raw.extend(page);
    }
    let (mut buckets, mut hashes) = (BTreeMap::new(), Vec::new());
    for name in NAMES {
        let bucket = endpoint(name).bucket();
        let records = store
            .read_bucket(bucket, Position(3), 10_000)
            .await
            .unwrap();
        buckets.insert(bucket, records);
        for at in (0..=head.0 + 1).step_by(3) {
            hashes.push(store.event_hash(bucket, Position(at)).await.unwrap());
        }
    }
    let mut streams = BTreeMap::new();
    for name in NAMES {
        let all = store.read_stream(&stream(name), 0, 10_000).await.unwrap();
        let mut paged = Vec::new();
        while let Some(next) = {
            let page = store
                .read_stream(&stream(name), paged.len() as u64, 3)
                .await;
            Some(page.unwrap()).filter(|page| !page.is_empty())
        } {
            paged.extend(next);
        }
        assert_eq!(all, paged);
        streams.insert(name.to_owned(), all);
    }
    let query = PageQuery {
        bucket: None,
        after: Position(2),
        through: Position(head.0 - 1),
        excluded_kinds: &[StreamKind::Usage],
        slices_from: Timestamp::MIN,
        limit: 10_000,
    };
    let without = store.read_page(&query).await;
    let mut replay = store.replay(Position(1));
    let mut replayed = Vec::new();
    while let Some(page) = replay.next().await {
        replayed.extend(page.unwrap());
    }
    let mut ids = Vec::new();
    for event in &raw {
        ids.push(store.read_event(event.id.parse().unwrap()).await.unwrap());
    }
    AllReads {
        buckets,
        streams,
        without: without.unwrap(),
        replayed,
        hashes,
        heads: heads(store).await.unwrap(),
        log: log_hash(store, head).await.unwrap(),
        head,
        ids,
        raw,
    }
}

/// Projects one row per event.
pub struct EventRows;

pub const MODEL: &str = "events";

impl Projector for EventRows {
    fn project(&mut self, record: &Record) -> Vec<RowChange> {
        vec![RowChange {
            model: MODEL,
            key: record.position.to_string(),
            endpoint: String::new(),
            deployment: String::new(),
            position: record.position,
            time: record.time,
            doc: Some("{}".to_owned()),
        }]
    }
}
