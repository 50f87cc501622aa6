//! A deployment with one policy, written in JSON as people write it and stepped by the second.

use contract::decision::{
    CarriedState, Decision, DecisionInputs, InstanceCounts, Pause, Pin, Signal,
};
use contract::frame::{DeploymentFrame, Frame, Role, Source, SourceKind};
use contract::ids::{Bucket, DeploymentRef, EndpointKey, Uid};
use contract::problem::Finding;
use contract::resources::AutoscaleSpec;
use contract::time::{Span, Timestamp};
use domain::autoscale::{
    Evaluation, Policy, TickInputs, carried_next, carry, decide, evaluate, explain, reevaluate,
};
use domain::measure::{Measures, SignalOptions};
use domain::zones::ZoneData;
use serde_json::{Value, json};
use uuid::Uuid;

pub const START: Timestamp = Timestamp::from_secs(1_790_000_000);

pub fn zones() -> ZoneData {
    ZoneData::bundled()
}

pub fn compile(spec: &AutoscaleSpec) -> Result<Policy, Vec<Finding>> {
    Policy::compile(spec, &zones())
}

pub fn carried_after(decision: &Decision) -> CarriedState {
    carried_next(decision, &zones())
}

/// Reevaluates a decision from what it records.
pub fn reevaluated(decision: &Decision) -> Decision {
    reevaluate(decision, &zones())
}

pub fn deployment() -> DeploymentRef {
    "iris/blue".parse().unwrap()
}

pub fn uid() -> Uid {
    Uid(Uuid::from_u128(7))
}

/// A document with one profile of 1 to 20 instances and these rules, without damping; `more`
/// replaces members of the spec.
pub fn document(rules: Value, more: Value) -> Value {
    let mut spec = json!({
        "target": {"endpoint": "iris", "deployment": "blue"},
        "cooldown": {"out": "0s", "in": "0s"},
        "stabilization": {"out": "0s", "in": "0s"},
        "profiles": [{
            "name": "default",
            "capacity": {"min": 1, "max": 20, "default": 2},
            "rules": rules,
        }],
    });
    for (key, value) in more.as_object().unwrap() {
        spec[key] = value.clone();
    }
    spec
}

pub fn spec(document: &Value) -> AutoscaleSpec {
    serde_json::from_value(document.clone()).unwrap()
}

/// A rule on concurrency per instance over 10 s.
pub fn on_concurrency(name: &str, when: &str, scale: Value) -> Value {
    json!({
        "name": name,
        "metric": {"name": "concurrency", "window": "10s", "perInstance": true},
        "when": when,
        "scale": scale,
    })
}

/// A rule on CPU over a minute.
pub fn on_cpu(name: &str, when: &str, scale: Value) -> Value {
    json!({
        "name": name,
        "metric": {"name": "cpu_utilization"},
        "when": when,
        "scale": scale,
    })
}

pub const CONCURRENCY: &str = "concurrency/10s/average";
pub const CPU: &str = "cpu_utilization/60s/average";
pub const RATE: &str = "requests_per_second/60s/average";

pub fn whole(value: f64) -> Signal {
    Signal {
        value: Some(value),
        seconds_covered: 10,
        seconds_wanted: 10,
        ..Signal::default()
    }
}

pub fn partial(value: f64) -> Signal {
    Signal {
        partial: true,
        ..whole(value)
    }
}

pub fn missing() -> Signal {
    Signal {
        value: None,
        seconds_covered: 0,
        ..whole(0.0)
    }
}

pub fn warming(value: Option<f64>) -> Signal {
    Signal {
        value,
        seconds_covered: 3,
        warming: true,
        ..whole(0.0)
    }
}

#[derive(Clone)]
pub struct Harness {
    pub inputs: DecisionInputs,
    pub now: Timestamp,
}

impl Harness {
    /// Starts with a count that has been stable for long, with all instances ready.
    pub fn new(document: Value, count: u32) -> Self {
        let spec = spec(&document);
        compile(&spec).unwrap();
        let inputs = DecisionInputs {
            pinned_by: None,
            failed_starts: None,
            starts_at_default: false,
            policy_revision: 1,
            policy: Some(spec.into()),
            fixed_instances: 3,
            pin: None,
            pause: Pause::default(),
            instances: InstanceCounts {
                ready: count,
                pending: 0,
            },
            signals: Default::default(),
            carried: CarriedState {
                granted: Some(count),
                ..CarriedState::default()
            },
            zone_data: None,
        };
        Self { inputs, now: START }
    }

    pub fn signal(mut self, key: &str, signal: Signal) -> Self {
        self.inputs.signals.insert(key.into(), signal);
        self
    }

    pub fn value(self, key: &str, value: f64) -> Self {
        self.signal(key, whole(value))
    }

