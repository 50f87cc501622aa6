//! Silence is not evidence: over random ticks of random policies, from frames to counts, a rule scales in
//! only on what was measured.
//!
//! `COUNT=10000000 cargo test --release -p penstock-domain --test autoscale evidence` runs more of them;
//! `SEED` starts elsewhere.

use std::collections::VecDeque;

use contract::frame::{DeploymentFrame, InstanceFrame, SourceKind};
use domain::measure::METRICS;
use fastrand::Rng;
use serde_json::{Value, json};

use crate::harness::{Scaler, deployment_frame, document};

/// Ticks with one policy.
const TICKS_PER_POLICY: u64 = 200;
const WINDOWS: [usize; 4] = [1, 2, 5, 10];

fn below(rng: &mut Rng, bound: u64) -> u64 {
    rng.u64(0..bound)
}

fn one_in(rng: &mut Rng, chance: u64) -> bool {
    below(rng, chance) == 0
}

/// What one second of a kind of source gives evidence of; `None` if there was no frame.
#[derive(Clone, Copy, Debug, Default)]
struct Evidence {
    idle: bool,
    answered: bool,
    refused: bool,
    sampled: bool,
    /// By the present definitions, or with nothing to measure.
    defined: bool,
}

type Seconds = VecDeque<Option<Evidence>>;

struct TestRule {
    source: SourceKind,
    needs_answers: bool,
    /// Whether the meaning of its metric has changed with the definitions of frames.
    is_redefined: bool,
    window: usize,
}

/// Rules that scale in whenever they may: every condition holds for nearly every value.
fn rules(rng: &mut Rng) -> (Value, Vec<TestRule>) {
    let mut written = Vec::new();
    let mut rules = Vec::new();
    for index in 0..1 + below(rng, 3) {
        let row = &METRICS[below(rng, METRICS.len() as u64) as usize];
        let window = WINDOWS[below(rng, 4) as usize];
        let is_latency = row.name.starts_with("latency");
        let is_share = row.name.ends_with("_ratio");
        let high = match (is_latency, is_share) {
            (true, _) => json!("<= 1h"),
            (_, true) => json!("<= 1"),
            _ => json!("< 100000"),
        };
        let aggregation = match below(rng, 4) {
            0 => "max",
            1 => "last",
            _ => "average",
        };
        let mut rule = json!({
            "name": format!("rule-{index}"),
            "metric": {"name": row.name, "window": format!("{window}s"), "aggregation": aggregation},
        });
        if row.is_total && one_in(rng, 3) {
            rule["track"] = json!({"target": 1000});
        } else {
            rule["when"] = high;
            rule["scale"] = json!({"direction": "in", "by": 1});
        }
        written.push(rule);
        rules.push(TestRule {
            source: row.source.clone(),
            needs_answers: is_latency || is_share,
            is_redefined: is_latency || row.source == SourceKind::NODE,
            window,
        });
    }
    (json!(written), rules)
}

fn gateway_second(rng: &mut Rng, regime: u64) -> (DeploymentFrame, Evidence) {
    let mut frame = deployment_frame();
    let mut evidence = Evidence {
        defined: true,
        ..Evidence::default()
    };
    let some = 1 + below(rng, 5);
    match regime {
        0 => {
            evidence.idle = true;
            return (frame, evidence);
        }
        // Requests hang; some of their clients leave.
        1 => {
            frame.in_flight_us = some * 1_000_000;
            frame.oldest_in_flight_us = some * 100_000;
            frame.outcomes.client_left = below(rng, 2);
        }
        // Requests are refused, some while others wait.
        2 => {
            frame.outcomes.too_many_pending = some;
            frame.outcomes.hold_expired = below(rng, 2);
            frame.queued_us = below(rng, 2) * 50_000;
            evidence.refused = true;
        }
        // Instances cannot be reached.
        3 => frame.outcomes.unreachable = some,
        _ => {
            frame.outcomes.success = some;
            frame.outcomes.timeout = below(rng, 2);
            frame.in_flight_us = some * 100_000;
            for _ in 0..some + frame.outcomes.timeout {
                frame.latency.record(1000 + below(rng, 900_000));
            }
            evidence.answered = true;
        }
    }
    frame.arrivals = some;
    if one_in(rng, 50) {
        frame.definitions = 0;
        evidence.defined = false;
    }
    (frame, evidence)
}

