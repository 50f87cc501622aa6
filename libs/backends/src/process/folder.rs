//! The private folder of an instance, for caches and sockets: `DATA/run/NAME`. The name is short, since the
//! path of a UNIX socket has at most 107 bytes.
//!
//! Invariant: it exists, emptied before each start, from before the instance runs until all its processes
//! have ended.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use contract::ids::InstanceId;
use contract::resources::{DeploymentSpec, EnvValue, placeholders::FOLDER};
use sha2::{Digest, Sha256};

/// The folder of the folders, in the data folder.
const PARENT: &str = "run";

/// Whether instances of this spec get a folder.
pub(super) fn is_used(spec: &DeploymentSpec) -> bool {
    let in_env = |value: &EnvValue| matches!(value, EnvValue::Plain(text) if text.contains(FOLDER));
    let mut arguments = spec.command.iter();
    arguments.any(|text| text.contains(FOLDER)) || spec.env.values().any(in_env)
}

/// Creates the folder of an instance, without what was in it, and returns its absolute path.
pub(super) fn create(data: &Path, id: &InstanceId) -> io::Result<PathBuf> {
    let path = std::path::absolute(path(data, id))?;
    remove(data, id)?;
    let mut private = DirBuilder::new();
    private.recursive(true).mode(0o700).create(&path)?;
    Ok(path)
}

/// Removes the folder of an instance, if there is one.
pub(super) fn remove(data: &Path, id: &InstanceId) -> io::Result<()> {
    match fs::remove_dir_all(path(data, id)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes the folders of all instances but these.
pub(super) fn remove_others(data: &Path, kept: &BTreeSet<InstanceId>) {
    let kept: BTreeSet<OsString> = kept.iter().map(|id| name(id).into()).collect();
    let folders = fs::read_dir(data.join(PARENT)).into_iter().flatten();
    for folder in folders.flatten() {
        if !kept.contains(&folder.file_name())
            && let Err(error) = fs::remove_dir_all(folder.path())
        {
            let folder = folder.path();
            tracing::warn!(folder = %folder.display(), %error, "failed to remove the folder of an ended instance");
        }
    }
}

fn path(data: &Path, id: &InstanceId) -> PathBuf {
    data.join(PARENT).join(name(id))
}

fn name(id: &InstanceId) -> String {
    let [a, b, c, d, e, f, ..] = <[u8; 32]>::from(Sha256::digest(id.as_str()));
    format!("{:012x}", u64::from_be_bytes([0, 0, a, b, c, d, e, f]))
}
