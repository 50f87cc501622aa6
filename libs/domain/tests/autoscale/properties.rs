//! Properties of every decision, over random policies and inputs.

use contract::decision::{
    CarriedState, Decision, DecisionInputs, DecisionOutcome, FailedStarts, InstanceCounts,
    LastChange, Pause, Pin, Recommendation, Signal, Verdict,
};
use contract::resources::{AutoscaleMode, AutoscaleSpec, Direction};
use contract::time::{Span, Timestamp};
use domain::autoscale::{
    Policy, TickInputs, carry, decide, decide_with, evaluate, explain, should_explain, should_write,
};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::harness::{START, carried_after, compile, deployment, reevaluated, spec, uid, zones};

const METRICS: [&str; 6] = [
    "concurrency",
    "requests_per_second",
    "queue_length",
    "cpu_utilization",
    "error_ratio",
    "latency_p95",
];

fn threshold_text(metric: &str, value: u32) -> String {
    match metric {
        "error_ratio" => format!("0.{value:03}"),
        "latency_p95" => format!("{value}ms"),
        _ => value.to_string(),
    }
}

fn amount() -> impl Strategy<Value = Value> {
    prop_oneof![
        (1u32..6).prop_map(|count| json!({"by": count})),
        (1u32..150).prop_map(|share| json!({"by": format!("{share}%")})),
        (0u32..25).prop_map(|count| json!({"to": count})),
    ]
}

fn threshold() -> impl Strategy<Value = Value> {
    let parts = (
        0..METRICS.len(),
        any::<bool>(),
        0u32..100,
        any::<bool>(),
        amount(),
        0u32..90,
        any::<bool>(),
    );
    parts.prop_map(
        |(metric, out, value, per_instance, mut scale, cooldown, own)| {
            let metric = METRICS[metric];
            let (operator, direction) = if out { (">", "out") } else { ("<", "in") };
            scale["direction"] = json!(direction);
            if own {
                scale["cooldown"] = json!(format!("{cooldown}s"));
            }
            json!({
                "metric": {"name": metric, "window": "30s", "perInstance": per_instance},
                "when": format!("{operator} {}", threshold_text(metric, value)),
                "scale": scale,
            })
        },
    )
}

fn stepped() -> impl Strategy<Value = Value> {
    (
        1u32..50,
        1u32..50,
        amount().prop_filter("by", |amount| amount["by"] != Value::Null),
    )
        .prop_map(|(low, more, amount)| {
            json!({
                "metric": {"name": "concurrency", "window": "30s", "perInstance": true},
                "when": format!("> {low}"),
                "scale": {"direction": "out", "steps": [
                    {"above": low, "by": 1}, {"above": low + more, "by": amount["by"]},
                ]},
            })
        })
}

fn track() -> impl Strategy<Value = Value> {
    (0..METRICS.len(), 1u32..100, 0u32..50).prop_map(|(metric, target, tolerance)| {
        let metric = METRICS[metric];
        json!({
            "metric": {"name": metric, "window": "60s"},
            "track": {"target": threshold_text(metric, target), "tolerance": format!("{tolerance}%")},
        })
    })
}

fn policy_with(rule: impl Strategy<Value = Value>) -> impl Strategy<Value = AutoscaleSpec> {
    let parts = (
        prop::collection::vec(rule, 0..6),
        (0u32..5, 0u32..20),
        (0u32..90, 0u32..90),
        (0u32..90, 0u32..90),
        prop::sample::select(vec!["hold", "default", "schedule"]),
        prop::sample::select(vec!["live", "live", "live", "shadow", "paused"]),
        any::<bool>(),
    );
    parts.prop_map(|(mut rules, (min, more), cooldown, stabilization, missing, mode, scheduled)| {
        for (index, rule) in rules.iter_mut().enumerate() {
            rule["name"] = json!(format!("rule-{index}"));
        }
        let max = (min + more).max(1);
        let mut profiles = vec![json!({
            "name": "default",
            "capacity": {"min": min, "max": max, "default": (min + max) / 2},
            "rules": rules,
        })];
        if scheduled {
            profiles.push(json!({
                "name": "hourly",
                "schedule": {"cron": "*/10 * * * *", "duration": "5m", "timeZone": "Europe/Paris"},
                "capacity": {"min": 2, "max": 12, "default": 3},
            }));
        }
        spec(&json!({
            "target": {"endpoint": "iris", "deployment": "blue"},
            "mode": mode,
            "missing": missing,
            "cooldown": {"out": format!("{}s", cooldown.0), "in": format!("{}s", cooldown.1)},
            "stabilization": {"out": format!("{}s", stabilization.0), "in": format!("{}s", stabilization.1)},
            "profiles": profiles,
        }))
    })
}

