//! Documents that are rejected, with the field and what to do, and warnings about valid ones.

use serde_json::{Value, json};

use crate::harness::*;

fn rule() -> Value {
    on_concurrency("rule", "> 4", json!({"direction": "out", "by": 1}))
}

fn refused(document: &Value) -> Vec<(String, String)> {
    let findings = compile(&spec(document)).err().unwrap_or_default();
    findings
        .into_iter()
        .map(|finding| (finding.pointer, finding.detail))
        .collect()
}

/// Sets one member of a document by JSON Pointer; null removes it.
fn with(mut document: Value, pointer: &str, value: Value) -> Value {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    let parent = document.pointer_mut(parent).unwrap();
    if value.is_null() {
        parent.as_object_mut().unwrap().remove(key);
    } else {
        parent[key] = value;
    }
    document
}

#[test]
fn an_initialization_period_is_at_most_an_hour() {
    let compiled = |period: &str| {
        let more = json!({"initializationPeriod": period});
        compile(&spec(&document(json!([]), more)))
    };
    assert!(compiled("1h").is_ok());
    let findings = compiled("61m").unwrap_err();
    assert_eq!(findings[0].pointer, "/spec/initializationPeriod");
    assert!(findings[0].detail.contains("write at most 1h"));
}

#[test]
fn each_fault_of_a_rule_is_refused_with_its_field() {
    let first = "/spec/profiles/0/rules/0";
    for (change, value, pointer, part) in [
        ("/name", json!(""), "/name", "cannot name"),
        ("/name", json!("x".repeat(65)), "/name", "cannot name"),
        (
            "/metric/name",
            json!("cpu"),
            "/metric/name",
            "there is no metric `cpu`",
        ),
        (
            "/metric/name",
            json!("gpu_utilization"),
            "/metric/name",
            "not available yet",
        ),
        (
            "/metric/window",
            json!("500ms"),
            "/metric/window",
            "too short",
        ),
        ("/metric/window", json!("0s"), "/metric/window", "too short"),
        ("/metric/window", json!("13h"), "/metric/window", "too long"),
        (
            "/metric/window",
            json!("1500ms"),
            "/metric/window",
            "does not fit",
        ),
        (
            "/metric/window",
            json!("125s"),
            "/metric/window",
            "does not fit",
        ),
        (
            "/metric/window",
            json!("1810s"),
            "/metric/window",
            "does not fit",
        ),
        (
            "/metric/aggregation",
            json!("mean"),
            "/metric/aggregation",
            "no aggregation `mean`",
        ),
        ("/when", json!("4"), "/when", "not a condition"),
        ("/when", json!("> 4s"), "/when", "no value of concurrency"),
        ("/when", json!("> -1"), "/when", "below zero"),
        ("/when", Value::Null, "/when", "no condition"),
        ("/scale", Value::Null, "", "does nothing"),
        ("/scale/by", json!(0), "/scale/by", "not an amount"),
        ("/scale/by", json!(-2), "/scale/by", "not an amount"),
        ("/scale/by", json!(1.5), "/scale/by", "not an amount"),
        ("/scale/by", json!("0%"), "/scale/by", "not a share"),
        ("/scale/by", Value::Null, "/scale", "not by how much"),
        ("/scale/to", json!(3), "/scale", "several amounts"),
        ("/scale/steps", json!([]), "/scale", "several amounts"),
        (
            "/scale/cooldown",
            json!("8d"),
            "/scale/cooldown",
            "too long",
        ),
        (
            "/track",
            json!({"target": 4}),
            "/track",
            "`scale` or `track`",
        ),
        (
            "/scale",
            json!({"direction": "out", "to": 1001}),
            "/scale/to",
            "more than 1000",
        ),
        (
            "/scale",
            json!({"direction": "out", "steps": []}),
            "/scale/steps",
            "0 steps",
        ),
        (
            "/scale",
            json!({"direction": "out", "steps": [{"by": 1}]}),
            "/scale/steps/0",
            "no bound",
        ),
        (
            "/scale",
            json!({"direction": "out", "steps": [{"below": 1, "by": 1}]}),
            "/scale/steps/0",
            "replace `below`",
        ),
        (
            "/scale",
            json!({"direction": "out", "steps": [{"above": "x", "by": 1}]}),
            "/scale/steps/0/above",
            "no value",
        ),
        (
            "/scale",
            json!({"direction": "out", "steps": [{"above": 1, "by": 0}]}),
            "/scale/steps/0/by",
            "not an amount",
        ),
        (
            "/scale",
            json!({"direction": "in", "steps": [{"above": 1, "by": 1}]}),
            "/scale/steps/0",
            "replace `above`",
        ),
        (
            "/scale",
            json!({"direction": "out", "steps": [{"above": 1, "by": 1}, {"above": 1, "by": 2}]}),
            "/scale/steps",
            "same value",
        ),
    ] {
        let document = json!({"spec": document(json!([rule()]), json!({}))});
        let document = with(document, &format!("{first}{change}"), value.clone());
        let findings = refused(&document["spec"]);
        let expected = format!("{first}{pointer}");
        assert!(
            findings
                .iter()
                .any(|(pointer, detail)| *pointer == expected && detail.contains(part)),
            "{change} {value}: {findings:?}"
        );
        assert_eq!(findings.len(), 1, "{change} {value}: {findings:?}");
    }
}

