//! Looks after one instance from its start, or adoption, to its end: probes, removal, exit.
//!
//! Invariant: nothing that this process lacks ends the watch, or lets a removal rest: what cannot be
//! seen or signalled now is tried again until it is done.

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use contract::ids::InstanceId;
use contract::time::Span;
use rustix::process::Signal;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::lack::LACK_PAUSE;
use super::launch::{self, StartError};
use super::os::{Leader, Membership};
use super::probe::{Probes, Verdict};
use super::{Removal, Shared};
use crate::{ObservedPhase, Order};

/// What an instance leaves behind when it ends by itself gets this long to end as well.
const STRAY_GRACE: Span = Span::from_secs(2);

/// From the closing of its sockets to the end of a process.
const ENDING_MAX: Duration = Duration::from_secs(1);

/// How often a port is chosen anew because somebody took it before the instance bound it.
const BIND_TRIES: u32 = 3;

/// Between two looks whether all processes are gone.
const LOOKS: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_millis(5))
    .with_max_delay(Duration::from_millis(200))
    .without_max_times();

/// Why the watch over an instance has come to its end.
enum Outcome {
    Released,
    Ended,
    Remove(Removal),
    Hopeless(String),
}

pub(super) fn spawn(
    shared: &Arc<Shared>,
    id: InstanceId,
    leader: Leader,
    orders: mpsc::Receiver<Removal>,
) {
    let supervisor = Supervisor {
        shared: shared.clone(),
        id,
        leader,
        orders,
        was_ready: false,
    };
    shared.tasks.spawn(supervisor.run());
}

struct Supervisor {
    shared: Arc<Shared>,
    id: InstanceId,
    leader: Leader,
    orders: mpsc::Receiver<Removal>,
    was_ready: bool,
}

/// Aborts a task when nobody waits for it any more.
struct Abort(JoinHandle<()>);

impl Drop for Abort {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Supervisor {
    async fn run(mut self) {
        for attempt in 1.. {
            match self.watch().await {
                Outcome::Released => return,
                Outcome::Remove(removal) => return self.end(removal.grace, None).await,
                Outcome::Hopeless(reason) => {
                    let grace = self.shared.config.grace;
                    return self.end(grace, Some(reason)).await;
                }
                Outcome::Ended if attempt < BIND_TRIES && self.port_was_taken().await => {
                    if !self.start_again().await {
                        return;
                    }
                }
                Outcome::Ended => return self.end(STRAY_GRACE, None).await,
            }
        }
    }

    /// Probes the instance until something has to be done about it.
    async fn watch(&mut self) -> Outcome {
        let (sender, mut verdicts) = mpsc::channel(4);
        let Some(probes) = self.probes() else {
            return Outcome::Hopeless("its record names no port".into());
        };
        let port = probes.address.port();
        let _probing = Abort(tokio::spawn(probes.run(sender)));
        loop {
            let verdict = tokio::select! {
                biased;
                () = self.shared.released.cancelled() => return Outcome::Released,
                Some(removal) = self.orders.recv() => return Outcome::Remove(removal),
                () = self.leader.ended() => return Outcome::Ended,
                Some(verdict) = verdicts.recv() => verdict,
            };
            match verdict {
                Verdict::Ready => {
                    if !self.was_ready
                        && let Err(outcome) = self.check_that_it_listens_on(port).await
                    {
                        return outcome;
                    }
                    self.was_ready = true;
                    self.observe(ObservedPhase::Ready);
                }
                Verdict::Unready(reason) => self.observe(ObservedPhase::Unready { reason }),
                Verdict::Hopeless(reason) => return Outcome::Hopeless(reason),
            }
        }
    }

    fn probes(&self) -> Option<Probes> {
        let state = self.shared.state();
        let entry = state.entries.get(&self.id)?;
        let spec = &entry.record.order.as_ref()?.spec;
        Some(Probes {
            address: entry.record.host.probed(entry.record.port?),
            readiness: spec.readiness_probe.clone(),
            liveness: spec.liveness_probe.clone(),
            adopted: entry.adopted,
            means: self.shared.config.means.clone(),
            room: self.shared.probes.clone(),
        })
    }

    fn observe(&self, phase: ObservedPhase) {
        self.shared.update(&self.id, |entry| {
            entry.phase = phase;
            true
        });
    }

    /// The leader lives or has not been reaped, so its number is its group's.
    fn membership(&self) -> Membership {
        self.shared.membership(&self.id, Some(self.leader.pid))
    }

    async fn check_that_it_listens_on(&mut self, port: u16) -> Result<(), Outcome> {
        let membership = self.membership();
        let shared = self.shared.clone();
        let looking = shared.until_done("a look at who listens on a port", move |_| {
            membership.listens_on(port)
        });
        let listens = tokio::select! {
            biased;
            Some(removal) = self.orders.recv() => return Err(Outcome::Remove(removal)),
            listens = looking => listens,
        };
        if listens.unwrap_or(true) {
            return Ok(());
        }
        // One that is just ending has closed its sockets before that can be seen.
        if timeout(ENDING_MAX, self.leader.ended()).await.is_ok() {
            return Err(Outcome::Ended);
        }
        Err(Outcome::Hopeless(format!(
            "another process answers on its port {port}; the instance does not listen there"
        )))
    }

