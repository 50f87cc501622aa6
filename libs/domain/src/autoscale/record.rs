//! Recorders of an evaluation's steps. The no-op recorder compiles to nothing, so the fast path and
//! the full explanation share one piece of code and cannot diverge.

use contract::decision::{EvaluationStage, RuleResult};

use super::policy::Policy;

pub(super) trait Recorder {
    fn stage(&mut self, make: impl FnOnce() -> EvaluationStage);
    fn rule(&mut self, make: impl FnOnce() -> RuleResult);
}

pub(super) struct NoopRecorder;

impl Recorder for NoopRecorder {
    fn stage(&mut self, _: impl FnOnce() -> EvaluationStage) {}
    fn rule(&mut self, _: impl FnOnce() -> RuleResult) {}
}

/// How many stages an evaluation usually has.
const STAGES: usize = 8;

pub(super) struct FullRecorder {
    pub stages: Vec<EvaluationStage>,
    pub rules: Vec<RuleResult>,
}

impl FullRecorder {
    pub fn new(policy: Option<&Policy>) -> Self {
        let profiles = policy.iter().flat_map(|policy| policy.profiles.iter());
        let rules = profiles.map(|profile| profile.rules.len()).max();
        Self {
            stages: Vec::with_capacity(STAGES),
            rules: Vec::with_capacity(rules.unwrap_or(0)),
        }
    }
}

impl Recorder for FullRecorder {
    fn stage(&mut self, make: impl FnOnce() -> EvaluationStage) {
        self.stages.push(make());
    }

    fn rule(&mut self, make: impl FnOnce() -> RuleResult) {
        self.rules.push(make());
    }
}

pub(super) fn stage(
    name: &str,
    before: u32,
    after: u32,
    detail: impl Into<String>,
) -> EvaluationStage {
    EvaluationStage {
        name: name.into(),
        before,
        after,
        detail: detail.into(),
    }
}
