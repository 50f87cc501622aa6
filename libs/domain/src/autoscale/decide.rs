//! Decisions: evaluations with everything that led to them.
//!
//! Invariant: a decision is a function of its deployment, inputs and time, so that one read back
//! from the log can be reproduced byte for byte.

use std::collections::BTreeMap;

use contract::decision::{
    Cause, CauseKind, Decision, DecisionInputs, DecisionOutcome, Pin, Signal,
};
use contract::ids::{DeploymentRef, Uid};
use contract::problem::Finding;
use contract::resources::AutoscaleSpec;
use contract::time::Timestamp;

use super::evaluate::{Evaluation, TickInputs, evaluate, run};
use super::policy::Policy;
use super::record::{FullRecorder, stage};
use super::{ENGINE, ENGINE_VERSION};
use crate::zones::ZoneData;

/// Decides from recorded inputs, compiling the policy that they contain.
pub fn decide(
    deployment: &DeploymentRef,
    uid: Uid,
    inputs: DecisionInputs,
    zones: &ZoneData,
    now: Timestamp,
) -> Decision {
    let policy = inputs.policy.as_ref();
    let policy = policy.map(|spec| Policy::compile(spec, zones));
    match policy {
        None => decide_compiled(None, deployment, uid, inputs, now),
        Some(Ok(policy)) => decide_compiled(Some(&policy), deployment, uid, inputs, now),
        Some(Err(findings)) => uncompilable(deployment, uid, inputs, now, &findings),
    }
}

/// [`decide`] with a compiled policy, which must be the one in the inputs.
pub fn decide_with(
    policy: &Policy,
    deployment: &DeploymentRef,
    uid: Uid,
    inputs: DecisionInputs,
    now: Timestamp,
) -> Decision {
    decide_compiled(Some(policy), deployment, uid, inputs, now)
}

/// Evaluates a recorded decision again. Equal bytes mean that it recorded everything it depends on.
pub fn reevaluate(decision: &Decision, zones: &ZoneData) -> Decision {
    decide(
        &decision.deployment,
        decision.deployment_uid,
        decision.inputs.clone(),
        zones,
        decision.at,
    )
}

/// The first engine version whose decisions record a cause and the evidence of rules.
const EXPLAINED_FROM: u32 = 2;

/// How a recorded decision compares with its reevaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// Equal byte for byte.
    Equal,
    /// Numbers, outcome, profile and verdicts are equal; explanations differ.
    WordingOnly,
    /// The decision itself differs.
    Other,
}

/// Compares a recorded decision with its reevaluation by this engine. A different recorded version
/// is no difference: [`is_reproducible`] tells whether the decision has to be equal.
pub fn compare(recorded: &Decision, again: &Decision) -> Comparison {
    let mut again = Decision {
        engine: recorded.engine.clone(),
        engine_version: recorded.engine_version,
        ..again.clone()
    };
    if recorded.engine_version < EXPLAINED_FROM {
        again.cause = None;
        again.rules.iter_mut().for_each(|rule| rule.evidence = None);
    }
    // Bytes, not values: the record must be what the engine would write.
    if serde_json::to_vec(&again).ok() == serde_json::to_vec(recorded).ok() {
        return Comparison::Equal;
    }
    match without_wording(&again) == without_wording(recorded) {
        true => Comparison::WordingOnly,
        false => Comparison::Other,
    }
}

fn without_wording(decision: &Decision) -> Decision {
    let mut decision = decision.clone();
    decision
        .cause
        .iter_mut()
        .for_each(|cause| cause.detail.clear());
    decision
        .rules
        .iter_mut()
        .for_each(|rule| rule.because.clear());
    decision
        .stages
        .iter_mut()
        .for_each(|stage| stage.detail.clear());
    decision
}

/// Whether this engine, with these time zones, must reproduce the decision byte for byte.
pub fn is_reproducible(decision: &Decision, zones: &ZoneData) -> bool {
    let has_schedule = |policy: &AutoscaleSpec| {
        let mut profiles = policy.profiles.iter();
        profiles.any(|profile| profile.schedule.is_some())
    };
    let scheduled = decision.inputs.policy.as_deref().is_some_and(has_schedule);
    decision.engine == ENGINE
        && decision.engine_version == ENGINE_VERSION
        && (!scheduled || decision.inputs.zone_data.as_deref() == Some(zones.version()))
}

/// Returns the complete decision of a tick.
pub fn explain(
    deployment: &DeploymentRef,
    uid: Uid,
    policy: Option<&Policy>,
    tick: &TickInputs<'_>,
    now: Timestamp,
) -> Decision {
    let mut signals = BTreeMap::new();
    let keys = policy.iter().flat_map(|policy| policy.signal_keys.iter());
    for (key, signal) in keys.zip(tick.signals) {
        if let Some(signal) = signal {
            signals.insert(key.clone(), *signal);
        }
    }
    let inputs = DecisionInputs {
        policy_revision: tick.policy_revision,
        policy: policy.map(|policy| policy.spec().clone()),
        fixed_instances: tick.fixed_instances,
        pin: tick.pin,
        pinned_by: tick.pinned_by.map(str::to_owned),
        pause: tick.pause,
        instances: tick.instances,
        failed_starts: tick.failed_starts.cloned(),
        starts_at_default: tick.starts_at_default,
        signals,
        carried: tick.carried.clone(),
        zone_data: policy.and_then(|policy| policy.zone_data.clone()),
    };
    build(policy, tick, deployment, uid, inputs, now)
}

