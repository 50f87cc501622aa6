//! The state machine of one request, from the choice of its deployment to its end, and how the
//! request is counted.
//!
//! ```text
//! Arrived -> Admitted -> (Queued ->) Serving -> Responding -> Ended
//! ```
//!
//! Each phase holds what a request owns while it is in it, so nothing can be obtained out of order:
//! no slot without an admission, no response without a slot. A request may end in any phase, and
//! its phase determines what is counted and released. Only the methods of `InFlightRequest` move
//! between phases; called in the wrong phase they change nothing and refuse the request.
//!
//! Invariant: every request is counted exactly once as an arrival and exactly once as an outcome, or
//! as neither if its deployment does not count its method.
//! Whatever it holds is released after that, the slot last, however it ends.

use std::cell::Cell;
use std::mem::replace;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use contract::resources::ModelClientErrors;
use http::StatusCode;

use crate::admission::{PendingGuard, QueueTicket, Slot};
use crate::arrival_times::ArrivalId;
use crate::body::Upload;
use crate::instance::ServedInstance;
use crate::outcome::RequestOutcome;
use crate::reply::Refusal;
use crate::router::{ServedDeployment, ServedEndpoint};
use crate::shard::{SharedShard, lock};
use crate::timer::now_us;

/// Shared by the requests of one worker thread.
#[derive(Debug)]
pub struct WorkerMeter {
    pub shard: SharedShard,
    /// Set while requests that are still running are aborted: the gateway ended them, not the
    /// client.
    pub is_aborting: Rc<Cell<bool>>,
}

/// The phase of a request, and everything it holds in that phase.
#[derive(Debug)]
enum RequestPhase {
    /// Waiting for its body, if that is read in full.
    Arrived,
    /// One of the deployment's pending requests, without a slot.
    Admitted(PendingGuard),
    /// Queued for a slot.
    Queued(PendingGuard, QueueTicket),
    /// On an instance that has not begun to respond.
    Serving(PendingGuard, Slot),
    /// The response is being sent to the client.
    Responding(PendingGuard, Slot, ResponseProgress),
    /// Counted; holds nothing.
    Ended,
}

/// The model's response, as far as it was passed to the client.
#[derive(Debug)]
struct ResponseProgress {
    status: StatusCode,
    outcome: RequestOutcome,
    bytes: u64,
}

/// One request and its phase. Dropping it before its end counts it as `client_left`.
#[derive(Debug)]
pub struct InFlightRequest {
    meter: Rc<WorkerMeter>,
    endpoint: Arc<ServedEndpoint>,
    deployment: usize,
    arrived_us: u64,
    /// Its arrival, later by the time that its client was waited for: the model's time begins then.
    received_us: Cell<u64>,
    /// Identifies its arrival among the requests that have not ended; `None` if it does not count.
    arrival: Option<ArrivalId>,
    upload: Rc<Upload>,
    phase: RequestPhase,
}

impl InFlightRequest {
    /// Counts the arrival of a request, if `is_counted`.
    pub fn new(
        meter: Rc<WorkerMeter>,
        endpoint: Arc<ServedEndpoint>,
        deployment: usize,
        arrived_us: u64,
        is_counted: bool,
        upload: Rc<Upload>,
    ) -> Self {
        let slot = endpoint.deployments[deployment].state.meter_slot;
        let arrival = is_counted.then(|| {
            let mut shard = lock(&meter.shard);
            let counters = shard.counters(slot);
            counters.arrivals += 1;
            counters.arrival_times.insert(arrived_us)
        });
        Self {
            meter,
            endpoint,
            deployment,
            arrived_us,
            received_us: Cell::new(arrived_us),
            arrival,
            upload,
            phase: RequestPhase::Arrived,
        }
    }

    pub fn endpoint(&self) -> &ServedEndpoint {
        &self.endpoint
    }

    pub fn deployment(&self) -> &ServedDeployment {
        &self.endpoint.deployments[self.deployment]
    }

    pub fn arrived_us(&self) -> u64 {
        self.arrived_us
    }

    /// When it arrived, or when its body had been received if that had to be waited for.
    pub fn received_us(&self) -> u64 {
        self.received_us.get()
    }

    /// Before its dispatch, its client is waited for.
    pub fn receive(&self) {
        if let Some(arrival) = self.arrival {
            let mut shard = lock(&self.meter.shard);
            let counters = shard.counters(self.deployment().state.meter_slot);
            counters.arrival_times.receive(arrival);
        }
    }

    /// Its client was waited for so long, which is no time of the model.
    pub fn waited_for_client(&self, waited_us: u64) {
        self.received_us.set(self.received_us() + waited_us);
        if let Some(arrival) = self.arrival {
            let mut shard = lock(&self.meter.shard);
            let counters = shard.counters(self.deployment().state.meter_slot);
            counters.arrival_times.received(arrival, self.received_us());
        }
    }

