//! What the autoscaler keeps of one endpoint: the fold of its events, which goes into snapshots, and, for
//! each deployment, what one evaluation hands to the next, which does not.

use std::collections::BTreeMap;

use contract::decision::{Carried, Decision, InstanceCounts};
use contract::events::{ClockStepped, Event};
use contract::ids::{DeploymentRef, EndpointKey, Name, Uid};
use contract::log::{Record, StreamKind, StreamName};
use contract::resources::ProvisioningState;
use contract::time::{Span, Timestamp};
use domain::autoscale::{
    Policy, Selection, TickInputs, carried_after_clock_step, carried_after_restart, carry,
    evaluate, explain, should_explain,
};
use domain::endpoint::Deployment;
use domain::fold::{EndpointFold, FOLD_VERSION};
use domain::measure::{Measures, SignalOptions};
use domain::zones::ZoneData;
use runtime::consumer::Fold;
use serde::{Deserialize, Serialize};

/// Decisions on one deployment are at least this far apart.
const WRITE_EVERY: Span = Span::from_secs(1);

/// What all evaluations of this process go by.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// What one instance may use; memory utilisation has no data without it.
    pub memory_bytes_per_instance: Option<u64>,
    pub zones: ZoneData,
}

/// What the log says about an endpoint, as far as evaluations go by it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointState {
    fold: EndpointFold,
    /// The newest decision on each deployment, by its uid.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    decisions: BTreeMap<Uid, Decision>,
    /// Steps of the clock since the newest decision, by deployment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    steps: BTreeMap<Uid, Vec<ClockStepped>>,
}

/// How [`EndpointState`] is folded.
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
                self.decisions.insert(uid, (**decision).clone());
            }
            Event::ClockStepped(stepped) if is_of_ours(record) => {
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

/// Each owner writes the step that it has met; only the autoscaler's moves what it carries.
fn is_of_ours(record: &Record) -> bool {
    record.stream.kind() == Some(StreamKind::Scaling)
}

/// The running evaluations of one endpoint's deployments: what one hands to the next.
#[derive(Default)]
pub struct Evaluations {
    deployments: BTreeMap<Uid, Watched>,
}

/// The running evaluation of one deployment.
struct Watched {
    compiled: Option<Compiled>,
    carried: Carried,
    selection: Option<Selection>,
    /// Handed to the log, and not come back yet: what to go on from if it does.
    staged: Option<(Decision, Carried)>,
    written_at: Option<Timestamp>,
}

struct Compiled {
    revision: u64,
    /// None: this version refuses the stored document, and the count stays.
    policy: Option<Policy>,
}

impl Evaluations {
    /// Goes on from a record that was applied to the state.
    pub fn applied(&mut self, record: &Record) {
        match &record.event {
            Event::ScalingDecided(decision) => self.decided(decision),
            Event::ClockStepped(stepped) if is_of_ours(record) => {
                for watched in self.deployments.values_mut() {
                    watched.carried =
                        carried_after_clock_step(&watched.carried, stepped.recorded, stepped.clock);
                    watched.selection = None;
                    watched.written_at = None;
                }
            }
            _ => {}
        }
    }

    fn decided(&mut self, decision: &Decision) {
        let uid = decision.deployment_uid;
        let Some(watched) = self.deployments.get_mut(&uid) else {
            return;
        };
        match watched.staged.take() {
            Some((staged, carried)) if staged == *decision => {
                watched.carried = carried;
                watched.written_at = Some(decision.at);
            }
            // Somebody else decided: begin again from what is written.
            _ => {
                self.deployments.remove(&uid);
            }
        }
    }

    /// Deployments that are gone, which nothing is kept of any more.
    fn forget_the_gone(&mut self, fold: &EndpointFold) -> Vec<Uid> {
        let gone = |uid: &&Uid| !fold.has(**uid);
        let gone: Vec<Uid> = self.deployments.keys().filter(gone).copied().collect();
        for uid in &gone {
            self.deployments.remove(uid);
        }
        gone
    }

    /// The decisions to write now.
    pub fn evaluate(
        &mut self,
        name: &Name,
        state: &EndpointState,
        measures: &mut Measures,
        settings: &Settings,
        now: Timestamp,
    ) -> Vec<Decision> {
        for uid in self.forget_the_gone(&state.fold) {
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
            memory_bytes_per_instance: settings.memory_bytes_per_instance,
        };
        let mut decisions = Vec::new();
        for (deployment_name, deployment) in &endpoint.deployments {
            if deployment.state == ProvisioningState::Deleting {
                continue;
            }
            let uid = deployment.uid;
            let last = state.decisions.get(&uid);
            let watched = self.deployments.entry(uid).or_insert_with(|| {
                let steps = state.steps.get(&uid).map_or(&[][..], Vec::as_slice);
                Watched::resume(last, steps, now)
            });
            let given = Given {
                deployment,
                last,
                instances: counts(&state.fold, uid),
                options,
                zones: &settings.zones,
                now,
            };
            let of = || DeploymentRef {
                endpoint: name.clone(),
                deployment: deployment_name.clone(),
            };
            decisions.extend(watched.evaluate(&given, measures, of));
        }
        decisions
    }
}

/// What one evaluation of a deployment goes by, beside what is measured and carried.
struct Given<'a> {
    deployment: &'a Deployment,
    last: Option<&'a Decision>,
    instances: InstanceCounts,
    options: SignalOptions,
    zones: &'a ZoneData,
    now: Timestamp,
}

