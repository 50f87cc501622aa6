//! The autoscaler's state of one endpoint: the fold of its events, which is part of snapshots, and for each
//! deployment what one evaluation passes on to the next, which is not.

use std::collections::BTreeMap;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use contract::decision::{CarriedState, Decision, FailedStarts, InstanceCounts};
use contract::events::{ClockStepped, Event};
use contract::ids::{DeploymentRef, EndpointKey, Name, Uid};
use contract::log::{Record, StreamKind, StreamName};
use contract::resources::ProvisioningState;
use contract::time::{Span, Timestamp};
use domain::autoscale::{
    Policy, Repeats, Selection, TickInputs, carried_after_clock_step, carried_after_restart, carry,
    evaluate, explain,
};
use domain::available;
use domain::endpoint::Deployment;
use domain::fold::{EndpointFold, FOLD_VERSION};
use domain::measure::{Measures, SignalOptions};
use domain::zones::ZoneData;
use runtime::consumer::Fold;
use serde::{Deserialize, Serialize};

use crate::refill::{PastRequest, Refills};

/// Decisions on one deployment are at least this far apart.
const WRITE_EVERY: Span = Span::from_secs(1);

/// An Autoscale that is applied this soon after its deployment was created belongs to it: its default is
/// the first count, not the deployment's own, which was only granted in between.
const TOGETHER: Span = Span::from_secs(60);

/// Settings shared by all evaluations of this process.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    pub zones: ZoneData,
}

/// What all evaluations of this process share.
pub(crate) struct Shared<'a> {
    pub settings: &'a Settings,
    /// Where to ask for earlier measurements.
    pub refills: Option<&'a Refills>,
}

/// Evaluation of a deployment waits at most this long for earlier measurements: a window that has only just
/// begun to be measured may scale out on a single second.
const REFILL_WAIT: Span = Span::from_secs(2);

/// When earlier measurements that could not be read are asked for again. Evaluation does not wait for them
/// then.
const REFILL_BACKOFF: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_secs(5))
    .with_max_delay(REFILL_DELAY_MAX)
    .without_max_times();
const REFILL_DELAY_MAX: Duration = Duration::from_secs(60);

/// The part of an endpoint's state in the log that evaluations depend on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointState {
    fold: EndpointFold,
    /// The newest decision on each deployment, by deployment uid.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    decisions: BTreeMap<Uid, Box<Decision>>,
    /// Clock steps since the newest decision, by deployment uid.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    steps: BTreeMap<Uid, Vec<ClockStepped>>,
}

/// The fold of [`EndpointState`].
pub struct AutoscalerFold;

impl Fold for AutoscalerFold {
    type State = EndpointState;
    type Effect = ();

    const VERSION: u32 = FOLD_VERSION;
    const READS: &'static [StreamKind] = &[
        StreamKind::Endpoint,
        StreamKind::Scaling,
        StreamKind::Instances,
        StreamKind::Node,
    ];

    fn apply(&self, _key: &EndpointKey, state: &mut EndpointState, record: &Record) {
        state.apply(record);
    }

    fn writes(&self, stream: &StreamName) -> bool {
        stream.kind() == Some(StreamKind::Scaling)
    }
}

impl EndpointState {
    fn apply(&mut self, record: &Record) {
        self.fold.apply(record);
        match &record.event {
            Event::ScalingDecided(decision) => {
                let uid = decision.deployment_uid;
                self.steps.remove(&uid);
                self.decisions.insert(uid, decision.clone());
            }
            Event::ClockStepped(stepped) if is_own_stream(record) => {
                for uid in self.decisions.keys() {
                    self.steps.entry(*uid).or_default().push(stepped.clone());
                }
            }
            Event::DeploymentDeleted(_) | Event::EndpointDeleted(_) => {
                let fold = &self.fold;
                self.decisions.retain(|uid, _| fold.has(*uid));
                self.steps.retain(|uid, _| fold.has(*uid));
            }
            _ => {}
        }
    }
}

/// Whether the record is in the autoscaler's stream. Each service records the clock steps that it meets;
/// only those of the autoscaler shift carried state.
fn is_own_stream(record: &Record) -> bool {
    record.stream.kind() == Some(StreamKind::Scaling)
}

/// The evaluation state of one endpoint's deployments.
#[derive(Default)]
pub struct Evaluations {
    deployments: BTreeMap<Uid, Box<DeploymentEvaluation>>,
}