    /// It ended before it was ready, and somebody else has its port: most likely it could not bind.
    async fn port_was_taken(&self) -> bool {
        if self.was_ready || !self.leader.is_child() {
            return false;
        }
        let place = {
            let state = self.shared.state();
            let record = state.entries.get(&self.id).map(|entry| &entry.record);
            record.and_then(|record| Some((record.host.listen(), record.port?)))
        };
        let Some((listen, port)) = place else {
            return false;
        };
        let looking = self
            .shared
            .until_done("a look at a port", move |_| launch::is_taken(listen, port));
        looking.await.unwrap_or(false)
    }

    /// Once more with another port. False: it is over, and that has been told.
    async fn start_again(&mut self) -> bool {
        self.clear_away(Span::ZERO).await;
        self.leader.reap();
        loop {
            let id = self.id.clone();
            let started = self.shared.work(move |shared| {
                let order = order(shared, &id).ok_or_else(|| "its record is gone".to_owned())?;
                shared.start(&order)
            });
            let error = match started.await {
                Some(Ok(leader)) => {
                    self.leader = leader;
                    return true;
                }
                Some(Err(StartError::Lack(error))) => error,
                Some(Err(StartError::Refused(detail))) => {
                    self.over(None, detail).await;
                    return false;
                }
                None => {
                    self.over(None, "its start failed".into()).await;
                    return false;
                }
            };
            let means = &self.shared.config.means;
            means.lack("the start of an instance", &error);
            tokio::select! {
                () = self.shared.released.cancelled() => return false,
                Some(_) = self.orders.recv() => {
                    self.over(None, "was never started".into()).await;
                    return false;
                }
                () = sleep(LACK_PAUSE) => {}
            }
        }
    }

    /// Ends all processes of the instance and tells how it ended. `reason`: ours, if it was us.
    async fn end(mut self, grace: Span, reason: Option<String>) {
        let shared = self.shared.clone();
        tokio::select! {
            () = shared.released.cancelled() => return,
            () = self.clear_away(grace) => {}
        }
        let (code, how) = self.leader.reap();
        let code = if reason.is_some() { None } else { code };
        self.over(code, reason.unwrap_or(how)).await;
    }

    /// Polite first, and returns when nothing of the instance runs any more.
    async fn clear_away(&self, grace: Span) {
        let deadline = Instant::now() + grace.to_std();
        self.signal(Signal::TERM).await;
        if timeout_at(deadline, self.leader.ended()).await.is_ok()
            && self.wait_until_gone(deadline).await
        {
            return;
        }
        // Again and again, for what forks between the look and the signal.
        for pause in LOOKS.build() {
            if self.signal(Signal::KILL).await == Some(0) {
                break;
            }
            sleep(pause).await;
        }
        self.leader.ended().await;
    }

    async fn wait_until_gone(&self, deadline: Instant) -> bool {
        for pause in LOOKS.build() {
            if self.members_living().await == Some(0) {
                return true;
            }
            if Instant::now() + pause > deadline {
                break;
            }
            sleep(pause).await;
        }
        false
    }

    /// While the leader lives, or is a child of ours that is not reaped yet, its number names its
    /// group; for an adopted one that has ended only the marks in the environment count.
    async fn current_membership(&self) -> Membership {
        let ended = timeout_at(Instant::now(), self.leader.ended())
            .await
            .is_ok();
        let ours = self.leader.is_child() || !ended;
        let group = ours.then_some(self.leader.pid);
        self.shared.membership(&self.id, group)
    }

    /// To everything that belongs to the instance. None: not all of it could be seen, and what can
    /// be reached without looking has got the signal.
    async fn signal(&self, signal: Signal) -> Option<usize> {
        let membership = self.current_membership().await;
        let sent = self.shared.work(move |_| membership.signal(signal)).await?;
        sent.inspect_err(|error| {
            let means = &self.shared.config.means;
            means.lack("the end of an instance", error);
            self.leader.signal(signal);
        })
        .ok()
    }

    /// None: it cannot be seen now.
    async fn members_living(&self) -> Option<usize> {
        let membership = self.current_membership().await;
        let counted = self.shared.work(move |_| membership.living()).await?;
        Some(counted.ok()?.len())
    }

    async fn over(&self, code: Option<i32>, reason: String) {
        let id = self.id.clone();
        let told = self
            .shared
            .work(move |shared| shared.over(&id, code, reason));
        // It fails only if the runtime shuts down, and then there is nobody to tell.
        let _ = told.await;
    }
}

fn order(shared: &Shared, id: &InstanceId) -> Option<Order> {
    let state = shared.state();
    state.entries.get(id)?.record.order.clone()
}
