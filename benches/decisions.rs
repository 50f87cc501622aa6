//! Decision latency of the real binary: with the embedded default, and with a real Kafka and PostgreSQL,
//! where frames, records and commits go over the network.
//!
//! * from a step in load to the first decision (bar: two window lengths of the rule plus 1 s);
//! * from the gateway closing a second to the commit of the decision that it causes
//!   (bar: 20 ms at p99 embedded, 100 ms through Kafka), as the server's own histogram has it.
//!
//! `cargo bench -p penstock --bench decisions`; `SECONDS` sets the length of the second part,
//! `PENSTOCK_SKIP=kafka,postgres` leaves the servers out. Results are written to `OUT`, by default
//! `benches/decisions.json`; fails if a bar is missed.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]
#![allow(clippy::unwrap_used)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use contract::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};
use servers::{Kafka, Postgres};
use support::{DataFolder, Penstock, eventually};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

const STEP_WINDOW_SECONDS: u64 = 5;
const STEP_RUNS: usize = 5;
/// Endpoints whose rules constantly change the count.
const RESCALING_ENDPOINTS: usize = 16;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let figures = runtime.block_on(async {
        let mut figures = measure("embedded", &[], 20).await;
        if let Some((kafka, postgres)) = servers() {
            let (bus, store) = (kafka.url("penstock"), postgres.database());
            let arguments = ["--bus", &bus, "--store", &store];
            figures.extend(measure("through Kafka and PostgreSQL", &arguments, 100).await);
        }
        figures
    });
    let out = std::env::var("OUT").unwrap_or_else(|_| {
        let root = env!("CARGO_MANIFEST_DIR");
        format!("{root}/../../benches/decisions.json")
    });
    let kept = serde_json::to_string_pretty(&figures).unwrap() + "\n";
    std::fs::write(&out, kept).unwrap();
    println!("kept in {out}");
    if !figures.iter().all(Measurement::is_met) {
        std::process::exit(1);
    }
}

/// A measurement with its bar.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Measurement {
    how: String,
    what: &'static str,
    milliseconds: f64,
    at_most: f64,
    /// The raw data: delays in milliseconds, or counts by upper bound in seconds.
    raw: Value,
}

impl Measurement {
    fn is_met(&self) -> bool {
        self.milliseconds <= self.at_most
    }

    fn verdict(&self) -> &'static str {
        match self.is_met() {
            true => "holds",
            false => "DOES NOT HOLD",
        }
    }
}

fn servers() -> Option<(Kafka, Postgres)> {
    Some((Kafka::start(1)?, Postgres::start()?))
}

async fn measure(how: &str, arguments: &[&str], commit_bar_ms: u32) -> Vec<Measurement> {
    println!("{how}:");
    let folder = DataFolder::new();
    let penstock = Penstock::start_with(&folder, arguments).await;
    let figures = vec![
        step_to_decision(&penstock, how).await,
        close_to_commit(&penstock, how, commit_bar_ms).await,
    ];
    penstock.verify().await;
    figures
}

fn now() -> Timestamp {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    Timestamp::from_millis(since_epoch.as_millis() as i64)
}

async fn step_to_decision(penstock: &Penstock, how: &str) -> Measurement {
    let mut delays = Vec::new();
    for run in 0..STEP_RUNS {
        let name = format!("step-{run}");
        deploy_simulated(penstock, &name).await;
        let rule = json!({
            "name": "busy", "when": "> 10", "scale": {"direction": "out", "by": 1},
            "metric": {"name": "requests_per_second", "window": format!("{STEP_WINDOW_SECONDS}s")}
        });
        set_autoscale(penstock, &name, json!([rule]), 4).await;
        // Wait for a full window, so that it is covered.
        tokio::time::sleep(Duration::from_secs(STEP_WINDOW_SECONDS + 2)).await;
        let began = now();
        let load = send(penstock, &name, 50, Duration::from_secs(1), Duration::ZERO).await;
        let decision = eventually("a decision to scale out", || async {
            let path = format!("/v1/decisions?endpoint={name}&limit=1");
            let newest = penstock.get(&path).await["items"][0].clone();
            (newest["granted"].as_u64() > newest["from"].as_u64()
                && newest["rules"][0]["verdict"] == "triggered")
                .then_some(newest)
        })
        .await;
        load.abort();
        let decided: Timestamp = decision["time"].as_str().unwrap().parse().unwrap();
        delays.push(decided.since(began).millis());
    }
    delays.sort_unstable();
    let figure = Measurement {
        how: how.to_owned(),
        what: "step in load to first decision, median",
        milliseconds: delays[STEP_RUNS / 2] as f64,
        at_most: (2 * STEP_WINDOW_SECONDS * 1000 + 1000) as f64,
        raw: json!(delays),
    };
    println!("  step in load to first decision, window {STEP_WINDOW_SECONDS} s, {STEP_RUNS} runs:");
    println!(
        "    median {} ms, max {} ms (at most {} ms in the median: {})",
        figure.milliseconds,
        delays[STEP_RUNS - 1],
        figure.at_most,
        figure.verdict()
    );
    figure
}

