//! The behaviour of instances, and the node's reports.

use contract::events::{Event, InstanceEnded, InstanceEvent, InstanceStarted, InstanceUnready};
use contract::ids::InstanceId;
use contract::log::{Actor, StreamKind};
use contract::time::{Span, Timestamp};
use domain::instances::Phase;
use domain::instances::plan::backoff_until;

use super::{Endpoint, FollowUps, Task};
use crate::installation::SharedState;

impl Endpoint {
    /// Schedules the node's reports after a request.
    pub(super) fn schedule_node_reports(
        &mut self,
        event: &Event,
        now: Timestamp,
        follow_ups: &mut FollowUps,
    ) {
        let mut after = |millis: std::ops::Range<u64>, task| {
            let millis = self.rng.u64(millis);
            follow_ups.push((now + Span::from_millis(millis), task));
        };
        match event {
            Event::InstanceRequested(requested) => {
                after(20..300, Task::Started(requested.id.clone()));
                let fails = self.rng.u32(0..50) == 0;
                let begun = match fails {
                    true => Task::Failed(requested.id.clone()),
                    false => Task::Ready(requested.id.clone()),
                };
                let millis = self.rng.u64(1_500..9_000);
                follow_ups.push((now + Span::from_millis(millis), begun));
            }
            Event::InstanceDraining(draining) => {
                after(1_000..6_000, Task::Drained(draining.id.clone()));
            }
            Event::InstanceRemovalRequested(removal) => {
                after(50..2_000, Task::Stopped(removal.id.clone()));
            }
            _ => {}
        }
    }

    pub(super) fn started(
        &mut self,
        id: InstanceId,
        now: Timestamp,
        shared: &mut SharedState,
    ) -> anyhow::Result<()> {
        let [a, b, c] = [(); 3].map(|()| self.rng.u8(1..255));
        let generation = match self.fold.instances.instances.get(&id) {
            Some(instance) => instance.generation,
            None => return Ok(()),
        };
        let started = InstanceStarted {
            id,
            generation,
            address: format!("127.{a}.{b}.{c}:1"),
            pid: None,
            adopted: false,
        };
        self.report(Event::InstanceStarted(started), now, shared)
    }

    pub(super) fn ready(
        &mut self,
        id: InstanceId,
        now: Timestamp,
        shared: &mut SharedState,
    ) -> anyhow::Result<()> {
        let lives = self.is_in(&id, &[Phase::Starting, Phase::Unready]);
        match lives {
            true => self.report(Event::InstanceReady(InstanceEvent { id }), now, shared),
            false => Ok(()),
        }
    }

    pub(super) fn failed(
        &mut self,
        id: InstanceId,
        now: Timestamp,
        shared: &mut SharedState,
    ) -> anyhow::Result<()> {
        let reason = match self.is_in(&id, &[Phase::Starting]) {
            true => "a simulated start that failed",
            false => "a simulated crash",
        };
        if !self.is_in(&id, &[Phase::Starting, Phase::Ready, Phase::Unready]) {
            return Ok(());
        }
        let failed = ended(id, reason, Some(1));
        self.report(Event::InstanceFailed(failed), now, shared)
    }

    pub(super) fn unready(
        &mut self,
        id: InstanceId,
        now: Timestamp,
        shared: &mut SharedState,
        follow_ups: &mut FollowUps,
    ) -> anyhow::Result<()> {
        if !self.is_in(&id, &[Phase::Ready]) {
            return Ok(());
        }
        let unready = InstanceUnready {
            id: id.clone(),
            reason: "GET /health/ready was answered with 503".to_owned(),
        };
        follow_ups.push((now + Span::from_secs(4), Task::Ready(id)));
        self.report(Event::InstanceUnready(unready), now, shared)
    }

    pub(super) fn stopped(
        &mut self,
        id: InstanceId,
        now: Timestamp,
        shared: &mut SharedState,
    ) -> anyhow::Result<()> {
        self.drained.remove(&id);
        let stopped = ended(id, "removed", Some(0));
        self.report(Event::InstanceStopped(stopped), now, shared)
    }

    /// A ready instance, if there is one.
    pub(super) fn any_ready(&self) -> Option<InstanceId> {
        let mut instances = self.fold.instances.instances.values();
        let ready = instances.find(|instance| instance.is_ready())?;
        Some(ready.id.clone())
    }

    /// Schedules the planner's retry after a failure.
    pub(super) fn back_off(&self, now: Timestamp, follow_ups: &mut FollowUps) {
        for history in self.fold.instances.starts.values() {
            if let Some(until) = backoff_until(history).filter(|until| *until > now) {
                follow_ups.push((until, Task::Wake));
            }
        }
    }

    fn is_in(&self, id: &InstanceId, phases: &[Phase]) -> bool {
        let instance = self.fold.instances.instances.get(id);
        instance
            .is_some_and(|instance| instance.removal.is_none() && phases.contains(&instance.phase))
    }

    fn report(
        &mut self,
        event: Event,
        now: Timestamp,
        shared: &mut SharedState,
    ) -> anyhow::Result<()> {
        let actor = Actor::service("actuator");
        self.append(StreamKind::Node, &actor, now, event, shared)?;
        Ok(())
    }
}

fn ended(id: InstanceId, reason: &str, exit_code: Option<i32>) -> InstanceEnded {
    InstanceEnded {
        id,
        reason: reason.to_owned(),
        exit_code,
    }
}
