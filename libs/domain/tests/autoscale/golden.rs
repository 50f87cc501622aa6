//! Decisions as recorded in the log and as explained to a person. There is one file per decision and
//! engine version: a change of what the engine answers needs a new version. `UPDATE_GOLDEN=1` writes the
//! files of a new version, and new wording; it never changes what was decided.

use std::path::PathBuf;

use contract::decision::{
    Decision, DecisionOutcome, FailedStarts, LastChange, Pause, Recommendation, Verdict,
};
use contract::time::Span;
use domain::autoscale::{Comparison, ENGINE_VERSION, compare, explain, is_reproducible};
use serde_json::json;

use crate::harness::*;

fn decision() -> Decision {
    let document = json!({
        "target": {"endpoint": "iris", "deployment": "blue"},
        "profiles": [
            {"name": "default", "capacity": {"min": 1, "max": 20, "default": 2}, "rules": [
                {"name": "busy",
                 "metric": {"name": "concurrency", "window": "10s", "perInstance": true},
                 "when": "> 4", "scale": {"direction": "out", "by": "50%", "cooldown": "30s"}},
                {"name": "slow",
                 "metric": {"name": "latency_p95", "window": "5m"},
                 "when": "> 300ms",
                 "scale": {"direction": "out", "steps": [{"above": "300ms", "by": 1}, {"above": "1s", "by": 3}]}},
                {"name": "follow",
                 "metric": {"name": "requests_per_second"},
                 "track": {"target": 20}},
            ]},
            {"name": "office-hours", "priority": 10,
             "schedule": {"cron": "0 9 * * Mon-Fri", "duration": "9h", "timeZone": "Europe/Paris"},
             "capacity": {"min": 4, "max": 20, "default": 4}},
        ],
    });
    let mut harness = Harness::new(document, 5)
        .value(CONCURRENCY, 24.7)
        .value("latency_p95/300s/average", 312.575)
        .value(RATE, 90.1)
        .ready(4, 1);
    harness.inputs.carried.last_out = Some(LastChange {
        at: START - Span::from_secs(47),
        rule: Some("busy".into()),
    });
    harness.inputs.carried.recommendations = vec![Recommendation {
        last: START - Span::from_secs(1),
        instances: 5,
    }];
    harness.decide()
}

/// A deployment of four with a rule in each direction.
fn of_four(concurrency: f64) -> Harness {
    let rules = json!([
        on_concurrency("busy", "> 4", json!({"direction": "out", "by": 2})),
        on_concurrency("idle", "< 1", json!({"direction": "in", "by": 1})),
    ]);
    let damping = json!({
        "cooldown": {"out": "30s", "in": "5m"},
        "stabilization": {"out": "0s", "in": "5m"},
    });
    Harness::new(document(rules, damping), 4).value(CONCURRENCY, concurrency)
}

/// A decision for each thing that determines a count.
fn decisions() -> Vec<(&'static str, Decision)> {
    let seconds_ago = |seconds| START - Span::from_secs(seconds);
    let mut stabilized = of_four(2.0);
    stabilized.inputs.carried.recommendations = vec![Recommendation {
        last: seconds_ago(10),
        instances: 4,
    }];
    let mut cooling = of_four(40.0);
    cooling.inputs.carried.last_out = Some(LastChange {
        at: seconds_ago(10),
        rule: Some("busy".into()),
    });
    let mut paused = of_four(2.0);
    paused.inputs.pause = Pause {
        scale_in: true,
        scale_out: false,
    };
    let mut failing = of_four(40.0).ready(0, 4);
    failing.inputs.failed_starts = Some(FailedStarts {
        in_a_row: 5,
        reason: "exit code 1".into(),
        never_ready: true,
    });
    let mut bounded = of_four(2.0);
    bounded.inputs.carried.granted = Some(30);
    let mut fixed = of_four(2.0);
    fixed.inputs.policy = None;
    let until = Some(START + Span::from_secs(60));
    vec![
        ("rule", decision()),
        ("scale-in", of_four(2.0).decide()),
        ("stabilized", stabilized.decide()),
        ("cooling", cooling.decide()),
        ("paused", paused.decide()),
        ("pinned", of_four(40.0).pinned(9, until).decide()),
        ("bounded", bounded.decide()),
        ("fixed", fixed.decide()),
        ("failing", failing.decide()),
        (
            "missing",
            of_four(2.0).signal(CONCURRENCY, missing()).decide(),
        ),
        (
            "partial",
            of_four(2.0).signal(CONCURRENCY, partial(2.0)).decide(),
        ),
    ]
}