    /// Deadline for the next piece of a body that is read in full, of which the last came at `at_us`.
    pub fn body_deadline_us(&self, at_us: u64) -> u64 {
        let limits = &self.deployment().limits;
        limits.next_byte(limits.end(self.arrived_us), at_us)
    }

    /// The instance that the request is on.
    pub fn instance(&self) -> Result<&Arc<ServedInstance>, Refusal> {
        match &self.phase {
            RequestPhase::Serving(_, slot) | RequestPhase::Responding(_, slot, _) => {
                Ok(&slot.instance)
            }
            _ => Err(self.invalid_transition("use of an instance")),
        }
    }

    /// `Arrived` to `Admitted`: joins the pending requests, unless there are too many.
    pub fn admit(&mut self) -> Result<(), Refusal> {
        let RequestPhase::Arrived = self.phase else {
            return Err(self.invalid_transition("admission"));
        };
        if self.upload.has_waited.get() {
            self.waited_for_client(now_us().saturating_sub(self.arrived_us));
        }
        let deployment = self.deployment();
        let pending = deployment.state.admit(deployment.limit);
        let pending = pending.ok_or(Refusal::TooManyPending {
            retry_after_secs: deployment.retry_after_secs(),
        })?;
        self.phase = RequestPhase::Admitted(pending);
        Ok(())
    }

    /// `Admitted` to `Serving` if a slot is free; returns whether one was.
    pub fn try_serve(&mut self, rotation: usize, at_us: u64) -> Result<bool, Refusal> {
        let Some(slot) = self.deployment().state.try_acquire_slot(rotation, at_us) else {
            return Ok(false);
        };
        self.serve(slot, at_us)?;
        Ok(true)
    }

    /// `Admitted` to `Queued`.
    pub fn queue(&mut self) -> Result<(), Refusal> {
        let pending = match replace(&mut self.phase, RequestPhase::Ended) {
            RequestPhase::Admitted(pending) => pending,
            other => return Err(self.reject_transition(other, "queueing")),
        };
        let state = &self.deployment().state;
        let ticket = state.enqueue(|| {
            let mut shard = lock(&self.meter.shard);
            shard.counters(state.meter_slot).queued.enter(now_us());
        });
        self.phase = RequestPhase::Queued(pending, ticket);
        Ok(())
    }

    /// `Queued` to `Serving` once a slot is granted; returns since when, in microseconds of
    /// `now_us`.
    pub fn poll_served(&mut self, cx: &mut Context<'_>) -> Poll<Result<u64, Refusal>> {
        let RequestPhase::Queued(_, ticket) = &mut self.phase else {
            return Poll::Ready(Err(self.invalid_transition("poll for a slot")));
        };
        let Some(slot) = ready!(ticket.poll(cx)) else {
            return Poll::Ready(Err(self.invalid_transition("grant of a slot")));
        };
        let at_us = now_us();
        Poll::Ready(self.serve(slot, at_us).map(|()| at_us))
    }

    /// `Admitted` or `Queued` to `Serving` on the slot's instance.
    fn serve(&mut self, slot: Slot, at_us: u64) -> Result<(), Refusal> {
        let (pending, ticket) = match replace(&mut self.phase, RequestPhase::Ended) {
            RequestPhase::Admitted(pending) => (pending, None),
            RequestPhase::Queued(pending, ticket) => (pending, Some(ticket)),
            other => return Err(self.reject_transition(other, "serving")),
        };
        let state = &self.endpoint.deployments[self.deployment].state;
        let mut shard = lock(&self.meter.shard);
        let counters = shard.counters(state.meter_slot);
        if ticket.is_some() {
            counters.queued.leave(at_us);
        }
        counters.serving.enter(at_us);
        counters.serving_on(&slot).enter(at_us);
        drop(shard);
        drop(ticket);
        state.serving.enter();
        self.phase = RequestPhase::Serving(pending, slot);
        Ok(())
    }

    /// In `Serving`: moves to another instance without leaving the phase; returns false if no other
    /// has a free slot.
    pub fn move_to_other_instance(&mut self, rotation: usize) -> Result<bool, Refusal> {
        let from = self.instance()?;
        let Some(slot) = self.deployment().state.acquire_other_slot(from, rotation) else {
            return Ok(false);
        };
        let (pending, previous) = match replace(&mut self.phase, RequestPhase::Ended) {
            RequestPhase::Serving(pending, previous) => (pending, previous),
            other => return Err(self.reject_transition(other, "move to another instance")),
        };
        let at_us = now_us();
        let mut shard = lock(&self.meter.shard);
        let counters = shard.counters(self.deployment().state.meter_slot);
        counters.serving_on(&previous).leave(at_us);
        counters.serving_on(&slot).enter(at_us);
        drop(shard);
        self.phase = RequestPhase::Serving(pending, slot);
        previous.release_at(at_us);
        Ok(true)
    }