#[test]
fn each_fault_of_a_target_is_refused_with_its_field() {
    let tracks =
        json!({"name": "follow", "metric": {"name": "latency_p95"}, "track": {"target": "300ms"}});
    assert_eq!(refused(&document(json!([tracks]), json!({}))), []);
    let first = "/spec/profiles/0/rules/0";
    for (change, value, part) in [
        ("/track/target", json!(300), "no value of latency_p95"),
        ("/track/target", json!("0s"), "never be met"),
        ("/track/tolerance", json!("10"), "not a tolerance"),
        ("/track/tolerance", json!("100%"), "not a tolerance"),
        ("/when", json!("> 300ms"), "has no condition"),
        ("/metric/aggregation", json!("sum"), "cannot be summed"),
    ] {
        let document = json!({"spec": document(json!([tracks]), json!({}))});
        let document = with(document, &format!("{first}{change}"), value);
        let findings = refused(&document["spec"]);
        assert_eq!(findings.len(), 1, "{change}: {findings:?}");
        assert_eq!(findings[0].0, format!("{first}{change}"));
        assert!(findings[0].1.contains(part), "{findings:?}");
    }
}

#[test]
fn each_fault_of_a_schedule_is_refused_with_its_field() {
    let base = "/spec/profiles/1/schedule";
    for (schedule, pointer, part) in [
        (json!({}), "", "says nothing"),
        (
            json!({"cron": "0 9 * * *"}),
            "/duration",
            "write a duration",
        ),
        (
            json!({"cron": "0 9 * *", "duration": "1h"}),
            "/cron",
            "five are wanted",
        ),
        (
            json!({"cron": "0 9 * * 1-8", "duration": "1h"}),
            "/cron",
            "weekday",
        ),
        (
            json!({"cron": "0 9 * * *", "duration": "0s"}),
            "/duration",
            "no duration",
        ),
        (
            json!({"cron": "0 9 * * *", "duration": "32d"}),
            "/duration",
            "no duration",
        ),
        (
            json!({"cron": "0 9 * * *", "duration": "1h", "timeZone": "Paris"}),
            "/timeZone",
            "not a time zone",
        ),
        (
            json!({"cron": "0 9 * * *", "duration": "1h", "timeZone": "Romance Standard Time"}),
            "/timeZone",
            "IANA",
        ),
        (
            json!({"weekly": {"days": [], "start": "09:00", "end": "17:00"}}),
            "/weekly/days",
            "no day",
        ),
        (
            json!({"weekly": {"days": ["Montag"], "start": "09:00", "end": "17:00"}}),
            "/weekly/days/0",
            "not a day",
        ),
        (
            json!({"weekly": {"days": ["Mon"], "start": "9:00", "end": "17:00"}}),
            "/weekly/start",
            "HH:MM",
        ),
        (
            json!({"weekly": {"days": ["Mon"], "start": "09:00", "end": "25:00"}}),
            "/weekly/end",
            "HH:MM",
        ),
        (
            json!({"weekly": {"days": ["Mon"], "start": "09:00", "end": "17:00"}, "duration": "1h"}),
            "/duration",
            "belongs to cron",
        ),
        (
            json!({"dated": {"from": "2026-01-01", "to": "2026-01-02T00:00"}}),
            "/dated/from",
            "not a date and time",
        ),
        (
            json!({"dated": {"from": "2026-01-01T00:00", "to": "soon"}}),
            "/dated/to",
            "not a date and time",
        ),
        (
            json!({"dated": {"from": "2026-01-02T00:00", "to": "2026-01-01T00:00"}}),
            "/dated/to",
            "ends before",
        ),
        (
            json!({"dated": {"from": "2026-02-30T00:00", "to": "2026-03-01T00:00"}}),
            "/dated/from",
            "not a date and time",
        ),
        (
            json!({"cron": "0 9 * * *", "duration": "1h", "weekly": {"days": ["Mon"], "start": "09:00", "end": "17:00"}}),
            "",
            "several things",
        ),
    ] {
        let profiles = json!([
            {"name": "default", "capacity": {"min": 1, "max": 2, "default": 1}},
            {"name": "other", "schedule": schedule, "capacity": {"min": 1, "max": 2, "default": 1}},
        ]);
        let findings = refused(&document(json!([]), json!({"profiles": profiles})));
        assert_eq!(findings.len(), 1, "{schedule}: {findings:?}");
        assert_eq!(findings[0].0, format!("{base}{pointer}"), "{schedule}");
        assert!(findings[0].1.contains(part), "{findings:?}");
    }
}

