//! What this process itself is short of: descriptors, memory, room for another process.
//!
//! Invariant: a lack of ours says nothing about an instance. What could not be done for one is done
//! later; it is counted neither as a success nor as a failure.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use procfs::{ProcError, ProcResult};
use rustix::io::Errno;

/// Between two tries of something that we lack the means for.
pub(super) const LACK_PAUSE: Duration = Duration::from_millis(200);

/// Told of what could not be done for want of something, and of the error.
pub type LackListener = dyn Fn(&str, &io::Error) + Send + Sync;

/// What of this process the instances may take.
#[derive(Clone)]
pub struct Means {
    /// The limit of descriptors that an instance gets, where ours is another.
    pub instance_descriptors: Option<u64>,
    /// Probes at a time; each is a connection.
    pub probes_max: usize,
    /// Pieces of work at a time that open files: starts, removals, looks at `/proc`.
    pub hands_max: usize,
    /// Descriptors that are held for instances as long as they live, counted here.
    pub held: Arc<AtomicUsize>,
    /// From so many on, starts wait: each further instance would take what the others, the log and
    /// people need.
    pub held_max: usize,
    /// Told of each want, so that room can be made.
    pub listener: Arc<LackListener>,
}

/// For a process that is short of nothing.
impl Default for Means {
    fn default() -> Self {
        Self {
            instance_descriptors: None,
            probes_max: 256,
            hands_max: 32,
            held: Arc::default(),
            held_max: usize::MAX,
            listener: Arc::new(
                |what, error| tracing::warn!(%error, "{what} has to wait; trying again"),
            ),
        }
    }
}

impl fmt::Debug for Means {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Means")
            .field("instance_descriptors", &self.instance_descriptors)
            .field("probes_max", &self.probes_max)
            .field("hands_max", &self.hands_max)
            .field("held_max", &self.held_max)
            .finish_non_exhaustive()
    }
}

impl Means {
    /// Whether there is a descriptor for one more instance.
    pub(super) fn room_for_one(&self) -> io::Result<()> {
        match self.held.load(Ordering::Relaxed) < self.held_max {
            true => Ok(()),
            false => Err(Errno::MFILE.into()),
        }
    }

    pub(super) fn lack(&self, what: &str, error: &io::Error) {
        (self.listener)(what, error);
    }
}

/// A descriptor that is held as long as an instance lives.
#[derive(Debug)]
pub(super) struct Held(Arc<AtomicUsize>);

impl Held {
    pub(super) fn one_of(means: &Means) -> Self {
        means.held.fetch_add(1, Ordering::Relaxed);
        Self(means.held.clone())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The error is about us, or this machine, and not about what was asked for.
pub(super) fn is_lack(error: &io::Error) -> bool {
    let of_ours = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS];
    let code = error.raw_os_error().map(Errno::from_raw_os_error);
    code.is_some_and(|code| of_ours.contains(&code))
}

/// The same of the start of a process, which may also find no room for one more.
pub(super) fn is_lack_of_start(error: &io::Error) -> bool {
    is_lack(error) || error.raw_os_error() == Some(Errno::AGAIN.raw_os_error())
}

/// Only a lack is an error; anything else means that there is nothing to see.
pub(super) fn seen<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if is_lack(&error) => Err(error),
        Err(_) => Ok(None),
    }
}

/// The same of what `/proc` shows.
pub(super) fn seen_in_proc<T>(result: ProcResult<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(ProcError::Io(error, _)) if is_lack(&error) => Err(error),
        Err(_) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_is_ours_and_a_refusal_is_not() {
        let is = |errno: Errno| is_lack(&errno.into());
        assert!(is(Errno::MFILE) && is(Errno::NFILE) && is(Errno::NOMEM));
        assert!(!is(Errno::CONNREFUSED) && !is(Errno::NOENT) && !is(Errno::AGAIN));
        assert!(is_lack_of_start(&Errno::AGAIN.into()));
        assert!(!is_lack(&io::Error::other("words")));
    }

    #[test]
    fn what_cannot_be_seen_for_a_lack_is_not_taken_for_nothing() {
        let gone = seen_in_proc::<()>(Err(ProcError::NotFound(None)));
        assert_eq!(gone.unwrap(), None);
        let lacking = ProcError::Io(Errno::MFILE.into(), None);
        assert!(seen_in_proc::<()>(Err(lacking)).is_err());
    }
}