    pub fn pinned(mut self, instances: u32, until: Option<Timestamp>) -> Self {
        self.inputs.pin = Some(Pin { instances, until });
        self
    }

    pub fn ready(mut self, ready: u32, pending: u32) -> Self {
        self.inputs.instances = InstanceCounts { ready, pending };
        self
    }

    /// The inputs with these signals, as a service passes them.
    pub fn tick<'a>(
        &'a self,
        signals: &'a [Option<Signal>],
        carried: &'a CarriedState,
    ) -> TickInputs<'a> {
        TickInputs {
            policy_revision: self.inputs.policy_revision,
            fixed_instances: self.inputs.fixed_instances,
            pin: self.inputs.pin,
            pinned_by: self.inputs.pinned_by.as_deref(),
            pause: self.inputs.pause,
            instances: self.inputs.instances,
            failed_starts: self.inputs.failed_starts.as_ref(),
            starts_at_default: self.inputs.starts_at_default,
            signals,
            carried,
            selection: None,
        }
    }

    pub fn decide(&self) -> Decision {
        decide(
            &deployment(),
            uid(),
            self.inputs.clone(),
            &zones(),
            self.now,
        )
    }

    /// Decides, carries the state over, makes all instances ready, and advances by `seconds`.
    pub fn step(&mut self, seconds: u64) -> Decision {
        let decision = self.decide();
        self.inputs.carried = carried_after(&decision);
        self.inputs.instances.ready = decision.granted;
        self.now = self.now + Span::from_secs(seconds);
        decision
    }
}

/// A frame without any measurements.
pub fn deployment_frame() -> DeploymentFrame {
    let key = EndpointKey::new(&"iris".parse().unwrap());
    DeploymentFrame::new(key, "blue".parse().unwrap(), uid(), Role::LIVE)
}

/// Evaluates a policy every second on what gateways send.
pub struct Scaler {
    policy: Policy,
    measures: Measures,
    carried: CarriedState,
    second: i64,
}

impl Scaler {
    pub fn new(document: &Value, instances: u32) -> Self {
        let policy = compile(&spec(document)).unwrap();
        let mut measures = Measures::new(START);
        measures.watch(uid(), policy.signals(), START);
        let period = policy.spec().initialization_period;
        measures.set_initialization_period(uid(), period, START);
        Self {
            policy,
            measures,
            carried: CarriedState {
                granted: Some(instances),
                ..CarriedState::default()
            },
            second: START.secs(),
        }
    }

    pub fn receive(&mut self, kind: SourceKind, sent: Vec<DeploymentFrame>) {
        let frame = Frame {
            source: Source {
                kind,
                id: "one".into(),
            },
            boot: Uuid::nil(),
            sequence: (self.second - START.secs()) as u64,
            bucket: Bucket(3),
            start: Timestamp::from_secs(self.second),
            length_us: 1_000_000,
            routes: Default::default(),
            members: Default::default(),
            hello: None,
            goodbye: false,
            deployments: sent,
        };
        self.measures.frame(self.end(), &frame);
    }

    fn end(&self) -> Timestamp {
        Timestamp::from_secs(self.second + 1) + Span::from_millis(5)
    }

    /// The count granted last.
    pub fn granted(&self) -> u32 {
        self.carried.granted.unwrap_or(0)
    }

    /// Continues from another count.
    pub fn set_granted(&mut self, count: u32) {
        self.carried.granted = Some(count);
    }

    /// Like [`decide`](Self::decide), without the explanation.
    pub fn step(&mut self, ready: u32) -> u32 {
        self.evaluate(ready, |_, evaluation| evaluation.granted)
    }

    /// Decides at the end of a second, and moves to the next.
    pub fn decide(&mut self, ready: u32) -> Decision {
        let policy = self.policy.clone();
        let now = self.end();
        self.evaluate(ready, |tick, _| {
            explain(&deployment(), uid(), Some(&policy), tick, now)
        })
    }

    fn evaluate<T>(
        &mut self,
        ready: u32,
        result: impl FnOnce(&TickInputs<'_>, Evaluation) -> T,
    ) -> T {
        let now = self.end();
        self.second += 1;
        let options = SignalOptions::default();
        let specs = self.policy.signals();
        let signals = self.measures.signals(uid(), specs, options, now);
        let count = self.granted();
        let tick = TickInputs {
            pinned_by: None,
            failed_starts: None,
            starts_at_default: false,
            policy_revision: 1,
            fixed_instances: 1,
            pin: None,
            pause: Pause::default(),
            instances: InstanceCounts {
                ready,
                pending: count.saturating_sub(ready),
            },
            signals: &signals,
            carried: &self.carried,
            selection: None,
        };
        let evaluation = evaluate(Some(&self.policy), &tick, now);
        let result = result(&tick, evaluation);
        carry(&mut self.carried, Some(&self.policy), &evaluation, now);
        result
    }
}
