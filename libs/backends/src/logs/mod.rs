//! Output of instances in files: `DATA/logs/ENDPOINT/DEPLOYMENT/INSTANCE.log`.
//!
//! An instance writes to its file directly, opened for append; a pipe would not outlive Penstock. One
//! file per instance keeps the lines of several instances apart. When a file reaches its limit, its
//! content is copied to `INSTANCE.log.NNNNNN` and the file is truncated in place, so that the writer
//! continues at the new end. **Output written between the last read of the copy and the truncation is
//! lost** (microseconds' worth, unless a writer outruns the copying); renaming would lose nothing, but
//! the writer would keep writing to the renamed file. The files of a deployment share a size limit;
//! the oldest are dropped first, and a file in use is never removed.
//!
//! Output has no timestamps, so a file `….marks` next to it records how large it was at which time.
//! Both `since` and the time at which a line was first seen are derived from it, to within
//! [`MARK_EVERY`] and consistently, so that no line shows a time before the requested `since`.
//!
//! [`rotate`] writes, [`read`] returns lines from a position on, [`tail`] finds the position of the last
//! lines. No call here takes longer than one bounded chunk: waiting and looping are up to the caller.

mod files;
mod marks;
mod position;
mod read;
mod rotate;
mod tail;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use contract::ids::InstanceId;
use contract::time::Timestamp;

pub use marks::MARK_EVERY;
pub use read::{OutputReader, logs};
pub(crate) use rotate::sweep;
pub use tail::{TailLimits, TailSearch};

/// Longest line that a reader returns in one piece; the rest follows as a separate line.
const LINE_BYTES_MAX: usize = 64 * 1024;

/// How much output is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLimits {
    /// A file in use is rotated once it is larger than this.
    pub file_bytes_max: u64,
    /// Limit for all files of one deployment. With many instances, each gets a smaller share.
    pub deployment_bytes_max: u64,
}

impl Default for LogLimits {
    fn default() -> Self {
        Self {
            file_bytes_max: 10 << 20,
            deployment_bytes_max: 50 << 20,
        }
    }
}

fn folder(data: &Path, deployment: &str) -> PathBuf {
    data.join("logs").join(deployment)
}

/// Returns the file that an instance writes to.
pub(crate) fn output_path(data: &Path, deployment: &str, id: &InstanceId) -> PathBuf {
    folder(data, deployment).join(format!("{id}.log"))
}

/// A line of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// The instance that wrote it.
    pub instance: InstanceId,
    /// When the line was first seen: it was written by then, and not long before.
    pub seen: Timestamp,
    /// The text without its newline; invalid UTF-8 is replaced.
    pub text: String,
}
