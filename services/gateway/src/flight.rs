//! The life of one request, from the choice of its deployment to its end, and how it is counted.
//!
//! ```text
//! Arrived -> Admitted -> (Queued ->) Served -> Answering -> Ended
//! ```
//!
//! Each phase holds what a request has while it is in it, so none can be had without what comes
//! before: no slot without an admission, no answer without a slot. A request may end in every phase,
//! and its phase says what is counted and given back. Only the functions of `Flight` lead from one
//! phase to another; called out of turn they change nothing and refuse the request.
//!
//! Invariant: every request is counted exactly once as an arrival and exactly once as an outcome,
//! and what it held is given back after that, the slot last, however it ends.

use std::cell::Cell;
use std::mem::replace;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use contract::resources::ModelClientErrors;
use http::StatusCode;

use crate::admission::{Pending, Slot, Waiting};
use crate::arrivals::Place;
use crate::body::Upload;
use crate::instance::Instance;
use crate::outcome::Outcome;
use crate::reply::Refusal;
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

/// Where a request is in its life, and all that it holds there.
#[derive(Debug)]
enum Phase {
    /// Its body is awaited, as far as that is read whole.
    Arrived,
    /// One of the deployment's pending requests, with nowhere to go yet.
    Admitted(Pending),
    /// In the queue for a slot.
    Queued(Pending, Waiting),
    /// On an instance that has not begun to answer.
    Served(Pending, Slot),
    /// The head of a model's answer is on its way to the client, the body follows.
    Answering(Pending, Slot, Answer),
    /// Counted, and without anything.
    Ended,
}

/// What the client gets of a model.
#[derive(Debug)]
struct Answer {
    status: StatusCode,
    outcome: Outcome,
    bytes: u64,
}

/// One request on its way through its phases. Dropped before its end, the client has left.
#[derive(Debug)]
pub struct Flight {
    meter: Rc<ThreadMeter>,
    endpoint: Arc<Endpoint>,
    deployment: usize,
    arrived_us: u64,
    /// Where its arrival stands among those that have not ended.
    place: Place,
    upload: Rc<Upload>,
    phase: Phase,
}

