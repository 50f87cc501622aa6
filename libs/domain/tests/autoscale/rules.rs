//! What rules decide in one tick.

use std::sync::Arc;

use contract::decision::{DecisionOutcome, Verdict};
use serde_json::json;

use crate::harness::*;

fn verdict(decision: &contract::decision::Decision, rule: &str) -> Verdict {
    decision
        .rules
        .iter()
        .find(|result| result.name == rule)
        .unwrap()
        .verdict
}

#[test]
fn amounts_are_counts_shares_exact_counts_and_steps() {
    let steps =
        json!({"direction": "out", "steps": [{"above": 8, "by": 3}, {"above": 4, "by": 1}]});
    let steps_in =
        json!({"direction": "in", "steps": [{"below": 2, "by": "50%"}, {"below": 4, "by": 1}]});
    for (when, scale, count, per_instance, granted) in [
        ("> 4", json!({"direction": "out", "by": 2}), 4, 5.0, 6),
        ("> 4", json!({"direction": "out", "by": 2}), 4, 4.0, 4),
        (">= 4", json!({"direction": "out", "by": 2}), 4, 4.0, 6),
        ("> 4", json!({"direction": "out", "by": "50%"}), 5, 5.0, 8),
        ("> 4", json!({"direction": "out", "by": "1%"}), 5, 5.0, 6),
        ("> 4", json!({"direction": "out", "to": 10}), 4, 5.0, 10),
        ("> 4", json!({"direction": "out", "to": 3}), 4, 5.0, 4),
        ("> 4", steps.clone(), 4, 5.0, 5),
        ("> 4", steps.clone(), 4, 9.0, 7),
        ("< 4", json!({"direction": "in", "by": 2}), 6, 1.0, 4),
        ("< 4", json!({"direction": "in", "by": "50%"}), 5, 1.0, 3),
        ("< 4", json!({"direction": "in", "by": "10%"}), 5, 1.0, 4),
        ("< 4", json!({"direction": "in", "to": 2}), 5, 1.0, 2),
        ("< 4", json!({"direction": "in", "to": 9}), 5, 1.0, 5),
        ("< 4", steps_in.clone(), 6, 3.0, 5),
        ("< 4", steps_in.clone(), 6, 1.0, 3),
        ("== 4", json!({"direction": "out", "by": 1}), 4, 4.0, 5),
        ("!= 4", json!({"direction": "out", "by": 1}), 4, 4.0, 4),
    ] {
        let rules = json!([on_concurrency("rule", when, scale.clone())]);
        let decision = Harness::new(document(rules, json!({})), count)
            .value(CONCURRENCY, per_instance * f64::from(count))
            .decide();
        assert_eq!(decision.granted, granted, "{when} {scale} at {count}");
    }
}

#[test]
fn steps_alone_need_no_condition() {
    let mut rule = on_concurrency(
        "rule",
        "",
        json!({"direction": "out", "steps": [{"above": 4, "by": 1}]}),
    );
    rule.as_object_mut().unwrap().remove("when");
    for (value, granted) in [(16.0, 4), (17.0, 5)] {
        let harness = Harness::new(document(json!([rule]), json!({})), 4).value(CONCURRENCY, value);
        assert_eq!(harness.decide().granted, granted);
    }
}

#[test]
fn any_rule_scales_out_and_the_largest_count_wins() {
    let rules = json!([
        on_concurrency("few", "> 4", json!({"direction": "out", "by": 1})),
        on_cpu("many", "> 70", json!({"direction": "out", "by": "100%"})),
    ]);
    for (concurrency, cpu, granted, by) in [
        (5.0, 50.0, 5, Some("few")),
        (1.0, 80.0, 8, Some("many")),
        (5.0, 80.0, 8, Some("many")),
        (1.0, 50.0, 4, None),
    ] {
        let decision = Harness::new(document(rules.clone(), json!({})), 4)
            .value(CONCURRENCY, concurrency * 4.0)
            .value(CPU, cpu)
            .decide();
        assert_eq!(decision.granted, granted);
        assert_eq!(decision.decided_by.as_deref(), by);
    }
}

