//! State of the process backend on disk: the installation's id, and a record per instance.
//!
//! Invariant: a record is written and synced before the action that it announces. So whatever a crash
//! leaves running has a record, and a removed instance is never started again.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use contract::ids::InstanceId;
use contract::time::Span;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::host::Host;
use crate::{BackendError, StartSpec};

/// The folder of the records, in the data folder.
pub(super) const FOLDER: &str = "instances";

/// Tombstones that are kept, each a folder. Ids are never reused, so a tombstone only guards against
/// requests that were delayed; output is kept elsewhere.
pub(super) const TOMBSTONES_MAX: usize = 100;

/// Longest instance id; it becomes the name of a folder.
const ID_LENGTH_MAX: usize = 128;

/// The durable state of one instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct InstanceRecord {
    pub id: InstanceId,
    /// The newest generation carried out, or about to be.
    pub generation: u64,
    pub phase: RecordPhase,
    /// `None` only for the removal of an instance that was never started here.
    #[serde(rename = "order")]
    pub start: Option<StartSpec>,
    pub process: Option<ProcessIdentity>,
    pub port: Option<u16>,
    /// Its further ports, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ports: BTreeMap<String, u16>,
    /// The host under which it was started.
    #[serde(default)]
    pub host: Host,
    /// The id of the node that it was started on; empty in records of earlier releases.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node: String,
    /// [`RECORD_FORMAT`], 0 in records of earlier releases.
    #[serde(default)]
    pub format: u32,
}

/// From 1 on, a start has a liveness probe only if one was asked for.
pub(super) const RECORD_FORMAT: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "is")]
pub(super) enum RecordPhase {
    /// About to be started; a process may or may not exist.
    Starting,
    Running,
    Exited {
        code: Option<i32>,
        reason: String,
    },
    /// Removal requested; its processes may still run.
    Removing,
    /// A tombstone.
    Removed {
        code: Option<i32>,
    },
}

/// Identifies a process: pids are reused, but not together with start time and boot id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ProcessIdentity {
    pub pid: i32,
    /// In clock ticks since boot.
    pub start_time: u64,
    pub boot_id: String,
    /// Its process group, if it is not the first process of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<i32>,
}

impl ProcessIdentity {
    pub(super) fn group_id(&self) -> i32 {
        self.group.unwrap_or(self.pid)
    }
}

impl InstanceRecord {
    pub(super) fn has_tombstone(&self) -> bool {
        matches!(
            self.phase,
            RecordPhase::Removing | RecordPhase::Removed { .. }
        )
    }

    /// The generation in the environment of the process.
    pub(super) fn started_generation(&self) -> u64 {
        self.start.as_ref().map_or(0, |start| start.generation)
    }

    /// Where it is reached, once it has been started.
    pub(super) fn address(&self) -> Option<String> {
        self.process.as_ref()?;
        self.port.map(|port| self.host.address(port))
    }

    /// All ports that are reserved for it.
    pub(super) fn all_ports(&self) -> impl Iterator<Item = u16> {
        self.port.into_iter().chain(self.ports.values().copied())
    }

    /// Time from the termination signal to the kill signal; `None` if it was never started here.
    pub(super) fn grace(&self) -> Option<Span> {
        let start = self.start.as_ref()?;
        Some(start.spec.termination_grace())
    }
}

/// `DATA/instances`, locked by one process at a time.
#[derive(Debug)]
pub(super) struct RecordFolder {
    root: PathBuf,
    /// Held until dropped; the kernel releases the lock when the process ends, however it ends.
    _lock: File,
}

impl RecordFolder {
    pub(super) fn open(data: &Path) -> Result<Self, BackendError> {
        let root = data.join(FOLDER);
        fs::create_dir_all(&root).map_err(|error| unusable(&root, error))?;
        let path = root.join("lock");
        let lock = File::create(&path).map_err(|error| unusable(&path, error))?;
        lock_with_retries(&lock).map_err(|_| {
            BackendError::Unavailable(format!(
                "the instances in {} are managed by another running Penstock; stop that one, or use another data folder",
                root.display()
            ))
        })?;
        Ok(Self { root, _lock: lock })
    }

