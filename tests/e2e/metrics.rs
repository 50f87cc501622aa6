//! Checks that a running server exports what `dashboards/` queries.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Value, json};

use crate::support::{DataFolder, Penstock, eventually};
use crate::time_limits;

/// Metrics by name, with the labels of their samples.
type Exported = BTreeMap<String, BTreeSet<String>>;

fn exported(text: &str) -> Exported {
    let mut exported = Exported::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let end = line.find(['{', ' ']).unwrap();
        let labels = exported.entry(line[..end].to_owned()).or_default();
        labels.extend(labels_of(&line[end..]));
    }
    exported
}

/// The label names in leading braces, of a sample or a selector.
fn labels_of(text: &str) -> Vec<String> {
    let inside = text
        .strip_prefix('{')
        .and_then(|rest| rest.split('}').next());
    let pairs = inside.unwrap_or_default().split(',');
    let name = |pair: &str| Some(pair.split(['=', '!']).next()?.trim().to_owned());
    pairs
        .filter_map(name)
        .filter(|name| !name.is_empty())
        .collect()
}

/// Every expression of the dashboards and rules, with its file.
fn expressions() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../dashboards");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("json") => collect(&serde_json::from_str(&text).unwrap(), &file, &mut found),
            // Recorded names contain a colon, and are not exported by us.
            Some("yml") => found.push((file, text)),
            _ => {}
        }
    }
    found
}

/// Collects the queries of panels and variables.
fn collect(value: &Value, file: &str, found: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                match (name.as_str(), value) {
                    ("expr" | "query" | "definition", Value::String(text)) => {
                        found.push((file.to_owned(), text.clone()));
                    }
                    _ => collect(value, file, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| collect(item, file, found)),
        _ => {}
    }
}

/// The metrics in an expression, with the labels it selects by.
fn queried(expression: &str) -> Vec<(String, Vec<String>)> {
    let in_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let mut queried = Vec::new();
    let mut rest = expression;
    while let Some(start) = rest.find("penstock_") {
        let before = rest[..start].chars().next_back();
        let end = rest[start..]
            .find(|c| !in_name(c))
            .map_or(rest.len(), |end| start + end);
        let recorded = before == Some(':');
        if !recorded {
            queried.push((rest[start..end].to_owned(), labels_of(&rest[end..])));
        }
        rest = &rest[end..];
    }
    queried
}

#[tokio::test]
async fn every_metric_and_label_that_a_dashboard_or_rule_queries_is_exported() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    let mut document = time_limits::document(&[]);
    document["spec"]["requestSettings"] =
        json!({"timeout": "5s", "streamIdleTimeout": "100ms", "maxDuration": "1m"});
    let key = time_limits::deploy(&penstock, &document).await;
    let document = json!({"apiVersion": "penstock/v1", "kind": "Autoscale", "spec": {
        "target": {"endpoint": "iris", "deployment": "blue"},
        "profiles": [{"name": "default", "capacity": {"min": 2, "max": 2, "default": 2}}],
    }});
    penstock.put("/v1/autoscale/iris/blue", &document).await;
    penstock.until_ready_instances("iris", "blue", 2).await;
    // A response that is cut.
    time_limits::stream(&penstock, &key, 2).await;
    let queried: Vec<_> = expressions()
        .into_iter()
        .flat_map(|(file, expression)| {
            let queried = queried(&expression).into_iter();
            queried.map(move |(metric, labels)| (file.clone(), metric, labels))
        })
        .collect();
    assert!(queried.len() > 10, "{queried:?}");
    let missing = |exported: &Exported| -> Vec<String> {
        let missing = queried.iter().filter(|(_, metric, labels)| {
            let known = exported.get(metric);
            known.is_none_or(|known| !labels.iter().all(|label| known.contains(label)))
        });
        missing.map(|row| format!("{row:?}")).collect()
    };
    let last = std::cell::RefCell::new(Vec::new());
    let all = async {
        eventually("all of them", || async {
            let metrics = format!("{}/metrics", penstock.control);
            let text = penstock.http.get(metrics).send().await.unwrap();
            let text = text.text().await.unwrap();
            last.replace(missing(&exported(&text)));
            last.borrow().is_empty().then_some(())
        })
        .await;
    };
    // Frames are sent once a second, so some metrics appear a little after the request.
    let patience = std::time::Duration::from_secs(20);
    let found = tokio::time::timeout(patience, all).await;
    assert!(found.is_ok(), "not exported: {:#?}", last.borrow());
}

#[test]
fn selectors_are_read_with_their_labels() {
    assert_eq!(
        queried(
            "sum by (le) (rate(penstock_a_bucket{x=\"1\", y=~\"2\"}[5m])) / job:penstock_b:rate5m + penstock_c"
        ),
        [
            (
                "penstock_a_bucket".to_owned(),
                vec!["x".to_owned(), "y".to_owned()]
            ),
            ("penstock_c".to_owned(), Vec::new()),
        ]
    );
}
