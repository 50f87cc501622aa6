//! Processes as seen through /proc and pidfds: which belong to an instance, what they use, when they end.
//!
//! Invariants: a signal is only sent to a process that has been proven to belong to the instance, and
//! the proof still holds when the signal is sent (pids are reused). What cannot be inspected because of
//! a resource shortage is an error, never an empty result.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use procfs::process::{FDPermissions, FDTarget, Process, Stat};
use procfs::{Current, Meminfo};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;

use super::control_group;
use super::family::Family;
use super::launch::{self, GENERATION, INSTALLATION, INSTANCE, PORTS, Ports};
use super::record::ProcessIdentity;
use super::shortage::{DescriptorGuard, ResourceLimits, ok_unless_shortage, proc_unless_shortage};

pub(super) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// What Penstock puts into the environment of a process to identify it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ProcessTags {
    pub installation: String,
    pub instance: String,
    pub generation: Option<u64>,
    pub ports: Option<Ports>,
}

/// Returns `None` if the process is not one of ours, or its environment cannot be read.
pub(super) fn process_tags(pid: i32) -> io::Result<Option<ProcessTags>> {
    let environ = ok_unless_shortage(fs::read(format!("/proc/{pid}/environ")))?;
    Ok(environ.and_then(|environ| parse_tags(&environ)))
}

fn parse_tags(environ: &[u8]) -> Option<ProcessTags> {
    let value = |name: &str| {
        environ.split(|byte| *byte == 0).find_map(|entry| {
            let text = std::str::from_utf8(entry).ok()?;
            text.strip_prefix(name)?.strip_prefix('=')
        })
    };
    Some(ProcessTags {
        installation: value(INSTALLATION)?.to_owned(),
        instance: value(INSTANCE)?.to_owned(),
        generation: value(GENERATION).and_then(|text| text.parse().ok()),
        ports: value("PORT").and_then(|port| {
            Some(Ports {
                main: port.parse().ok()?,
                named: launch::parse_ports(value(PORTS).unwrap_or_default())?,
            })
        }),
    })
}

/// Returns all processes except this one and those that are already dead.
pub(super) fn live_processes() -> io::Result<Vec<Stat>> {
    let processes = procfs::process::all_processes();
    let own_pid = std::process::id() as i32;
    let mut living = Vec::new();
    for process in proc_unless_shortage(processes)?.into_iter().flatten() {
        let stat = proc_unless_shortage(process.and_then(|process| process.stat()))?;
        living.extend(stat.filter(|stat| stat.pid != own_pid && is_alive(stat)));
    }
    Ok(living)
}

/// Returns the current status of a process; `None` if there is no such process.
fn stat(pid: i32) -> io::Result<Option<Stat>> {
    proc_unless_shortage(Process::new(pid).and_then(|process| process.stat()))
}

fn is_alive(stat: &Stat) -> bool {
    !matches!(stat.state, 'Z' | 'X' | 'x')
}

/// A process of this installation.
#[derive(Clone, Debug)]
pub(super) struct TaggedProcess {
    pub identity: ProcessIdentity,
    pub tags: ProcessTags,
}

/// Returns all running processes of this installation.
pub(super) fn scan(installation: &str, boot_id: &str) -> io::Result<Vec<TaggedProcess>> {
    let mut found = Vec::new();
    for stat in live_processes()? {
        let tags = process_tags(stat.pid)?.filter(|tags| tags.installation == installation);
        let tags = match tags {
            Some(tags) => Some(tags),
            None => tags_by_control_group(stat.pid, installation)?,
        };
        let Some(tags) = tags else {
            continue;
        };
        let identity = ProcessIdentity::of(&stat, boot_id);
        found.push(TaggedProcess { identity, tags });
    }
    Ok(found)
}

/// For a process that cleared its environment.
fn tags_by_control_group(pid: i32, installation: &str) -> io::Result<Option<ProcessTags>> {
    let instance = control_group::instance_of(pid, installation)?;
    Ok(instance.map(|instance| ProcessTags {
        installation: installation.to_owned(),
        instance,
        generation: None,
        ports: None,
    }))
}

/// Returns `None` if the process has already been reaped.
pub(super) fn identity(pid: i32, boot_id: &str) -> io::Result<Option<ProcessIdentity>> {
    Ok(stat(pid)?.map(|stat| ProcessIdentity::of(&stat, boot_id)))
}

