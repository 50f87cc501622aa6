//! Rule evaluations per second of the pure evaluator on one core, building the full explanation
//! whenever a decision would be written. Signals change every tick, each from ten samples.

use std::hint::black_box;
use std::time::Instant;

use contract::decision::{CarriedState, Decision, InstanceCounts, Pause, Signal};
use contract::ids::{DeploymentRef, Uid};
use contract::resources::{
    AutoscaleMode, AutoscaleSpec, Capacity, Cooldown, Direction, MetricSpec, MissingMetric,
    NumberOrText, ProfileSpec, RuleSpec, ScaleSpec, Stabilization,
};
use contract::time::{Span, Timestamp};
use domain::autoscale::{Policy, Selection, TickInputs, carry, evaluate, explain, should_explain};
use domain::zones::ZoneData;

const POLICIES: usize = 200;
const TICKS: usize = 2000;
const RUNS: usize = 7;
const SAMPLES: usize = 10;
/// Minimum rule evaluations per second on one core.
const RULES_PER_SECOND_MIN: f64 = 1e6;

/// splitmix64: the same loads on every machine.
struct Rng(u64);

impl Rng {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

fn rule(index: usize, direction: Direction, when: String) -> RuleSpec {
    let metrics = [
        "concurrency",
        "requests_per_second",
        "cpu_utilization",
        "queue_length",
        "error_ratio",
    ];
    RuleSpec {
        name: format!("rule-{index}"),
        metric: MetricSpec {
            name: metrics[index / 2 % metrics.len()].into(),
            window: Span::from_secs(SAMPLES as u64),
            aggregation: "average".into(),
            per_instance: true,
        },
        when: Some(when),
        scale: Some(ScaleSpec {
            direction,
            by: Some(NumberOrText::Text("20%".into())),
            to: None,
            steps: None,
            cooldown: None,
        }),
        track: None,
    }
}

/// Pairs of rules: any scales out, and all must agree to scale in.
fn policy(rules: usize) -> AutoscaleSpec {
    let rules = (0..rules).map(|index| {
        let ratio = index / 2 % 5 == 4;
        match (index % 2, ratio) {
            (0, false) => rule(index, Direction::Out, "> 60".into()),
            (0, true) => rule(index, Direction::Out, "> 0.6".into()),
            (_, false) => rule(index, Direction::In, "< 25".into()),
            (_, true) => rule(index, Direction::In, "< 0.25".into()),
        }
    });
    AutoscaleSpec {
        target: "iris/blue".parse().expect("a name"),
        mode: AutoscaleMode::Live,
        cooldown: Cooldown::default(),
        stabilization: Stabilization::default(),
        initialization_period: Span::ZERO,
        missing: MissingMetric::Hold,
        profiles: vec![ProfileSpec {
            name: "default".into(),
            schedule: None,
            priority: 0,
            capacity: Capacity {
                min: 1,
                max: 100,
                default: 4,
            },
            rules: Some(rules.collect()),
        }],
    }
}

struct Deployment {
    policy: Policy,
    carried: CarriedState,
    last: Option<Decision>,
    selection: Option<Selection>,
    samples: Vec<[f64; SAMPLES]>,
    signals: Vec<Option<Signal>>,
}

impl Deployment {
    fn new(index: usize) -> Self {
        let policy =
            Policy::compile(&policy(4 + index % 7), &ZoneData::bundled()).expect("a valid policy");
        let count = policy.signals().len();
        Self {
            policy,
            carried: CarriedState {
                granted: Some(10),
                ..CarriedState::default()
            },
            last: None,
            selection: None,
            samples: vec![[0.0; SAMPLES]; count],
            signals: vec![None; count],
        }
    }

    fn rules(&self) -> usize {
        let profile = &self.policy.spec().profiles[0];
        profile.rules.as_ref().map_or(0, Vec::len)
    }

    /// Draws a new sample of every signal; `load` is what one instance of ten would carry.
    fn measure(&mut self, tick: usize, load: f64) {
        let count = f64::from(self.carried.granted.unwrap_or(1).max(1));
        for (index, samples) in self.samples.iter_mut().enumerate() {
            let of = self.policy.signals()[index];
            samples[tick % SAMPLES] = match of.metric.is_total() {
                true => load * 10.0,
                false if index % 5 == 4 => load * 0.1 / count,
                false => load * 10.0 / count,
            };
            let average = samples.iter().sum::<f64>() / SAMPLES as f64;
            self.signals[index] = Some(Signal {
                value: Some(average),
                seconds_covered: SAMPLES as u32,
                seconds_wanted: SAMPLES as u32,
                ..Signal::default()
            });
        }
    }

