//! What the process backend keeps on disk: who it is, and a record per instance.
//!
//! Invariant: a record is written, and synced, before what it announces is done. So whatever a crash
//! leaves running is named by a record, and a removed instance is never started again.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use contract::ids::InstanceId;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::host::Host;
use crate::{BackendError, Order};

/// Tombstones that are kept. An id is never used twice, so an old one protects against nothing but
/// orders that were delayed for very long.
const TOMBSTONES_MAX: usize = 10_000;

/// Longest id of an instance; it becomes the name of a folder.
const ID_LENGTH_MAX: usize = 128;

/// Everything known of one instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record {
    pub id: InstanceId,
    /// The newest order carried out, or about to be.
    pub generation: u64,
    pub phase: RecordPhase,
    /// None only for a removal of an instance that was never seen.
    pub order: Option<Order>,
    pub process: Option<ProcessIdentity>,
    pub port: Option<u16>,
    /// Where it listens.
    #[serde(default)]
    pub host: Host,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "is")]
pub(super) enum RecordPhase {
    /// About to be started; whether a process exists is not known yet.
    Starting,
    Running,
    Exited {
        code: Option<i32>,
        reason: String,
    },
    /// Told to go; its processes may still run.
    Removing,
    /// The tombstone.
    Removed {
        code: Option<i32>,
    },
}

/// A process number is used again some day; with start time and boot it is not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ProcessIdentity {
    pub pid: i32,
    /// In clock ticks since boot.
    pub start_time: u64,
    pub boot_id: String,
}

impl Record {
    pub(super) fn has_tombstone(&self) -> bool {
        matches!(
            self.phase,
            RecordPhase::Removing | RecordPhase::Removed { .. }
        )
    }

    /// The generation that stands in the environment of the process.
    pub(super) fn started_generation(&self) -> u64 {
        self.order.as_ref().map_or(0, |order| order.generation)
    }

    pub(super) fn address(&self) -> Option<String> {
        self.port.map(|port| self.host.address(port))
    }
}

/// `DATA/instances`, held by one process at a time.
#[derive(Debug)]
pub(super) struct StateFolder {
    root: PathBuf,
    /// Held for as long as this lives; the kernel lets go when the process ends, however it does.
    _lock: File,
}

impl StateFolder {
    pub(super) fn open(data: &Path) -> Result<Self, BackendError> {
        let root = data.join("instances");
        fs::create_dir_all(&root).map_err(|error| unusable(&root, error))?;
        let path = root.join("lock");
        let lock = File::create(&path).map_err(|error| unusable(&path, error))?;
        lock_soon(&lock).map_err(|_| {
            BackendError::Unavailable(format!(
                "the instances in {} are in the hands of another running Penstock; stop that one, or use another data folder",
                root.display()
            ))
        })?;
        Ok(Self { root, _lock: lock })
    }

    /// All records, and the names of those that cannot be read.
    pub(super) fn load(&self) -> io::Result<(BTreeMap<InstanceId, Record>, Vec<PathBuf>)> {
        let mut records = BTreeMap::new();
        let mut unreadable = Vec::new();
        for entry in fs::read_dir(&self.root)? {
            let path = entry?.path();
            if !path.is_dir() {
                continue;
            }
            match read_record(&path) {
                Ok(Some(record)) => {
                    records.insert(record.id.clone(), record);
                }
                // A crash before the first record was renamed: nothing was started.
                Ok(None) => {}
                Err(_) => unreadable.push(path),
            }
        }
        Ok((records, unreadable))
    }

    pub(super) fn write(&self, record: &Record) -> io::Result<()> {
        let folder = self.root.join(record.id.as_str());
        let created = !folder.exists();
        fs::create_dir_all(&folder)?;
        let json = serde_json::to_vec_pretty(record)?;
        write_durably(&folder, "record.json", &json)?;
        if created {
            File::open(&self.root)?.sync_all()?;
        }
        Ok(())
    }

    pub(super) fn forget(&self, id: &InstanceId) -> io::Result<()> {
        fs::remove_dir_all(self.root.join(id.as_str()))
    }

    /// Forgets the oldest tombstones past the limit and returns whose they were.
    pub(super) fn prune(&self, records: &BTreeMap<InstanceId, Record>) -> Vec<InstanceId> {
        let removed = |record: &&Record| matches!(record.phase, RecordPhase::Removed { .. });
        let mut tombstones: Vec<_> = records
            .values()
            .filter(removed)
            .map(|record| (self.modified(&record.id), record.id.clone()))
            .collect();
        let excess = tombstones.len().saturating_sub(TOMBSTONES_MAX);
        tombstones.sort();
        let oldest = tombstones.into_iter().take(excess).map(|(_, id)| id);
        oldest.filter(|id| self.forget(id).is_ok()).collect()
    }

    fn modified(&self, id: &InstanceId) -> Option<std::time::SystemTime> {
        let path = self.root.join(id.as_str()).join("record.json");
        fs::metadata(path).and_then(|meta| meta.modified()).ok()
    }
}

/// Takes the lock of an open file. A child of somebody else that is between fork and exec has a copy
/// of every open file for a moment, so a lock that is held now may be free at once.
pub(super) fn lock_soon(file: &File) -> io::Result<()> {
    const TRIES: u32 = 50;
    for _ in 1..TRIES {
        if flock(file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(flock(file, FlockOperation::NonBlockingLockExclusive)?)
}

fn read_record(folder: &Path) -> io::Result<Option<Record>> {
    match fs::read(folder.join("record.json")) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Old content or new, never a part: written beside, synced, renamed, and the folder synced.
fn write_durably(folder: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let beside = folder.join(format!("{name}.new"));
    let mut file = File::create(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&beside, folder.join(name))?;
    File::open(folder)?.sync_all()
}

fn unusable(path: &Path, source: io::Error) -> BackendError {
    let what = format!("{} cannot be used", path.display());
    BackendError::Unusable { what, source }
}

/// This installation's id, made once: it tells our processes from those of another Penstock.
///
/// # Errors
///
/// Where the folder can be neither read nor written.
#[expect(clippy::disallowed_methods, reason = "made once for a data folder")]
pub fn installation_id(data: &Path) -> io::Result<String> {
    made_once(data, "installation", || Uuid::new_v4().to_string())
}

/// This node's id, made once. What the log assigns to a node is carried out by whoever has its data
/// folder.
///
/// # Errors
///
/// Where the folder can be neither read nor written.
#[expect(clippy::disallowed_methods, reason = "made once for a data folder")]
pub fn node_id(data: &Path) -> io::Result<String> {
    made_once(data, "node", || {
        let unique = Uuid::new_v4().simple().to_string();
        format!("node-{}", &unique[..12])
    })
}

fn made_once(data: &Path, name: &str, make: impl FnOnce() -> String) -> io::Result<String> {
    let path = data.join(name);
    match fs::read_to_string(&path) {
        Ok(text) if !text.trim().is_empty() => return Ok(text.trim().to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let id = make();
    fs::create_dir_all(data)?;
    write_durably(data, name, format!("{id}\n").as_bytes())?;
    Ok(id)
}

/// Ids come from the log, but they become names of folders: nothing may climb out of ours.
pub(super) fn is_usable_id(id: &InstanceId) -> bool {
    let text = id.as_str();
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    !text.is_empty()
        && text.len() <= ID_LENGTH_MAX
        && !text.starts_with('-')
        && text.bytes().all(allowed)
}
