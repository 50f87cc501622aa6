//! How decisions depend on earlier ones: cooldowns, stabilization, restarts, the clock.

use contract::decision::{CarriedState, Decision, DecisionOutcome, LastChange, Recommendation};
use contract::time::{Span, Timestamp};
use domain::autoscale::{
    ENGINE_VERSION, carried_after_clock_step, carried_after_restart, should_write,
};
use serde_json::json;

use crate::harness::*;

fn out_and_in(more: serde_json::Value) -> serde_json::Value {
    let rules = json!([
        on_concurrency("out", "> 4", json!({"direction": "out", "by": 1})),
        on_concurrency("in", "< 1", json!({"direction": "in", "by": 1})),
    ]);
    document(rules, more)
}

fn changed(seconds_ago: u64) -> Option<LastChange> {
    Some(LastChange {
        at: START - Span::from_secs(seconds_ago),
        rule: None,
    })
}

#[test]
fn cooldowns_hold_by_direction_and_a_scale_in_never_keeps_a_scale_out_waiting() {
    let more = json!({"cooldown": {"out": "30s", "in": "5m"}});
    for (last_out, last_in, total, granted, outcome) in [
        (changed(29), None, 40.0, 4, DecisionOutcome::HeldByCooldown),
        (changed(30), None, 40.0, 5, DecisionOutcome::Applied),
        (None, changed(1), 40.0, 5, DecisionOutcome::Applied),
        (None, changed(299), 0.0, 4, DecisionOutcome::HeldByCooldown),
        (None, changed(300), 0.0, 3, DecisionOutcome::Applied),
        // An instance that was just added is not removed right away.
        (changed(299), None, 0.0, 4, DecisionOutcome::HeldByCooldown),
        (changed(300), changed(400), 0.0, 3, DecisionOutcome::Applied),
    ] {
        let mut harness = Harness::new(out_and_in(more.clone()), 4).value(CONCURRENCY, total);
        harness.inputs.carried.last_out = last_out.clone();
        harness.inputs.carried.last_in = last_in.clone();
        let decision = harness.decide();
        assert_eq!(
            (decision.granted, decision.outcome),
            (granted, outcome),
            "{last_out:?} {last_in:?}"
        );
    }
}

#[test]
fn a_rules_own_cooldown_comes_before_the_policys() {
    let rules = json!([
        on_concurrency(
            "slow",
            "> 4",
            json!({"direction": "out", "by": 5, "cooldown": "10m"})
        ),
        on_concurrency(
            "quick",
            "> 4",
            json!({"direction": "out", "by": 1, "cooldown": "10s"})
        ),
    ]);
    for (seconds, granted) in [(9, 4), (10, 5), (599, 5), (600, 9)] {
        let mut harness =
            Harness::new(document(rules.clone(), json!({})), 4).value(CONCURRENCY, 40.0);
        harness.inputs.carried.last_out = changed(seconds);
        assert_eq!(harness.decide().granted, granted, "{seconds} s after");
    }
}

#[test]
fn scale_in_waits_for_the_cooldowns_of_all_rules_that_agree() {
    let rules = json!([
        on_concurrency(
            "short",
            "< 1",
            json!({"direction": "in", "by": 1, "cooldown": "10s"})
        ),
        on_concurrency(
            "long",
            "< 1",
            json!({"direction": "in", "by": 2, "cooldown": "10m"})
        ),
    ]);
    for (seconds, granted) in [(11, 4), (600, 3)] {
        let mut harness =
            Harness::new(document(rules.clone(), json!({})), 4).value(CONCURRENCY, 0.0);
        harness.inputs.carried.last_in = changed(seconds);
        assert_eq!(harness.decide().granted, granted, "{seconds} s after");
    }
}