    /// Returns whether a decision was written.
    fn tick(&mut self, of: &DeploymentRef, uid: Uid, now: Timestamp) -> bool {
        let count = self.carried.granted.unwrap_or(1);
        let inputs = TickInputs {
            pinned_by: None,
            failed_starts: None,
            starts_at_default: false,
            policy_revision: 1,
            fixed_instances: 1,
            pin: None,
            pause: Pause::default(),
            instances: InstanceCounts {
                ready: count,
                pending: 0,
            },
            signals: &self.signals,
            carried: &self.carried,
            selection: self.selection,
        };
        let evaluation = evaluate(Some(&self.policy), &inputs, now);
        let written = should_explain(self.last.as_ref(), Some(&self.policy), &inputs, &evaluation);
        if written {
            self.last = Some(explain(of, uid, Some(&self.policy), &inputs, now));
        }
        self.selection = evaluation.selection;
        carry(&mut self.carried, Some(&self.policy), &evaluation, now);
        written
    }
}

struct Run {
    evaluations: u64,
    ticks: u64,
    written: u64,
    seconds: f64,
}

fn run(seed: u64) -> Run {
    let of: DeploymentRef = "iris/blue".parse().expect("a name");
    let uid = Uid(uuid::Uuid::nil());
    let mut rng = Rng(seed);
    let mut deployments: Vec<Deployment> = (0..POLICIES).map(Deployment::new).collect();
    let mut load = vec![40.0; POLICIES];
    let start = Timestamp::from_secs(1_790_000_000);
    let mut result = Run {
        evaluations: 0,
        ticks: 0,
        written: 0,
        seconds: 0.0,
    };
    let began = Instant::now();
    for tick in 0..TICKS {
        let now = start + Span::from_secs(tick as u64);
        for (index, deployment) in deployments.iter_mut().enumerate() {
            // A random walk with occasional jumps.
            load[index] = match rng.below(300) {
                0 => rng.below(160) as f64,
                _ => (load[index] + rng.below(9) as f64 - 4.0).clamp(0.0, 200.0),
            };
            deployment.measure(tick, load[index]);
            result.written += u64::from(black_box(deployment.tick(&of, uid, now)));
            result.evaluations += deployment.rules() as u64;
            result.ticks += 1;
        }
    }
    result.seconds = began.elapsed().as_secs_f64();
    result
}

fn main() {
    let mut runs: Vec<Run> = (0..RUNS as u64).map(run).collect();
    runs.sort_by(|a, b| {
        let rate = |run: &Run| run.evaluations as f64 / run.seconds;
        rate(a).total_cmp(&rate(b))
    });
    let median = &runs[RUNS / 2];
    let rate = median.evaluations as f64 / median.seconds;
    let verdict = match rate >= RULES_PER_SECOND_MIN {
        true => "holds",
        false => "DOES NOT HOLD",
    };
    println!(
        "evaluate: {:.2} million rule evaluations per second on one core (median of {RUNS} runs; 4 to 10 rules per policy, {:.2} % of ticks wrote a decision with its full explanation); at least {:.0} million: {verdict}",
        rate / 1e6,
        median.written as f64 * 100.0 / median.ticks as f64,
        RULES_PER_SECOND_MIN / 1e6,
    );
    let kept: Vec<_> = runs
        .iter()
        .map(|run| {
            serde_json::json!({
                "evaluations": run.evaluations, "ticks": run.ticks, "written": run.written, "seconds": run.seconds,
            })
        })
        .collect();
    let out = concat!(env!("CARGO_MANIFEST_DIR"), "/../../benches/evaluate.json");
    let text = serde_json::json!({"runs": kept, "evaluationsPerSecond": rate, "atLeast": RULES_PER_SECOND_MIN});
    std::fs::write(out, format!("{text:#}\n")).expect("the results cannot be kept");
    println!("kept in benches/evaluate.json");
    if rate < RULES_PER_SECOND_MIN {
        std::process::exit(1);
    }
}