#[test]
fn all_rules_must_agree_to_scale_in_and_the_largest_count_wins() {
    let rules = json!([
        on_concurrency("much", "< 2", json!({"direction": "in", "by": 5})),
        on_cpu("little", "< 30", json!({"direction": "in", "by": 1})),
    ]);
    for (concurrency, cpu, granted) in [(1.0, 20.0, 9), (3.0, 20.0, 10), (1.0, 40.0, 10)] {
        let decision = Harness::new(document(rules.clone(), json!({})), 10)
            .value(CONCURRENCY, concurrency * 10.0)
            .value(CPU, cpu)
            .decide();
        assert_eq!(decision.granted, granted, "{concurrency} {cpu}");
    }
}

#[test]
fn a_rule_that_scales_out_suppresses_rules_that_scale_in() {
    let rules = json!([
        on_concurrency("out", "> 4", json!({"direction": "out", "by": 1})),
        on_cpu("in", "< 30", json!({"direction": "in", "by": 1})),
    ]);
    let decision = Harness::new(document(rules, json!({})), 4)
        .value(CONCURRENCY, 20.0)
        .value(CPU, 10.0)
        .decide();
    assert_eq!(decision.granted, 5);
    assert_eq!(verdict(&decision, "out"), Verdict::Triggered);
    assert_eq!(verdict(&decision, "in"), Verdict::Suppressed);
}

fn track(target: f64) -> serde_json::Value {
    json!([{
        "name": "follow",
        "metric": {"name": "requests_per_second"},
        "track": {"target": target},
    }])
}

#[test]
fn tracking_gives_each_instance_its_target_outside_of_the_tolerance() {
    for (count, rate, granted) in [
        (4, 80.0, 4),
        (4, 88.0, 4),
        (4, 89.0, 5),
        (4, 73.0, 4),
        (4, 60.0, 3),
        (4, 200.0, 10),
        (4, 0.0, 1),
        (1, 21.0, 1),
        (1, 23.0, 2),
        // 10 % of many is a lot: 19 would suffice, but 19.9 is within the tolerance of 20.
        (20, 370.0, 20),
        (20, 350.0, 18),
    ] {
        let decision = Harness::new(document(track(20.0), json!({})), count)
            .value(RATE, rate)
            .decide();
        assert_eq!(decision.granted, granted, "{rate} at {count}");
    }
}

#[test]
fn a_target_met_exactly_asks_for_no_instance_more() {
    // 1.1 / 0.1 is slightly more than 11 in binary.
    let decision = Harness::new(document(track(0.1), json!({})), 2)
        .value(RATE, 1.1)
        .decide();
    assert_eq!(decision.granted, 11);
}

#[test]
fn pending_instances_count_as_capacity_when_tracking() {
    // Two of four are ready: four can carry the load of 80, so no more are asked for.
    let harness = Harness::new(document(track(20.0), json!({})), 4).value(RATE, 80.0);
    assert_eq!(harness.ready(2, 2).decide().granted, 4);
}

#[test]
fn shares_per_instance_are_of_the_ready_ones_and_of_one_if_none_is() {
    let rules = json!([on_concurrency(
        "out",
        "> 4",
        json!({"direction": "out", "by": 1})
    )]);
    for (ready, value) in [(4, 3.0), (2, 6.0), (1, 12.0), (0, 12.0)] {
        let decision = Harness::new(document(rules.clone(), json!({})), 4)
            .value(CONCURRENCY, 12.0)
            .ready(ready, 4 - ready)
            .decide();
        assert_eq!(decision.rules[0].value, Some(value), "{ready} ready");
    }
}