/// What one evaluation of a deployment passes on to the next.
struct DeploymentEvaluation {
    compiled: Option<CompiledPolicy>,
    carried: CarriedState,
    selection: Option<Selection>,
    /// The decision being committed, and the state to continue from once it is.
    uncommitted: Option<(Decision, CarriedState)>,
    written_at: Option<Timestamp>,
    repeats: Repeats,
    refill: RefillState,
}

/// Whether the windows of a policy lack earlier measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RefillState {
    /// They lack nothing that can be read.
    Done,
    /// What they lack is to be asked for at this time, after so many failures to read it.
    Wanted { at: Timestamp, failures: u32 },
    /// It was asked for at this time.
    Asked { at: Timestamp, failures: u32 },
}

impl RefillState {
    /// What follows once the source has been read, or has failed.
    fn answered(self, is_read: bool, now: Timestamp) -> Self {
        match self {
            Self::Asked { failures, .. } if !is_read => Self::Wanted {
                at: now + refill_delay(failures),
                failures: failures.saturating_add(1),
            },
            _ => Self::Done,
        }
    }
}

/// The delay before the source is asked again after a failure that followed so many others.
fn refill_delay(failures: u32) -> Span {
    let mut delays = REFILL_BACKOFF.build();
    let delay = delays.nth(failures as usize).unwrap_or(REFILL_DELAY_MAX);
    Span::from_millis(delay.as_millis() as u64)
}

struct CompiledPolicy {
    revision: u64,
    /// `None` if this version rejects the stored document; the count then stays.
    policy: Option<Policy>,
}

impl Evaluations {
    /// Handles a record that was applied to the state.
    pub fn applied(&mut self, record: &Record) {
        match &record.event {
            Event::ScalingDecided(decision) => self.decided(decision),
            Event::ClockStepped(stepped) if is_own_stream(record) => {
                for evaluation_state in self.deployments.values_mut() {
                    evaluation_state.carried = carried_after_clock_step(
                        &evaluation_state.carried,
                        stepped.recorded,
                        stepped.clock,
                    );
                    evaluation_state.selection = None;
                    evaluation_state.written_at = None;
                    if let RefillState::Wanted { at, .. } | RefillState::Asked { at, .. } =
                        &mut evaluation_state.refill
                    {
                        *at = stepped.clock;
                    }
                }
            }
            _ => {}
        }
    }

    fn decided(&mut self, decision: &Decision) {
        let uid = decision.deployment_uid;
        let Some(evaluation_state) = self.deployments.get_mut(&uid) else {
            return;
        };
        match evaluation_state.uncommitted.take() {
            Some((uncommitted, carried)) if uncommitted == *decision => {
                evaluation_state.repeats.recorded(decision);
                evaluation_state.carried = carried;
                evaluation_state.written_at = Some(decision.at);
            }
            // Decided by another process: start over from what is recorded.
            _ => {
                self.deployments.remove(&uid);
            }
        }
    }

    /// Handles that a deployment's earlier measurements have been read, or could not be; returns whether it
    /// has asked for them.
    pub fn refilled(&mut self, uid: Uid, is_read: bool, now: Timestamp) -> bool {
        let evaluation_state = self.deployments.get_mut(&uid);
        evaluation_state.is_some_and(|evaluation_state| {
            let refill = evaluation_state.refill;
            evaluation_state.refill = refill.answered(is_read, now);
            matches!(refill, RefillState::Asked { .. })
        })
    }

    /// Removes deployments that no longer exist and returns them.
    fn remove_deleted(&mut self, fold: &EndpointFold) -> Vec<Uid> {
        let deleted = |uid: &&Uid| !fold.has(**uid);
        let deleted: Vec<Uid> = self.deployments.keys().filter(deleted).copied().collect();
        for uid in &deleted {
            self.deployments.remove(uid);
        }
        deleted
    }

    /// The evaluation state of a deployment, which continues from the last decision if it is new.
    fn of(&mut self, uid: Uid, state: &EndpointState, now: Timestamp) -> &mut DeploymentEvaluation {
        self.deployments.entry(uid).or_insert_with(|| {
            let steps = state.steps.get(&uid).map_or(&[][..], Vec::as_slice);
            let last = state.decisions.get(&uid).map(Box::as_ref);
            Box::new(DeploymentEvaluation::resume(last, steps, now))
        })
    }

