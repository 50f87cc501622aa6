//! Processes as /proc and pidfds show them: who belongs to an instance, what it uses, when it ends.
//!
//! Invariant: a signal goes only to a process that has been proven to belong to the instance, and
//! the proof still holds when the signal is sent (a process number may have been given away).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use procfs::process::{FDTarget, Process, Stat};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;

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
pub(super) fn marks(pid: i32) -> Option<Marks> {
    let environ = fs::read(format!("/proc/{pid}/environ")).ok()?;
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
fn living() -> Vec<Stat> {
    let Ok(processes) = procfs::process::all_processes() else {
        return Vec::new();
    };
    let ourselves = std::process::id() as i32;
    processes
        .filter_map(|process| process.ok()?.stat().ok())
        .filter(|stat| stat.pid != ourselves && is_alive(stat))
        .collect()
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
pub(super) fn scan(installation: &str, boot_id: &str) -> Vec<Found> {
    living()
        .into_iter()
        .filter_map(|stat| {
            let marks = marks(stat.pid).filter(|marks| marks.installation == installation)?;
            Some(Found {
                leads_its_group: stat.pid == stat.pgrp,
                identity: ProcessIdentity {
                    pid: stat.pid,
                    start_time: stat.starttime,
                    boot_id: boot_id.to_owned(),
                },
                marks,
            })
        })
        .collect()
}

pub(super) fn identity(pid: i32, boot_id: &str) -> io::Result<ProcessIdentity> {
    let stat = Process::new(pid)
        .and_then(|process| process.stat())
        .map_err(io::Error::other)?;
    Ok(ProcessIdentity {
        pid,
        start_time: stat.starttime,
        boot_id: boot_id.to_owned(),
    })
}

/// The very process that was recorded runs.
pub(super) fn is_running(recorded: &ProcessIdentity, boot_id: &str) -> bool {
    recorded.boot_id == boot_id
        && Process::new(recorded.pid)
            .and_then(|process| process.stat())
            .is_ok_and(|stat| is_alive(&stat) && stat.starttime == recorded.start_time)
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
    fn has(&self, stat: &Stat) -> bool {
        self.group == Some(stat.pgrp) || self.is_marked(stat.pid)
    }

    /// Also what has left the group carries the marks, unless it wiped its environment.
    fn is_marked(&self, pid: i32) -> bool {
        marks(pid).is_some_and(|marks| {
            marks.installation == self.installation && marks.instance == self.instance
        })
    }

    pub(super) fn living(&self) -> Vec<i32> {
        let members = living().into_iter().filter(|stat| self.has(stat));
        members.map(|stat| stat.pid).collect()
    }

    /// Sends a signal to every member and returns how many there were.
    pub(super) fn signal(&self, signal: Signal) -> usize {
        let mut count = 0;
        for stat in living().into_iter().filter(|stat| self.has(stat)) {
            count += 1;
            self.signal_one(&stat, signal);
        }
        count
    }

    fn signal_one(&self, stat: &Stat, signal: Signal) {
        let Some(fd) =
            Pid::from_raw(stat.pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
        else {
            return;
        };
        // The descriptor names one process for good; make sure that it is the one we looked at.
        let same = Process::new(stat.pid)
            .and_then(|process| process.stat())
            .is_ok_and(|now| now.starttime == stat.starttime && self.has(&now));
        if same {
            // It may have ended by itself meanwhile, which is what was wanted.
            let _ = pidfd_send_signal(&fd, signal);
        }
    }

    /// Whether one of the members is who listens on the port. Unknown counts as yes: descriptors of
    /// a process that changed its user cannot be read.
    pub(super) fn listens_on(&self, port: u16) -> bool {
        let Ok(mut sockets) = procfs::net::tcp() else {
            return true;
        };
        sockets.extend(procfs::net::tcp6().unwrap_or_default());
        let listening: Vec<u64> = sockets
            .into_iter()
            .filter(|socket| {
                socket.local_address.port() == port && socket.state == procfs::net::TcpState::Listen
            })
            .map(|socket| socket.inode)
            .collect();
        self.living().into_iter().any(|pid| {
            let Ok(descriptors) = Process::new(pid).and_then(|process| process.fd()) else {
                return true;
            };
            descriptors.flatten().any(
                |fd| matches!(fd.target, FDTarget::Socket(inode) if listening.contains(&inode)),
            )
        })
    }
}

/// The first process of an instance, watched through a descriptor that cannot come to mean another.
#[derive(Debug)]
pub(super) struct Leader {
    pub pid: i32,
    pidfd: AsyncFd<OwnedFd>,
    /// None for an adopted process, whose exit code goes to whoever its parent is now.
    child: Option<std::process::Child>,
}

impl Leader {
    /// Must be called within a tokio runtime.
    pub(super) fn of_child(child: std::process::Child) -> io::Result<Self> {
        let pid = child.id() as i32;
        Ok(Self {
            pid,
            pidfd: watch(pid)?,
            child: Some(child),
        })
    }

    /// `None` if the recorded process is gone.
    pub(super) fn adopt(recorded: &ProcessIdentity, boot_id: &str) -> Option<Self> {
        let pidfd = watch(recorded.pid).ok()?;
        // Only now is it certain that the descriptor and the record mean the same process.
        is_running(recorded, boot_id).then_some(Self {
            pid: recorded.pid,
            pidfd,
            child: None,
        })
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
pub(super) fn usage_by_group() -> BTreeMap<i32, Usage> {
    let tick_us = 1_000_000 / procfs::ticks_per_second().max(1);
    let page = procfs::page_size();
    let mut groups = BTreeMap::<i32, Usage>::new();
    for stat in living() {
        let children = stat.cutime.max(0) as u64 + stat.cstime.max(0) as u64;
        let usage = groups.entry(stat.pgrp).or_default();
        usage.cpu_us += (stat.utime + stat.stime + children) * tick_us;
        usage.memory_bytes += stat.rss * page;
    }
    groups
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
        let ours = identity(std::process::id() as i32, &boot).unwrap();
        assert!(is_running(&ours, &boot));
        let later = ProcessIdentity {
            start_time: ours.start_time + 1,
            ..ours.clone()
        };
        assert!(!is_running(&later, &boot));
        assert!(!is_running(&ours, "another-boot"));
    }
}
