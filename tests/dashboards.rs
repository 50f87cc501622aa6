//! Checks `dashboards/` and `deploy/prometheus/` against the code: a renamed or removed metric must not
//! leave an empty panel or a rule without data.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests may panic as tests do; the lint knows only the tests themselves"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// Suffixes that the exporter appends to registered names.
const SUFFIXES: [&str; 4] = ["_bucket", "_sum", "_count", "_total"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// File name and text of everything in `dashboards/`, and of the alerts in `deploy/`.
fn dashboards() -> BTreeMap<String, String> {
    let folders = ["dashboards", "deploy/prometheus"];
    let entries = folders.map(|folder| fs::read_dir(root().join(folder)).unwrap());
    let files = entries.into_iter().flatten();
    let files = files.map(|entry| entry.unwrap().path());
    files
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, fs::read_to_string(path).unwrap())
        })
        .collect()
}

/// Every `penstock_…` in a text.
fn names(text: &str) -> BTreeSet<&str> {
    let of_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    text.split(|c| !of_name(c))
        .filter(|word| word.starts_with("penstock_"))
        .collect()
}

/// Files that register metrics, besides the services' `metrics.rs`.
const OTHER_SOURCES: [&str; 3] = [
    "libs/runtime/src/metrics.rs",
    "libs/runtime/src/relay.rs",
    "services/penstock/src/serve/start.rs",
];

/// The metric names in string literals of those files.
fn registered() -> BTreeSet<String> {
    let services = fs::read_dir(root().join("services")).unwrap();
    let services = services.map(|entry| entry.unwrap().path().join("src/metrics.rs"));
    let sources = services.chain(OTHER_SOURCES.map(|path| root().join(path)));
    let mut found = BTreeSet::new();
    for source in sources.filter_map(|path| fs::read_to_string(path).ok()) {
        let literals = source.split('"').filter(|word| names(word).contains(word));
        found.extend(literals.map(str::to_owned));
    }
    found
}

fn is_registered(name: &str, registered: &BTreeSet<String>) -> bool {
    let mut bare = SUFFIXES
        .iter()
        .filter_map(|suffix| name.strip_suffix(suffix));
    registered.contains(name) || bare.any(|bare| registered.contains(bare))
}

#[test]
fn every_metric_that_a_dashboard_names_is_registered() {
    let registered = registered();
    let mut unknown = Vec::new();
    for (file, text) in dashboards() {
        for name in names(&text) {
            if !is_registered(name, &registered) {
                unknown.push(format!("{file}: {name}"));
            }
        }
    }
    assert!(
        unknown.is_empty(),
        "these metrics are not registered:\n  {}",
        unknown.join("\n  ")
    );
}

#[test]
fn every_panel_of_a_dashboard_queries_a_metric() {
    let mut panels = 0;
    for (file, text) in dashboards() {
        if !file.ends_with(".json") {
            continue;
        }
        let dashboard: Value = serde_json::from_str(&text).unwrap();
        for panel in dashboard["panels"].as_array().unwrap() {
            panels += 1;
            let targets = panel["targets"].as_array().unwrap();
            let queries_metric =
                |target: &Value| !names(target["expr"].as_str().unwrap()).is_empty();
            assert!(
                !targets.is_empty() && targets.iter().all(queries_metric),
                "{file}: the panel {} queries no metric",
                panel["title"]
            );
        }
    }
    assert!(panels > 0, "there is no panel at all");
}

/// The alerts of `dashboards/prometheus-rules.yml` with their expressions.
fn alerts() -> BTreeMap<String, String> {
    let rules = fs::read_to_string(root().join("dashboards/prometheus-rules.yml")).unwrap();
    let rules = rules.split("\n  - ").skip(1);
    let alerts = rules.filter_map(|rule| {
        let (name, rest) = rule.strip_prefix("alert: ")?.split_once('\n')?;
        let (_, expression) = rest.split_once("expr: ")?;
        let end = ["    for: ", "    labels: "].map(|key| expression.find(key));
        let end = end.into_iter().flatten().min()?;
        Some((name.to_owned(), expression[..end].to_owned()))
    });
    alerts.collect()
}

#[test]
fn the_documented_alerts_exist_and_query_registered_metrics() {
    let readme = fs::read_to_string(root().join("dashboards/README.md")).unwrap();
    let documented = readme.split('`').filter(|word| {
        let rest = word.strip_prefix("Penstock");
        rest.is_some_and(|rest| rest.chars().all(char::is_alphabetic))
    });
    let documented: BTreeSet<&str> = documented.collect();
    let (alerts, registered) = (alerts(), registered());
    assert!(documented.len() > 1, "{documented:?}");
    assert_eq!(documented, alerts.keys().map(String::as_str).collect());
    for (alert, expression) in &alerts {
        let names = names(expression);
        assert!(!names.is_empty(), "{alert}: {expression}");
        for name in names {
            assert!(is_registered(name, &registered), "{alert}: {name}");
        }
    }
}
