//! Deployments that are overloaded or hang, from the frames of a gateway to the counts.

use contract::decision::{Decision, DecisionOutcome};
use contract::frame::{DeploymentFrame, Outcomes, SourceKind};
use serde_json::{Value, json};

use crate::harness::{Scaler, deployment_frame, document};

const STEP_MS: u64 = 5;
/// Time from a scale-out to a ready instance.
const START_MS: u64 = 3000;

/// A deployment with one slot per instance, behind a gateway.
struct Service {
    work_ms: u64,
    queue_wait_ms: u64,
    /// When each instance is ready, oldest first.
    ready_ms: Vec<u64>,
    /// When each request that is being served arrived, and when it ends.
    serving: Vec<(u64, u64)>,
    queue: Vec<u64>,
    now_ms: u64,
    /// Requests due but not sent yet, in thousandths.
    due: u64,
}

impl Service {
    fn new(work_ms: u64, instances: u32) -> Self {
        Self {
            work_ms,
            queue_wait_ms: 100,
            ready_ms: vec![0; instances as usize],
            serving: Vec::new(),
            queue: Vec::new(),
            now_ms: 0,
            due: 0,
        }
    }

    fn ready(&self) -> usize {
        let is_ready = |at: &&u64| **at <= self.now_ms;
        self.ready_ms.iter().filter(is_ready).count()
    }

    fn scale(&mut self, instances: u32) {
        self.ready_ms
            .resize(instances as usize, self.now_ms + START_MS);
    }

    /// What the gateway measures in the next second at this rate.
    fn second(&mut self, requests_per_second: u64) -> DeploymentFrame {
        let mut frame = deployment_frame();
        for _ in 0..1000 / STEP_MS {
            self.step(requests_per_second, &mut frame);
        }
        let arrived = self.serving.iter().map(|(arrived, _)| arrived);
        let oldest = arrived.chain(&self.queue).min();
        frame.oldest_in_flight_us = oldest.map_or(0, |oldest| (self.now_ms - oldest) * 1000);
        frame
    }

    fn step(&mut self, requests_per_second: u64, frame: &mut DeploymentFrame) {
        let now = self.now_ms;
        self.due += requests_per_second * STEP_MS;
        while self.due >= 1000 {
            self.due -= 1000;
            frame.arrivals += 1;
            self.queue.push(now);
        }
        self.serving.retain(|(arrived, end)| {
            if *end <= now {
                frame.outcomes.success += 1;
                frame.latency.record((now - arrived) * 1000);
            }
            *end > now
        });
        while self.serving.len() < self.ready() && !self.queue.is_empty() {
            self.serving
                .push((self.queue.remove(0), now + self.work_ms));
        }
        let wait = self.queue_wait_ms;
        let before = self.queue.len();
        self.queue.retain(|arrived| now - arrived < wait);
        frame.outcomes.too_many_pending += (before - self.queue.len()) as u64;
        frame.in_flight_us += self.serving.len() as u64 * STEP_MS * 1000;
        frame.queued_us += self.queue.len() as u64 * STEP_MS * 1000;
        self.now_ms += STEP_MS;
    }
}

fn scaler(rules: Value, instances: u32) -> Scaler {
    Scaler::new(&document(rules, json!({})), instances)
}

/// The decisions of so many seconds under 40 requests a second.
fn run(service: &mut Service, scaler: &mut Scaler, seconds: u64) -> Vec<Decision> {
    let tick = |_| {
        let frame = service.second(40);
        scaler.receive(SourceKind::GATEWAY, vec![frame]);
        let decision = scaler.decide(service.ready() as u32);
        service.scale(decision.granted);
        decision
    };
    (0..seconds).map(tick).collect()
}

fn latency_rule(name: &str, when: &str, direction: &str) -> Value {
    json!({
        "name": name, "metric": {"name": "latency_p90", "window": "10s"}, "when": when,
        "scale": {"direction": direction, "by": 1},
    })
}

