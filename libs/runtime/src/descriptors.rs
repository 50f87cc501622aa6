//! File descriptors of this process: the limit, how it is divided, and what happens on a shortage.
//!
//! Invariant: clients come last. They are admitted up to what is left once everything that keeps
//! instances alive has its share, so a crowd of them takes no descriptor from a probe, a removal,
//! the log or the operators; and an admitted client finds a descriptor for its instance.

use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors open at rest: the log and the history with their readers, locks, runtimes, signals,
/// listeners. Counted, and rounded up for readers that come and go.
const BASELINE: usize = 40;
/// Descriptors of one serving thread of the gateway, including those for clients that it refuses.
const PER_THREAD: usize = 4 + REFUSING_MAX;
/// Connections to Kafka and PostgreSQL, if the log uses them.
const SERVER_CONNECTIONS: usize = 64;
/// Descriptors that one task that opens files may use at once.
const PER_FILE_TASK: usize = 6;
/// Below this, a gateway would refuse nearly all clients.
const CLIENTS_MIN: usize = 4;
/// One serving thread per this many descriptors; with fewer, more threads would only cost.
const PER_THREAD_MIN: u64 = 64;

/// Clients that a serving thread of the gateway refuses at a time.
pub const REFUSING_MAX: usize = 4;

/// How long fewer clients are admitted after a shortage than the count would allow.
const SHORTAGE_COOLDOWN: Duration = Duration::from_secs(5);
/// The pause between two log messages.
const WARN_INTERVAL: Duration = Duration::from_secs(60);

/// The descriptor limit of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// The current limit.
    pub now: u64,
    /// The limit at process start.
    pub original: u64,
}

/// Raises the limit as far as permitted.
pub fn raise_limit() -> Limit {
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

/// What a process is going to run.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    /// The desired number of serving threads of the gateway.
    pub threads: usize,
    /// Whether the log is on servers.
    pub shared_bus: bool,
}

/// How a limit is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Serving threads of the gateway.
    pub threads: usize,
    /// Connections of the control API, or of the admin listener.
    pub control: usize,
    /// Of these, streams that follow something.
    pub streams: usize,
    /// Concurrent probes.
    pub probes: usize,
    /// Concurrent tasks that open files.
    pub file_tasks: usize,
    /// What is left for clients, for connections to instances, and for one descriptor per instance.
    pub rest: usize,
}

/// The limit is too low: the process would fail later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{limit} file descriptors are too few: this process needs at least {required}; raise the hard limit (`ulimit -Hn {RECOMMENDED_LIMIT}` before it is started, LimitNOFILE={RECOMMENDED_LIMIT} in a systemd unit, --ulimit nofile={RECOMMENDED_LIMIT} for a container)"
)]
pub struct TooFewDescriptors {
    /// The limit, which could not be raised any further.
    pub limit: u64,
    /// What this process needs for what it is going to run.
    pub required: usize,
}

/// Several times what the defaults allow.
const RECOMMENDED_LIMIT: u64 = 65_536;

impl Shares {
    /// Divides a limit: first what a process has open at rest, then a share for each use, and the
    /// rest for clients and instances. With a low limit there are fewer serving threads than
    /// desired.
    ///
    /// # Errors
    ///
    /// [`TooFewDescriptors`] if that leaves nothing for clients; its message says how to raise the
    /// limit.
    pub fn of(limit: u64, needs: Needs) -> Result<Self, TooFewDescriptors> {
        // The limit may be infinite; nobody needs more than this.
        let limit = limit.min(1 << 24);
        let share_of =
            |of: u64, least: usize, most: usize| ((limit / of) as usize).clamp(least, most);
        let threads = needs
            .threads
            .clamp(1, share_of(PER_THREAD_MIN, 1, usize::MAX));
        let control = share_of(16, 8, 512);
        let shares = Self {
            threads,
            control,
            streams: control / 4,
            probes: share_of(16, 8, 256),
            file_tasks: share_of(64, 2, 32),
            rest: 0,
        };
        let fixed = BASELINE
            + threads * PER_THREAD
            + if needs.shared_bus {
                SERVER_CONNECTIONS
            } else {
                0
            }
            + shares.control
            + shares.streams
            + shares.probes
            + shares.file_tasks * PER_FILE_TASK;
        let required = fixed + 2 * CLIENTS_MIN;
        if limit < required as u64 {
            return Err(TooFewDescriptors { limit, required });
        }
        let rest = limit as usize - fixed;
        Ok(Self { rest, ..shares })
    }

    /// The most instances that may hold descriptors so that a few clients are left.
    pub fn instances_max(&self) -> usize {
        self.rest - 2 * CLIENTS_MIN
    }
}

/// The part that is shared at run time. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Descriptors(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limit: u64,
    rest: usize,
    /// One per instance.
    held: Arc<AtomicUsize>,
    started: Instant,
    /// When the last shortage occurred, in milliseconds since `started`; 0 for never.
    shortage_ms: AtomicU64,
    warned_at: Mutex<Option<Instant>>,
}

/// For a process that does not manage its limit, as in tests.
impl Default for Descriptors {
    fn default() -> Self {
        Self::new(u64::MAX, usize::MAX)
    }
}