fn is_update() -> bool {
    std::env::var_os("UPDATE_GOLDEN").is_some()
}

fn golden_path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}"))
}

fn text(decision: &Decision) -> String {
    serde_json::to_string_pretty(decision).unwrap() + "\n"
}

#[test]
fn decisions_recorded_by_this_version_of_the_engine_are_reproduced() {
    for (name, decision) in decisions() {
        let path = golden_path(&format!("decisions/{name}.v{ENGINE_VERSION}.json"));
        if is_update() && !path.exists() {
            std::fs::write(&path, text(&decision)).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_default();
        let recorded: Decision = serde_json::from_str(&golden).unwrap_or_else(|error| {
            panic!("{path:?} ({error}): run with UPDATE_GOLDEN=1 and review it")
        });
        let again = reevaluated(&recorded);
        let comparison = compare(&recorded, &again);
        assert_ne!(
            comparison,
            Comparison::Other,
            "{path:?} is decided differently: raise ENGINE_VERSION and run with UPDATE_GOLDEN=1\n{}",
            text(&again)
        );
        if is_update() && comparison == Comparison::WordingOnly {
            std::fs::write(&path, text(&again)).unwrap();
            continue;
        }
        assert!(
            golden == text(&again),
            "{path:?} is worded differently: run with UPDATE_GOLDEN=1 and review the difference\n{}",
            text(&again)
        );
    }
}

#[test]
fn an_explanation_matches_its_golden_file() {
    let (path, text) = (golden_path("decision.txt"), explain::text(&decision()));
    if is_update() {
        std::fs::write(&path, &text).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        text, golden,
        "{path:?}: run with UPDATE_GOLDEN=1 and review the difference"
    );
}

/// Decisions of version 0: one equal to the golden one, one with other wording, and one with
/// another count.
const OLDER: [(&str, Comparison); 3] = [
    (
        include_str!("../golden/older/equal.json"),
        Comparison::Equal,
    ),
    (
        include_str!("../golden/older/only-words.json"),
        Comparison::WordingOnly,
    ),
    (
        include_str!("../golden/older/other.json"),
        Comparison::Other,
    ),
];

#[test]
fn a_decision_of_an_older_version_is_compared_as_if_it_were_of_this_one() {
    for (text, comparison) in OLDER {
        let recorded: Decision = serde_json::from_str(text).unwrap();
        assert!(recorded.engine_version < ENGINE_VERSION);
        assert!(!is_reproducible(&recorded, &zones()));
        assert_eq!(compare(&recorded, &reevaluated(&recorded)), comparison);
    }
}

#[test]
fn decisions_differ_by_any_number_or_name_and_never_by_an_explanation() {
    let recorded = decision();
    let other = |change: fn(&mut Decision)| {
        let mut changed = recorded.clone();
        change(&mut changed);
        compare(&changed, &recorded)
    };
    let changes: [fn(&mut Decision); 11] = [
        |d| d.from += 1,
        |d| d.wanted += 1,
        |d| d.granted += 1,
        |d| d.outcome = DecisionOutcome::Shadow,
        |d| d.profile = None,
        |d| d.decided_by = None,
        |d| d.rules[0].verdict = Verdict::Suppressed,
        |d| d.rules[0].value = None,
        |d| d.rules[0].wanted = Some(77),
        |d| d.stages[0].after += 1,
        |d| drop(d.rules.pop()),
    ];
    for (index, change) in changes.into_iter().enumerate() {
        assert_eq!(other(change), Comparison::Other, "change {index}");
    }
    let words: [fn(&mut Decision); 3] = [
        |d| d.cause.as_mut().unwrap().detail.push('!'),
        |d| d.rules[0].because.push('!'),
        |d| d.stages[0].detail.push('!'),
    ];
    for change in words {
        assert_eq!(other(change), Comparison::WordingOnly);
    }
    assert_eq!(other(|d| d.engine_version += 1), Comparison::Equal);
}
