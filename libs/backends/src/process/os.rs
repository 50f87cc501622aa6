//! Processes as /proc and pidfds show them: who belongs to an instance, what it uses, when it ends.
//!
//! Invariants: a signal goes only to a process that has been proven to belong to the instance, and
//! the proof still holds when the signal is sent (a process number may have been given away). What
//! cannot be looked at for a lack of descriptors is an error, and never nothing.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use procfs::process::{FDTarget, Process, Stat};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;

use super::lack::{Held, Means, seen, seen_in_proc};
use super::launch::{GENERATION, INSTALLATION, INSTANCE};
use super::record::ProcessIdentity;

pub(super) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// What Penstock has written into the environment of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Marks {
    pub installation: String,
    pub instance: String,
    pub generation: Option<u64>,
    pub port: Option<u16>,
}

/// None: not one of ours, or not ours to read.
pub(super) fn marks(pid: i32) -> io::Result<Option<Marks>> {
    let environ = seen(fs::read(format!("/proc/{pid}/environ")))?;
    Ok(environ.and_then(|environ| marks_in(&environ)))
}

fn marks_in(environ: &[u8]) -> Option<Marks> {
    let value = |name: &str| {
        environ.split(|byte| *byte == 0).find_map(|entry| {
            let text = std::str::from_utf8(entry).ok()?;
            text.strip_prefix(name)?.strip_prefix('=')
        })
    };
    Some(Marks {
        installation: value(INSTALLATION)?.to_owned(),
        instance: value(INSTANCE)?.to_owned(),
        generation: value(GENERATION).and_then(|text| text.parse().ok()),
        port: value("PORT").and_then(|text| text.parse().ok()),
    })
}

/// All processes but ourselves and those that are dead already.
fn living() -> io::Result<Vec<Stat>> {
    let processes = procfs::process::all_processes();
    let ourselves = std::process::id() as i32;
    let mut living = Vec::new();
    for process in seen_in_proc(processes)?.into_iter().flatten() {
        let stat = seen_in_proc(process.and_then(|process| process.stat()))?;
        living.extend(stat.filter(|stat| stat.pid != ourselves && is_alive(stat)));
    }
    Ok(living)
}

/// What a process is now; none if there is none of this number.
fn stat(pid: i32) -> io::Result<Option<Stat>> {
    seen_in_proc(Process::new(pid).and_then(|process| process.stat()))
}

fn is_alive(stat: &Stat) -> bool {
    !matches!(stat.state, 'Z' | 'X' | 'x')
}

/// A process of this installation.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub identity: ProcessIdentity,
    pub leads_its_group: bool,
    pub marks: Marks,
}

/// Everything of this installation that runs.
pub(super) fn scan(installation: &str, boot_id: &str) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for stat in living()? {
        let Some(marks) = marks(stat.pid)?.filter(|marks| marks.installation == installation)
        else {
            continue;
        };
        found.push(Found {
            leads_its_group: stat.pid == stat.pgrp,
            identity: ProcessIdentity {
                pid: stat.pid,
                start_time: stat.starttime,
                boot_id: boot_id.to_owned(),
            },
            marks,
        });
    }
    Ok(found)
}

/// None if the process is gone, and reaped, already.
pub(super) fn identity(pid: i32, boot_id: &str) -> io::Result<Option<ProcessIdentity>> {
    Ok(stat(pid)?.map(|stat| ProcessIdentity {
        pid,
        start_time: stat.starttime,
        boot_id: boot_id.to_owned(),
    }))
}

/// The very process that was recorded runs.
pub(super) fn is_running(recorded: &ProcessIdentity, boot_id: &str) -> io::Result<bool> {
    if recorded.boot_id != boot_id {
        return Ok(false);
    }
    let now = stat(recorded.pid)?;
    Ok(now.is_some_and(|now| is_alive(&now) && now.starttime == recorded.start_time))
}

/// Which processes belong to an instance.
#[derive(Clone, Debug)]
pub(super) struct Membership {
    pub installation: String,
    pub instance: String,
    /// The process group, while its number is certainly still ours: the leader lives, or is a child
    /// of ours that has not been reaped.
    pub group: Option<i32>,
}

impl Membership {
    fn has(&self, stat: &Stat) -> io::Result<bool> {
        Ok(self.group == Some(stat.pgrp) || self.is_marked(stat.pid)?)
    }

    /// Also what has left the group carries the marks, unless it wiped its environment.
    fn is_marked(&self, pid: i32) -> io::Result<bool> {
        Ok(marks(pid)?.is_some_and(|marks| {
            marks.installation == self.installation && marks.instance == self.instance
        }))
    }

    fn members(&self) -> io::Result<Vec<Stat>> {
        let mut members = Vec::new();
        for stat in living()? {
            if self.has(&stat)? {
                members.push(stat);
            }
        }
        Ok(members)
    }

    pub(super) fn living(&self) -> io::Result<Vec<i32>> {
        Ok(self.members()?.iter().map(|stat| stat.pid).collect())
    }

    /// Sends a signal to every member and returns how many there were.
    pub(super) fn signal(&self, signal: Signal) -> io::Result<usize> {
        let members = self.members()?;
        for stat in &members {
            self.signal_one(stat, signal)?;
        }
        Ok(members.len())
    }

