//! What a decision says changed the count, and what that starts.

use std::sync::Arc;

use contract::decision::{
    CauseKind, Decision, DecisionOutcome, FailedStarts, Pause, RuleResult, Signal,
};
use contract::resources::AutoscaleMode;
use contract::time::Span;
use domain::autoscale::{carried_after_restart, explain::text};
use serde_json::{Value, json};

use crate::harness::*;

/// A day profile of at least 4 that is active, and a default profile of 1 to 3, with a rule that follows
/// the rate.
fn scheduled() -> Value {
    let rules = json!([
        {"name": "follow", "metric": {"name": "requests_per_second"}, "track": {"target": 10}},
    ]);
    let profiles = json!([
        {"name": "default", "capacity": {"min": 1, "max": 3, "default": 1}, "rules": rules},
        {"name": "day", "priority": 1, "capacity": {"min": 4, "max": 8, "default": 4},
         "schedule": {"dated": {"from": "2026-09-21T14:00:00", "to": "2026-09-21T15:00:00"}}},
    ]);
    document(
        json!([]),
        json!({"profiles": profiles, "cooldown": {"out": "10m", "in": "10m"}}),
    )
}

/// Decides at this count, the last of which was granted under a profile.
fn harness(count: u32, profile: &str, rate: f64) -> Harness {
    let mut harness = Harness::new(scheduled(), count).value(RATE, rate);
    harness.inputs.carried.profile = Some(profile.to_owned());
    harness.inputs.carried.policy_revision = Some(1);
    harness
}

fn cause(decision: &Decision) -> (CauseKind, Option<&str>, &str) {
    let cause = decision.cause.as_ref().unwrap();
    (cause.kind, cause.name.as_deref(), &cause.detail)
}

#[test]
fn the_start_of_a_schedule_is_the_cause_and_not_a_rule_that_wants_fewer() {
    let decision = harness(2, "default", 15.0).decide();
    assert_eq!(
        (decision.granted, decision.outcome, &decision.decided_by),
        (4, DecisionOutcome::Applied, &None)
    );
    assert_eq!(
        cause(&decision),
        (
            CauseKind::Profile,
            Some("day"),
            "profile `day` has begun: it allows 4 to 8"
        )
    );
}

#[test]
fn the_end_of_a_schedule_is_the_cause() {
    let mut harness = harness(6, "day", 200.0);
    harness.now = START + Span::from_secs(86_400);
    let decision = harness.decide();
    assert_eq!(decision.granted, 3);
    assert_eq!(
        cause(&decision),
        (
            CauseKind::Profile,
            Some("default"),
            "profile `day` has ended, `default` is in force: it allows 1 to 3"
        )
    );
}

#[test]
fn a_rule_that_asks_for_more_than_a_new_minimum_is_the_cause() {
    let decision = harness(2, "default", 55.0).decide();
    assert_eq!(decision.granted, 6);
    let (kind, name, detail) = cause(&decision);
    assert_eq!((kind, name), (CauseKind::Rule, Some("follow")));
    assert!(detail.starts_with("`follow`: 27.5 for"), "{detail}");
}

#[test]
fn changed_bounds_are_the_cause() {
    let mut harness = harness(2, "day", 15.0);
    harness.inputs.policy_revision = 2;
    let decision = harness.decide();
    assert_eq!(decision.granted, 4);
    assert_eq!(
        cause(&decision),
        (
            CauseKind::Bounds,
            Some("day"),
            "revision 2 of the Autoscale: `day` allows 4 to 8"
        )
    );
}

#[test]
fn an_autoscale_that_begins_to_apply_is_the_cause_of_its_bounds() {
    let mut harness = harness(2, "day", 15.0);
    harness.inputs.carried.profile = None;
    harness.inputs.carried.policy_revision = Some(0);
    let decision = harness.decide();
    assert_eq!(
        cause(&decision),
        (
            CauseKind::Bounds,
            Some("day"),
            "the Autoscale applies from now on: `day` allows 4 to 8"
        )
    );
}

#[test]
fn a_pin_is_the_cause_with_who_set_it_and_its_end_is_one_too() {
    let mut harness = harness(6, "day", 55.0).pinned(12, None);
    harness.inputs.pinned_by = Some("token:alice".into());
    let pinned = harness.step(1);
    assert_eq!(
        cause(&pinned),
        (
            CauseKind::Pin,
            None,
            "pinned by hand until released, by token:alice"
        )
    );
    harness.inputs.pin = None;
    let released = harness.step(1);
    assert_eq!(
        (released.granted, &released.decided_by),
        (8, &None),
        "{released:?}"
    );
    assert_eq!(
        cause(&released),
        (
            CauseKind::PinEnd,
            None,
            "the pin to 12 has ended: `day` is in force, it allows 4 to 8"
        )
    );
}