    /// Sets how the deployments are measured, before the first frame is.
    pub fn prepare(
        &mut self,
        state: &EndpointState,
        measures: &mut Measures,
        zones: &ZoneData,
        now: Timestamp,
    ) {
        let endpoint = state.fold.endpoint.as_ref();
        let deployments = endpoint.map(|endpoint| endpoint.deployments.values());
        for deployment in deployments.into_iter().flatten() {
            let evaluation_state = self.of(deployment.uid, state, now);
            evaluation_state.compile(deployment, measures, zones, now);
        }
    }

    /// Evaluates all deployments and returns the decisions to commit.
    pub fn evaluate(
        &mut self,
        key: &EndpointKey,
        state: &EndpointState,
        measures: &mut Measures,
        shared: &Shared<'_>,
        now: Timestamp,
    ) -> Vec<Decision> {
        for uid in self.remove_deleted(&state.fold) {
            measures.forget(uid);
        }
        let Some(endpoint) = &state.fold.endpoint else {
            return Vec::new();
        };
        if endpoint.state == ProvisioningState::Deleting {
            return Vec::new();
        }
        let options = SignalOptions {
            model_client_errors: endpoint.spec.model_client_errors,
        };
        let mut decisions = Vec::new();
        for (deployment_name, deployment) in &endpoint.deployments {
            if deployment.state == ProvisioningState::Deleting {
                continue;
            }
            let uid = deployment.uid;
            let last = state.decisions.get(&uid).map(Box::as_ref);
            let evaluation_state = self.of(uid, state, now);
            let inputs = EvaluationInputs {
                deployment,
                last,
                instances: counts(&state.fold, uid),
                failed_starts: available::failed_starts(deployment, &state.fold.instances),
                starts_at_default: starts_at_default(deployment, &state.fold),
                options,
                zones: &shared.settings.zones,
                key,
                name: deployment_name,
                refills: shared.refills,
                now,
            };
            let of = || DeploymentRef {
                endpoint: key.endpoint(),
                deployment: deployment_name.clone(),
            };
            decisions.extend(evaluation_state.evaluate(&inputs, measures, of));
        }
        decisions
    }
}

/// The inputs of one evaluation of a deployment, apart from measurements and carried state.
struct EvaluationInputs<'a> {
    deployment: &'a Deployment,
    last: Option<&'a Decision>,
    instances: InstanceCounts,
    failed_starts: Option<FailedStarts>,
    starts_at_default: bool,
    options: SignalOptions,
    zones: &'a ZoneData,
    key: &'a EndpointKey,
    name: &'a Name,
    refills: Option<&'a Refills>,
    now: Timestamp,
}

impl DeploymentEvaluation {
    /// Resumes from the last decision, adjusted by the clock steps since then.
    fn resume(last: Option<&Decision>, steps: &[ClockStepped], now: Timestamp) -> Self {
        let carried = last.map_or_else(CarriedState::default, |last| {
            let fresh = carried_after_restart(last, now);
            let recommendations = fresh.recommendations.clone();
            let shifted = steps.iter().fold(fresh, |carried, step| {
                carried_after_clock_step(&carried, step.recorded, step.clock)
            });
            // The recommendations already have current timestamps.
            CarriedState {
                recommendations,
                ..shifted
            }
        });
        Self {
            compiled: None,
            carried,
            selection: None,
            uncommitted: None,
            written_at: None,
            repeats: Repeats::default(),
            refill: RefillState::Done,
        }
    }

