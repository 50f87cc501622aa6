//! Output of instances, in files: `DATA/logs/ENDPOINT/DEPLOYMENT/INSTANCE.log`.
//!
//! An instance writes to its file itself (it must outlive us, so there is no pipe), opened for
//! append. A file per instance keeps lines of several instances apart without anything in between.
//! When a file has grown to its limit, its content is copied to `INSTANCE.log.NNNNNN` and the file is
//! truncated in place: the writer goes on at the new end. **What is written between the last read of
//! the copy and the truncation is lost** (microseconds, unless a writer outruns the copying); renaming instead would lose nothing, but the
//! writer would go on in the renamed file for ever. All files of a deployment together keep to a
//! limit, oldest first out; a file in use is never removed.
//!
//! Output carries no times of its own, so a file `….marks` beside notes how far it had grown when.
//! `since` is answered by it, and so is when a line was first seen: both to within [`MARK_EVERY`], and
//! alike, so that no line shows a time before the `since` that it was asked for.
//!
//! [`rotate`] writes, [`read`] gives lines from a place on, [`tail`] finds the place from which the last
//! lines stand. Nothing here waits or loops for longer than a piece of bounded size takes: callers do.

mod files;
mod marks;
mod read;
mod rotate;
mod tail;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use contract::ids::InstanceId;
use contract::time::Timestamp;

pub use marks::MARK_EVERY;
pub use read::{LogReader, logs};
pub(crate) use rotate::sweep;
pub use tail::{Most, Tail};

/// Longest line that a reader gives in one piece; the rest follows as a line of its own.
const LINE_BYTES_MAX: usize = 64 * 1024;

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLimits {
    /// A file in use is rotated once it is larger.
    pub file_bytes_max: u64,
    /// All files of one deployment together. With many instances, each gets a smaller share.
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

/// The file that an instance writes to.
pub(crate) fn output_path(data: &Path, deployment: &str, id: &InstanceId) -> PathBuf {
    folder(data, deployment).join(format!("{id}.log"))
}

/// A line of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// Who wrote it.
    pub instance: InstanceId,
    /// The line had been written by then, and not long before.
    pub seen: Timestamp,
    /// Without the newline; what is not UTF-8 is replaced.
    pub text: String,
}