impl Watched {
    /// Goes on from the last decision, with the clock's steps since then.
    fn resume(last: Option<&Decision>, steps: &[ClockStepped], now: Timestamp) -> Self {
        let carried = last.map_or_else(Carried::default, |last| {
            let fresh = carried_after_restart(last, now);
            let wishes = fresh.wishes.clone();
            let shifted = steps.iter().fold(fresh, |carried, step| {
                carried_after_clock_step(&carried, step.recorded, step.clock)
            });
            // The wishes are of now already.
            Carried { wishes, ..shifted }
        });
        Self {
            compiled: None,
            carried,
            selection: None,
            staged: None,
            written_at: None,
        }
    }

    /// The decision to write now. Most evaluations end without one, and copy nothing.
    fn evaluate(
        &mut self,
        given: &Given<'_>,
        measures: &mut Measures,
        of: impl FnOnce() -> DeploymentRef,
    ) -> Option<Decision> {
        let (deployment, now) = (given.deployment, given.now);
        self.compile(deployment, measures, given.zones, now);
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
        let signals = measures.signals(deployment.uid, specs, given.options, now);
        let tick = TickInputs {
            policy_revision: compiled.map_or(0, |compiled| compiled.revision),
            fixed_instances: deployment.spec.instances,
            pin: deployment.pin,
            pause: deployment.pause,
            instances: given.instances,
            signals: &signals,
            carried: &self.carried,
            selection: self.selection,
        };
        let evaluation = evaluate(policy, &tick, now);
        self.selection = evaluation.selection;
        if !should_explain(given.last, policy, &evaluation) {
            carry(&mut self.carried, policy, &evaluation, now);
            return None;
        }
        let decision = explain(&of(), deployment.uid, policy, &tick, now);
        let mut carried = self.carried.clone();
        carry(&mut carried, policy, &evaluation, now);
        self.staged = Some((decision.clone(), carried));
        Some(decision)
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
            return;
        };
        if self
            .compiled
            .as_ref()
            .is_some_and(|known| known.revision == autoscale.revision)
        {
            return;
        }
        let policy = Policy::compile(&autoscale.spec, zones)
            .inspect_err(|findings| tracing::error!(?findings, "a stored Autoscale cannot be used"))
            .ok();
        if let Some(policy) = &policy {
            measures.watch(deployment.uid, policy.signals(), now);
        }
        self.compiled = Some(Compiled {
            revision: autoscale.revision,
            policy,
        });
        self.selection = None;
    }
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