impl ProcessIdentity {
    fn of(stat: &Stat, boot_id: &str) -> Self {
        Self {
            pid: stat.pid,
            start_time: stat.starttime,
            boot_id: boot_id.to_owned(),
            group: (stat.pgrp != stat.pid).then_some(stat.pgrp),
        }
    }
}

/// Whether exactly the recorded process is running.
pub(super) fn is_running(recorded: &ProcessIdentity, boot_id: &str) -> io::Result<bool> {
    if recorded.boot_id != boot_id {
        return Ok(false);
    }
    let now = stat(recorded.pid)?;
    Ok(now.is_some_and(|now| is_alive(&now) && now.starttime == recorded.start_time))
}

/// How long ago a process of the present boot was started; `None` if that cannot be read.
pub(super) fn age(process: &ProcessIdentity) -> Option<Duration> {
    let up = procfs::Uptime::current().ok()?.uptime_duration();
    let ticks = procfs::ticks_per_second().max(1);
    let started = Duration::from_millis(process.start_time.saturating_mul(1000) / ticks);
    Some(up.saturating_sub(started))
}

/// Finds the processes that belong to an instance.
#[derive(Clone, Debug)]
pub(super) struct ProcessMatcher {
    pub installation: String,
    pub instance: String,
    /// The process group, while its id is certain to be ours: the leader is alive, or is a child that has
    /// not been reaped.
    pub group: Option<i32>,
    /// The output of the instance, to find processes by nothing else than that they may write to it. Looking
    /// at the files of all processes takes long.
    pub output: Option<PathBuf>,
    /// Processes that are known to descend from the instance.
    pub family: Family,
}

impl ProcessMatcher {
    fn matches(&self, stat: &Stat) -> io::Result<bool> {
        let is_known = self.family.get(&stat.pid) == Some(&stat.starttime);
        if self.group == Some(stat.pgrp) || is_known || self.is_tagged(stat.pid)? {
            return Ok(true);
        }
        let instance = control_group::instance_of(stat.pid, &self.installation)?;
        if instance.is_some_and(|instance| instance == self.instance) {
            return Ok(true);
        }
        match &self.output {
            Some(output) => may_write(stat.pid, output),
            None => Ok(false),
        }
    }

    /// A process that left the group still has the tags, unless it cleared its environment.
    fn is_tagged(&self, pid: i32) -> io::Result<bool> {
        Ok(process_tags(pid)?.is_some_and(|tags| {
            tags.installation == self.installation && tags.instance == self.instance
        }))
    }

    fn matching(&self) -> io::Result<Vec<Stat>> {
        let mut matching = Vec::new();
        for stat in live_processes()? {
            if self.matches(&stat)? {
                matching.push(stat);
            }
        }
        Ok(matching)
    }

    pub(super) fn pids(&self) -> io::Result<Vec<i32>> {
        Ok(self.matching()?.iter().map(|stat| stat.pid).collect())
    }

    /// The matching processes, by id with their names.
    pub(super) fn names(&self) -> io::Result<BTreeMap<i32, String>> {
        let matching = self.matching()?.into_iter();
        Ok(matching.map(|stat| (stat.pid, stat.comm)).collect())
    }

    /// Signals every matching process and returns how many there were, without those that this process
    /// may not signal: waiting for them would not help.
    pub(super) fn signal(&self, signal: Signal) -> io::Result<usize> {
        let mut count = 0;
        for stat in self.matching()? {
            count += usize::from(self.signal_one(&stat, signal)?);
        }
        Ok(count)
    }

    /// Returns false if this process may not signal that one.
    fn signal_one(&self, before: &Stat, signal: Signal) -> io::Result<bool> {
        let Some(pid) = Pid::from_raw(before.pid) else {
            return Ok(true);
        };
        let opened = pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from);
        let Some(fd) = ok_unless_shortage(opened)? else {
            return Ok(true);
        };
        // The pidfd refers to one process for good; make sure that it is the one that matched.
        let Some(now) = stat(before.pid)? else {
            return Ok(true);
        };
        if now.starttime == before.starttime && self.matches(&now)? {
            // The process may have exited meanwhile, which is fine.
            return Ok(pidfd_send_signal(&fd, signal) != Err(Errno::PERM));
        }
        Ok(true)
    }
}