fn node_second(rng: &mut Rng) -> (DeploymentFrame, Evidence) {
    let mut frame = deployment_frame();
    let mut sampled = false;
    for index in 0..below(rng, 4) {
        let ready_for_us = (!one_in(rng, 3)).then(|| below(rng, 3) * 1_000_000);
        let is_reported = !one_in(rng, 4);
        let instance = InstanceFrame {
            ready_for_us,
            cpu_us: is_reported.then(|| below(rng, 1_000_000)),
            memory_bytes: is_reported.then(|| below(rng, 1000)),
            memory_limit_bytes: Some(1000),
            ..InstanceFrame::new(format!("iris-blue-{index}").into())
        };
        sampled |= is_reported && ready_for_us.is_some_and(|ready| ready >= 1_000_000);
        frame.instances.push(instance);
    }
    let defined = !one_in(rng, 50);
    frame.definitions = u32::from(defined);
    let evidence = Evidence {
        sampled,
        defined,
        ..Evidence::default()
    };
    (frame, evidence)
}

/// The last so many seconds up to the newest one with a frame.
fn window(seconds: &Seconds, length: usize) -> Vec<Option<Evidence>> {
    let reported = seconds.iter().rev().skip_while(|second| second.is_none());
    reported.take(length).copied().collect()
}

/// Why this rule may not scale in.
fn objection(rule: &TestRule, gateways: &Seconds, nodes: &Seconds) -> Option<&'static str> {
    let is_gateway = rule.source == SourceKind::GATEWAY;
    let refusals = window(gateways, rule.window);
    if refusals.iter().flatten().any(|second| second.refused) {
        return Some("requests were refused");
    }
    let seconds = window(if is_gateway { gateways } else { nodes }, rule.window);
    if seconds.len() < rule.window || seconds.iter().any(Option::is_none) {
        return Some("a second is missing");
    }
    let seconds: Vec<Evidence> = seconds.into_iter().flatten().collect();
    if rule.is_redefined && seconds.iter().any(|second| !second.defined) {
        return Some("a frame is of an older release");
    }
    if !is_gateway {
        let is_sampled = seconds.iter().any(|second| second.sampled);
        return (!is_sampled).then_some("no ready instance was sampled");
    }
    let is_answered = seconds.iter().any(|second| second.answered);
    let is_idle = seconds.iter().all(|second| second.idle);
    (rule.needs_answers && !is_answered && !is_idle)
        .then_some("nothing was answered, and the gateway was not idle")
}

struct Run {
    rng: Rng,
    scale_ins: u64,
    holds: u64,
}

impl Run {
    fn policy(&mut self, ticks: u64) {
        let rng = &mut self.rng;
        let (written, rules) = rules(rng);
        let missing = ["hold", "default"][below(rng, 2) as usize];
        let mut scaler = Scaler::new(&document(written, json!({"missing": missing})), 15);
        let (mut gateways, mut nodes) = (Seconds::new(), Seconds::new());
        let mut regime = 0;
        for _ in 0..ticks {
            // Regimes last, so that windows are filled with one, and change.
            if one_in(rng, 6) {
                regime = below(rng, 6);
            }
            let (frame, evidence) = gateway_second(rng, regime);
            let sent = !one_in(rng, 60);
            if sent {
                let is_listed = !evidence.idle || one_in(rng, 2);
                let listed = is_listed.then_some(frame).into_iter().collect();
                scaler.receive(SourceKind::GATEWAY, listed);
            }
            gateways.push_back(sent.then_some(evidence));
            let (frame, evidence) = node_second(rng);
            let sent = !one_in(rng, 60);
            if sent {
                scaler.receive(SourceKind::NODE, vec![frame]);
            }
            nodes.push_back(sent.then_some(evidence));
            for seconds in [&mut gateways, &mut nodes] {
                while seconds.len() > 30 {
                    seconds.pop_front();
                }
            }
            let before = scaler.granted();
            let granted = scaler.step(below(rng, 5) as u32);
            if granted >= before {
                self.holds += 1;
            } else {
                self.scale_ins += 1;
                let objections = rules.iter().map(|rule| objection(rule, &gateways, &nodes));
                let objections: Vec<_> = objections.flatten().collect();
                assert!(
                    objections.is_empty(),
                    "from {before} to {granted} although {objections:?}; gateways {gateways:?}; nodes {nodes:?}"
                );
            }
            scaler.set_granted(15);
        }
    }
}

fn number(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.map_or(default, |text| text.parse().unwrap())
}

#[test]
fn no_rule_scales_in_without_an_answer_an_idle_gateway_or_a_sample() {
    let ticks = number("COUNT", 100_000);
    let mut run = Run {
        rng: Rng::with_seed(number("SEED", 11)),
        scale_ins: 0,
        holds: 0,
    };
    for _ in 0..ticks.div_ceil(TICKS_PER_POLICY) {
        run.policy(TICKS_PER_POLICY);
    }
    let (scale_ins, holds) = (run.scale_ins, run.holds);
    assert!(
        scale_ins > ticks / 50 && holds > ticks / 50,
        "{scale_ins} {holds}"
    );
    println!("{ticks} ticks: {scale_ins} scale-ins, {holds} held");
}
