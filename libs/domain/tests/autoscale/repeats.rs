//! Which decisions are recorded while results alternate.

use contract::decision::{Decision, DecisionOutcome};
use contract::time::Span;
use domain::autoscale::{Repeats, carry, evaluate, explain, should_write};
use serde_json::json;

use crate::harness::*;

/// Records decisions as the service does.
struct Recorder {
    harness: Harness,
    repeats: Repeats,
    recorded: Vec<Decision>,
}

impl Recorder {
    /// Follows a rate with 10 a second for each instance, without tolerance, and scales in after 5 minutes.
    fn new(count: u32) -> Self {
        let rules = json!([{
            "name": "follow", "metric": {"name": "requests_per_second"},
            "track": {"target": 10, "tolerance": "0%"},
        }]);
        Self {
            harness: Harness::new(
                document(rules, json!({"stabilization": {"in": "5m"}})),
                count,
            ),
            repeats: Repeats::default(),
            recorded: Vec::new(),
        }
    }

    /// Evaluates a second with this rate; returns the outcome.
    fn second(&mut self, rate: f64) -> DecisionOutcome {
        self.harness = self.harness.clone().value(RATE, rate);
        let policy = compile(self.harness.inputs.policy.as_ref().unwrap()).unwrap();
        let decision = self.harness.decide();
        let evaluated = decision.outcome;
        let signals = vec![Some(whole(rate))];
        let mut carried = self.harness.inputs.carried.clone();
        let tick = self.harness.tick(&signals, &carried);
        let evaluation = evaluate(Some(&policy), &tick, self.harness.now);
        let previous = self.recorded.last();
        let (repeats, now) = (&mut self.repeats, self.harness.now);
        if repeats.should_record(previous, Some(&policy), &tick, &evaluation, now) {
            let of = deployment();
            let decision = explain(&of, uid(), Some(&policy), &tick, self.harness.now);
            self.repeats.recorded(&decision);
            self.recorded.push(decision);
        }
        let now = self.harness.now;
        carry(&mut carried, Some(&policy), &evaluation, now);
        self.harness.step(1);
        self.harness.inputs.carried = carried;
        evaluated
    }
}

#[test]
fn results_that_alternate_each_second_are_recorded_a_few_times_only() {
    let mut recorder = Recorder::new(6);
    let mut outcomes = Vec::new();
    for second in 0..200 {
        outcomes.push(recorder.second(if second % 2 == 0 { 49.9 } else { 50.1 }));
    }
    let held = DecisionOutcome::HeldByStabilization;
    assert!(
        outcomes.ends_with(&[held, DecisionOutcome::Steady]),
        "{outcomes:?}"
    );
    assert!(
        recorder.recorded.len() <= 6,
        "{:?}",
        recorder.recorded.len()
    );
}

#[test]
fn a_repeated_result_that_lasts_is_recorded() {
    let mut recorder = Recorder::new(6);
    for second in 0..40 {
        recorder.second(if second % 2 == 0 { 49.9 } else { 50.1 });
    }
    let held = DecisionOutcome::HeldByStabilization;
    let lasting = match recorder.recorded.last().unwrap().outcome == held {
        true => 50.1,
        false => 49.9,
    };
    let before = recorder.recorded.len();
    let expected = (0..62).map(|_| recorder.second(lasting)).last();
    assert_eq!(recorder.recorded.len(), before + 1);
    assert_eq!(
        recorder.recorded.last().map(|decision| decision.outcome),
        expected
    );
}

#[test]
fn a_change_of_the_count_is_always_recorded() {
    let mut recorder = Recorder::new(6);
    for second in 0..40 {
        recorder.second(if second % 2 == 0 { 49.9 } else { 50.1 });
    }
    recorder.second(65.0);
    let last = recorder.recorded.last().unwrap();
    assert_eq!((last.from, last.granted), (6, 7));
}

#[test]
fn each_pin_is_recorded_even_to_the_same_count() {
    let mut recorder = Recorder::new(2);
    for (hours, by) in [
        (1, "token:ann"),
        (5, "token:ann"),
        (5, "token:bob"),
        (1, "token:ann"),
    ] {
        let until = START + Span::from_secs(hours * 3600);
        recorder.harness = recorder.harness.clone().pinned(2, Some(until));
        recorder.harness.inputs.pinned_by = Some(by.into());
        let before = recorder.recorded.len();
        recorder.second(20.0);
        recorder.second(20.0);
        let recorded = &recorder.recorded[before..];
        assert_eq!(recorded.len(), 1, "{hours} {by}");
        assert_eq!(recorded[0].inputs.pin.unwrap().until, Some(until));
        assert_eq!(recorded[0].inputs.pinned_by.as_deref(), Some(by));
    }
    let [.., first, second] = &recorder.recorded[..] else {
        panic!("{:?}", recorder.recorded);
    };
    assert!(should_write(Some(first), second));
}

#[test]
fn the_first_evaluation_of_each_revision_is_recorded_even_with_the_same_result() {
    let mut recorder = Recorder::new(2);
    for revision in [1, 2, 3] {
        recorder.harness.inputs.policy_revision = revision;
        let before = recorder.recorded.len();
        recorder.second(20.0);
        recorder.second(20.0);
        let recorded = &recorder.recorded[before..];
        assert_eq!(recorded.len(), 1, "{revision}");
        assert_eq!(recorded[0].inputs.policy_revision, revision);
        assert_eq!(recorded[0].granted, 2);
    }
}