#[test]
fn each_fault_of_profiles_and_capacities_is_refused_with_its_field() {
    let profile = |name: &str, min: u32, max: u32, default: u32| json!({"name": name, "capacity": {"min": min, "max": max, "default": default}});
    let scheduled = json!({"name": "s", "schedule": {"cron": "0 9 * * *", "duration": "1h"},
        "capacity": {"min": 1, "max": 2, "default": 1}});
    let many: Vec<Value> = (0..21)
        .map(|index| {
            let mut profile = profile(&format!("p{index}"), 1, 2, 1);
            if index > 0 {
                profile["schedule"] = scheduled["schedule"].clone();
            }
            profile
        })
        .collect();
    for (profiles, pointer, part) in [
        (json!([]), "", "no default profile"),
        (json!([scheduled]), "", "no default profile"),
        (json!(many), "", "at most 20"),
        (
            json!([profile("a", 1, 2, 1), profile("b", 1, 2, 1)]),
            "/1/schedule",
            "default profile already",
        ),
        (
            json!([profile("s", 1, 2, 1), scheduled]),
            "/1/name",
            "called `s` already",
        ),
        (json!([profile(" ", 1, 2, 1)]), "/0/name", "cannot name"),
        (
            json!([profile("a", 3, 2, 2)]),
            "/0/capacity/min",
            "above the maximum",
        ),
        (
            json!([profile("a", 1, 2, 3)]),
            "/0/capacity/default",
            "outside of 1 to 2",
        ),
        (
            json!([profile("a", 2, 3, 1)]),
            "/0/capacity/default",
            "outside of 2 to 3",
        ),
        (
            json!([profile("a", 0, 0, 0)]),
            "/0/capacity/max",
            "at least 1",
        ),
        (
            json!([profile("a", 1, 1001, 1)]),
            "/0/capacity/max",
            "more than 1000",
        ),
    ] {
        let findings = refused(&document(json!([]), json!({"profiles": profiles})));
        assert_eq!(findings.len(), 1, "{profiles}: {findings:?}");
        assert_eq!(findings[0].0, format!("/spec/profiles{pointer}"));
        assert!(findings[0].1.contains(part), "{findings:?}");
    }
}