/// Whether a decision differs from the previous one in anything worth recording.
pub fn should_write(previous: Option<&Decision>, next: &Decision) -> bool {
    previous.is_none_or(|previous| {
        previous.wanted != next.wanted
            || previous.granted != next.granted
            || previous.outcome != next.outcome
            || previous.profile != next.profile
            || previous.decided_by != next.decided_by
            || previous.deployment_uid != next.deployment_uid
            || has_other_pin(
                previous,
                next.outcome,
                next.inputs.pin,
                next.inputs.pinned_by.as_deref(),
            )
    })
}

/// [`should_write`] without building the explanation: whether a tick's decision would have to be
/// written.
pub fn should_explain(
    previous: Option<&Decision>,
    policy: Option<&Policy>,
    tick: &TickInputs<'_>,
    evaluation: &Evaluation,
) -> bool {
    previous.is_none_or(|previous| {
        previous.wanted != evaluation.wanted
            || previous.granted != evaluation.granted
            || previous.outcome != evaluation.outcome
            || previous.profile.as_deref() != policy.and_then(|policy| evaluation.profile(policy))
            || previous.decided_by.as_deref()
                != policy.and_then(|policy| evaluation.decided_by(policy))
            || has_other_pin(previous, evaluation.outcome, tick.pin, tick.pinned_by)
    })
}

/// Whether another pin than the recorded one sets the count: it ends at another time, or another person
/// set it.
pub(super) fn has_other_pin(
    previous: &Decision,
    outcome: DecisionOutcome,
    pin: Option<Pin>,
    pinned_by: Option<&str>,
) -> bool {
    let recorded = &previous.inputs;
    outcome == DecisionOutcome::Pinned
        && (recorded.pin != pin || recorded.pinned_by.as_deref() != pinned_by)
}

pub(super) fn evaluate_inputs(
    policy: Option<&Policy>,
    inputs: &DecisionInputs,
    now: Timestamp,
) -> Evaluation {
    let signals = signals_in_order(policy, inputs);
    evaluate(policy, &tick_of(inputs, &signals), now)
}

fn decide_compiled(
    policy: Option<&Policy>,
    deployment: &DeploymentRef,
    uid: Uid,
    inputs: DecisionInputs,
    now: Timestamp,
) -> Decision {
    let signals = signals_in_order(policy, &inputs);
    let carried = inputs.carried.clone();
    let tick = TickInputs {
        carried: &carried,
        ..tick_of(&inputs, &signals)
    };
    build(policy, &tick, deployment, uid, inputs.clone(), now)
}

fn signals_in_order(policy: Option<&Policy>, inputs: &DecisionInputs) -> Vec<Option<Signal>> {
    policy
        .iter()
        .flat_map(|policy| policy.signal_keys.iter())
        .map(|key| inputs.signals.get(key).copied())
        .collect()
}

fn tick_of<'a>(inputs: &'a DecisionInputs, signals: &'a [Option<Signal>]) -> TickInputs<'a> {
    TickInputs {
        policy_revision: inputs.policy_revision,
        fixed_instances: inputs.fixed_instances,
        pin: inputs.pin,
        pinned_by: inputs.pinned_by.as_deref(),
        pause: inputs.pause,
        instances: inputs.instances,
        failed_starts: inputs.failed_starts.as_ref(),
        starts_at_default: inputs.starts_at_default,
        signals,
        carried: &inputs.carried,
        selection: None,
    }
}

fn build(
    policy: Option<&Policy>,
    tick: &TickInputs<'_>,
    deployment: &DeploymentRef,
    uid: Uid,
    inputs: DecisionInputs,
    now: Timestamp,
) -> Decision {
    let mut record = FullRecorder::new(policy);
    let evaluation = run(policy, tick, now, &mut record);
    let mut decision = Decision {
        engine: ENGINE.into(),
        engine_version: ENGINE_VERSION,
        deployment: deployment.clone(),
        deployment_uid: uid,
        at: now,
        from: evaluation.from,
        wanted: evaluation.wanted,
        granted: evaluation.granted,
        outcome: evaluation.outcome,
        profile: policy
            .and_then(|policy| evaluation.profile(policy))
            .map(str::to_owned),
        decided_by: policy
            .and_then(|policy| evaluation.decided_by(policy))
            .map(str::to_owned),
        cause: None,
        rules: record.rules,
        stages: record.stages,
        inputs,
    };
    decision.cause = evaluation.cause.map(|kind| cause(&decision, kind));
    decision
}

fn cause(decision: &Decision, kind: CauseKind) -> Cause {
    Cause {
        kind,
        name: match kind {
            CauseKind::Rule | CauseKind::FailedStarts => decision.decided_by.clone(),
            CauseKind::Profile | CauseKind::Bounds => decision.profile.clone(),
            _ => None,
        },
        detail: super::cause::detail(decision, kind),
    }
}

/// The decision for a stored document that this version rejects: the count stays, and the decision
/// says why.
fn uncompilable(
    deployment: &DeploymentRef,
    uid: Uid,
    inputs: DecisionInputs,
    now: Timestamp,
    findings: &[Finding],
) -> Decision {
    let from = inputs.carried.granted.unwrap_or(0);
    let count = inputs.carried.granted.unwrap_or(inputs.fixed_instances);
    let stages = findings
        .iter()
        .map(|finding| {
            stage(
                "policy",
                from,
                count,
                format!("{}: {}", finding.pointer, finding.detail),
            )
        })
        .collect();
    let mut decision = Decision {
        engine: ENGINE.into(),
        engine_version: ENGINE_VERSION,
        deployment: deployment.clone(),
        deployment_uid: uid,
        at: now,
        from,
        wanted: count,
        granted: count,
        outcome: DecisionOutcome::Unknown,
        profile: None,
        decided_by: None,
        cause: None,
        rules: Vec::new(),
        stages,
        inputs,
    };
    decision.cause = Some(cause(&decision, CauseKind::Data));
    decision
}