impl Flight {
    /// A request arrives.
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
            upload,
            phase: Phase::Arrived,
        }
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub fn deployment(&self) -> &Deployment {
        &self.endpoint.deployments[self.deployment]
    }

    pub fn arrived_us(&self) -> u64 {
        self.arrived_us
    }

    /// When a body that is read whole must have come.
    pub fn body_deadline_us(&self) -> u64 {
        self.arrived_us + self.deployment().timeout_us
    }

    /// The instance that the request is on.
    pub fn instance(&self) -> Result<&Arc<Instance>, Refusal> {
        match &self.phase {
            Phase::Served(_, slot) | Phase::Answering(_, slot, _) => Ok(&slot.instance),
            _ => Err(self.out_of_turn("asked an instance")),
        }
    }

    /// Arrived: the request becomes one of the pending, unless there are too many.
    pub fn admit(&mut self) -> Result<(), Refusal> {
        let Phase::Arrived = self.phase else {
            return Err(self.out_of_turn("admitted"));
        };
        let deployment = self.deployment();
        let pending = deployment.state.admit(deployment.limit);
        let pending = pending.ok_or(Refusal::TooManyPending {
            retry_after_secs: deployment.retry_after_secs(),
        })?;
        self.phase = Phase::Admitted(pending);
        Ok(())
    }

    /// Admitted: served at once if a slot is free; whether one was.
    pub fn try_serve(&mut self, rotation: usize, at_us: u64) -> Result<bool, Refusal> {
        let Some(slot) = self.deployment().state.try_slot(rotation, at_us) else {
            return Ok(false);
        };
        self.serve(slot, at_us)?;
        Ok(true)
    }

    /// Admitted: the request stands in the queue from now on.
    pub fn queue(&mut self) -> Result<(), Refusal> {
        let pending = match replace(&mut self.phase, Phase::Ended) {
            Phase::Admitted(pending) => pending,
            other => return Err(self.stay(other, "queued")),
        };
        let state = &self.deployment().state;
        let waiting = state.wait(|| {
            let mut shard = lock(&self.meter.shard);
            shard.cell(state.meter_slot).queued.enter(now_us());
        });
        self.phase = Phase::Queued(pending, waiting);
        Ok(())
    }

    /// Queued: served when its turn comes; since when, in microseconds of `now_us`.
    pub fn poll_served(&mut self, cx: &mut Context<'_>) -> Poll<Result<u64, Refusal>> {
        let Phase::Queued(_, waiting) = &mut self.phase else {
            return Poll::Ready(Err(self.out_of_turn("waiting for a slot")));
        };
        let Some(slot) = ready!(waiting.poll(cx)) else {
            return Poll::Ready(Err(self.out_of_turn("given a slot")));
        };
        let at_us = now_us();
        Poll::Ready(self.serve(slot, at_us).map(|()| at_us))
    }

    /// Admitted or queued: the request goes to the slot's instance.
    fn serve(&mut self, slot: Slot, at_us: u64) -> Result<(), Refusal> {
        let (pending, waiting) = match replace(&mut self.phase, Phase::Ended) {
            Phase::Admitted(pending) => (pending, None),
            Phase::Queued(pending, waiting) => (pending, Some(waiting)),
            other => return Err(self.stay(other, "served")),
        };
        let state = &self.endpoint.deployments[self.deployment].state;
        let mut shard = lock(&self.meter.shard);
        let cell = shard.cell(state.meter_slot);
        if waiting.is_some() {
            cell.queued.leave(at_us);
        }
        cell.serving.enter(at_us);
        cell.on_instance(&slot).enter(at_us);
        drop(shard);
        drop(waiting);
        state.serving.enter();
        self.phase = Phase::Served(pending, slot);
        Ok(())
    }

    /// Served: the request goes to another instance, being served all along; false where there is
    /// none that takes it.
    pub fn move_on(&mut self, rotation: usize) -> Result<bool, Refusal> {
        let from = self.instance()?;
        let Some(slot) = self.deployment().state.other_slot(from, rotation) else {
            return Ok(false);
        };
        let (pending, first) = match replace(&mut self.phase, Phase::Ended) {
            Phase::Served(pending, first) => (pending, first),
            other => return Err(self.stay(other, "served elsewhere")),
        };
        let at_us = now_us();
        let mut shard = lock(&self.meter.shard);
        let cell = shard.cell(self.deployment().state.meter_slot);
        cell.on_instance(&first).leave(at_us);
        cell.on_instance(&slot).enter(at_us);
        drop(shard);
        self.phase = Phase::Served(pending, slot);
        first.end(at_us);
        Ok(true)
    }

    /// Served: the instance answers. `status` is what the client gets, `outcome` what becomes of the
    /// request if the answer comes whole.
    pub fn answer(&mut self, status: StatusCode, outcome: Outcome) -> Result<(), Refusal> {
        let (pending, slot) = match replace(&mut self.phase, Phase::Ended) {
            Phase::Served(pending, slot) => (pending, slot),
            other => return Err(self.stay(other, "answered")),
        };
        let answer = Answer {
            status,
            outcome,
            bytes: 0,
        };
        self.phase = Phase::Answering(pending, slot, answer);
        Ok(())
    }

    /// Answering: so many bytes of the body go to the client.
    pub fn pass_on(&mut self, bytes: usize) {
        if let Phase::Answering(_, _, answer) = &mut self.phase {
            answer.bytes += bytes as u64;
        }
    }

    /// Answering: the answer is whole.
    pub fn end_whole(mut self, at_us: u64) {
        if let Phase::Answering(_, _, answer) = &self.phase {
            self.end(answer.outcome, None, at_us);
        }
    }

    /// Answering: the answer broke off, for a reason of the instance.
    pub fn end_broken(mut self, outcome: Outcome) {
        self.end(outcome, None, now_us());
    }

    /// Before an answer: the client gets a refusal.
    pub fn end_refused(mut self, refusal: Refusal) {
        self.end(refusal.outcome(), Some(refusal.status()), now_us());
    }

    /// The only end: counts, then gives back what the phase holds. `refused` is the status of who
    /// got no answer of a model.
    fn end(&mut self, outcome: Outcome, refused: Option<StatusCode>, at_us: u64) {
        let phase = replace(&mut self.phase, Phase::Ended);
        self.count(&phase, outcome, refused, at_us);
        let state = &self.deployment().state;
        match phase {
            Phase::Arrived | Phase::Ended => {}
            Phase::Admitted(pending) => drop(pending),
            Phase::Queued(pending, waiting) => {
                drop(waiting);
                drop(pending);
            }
            Phase::Served(pending, slot) | Phase::Answering(pending, slot, _) => {
                state.serving.leave();
                drop(pending);
                // Whoever gets it finds us gone from the counts.
                slot.end(at_us);
            }
        }
    }

    fn count(&self, phase: &Phase, outcome: Outcome, refused: Option<StatusCode>, at_us: u64) {
        let latency = at_us.saturating_sub(self.arrived_us);
        let deployment = self.deployment();
        let good = match outcome {
            Outcome::Success => true,
            Outcome::ModelClientError => {
                self.endpoint.model_client_errors == ModelClientErrors::Good
            }
            _ => false,
        };
        let mut shard = lock(&self.meter.shard);
        let cell = shard.cell(deployment.state.meter_slot);
        let status = match phase {
            Phase::Answering(_, _, answer) => {
                cell.response_bytes += answer.bytes;
                Some(answer.status)
            }
            _ => refused,
        };
        cell.count_status(status);
        outcome.count(&mut cell.outcomes);
        cell.open.leave(self.place);
        cell.request_bytes += self.upload.bytes.get();
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
        match phase {
            Phase::Arrived | Phase::Admitted(_) | Phase::Ended => {}
            Phase::Queued(..) => cell.queued.leave(at_us),
            Phase::Served(_, slot) | Phase::Answering(_, slot, _) => {
                cell.serving.leave(at_us);
                cell.on_instance(slot).leave(at_us);
            }
        }
    }

    /// Back in the phase that it was in.
    fn stay(&mut self, phase: Phase, wanted: &str) -> Refusal {
        self.phase = phase;
        self.out_of_turn(wanted)
    }

    /// A fault of this program.
    fn out_of_turn(&self, wanted: &str) -> Refusal {
        tracing::error!(phase = ?self.phase, "a request was to be {wanted} out of turn; please report this");
        Refusal::Internal
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        // It has been counted: every other end consumes the flight.
        if let Phase::Ended = self.phase {
            return;
        }
        let outcome = if self.meter.cutting.get() {
            Outcome::Internal
        } else {
            Outcome::ClientLeft
        };
        self.end(outcome, None, now_us());
    }
}

#[cfg(test)]
mod tests;