    /// Returns the decision to commit, if any. Most evaluations end without one, and copy nothing.
    fn evaluate(
        &mut self,
        inputs: &EvaluationInputs<'_>,
        measures: &mut Measures,
        of: impl FnOnce() -> DeploymentRef,
    ) -> Option<Decision> {
        let (deployment, now) = (inputs.deployment, inputs.now);
        self.compile(deployment, measures, inputs.zones, now);
        if self.waits_for_refill(inputs, measures) {
            return None;
        }
        if self
            .written_at
            .is_some_and(|at| now.since(at) < WRITE_EVERY)
        {
            return None;
        }
        let compiled = self.compiled.as_ref();
        if compiled.is_some_and(|compiled| compiled.policy.is_none()) {
            return None;
        }
        let policy = compiled.and_then(|compiled| compiled.policy.as_ref());
        let specs = policy.map_or(&[][..], Policy::signals);
        let signals = measures.signals(deployment.uid, specs, inputs.options, now);
        let tick = TickInputs {
            policy_revision: compiled.map_or(0, |compiled| compiled.revision),
            fixed_instances: deployment.spec.instances,
            pin: deployment.pin,
            pinned_by: deployment.pinned_by.as_deref(),
            pause: deployment.pause,
            instances: inputs.instances,
            failed_starts: inputs.failed_starts.as_ref(),
            starts_at_default: inputs.starts_at_default && self.carried.profile.is_none(),
            signals: &signals,
            carried: &self.carried,
            selection: self.selection,
        };
        let evaluation = evaluate(policy, &tick, now);
        self.selection = evaluation.selection;
        let repeats = &mut self.repeats;
        if !repeats.should_record(inputs.last, policy, &tick, &evaluation, now) {
            carry(&mut self.carried, policy, &evaluation, now);
            return None;
        }
        let mut explained = signals.clone();
        measures.add_evidence(deployment.uid, specs, now, &mut explained);
        let tick = TickInputs {
            signals: &explained,
            ..tick
        };
        let decision = explain(&of(), deployment.uid, policy, &tick, now);
        let mut carried = self.carried.clone();
        carry(&mut carried, policy, &evaluation, now);
        self.uncommitted = Some((decision.clone(), carried));
        Some(decision)
    }

    /// Asks for earlier measurements that are lacking, and returns whether to wait for them.
    fn waits_for_refill(&mut self, inputs: &EvaluationInputs<'_>, measures: &Measures) -> bool {
        let now = inputs.now;
        let Some(refills) = inputs.refills else {
            return false;
        };
        if let RefillState::Wanted { at, failures } = self.refill
            && at <= now
        {
            match self.lacking(inputs, measures) {
                None => self.refill = RefillState::Done,
                Some(request) => {
                    if refills.ask(request) {
                        self.refill = RefillState::Asked { at: now, failures };
                    }
                }
            }
        }
        matches!(self.refill, RefillState::Asked { at, failures: 0 } if now.since(at) < REFILL_WAIT)
    }

    /// The earlier measurements that the policy's windows lack, if any.
    fn lacking(&self, inputs: &EvaluationInputs<'_>, measures: &Measures) -> Option<PastRequest> {
        let policy = self.compiled.as_ref()?.policy.as_ref()?;
        let deployment = inputs.deployment;
        let from = measures.lacks_since(deployment.uid, policy.signals(), inputs.now)?;
        Some(PastRequest {
            endpoint: inputs.key.clone(),
            deployment: inputs.name.clone(),
            uid: deployment.uid,
            created_at: deployment.created_at,
            from,
        })
    }

    fn compile(
        &mut self,
        deployment: &Deployment,
        measures: &mut Measures,
        zones: &ZoneData,
        now: Timestamp,
    ) {
        let Some(autoscale) = &deployment.autoscale else {
            self.compiled = None;
            self.selection = None;
            self.refill = RefillState::Done;
            return;
        };
        if self
            .compiled
            .as_ref()
            .is_some_and(|compiled| compiled.revision == autoscale.revision)
        {
            return;
        }
        let policy = Policy::compile(&autoscale.spec, zones)
            .inspect_err(|findings| {
                tracing::error!(?findings, "stored autoscale policy cannot be compiled")
            })
            .ok();
        if let Some(policy) = &policy {
            measures.watch(deployment.uid, policy.signals(), now);
            measures.set_created(deployment.uid, deployment.created_at);
            let period = policy.spec().initialization_period;
            measures.set_initialization_period(deployment.uid, period, now);
            self.refill = RefillState::Wanted {
                at: now,
                failures: 0,
            };
        }
        self.compiled = Some(CompiledPolicy {
            revision: autoscale.revision,
            policy,
        });
        self.selection = None;
    }
}

/// Whether the first decision by the Autoscale of a deployment takes its default.
fn starts_at_default(deployment: &Deployment, fold: &EndpointFold) -> bool {
    deployment.autoscale.as_ref().is_some_and(|autoscale| {
        autoscale.created_at.since(deployment.created_at) < TOGETHER
            || !fold.instances.was_any_ready(deployment.uid)
    })
}

fn counts(fold: &EndpointFold, uid: Uid) -> InstanceCounts {
    let mut counts = InstanceCounts::default();
    for instance in fold.instances.of(uid).filter(|instance| instance.is_kept()) {
        if instance.is_ready() {
            counts.ready += 1;
        } else {
            counts.pending += 1;
        }
    }
    counts
}