#[test]
fn scale_in_stops_where_a_rule_would_scale_out_again() {
    // v' = v * current / new, from the recommendation up to the current count.
    for (cpu, count, to, granted, outcome) in [
        // The documented trap: 65 % on 30 must stop at 28 (69.6 %), since 27 would read 72.2 %.
        (65.0, 30, 20, 28, DecisionOutcome::Applied),
        (35.0, 30, 15, 15, DecisionOutcome::Applied),
        (36.0, 30, 15, 16, DecisionOutcome::Applied),
        (69.0, 30, 20, 30, DecisionOutcome::HeldByProjection),
        (70.0, 30, 20, 30, DecisionOutcome::HeldByProjection),
        (20.0, 2, 1, 1, DecisionOutcome::Applied),
        (40.0, 2, 1, 2, DecisionOutcome::HeldByProjection),
    ] {
        let rules = json!([
            on_cpu("out", "> 70", json!({"direction": "out", "by": 1})),
            on_cpu("in", "<= 70", json!({"direction": "in", "to": to})),
        ]);
        let profiles = json!([{
            "name": "default", "capacity": {"min": 1, "max": 40, "default": 2}, "rules": rules,
        }]);
        let decision = Harness::new(document(json!([]), json!({"profiles": profiles})), count)
            .value(CPU, cpu)
            .decide();
        assert_eq!(
            (decision.granted, decision.outcome),
            (granted, outcome),
            "{cpu} at {count}"
        );
    }
}

/// A policy that scales in on low CPU, while `refused` requests are refused.
fn refusing(refused: u64, more: serde_json::Value) -> Harness {
    let rules = json!([on_cpu("in", "< 40", json!({"direction": "in", "by": 1}))]);
    let signal = contract::decision::Signal {
        refused,
        ..whole(10.0)
    };
    Harness::new(document(rules, more), 4).signal(CPU, signal)
}

#[test]
fn no_rule_scales_in_while_requests_are_refused_for_lack_of_capacity() {
    for (refused, granted, outcome) in [
        (0, 3, DecisionOutcome::Applied),
        (1, 4, DecisionOutcome::HeldByRefusals),
        (17, 4, DecisionOutcome::HeldByRefusals),
    ] {
        let decision = refusing(refused, json!({})).decide();
        assert_eq!((decision.granted, decision.outcome), (granted, outcome));
        assert_eq!(decision.decided_by.as_deref(), Some("in"));
    }
}

#[test]
fn a_scale_in_held_by_refusals_is_explained() {
    let text = domain::autoscale::explain::text(&refusing(17, json!({})).decide());
    assert!(
        text.contains("`in` would scale in: 17 requests were refused"),
        "{text}"
    );
}

#[test]
fn bounds_schedules_and_pins_scale_in_while_requests_are_refused() {
    let rules = json!([on_cpu("in", "< 40", json!({"direction": "in", "by": 1}))]);
    let capacity = |max: u32| json!({"min": 1, "max": max, "default": 1});
    let bounds = json!({"profiles": [
        {"name": "default", "capacity": capacity(2), "rules": rules.clone()},
    ]});
    assert_eq!(refusing(17, bounds).decide().granted, 2);
    let schedule = json!({"profiles": [
        {"name": "default", "capacity": capacity(9), "rules": rules},
        {"name": "quiet", "priority": 1, "capacity": capacity(3),
         "schedule": {"cron": "* * * * *", "duration": "1h"}},
    ]});
    assert_eq!(refusing(17, schedule).decide().granted, 3);
    let pinned = refusing(17, json!({})).pinned(1, None);
    assert_eq!(pinned.decide().granted, 1);
}

fn unanswered(value: Option<f64>) -> contract::decision::Signal {
    contract::decision::Signal {
        value,
        unmeasured: Some(contract::decision::Unmeasured::Unanswered),
        ..whole(0.0)
    }
}