#[test]
fn an_overloaded_deployment_that_refuses_most_requests_scales_out_on_its_latency() {
    let mut service = Service::new(1000, 1);
    let mut scaler = scaler(json!([latency_rule("slow", "> 500ms", "out")]), 1);
    let decisions = run(&mut service, &mut scaler, 21);
    assert!(decisions.iter().any(|decision| decision.granted > 1));
}

#[test]
fn an_overloaded_deployment_is_never_below_the_count_it_started_with() {
    let mut service = Service::new(1000, 3);
    let rules = json!([
        latency_rule("fast", "< 200ms", "in"),
        latency_rule("slow", "> 500ms", "out"),
    ]);
    let mut scaler = scaler(rules, 3);
    let decisions = run(&mut service, &mut scaler, 60);
    assert!(decisions.iter().all(|decision| decision.granted >= 3));
    assert!(decisions[59].granted > 3);
}

#[test]
fn rules_that_measure_little_load_wait_until_nothing_is_refused_any_more() {
    // One slot each: a concurrency of 3 looks like all that is asked for.
    let follow = json!([{
        "name": "idle", "metric": {"name": "concurrency", "window": "10s"}, "when": "< 10",
        "scale": {"direction": "in", "by": 1},
    }]);
    let mut service = Service::new(1000, 3);
    let mut scaler = scaler(follow, 3);
    let decisions = run(&mut service, &mut scaler, 30);
    assert_eq!(decisions[29].outcome, DecisionOutcome::HeldByRefusals);
    assert_eq!(decisions[29].granted, 3);
    // Without load, the last refusal leaves the window after ten seconds.
    let mut idle = Vec::new();
    for _ in 0..12 {
        scaler.receive(SourceKind::GATEWAY, vec![service.second(0)]);
        idle.push(scaler.decide(3).granted);
    }
    assert_eq!((idle[8], idle[11] < 3), (3, true), "{idle:?}");
}

/// A deployment whose requests never end, and which refuses none.
fn hanging(instances: u32) -> Service {
    Service {
        queue_wait_ms: u64::MAX,
        ..Service::new(3_600_000, instances)
    }
}

#[test]
fn a_deployment_on_which_every_request_hangs_is_not_scaled_in() {
    for rule in [
        latency_rule("fast", "< 200ms", "in"),
        json!({
            "name": "fine", "metric": {"name": "error_ratio", "window": "10s"}, "when": "< 1%",
            "scale": {"direction": "in", "by": 1},
        }),
    ] {
        let mut scaler = scaler(json!([rule]), 3);
        let decisions = run(&mut hanging(3), &mut scaler, 60);
        assert!(
            decisions.iter().all(|decision| decision.granted == 3),
            "{rule}"
        );
        assert_eq!(decisions[59].outcome, DecisionOutcome::Unknown);
    }
}

#[test]
fn a_deployment_on_which_every_request_hangs_scales_out_on_the_age_of_the_oldest() {
    let rules = json!([
        latency_rule("fast", "< 200ms", "in"),
        latency_rule("slow", "> 500ms", "out"),
    ]);
    let mut scaler = scaler(rules, 3);
    let decisions = run(&mut hanging(3), &mut scaler, 15);
    assert!(decisions[14].granted > 3);
    assert!(decisions.iter().all(|decision| decision.granted >= 3));
}

#[test]
fn the_refused_ratio_scales_out() {
    let rules = json!([{
        "name": "refusing", "metric": {"name": "refused_ratio", "window": "10s"}, "when": "> 5%",
        "scale": {"direction": "out", "by": 2},
    }]);
    let mut service = Service::new(1000, 1);
    let mut scaler = scaler(rules, 1);
    let decisions = run(&mut service, &mut scaler, 15);
    assert!(decisions[14].granted >= 3);
    let refused = Outcomes {
        too_many_pending: 1,
        ..Outcomes::default()
    };
    assert_eq!(refused.bad(), 1, "refusals are part of the error ratio");
}
