//! File descriptors of this process: how many there may be, who gets how many, and who is told when
//! they run out.
//!
//! Invariant: clients come last. They are admitted up to what is left once everything has its share
//! that keeps instances alive, so that a crowd of them takes no descriptor from a probe, a removal,
//! the log or the people who look after it; and whoever is admitted finds one for the instance.

use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What a process has open at rest: the log and the history with their readers, locks, runtimes,
/// signals, listeners. Counted, and rounded up for readers that come and go.
const AT_REST: usize = 40;
/// What one serving thread of the gateway has for itself, and for clients that it refuses.
const PER_THREAD: usize = 4 + REFUSING_MAX;
/// Connections to Kafka and PostgreSQL, where the log goes through them.
const SHARED_BUS: usize = 64;
/// What one piece of work that opens files may have open at once.
const PER_HAND: usize = 6;
/// Below this a gateway would refuse nearly everybody.
const CLIENTS_MIN: usize = 4;
/// One serving thread for so many descriptors: below, more threads would only cost.
const PER_THREAD_MIN: u64 = 64;

/// Clients that a serving thread of the gateway refuses at a time.
pub const REFUSING_MAX: usize = 4;

/// How long after a lack fewer clients are admitted than could be by the count.
const TIGHT_FOR: Duration = Duration::from_secs(5);
/// Between two messages.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// The limit of descriptors of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// What it is now.
    pub now: u64,
    /// What it was started with.
    pub original: u64,
}

/// Raises the limit as far as this process may.
pub fn raise() -> Limit {
    let found = getrlimit(Resource::Nofile);
    let original = found.current.unwrap_or(u64::MAX);
    let hard = found.maximum.unwrap_or(u64::MAX);
    let raised = Rlimit {
        current: found.maximum,
        maximum: found.maximum,
    };
    let now = match original < hard && setrlimit(Resource::Nofile, raised).is_ok() {
        true => hard,
        false => original,
    };
    Limit { now, original }
}

/// What a process is going to do.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    /// Serving threads of the gateway that would be good to have.
    pub threads: usize,
    /// The log goes through servers.
    pub shared_bus: bool,
}

/// Who gets how many of a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Serving threads of the gateway.
    pub threads: usize,
    /// Connections of the control API, or of the admin listener.
    pub control: usize,
    /// Of these, streams that follow something.
    pub streams: usize,
    /// Probes at a time.
    pub probes: usize,
    /// Pieces of work at a time that open files.
    pub hands: usize,
    /// For clients, for connections to instances, and for one descriptor per instance.
    pub rest: usize,
}

/// The process cannot begin: with so few descriptors it would fail in its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{limit} file descriptors are too few: this process needs {least} at least; raise the hard limit (`ulimit -Hn {ADVISED}` before it is started, LimitNOFILE={ADVISED} in a systemd unit, --ulimit nofile={ADVISED} for a container)"
)]
pub struct TooFew {
    /// The limit, which could not be raised any further.
    pub limit: u64,
    /// What this process needs with what it is going to do.
    pub least: usize,
}

/// Enough for all that the defaults allow, several times over.
const ADVISED: u64 = 65_536;

impl Shares {
    /// Deals out a limit: first what a process has at rest, then a part for each use, the rest to
    /// clients and instances. With a low limit there are fewer serving threads than are wanted.
    ///
    /// # Errors
    ///
    /// [`TooFew`] where that leaves nothing for clients; its sentence says how people raise the
    /// limit.
    pub fn of(limit: u64, needs: Needs) -> Result<Self, TooFew> {
        // A limit may be none at all; more than this nobody takes.
        let limit = limit.min(1 << 24);
        let part = |of: u64, least: usize, most: usize| ((limit / of) as usize).clamp(least, most);
        let threads = needs.threads.clamp(1, part(PER_THREAD_MIN, 1, usize::MAX));
        let control = part(16, 8, 512);
        let shares = Self {
            threads,
            control,
            streams: control / 4,
            probes: part(16, 8, 256),
            hands: part(64, 2, 32),
            rest: 0,
        };
        let fixed = AT_REST
            + threads * PER_THREAD
            + if needs.shared_bus { SHARED_BUS } else { 0 }
            + shares.control
            + shares.streams
            + shares.probes
            + shares.hands * PER_HAND;
        let least = fixed + 2 * CLIENTS_MIN;
        if limit < least as u64 {
            return Err(TooFew { limit, least });
        }
        let rest = limit as usize - fixed;
        Ok(Self { rest, ..shares })
    }

    /// Instances that may be held, so that a few clients are left.
    pub fn instances_max(&self) -> usize {
        self.rest - 2 * CLIENTS_MIN
    }
}

/// The part that is shared out while the process runs. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Descriptors(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limit: u64,
    rest: usize,
    /// One per instance.
    held: Arc<AtomicUsize>,
    began: Instant,
    /// When something was lacking last, in milliseconds since then; 0 for never.
    lacked_ms: AtomicU64,
    told: Mutex<Option<Instant>>,
}

/// For a process that looks after its limit in no way, as in tests.
impl Default for Descriptors {
    fn default() -> Self {
        Self::new(u64::MAX, usize::MAX)
    }
}

impl Descriptors {
    /// What is shared out of `limit`: `rest`, as [`Shares::of`] has found it.
    pub fn new(limit: u64, rest: usize) -> Self {
        Self(Arc::new(Inner {
            limit,
            rest,
            held: Arc::default(),
            began: Instant::now(),
            lacked_ms: AtomicU64::default(),
            told: Mutex::default(),
        }))
    }

    /// Where those are counted that are held for instances.
    pub fn held(&self) -> Arc<AtomicUsize> {
        self.0.held.clone()
    }

