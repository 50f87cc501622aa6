//! The heads of the hash chains, saved in a file next to an SQLite store. SQLite takes a truncated or lost
//! write-ahead log for the end of the log; the file tells that there was more.
//!
//! Invariants: the file never names an event that was not durable; heads that the log has lost stay in it
//! until an operator deletes it.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use contract::ids::Position;
use contract::log::RawRecord;
use serde::{Deserialize, Serialize};

use crate::archive::combined;
use crate::log::store::Store;
use crate::maintenance::heads::heads;
use crate::maintenance::transfer::skip_positions_above;
use crate::model::chain::BucketHead;
use crate::model::error::StoreError;
use crate::model::raw::EventRow;
use crate::sql::statements;

/// How many buckets a warning names.
const NAMED_MAX: usize = 5;

/// The file, in the format of `penstock events head -o json`.
#[derive(Default, Serialize, Deserialize)]
struct HeadsFile {
    items: Vec<BucketHead>,
}

/// Saves the heads of an open store, and compares the log with those saved before.
pub struct SavedHeads {
    store: Store,
    file: PathBuf,
    saved: Position,
    /// The log has lost what is saved; see [`SavedHeads::check`].
    is_lost: bool,
}

impl SavedHeads {
    /// Returns None for a store in PostgreSQL, which other processes write too.
    pub fn of(store: &Store) -> Option<Self> {
        Some(Self {
            store: store.clone(),
            file: file_of(store)?,
            saved: Position::START,
            is_lost: false,
        })
    }

    /// Compares the log with the saved heads. If events are missing, returns which, and how to go on; the
    /// saved heads are kept, and no position below them is assigned again.
    ///
    /// # Errors
    ///
    /// If the store cannot be read or written.
    pub async fn check(&mut self) -> Result<Option<String>, StoreError> {
        let saved = match read(&self.file).await {
            Ok(saved) => saved,
            Err(unreadable) => {
                self.is_lost = true;
                return Ok(Some(unreadable));
            }
        };
        let lost = self.lost(&saved).await?;
        self.is_lost = !lost.is_empty();
        if !self.is_lost {
            return Ok(None);
        }
        let head = self.store.head().await?;
        let ended = saved.iter().map(|saved| saved.position).max();
        let ended = ended.unwrap_or_default();
        if head < ended {
            skip_positions_above(&self.store, ended).await?;
        }
        let (store, file) = (self.store.location(), self.file.display());
        Ok(Some(format!(
            "{store} has lost events: its log ended at position {ended} when its heads were last saved, and ended \
             at {head} at this start. {}. Its write-ahead log was truncated or lost, or an older copy replaced it. \
             Restore the events from a backup or from Kafka (`penstock store rebuild --from`), or accept their \
             loss by deleting {file}",
            name(&lost)
        )))
    }

    /// Returns the heads that the log no longer contains, with the last event of the bucket up to there.
    async fn lost(&self, saved: &[BucketHead]) -> Result<Vec<(BucketHead, Position)>, StoreError> {
        let mut reader = self.store.reader().await?;
        let (archives, mut connection) = (self.store.archive_set(), reader.get());
        let mut lost = Vec::new();
        for head in saved {
            let (bucket, position) = (head.bucket, head.position);
            // The table has the newest event of each bucket: archives, which take longer, are rarely read.
            let event = statements::read_at(&mut connection, position).await?;
            if event.is_some_and(|event| is_head(head, &event)) {
                continue;
            }
            let last =
                combined::last_of_bucket(archives, &mut connection, bucket, position).await?;
            if last != Some((position, head.hash)) {
                let last = last.map(|(position, _)| position);
                lost.push((*head, last.unwrap_or_default()));
            }
        }
        Ok(lost)
    }

    /// Saves the heads if the log has grown. Returns false, and leaves the file, as long as the log has lost
    /// what is saved in it and the file exists.
    ///
    /// # Errors
    ///
    /// If the store cannot be read or the file cannot be written.
    pub async fn save(&mut self) -> Result<bool, StoreError> {
        if self.is_lost && self.file.exists() {
            return Ok(false);
        }
        self.is_lost = false;
        let head = *self.store.head_watch().borrow();
        if head == self.saved {
            return Ok(true);
        }
        let items = heads(&self.store).await?;
        write(&self.file, HeadsFile { items }).await?;
        self.saved = head;
        Ok(true)
    }
}

fn is_head(head: &BucketHead, event: &RawRecord) -> bool {
    event.bucket == head.bucket && EventRow::from_raw(event).hash() == head.hash
}

fn file_of(store: &Store) -> Option<PathBuf> {
    let mut name = store.location().path()?.as_os_str().to_owned();
    name.push(".heads.json");
    Some(name.into())
}

/// Returns the heads that are saved next to a store; none if there is no file.
///
/// # Errors
///
/// What is wrong with the file, and what to do.
pub(crate) async fn read_saved(store: &Store) -> Result<Vec<BucketHead>, String> {
    match file_of(store) {
        Some(file) => read(&file).await,
        None => Ok(Vec::new()),
    }
}

async fn read(file: &Path) -> Result<Vec<BucketHead>, String> {
    let path = file.to_owned();
    let read = tokio::task::spawn_blocking(move || match std::fs::read(path) {
        Ok(bytes) if bytes.is_empty() => Err(io::Error::other("it is empty")),
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::from),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(HeadsFile::default()),
        Err(error) => Err(error),
    });
    match read.await.map_err(io::Error::other).flatten() {
        Ok(HeadsFile { items }) => Ok(items),
        Err(error) => Err(format!(
            "the saved heads in {0} cannot be read: {error}. Whether the log has lost its last events is unknown: \
             compare it with Kafka or a backup, then delete {0} to save its heads again",
            file.display()
        )),
    }
}

/// Synced before it replaces the former heads, so that a power failure leaves these or those, and never an
/// empty file.
async fn write(file: &Path, contents: HeadsFile) -> Result<(), StoreError> {
    let file = file.to_owned();
    let path = file.clone();
    let written = tokio::task::spawn_blocking(move || {
        let partial = path.with_extension("json.partial");
        let mut new = File::create(&partial)?;
        new.write_all(&serde_json::to_vec(&contents)?)?;
        new.sync_all()?;
        std::fs::rename(&partial, &path)
    });
    let written = written.await.map_err(io::Error::other).flatten();
    written.map_err(|error| {
        StoreError::refused(format!("{} cannot be written: {error}", file.display()))
            .caused_by(error)
    })
}

fn name(lost: &[(BucketHead, Position)]) -> String {
    let named = lost.iter().take(NAMED_MAX).map(|(saved, last)| {
        let (bucket, position) = (saved.bucket, saved.position);
        match *last == position {
            true => format!("The event at {position} in bucket {bucket} is another one"),
            false => format!("Bucket {bucket} lost everything after {last}, up to {position}"),
        }
    });
    let mut named: Vec<String> = named.collect();
    if lost.len() > NAMED_MAX {
        named.push(format!(
            "{} more buckets lost events",
            lost.len() - NAMED_MAX
        ));
    }
    named.join(". ")
}
