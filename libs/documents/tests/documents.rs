//! Documents survive a round trip, and every fault is reported at its location.
#![allow(clippy::unwrap_used)]

use contract::problem::Finding;
use contract::resources::DeploymentSpec;
use documents::{
    BackendRules, Backends, Document, FINDINGS_MAX, LocatedFinding, read, read_trees,
    read_with_checks, to_yaml,
};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Returns the documents of a text, or its first fault.
fn trees(text: &str) -> Result<Vec<Value>, String> {
    let (trees, faults) = read_trees(text);
    match faults.first() {
        Some(fault) => Err(fault.to_string()),
        None => Ok(trees.into_iter().map(|tree| tree.value).collect()),
    }
}

fn any_text() -> impl Strategy<Value = String> {
    const TRAPS: &[&str] = &[
        "yes", "no", "null", "~", "1", "1.0", "0x1f", "-", "- a", "a: b", "# c", "'", "\"", "&a",
        "*a", "!t", "|", ">", "", " ", " a ", "a\nb", "a\n", "\n", "\t", "{}", "[a", "%", "@", "`",
        "---", "...", "é", "😀", "true", ".inf", "\\n", ",",
    ];
    prop_oneof![
        proptest::sample::select(TRAPS).prop_map(str::to_owned),
        "[ -~]{0,12}",
        "\\PC{0,8}",
    ]
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-1e9..1e9f64).prop_map(Value::from),
        any_text().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map(any_text(), inner, 0..4)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn yaml_round_trips(value in any_value()) {
        let document = json!({"kind": value});
        let text = to_yaml(&document);
        let read = trees(&text);
        prop_assert!(read.is_ok(), "{:?}\n{text}", read);
        prop_assert_eq!(&read.unwrap()[0], &document, "{}", text);
    }

    #[test]
    fn json_round_trips(value in any_value()) {
        let document = json!({"kind": value});
        for text in [document.to_string(), serde_json::to_string_pretty(&document).unwrap()] {
            let read = trees(&text);
            prop_assert!(read.is_ok(), "{:?}\n{text}", read);
            prop_assert_eq!(&read.unwrap()[0], &document, "{}", text);
        }
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in "\\PC{0,200}", yaml in "[a-c:\\-\\[\\]{},&*!|>?'\"#\n ]{0,80}") {
        let _ = read(&text);
        let _ = read(&yaml);
    }
}