#[test]
fn scale_in_takes_the_largest_recommendation_of_its_window() {
    let rules = json!([{
        "name": "follow", "metric": {"name": "requests_per_second"},
        "track": {"target": 10, "tolerance": "0%"},
    }]);
    let mut harness = Harness::new(document(rules, json!({"stabilization": {"in": "60s"}})), 10);
    let mut counts = Vec::new();
    // 100/s for 10 s, 80/s for 30 s, then 20/s.
    for second in 0..200 {
        let rate = match second {
            0..10 => 100.0,
            10..40 => 80.0,
            _ => 20.0,
        };
        harness = harness.value(RATE, rate);
        counts.push(harness.step(1).granted);
    }
    // Each recommendation counts until it is a minute old.
    assert_eq!(counts[68], 10);
    assert_eq!(counts[69], 8);
    assert_eq!(counts[98], 8);
    assert_eq!(counts[99], 2);
    assert!(counts.iter().all(|count| [10, 8, 2].contains(count)));
    assert!(harness.inputs.carried.recommendations.len() <= 3);
}

#[test]
fn scale_out_takes_the_smallest_recommendation_of_its_window() {
    let mut harness = Harness::new(out_and_in(json!({"stabilization": {"out": "30s"}})), 4);
    let mut counts = Vec::new();
    for second in 0..60 {
        let total = if second < 10 { 8.0 } else { 40.0 };
        harness = harness.value(CONCURRENCY, total);
        counts.push(harness.step(1).granted);
    }
    assert_eq!(counts[38], 4);
    assert_eq!(counts[39], 5);
}

#[test]
fn a_short_peak_does_not_scale_in_afterwards_before_its_time() {
    let mut harness = Harness::new(out_and_in(json!({"stabilization": {"in": "5m"}})), 4);
    let peak = |second: u64| if second < 3 { 40.0 } else { 0.0 };
    let mut last_count = 0;
    for second in 0..302 {
        harness = harness.value(CONCURRENCY, peak(second));
        last_count = harness.step(1).granted;
    }
    assert_eq!(last_count, 7);
    let held = harness.decide();
    assert_eq!((held.granted, held.outcome), (6, DecisionOutcome::Applied));
}

#[test]
fn the_change_remembers_its_rule_and_time() {
    let mut harness = Harness::new(out_and_in(json!({})), 4).value(CONCURRENCY, 40.0);
    harness.step(1);
    let carried = &harness.inputs.carried;
    assert_eq!(carried.granted, Some(5));
    let expected = LastChange {
        at: START,
        rule: Some("out".into()),
    };
    assert_eq!(carried.last_out, Some(expected));
    assert_eq!(carried.last_in, None);
}

#[test]
fn after_a_restart_the_windows_are_filled_with_the_current_count() {
    let more = json!({"stabilization": {"in": "60s"}, "cooldown": {"in": "90s", "out": "0s"}});
    let mut harness = Harness::new(out_and_in(more), 4).value(CONCURRENCY, 40.0);
    let last = harness.step(1);
    let now = START + Span::from_secs(40);
    harness.inputs.carried = carried_after_restart(&last, now);
    assert_eq!(harness.inputs.carried.granted, Some(5));
    harness = harness.value(CONCURRENCY, 0.0);
    let mut outcome = |seconds: u64| {
        harness.now = START + Span::from_secs(seconds);
        harness.decide().outcome
    };
    assert_eq!(outcome(40), DecisionOutcome::HeldByStabilization);
    assert_eq!(outcome(99), DecisionOutcome::HeldByStabilization);
    // The cooldown kept running through the restart.
    assert_eq!(outcome(100), DecisionOutcome::Applied);
}