fn policies() -> impl Strategy<Value = AutoscaleSpec> {
    policy_with(prop_oneof![4 => threshold(), 1 => stepped(), 2 => track()])
}

fn signal() -> impl Strategy<Value = Option<Signal>> {
    let whole = (0.0f64..200.0).prop_map(|value| Signal {
        value: Some(value),
        seconds_covered: 30,
        seconds_wanted: 30,
        ..Signal::default()
    });
    let any = (
        prop::option::of(0.0f64..200.0),
        0u32..=30,
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(value, seconds_covered, partial, warming)| Signal {
            value,
            seconds_covered,
            seconds_wanted: 30,
            partial,
            warming,
            ..Signal::default()
        });
    prop_oneof![6 => whole.prop_map(Some), 1 => any.prop_map(Some), 1 => Just(None)]
}

fn change() -> impl Strategy<Value = Option<LastChange>> {
    prop::option::of((0u64..100).prop_map(|ago| LastChange {
        at: START - Span::from_secs(ago),
        rule: None,
    }))
}

fn carried() -> impl Strategy<Value = CarriedState> {
    let recommendations =
        prop::collection::vec((0u64..100, 0u32..25), 0..4).prop_map(|recommendations| {
            let mut recommendations: Vec<Recommendation> = recommendations
                .into_iter()
                .map(|(ago, instances)| Recommendation {
                    last: START - Span::from_secs(ago),
                    instances,
                })
                .collect();
            recommendations.sort_by_key(|wish| wish.last);
            recommendations
        });
    (
        prop::option::weighted(0.95, 0u32..25),
        change(),
        change(),
        recommendations,
        prop::option::of("default|other"),
        prop::option::of(0u64..4),
        prop::option::of(0u32..25),
        any::<bool>(),
    )
        .prop_map(
            |(
                granted,
                last_out,
                last_in,
                recommendations,
                profile,
                policy_revision,
                fixed,
                pinned,
            )| {
                CarriedState {
                    fixed_instances: fixed,
                    granted,
                    last_out,
                    last_in,
                    recommendations,
                    profile,
                    policy_revision,
                    pinned,
                }
            },
        )
}

/// Signals for all keys that a policy may read here, so that any policy finds its signals.
fn signals() -> impl Strategy<Value = std::collections::BTreeMap<String, Signal>> {
    prop::collection::vec(signal(), METRICS.len() * 2).prop_map(|signals| {
        let keys = METRICS
            .iter()
            .flat_map(|metric| [30, 60].map(|window| format!("{metric}/{window}s/average")));
        keys.zip(signals)
            .filter_map(|(key, signal)| Some((key, signal?)))
            .collect()
    })
}

prop_compose! {
    fn failed_starts()(in_a_row in 1u32..9, never_ready in any::<bool>()) -> FailedStarts {
        FailedStarts { in_a_row, reason: "exit code 1".into(), never_ready }
    }
}