    fn signal_one(&self, before: &Stat, signal: Signal) -> io::Result<()> {
        let Some(pid) = Pid::from_raw(before.pid) else {
            return Ok(());
        };
        let opened = pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from);
        let Some(fd) = seen(opened)? else {
            return Ok(());
        };
        // The descriptor names one process for good; make sure that it is the one we looked at.
        let Some(now) = stat(before.pid)? else {
            return Ok(());
        };
        if now.starttime == before.starttime && self.has(&now)? {
            // It may have ended by itself meanwhile, which is what was wanted.
            let _ = pidfd_send_signal(&fd, signal);
        }
        Ok(())
    }

    /// Whether one of the members is who listens on the port. Unknown counts as yes: descriptors of
    /// a process that changed its user cannot be read.
    pub(super) fn listens_on(&self, port: u16) -> io::Result<bool> {
        let Some(mut sockets) = seen_in_proc(procfs::net::tcp())? else {
            return Ok(true);
        };
        sockets.extend(seen_in_proc(procfs::net::tcp6())?.unwrap_or_default());
        let listening: Vec<u64> = sockets
            .into_iter()
            .filter(|socket| {
                socket.local_address.port() == port && socket.state == procfs::net::TcpState::Listen
            })
            .map(|socket| socket.inode)
            .collect();
        for pid in self.living()? {
            let descriptors = Process::new(pid).and_then(|process| process.fd());
            let Some(descriptors) = seen_in_proc(descriptors)? else {
                return Ok(true);
            };
            let found = descriptors.flatten().any(
                |fd| matches!(fd.target, FDTarget::Socket(inode) if listening.contains(&inode)),
            );
            if found {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// The first process of an instance, watched through a descriptor that cannot come to mean another.
#[derive(Debug)]
pub(super) struct Leader {
    pub pid: i32,
    pidfd: AsyncFd<OwnedFd>,
    _held: Held,
    /// None for an adopted process, whose exit code goes to whoever its parent is now.
    child: Option<std::process::Child>,
}

impl Leader {
    /// Must be called within a tokio runtime. On failure the process is ended: nobody could watch it.
    pub(super) fn of_child(mut child: std::process::Child, means: &Means) -> io::Result<Self> {
        let pid = child.id() as i32;
        match watch(pid) {
            Ok(pidfd) => Ok(Self {
                pid,
                pidfd,
                _held: Held::one_of(means),
                child: Some(child),
            }),
            Err(error) => {
                end_unwatched(&mut child);
                Err(error)
            }
        }
    }

    /// `None` if the recorded process is gone.
    pub(super) fn adopt(
        recorded: &ProcessIdentity,
        boot_id: &str,
        means: &Means,
    ) -> io::Result<Option<Self>> {
        let Some(pidfd) = seen(watch(recorded.pid))? else {
            return Ok(None);
        };
        // Only now is it certain that the descriptor and the record mean the same process.
        Ok(is_running(recorded, boot_id)?.then(|| Self {
            pid: recorded.pid,
            pidfd,
            _held: Held::one_of(means),
            child: None,
        }))
    }

    /// What can be signalled without any further descriptor: the process, and its group while the
    /// number is certainly its own.
    pub(super) fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(self.pidfd.get_ref(), signal);
        if let (Some(_), Some(group)) = (&self.child, Pid::from_raw(self.pid)) {
            let _ = kill_process_group(group, signal);
        }
    }

    /// Resolves when the process has ended. A child stays unreaped, so that the number of its group
    /// remains ours until [`reap`](Self::reap).
    pub(super) async fn ended(&self) {
        // An error would mean that the descriptor is unusable; it is ours and open.
        let _ = self.pidfd.readable().await;
    }

    pub(super) fn is_child(&self) -> bool {
        self.child.is_some()
    }

    /// How it ended: exit code, and words. To be called after [`ended`](Self::ended).
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

/// A child, and its group, that have only just begun. It is not reaped yet, so the number is its own.
pub(super) fn end_unwatched(child: &mut std::process::Child) {
    if let Some(group) = Pid::from_raw(child.id() as i32) {
        let _ = kill_process_group(group, Signal::KILL);
    }
    let _ = child.wait();
}

#[expect(
    deprecated,
    reason = "its replacement is `unsafe`, for types whose descriptor may change; an OwnedFd's cannot"
)]
fn watch(pid: i32) -> io::Result<AsyncFd<OwnedFd>> {
    let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::other("not a process number"))?;
    AsyncFd::new(pidfd_open(pid, PidfdFlags::NONBLOCK)?)
}

/// CPU and memory of one process group now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub cpu_us: u64,
    pub memory_bytes: u64,
}

/// One look at all processes, summed by process group.
pub(super) fn usage_by_group() -> io::Result<BTreeMap<i32, Usage>> {
    let tick_us = 1_000_000 / procfs::ticks_per_second().max(1);
    let page = procfs::page_size();
    let mut groups = BTreeMap::<i32, Usage>::new();
    for stat in living()? {
        let children = stat.cutime.max(0) as u64 + stat.cstime.max(0) as u64;
        let usage = groups.entry(stat.pgrp).or_default();
        usage.cpu_us += (stat.utime + stat.stime + children) * tick_us;
        usage.memory_bytes += stat.rss * page;
    }
    Ok(groups)
}

/// Makes a total that never falls out of a sum that does, when a process takes its count with it.
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
    fn a_total_of_cpu_never_falls_when_a_process_leaves_the_group() {
        let mut meter = CpuMeter::default();
        let totals: Vec<u64> = [10, 50, 20, 30].map(|sum| meter.total(sum)).into();
        assert_eq!(totals, [10, 50, 50, 60]);
    }

    #[test]
    fn the_same_number_at_another_time_or_boot_is_another_process() {
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