#[test]
fn the_age_of_an_unanswered_request_scales_out_and_never_in() {
    let rules = json!([
        on_cpu("out", "> 70", json!({"direction": "out", "by": 1})),
        on_cpu("in", "< 40", json!({"direction": "in", "by": 1})),
    ]);
    let harness = Harness::new(document(rules, json!({})), 4);
    let decide = |age| harness.clone().signal(CPU, unanswered(age)).decide();
    assert_eq!(decide(Some(80.0)).granted, 5);
    let held = decide(Some(10.0));
    assert_eq!((held.granted, held.outcome), (4, DecisionOutcome::Unknown));
    assert!(
        held.rules[1].because.contains("none was answered"),
        "{held:?}"
    );
}

#[test]
fn what_could_not_be_measured_is_not_missing_data() {
    let rules = json!([on_cpu("in", "< 40", json!({"direction": "in", "by": 1}))]);
    let more = json!({"missing": "default", "profiles": [
        {"name": "default", "capacity": {"min": 1, "max": 9, "default": 7}, "rules": rules},
    ]});
    let harness = Harness::new(document(json!([]), more), 4);
    assert_eq!(harness.clone().signal(CPU, missing()).decide().granted, 7);
    let held = harness.signal(CPU, unanswered(None)).decide();
    assert_eq!((held.granted, held.outcome), (4, DecisionOutcome::Unknown));
    assert_eq!(held.rules[0].value, None);
}

#[test]
fn a_window_measured_by_other_definitions_scales_out_and_never_in() {
    let outdated = |value| contract::decision::Signal {
        outdated: true,
        ..whole(value)
    };
    let rules = json!([
        on_cpu("out", "> 70", json!({"direction": "out", "by": 1})),
        on_cpu("in", "< 40", json!({"direction": "in", "by": 1})),
    ]);
    let harness = Harness::new(document(rules, json!({})), 4);
    assert_eq!(
        harness.clone().signal(CPU, outdated(80.0)).decide().granted,
        5
    );
    let held = harness.signal(CPU, outdated(10.0)).decide();
    assert_eq!((held.granted, held.outcome), (4, DecisionOutcome::Unknown));
    assert!(held.rules[1].because.contains("other definitions"));
}

#[test]
fn scale_in_is_projected_over_targets_too() {
    let mut rules = track(20.0);
    let list = rules.as_array_mut().unwrap();
    list[0]["track"]["tolerance"] = json!("0%");
    list.push(on_cpu("in", "< 30", json!({"direction": "in", "by": 6})));
    let decision = Harness::new(document(rules, json!({})), 10)
        .value(RATE, 130.0)
        .value(CPU, 10.0)
        .decide();
    assert_eq!(decision.granted, 7);
}

#[test]
fn a_total_does_not_change_with_the_count_in_a_projection() {
    let rules = json!([
        {"name": "out", "metric": {"name": "requests_per_second"}, "when": "> 100",
         "scale": {"direction": "out", "by": 1}},
        {"name": "in", "metric": {"name": "requests_per_second"}, "when": "< 90",
         "scale": {"direction": "in", "by": 5}},
    ]);
    let harness = Harness::new(document(rules, json!({})), 10).value(RATE, 80.0);
    assert_eq!(harness.decide().granted, 5);
}

#[test]
fn scaling_in_to_zero_needs_no_load_at_all() {
    let rules = json!([
        on_concurrency("out", "> 4", json!({"direction": "out", "by": 1})),
        on_concurrency("in", "< 1", json!({"direction": "in", "by": 1})),
    ]);
    let profiles = json!([{
        "name": "default", "capacity": {"min": 0, "max": 5, "default": 0}, "rules": rules,
    }]);
    for (concurrency, granted, outcome) in [
        (0.0, 0, DecisionOutcome::Applied),
        (0.5, 1, DecisionOutcome::HeldByProjection),
    ] {
        let document = document(json!([]), json!({"profiles": profiles}));
        let decision = Harness::new(document, 1)
            .value(CONCURRENCY, concurrency)
            .decide();
        assert_eq!((decision.granted, decision.outcome), (granted, outcome));
    }
}