#[test]
fn after_a_change_of_the_engine_the_count_is_the_one_that_was_granted() {
    let document = out_and_in(json!({"cooldown": {"out": "30s"}}));
    let mut harness = Harness::new(document, 4).value(CONCURRENCY, 40.0);
    let ours = harness.step(1);
    assert_eq!((ours.from, ours.granted), (4, 5));
    let recorded = |granted: u32, rule: &str| Decision {
        engine_version: ENGINE_VERSION - 1,
        granted,
        decided_by: Some(rule.to_owned()),
        ..ours.clone()
    };
    let change = |rule: &str| {
        Some(LastChange {
            at: ours.at,
            rule: Some(rule.to_owned()),
        })
    };
    let now = START + Span::from_secs(40);
    let more = carried_after_restart(&recorded(9, "older"), now);
    assert_eq!((more.granted, more.last_out), (Some(9), change("older")));
    assert_eq!(more.last_in, None);
    assert_eq!(
        more.recommendations,
        [Recommendation {
            last: now,
            instances: 9
        }]
    );
    let less = carried_after_restart(&recorded(2, "older"), now);
    assert_eq!((less.granted, less.last_in), (Some(2), change("older")));
    let same = carried_after_restart(&recorded(4, "older"), now);
    assert_eq!(
        (same.granted, same.last_out, same.last_in),
        (Some(4), None, None)
    );
}

#[test]
fn restarting_from_a_decision_of_this_engine_equals_carrying_its_state() {
    let document = out_and_in(json!({"cooldown": {"out": "30s"}}));
    let mut harness = Harness::new(document, 4).value(CONCURRENCY, 40.0);
    let decision = harness.step(1);
    let carried = carried_after_restart(&decision, decision.at);
    assert_eq!(
        CarriedState {
            recommendations: Vec::new(),
            ..carried
        },
        CarriedState {
            recommendations: Vec::new(),
            ..carried_after(&decision)
        }
    );
}

#[test]
fn a_clock_set_back_keeps_what_has_elapsed() {
    let mut harness = Harness::new(
        out_and_in(json!({"cooldown": {"out": "30s", "in": "30s"}})),
        4,
    );
    harness.inputs.carried.last_out = changed(20);
    let clock = START - Span::from_secs(3600);
    harness.inputs.carried = carried_after_clock_step(&harness.inputs.carried, START, clock);
    harness = harness.value(CONCURRENCY, 40.0);
    harness.now = clock + Span::from_secs(9);
    assert_eq!(harness.decide().outcome, DecisionOutcome::HeldByCooldown);
    harness.now = clock + Span::from_secs(10);
    assert_eq!(harness.decide().outcome, DecisionOutcome::Applied);
}

#[test]
fn a_decision_is_written_only_when_it_says_something_new() {
    let mut harness =
        Harness::new(out_and_in(json!({"cooldown": {"out": "30s"}})), 4).value(CONCURRENCY, 8.0);
    let steady = harness.step(1);
    assert!(should_write(None, &steady));
    let reevaluated = harness.clone().value(CONCURRENCY, 9.0).decide();
    assert!(!should_write(Some(&steady), &reevaluated));
    harness = harness.value(CONCURRENCY, 40.0);
    let applied = harness.step(1);
    assert!(should_write(Some(&reevaluated), &applied));
    let held = harness.value(CONCURRENCY, 60.0).decide();
    assert_eq!(held.outcome, DecisionOutcome::HeldByCooldown);
    assert!(should_write(Some(&applied), &held));
}

#[test]
fn pins_and_releases_start_cooldowns_and_are_recorded_as_recommendations() {
    let more = json!({"stabilization": {"in": "60s"}});
    let mut harness = Harness::new(out_and_in(more), 4)
        .value(CONCURRENCY, 0.0)
        .pinned(9, None);
    let pinned = harness.step(1);
    let carried = carried_after(&pinned);
    assert_eq!(
        carried.last_out,
        Some(LastChange {
            at: START,
            rule: None
        })
    );
    harness.inputs.pin = None;
    let released = harness.decide();
    assert_eq!(
        (released.granted, released.outcome),
        (9, DecisionOutcome::HeldByStabilization)
    );
    harness.now = Timestamp::from_secs(START.secs() + 61);
    assert_eq!(harness.decide().granted, 8);
}
