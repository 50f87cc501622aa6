//! A decision as recorded in the log and as explained to a person. `UPDATE_GOLDEN=1` rewrites the
//! files; a change to them is a change of the engine's version.

use contract::decision::{Decision, DecisionOutcome, LastChange, Recommendation, Verdict};
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

fn equals_golden(name: &str, text: &str) {
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        text, golden,
        "{path}: run with UPDATE_GOLDEN=1 and review the difference"
    );
}

#[test]
fn a_decision_matches_its_golden_file_and_is_reproduced() {
    let text = serde_json::to_string_pretty(&decision()).unwrap() + "\n";
    equals_golden("decision.json", &text);
    let read: Decision = serde_json::from_str(&text).unwrap();
    let again = serde_json::to_string_pretty(&reevaluated(&read)).unwrap() + "\n";
    assert!(again == text, "the reevaluated decision differs: {again}");
}

#[test]
fn an_explanation_matches_its_golden_file() {
    equals_golden("decision.txt", &explain::text(&decision()));
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