    /// Returns all records, and the folders of those that cannot be read.
    pub(super) fn load(&self) -> io::Result<(BTreeMap<InstanceId, InstanceRecord>, Vec<PathBuf>)> {
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

    pub(super) fn write(&self, record: &InstanceRecord) -> io::Result<()> {
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

    pub(super) fn delete(&self, id: &InstanceId) -> io::Result<()> {
        fs::remove_dir_all(self.root.join(id.as_str()))
    }

    /// Deletes the oldest tombstones beyond the limit and returns their ids.
    pub(super) fn prune(&self, records: &BTreeMap<InstanceId, InstanceRecord>) -> Vec<InstanceId> {
        let removed =
            |record: &&InstanceRecord| matches!(record.phase, RecordPhase::Removed { .. });
        let mut tombstones: Vec<_> = records
            .values()
            .filter(removed)
            .map(|record| (self.modified(&record.id), record.id.clone()))
            .collect();
        let excess = tombstones.len().saturating_sub(TOMBSTONES_MAX);
        tombstones.sort();
        let oldest = tombstones.into_iter().take(excess).map(|(_, id)| id);
        oldest.filter(|id| self.delete(id).is_ok()).collect()
    }

    fn modified(&self, id: &InstanceId) -> Option<std::time::SystemTime> {
        let path = self.root.join(id.as_str()).join("record.json");
        fs::metadata(path).and_then(|meta| meta.modified()).ok()
    }
}

/// Locks an open file. A child between fork and exec briefly holds a copy of every open file, so a lock
/// that is held now may be free a moment later.
pub(super) fn lock_with_retries(file: &File) -> io::Result<()> {
    const ATTEMPTS: u32 = 50;
    for _ in 1..ATTEMPTS {
        if flock(file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(flock(file, FlockOperation::NonBlockingLockExclusive)?)
}

fn upcast(mut record: InstanceRecord) -> InstanceRecord {
    if record.format == 0
        && let Some(start) = &mut record.start
    {
        let probe = &mut start.spec.liveness_probe;
        *probe = probe
            .take()
            .filter(|probe| !probe.is_former_liveness_default());
    }
    record.format = RECORD_FORMAT;
    record
}

/// Returns the record in the folder of an instance; `None` if there is none yet.
pub(super) fn read_record(folder: &Path) -> io::Result<Option<InstanceRecord>> {
    match fs::read(folder.join("record.json")) {
        Ok(bytes) => Ok(Some(upcast(serde_json::from_slice(&bytes)?))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Replaces the file atomically: writes a temporary file, syncs and renames it, then syncs the folder.
fn write_durably(folder: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = folder.join(format!("{name}.new"));
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, folder.join(name))?;
    File::open(folder)?.sync_all()
}

fn unusable(path: &Path, source: io::Error) -> BackendError {
    let what = format!("{} cannot be used", path.display());
    BackendError::Unusable { what, source }
}

/// Returns the id of this installation, created once. It distinguishes its processes from those of
/// other installations on the machine.
///
/// # Errors
///
/// If the folder cannot be read or written.
#[expect(clippy::disallowed_methods, reason = "created once for a data folder")]
pub fn installation_id(data: &Path) -> io::Result<String> {
    read_or_create(data, "installation", || Uuid::new_v4().to_string())
}

pub(super) fn read_or_create(
    data: &Path,
    name: &str,
    make: impl FnOnce() -> String,
) -> io::Result<String> {
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

/// Whether the id is safe as the name of a folder: ids come from the log and must not escape ours.
pub(super) fn is_usable_id(id: &InstanceId) -> bool {
    let text = id.as_str();
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    !text.is_empty()
        && text.len() <= ID_LENGTH_MAX
        && !text.starts_with('-')
        && text.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use contract::resources::{DeploymentSpec, ProbeSpec};

    use super::*;

    /// The liveness probe of a record with this one and this format, once it has been read.
    fn read_probe(format: Option<u32>, probe: Option<&ProbeSpec>) -> Option<ProbeSpec> {
        let mut spec: DeploymentSpec =
            serde_json::from_str(r#"{"backend": "process", "instanceType": "small"}"#).unwrap();
        spec.liveness_probe = probe.cloned();
        let id = InstanceId::from("i-1".to_owned());
        let record = InstanceRecord {
            id: id.clone(),
            generation: 1,
            phase: RecordPhase::Running,
            start: Some(StartSpec {
                id,
                generation: 1,
                deployment: "iris/blue".into(),
                spec,
            }),
            process: None,
            port: None,
            ports: BTreeMap::new(),
            host: Host::default(),
            node: String::new(),
            format: format.unwrap_or_default(),
        };
        let mut written = serde_json::to_value(record).unwrap();
        if format.is_none() {
            written.as_object_mut().unwrap().remove("format");
        }
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("record.json"), written.to_string()).unwrap();
        let read = read_record(folder.path()).unwrap().unwrap();
        assert_eq!(read.format, RECORD_FORMAT);
        read.start.unwrap().spec.liveness_probe
    }

    #[test]
    fn a_record_of_an_earlier_release_keeps_the_probe_that_was_asked_for() {
        let former = ProbeSpec {
            period: Span::from_secs(10),
            ..ProbeSpec::default()
        };
        let asked = ProbeSpec {
            path: "/health".into(),
            ..former.clone()
        };
        assert_eq!(read_probe(None, Some(&asked)), Some(asked.clone()));
        assert_eq!(read_probe(None, None), None);
        assert_eq!(read_probe(None, Some(&former)), None, "nobody asked for it");
        let present = Some(RECORD_FORMAT);
        assert_eq!(read_probe(present, Some(&former)), Some(former));
    }
}