prop_compose! {
    fn inputs_of(policy: BoxedStrategy<AutoscaleSpec>)(
        policy in prop::option::weighted(0.97, policy),
        fixed_instances in 0u32..10,
        pin in prop::option::weighted(0.1, (0u32..40, prop::option::of(-5i64..5))),
        pause in prop::option::weighted(0.1, (any::<bool>(), any::<bool>())),
        ready in 0u32..25,
        pending in 0u32..5,
        signals in signals(),
        failed_starts in prop::option::weighted(0.1, failed_starts()),
        starts_at_default in prop::bool::weighted(0.1),
        carried in carried(),
    ) -> DecisionInputs {
        let pause = pause.unwrap_or_default();
        DecisionInputs {
            pinned_by: None,
            failed_starts,
            starts_at_default,
            policy_revision: 3,
            policy: policy.map(Into::into),
            fixed_instances,
            pin: pin.map(|(instances, until)| Pin {
                instances,
                until: until.map(|seconds| Timestamp::from_secs(START.secs() + seconds)),
            }),
            pause: Pause { scale_in: pause.0, scale_out: pause.1 },
            instances: InstanceCounts { ready, pending },
            signals,
            carried,
            zone_data: None,
        }
    }
}

fn inputs() -> impl Strategy<Value = DecisionInputs> {
    inputs_of(policies().boxed())
}

fn decided(inputs: &DecisionInputs) -> Decision {
    decide(&deployment(), uid(), inputs.clone(), &zones(), START)
}

fn ordered(policy: Option<&Policy>, inputs: &DecisionInputs) -> Vec<Option<Signal>> {
    let specs = policy.map(Policy::signals).unwrap_or_default();
    specs
        .iter()
        .map(|spec| inputs.signals.get(&spec.key()).copied())
        .collect()
}