#[test]
fn a_count_outside_of_the_bounds_is_corrected_at_once() {
    let more =
        json!({"cooldown": {"out": "1h", "in": "1h"}, "stabilization": {"in": "1h", "out": "1h"}});
    let rules = json!([on_concurrency(
        "out",
        "> 400",
        json!({"direction": "out", "by": 1})
    )]);
    for (count, granted) in [(0, 1), (25, 20)] {
        let mut harness =
            Harness::new(document(rules.clone(), more.clone()), count).value(CONCURRENCY, 0.0);
        harness.inputs.carried.last_in = Some(contract::decision::LastChange {
            at: START,
            rule: None,
        });
        harness.inputs.carried.last_out = harness.inputs.carried.last_in.clone();
        let decision = harness.decide();
        assert_eq!(
            (decision.granted, decision.outcome),
            (granted, DecisionOutcome::Applied)
        );
        assert_eq!(decision.decided_by, None);
    }
}

#[test]
fn a_recommendation_beyond_the_bounds_is_clamped() {
    let rules = json!([
        on_concurrency("out", "> 4", json!({"direction": "out", "by": 5})),
        on_concurrency("in", "< 1", json!({"direction": "in", "by": 5})),
    ]);
    for (count, total, granted) in [(18, 180.0, 20), (20, 200.0, 20), (3, 0.0, 1), (1, 0.0, 1)] {
        let decision = Harness::new(document(rules.clone(), json!({})), count)
            .value(CONCURRENCY, total)
            .decide();
        assert_eq!(
            (decision.granted, decision.outcome),
            (granted, DecisionOutcome::Clamped),
            "{count}"
        );
    }
}

#[test]
fn a_pin_decides_whatever_the_bounds_until_it_expires() {
    let rules = json!([on_concurrency(
        "out",
        "> 4",
        json!({"direction": "out", "by": 1})
    )]);
    let harness = Harness::new(document(rules, json!({})), 4).value(CONCURRENCY, 100.0);
    let later = Some(START + contract::Span::from_millis(1));
    for (until, granted, outcome) in [
        (None, 30, DecisionOutcome::Pinned),
        (later, 30, DecisionOutcome::Pinned),
        (Some(START), 5, DecisionOutcome::Applied),
    ] {
        let decision = harness.clone().pinned(30, until).decide();
        assert_eq!((decision.granted, decision.outcome), (granted, outcome));
    }
}

#[test]
fn a_pin_needs_no_policy() {
    let mut harness = Harness::new(document(json!([]), json!({})), 4);
    harness.inputs.policy = None;
    let fixed = harness.decide();
    assert_eq!(
        (fixed.granted, fixed.outcome, fixed.profile),
        (3, DecisionOutcome::Fixed, None)
    );
    let pinned = harness.pinned(0, None).decide();
    assert_eq!(
        (pinned.granted, pinned.outcome),
        (0, DecisionOutcome::Pinned)
    );
}

#[test]
fn a_paused_direction_is_held_and_the_other_goes_on() {
    let rules = json!([
        on_concurrency("out", "> 4", json!({"direction": "out", "by": 1})),
        on_concurrency("in", "< 1", json!({"direction": "in", "by": 1})),
    ]);
    for (scale_in, scale_out, total, granted, outcome) in [
        (true, false, 0.0, 4, DecisionOutcome::HeldByPause),
        (true, false, 40.0, 5, DecisionOutcome::Applied),
        (false, true, 40.0, 4, DecisionOutcome::HeldByPause),
        (false, true, 0.0, 3, DecisionOutcome::Applied),
        (true, true, 8.0, 4, DecisionOutcome::Steady),
    ] {
        let mut harness =
            Harness::new(document(rules.clone(), json!({})), 4).value(CONCURRENCY, total);
        harness.inputs.pause = contract::decision::Pause {
            scale_in,
            scale_out,
        };
        let decision = harness.decide();
        assert_eq!((decision.granted, decision.outcome), (granted, outcome));
    }
}

