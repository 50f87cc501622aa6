//! Resource shortages of this process: descriptors, memory, process slots.
//!
//! Invariant: a shortage says nothing about an instance. What could not be done is retried later and
//! counts neither as a success nor as a failure.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use procfs::{ProcError, ProcResult};
use rustix::io::Errno;

/// Between two attempts during a shortage.
pub(super) const SHORTAGE_RETRY_PAUSE: Duration = Duration::from_millis(200);

/// Called with what could not be done because of a shortage, and the error.
pub type ShortageListener = dyn Fn(&str, &io::Error) + Send + Sync;

/// Why a process was not started.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    /// A shortage of this process: a retry may succeed.
    #[error("this process is out of resources: {0}")]
    Shortage(io::Error),
    #[error("{0}")]
    Refused(String),
}

impl StartError {
    /// Classifies an I/O error as a shortage or as a refusal with this sentence.
    pub(super) fn from_io(error: io::Error, sentence: impl FnOnce(&io::Error) -> String) -> Self {
        match is_shortage(&error) {
            true => Self::Shortage(error),
            false => Self::Refused(sentence(&error)),
        }
    }
}

impl From<String> for StartError {
    fn from(sentence: String) -> Self {
        Self::Refused(sentence)
    }
}

/// How much of this process's resources the instances may use.
#[derive(Clone)]
pub struct ResourceLimits {
    /// The descriptor limit of instances, if different from that of this process.
    pub instance_descriptors: Option<u64>,
    /// Maximum concurrent probes; each is a connection.
    pub probes_max: usize,
    /// Maximum concurrent operations that open files: starts, removals, scans of `/proc`.
    pub blocking_max: usize,
    /// Counts the descriptors held for running instances.
    pub held_descriptors: Arc<AtomicUsize>,
    /// Starts wait while this many descriptors are held, to leave some for the log and for clients.
    pub held_descriptors_max: usize,
    /// Called on each shortage, so that resources can be freed.
    pub listener: Arc<ShortageListener>,
}

/// Limits for a process with ample resources.
impl Default for ResourceLimits {
    fn default() -> Self {
        Self {
            instance_descriptors: None,
            probes_max: 256,
            blocking_max: 32,
            held_descriptors: Arc::default(),
            held_descriptors_max: usize::MAX,
            listener: Arc::new(
                |what, error| tracing::warn!(%error, delayed = what, "out of descriptors, retrying"),
            ),
        }
    }
}

impl fmt::Debug for ResourceLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResourceLimits")
            .field("instance_descriptors", &self.instance_descriptors)
            .field("probes_max", &self.probes_max)
            .field("blocking_max", &self.blocking_max)
            .field("held_descriptors_max", &self.held_descriptors_max)
            .finish_non_exhaustive()
    }
}

impl ResourceLimits {
    /// Checks that there is a descriptor for one more instance.
    pub(super) fn check_capacity(&self) -> io::Result<()> {
        match self.held_descriptors.load(Ordering::Relaxed) < self.held_descriptors_max {
            true => Ok(()),
            false => Err(Errno::MFILE.into()),
        }
    }

    pub(super) fn report_shortage(&self, what: &str, error: &io::Error) {
        (self.listener)(what, error);
    }
}

/// Counts one descriptor as held until dropped.
#[derive(Debug)]
pub(super) struct DescriptorGuard(Arc<AtomicUsize>);

impl DescriptorGuard {
    pub(super) fn acquire(resource_limits: &ResourceLimits) -> Self {
        resource_limits
            .held_descriptors
            .fetch_add(1, Ordering::Relaxed);
        Self(resource_limits.held_descriptors.clone())
    }
}

impl Drop for DescriptorGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether the error is a shortage of this process or machine, rather than about the operation itself.
pub(super) fn is_shortage(error: &io::Error) -> bool {
    let codes = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS];
    let code = error.raw_os_error().map(Errno::from_raw_os_error);
    code.is_some_and(|code| codes.contains(&code))
}

/// Like [`is_shortage`] for starting a process, which may also hit the process limit.
pub(super) fn is_start_shortage(error: &io::Error) -> bool {
    is_shortage(error) || error.raw_os_error() == Some(Errno::AGAIN.raw_os_error())
}

/// Keeps only shortages as errors; any other error means that there is nothing to see.
pub(super) fn ok_unless_shortage<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if is_shortage(&error) => Err(error),
        Err(_) => Ok(None),
    }
}

/// Like [`ok_unless_shortage`], for `/proc`.
pub(super) fn proc_unless_shortage<T>(result: ProcResult<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(ProcError::Io(error, _)) if is_shortage(&error) => Err(error),
        Err(_) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exhausted_resources_are_a_shortage() {
        let is_short = |errno: Errno| is_shortage(&errno.into());
        assert!(is_short(Errno::MFILE) && is_short(Errno::NFILE) && is_short(Errno::NOMEM));
        assert!(
            !is_short(Errno::CONNREFUSED) && !is_short(Errno::NOENT) && !is_short(Errno::AGAIN)
        );
        assert!(is_start_shortage(&Errno::AGAIN.into()));
        assert!(!is_shortage(&io::Error::other("words")));
    }

    #[test]
    fn a_shortage_is_an_error_and_a_missing_process_is_none() {
        let missing = proc_unless_shortage::<()>(Err(ProcError::NotFound(None)));
        assert_eq!(missing.unwrap(), None);
        let exhausted = ProcError::Io(Errno::MFILE.into(), None);
        assert!(proc_unless_shortage::<()>(Err(exhausted)).is_err());
    }
}
