//! Where an evaluation says what it does. The silent recorder compiles to nothing, so the fast path
//! and the full explanation are one piece of code and cannot part.

use contract::decision::{RuleResult, Stage};

pub(super) trait Recorder {
    fn stage(&mut self, make: impl FnOnce() -> Stage);
    fn rule(&mut self, make: impl FnOnce() -> RuleResult);
}

pub(super) struct Silent;

impl Recorder for Silent {
    fn stage(&mut self, _: impl FnOnce() -> Stage) {}
    fn rule(&mut self, _: impl FnOnce() -> RuleResult) {}
}

#[derive(Default)]
pub(super) struct Full {
    pub stages: Vec<Stage>,
    pub rules: Vec<RuleResult>,
}

impl Recorder for Full {
    fn stage(&mut self, make: impl FnOnce() -> Stage) {
        self.stages.push(make());
    }

    fn rule(&mut self, make: impl FnOnce() -> RuleResult) {
        self.rules.push(make());
    }
}

pub(super) fn stage(name: &str, before: u32, after: u32, detail: impl Into<String>) -> Stage {
    Stage {
        name: name.into(),
        before,
        after,
        detail: detail.into(),
    }
}