    /// `Serving` to `Responding`. `status` is the client's, `outcome` the request's outcome if the
    /// response completes.
    pub fn begin_response(
        &mut self,
        status: StatusCode,
        outcome: RequestOutcome,
    ) -> Result<(), Refusal> {
        let (pending, slot) = match replace(&mut self.phase, RequestPhase::Ended) {
            RequestPhase::Serving(pending, slot) => (pending, slot),
            other => return Err(self.reject_transition(other, "response")),
        };
        let response = ResponseProgress {
            status,
            outcome,
            bytes: 0,
        };
        self.phase = RequestPhase::Responding(pending, slot, response);
        Ok(())
    }

    /// In `Responding`: counts bytes of the body sent to the client.
    pub fn add_response_bytes(&mut self, bytes: usize) {
        if let RequestPhase::Responding(_, _, response) = &mut self.phase {
            response.bytes += bytes as u64;
        }
    }

    /// In `Responding`: the response is complete.
    pub fn finish(mut self, at_us: u64) {
        if let RequestPhase::Responding(_, _, response) = &self.phase {
            self.end(response.outcome, None, at_us);
        }
    }

    /// In `Responding`: the response ended early, for a reason on the instance's side.
    pub fn fail(mut self, outcome: RequestOutcome) {
        self.end(outcome, None, now_us());
    }

    /// Before a response: the client gets a refusal.
    pub fn refuse(mut self, refusal: Refusal) {
        let status = refusal.status(self.deployment().error_mapping);
        self.end(refusal.outcome(), Some(status), now_us());
    }

    /// The only way to end: counts, then releases what the phase holds. `refused_status` is the
    /// status of a request that got no response from a model.
    fn end(&mut self, outcome: RequestOutcome, refused_status: Option<StatusCode>, at_us: u64) {
        let phase = replace(&mut self.phase, RequestPhase::Ended);
        self.count(&phase, outcome, refused_status, at_us);
        let state = &self.deployment().state;
        match phase {
            RequestPhase::Arrived | RequestPhase::Ended => {}
            RequestPhase::Admitted(pending) => drop(pending),
            RequestPhase::Queued(pending, ticket) => {
                drop(ticket);
                drop(pending);
            }
            RequestPhase::Serving(pending, slot) | RequestPhase::Responding(pending, slot, _) => {
                state.serving.leave();
                drop(pending);
                // The slot's next holder must find this request already counted out.
                slot.release_at(at_us);
            }
        }
    }

    fn count(
        &self,
        phase: &RequestPhase,
        outcome: RequestOutcome,
        refused_status: Option<StatusCode>,
        at_us: u64,
    ) {
        let latency = at_us.saturating_sub(self.received_us());
        let deployment = self.deployment();
        let is_good = match outcome {
            RequestOutcome::Success => true,
            RequestOutcome::ModelClientError => {
                self.endpoint.model_client_errors == ModelClientErrors::Good
            }
            _ => false,
        };
        let mut shard = lock(&self.meter.shard);
        let counters = shard.counters(deployment.state.meter_slot);
        let status = match phase {
            RequestPhase::Responding(_, _, response) => {
                counters.response_bytes += response.bytes;
                Some(response.status)
            }
            _ => refused_status,
        };
        counters.request_bytes += self.upload.bytes.get();
        if let Some(arrival) = self.arrival {
            counters.count_status(status);
            outcome.record(&mut counters.outcomes);
            counters.arrival_times.remove(arrival);
            if outcome.has_latency() {
                counters.latency.record(latency);
            }
            if is_good {
                for threshold in &deployment.thresholds_us {
                    if latency <= *threshold {
                        *counters.at_or_below.entry(*threshold).or_default() += 1;
                    }
                }
            }
        }
        match phase {
            RequestPhase::Arrived | RequestPhase::Admitted(_) | RequestPhase::Ended => {}
            RequestPhase::Queued(..) => counters.queued.leave(at_us),
            RequestPhase::Serving(_, slot) | RequestPhase::Responding(_, slot, _) => {
                counters.serving.leave(at_us);
                counters.serving_on(slot).leave(at_us);
            }
        }
    }

    /// Restores the phase and refuses the transition.
    fn reject_transition(&mut self, phase: RequestPhase, transition: &str) -> Refusal {
        self.phase = phase;
        self.invalid_transition(transition)
    }

    /// Reports a bug in this program.
    fn invalid_transition(&self, transition: &str) -> Refusal {
        tracing::error!(phase = ?self.phase, transition, hint = "please report this bug", "invalid request state transition");
        Refusal::Internal
    }
}

impl Drop for InFlightRequest {
    fn drop(&mut self) {
        // Already counted: every other way to end consumes the request.
        if let RequestPhase::Ended = self.phase {
            return;
        }
        let outcome = if self.meter.is_aborting.get() {
            RequestOutcome::Internal
        } else {
            RequestOutcome::ClientLeft
        };
        self.end(outcome, None, now_us());
    }
}

#[cfg(test)]
mod tests;
