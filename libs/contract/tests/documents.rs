//! Reading and writing documents: what goes in comes out, whatever it is.

use contract::resources::document::{Document, read, to_yaml};
use contract::resources::syntax::trees;
use proptest::prelude::*;
use serde_json::{Value, json};

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
    fn what_is_written_as_yaml_is_read_as_the_same(value in any_value()) {
        let document = json!({"kind": value});
        let text = to_yaml(&document);
        let read = trees(&text);
        prop_assert!(read.is_ok(), "{:?}\n{text}", read);
        prop_assert_eq!(&read.unwrap()[0].value, &document, "{}", text);
    }

    #[test]
    fn json_is_read_as_itself(value in any_value()) {
        let document = json!({"kind": value});
        for text in [document.to_string(), serde_json::to_string_pretty(&document).unwrap()] {
            let read = trees(&text);
            prop_assert!(read.is_ok(), "{:?}\n{text}", read);
            prop_assert_eq!(&read.unwrap()[0].value, &document, "{}", text);
        }
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in "\\PC{0,200}", yaml in "[a-c:\\-\\[\\]{},&*!|>?'\"#\n ]{0,80}") {
        let _ = read(&text);
        let _ = read(&yaml);
    }
}

#[test]
fn a_resource_is_the_same_after_it_was_shown_and_sent_back() {
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
    let shown = Document::new(value.clone()).resource().unwrap();
    assert_eq!(shown, first[0].resource);
    let (again, faults) = read(&to_yaml(&value));
    assert_eq!(faults, []);
    assert_eq!(again[0].resource, first[0].resource);
}

#[test]
fn anchors_stand_for_what_they_name() {
    let text = "a: &one {b: [1, 2]}\nc: *one\n";
    assert_eq!(
        trees(text).unwrap()[0].value,
        json!({"a": {"b": [1, 2]}, "c": {"b": [1, 2]}})
    );
}
