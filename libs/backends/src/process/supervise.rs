//! Supervises one instance from its start, or adoption, to its end: probes, removal, exit. It ends with its first
//! process, unless another one of its group serves on, which is then watched instead.
//!
//! Invariant: a resource shortage of this process neither ends supervision nor stalls a removal: what
//! cannot be inspected or signalled now is retried until it succeeds.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use contract::ids::InstanceId;
use contract::time::Span;
use rustix::process::Signal;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::launch;
use super::os::{self, Leader, ProcessMatcher};
use super::probe::{ProbeVerdict, Probes};
use super::record::ProcessIdentity;
use super::shortage::{SHORTAGE_RETRY_PAUSE, StartError};
use super::sockets::{self, Listening};
use super::{Removal, Shared};
use crate::{ObservedPhase, StartSpec};

/// Grace period for processes that an instance leaves behind when it exits by itself.
const STRAY_GRACE: Span = Span::from_secs(2);

/// How long a process may take to exit after closing its sockets.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// How often an instance is started, on a new port each time, if another process takes its port first.
const BIND_ATTEMPTS: u32 = 3;

/// How often a lock must be found before it is said that a process holds it.
const LOCK_CHECKS: usize = 5;

/// How often the readiness probe may fail of a process that listens on after the first one has ended.
const PROBES_TO_SERVE_ON: u32 = 3;

/// Between two checks whether all processes are gone.
const POLL_BACKOFF: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_millis(5))
    .with_max_delay(Duration::from_millis(200))
    .without_max_times();

/// Why watching an instance ended.
enum WatchOutcome {
    Released,
    Ended,
    Remove(Removal),
    Failed(String),
}

pub(super) fn spawn(
    shared: &Arc<Shared>,
    id: InstanceId,
    leader: Leader,
    removals: mpsc::Receiver<Removal>,
) {
    let supervisor = Supervisor {
        shared: shared.clone(),
        id,
        leader,
        removals,
        was_ready: false,
    };
    shared.tasks.spawn(supervisor.run());
}

struct Supervisor {
    shared: Arc<Shared>,
    id: InstanceId,
    leader: Leader,
    removals: mpsc::Receiver<Removal>,
    was_ready: bool,
}