impl Descriptors {
    /// Creates the shared part of `limit`: `rest`, as computed by [`Shares::of`].
    pub fn new(limit: u64, rest: usize) -> Self {
        Self(Arc::new(Inner {
            limit,
            rest,
            held: Arc::default(),
            started: Instant::now(),
            shortage_ms: AtomicU64::default(),
            warned_at: Mutex::default(),
        }))
    }

    /// The counter of descriptors held for instances.
    pub fn held(&self) -> Arc<AtomicUsize> {
        self.0.held.clone()
    }

    /// The most connections that the gateway may have open, to clients and to instances.
    pub fn connections_max(&self) -> usize {
        let held = self.0.held.load(Ordering::Relaxed);
        let rest = self.0.rest.saturating_sub(held);
        // Something uses more than planned: admit fewer clients.
        let rest = if self.is_tight() { rest / 2 } else { rest };
        rest.max(2 * CLIENTS_MIN)
    }

    /// The most concurrent clients of the gateway. Each may need a connection to an instance.
    pub fn clients_max(&self) -> usize {
        self.connections_max() / 2
    }

    /// Whether there was a shortage a short while ago.
    pub fn is_tight(&self) -> bool {
        match self.0.shortage_ms.load(Ordering::Relaxed) {
            0 => false,
            at => self.now_ms().saturating_sub(at) < SHORTAGE_COOLDOWN.as_millis() as u64,
        }
    }

    fn now_ms(&self) -> u64 {
        self.0.started.elapsed().as_millis() as u64 + 1
    }

    /// Records that `what` failed for want of descriptors and will be retried. Logged once a
    /// minute, whatever it was.
    pub fn record_shortage(&self, what: &str, error: &io::Error) {
        self.0.shortage_ms.store(self.now_ms(), Ordering::Relaxed);
        if self.should_warn(Instant::now()) {
            let advice = self.advice(error);
            tracing::warn!(%error, delayed = what, advice, "out of descriptors, refusing clients");
        }
    }

    /// Records that clients are refused because their share is used up.
    pub fn record_exhausted(&self) {
        if self.should_warn(Instant::now()) {
            let clients = self.clients_max();
            let advice = self.advice(&Errno::MFILE.into());
            tracing::warn!(
                clients,
                advice,
                "out of descriptors for clients, refusing them"
            );
        }
    }

    fn should_warn(&self, now: Instant) -> bool {
        let mut warned_at = self
            .0
            .warned_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let is_due = warned_at.is_none_or(|at| now.duration_since(at) >= WARN_INTERVAL);
        if is_due {
            *warned_at = Some(now);
        }
        is_due
    }

    fn advice(&self, error: &io::Error) -> String {
        let limit = self.0.limit;
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::MFILE) => format!(
                "the limit of this process is {limit} file descriptors; raise the hard limit (`ulimit -Hn {RECOMMENDED_LIMIT}` before it is started, LimitNOFILE={RECOMMENDED_LIMIT} in a systemd unit, --ulimit nofile={RECOMMENDED_LIMIT} for a container)"
            ),
            Some(Errno::NFILE) => {
                "this machine is out of file descriptors; raise its limit with `sysctl fs.file-max`"
                    .into()
            }
            _ => "this machine, or the limit of this process, is out of memory or of processes"
                .into(),
        }
    }
}

/// Whether the error is a shortage of descriptors or memory in this process or machine, and says
/// nothing about the peer.
pub fn is_shortage(error: &io::Error) -> bool {
    let shortages = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS];
    let code = error.raw_os_error().map(Errno::from_raw_os_error);
    code.is_some_and(|code| shortages.contains(&code))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDS: Needs = Needs {
        threads: 2,
        shared_bus: false,
    };

    #[test]
    fn shares_add_up_to_the_limit() {
        for limit in [96, 128, 200, 256, 500, 1024, 4096, 65_536, 1 << 20] {
            let shares = Shares::of(limit, NEEDS).unwrap();
            let spent = BASELINE
                + shares.threads * PER_THREAD
                + shares.control
                + shares.streams
                + shares.probes
                + shares.file_tasks * PER_FILE_TASK
                + shares.rest;
            assert_eq!(spent as u64, limit, "{shares:?}");
        }
    }

    #[test]
    fn instances_come_before_clients_and_each_client_gets_two() {
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
            let shares = Shares::of(limit, NEEDS).unwrap();
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
    fn a_limit_below_what_is_needed_is_refused_with_advice() {
        let refused = Shares::of(64, NEEDS).unwrap_err().to_string();
        for text in ["64 file descriptors", "ulimit", "LimitNOFILE", "--ulimit"] {
            assert!(refused.contains(text), "{refused}");
        }
        assert!(Shares::of(u64::MAX, NEEDS).is_ok());
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
    fn fewer_clients_are_admitted_after_a_shortage() {
        let descriptors = Descriptors::new(1024, 400);
        assert_eq!(descriptors.clients_max(), 200);
        descriptors.record_shortage("a probe", &Errno::MFILE.into());
        assert_eq!(descriptors.clients_max(), 100);
    }

    #[test]
    fn a_shortage_is_logged_once_a_minute() {
        let descriptors = Descriptors::default();
        let now = Instant::now();
        assert!(descriptors.should_warn(now));
        assert!(!descriptors.should_warn(now + Duration::from_secs(59)));
        assert!(descriptors.should_warn(now + Duration::from_secs(60)));
    }
}