/// Whether the process has the file open for writing. Who only reads it, such as `tail`, is not one of the
/// instance. False if its descriptors cannot be read.
fn may_write(pid: i32, file: &Path) -> io::Result<bool> {
    let descriptors = Process::new(pid).and_then(|process| process.fd());
    let descriptors = proc_unless_shortage(descriptors)?;
    let is_writer = |fd: procfs::process::FDInfo| {
        fd.mode().contains(FDPermissions::WRITE)
            && matches!(&fd.target, FDTarget::Path(target) if target == file)
    };
    Ok(descriptors.is_some_and(|mut fds| fds.any(|fd| fd.is_ok_and(is_writer))))
}

/// The first process of an instance, or the one that serves on after it, held by a pidfd, which cannot end up
/// referring to another process.
#[derive(Debug)]
pub(super) struct Leader {
    pub pid: i32,
    /// The id of the instance's process group: the pid of its first process.
    pub group: i32,
    pidfd: AsyncFd<OwnedFd>,
    _descriptor: DescriptorGuard,
    /// The first process; `None` for an adopted one, whose exit code goes to its current parent.
    child: Option<std::process::Child>,
}

impl Leader {
    /// Must be called within a tokio runtime. On failure the process is killed, as it cannot be watched.
    pub(super) fn from_child(
        mut child: std::process::Child,
        resource_limits: &ResourceLimits,
    ) -> io::Result<Self> {
        let pid = child.id() as i32;
        match open_pidfd(pid) {
            Ok(pidfd) => Ok(Self {
                pid,
                group: pid,
                pidfd,
                _descriptor: DescriptorGuard::acquire(resource_limits),
                child: Some(child),
            }),
            Err(error) => {
                kill_unwatched(&mut child);
                Err(error)
            }
        }
    }

    /// Returns `None` if the recorded process is gone.
    pub(super) fn adopt(
        recorded: &ProcessIdentity,
        boot_id: &str,
        resource_limits: &ResourceLimits,
    ) -> io::Result<Option<Self>> {
        let Some(pidfd) = ok_unless_shortage(open_pidfd(recorded.pid))? else {
            return Ok(None);
        };
        // Checked after opening: only now is it certain that pidfd and record refer to the same process.
        Ok(is_running(recorded, boot_id)?.then(|| Self {
            pid: recorded.pid,
            group: recorded.group_id(),
            pidfd,
            _descriptor: DescriptorGuard::acquire(resource_limits),
            child: None,
        }))
    }

    /// Follows another process of the group from here on. Returns false if it is gone.
    pub(super) fn follow(&mut self, next: &ProcessIdentity, boot_id: &str) -> io::Result<bool> {
        let Some(pidfd) = ok_unless_shortage(open_pidfd(next.pid))? else {
            return Ok(false);
        };
        // As in `adopt`.
        let is_running = is_running(next, boot_id)?;
        if is_running {
            (self.pid, self.pidfd) = (next.pid, pidfd);
        }
        Ok(is_running)
    }

    /// Signals what can be reached without further descriptors: the process, and its group while the group
    /// id is certain to be its own.
    pub(super) fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(self.pidfd.get_ref(), signal);
        if let (Some(_), Some(group)) = (&self.child, Pid::from_raw(self.group)) {
            let _ = kill_process_group(group, signal);
        }
    }

    /// Resolves when the process has ended. A child stays unreaped, so that its group id remains ours until
    /// [`reap`](Self::reap).
    pub(super) async fn ended(&self) {
        // An error would mean that the descriptor is unusable; it is owned and open.
        let _ = self.pidfd.readable().await;
    }

    pub(super) fn is_child(&self) -> bool {
        self.child.is_some()
    }

    /// Reaps the process and returns its exit code and a description. Call it after
    /// [`ended`](Self::ended).
    pub(super) fn reap(&mut self) -> (Option<i32>, String) {
        use std::os::unix::process::ExitStatusExt;
        let Some(child) = &mut self.child else {
            return (
                None,
                "ended; its exit code is unknown, because it was started before Penstock was"
                    .into(),
            );
        };
        match child.try_wait() {
            Ok(Some(status)) => match (status.code(), status.signal()) {
                (Some(code), _) => (Some(code), format!("exited with code {code}")),
                (None, Some(signal)) => (None, format!("ended by signal {signal}")),
                (None, None) => (None, "ended".into()),
            },
            Ok(None) | Err(_) => (None, "ended; its exit code could not be read".into()),
        }
    }
}