#[test]
fn all_faults_are_found_at_once() {
    let mut bad = rule();
    bad["metric"]["name"] = json!("nothing");
    bad["metric"]["window"] = json!("13h");
    bad["scale"]["by"] = json!("x");
    let more = json!({"cooldown": {"out": "8d"}, "stabilization": {"in": "2d"}});
    let mut document = document(json!([bad, bad]), more);
    document["profiles"][0]["capacity"]["min"] = json!(30);
    let pointers: Vec<String> = refused(&document)
        .into_iter()
        .map(|(pointer, _)| pointer)
        .collect();
    assert_eq!(
        pointers,
        [
            "/spec/cooldown/out",
            "/spec/stabilization/in",
            "/spec/profiles/0/capacity/min",
            "/spec/profiles/0/rules/1/name",
            "/spec/profiles/0/rules/0/metric/name",
            "/spec/profiles/0/rules/0/metric/window",
            "/spec/profiles/0/rules/0/scale/by",
            "/spec/profiles/0/rules/1/metric/name",
            "/spec/profiles/0/rules/1/metric/window",
            "/spec/profiles/0/rules/1/scale/by",
        ]
    );
}

#[test]
fn the_contracts_example_compiles_without_warnings() {
    let document = json!({
        "target": {"endpoint": "iris", "deployment": "blue"},
        "profiles": [
            {"name": "default", "capacity": {"min": 1, "max": 20, "default": 2}, "rules": [
                {"name": "busy",
                 "metric": {"name": "concurrency", "window": "30s", "aggregation": "average", "perInstance": true},
                 "when": "> 4", "scale": {"direction": "out", "by": "50%", "cooldown": "30s"}},
                {"name": "follow",
                 "metric": {"name": "requests_per_second", "window": "60s", "aggregation": "average"},
                 "track": {"target": 20, "tolerance": "10%"}},
            ]},
            {"name": "office-hours", "priority": 10,
             "schedule": {"cron": "0 9 * * Mon-Fri", "duration": "9h", "timeZone": "Europe/Paris"},
             "capacity": {"min": 4, "max": 20, "default": 4}},
        ],
    });
    let policy = compile(&spec(&document)).unwrap();
    assert_eq!(policy.warnings(), []);
    let keys: Vec<String> = policy.signals().iter().map(|signal| signal.key()).collect();
    assert_eq!(
        keys,
        ["concurrency/30s/average", "requests_per_second/60s/average"]
    );
}

#[test]
fn rules_that_are_probably_not_intended_cause_warnings() {
    let out = |when: &str| on_concurrency("out", when, json!({"direction": "out", "by": 1}));
    let scale_in = |when: &str| on_concurrency("in", when, json!({"direction": "in", "by": 1}));
    let cooled = json!({"cooldown": {"in": "5m"}});
    for (rules, pointer, part) in [
        (json!([out("> 4")]), "/rules", "no rule scales in"),
        (json!([scale_in("< 1")]), "/rules", "no rule scales out"),
        (
            json!([out("< 4"), scale_in("< 1")]),
            "/rules/0/scale/direction",
            "while the value is low",
        ),
        (
            json!([out("> 4"), scale_in("> 1")]),
            "/rules/1/scale/direction",
            "while the value is high",
        ),
        (
            json!([out("> 4"), scale_in("< 5")]),
            "/rules/1/when",
            "both hold",
        ),
        // From 2 to 1 instances 2 becomes 4.
        (
            json!([out("> 4"), scale_in("< 2")]),
            "/rules/1/when",
            "margin is too small",
        ),
        (
            json!([
                out("> 4"),
                scale_in("< 1"),
                on_cpu("c", "< 10", json!({"direction": "in", "to": 20}))
            ]),
            "/rules/2/scale/to",
            "never removes",
        ),
        (
            json!([
                out("> 4"),
                scale_in("< 1"),
                on_cpu("c", "> 90", json!({"direction": "out", "to": 1}))
            ]),
            "/rules/2/scale/to",
            "never adds",
        ),
    ] {
        let policy = compile(&spec(&document(rules.clone(), cooled.clone()))).unwrap();
        let warnings = policy.warnings();
        assert!(
            warnings.iter().any(
                |warning| warning.pointer == format!("/spec/profiles/0{pointer}")
                    && warning.detail.contains(part)
            ),
            "{rules}: {warnings:?}"
        );
    }
    let fine = compile(&spec(&document(
        json!([out("> 4"), scale_in("< 1.9")]),
        cooled,
    )))
    .unwrap();
    assert_eq!(fine.warnings(), []);
}