/// Aborts the task on drop.
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Supervisor {
    async fn run(mut self) {
        for attempt in 1.. {
            match self.watch().await {
                WatchOutcome::Released => return,
                WatchOutcome::Remove(removal) => return self.end(removal.grace, None).await,
                WatchOutcome::Failed(reason) => {
                    let grace = self.grace();
                    return self.end(grace, Some(reason)).await;
                }
                WatchOutcome::Ended if attempt < BIND_ATTEMPTS && self.is_port_taken().await => {
                    if !self.restart_on_new_port().await {
                        return;
                    }
                }
                WatchOutcome::Ended => return self.end(STRAY_GRACE, None).await,
            }
        }
    }

    /// Probes the instance until something has to be done about it.
    async fn watch(&mut self) -> WatchOutcome {
        let (sender, mut verdicts) = mpsc::channel(4);
        let Some(probes) = self.probes() else {
            return WatchOutcome::Failed("its record names no port".into());
        };
        let port = probes.address.port();
        let _probing = AbortOnDrop(tokio::spawn(probes.clone().run(sender)));
        loop {
            let verdict = tokio::select! {
                biased;
                () = self.shared.released.cancelled() => return WatchOutcome::Released,
                Some(removal) = self.removals.recv() => return WatchOutcome::Remove(removal),
                () = self.leader.ended() => match self.follow_next(port, &probes).await {
                    Ok(()) => continue,
                    Err(outcome) => return outcome,
                },
                Some(verdict) = verdicts.recv() => verdict,
            };
            match verdict {
                ProbeVerdict::Ready => {
                    if !self.was_ready
                        && let Err(outcome) = self.check_listens_on(port).await
                    {
                        return outcome;
                    }
                    self.was_ready = true;
                    self.shared.update(&self.id, |entry| {
                        entry.progress = None;
                        entry.phase = ObservedPhase::Ready;
                        true
                    });
                }
                ProbeVerdict::Starting(progress) => self.shared.update(&self.id, |entry| {
                    entry.progress = Some(progress);
                    true
                }),
                ProbeVerdict::Unready(reason) => self.set_phase(ObservedPhase::Unready { reason }),
                ProbeVerdict::Unhealthy(reason) => self.shared.update(&self.id, |entry| {
                    entry.unhealthy = Some(reason);
                    true
                }),
                ProbeVerdict::Failed(reason) => return WatchOutcome::Failed(reason),
            }
        }
    }

    fn probes(&self) -> Option<Probes> {
        let state = self.shared.state();
        let entry = state.entries.get(&self.id)?;
        let spec = &entry.record.start.as_ref()?.spec;
        Some(Probes {
            address: entry.record.host.probe_address(entry.record.port?),
            readiness: spec.readiness_probe.clone(),
            liveness: spec.liveness_probe.clone(),
            startup_limit: spec.startup_limit(),
            adopted_after: entry.adopted.then(|| {
                let process = entry.record.process.as_ref();
                process.and_then(os::age).unwrap_or_default()
            }),
            resource_limits: self.shared.config.resource_limits.clone(),
            slots: self.shared.probes.clone(),
        })
    }

    /// Time from SIGTERM to SIGKILL if no request specifies it.
    fn grace(&self) -> Span {
        let state = self.shared.state();
        let entry = state.entries.get(&self.id);
        let grace = entry.and_then(|entry| entry.record.grace());
        grace.unwrap_or(self.shared.config.grace)
    }

    /// After the end of the process that is watched, watches another one of its group, if that serves on:
    /// it listens on the port, and the readiness probe succeeds.
    async fn follow_next(&mut self, port: u16, probes: &Probes) -> Result<(), WatchOutcome> {
        let (shared, group) = (self.shared.clone(), self.leader.group);
        let matcher = self.current_matcher().await;
        let find = async {
            let next = shared
                .retry_on_shortage("the check of a listening port", move |shared| {
                    let listening = sockets::listening(&matcher.pids()?)?;
                    let on_port = listening
                        .on(port)
                        .map(|pid| os::identity(pid, &shared.boot_id));
                    let on_port = on_port.collect::<io::Result<Vec<_>>>()?;
                    let mut on_port = on_port.into_iter().flatten();
                    Ok(on_port.find(|process| process.group_id() == group))
                })
                .await??;
            for _ in 0..PROBES_TO_SERVE_ON {
                if probes.is_ready().await {
                    return Some(next);
                }
            }
            None
        };
        let next = tokio::select! {
            biased;
            () = shared.released.cancelled() => return Err(WatchOutcome::Released),
            Some(removal) = self.removals.recv() => return Err(WatchOutcome::Remove(removal)),
            next = find => next.ok_or(WatchOutcome::Ended)?,
        };
        while !self.follow(&next)? {
            if shared.released.is_cancelled() {
                return Err(WatchOutcome::Released);
            }
            shared.pause().await;
        }
        let id = self.id.clone();
        tracing::info!(instance = %id, pid = next.pid, "its first process has ended, and another one serves on");
        let recorded = shared.run_blocking(move |shared| {
            shared.update(&id, |entry| {
                entry.record.process = Some(next);
                false
            });
            if let Err(error) = shared.persist(&id) {
                tracing::warn!(instance = %id, %error, "failed to record the process that serves on");
            }
            shared.update(&id, |_| true);
        });
        recorded.await;
        Ok(())
    }

    /// Returns false during a resource shortage.
    fn follow(&mut self, next: &ProcessIdentity) -> Result<bool, WatchOutcome> {
        match self.leader.follow(next, &self.shared.boot_id) {
            Ok(true) => Ok(true),
            Ok(false) => Err(WatchOutcome::Ended),
            Err(error) => {
                let resource_limits = &self.shared.config.resource_limits;
                resource_limits.report_shortage("the watch of an instance", &error);
                Ok(false)
            }
        }
    }

    fn set_phase(&self, phase: ObservedPhase) {
        self.shared.update(&self.id, |entry| {
            entry.phase = phase;
            true
        });
    }

    /// The leader is alive or has not been reaped, so the id of its group is its own.
    fn matcher(&self) -> ProcessMatcher {
        self.shared.matcher(&self.id, Some(self.leader.group))
    }

    async fn check_listens_on(&mut self, port: u16) -> Result<(), WatchOutcome> {
        let matcher = self.matcher();
        let shared = self.shared.clone();
        let check = shared.retry_on_shortage("the check of a listening port", move |_| {
            sockets::listening(&matcher.pids()?)
        });
        let listening = tokio::select! {
            biased;
            Some(removal) = self.removals.recv() => return Err(WatchOutcome::Remove(removal)),
            listening = check => listening.unwrap_or_default(),
        };
        if listening.has_port(port) {
            self.report_exposed(&listening).await;
            return Ok(());
        }
        // A process that is exiting closes its sockets before the exit is visible.
        if timeout(EXIT_TIMEOUT, self.leader.ended()).await.is_ok() {
            return Err(WatchOutcome::Ended);
        }
        Err(WatchOutcome::Failed(format!(
            "another process answers on its port {port}; the instance does not listen there"
        )))
    }

    /// Says in the logs which sockets others on the network reach without the gateway, although the instance
    /// was told to listen on loopback.
    async fn report_exposed(&self, listening: &Listening) {
        let (told, output) = {
            let state = self.shared.state();
            let record = state.entries.get(&self.id).map(|entry| &entry.record);
            let Some(record) = record else { return };
            let output = record.start.as_ref().and_then(|s| self.shared.output_of(s));
            (record.host.listen(), output)
        };
        for address in listening.exposed(told) {
            let (port, ip) = (address.port(), address.ip());
            let warning = format!(
                "port {port} is open to the network: the instance listens on {ip} although it was told {told}, so that others reach it without the gateway's authentication; pass `--host {{host}}` or $HOST to it in spec.command, or what it calls its address"
            );
            tracing::warn!(instance = %self.id, port, "{warning}");
            let Some(output) = output.clone() else {
                continue;
            };
            let written = self.shared.run_blocking(move |_| {
                let mut file = OpenOptions::new().append(true).open(output)?;
                // A single write, so that it does not mix with the output of the instance.
                file.write_all(format!("penstock: warning: {warning}\n").as_bytes())
            });
            if let Some(Err(error)) = written.await {
                tracing::warn!(instance = %self.id, %error, "failed to write to the log of the instance");
            }
        }
    }

    /// Whether it exited before it was ready and one of its ports is in use: most likely it could not bind.
    async fn is_port_taken(&self) -> bool {
        if self.was_ready || !self.leader.is_child() {
            return false;
        }
        let bound = {
            let state = self.shared.state();
            let record = state.entries.get(&self.id).map(|entry| &entry.record);
            record.map(|record| (record.host.listen(), record.all_ports().collect::<Vec<_>>()))
        };
        let Some((listen, ports)) = bound else {
            return false;
        };
        let check = self
            .shared
            .retry_on_shortage("the check of a port", move |_| {
                launch::is_any_port_taken(listen, &ports)
            });
        check.await.unwrap_or(false)
    }

    /// Starts the instance again on another port. Returns false if it ended instead, which has been
    /// reported.
    async fn restart_on_new_port(&mut self) -> bool {
        self.terminate(Span::ZERO).await;
        self.leader.reap();
        loop {
            let id = self.id.clone();
            let started = self.shared.run_blocking(move |shared| {
                let start =
                    start_spec(shared, &id).ok_or_else(|| "its record is gone".to_owned())?;
                shared.start(&start)
            });
            let error = match started.await {
                Some(Ok(leader)) => {
                    self.leader = leader;
                    return true;
                }
                Some(Err(StartError::Shortage(error))) => error,
                Some(Err(StartError::Refused(detail))) => {
                    self.record_exit(None, detail).await;
                    return false;
                }
                None => {
                    self.record_exit(None, "its start failed".into()).await;
                    return false;
                }
            };
            let resource_limits = &self.shared.config.resource_limits;
            resource_limits.report_shortage("the start of an instance", &error);
            tokio::select! {
                () = self.shared.released.cancelled() => return false,
                Some(_) = self.removals.recv() => {
                    self.record_exit(None, "was never started".into()).await;
                    return false;
                }
                () = sleep(SHORTAGE_RETRY_PAUSE) => {}
            }
        }
    }

    /// Ends all processes of the instance and reports how it ended. `reason` is set if Penstock ended it.
    async fn end(mut self, grace: Span, reason: Option<String>) {
        let shared = self.shared.clone();
        let deadline = Instant::now() + grace.to_std();
        tokio::select! {
            () = shared.released.cancelled() => return,
            () = self.terminate(grace) => {}
        }
        tokio::select! {
            () = shared.released.cancelled() => return,
            () = self.end_writers(deadline) => {}
        }
        let (code, how) = self.leader.reap();
        let code = if reason.is_some() { None } else { code };
        let mut reason = reason.unwrap_or(how);
        if let Some(left) = self.left_behind().await {
            tracing::warn!(instance = %self.id, left, "processes may be left of an ended instance");
            reason = format!("{reason}; {left}");
        }
        self.record_exit(code, reason).await;
    }

    /// Ends processes that have left the group, cleared their environment, and kept the output.
    async fn end_writers(&self, deadline: Instant) {
        let mut signal = Signal::TERM;
        let deadline = deadline.max(Instant::now() + STRAY_GRACE.to_std());
        for pause in POLL_BACKOFF.build() {
            let Some(output) = self.locked_output().await else {
                return;
            };
            let mut matcher = self.current_matcher().await;
            matcher.output = Some(output);
            let sent = self
                .shared
                .run_blocking(move |_| matcher.signal(signal))
                .await;
            // Those that cannot be seen cannot be ended either.
            if matches!(sent, None | Some(Ok(0))) {
                return;
            }
            if Instant::now() >= deadline {
                signal = Signal::KILL;
            }
            sleep(pause).await;
        }
    }

    /// The output of the instance, if a process still has it open.
    async fn locked_output(&self) -> Option<PathBuf> {
        let output = self.shared.output(&self.id)?;
        let checked = output.clone();
        let check = self
            .shared
            .retry_on_shortage("the check of an output", move |_| {
                launch::is_output_locked(&checked)
            });
        check.await?.then_some(output)
    }

    /// Checked several times: a child of Penstock between fork and exec briefly holds copies of what Penstock
    /// has open for a check.
    async fn output_still_locked(&self) -> Option<PathBuf> {
        let mut output = None;
        for pause in POLL_BACKOFF.build().take(LOCK_CHECKS) {
            output = Some(self.locked_output().await?);
            sleep(pause).await;
        }
        output
    }

    /// What shows that processes may be left, ended or found by nothing: known ones that may not be
    /// signalled, who holds the output or the port.
    async fn left_behind(&self) -> Option<String> {
        let output = self.output_still_locked().await;
        // The group's id may be another's by now.
        let matcher = self.shared.matcher(&self.id, None);
        let known = self
            .shared
            .retry_on_shortage("the check of processes", move |_| matcher.names())
            .await?;
        let port = {
            let state = self.shared.state();
            state.entries.get(&self.id)?.record.port?
        };
        let listeners = self
            .shared
            .retry_on_shortage("the check of a port", move |_| sockets::listeners(port))
            .await?;
        let running = known
            .iter()
            .map(|(pid, name)| format!("process {pid} ({name}) may not be ended by Penstock"));
        let listening = listeners
            .iter()
            .map(|(pid, name)| format!("process {pid} ({name}) listens on its port {port}"));
        let writing = output.map(|output| {
            let path = output.display();
            format!("a process that cannot be inspected still has {path} open")
        });
        let left: Vec<String> = running.chain(listening).chain(writing).collect();
        (!left.is_empty()).then(|| left.join(", "))
    }

    /// Sends SIGTERM, then SIGKILL; returns once no process of the instance runs any more.
    async fn terminate(&self, grace: Span) {
        let deadline = Instant::now() + grace.to_std();
        self.find_family().await;
        self.signal(Signal::TERM).await;
        if timeout_at(deadline, self.leader.ended()).await.is_ok()
            && self.wait_until_gone(deadline).await
        {
            return;
        }
        // Repeat, for processes forked between the scan and the signal.
        for pause in POLL_BACKOFF.build() {
            if self.signal(Signal::KILL).await == Some(0) {
                break;
            }
            sleep(pause).await;
        }
        self.leader.ended().await;
    }

    /// Looks for processes that left the group and cleared their environment while their parents run.
    async fn find_family(&self) {
        let (id, group) = (self.id.clone(), self.current_matcher().await.group);
        let found = self
            .shared
            .run_blocking(move |shared| shared.find_family(&id, group));
        if let Some(Err(error)) = found.await {
            let resource_limits = &self.shared.config.resource_limits;
            resource_limits.report_shortage("the search for processes of an instance", &error);
        }
    }

    async fn wait_until_gone(&self, deadline: Instant) -> bool {
        for pause in POLL_BACKOFF.build() {
            if self.count_live_processes().await == Some(0) {
                return true;
            }
            if Instant::now() + pause > deadline {
                break;
            }
            sleep(pause).await;
        }
        false
    }

    /// While the leader is alive, or the first process an unreaped child, the id of its group is its own. For an
    /// adopted leader that has exited, only the tags in the environment count.
    async fn current_matcher(&self) -> ProcessMatcher {
        let ended = timeout_at(Instant::now(), self.leader.ended())
            .await
            .is_ok();
        let has_own_group = self.leader.is_child() || !ended;
        let group = has_own_group.then_some(self.leader.group);
        self.shared.matcher(&self.id, group)
    }

    /// Signals every process of the instance and returns how many there were. Returns `None` if they
    /// could not all be found; the leader and its group are signalled even then.
    async fn signal(&self, signal: Signal) -> Option<usize> {
        let matcher = self.current_matcher().await;
        let sent = self
            .shared
            .run_blocking(move |_| matcher.signal(signal))
            .await?;
        sent.inspect_err(|error| {
            let resource_limits = &self.shared.config.resource_limits;
            resource_limits.report_shortage("the end of an instance", error);
            self.leader.signal(signal);
        })
        .ok()
    }

    /// Returns `None` if the processes cannot be listed now.
    async fn count_live_processes(&self) -> Option<usize> {
        let matcher = self.current_matcher().await;
        let counted = self.shared.run_blocking(move |_| matcher.pids()).await?;
        Some(counted.ok()?.len())
    }

    async fn record_exit(&self, code: Option<i32>, reason: String) {
        let id = self.id.clone();
        let recorded = self
            .shared
            .run_blocking(move |shared| shared.record_exit(&id, code, reason));
        // Fails only while the runtime shuts down, when nobody is left to report to.
        let _ = recorded.await;
    }
}

fn start_spec(shared: &Shared, id: &InstanceId) -> Option<StartSpec> {
    let state = shared.state();
    state.entries.get(id)?.record.start.clone()
}
