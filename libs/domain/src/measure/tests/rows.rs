//! The rows of metrics: each documents its metric correctly, and `METRICS.md` lists all of them.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::*;

/// Concurrent requests, or requests a second, in one run of a situation; another run has `MORE`.
const SOME: u64 = 2;
const MORE: u64 = 5;

/// The frames of each source in one second of a situation; `load` scales what there is to measure.
struct SituationFrames {
    gateway: Option<DeploymentFrame>,
    node: Option<DeploymentFrame>,
}

fn no_traffic(load: u64) -> SituationFrames {
    SituationFrames {
        gateway: Some(deployment()),
        node: Some(with_instances(load)),
    }
}

fn all_in_flight(load: u64) -> SituationFrames {
    SituationFrames {
        gateway: Some(DeploymentFrame {
            arrivals: 2 * load,
            in_flight_us: load * 1_000_000,
            oldest_in_flight_us: load * 700_000,
            queued_us: load * 500_000,
            ..deployment()
        }),
        node: Some(with_instances(load)),
    }
}

fn all_refused(load: u64) -> SituationFrames {
    SituationFrames {
        gateway: Some(DeploymentFrame {
            arrivals: load,
            outcomes: Outcomes {
                too_many_pending: load,
                ..Outcomes::default()
            },
            ..deployment()
        }),
        node: Some(with_instances(load)),
    }
}

fn no_instance(load: u64) -> SituationFrames {
    SituationFrames {
        gateway: Some(DeploymentFrame {
            arrivals: load,
            oldest_in_flight_us: load * 900_000,
            queued_us: load * 1_000_000,
            ..deployment()
        }),
        node: Some(deployment()),
    }
}

fn no_report(_: u64) -> SituationFrames {
    SituationFrames {
        gateway: None,
        node: None,
    }
}

fn with_instances(load: u64) -> DeploymentFrame {
    let instance = |name: &str| InstanceFrame {
        cpu_us: Some(load * 100_000),
        ready_for_us: Some(2_000_000),
        memory_bytes: Some(load * 100),
        memory_limit_bytes: Some(1000),
        ..InstanceFrame::new(InstanceId::from(name.to_owned()))
    };
    DeploymentFrame {
        instances: vec![instance("a"), instance("b")],
        ..deployment()
    }
}

/// The value of a metric after ten such seconds.
fn measured(metric: &str, aggregation: &str, frames: &SituationFrames) -> Option<f64> {
    let node = Source {
        kind: SourceKind::NODE,
        id: "node".into(),
    };
    let mut measures = measures();
    for second in START..START + 10 {
        for (source, sent) in [
            (gateway("a"), &frames.gateway),
            (node.clone(), &frames.node),
        ] {
            let Some(sent) = sent else { continue };
            let frame = Frame {
                deployments: vec![sent.clone()],
                ..empty(source, second)
            };
            measures.frame(after(second, 5), &frame);
        }
    }
    let options = SignalOptions::default();
    let spec = spec(metric, 5, aggregation);
    measures.signals(uid(), &[spec], options, after(START + 9, 5))[0]
        .unwrap()
        .value
}

#[test]
fn every_metric_has_the_values_its_row_documents() {
    type Situation = (
        &'static str,
        fn(u64) -> SituationFrames,
        fn(&Situations) -> SituationValue,
    );
    let situations: [Situation; 5] = [
        ("no traffic", no_traffic, |situations| situations.no_traffic),
        ("all in flight", all_in_flight, |situations| {
            situations.all_in_flight
        }),
        ("all refused", all_refused, |situations| {
            situations.all_refused
        }),
        ("no instance", no_instance, |situations| {
            situations.no_instance
        }),
        ("no report", no_report, |situations| situations.no_report),
    ];
    for (row, (situation, frames, documented)) in METRICS
        .iter()
        .flat_map(|row| situations.map(|situation| (row, situation)))
    {
        for aggregation in ["average", "max", "last"] {
            let of = |load| measured(row.name, aggregation, &frames(load));
            let found = (of(SOME), of(MORE));
            let documented = documented(&row.situations);
            let is_as_documented = match documented {
                SituationValue::Always(value) => found == (Some(value), Some(value)),
                SituationValue::Unknown => found == (None, None),
                SituationValue::Measured | SituationValue::OldestAge => {
                    matches!(found, (Some(some), Some(more)) if some < more)
                }
            };
            assert!(
                is_as_documented,
                "{}, with {situation}: its row says {documented}, its {aggregation} is {found:?}",
                row.name
            );
        }
    }
}

#[test]
fn metric_names_are_unique() {
    let rows = METRICS.iter().map(|row| (row.name, row.aliases));
    let later = RESERVED_NAMES.iter().map(|of| (of.name, of.aliases));
    let mut seen = BTreeSet::new();
    for (name, aliases) in rows.chain(later) {
        for name in [&[name], aliases].concat() {
            assert!(seen.insert(name), "`{name}` is the name of two metrics");
        }
    }
}

#[test]
fn only_totals_are_divided_by_instances() {
    for row in METRICS {
        assert!(row.is_total || !row.is_per_instance, "{}", row.name);
        assert!(!row.description.is_empty(), "{}", row.name);
    }
}

/// The content of `METRICS.md`.
fn page() -> String {
    let mut page = String::from(
        "# Metrics\n\n\
         The metrics that `metric.name` of an autoscale rule accepts. A total is summed over instances, and `perInstance: true` divides it by\n\
         their number; other metrics are averages, quantiles or ratios. The five columns before the description say what a metric is when there\n\
         is nothing to compute it from: a number, *measured* (what was counted), *age of the oldest request* in flight (it may scale out, and\n\
         never in), or *unknown*, on which a rule never scales in. Zero means that a gateway reported and had no traffic.\n\n\
         | name | example | total | reported by | no traffic | all in flight | all refused | no instance | no report | description |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in METRICS {
        let situations = &row.situations;
        let also = match row.aliases {
            [] => String::new(),
            aliases => format!(" Also `{}`.", aliases.join("`, `")),
        };
        let (unit, total) = (unit_name(row.unit), if row.is_total { "yes" } else { "no" });
        let source = &row.source;
        let _ = writeln!(
            page,
            "| `{}` | {unit} | {total} | {source} | {} | {} | {} | {} | {} | {}{also} |",
            row.name,
            situations.no_traffic,
            situations.all_in_flight,
            situations.all_refused,
            situations.no_instance,
            situations.no_report,
            row.description,
        );
    }
    let later: Vec<&str> = RESERVED_NAMES.iter().map(|of| of.name).collect();
    let _ = write!(
        page,
        "\nNot available yet, and rejected by name: `{}`.\n\n\
         This page is generated from `libs/domain/src/measure/metrics.rs` by `UPDATE_GOLDEN=1 cargo test -p penstock-domain --lib rows`.\n",
        later.join("`, `")
    );
    page
}

fn unit_name(unit: Unit) -> &'static str {
    match unit {
        Unit::Number => "`4`",
        Unit::Percent => "`70` or `70%`",
        Unit::Ratio => "`0.05` or `5%`",
        Unit::Duration => "`300ms`",
    }
}

#[test]
fn the_metrics_page_matches_the_rows() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../METRICS.md");
    let page = page();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(path, &page).unwrap();
    }
    let written = std::fs::read_to_string(path).unwrap();
    assert_eq!(
        written, page,
        "METRICS.md is out of date: rewrite it as its last line says"
    );
}