#[test]
fn rules_on_instances_alone_that_may_scale_to_zero_cause_a_warning() {
    let cpu = on_cpu("hot", "> 70", json!({"direction": "out", "by": 1}));
    let idle = on_cpu("idle", "< 20", json!({"direction": "in", "by": 1}));
    let busy = on_concurrency("busy", "> 4", json!({"direction": "out", "by": 1}));
    for (min, rules, warned) in [
        (0, json!([cpu, idle]), true),
        (1, json!([cpu, idle]), false),
        (0, json!([cpu, idle, busy]), false),
    ] {
        let profiles = json!([{
            "name": "default", "capacity": {"min": min, "max": 5, "default": min}, "rules": rules,
        }]);
        let document = document(json!([]), json!({"profiles": profiles}));
        let warnings = compile(&spec(&document)).unwrap().warnings();
        let found = warnings.iter().any(|warning| {
            warning.pointer == "/spec/profiles/0/capacity/min"
                && warning.detail.contains("never leaves 0")
        });
        assert_eq!(found, warned, "{min} {rules}: {warnings:?}");
    }
}

#[test]
fn weekly_windows_that_never_close_cause_a_warning() {
    let week = json!(["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]);
    for (days, start, end, warned) in [
        (week.clone(), "00:00", "24:00", true),
        (week.clone(), "09:00", "09:00", true),
        (week, "09:00", "08:59", false),
        (json!(["Mon", "Tue"]), "00:00", "24:00", false),
    ] {
        let profiles = json!([
            {"name": "default", "capacity": {"min": 1, "max": 5, "default": 1}},
            {"name": "week", "capacity": {"min": 2, "max": 5, "default": 2}, "rules": [],
             "schedule": {"weekly": {"days": days, "start": start, "end": end}}},
        ]);
        let document = document(json!([]), json!({"profiles": profiles}));
        let warnings = compile(&spec(&document)).unwrap().warnings();
        let found = warnings
            .iter()
            .any(|warning| warning.pointer == "/spec/profiles/1/schedule/weekly");
        assert_eq!(found, warned, "{days} {start} {end}: {warnings:?}");
    }
}

#[test]
fn cron_texts_that_others_read_differently_cause_a_warning() {
    let profiles = json!([
        {"name": "default", "capacity": {"min": 1, "max": 5, "default": 1}},
        {"name": "sunday", "capacity": {"min": 2, "max": 5, "default": 2}, "rules": [],
         "schedule": {"cron": "0 9 * * 7", "duration": "1h"}},
    ]);
    let document = document(json!([]), json!({"profiles": profiles}));
    let warnings = compile(&spec(&document)).unwrap().warnings();
    assert_eq!(warnings[0].pointer, "/spec/profiles/1/schedule/cron");
    assert!(warnings[0].detail.contains("write Sun"), "{warnings:?}");
}

#[test]
fn schedules_and_windows_that_are_probably_not_intended_cause_warnings() {
    let profiles = json!([
        {"name": "default", "capacity": {"min": 1, "max": 5, "default": 1}, "rules": [{
            "name": "follow", "metric": {"name": "cpu_utilization", "perInstance": true}, "track": {"target": 50}}]},
        {"name": "always", "priority": -1, "schedule": {"cron": "0 * * * *", "duration": "1h"},
         "capacity": {"min": 2, "max": 2, "default": 2}},
    ]);
    let policy = compile(&spec(&document(json!([]), json!({"profiles": profiles})))).unwrap();
    let pointers: Vec<String> = policy
        .warnings()
        .into_iter()
        .map(|warning| warning.pointer)
        .collect();
    assert_eq!(
        pointers,
        [
            "/spec/profiles/0/rules/0/metric/perInstance",
            "/spec/profiles/0/rules/0/metric/window",
            "/spec/profiles/1/capacity",
            "/spec/profiles/1/priority",
            "/spec/profiles/1/schedule/duration",
        ]
    );
}
