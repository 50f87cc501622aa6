//! One request from the choice of its deployment to its end, as it is counted.
//!
//! Invariant: every request is counted exactly once as an arrival and exactly once as an outcome,
//! and what it held is given back, however it ends.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use contract::resources::ModelClientErrors;

use crate::admission::{DeploymentState, Slot};
use crate::arrivals::Place;
use crate::body::Upload;
use crate::outcome::Outcome;
use crate::router::{Deployment, Endpoint};
use crate::shard::{SharedShard, lock};
use crate::timer::now_us;

/// What the flights of one thread share.
#[derive(Debug)]
pub struct ThreadMeter {
    pub shard: SharedShard,
    /// Set when requests that are still running are cut off: they did not leave, we did.
    pub cutting: Rc<Cell<bool>>,
}

#[derive(Debug)]
enum Phase {
    Arrived,
    Queued,
    Serving(Slot),
}

/// One request from the choice of its deployment to its end. Dropped without a word on its
/// outcome, the client has left. Its slot is given back, and it is counted, exactly once.
#[derive(Debug)]
pub struct Flight {
    meter: Rc<ThreadMeter>,
    endpoint: Arc<Endpoint>,
    deployment: usize,
    arrived_us: u64,
    /// Where its arrival stands among those that have not ended.
    place: Place,
    phase: Phase,
    admitted: bool,
    outcome: Option<Outcome>,
    /// The first digit of the status that the client gets; 0: none so far.
    status_class: u8,
    ended_us: Option<u64>,
    upload: Rc<Upload>,
    pub response_bytes: u64,
}

impl Flight {
    pub fn new(
        meter: Rc<ThreadMeter>,
        endpoint: Arc<Endpoint>,
        deployment: usize,
        arrived_us: u64,
        upload: Rc<Upload>,
    ) -> Self {
        let slot = endpoint.deployments[deployment].state.meter_slot;
        let mut shard = lock(&meter.shard);
        let cell = shard.cell(slot);
        cell.arrivals += 1;
        let place = cell.open.enter(arrived_us);
        drop(shard);
        Self {
            meter,
            endpoint,
            deployment,
            arrived_us,
            place,
            phase: Phase::Arrived,
            admitted: false,
            outcome: None,
            status_class: 0,
            ended_us: None,
            upload,
            response_bytes: 0,
        }
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// When a body that is read whole must have come.
    pub fn body_deadline_us(&self) -> u64 {
        self.arrived_us + self.deployment().timeout_us
    }

    pub fn deployment(&self) -> &Deployment {
        &self.endpoint.deployments[self.deployment]
    }

    fn state(&self) -> &Arc<DeploymentState> {
        &self.endpoint.deployments[self.deployment].state
    }

    pub fn admit(&mut self) -> bool {
        let deployment = self.deployment();
        self.admitted = deployment.state.admit(deployment.limit);
        self.admitted
    }

    pub fn queue(&mut self) {
        let state = self.state().clone();
        state.queued.enter();
        lock(&self.meter.shard)
            .cell(state.meter_slot)
            .queued
            .enter(now_us());
        self.phase = Phase::Queued;
    }

    pub fn serve(&mut self, slot: Slot, at_us: u64) {
        let state = self.state().clone();
        {
            let mut shard = lock(&self.meter.shard);
            let cell = shard.cell(state.meter_slot);
            match &self.phase {
                Phase::Queued => {
                    cell.queued.leave(at_us);
                    cell.serving.enter(at_us);
                }
                Phase::Arrived => cell.serving.enter(at_us),
                // A second try: the request is being served all along.
                Phase::Serving(first) => cell.on_instance(first).leave(at_us),
            }
            cell.on_instance(&slot).enter(at_us);
        }
        match self.phase {
            Phase::Queued => {
                state.queued.leave();
                state.serving.enter();
            }
            Phase::Arrived => state.serving.enter(),
            Phase::Serving(_) => {}
        }
        self.phase = Phase::Serving(slot);
    }

    pub fn slot(&self) -> Option<&Slot> {
        match &self.phase {
            Phase::Serving(slot) => Some(slot),
            _ => None,
        }
    }

    /// What the client gets, or has got by now if it gets only a part of the answer.
    pub fn answer(&mut self, status: http::StatusCode) {
        self.status_class = (status.as_u16() / 100) as u8;
    }

    /// The first word counts.
    pub fn set_outcome(&mut self, outcome: Outcome) {
        self.outcome.get_or_insert(outcome);
    }

    pub fn end(mut self, outcome: Outcome) {
        self.set_outcome(outcome);
    }

    /// The same, where the clock has just been read.
    pub fn end_at(mut self, outcome: Outcome, at_us: u64) {
        self.set_outcome(outcome);
        self.ended_us = Some(at_us);
    }

    pub fn arrived_us(&self) -> u64 {
        self.arrived_us
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let cut = self.meter.cutting.get();
        let left = if cut {
            Outcome::Internal
        } else {
            Outcome::ClientLeft
        };
        let outcome = self.outcome.unwrap_or(left);
        let at_us = self.ended_us.unwrap_or_else(now_us);
        let latency = at_us.saturating_sub(self.arrived_us);
        let endpoint = &self.endpoint;
        let deployment = &endpoint.deployments[self.deployment];
        let good = match outcome {
            Outcome::Success => true,
            Outcome::ModelClientError => endpoint.model_client_errors == ModelClientErrors::Good,
            _ => false,
        };
        let mut shard = lock(&self.meter.shard);
        let cell = shard.cell(deployment.state.meter_slot);
        outcome.count(&mut cell.outcomes);
        if let Some(count) = cell.status_classes.get_mut(usize::from(self.status_class)) {
            *count += 1;
        }
        cell.open.leave(self.place);
        cell.request_bytes += self.upload.bytes.get();
        cell.response_bytes += self.response_bytes;
        if outcome.has_latency() {
            cell.latency.record(latency);
        }
        if good {
            for threshold in &deployment.thresholds_us {
                if latency <= *threshold {
                    *cell.at_or_below.entry(*threshold).or_default() += 1;
                }
            }
        }
        match &self.phase {
            Phase::Arrived => {}
            Phase::Queued => cell.queued.leave(at_us),
            Phase::Serving(slot) => {
                cell.serving.leave(at_us);
                cell.on_instance(slot).leave(at_us);
            }
        }
        drop(shard);
        let state = &deployment.state;
        match self.phase {
            Phase::Arrived => {}
            Phase::Queued => state.queued.leave(),
            Phase::Serving(_) => state.serving.leave(),
        }
        if self.admitted {
            state.leave();
        }
        if let Phase::Serving(slot) = &mut self.phase {
            slot.ended_us = Some(at_us);
        }
        // The slot goes last, with the phase: whoever gets it finds us gone from the counts.
    }
}