/// Kills a child that was just started, and its group. It has not been reaped, so the id is its own.
pub(super) fn kill_unwatched(child: &mut std::process::Child) {
    if let Some(group) = Pid::from_raw(child.id() as i32) {
        let _ = kill_process_group(group, Signal::KILL);
    }
    let _ = child.wait();
}

#[expect(
    deprecated,
    reason = "the replacement is `unsafe`, for types whose descriptor may change; an OwnedFd's cannot"
)]
fn open_pidfd(pid: i32) -> io::Result<AsyncFd<OwnedFd>> {
    let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::other("not a process number"))?;
    AsyncFd::new(pidfd_open(pid, PidfdFlags::NONBLOCK)?)
}

/// Current CPU and memory use of one process group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct GroupUsage {
    pub cpu_us: u64,
    pub memory_bytes: u64,
}

/// The memory that processes of this machine share: all of it, or the lowest limit of the control groups
/// that this process is in, such as its container's. `None` if it cannot be read.
pub(super) fn memory_bytes() -> Option<u64> {
    let machine = Meminfo::current().ok()?.mem_total;
    let limit = memory_limit_of_control_groups(Path::new("/sys/fs/cgroup"), &own_control_group());
    Some(limit.map_or(machine, |limit| limit.min(machine)))
}

/// The path of the control group (version 2) of this process; empty without one.
fn own_control_group() -> String {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let unified = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    unified.unwrap_or_default().to_owned()
}

/// The lowest limit of a control group and those that contain it; `None` without any.
fn memory_limit_of_control_groups(root: &Path, group: &str) -> Option<u64> {
    let limit = |group: &Path| {
        let text = fs::read_to_string(root.join(group).join("memory.max")).ok()?;
        text.trim().parse::<u64>().ok()
    };
    Path::new(group).ancestors().filter_map(limit).min()
}

/// Sums the usage of processes by process group.
pub(super) fn usage_by_group(processes: &[Stat]) -> BTreeMap<i32, GroupUsage> {
    let tick_us = 1_000_000 / procfs::ticks_per_second().max(1);
    let page = procfs::page_size();
    let mut groups = BTreeMap::<i32, GroupUsage>::new();
    for stat in processes {
        let children = stat.cutime.max(0) as u64 + stat.cstime.max(0) as u64;
        let usage = groups.entry(stat.pgrp).or_default();
        usage.cpu_us += (stat.utime + stat.stime + children) * tick_us;
        usage.memory_bytes += stat.rss * page;
    }
    groups
}

/// Turns a sum of CPU times, which falls when a process exits, into a monotonic total.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct CpuMeter {
    last_us: u64,
    lost_us: u64,
}

impl CpuMeter {
    pub(super) fn total(&mut self, sum_us: u64) -> u64 {
        self.lost_us += self.last_us.saturating_sub(sum_us);
        self.last_us = sum_us;
        self.lost_us + sum_us
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_memory_limit_of_the_enclosing_control_groups_counts() {
        let root = tempfile::tempdir().unwrap();
        let limit = |group: &str, text: &str| {
            let folder = root.path().join(group);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("memory.max"), text).unwrap();
        };
        limit("a/b/c", "max\n");
        limit("a/b", "4096\n");
        limit("a", "8192\n");
        limit("d", "max\n");
        let of = |group| memory_limit_of_control_groups(root.path(), group);
        assert_eq!(of("a/b/c"), Some(4096));
        assert_eq!(of("a"), Some(8192));
        assert_eq!((of("d"), of("")), (None, None));
    }

    #[test]
    fn a_cpu_total_never_falls_when_a_process_leaves_the_group() {
        let mut meter = CpuMeter::default();
        let totals: Vec<u64> = [10, 50, 20, 30].map(|sum| meter.total(sum)).into();
        assert_eq!(totals, [10, 50, 50, 60]);
    }

    #[test]
    fn the_same_pid_at_another_start_time_or_boot_is_another_process() {
        let boot = boot_id().unwrap();
        let ours = identity(std::process::id() as i32, &boot).unwrap().unwrap();
        assert!(is_running(&ours, &boot).unwrap());
        let later = ProcessIdentity {
            start_time: ours.start_time + 1,
            ..ours.clone()
        };
        assert!(!is_running(&later, &boot).unwrap());
        assert!(!is_running(&ours, "another-boot").unwrap());
    }
}