#[test]
fn a_paused_policy_evaluates_no_rule_and_keeps_the_count() {
    let rules = json!([on_concurrency(
        "out",
        "> 4",
        json!({"direction": "out", "by": 1})
    )]);
    let decision = Harness::new(document(rules, json!({"mode": "paused"})), 4)
        .value(CONCURRENCY, 100.0)
        .decide();
    assert_eq!(
        (decision.granted, decision.outcome),
        (4, DecisionOutcome::HeldByPause)
    );
    assert_eq!(verdict(&decision, "out"), Verdict::Suppressed);
}

#[test]
fn a_policy_in_shadow_mode_says_what_it_wants_and_leaves_the_deployments_count() {
    let rules = json!([on_concurrency(
        "out",
        "> 4",
        json!({"direction": "out", "by": 2})
    )]);
    let decision = Harness::new(document(rules, json!({"mode": "shadow"})), 3)
        .value(CONCURRENCY, 100.0)
        .decide();
    assert_eq!((decision.wanted, decision.granted), (5, 3));
    assert_eq!(decision.outcome, DecisionOutcome::Shadow);
}

#[test]
fn a_metric_without_data_never_scales_in() {
    let rules = json!([
        on_concurrency("out", "> 4", json!({"direction": "out", "by": 1})),
        on_cpu("in", "< 30", json!({"direction": "in", "by": 1})),
    ]);
    for (concurrency, cpu, granted, outcome) in [
        (whole(8.0), whole(10.0), 3, DecisionOutcome::Applied),
        (missing(), whole(10.0), 4, DecisionOutcome::Unknown),
        (whole(8.0), missing(), 4, DecisionOutcome::Unknown),
        (partial(8.0), whole(10.0), 4, DecisionOutcome::Unknown),
        (whole(8.0), partial(10.0), 4, DecisionOutcome::Unknown),
        (warming(Some(8.0)), whole(10.0), 4, DecisionOutcome::Unknown),
        // Known signals may still scale out.
        (whole(40.0), missing(), 5, DecisionOutcome::Applied),
        (partial(40.0), missing(), 5, DecisionOutcome::Applied),
        (
            warming(Some(40.0)),
            whole(10.0),
            5,
            DecisionOutcome::Applied,
        ),
        (warming(None), whole(10.0), 4, DecisionOutcome::Unknown),
    ] {
        let decision = Harness::new(document(rules.clone(), json!({})), 4)
            .signal(CONCURRENCY, concurrency)
            .signal(CPU, cpu)
            .decide();
        assert_eq!(
            (decision.granted, decision.outcome),
            (granted, outcome),
            "{concurrency:?} {cpu:?}"
        );
    }
}

#[test]
fn a_gap_in_the_window_counts_as_partial() {
    let holed = contract::decision::Signal {
        seconds_covered: 9,
        ..whole(0.0)
    };
    let rules = json!([on_concurrency(
        "in",
        "< 1",
        json!({"direction": "in", "by": 1})
    )]);
    let harness = Harness::new(document(rules, json!({})), 4).signal(CONCURRENCY, holed);
    let decision = harness.decide();
    assert_eq!(
        (decision.granted, decision.outcome),
        (4, DecisionOutcome::Unknown)
    );
    assert_eq!(verdict(&decision, "in"), Verdict::Unknown);
}