#[test]
fn a_pause_is_the_cause_of_a_count_outside_of_new_bounds() {
    let mut harness = harness(2, "default", 15.0);
    harness.inputs.pause = Pause {
        scale_in: false,
        scale_out: true,
    };
    let decision = harness.decide();
    assert_eq!(decision.granted, 2);
    assert_eq!(
        cause(&decision),
        (
            CauseKind::Pause,
            None,
            "scale-out is paused: the count stays"
        )
    );
}

#[test]
fn a_bound_that_keeps_the_count_is_the_cause_and_its_rule_is_named() {
    let decision = harness(8, "day", 200.0).decide();
    assert_eq!(decision.outcome, DecisionOutcome::Clamped);
    let (kind, name, detail) = cause(&decision);
    assert_eq!((kind, name), (CauseKind::Bounds, Some("day")));
    assert!(
        detail.starts_with("`follow` asks for more than the maximum 8 of `day`: "),
        "{detail}"
    );
    assert_eq!(decision.decided_by.as_deref(), Some("follow"));
}

#[test]
fn a_removed_autoscale_is_the_cause_of_the_deployments_own_count() {
    let mut harness = harness(6, "day", 55.0);
    harness.inputs.policy = None;
    harness.inputs.policy_revision = 0;
    let decision = harness.decide();
    assert_eq!(decision.granted, 3);
    assert_eq!(
        cause(&decision),
        (
            CauseKind::Document,
            None,
            "the Autoscale was removed: the deployment's own count"
        )
    );
}

#[test]
fn a_removed_autoscale_keeps_the_count_while_scaling_is_paused() {
    let mut harness = harness(6, "day", 55.0);
    harness.inputs.policy = None;
    harness.inputs.pause = Pause {
        scale_in: true,
        scale_out: true,
    };
    let held = harness.step(1);
    assert_eq!(
        (held.granted, held.outcome),
        (6, DecisionOutcome::HeldByPause)
    );
    harness.inputs.pause = Pause::default();
    assert_eq!(harness.decide().granted, 3);
}

#[test]
fn a_pause_does_not_hold_the_count_that_a_person_sets() {
    let mut harness = harness(6, "day", 55.0);
    harness.inputs.pause = Pause {
        scale_in: true,
        scale_out: true,
    };
    // An Autoscale decides, whatever the deployment says.
    harness.inputs.fixed_instances = 2;
    assert_eq!(harness.step(1).granted, 6);
    harness.inputs.policy = None;
    assert_eq!(harness.step(1).outcome, DecisionOutcome::HeldByPause);
    for count in [4, 9] {
        harness.inputs.fixed_instances = count;
        let applied = harness.step(1);
        assert_eq!(
            (applied.granted, applied.outcome),
            (count, DecisionOutcome::Fixed)
        );
        assert_eq!(harness.step(1).granted, count);
    }
}

#[test]
fn nothing_is_the_cause_of_a_count_that_nothing_asks_to_change() {
    let decision = harness(5, "day", 50.0).decide();
    assert_eq!(decision.outcome, DecisionOutcome::Steady);
    assert_eq!(decision.cause, None);
}

#[test]
fn the_explanation_has_the_same_sentence() {
    for decision in [
        harness(2, "default", 15.0).decide(),
        harness(8, "day", 200.0).decide(),
        harness(4, "day", 65.0).decide(),
        harness(4, "day", 65.0).pinned(9, None).decide(),
    ] {
        let sentence = &decision.cause.as_ref().unwrap().detail[1..];
        let explained = text(&decision);
        let second = explained.lines().nth(1).unwrap();
        assert_eq!(&second[1..second.len() - 1], sentence);
    }
}

#[test]
fn corrections_by_bounds_and_schedules_start_no_cooldown() {
    let mut harness = harness(2, "default", 15.0);
    assert_eq!(harness.step(1).granted, 4);
    assert_eq!(harness.inputs.carried.last_out, None);
    let follows = harness.value(RATE, 60.0).decide();
    assert_eq!(
        (follows.granted, follows.outcome),
        (6, DecisionOutcome::Applied)
    );
}

#[test]
fn a_correction_starts_no_cooldown_after_a_restart_either() {
    let decision = harness(2, "default", 15.0).decide();
    let carried = carried_after_restart(&decision, START);
    assert_eq!((carried.granted, carried.last_out), (Some(4), None));
    assert_eq!(carried.profile.as_deref(), Some("day"));
}

#[test]
fn a_pin_starts_cooldowns() {
    let mut harness = harness(4, "day", 65.0).pinned(5, None);
    harness.step(1);
    harness.inputs.pin = None;
    assert_eq!(harness.decide().outcome, DecisionOutcome::HeldByCooldown);
}

