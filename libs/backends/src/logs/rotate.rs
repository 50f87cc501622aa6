//! Rotates output, records its growth, and drops the oldest files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use contract::ids::InstanceId;
use contract::time::Timestamp;

use super::files::{part_path, rotated_parts};
use super::marks::{mark, marks_path};
use super::{LogLimits, folder, output_path};

/// The size to which a file may always grow, however many instances share the limit.
const SHARE_BYTES_MIN: u64 = 64 << 10;

/// Rotates output, records its growth and drops the oldest files, for all deployments with instances in
/// use.
pub(crate) fn sweep(
    data: &Path,
    in_use: &BTreeMap<String, BTreeSet<InstanceId>>,
    limits: LogLimits,
    now: Timestamp,
) -> io::Result<()> {
    for (deployment, ids) in in_use {
        let live: BTreeSet<PathBuf> = ids
            .iter()
            .map(|id| output_path(data, deployment, id))
            .collect();
        let share = limits.deployment_bytes_max / (live.len() as u64 + 1);
        let file_max = limits.file_bytes_max.min(share.max(SHARE_BYTES_MIN));
        for log in &live {
            let Ok(meta) = fs::metadata(log) else {
                continue;
            };
            if meta.len() > file_max {
                rotate(log)?;
            } else {
                mark(log, meta.len(), now)?;
            }
        }
        drop_oldest(
            &folder(data, deployment),
            &live,
            limits.deployment_bytes_max,
        )?;
    }
    Ok(())
}

/// Each pass copies what was written during the previous one. A writer faster than the copying would
/// keep it going forever; such a writer loses what it wrote during the last pass.
const COPY_PASSES_MAX: u32 = 5;

/// Output read while a part replaces its log would be read twice, or not at all.
static ROTATION: RwLock<()> = RwLock::new(());

/// While the guard is held, no part replaces its log.
pub(super) fn block_rotation() -> RwLockReadGuard<'static, ()> {
    ROTATION.read().unwrap_or_else(PoisonError::into_inner)
}

fn rotate(log: &Path) -> io::Result<()> {
    let number = rotated_parts(log)?
        .last()
        .map_or(1, |(number, _)| number + 1);
    let target = part_path(log, number);
    let source = OpenOptions::new().read(true).write(true).open(log)?;
    // Readers ignore this name, so that they never see a partial copy.
    let unfinished = log.with_extension("log.unfinished");
    let mut copy = File::create(&unfinished)?;
    let mut copied = 0;
    for _ in 0..COPY_PASSES_MAX {
        let length = source.metadata()?.len();
        if length <= copied {
            break;
        }
        copied += io::copy(&mut (&source).take(length - copied), &mut copy)?;
    }
    let _guard = ROTATION.write().unwrap_or_else(PoisonError::into_inner);
    fs::rename(&unfinished, &target)?;
    source.set_len(0)?;
    match fs::rename(marks_path(log), marks_path(&target)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn drop_oldest(folder: &Path, live: &BTreeSet<PathBuf>, bytes_max: u64) -> io::Result<()> {
    let mut total = 0;
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        total += meta.len();
        let path = entry.path();
        let in_use = live.contains(&path) || live.iter().any(|log| marks_path(log) == path);
        if meta.is_file() && !in_use {
            files.push((meta.modified()?, path, meta.len()));
        }
    }
    files.sort();
    let mut newest = BTreeSet::new();
    for log in live {
        newest.extend(rotated_parts(log)?.pop().map(|(_, path)| path));
    }
    for (_, path, length) in files {
        if total <= bytes_max {
            break;
        }
        if newest.contains(&path) {
            // Keep it, empty, so that its number is not reused: readers rely on the numbering.
            OpenOptions::new().write(true).open(path)?.set_len(0)?;
        } else {
            fs::remove_file(path)?;
        }
        total -= length;
    }
    Ok(())
}