fn tick<'a>(inputs: &'a DecisionInputs, signals: &'a [Option<Signal>]) -> TickInputs<'a> {
    TickInputs {
        pinned_by: inputs.pinned_by.as_deref(),
        failed_starts: inputs.failed_starts.as_ref(),
        starts_at_default: inputs.starts_at_default,
        policy_revision: inputs.policy_revision,
        fixed_instances: inputs.fixed_instances,
        pin: inputs.pin,
        pause: inputs.pause,
        instances: inputs.instances,
        signals,
        carried: &inputs.carried,
        selection: None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn a_decision_read_back_is_reproduced_byte_for_byte(inputs in inputs()) {
        let json = serde_json::to_string(&decided(&inputs)).unwrap();
        let read: Decision = serde_json::from_str(&json).unwrap();
        prop_assert_eq!(serde_json::to_string(&reevaluated(&read)).unwrap(), json);
    }

    #[test]
    fn the_fast_path_and_the_explanation_agree(inputs in inputs()) {
        let policy = inputs.policy.as_ref().map(|spec| compile(spec).unwrap());
        let policy = policy.as_ref();
        let signals = ordered(policy, &inputs);
        let tick = tick(&inputs, &signals);
        let evaluation = evaluate(policy, &tick, START);
        let explained = explain(&deployment(), uid(), policy, &tick, START);
        prop_assert_eq!(evaluation.from, explained.from);
        prop_assert_eq!(evaluation.wanted, explained.wanted);
        prop_assert_eq!(evaluation.granted, explained.granted);
        prop_assert_eq!(evaluation.outcome, explained.outcome);
        prop_assert_eq!(policy.and_then(|policy| evaluation.profile(policy)), explained.profile.as_deref());
        prop_assert_eq!(policy.and_then(|policy| evaluation.decided_by(policy)), explained.decided_by.as_deref());
        // Passing on a selection changes nothing.
        let hinted = TickInputs { selection: evaluation.selection, ..tick };
        prop_assert_eq!(evaluate(policy, &hinted, START), evaluation);
        // The three ways to compute the state of the next tick agree.
        let mut carried = inputs.carried.clone();
        carry(&mut carried, policy, &evaluation, START);
        prop_assert_eq!(&carried, &carried_after(&explained));
        // So do those to compute the decision, except for signals that nobody reads.
        if let Some(policy) = policy {
            let with = decide_with(policy, &deployment(), uid(), inputs.clone(), START);
            prop_assert_eq!(&with, &decided(&inputs));
            prop_assert_eq!(&with.stages, &explained.stages);
            prop_assert_eq!(&with.rules, &explained.rules);
        }
        // And so do the two checks of whether to write.
        prop_assert_eq!(should_explain(Some(&explained), policy, &tick, &evaluation), false);
        prop_assert!(!should_write(Some(&explained), &decided(&inputs)));
    }

    #[test]
    fn a_count_is_within_the_bounds_unless_a_person_says_otherwise(inputs in inputs()) {
        let decision = decided(&inputs);
        let Some(spec) = &inputs.policy else {
            return Ok(());
        };
        let profile = decision.profile.as_deref().unwrap();
        let capacity = spec.profiles.iter().find(|p| p.name == profile).unwrap().capacity;
        let paused = inputs.pause.scale_in || inputs.pause.scale_out || spec.mode == AutoscaleMode::Paused;
        let person = paused || decision.outcome == DecisionOutcome::Pinned;
        prop_assert!(person || (capacity.min..=capacity.max).contains(&decision.wanted));
        prop_assert!(decision.outcome == DecisionOutcome::Shadow || decision.wanted == decision.granted);
    }

    #[test]
    fn nothing_fires_out_and_in_at_once(inputs in inputs()) {
        let decision = decided(&inputs);
        let fired = |wanted| decision.rules.iter().any(|rule| {
            rule.verdict == Verdict::Triggered && rule.direction == Some(wanted)
        });
        prop_assert!(!(fired(Direction::Out) && fired(Direction::In)));
        for rule in &decision.rules {
            prop_assert!(rule.wanted.is_none() || rule.verdict == Verdict::Triggered);
        }
    }

    #[test]
    fn rules_never_scale_in_while_any_data_is_incomplete(inputs in inputs()) {
        let decision = decided(&inputs);
        let unknown = decision.rules.iter().any(|rule| {
            rule.verdict == Verdict::Unknown
        });
        let bounds = decision.stages.iter().find(|stage| stage.name == "bounds");
        if unknown && let Some(bounds) = bounds {
            prop_assert!(decision.wanted >= bounds.after.min(decision.from));
        }
    }

    #[test]
    fn stages_follow_from_each_other_and_end_at_the_count(inputs in inputs()) {
        let decision = decided(&inputs);
        for pair in decision.stages.windows(2) {
            prop_assert_eq!(pair[0].after, pair[1].before);
        }
        prop_assert_eq!(decision.stages.last().map(|stage| stage.after), Some(decision.granted));
    }

    #[test]
    fn more_load_never_asks_for_fewer_instances(
        inputs in inputs_of(policy_with(prop_oneof![
            threshold().prop_filter("scales out", |rule| rule["scale"]["direction"] == "out"),
            stepped(),
            track(),
        ]).boxed()),
        factor in 1.0f64..5.0,
    ) {
        let mut more = inputs.clone();
        for signal in more.signals.values_mut() {
            signal.value = signal.value.map(|value| value * factor);
        }
        prop_assert!(decided(&more).wanted >= decided(&inputs).wanted);
    }

    #[test]
    fn what_is_carried_stays_small_and_in_order(
        spec in policies(),
        values in prop::collection::vec(0.0f64..200.0, 1..60),
    ) {
        let policy = compile(&spec).unwrap();
        let mut carried = CarriedState::default();
        for (second, value) in values.iter().enumerate() {
            let now = START + Span::from_secs(second as u64);
            let signal = Signal { value: Some(*value), seconds_covered: 30, seconds_wanted: 30, ..Signal::default() };
            let signals = vec![Some(signal); policy.signals().len()];
            let inputs = TickInputs {
            pinned_by: None,
            failed_starts: None,
            starts_at_default: false,
                policy_revision: 1,
                fixed_instances: 1,
                pin: None,
                pause: Pause::default(),
                instances: InstanceCounts { ready: carried.granted.unwrap_or(0), pending: 0 },
                signals: &signals,
                carried: &carried,
                selection: None,
            };
            let evaluation = evaluate(Some(&policy), &inputs, now);
            carry(&mut carried, Some(&policy), &evaluation, now);
        }
        prop_assert!(carried.recommendations.windows(2).all(|pair| pair[0].last < pair[1].last));
        let mut counts: Vec<u32> = carried.recommendations.iter().map(|wish| wish.instances).collect();
        counts.sort_unstable();
        counts.dedup();
        prop_assert_eq!(counts.len(), carried.recommendations.len());
    }
}