#[test]
fn a_target_says_what_the_load_needs_and_what_there_is() {
    let decision = harness(6, "day", 66.1).decide();
    let because = &decision.rules[0].because;
    assert!(
        because.contains("needs 6.61 instances, has 6, tolerance 10%"),
        "{because}"
    );
}

fn evidence(rule: &RuleResult) -> contract::decision::Evidence {
    rule.evidence.unwrap()
}

#[test]
fn each_rule_shows_its_evidence() {
    let rules = json!([
        on_concurrency("busy", "> 4", json!({"direction": "out", "by": 1})),
        on_cpu("hot", "> 70", json!({"direction": "out", "by": 1})),
    ]);
    let asked = Signal {
        refused: 1335,
        answered: Some(65),
        ..whole(2.0)
    };
    let burnt = Signal {
        instances: Some(2.5),
        ..whole(50.0)
    };
    let decision = Harness::new(document(rules, json!({})), 4)
        .signal(CONCURRENCY, asked)
        .signal(CPU, burnt)
        .ready(3, 1)
        .decide();
    let (busy, hot) = (evidence(&decision.rules[0]), evidence(&decision.rules[1]));
    assert_eq!(
        (busy.answered, busy.refused, busy.ready),
        (Some(65), 1335, 3)
    );
    assert_eq!((hot.answered, hot.measured), (None, Some(2.5)));
    let text = text(&decision);
    assert!(
        text.contains("65 answered, 1335 refused, 3 ready"),
        "{text}"
    );
    assert!(text.contains("2.5 measured, 3 ready"), "{text}");
}

fn failing(never_ready: bool) -> Option<FailedStarts> {
    Some(FailedStarts {
        in_a_row: 5,
        reason: "exit code 1".into(),
        never_ready,
    })
}

#[test]
fn with_none_ready_the_explanation_says_that_starts_fail_and_why() {
    let mut harness = harness(8, "day", 80.0).ready(0, 8);
    harness.inputs.failed_starts = failing(true);
    let text = text(&harness.decide());
    assert!(text.contains("0 ready, 8 pending"), "{text}");
    assert!(
        text.contains("5 starts in a row failed, the last one with: exit code 1"),
        "{text}"
    );
}

#[test]
fn rules_hold_while_a_revision_was_never_ready_and_its_last_start_failed() {
    for (rate, never_ready, granted, outcome) in [
        (80.0, true, 5, DecisionOutcome::HeldByFailedStarts),
        (0.0, true, 5, DecisionOutcome::HeldByFailedStarts),
        (50.0, true, 5, DecisionOutcome::Steady),
        (80.0, false, 8, DecisionOutcome::Applied),
    ] {
        let mut harness = harness(5, "day", rate).ready(0, 5);
        harness.inputs.failed_starts = failing(never_ready);
        let decision = harness.decide();
        assert_eq!(
            (decision.granted, decision.outcome),
            (granted, outcome),
            "{rate} {never_ready}"
        );
    }
}

#[test]
fn bounds_and_pins_act_while_starts_fail() {
    let mut harness = harness(2, "default", 80.0).ready(0, 2);
    harness.inputs.failed_starts = failing(true);
    let bounded = harness.clone().decide();
    assert_eq!(
        (bounded.granted, cause(&bounded).0),
        (4, CauseKind::Profile)
    );
    assert_eq!(harness.pinned(7, None).decide().granted, 7);
}

#[test]
fn an_autoscale_that_comes_with_its_deployment_begins_with_its_default() {
    let own = |starts_at_default| {
        let mut harness = harness(1, "day", 60.0);
        harness.inputs.carried.profile = None;
        harness.inputs.carried.policy_revision = Some(0);
        harness.inputs.starts_at_default = starts_at_default;
        harness
    };
    assert_eq!(own(false).decide().granted, 6);
    let mut together = own(true);
    let first = together.step(1);
    assert_eq!((first.from, first.granted), (1, 4));
    assert_eq!(
        cause(&first),
        (
            CauseKind::Profile,
            Some("day"),
            "the first count of profile `day` is its default"
        )
    );
    assert_eq!(together.step(1).granted, 6, "then its rules decide");
}

#[test]
fn a_paused_autoscale_that_comes_after_its_deployment_keeps_the_count() {
    let mut paused = harness(1, "day", 60.0);
    Arc::make_mut(paused.inputs.policy.as_mut().unwrap()).mode = AutoscaleMode::Paused;
    paused.inputs.carried.profile = None;
    paused.inputs.carried.policy_revision = Some(0);
    paused.inputs.starts_at_default = true;
    let first = paused.decide();
    assert_eq!(
        (first.granted, first.outcome),
        (1, DecisionOutcome::HeldByPause)
    );
}