    /// Connections that the gateway may have open, to clients and to instances.
    pub fn connections_max(&self) -> usize {
        let held = self.0.held.load(Ordering::Relaxed);
        let rest = self.0.rest.saturating_sub(held);
        // Somebody uses more than was thought: clients give way.
        let rest = if self.is_tight() { rest / 2 } else { rest };
        rest.max(2 * CLIENTS_MIN)
    }

    /// Clients of the gateway at once. Each may need a connection to an instance.
    pub fn clients_max(&self) -> usize {
        self.connections_max() / 2
    }

    /// Something could not be done for want of descriptors, a short while ago.
    pub fn is_tight(&self) -> bool {
        match self.0.lacked_ms.load(Ordering::Relaxed) {
            0 => false,
            at => self.now_ms().saturating_sub(at) < TIGHT_FOR.as_millis() as u64,
        }
    }

    fn now_ms(&self) -> u64 {
        self.0.began.elapsed().as_millis() as u64 + 1
    }

    /// `what` could not be done and is tried again. People are told once a minute, whatever it was.
    pub fn lack(&self, what: &str, error: &io::Error) {
        self.0.lacked_ms.store(self.now_ms(), Ordering::Relaxed);
        if self.is_to_be_told(Instant::now()) {
            let advice = self.advice(error);
            tracing::warn!(%error, "{what} has to wait and is tried again, and clients are refused meanwhile: {advice}");
        }
    }

    /// Clients are refused because all that there is for them is taken.
    pub fn full(&self) {
        if self.is_to_be_told(Instant::now()) {
            let clients = self.clients_max();
            let advice = self.advice(&Errno::MFILE.into());
            tracing::warn!(
                clients,
                "clients are refused, the rest is for instances and control: {advice}"
            );
        }
    }

    fn is_to_be_told(&self, now: Instant) -> bool {
        let mut told = self.0.told.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = told.is_none_or(|at| now.duration_since(at) >= TELL_EVERY);
        if is_due {
            *told = Some(now);
        }
        is_due
    }

    fn advice(&self, error: &io::Error) -> String {
        let limit = self.0.limit;
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::MFILE) => format!(
                "this process may have {limit} file descriptors; raise the hard limit (`ulimit -Hn {ADVISED}` before it is started, LimitNOFILE={ADVISED} in a systemd unit, --ulimit nofile={ADVISED} for a container)"
            ),
            Some(Errno::NFILE) => {
                "this machine is out of file descriptors; raise it with `sysctl fs.file-max`".into()
            }
            _ => "this machine, or what this process may have of it, is out of memory or of processes".into(),
        }
    }
}

/// The error is a lack of descriptors or of memory, and says nothing about the other side.
pub fn is_lack(error: &io::Error) -> bool {
    let of_ours = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS];
    let code = error.raw_os_error().map(Errno::from_raw_os_error);
    code.is_some_and(|code| of_ours.contains(&code))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALONE: Needs = Needs {
        threads: 2,
        shared_bus: false,
    };

    #[test]
    fn every_limit_is_given_away_at_most_once() {
        for limit in [96, 128, 200, 256, 500, 1024, 4096, 65_536, 1 << 20] {
            let shares = Shares::of(limit, ALONE).unwrap();
            let spent = AT_REST
                + shares.threads * PER_THREAD
                + shares.control
                + shares.streams
                + shares.probes
                + shares.hands * PER_HAND
                + shares.rest;
            assert_eq!(spent as u64, limit, "{shares:?}");
        }
    }

    #[test]
    fn instances_come_before_clients_and_a_client_has_one_for_its_instance() {
        let cases = [
            // limit, instances, clients
            (128, 0, 21),
            (128, 30, 6),
            (128, 60, 4),
            (256, 30, 55),
            (1024, 30, 349),
            (65_536, 30, 32_181),
        ];
        for (limit, instances, clients) in cases {
            let shares = Shares::of(limit, ALONE).unwrap();
            let descriptors = Descriptors::new(limit, shares.rest);
            descriptors.held().store(instances, Ordering::Relaxed);
            assert_eq!(
                descriptors.clients_max(),
                clients,
                "{limit} with {instances} instances"
            );
        }
    }

    #[test]
    fn a_limit_below_what_is_needed_is_refused_with_what_to_do() {
        let refused = Shares::of(64, ALONE).unwrap_err().to_string();
        for word in ["64 file descriptors", "ulimit", "LimitNOFILE", "--ulimit"] {
            assert!(refused.contains(word), "{refused}");
        }
        assert!(Shares::of(u64::MAX, ALONE).is_ok());
    }

    #[test]
    fn few_descriptors_are_not_spent_on_many_threads() {
        let many = Needs {
            threads: 64,
            shared_bus: false,
        };
        assert_eq!(Shares::of(128, many).unwrap().threads, 2);
        assert_eq!(Shares::of(65_536, many).unwrap().threads, 64);
    }

    #[test]
    fn after_a_lack_clients_give_way() {
        let descriptors = Descriptors::new(1024, 400);
        assert_eq!(descriptors.clients_max(), 200);
        descriptors.lack("a probe", &Errno::MFILE.into());
        assert_eq!(descriptors.clients_max(), 100);
    }

    #[test]
    fn a_lack_is_told_once_a_minute() {
        let descriptors = Descriptors::default();
        let now = Instant::now();
        assert!(descriptors.is_to_be_told(now));
        assert!(!descriptors.is_to_be_told(now + Duration::from_secs(59)));
        assert!(descriptors.is_to_be_told(now + Duration::from_secs(60)));
    }
}