async fn close_to_commit(penstock: &Penstock, how: &str, bar_ms: u32) -> Measurement {
    let seconds = std::env::var("SECONDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(60);
    let before = commit_latencies(penstock).await;
    let mut loads = Vec::new();
    for index in 0..RESCALING_ENDPOINTS {
        let name = format!("restless-{index}");
        deploy_simulated(penstock, &name).await;
        let metric = json!({"name": "requests_per_second", "window": "1s", "aggregation": "last"});
        let rules = json!([
            {"name": "up", "metric": metric, "when": "> 5", "scale": {"direction": "out", "to": 2}},
            {"name": "down", "metric": metric, "when": "< 5", "scale": {"direction": "in", "to": 1}}
        ]);
        set_autoscale(penstock, &name, rules, 2).await;
        loads.push(
            send(
                penstock,
                &name,
                20,
                Duration::from_secs(2),
                Duration::from_secs(2),
            )
            .await,
        );
    }
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    loads.iter().for_each(JoinHandle::abort);
    let after = commit_latencies(penstock).await;
    let counts: Vec<(f64, u64)> = after
        .iter()
        .zip(&before)
        .map(|((bound, now), (_, then))| (*bound, now - then))
        .collect();
    let total = counts.last().map_or(0, |(_, count)| *count);
    assert!(total > 0, "no decision was caused by a closed second");
    let quantile = |share: f64| {
        let rank = (total as f64 * share).ceil() as u64;
        counts
            .iter()
            .find(|(_, count)| *count >= rank)
            .map_or(f64::INFINITY, |(bound, _)| *bound)
    };
    let figure = Measurement {
        how: how.to_owned(),
        what: "gateway closes a second to commit of the decision, p99",
        milliseconds: quantile(0.99) * 1000.0,
        at_most: f64::from(bar_ms),
        raw: json!(counts),
    };
    println!(
        "  gateway closes a second to commit of the decision, {total} decisions in {seconds} s:"
    );
    println!(
        "    p50 <= {} ms, p99 <= {} ms, max <= {} ms (at most {bar_ms} ms at p99: {})",
        quantile(0.5) * 1000.0,
        figure.milliseconds,
        quantile(1.0) * 1000.0,
        figure.verdict()
    );
    figure
}

/// The cumulative buckets of the server's histogram: (upper bound in seconds, count).
async fn commit_latencies(penstock: &Penstock) -> Vec<(f64, u64)> {
    let text = penstock
        .http
        .get(format!("{}/metrics", penstock.control))
        .send()
        .await
        .unwrap();
    let text = text.text().await.unwrap();
    let bucket = |line: &str| {
        let rest = line.strip_prefix("penstock_decision_commit_seconds_bucket{le=\"")?;
        let (bound, count) = rest.split_once("\"} ")?;
        let bound = if bound == "+Inf" {
            f64::INFINITY
        } else {
            bound.parse().ok()?
        };
        Some((bound, count.trim().parse().ok()?))
    };
    text.lines().filter_map(bucket).collect()
}

async fn deploy_simulated(penstock: &Penstock, name: &str) {
    penstock
        .put(
            &format!("/v1/endpoints/{name}"),
            &support::endpoint_document(name),
        )
        .await;
    let document = json!({
        "apiVersion": "penstock/v1", "kind": "Deployment", "metadata": {"name": "blue", "endpoint": name},
        "spec": {"backend": "simulated", "instanceType": "sim", "simulated": {"startDelay": "0s"}}
    });
    penstock
        .put(&format!("/v1/endpoints/{name}/deployments/blue"), &document)
        .await;
    let traffic: Value = json!({"traffic": {"blue": 100}});
    penstock
        .put(&format!("/v1/endpoints/{name}/traffic"), &traffic)
        .await;
}

async fn set_autoscale(penstock: &Penstock, name: &str, rules: Value, max: u32) {
    let document = json!({
        "apiVersion": "penstock/v1", "kind": "Autoscale",
        "spec": {
            "target": {"endpoint": name, "deployment": "blue"},
            "cooldown": {"out": "0s", "in": "0s"}, "stabilization": {"out": "0s", "in": "0s"},
            "profiles": [{"name": "default", "capacity": {"min": 1, "max": max, "default": 1}, "rules": rules}]
        }
    });
    penstock
        .put(&format!("/v1/autoscale/{name}/blue"), &document)
        .await;
}

/// Sends requests at a steady rate, alternating load and idle phases. The responses do not matter:
/// nothing listens behind simulated instances, but arrivals are counted.
async fn send(
    penstock: &Penstock,
    name: &str,
    rate: u64,
    load: Duration,
    rest: Duration,
) -> JoinHandle<()> {
    let request = penstock.score(name, &penstock.key(name).await);
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_micros(1_000_000 / rate));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let mut until = Instant::now() + load;
        loop {
            ticks.tick().await;
            if let Some(request) = request.try_clone() {
                tokio::spawn(request.send());
            }
            if Instant::now() >= until {
                tokio::time::sleep(rest).await;
                ticks.reset();
                until = Instant::now() + load;
            }
        }
    })
}