#[test]
fn what_a_missing_metric_means_is_the_policys_choice() {
    let rules = json!([on_concurrency(
        "out",
        "> 4",
        json!({"direction": "out", "by": 1})
    )]);
    for (policy, signal, count, granted) in [
        ("hold", missing(), 3, 3),
        ("default", missing(), 3, 6),
        ("default", missing(), 8, 8),
        // Not measured yet does not mean missing.
        ("default", warming(None), 3, 3),
        ("schedule", missing(), 3, 3),
    ] {
        let profiles = json!([{
            "name": "default", "capacity": {"min": 2, "max": 10, "default": 6}, "rules": rules,
        }]);
        let document = document(json!([]), json!({"missing": policy, "profiles": profiles}));
        let decision = Harness::new(document, count)
            .signal(CONCURRENCY, signal)
            .decide();
        assert_eq!(decision.granted, granted, "{policy} at {count}");
    }
}

#[test]
fn the_first_decision_is_the_profiles_default() {
    let rules = json!([on_concurrency(
        "out",
        "> 4",
        json!({"direction": "out", "by": 1})
    )]);
    let mut harness = Harness::new(document(rules, json!({})), 0).value(CONCURRENCY, 100.0);
    harness.inputs.carried.granted = None;
    let decision = harness.decide();
    assert_eq!((decision.from, decision.granted), (0, 2));
    assert_eq!(decision.outcome, DecisionOutcome::Applied);
}

#[test]
fn a_profile_without_rules_takes_its_default() {
    let decision = Harness::new(document(json!([]), json!({})), 7).decide();
    assert_eq!(
        (decision.granted, decision.outcome),
        (2, DecisionOutcome::Applied)
    );
}

#[test]
fn a_profile_that_names_no_rules_has_those_of_the_default_profile() {
    let profiles = json!([
        {"name": "default", "capacity": {"min": 1, "max": 20, "default": 2},
         "rules": [on_concurrency("out", "> 4", json!({"direction": "out", "by": 1}))]},
        {"name": "always", "schedule": {"weekly": {"days": ["Mon","Tue","Wed","Thu","Fri","Sat","Sun"], "start": "00:00", "end": "24:00"}},
         "capacity": {"min": 4, "max": 20, "default": 4}},
    ]);
    let document = document(json!([]), json!({"profiles": profiles}));
    let decision = Harness::new(document, 4).value(CONCURRENCY, 40.0).decide();
    assert_eq!(decision.profile.as_deref(), Some("always"));
    assert_eq!(decision.granted, 5);
}

#[test]
fn every_stage_follows_from_the_one_before() {
    let rules = json!([
        on_cpu("out", "> 70", json!({"direction": "out", "by": 1})),
        on_cpu("in", "< 40", json!({"direction": "in", "to": 2})),
    ]);
    let decision = Harness::new(document(rules, json!({})), 10)
        .value(CPU, 30.0)
        .decide();
    let names: Vec<&str> = decision
        .stages
        .iter()
        .map(|stage| stage.name.as_str())
        .collect();
    assert_eq!(
        names,
        [
            "profile",
            "bounds",
            "rules",
            "projection",
            "stabilization",
            "cooldown",
            "clamp"
        ]
    );
    for pair in decision.stages.windows(2) {
        assert_eq!(
            pair[0].after, pair[1].before,
            "{} to {}",
            pair[0].name, pair[1].name
        );
    }
    assert_eq!(
        decision.rules[1].because,
        "30% < 40% (cpu_utilization, average over 1m): in to 2"
    );
    assert_eq!(
        decision.rules[0].because,
        "30% not > 70% (cpu_utilization, average over 1m): out by 1"
    );
}

#[test]
fn a_stored_document_that_no_longer_compiles_keeps_the_count_and_says_why() {
    let mut harness = Harness::new(document(json!([]), json!({})), 4);
    Arc::make_mut(harness.inputs.policy.as_mut().unwrap())
        .profiles
        .clear();
    let decision = harness.decide();
    assert_eq!(
        (decision.granted, decision.outcome),
        (4, DecisionOutcome::Unknown)
    );
    assert!(decision.stages[0].detail.contains("no default profile"));
}
