//! The rows of metrics: each tells the truth about itself, and all of them are told to people.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::*;

/// Requests at a time, or in a second, in one run of a situation; another run has `MORE`.
const SOME: u64 = 2;
const MORE: u64 = 5;

/// What a second of a situation looks like to each source. `load` scales what is there to be measured.
struct Scene {
    gateway: Option<DeploymentFrame>,
    node: Option<DeploymentFrame>,
}

fn no_traffic(load: u64) -> Scene {
    Scene {
        gateway: Some(deployment()),
        node: Some(with_instances(load)),
    }
}

fn all_in_flight(load: u64) -> Scene {
    Scene {
        gateway: Some(DeploymentFrame {
            arrivals: 2 * load,
            in_flight_us: load * 1_000_000,
            queued_us: load * 500_000,
            ..deployment()
        }),
        node: Some(with_instances(load)),
    }
}

fn all_refused(load: u64) -> Scene {
    Scene {
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

fn no_instance(load: u64) -> Scene {
    Scene {
        gateway: Some(DeploymentFrame {
            arrivals: load,
            queued_us: load * 1_000_000,
            ..deployment()
        }),
        node: Some(deployment()),
    }
}

fn no_report(_: u64) -> Scene {
    Scene {
        gateway: None,
        node: None,
    }
}

fn with_instances(load: u64) -> DeploymentFrame {
    let instance = |name: &str| InstanceFrame {
        cpu_us: Some(load * 100_000),
        memory_bytes: Some(load * 100),
        ..InstanceFrame::new(InstanceId::from(name.to_owned()))
    };
    DeploymentFrame {
        instances: vec![instance("a"), instance("b")],
        ..deployment()
    }
}

/// What a metric comes to after ten such seconds.
fn measured(metric: &str, aggregation: &str, scene: &Scene) -> Option<f64> {
    let node = Source {
        kind: SourceKind::NODE,
        id: "node".into(),
    };
    let mut measures = measures();
    for second in START..START + 10 {
        for (source, told) in [(gateway("a"), &scene.gateway), (node.clone(), &scene.node)] {
            let Some(told) = told else { continue };
            let frame = Frame {
                deployments: vec![told.clone()],
                ..empty(source, second)
            };
            measures.frame(after(second, 5), &frame);
        }
    }
    let options = SignalOptions {
        memory_bytes_per_instance: Some(1000),
        ..SignalOptions::default()
    };
    let spec = spec(metric, 5, aggregation);
    measures.signals(uid(), &[spec], options, after(START + 9, 5))[0]
        .unwrap()
        .value
}

#[test]
fn every_metric_is_worth_what_its_row_says() {
    type Situation = (&'static str, fn(u64) -> Scene, fn(&Situations) -> Worth);
    let situations: [Situation; 5] = [
        ("no traffic", no_traffic, |worth| worth.no_traffic),
        ("all in flight", all_in_flight, |worth| worth.all_in_flight),
        ("all refused", all_refused, |worth| worth.all_refused),
        ("no instance", no_instance, |worth| worth.no_instance),
        ("no report", no_report, |worth| worth.no_report),
    ];
    for (row, (situation, scene, said)) in METRICS
        .iter()
        .flat_map(|row| situations.map(|situation| (row, situation)))
    {
        for aggregation in ["average", "max", "last"] {
            let of = |load| measured(row.name, aggregation, &scene(load));
            let found = (of(SOME), of(MORE));
            let said = said(&row.worth);
            let is_so = match said {
                Worth::Always(value) => found == (Some(value), Some(value)),
                Worth::Unknown => found == (None, None),
                Worth::Measured => matches!(found, (Some(some), Some(more)) if some < more),
            };
            assert!(
                is_so,
                "{}, with {situation}: its row says {said}, its {aggregation} is {found:?}",
                row.name
            );
        }
    }
}

#[test]
fn no_name_of_a_metric_is_taken_twice() {
    let rows = METRICS.iter().map(|row| (row.name, row.aliases));
    let later = SPOKEN_FOR.iter().map(|of| (of.name, of.aliases));
    let mut seen = BTreeSet::new();
    for (name, aliases) in rows.chain(later) {
        for name in [&[name], aliases].concat() {
            assert!(seen.insert(name), "`{name}` is the name of two metrics");
        }
    }
}

#[test]
fn only_a_total_is_shared_out_among_instances() {
    for row in METRICS {
        assert!(row.is_total || !row.is_per_instance, "{}", row.name);
        assert!(!row.description.is_empty(), "{}", row.name);
    }
}

/// `METRICS.md`, for people.
fn page() -> String {
    let mut page = String::from(
        "# Metrics\n\n\
         What `metric.name` of an autoscale rule may be. A total adds up over instances, and `perInstance: true` makes it a share of each;\n\
         others are of one instance or answer already. What a metric is worth where there is nothing to compute it from stands beside it: a\n\
         number, *measured* (what was counted), or *unknown*, by which a rule never takes an instance away.\n\n\
         | name | in rules | total | reported by | no traffic | all in flight | all refused | no instance | no report | what it is |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in METRICS {
        let worth = &row.worth;
        let also = match row.aliases {
            [] => String::new(),
            aliases => format!(" Also `{}`.", aliases.join("`, `")),
        };
        let (unit, total) = (words(row.unit), if row.is_total { "yes" } else { "no" });
        let source = &row.source;
        let _ = writeln!(
            page,
            "| `{}` | {unit} | {total} | {source} | {} | {} | {} | {} | {} | {}{also} |",
            row.name,
            worth.no_traffic,
            worth.all_in_flight,
            worth.all_refused,
            worth.no_instance,
            worth.no_report,
            row.description,
        );
    }
    let later: Vec<&str> = SPOKEN_FOR.iter().map(|of| of.name).collect();
    let _ = write!(
        page,
        "\nNot available yet, and refused by name: `{}`.\n\n\
         This page is written from `libs/domain/src/measure/metrics.rs` by `UPDATE_GOLDEN=1 cargo test -p penstock-domain --lib rows`.\n",
        later.join("`, `")
    );
    page
}

fn words(unit: Unit) -> &'static str {
    match unit {
        Unit::Number => "`4`",
        Unit::Percent => "`70` or `70%`",
        Unit::Ratio => "`0.05` or `5%`",
        Unit::Duration => "`300ms`",
    }
}

#[test]
fn the_page_of_metrics_says_what_the_rows_say() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../METRICS.md");
    let page = page();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(path, &page).unwrap();
    }
    let written = std::fs::read_to_string(path).unwrap();
    assert_eq!(written, page, "write METRICS.md anew, as its end says");
}