#[test]
fn a_resource_round_trips_through_its_json_and_yaml() {
    let text = "\
apiVersion: penstock/v1
kind: Deployment
metadata: {name: blue, endpoint: iris, labels: {team: vision}, uid: x, revision: 3, createdAt: y}
spec:
  backend: process
  instanceType: cpu-small
  command: [\"./scorer\", \"--port\", \"{port}\"]
  env: {LEVEL: \"2\", DB: {secretRef: \"file:/run/secrets/db\"}}
status: {provisioningState: Succeeded}
";
    let (first, faults) = read(text);
    assert_eq!(faults, []);
    let value = first[0].resource.to_value();
    let from_json = Document::new(value.clone()).resource().unwrap();
    assert_eq!(from_json, first[0].resource);
    let (from_yaml, faults) = read(&to_yaml(&value));
    assert_eq!(faults, []);
    assert_eq!(from_yaml[0].resource, first[0].resource);
}

#[test]
fn aliases_expand_to_their_anchors() {
    let text = "a: &one {b: [1, 2]}\nc: *one\n";
    assert_eq!(
        trees(text).unwrap()[0],
        json!({"a": {"b": [1, 2]}, "c": {"b": [1, 2]}})
    );
}

/// Returns the location and pointer of each fault in a text.
fn faults(text: &str) -> Vec<String> {
    let (_, faults) = read(text);
    let location = |fault: &LocatedFinding| format!("{} {}", fault.location, fault.finding.pointer);
    faults.iter().map(location).collect()
}

#[test]
fn every_structural_fault_is_reported_at_its_location() {
    let text = "\
apiVersion: penstock/v2
kind: Deployment
metadata: {name: Blue, endpoint: iris, labels: {tier: 1}}
spec:
  backend: proces
  instanceType: cpu-small
  command: ./scorer
  instances: many
  requestSettings: {timeout: soon, maxQueueWait: 7}
  readinessProbe: {period: 1s, failureThreshold: x, path: 3}
  env: {LEVEL: 2, DB: {secretRef: 1}}
";
    assert_eq!(
        faults(text),
        [
            "1:1 /apiVersion",
            "3:12 /metadata/name",
            "3:49 /metadata/labels/tier",
            "5:3 /spec/backend",
            "7:3 /spec/command",
            "8:3 /spec/instances",
            "9:21 /spec/requestSettings/timeout",
            "9:36 /spec/requestSettings/maxQueueWait",
            "10:32 /spec/readinessProbe/failureThreshold",
            "10:53 /spec/readinessProbe/path",
            "11:9 /spec/env/LEVEL",
            "11:24 /spec/env/DB/secretRef",
        ]
    );
}

#[test]
fn a_command_must_receive_its_port() {
    for (command, expected) in [
        ("[./scorer, --port, \"{port}\"]", vec![]),
        ("[sh, -c, \"exec ./scorer --port $PORT\"]", vec![]),
        ("[sh, -c, \"exec ./scorer --port ${PORT}\"]", vec![]),
        ("[./scorer, --port, \"8000\"]", vec!["7:3 /spec/command"]),
        (
            "[./scorer, --grpc, \"{port:grpc}\"]",
            vec!["7:3 /spec/command"],
        ),
        (
            "[sh, -c, \"./scorer $PORT_GRPC\"]",
            vec!["7:3 /spec/command"],
        ),
    ] {
        let text = format!(
            "apiVersion: penstock/v1\nkind: Deployment\nmetadata: {{name: blue, endpoint: iris}}\n\
             spec:\n  backend: process\n  instanceType: t\n  command: {command}\n"
        );
        assert_eq!(faults(&text), expected, "{command}");
    }
}

#[test]
fn a_structural_fault_neither_hides_nor_causes_a_violated_limit() {
    let text = "\
apiVersion: penstock/v1
kind: Deployment
metadata: {name: blue, endpoint: iris}
spec:
  backend: process
  instanceType: \"cpu small\"
  comand: [./scorer, --port, \"{port}\"]
  instances: x
  readinessProbe: {path: no-slash}
";
    assert_eq!(
        faults(text),
        [
            "6:3 /spec/instanceType",
            "7:3 /spec/comand",
            "8:3 /spec/instances",
            "9:20 /spec/readinessProbe/path",
        ]
    );
}

#[test]
fn an_unknown_variant_does_not_make_its_fields_wrong() {
    for (backend, also) in [
        ("simulatd", "simulated: {capacityPerSecond: 5}"),
        ("cloud", "env: {}"),
    ] {
        let text = format!(
            "apiVersion: penstock/v1\nkind: Deployment\nmetadata: {{name: blue, endpoint: iris}}\nspec:\n  instanceType: cpu small\n  backend: {backend}\n  {also}\n"
        );
        assert_eq!(
            faults(&text),
            ["5:3 /spec/instanceType", "6:3 /spec/backend"]
        );
    }
}

#[test]
fn all_faults_in_list_items_are_reported() {
    let text = "\
apiVersion: penstock/v1
kind: Autoscale
spec:
  target: {endpoint: iris}
  profiles:
  - name: default
    capacity: {min: one, max: 5}
    rules:
    - name: busy
      metric: concurrency
      when: \"> 4\"
      scale: {direction: up, by: 1}
    - metric: {name: concurrency, window: 30}
      wen: \"> 4\"
      scale: {direction: out, by: [1]}
  - name: night
    priority: high
";
    assert_eq!(
        faults(text),
        [
            "4:3 /spec/target/deployment",
            "7:5 /spec/profiles/0/capacity/default",
            "7:16 /spec/profiles/0/capacity/min",
            "10:7 /spec/profiles/0/rules/0/metric",
            "12:15 /spec/profiles/0/rules/0/scale/direction",
            "13:7 /spec/profiles/0/rules/1/name",
            "13:35 /spec/profiles/0/rules/1/metric/window",
            "14:7 /spec/profiles/0/rules/1/wen",
            "15:31 /spec/profiles/0/rules/1/scale/by",
            "16:5 /spec/profiles/1/capacity",
            "17:5 /spec/profiles/1/priority",
        ]
    );
}

#[test]
fn a_document_with_invalid_yaml_hides_no_other() {
    let endpoint = |name: &str| {
        format!("apiVersion: penstock/v1\nkind: Endpoint\nmetadata: {{name: {name}}}\nspec: {{}}\n")
    };
    let text = format!(
        "{}---\nkind: [Endpoint\n---\n{}---\na: \"b\nc: 1\n--- # the last\n{}",
        endpoint("Bad"),
        endpoint("good"),
        endpoint("Worse"),
    );
    let (read, found) = read(&text);
    assert_eq!(read.len(), 1);
    assert_eq!(read[0].resource.full_name(), "good");
    let lines: Vec<usize> = found.iter().map(|fault| fault.location.line).collect();
    assert_eq!(lines.len(), 4, "{found:#?}");
    assert_eq!((lines[0], lines[3]), (3, 18), "{found:#?}");
}

#[test]
fn duplicate_keys_tags_and_unusable_numbers_are_reported_with_the_rest() {
    let text = "\
apiVersion: penstock/v1
kind: Deployment
metadata: {name: blue, endpoint: iris, name: green}
spec:
  backend: !mine process
  instanceType: cpu small
  command: [./scorer, \"{port}\"]
  instances: .inf
  instances: 1
";
    assert_eq!(
        faults(text),
        [
            "3:40 /metadata/name",
            "5:12 /spec/backend",
            "6:3 /spec/instanceType",
            "8:14 /spec/instances",
            "9:3 /spec/instances",
        ]
    );
}

#[test]
fn the_number_of_findings_is_limited() {
    let wrong: String = (0..5000).map(|n| format!("  f{n}: 1\n")).collect();
    let text =
        format!("apiVersion: penstock/v1\nkind: Endpoint\nmetadata: {{name: a}}\nspec:\n{wrong}");
    assert_eq!(faults(&text).len(), FINDINGS_MAX);
    let rows = "    - {above: [], by: []}\n".repeat(20_000);
    let text = format!(
        "apiVersion: penstock/v1\nkind: Autoscale\nspec:\n  target: {{endpoint: a, deployment: b}}\n  profiles:\n{rows}"
    );
    let found = faults(&text).len();
    assert!((1..=FINDINGS_MAX).contains(&found), "{found}");
}

#[test]
fn a_backend_of_a_custom_table_has_its_own_rules() {
    fn check(spec: &DeploymentSpec) -> Vec<Finding> {
        let is_toy = spec.region.as_deref() == Some("nursery");
        let fault = Finding::new("/spec/region", "toys live in the nursery; write `nursery`");
        (!is_toy).then_some(fault).into_iter().collect()
    }
    let toy = BackendRules {
        kind: "toy".parse().unwrap(),
        field: None,
        check,
    };
    let backends = Backends::of(vec![toy].leak());
    let read = |region: &str| {
        let text = format!(
            "apiVersion: penstock/v1\nkind: Deployment\nmetadata: {{name: blue, endpoint: iris}}\nspec:\n  instanceType: t\n  backend: toy\n  region: {region}\n"
        );
        let (_, faults) = read_with_checks(&text, &backends, |_| Vec::new());
        faults
            .iter()
            .map(LocatedFinding::to_string)
            .collect::<Vec<_>>()
    };
    assert_eq!(read("nursery"), Vec::<String>::new());
    assert_eq!(
        read("garden"),
        ["7:3: /spec/region: toys live in the nursery; write `nursery`"]
    );
}
