//! Compiles a document into a policy, or into everything that is wrong with it.

use std::collections::BTreeSet;
use std::sync::Arc;

use contract::problem::Finding;
use contract::resources::{
    AutoscaleSpec, Capacity, Direction, INSTANCES_MAX, ProfileSpec, RuleSpec, ScaleSpec, StepSpec,
    TrackSpec,
};
use contract::time::Span;

use super::super::condition::{Amount, Condition, parse_tolerance, value_of};
use super::super::schedule::Schedule;
use super::{
    Action, COOLDOWN_MAX, INITIALIZATION_MAX, LABEL_LENGTH_MAX, PROFILES_MAX, Policy, Profile,
    RULES_MAX, Rule, RuleKind, STABILIZATION_MAX, STEPS_MAX, ScaleStep,
};
use crate::measure::{Aggregation, Metric, MetricRow, SignalSpec, WINDOW_MAX};
use crate::zones::ZoneData;

/// Windows up to this length are kept by the second, up to the next one by ten seconds, longer ones
/// by the minute.
const BY_SECOND_MAX: Span = Span::from_secs(120);
const BY_TEN_MAX: Span = Span::from_secs(1800);

pub(super) struct Compiler<'a> {
    pub findings: Vec<Finding>,
    signals: Vec<SignalSpec>,
    metrics: &'static [MetricRow],
    zones: &'a ZoneData,
}

impl<'a> Compiler<'a> {
    pub fn new(metrics: &'static [MetricRow], zones: &'a ZoneData) -> Self {
        Self {
            findings: Vec::new(),
            signals: Vec::new(),
            metrics,
            zones,
        }
    }
}

impl Compiler<'_> {
    fn refuse(&mut self, pointer: impl Into<String>, detail: impl Into<String>) {
        self.findings.push(Finding::new(pointer, detail));
    }

    pub fn policy(&mut self, spec: &AutoscaleSpec) -> Option<Policy> {
        for (field, span, max) in [
            ("cooldown/out", spec.cooldown.out, COOLDOWN_MAX),
            ("cooldown/in", spec.cooldown.scale_in, COOLDOWN_MAX),
            (
                "stabilization/out",
                spec.stabilization.out,
                STABILIZATION_MAX,
            ),
            (
                "stabilization/in",
                spec.stabilization.scale_in,
                STABILIZATION_MAX,
            ),
            (
                "initializationPeriod",
                spec.initialization_period,
                INITIALIZATION_MAX,
            ),
        ] {
            self.check_max(format!("/spec/{field}"), span, max);
        }
        let default = self.default_profile(spec);
        self.check_names(
            spec.profiles.iter().map(|profile| profile.name.as_str()),
            "/spec/profiles",
            "profile",
        );
        let mut compiled: Vec<(usize, Profile, bool)> = Vec::new();
        for (index, profile) in spec.profiles.iter().enumerate().take(PROFILES_MAX) {
            let pointer = format!("/spec/profiles/{index}");
            if let Some(result) = self.profile(spec, profile, &pointer) {
                compiled.push((index, result, profile.rules.is_some()));
            }
        }
        let default = default?;
        let of_default = compiled
            .iter()
            .find(|(index, ..)| *index == default)
            .map(|(_, profile, _)| Arc::clone(&profile.rules))?;
        let profiles = compiled
            .into_iter()
            .map(|(_, mut profile, has_rules)| {
                if !has_rules {
                    profile.rules = Arc::clone(&of_default);
                }
                profile
            })
            .collect();
        Some(Policy {
            spec: Arc::new(spec.clone()),
            mode: spec.mode,
            missing: spec.missing,
            stabilize_out: spec.stabilization.out,
            stabilize_in: spec.stabilization.scale_in,
            profiles,
            default,
            signal_keys: self.signals.iter().map(SignalSpec::key).collect(),
            signals: std::mem::take(&mut self.signals),
            zone_data: spec
                .profiles
                .iter()
                .any(|profile| profile.schedule.is_some())
                .then(|| self.zones.version().to_owned()),
        })
    }

    fn check_max(&mut self, pointer: String, span: Span, max: Span) {
        if span > max {
            self.refuse(pointer, format!("{span} is too long: write at most {max}"));
        }
    }

    /// Finds the default profile: the only one without a schedule.
    fn default_profile(&mut self, spec: &AutoscaleSpec) -> Option<usize> {
        if spec.profiles.len() > PROFILES_MAX {
            let detail = format!(
                "there are {} profiles; at most {PROFILES_MAX} are allowed: merge some",
                spec.profiles.len()
            );
            self.refuse("/spec/profiles", detail);
        }
        let mut unscheduled =
            (0..spec.profiles.len()).filter(|index| spec.profiles[*index].schedule.is_none());
        let Some(default) = unscheduled.next() else {
            let detail = "there is no default profile: add one without a schedule, for the time when no schedule holds";
            self.refuse("/spec/profiles", detail);
            return None;
        };
        for index in unscheduled {
            let detail = format!(
                "`{}` is the default profile already: give this one a schedule or remove it",
                spec.profiles[default].name
            );
            self.refuse(format!("/spec/profiles/{index}/schedule"), detail);
        }
        Some(default)
    }

    /// Checks that names are present, short and unique.
    fn check_names<'a>(&mut self, names: impl Iterator<Item = &'a str>, list: &str, what: &str) {
        let mut seen = BTreeSet::new();
        for (index, name) in names.enumerate() {
            let pointer = format!("{list}/{index}/name");
            let has_control = name.chars().any(char::is_control);
            if name.trim().is_empty() || name.len() > LABEL_LENGTH_MAX || has_control {
                let detail = format!(
                    "`{}` cannot name a {what}: write 1 to {LABEL_LENGTH_MAX} bytes of text without control characters",
                    name.escape_debug()
                );
                self.refuse(pointer, detail);
            } else if !seen.insert(name) {
                let detail =
                    format!("another {what} is called `{name}` already: choose another name");
                self.refuse(pointer, detail);
            }
        }
    }

    fn profile(
        &mut self,
        spec: &AutoscaleSpec,
        profile: &ProfileSpec,
        pointer: &str,
    ) -> Option<Profile> {
        self.check_capacity(profile.capacity, &format!("{pointer}/capacity"));
        let schedule = match &profile.schedule {
            None => None,
            Some(schedule) => {
                match Schedule::compile(schedule, self.zones, &format!("{pointer}/schedule")) {
                    Ok(schedule) => Some(schedule),
                    Err(findings) => {
                        self.findings.extend(findings);
                        None
                    }
                }
            }
        };
        let rules = profile.rules.as_deref().unwrap_or_default();
        if rules.len() > RULES_MAX {
            let detail = format!(
                "there are {} rules; at most {RULES_MAX} are allowed in a profile",
                rules.len()
            );
            self.refuse(format!("{pointer}/rules"), detail);
        }
        let names = rules.iter().map(|rule| rule.name.as_str());
        self.check_names(names, &format!("{pointer}/rules"), "rule");
        let mut compiled = Vec::new();
        for (index, rule) in rules.iter().enumerate().take(RULES_MAX) {
            compiled.extend(self.rule(spec, rule, &format!("{pointer}/rules/{index}")));
        }
        Some(Profile {
            name: profile.name.clone(),
            schedule,
            priority: profile.priority,
            capacity: profile.capacity,
            rules: compiled.into(),
        })
    }

    fn check_capacity(&mut self, capacity: Capacity, pointer: &str) {
        let Capacity { min, max, default } = capacity;
        if max > INSTANCES_MAX {
            let detail =
                format!("{max} is more than {INSTANCES_MAX}, the most that a deployment may have");
            self.refuse(format!("{pointer}/max"), detail);
        }
        if max == 0 {
            let detail =
                "a maximum of 0 would never serve: write at least 1, or pin the deployment to 0";
            self.refuse(format!("{pointer}/max"), detail);
        }
        if min > max {
            let detail = format!(
                "the minimum {min} is above the maximum {max}: lower one or raise the other"
            );
            self.refuse(format!("{pointer}/min"), detail);
        } else if !(min..=max).contains(&default) {
            let detail = format!(
                "the default {default} lies outside of {min} to {max}: write a count between"
            );
            self.refuse(format!("{pointer}/default"), detail);
        }
    }

    fn rule(&mut self, spec: &AutoscaleSpec, rule: &RuleSpec, pointer: &str) -> Option<Rule> {
        let signal = self.signal(rule, &format!("{pointer}/metric"));
        let metric = signal.map(|(metric, _)| metric);
        let mut cooldown_out = spec.cooldown.out;
        let mut cooldown_in = spec.cooldown.scale_in;
        let kind = match (&rule.track, &rule.scale) {
            (Some(track), None) => {
                if rule.when.is_some() {
                    let detail = "a rule that tracks a target has no condition: remove `when`, or write `scale` instead of `track`";
                    self.refuse(format!("{pointer}/when"), detail);
                }
                self.track(metric, track, &format!("{pointer}/track"))
            }
            (None, Some(scale)) => {
                if let Some(cooldown) = scale.cooldown {
                    self.check_max(format!("{pointer}/scale/cooldown"), cooldown, COOLDOWN_MAX);
                    cooldown_out = cooldown;
                    cooldown_in = cooldown;
                }
                self.threshold(metric, rule.when.as_deref(), scale, pointer)
            }
            (Some(_), Some(_)) => {
                let detail = "a rule either scales on a condition or tracks a target: remove `scale` or `track`";
                self.refuse(format!("{pointer}/track"), detail);
                None
            }
            (None, None) => {
                let detail = "the rule does nothing: write `when` and `scale`, or `track`";
                self.refuse(pointer, detail);
                None
            }
        };
        let ((metric, signal), kind) = (signal?, kind?);
        let per_instance = metric.is_per_instance() && rule.metric.per_instance;
        let tracks = matches!(kind, RuleKind::Track { .. });
        Some(Rule {
            name: rule.name.clone(),
            metric,
            signal,
            per_instance: per_instance || (tracks && metric.is_per_instance()),
            scales: per_instance || tracks || !metric.is_total(),
            kind,
            cooldown_out,
            cooldown_in,
        })
    }

    /// The metric, and the index of its signal in the policy.
    fn signal(&mut self, rule: &RuleSpec, pointer: &str) -> Option<(Metric, usize)> {
        let metric = Metric::parse_among(self.metrics, &rule.metric.name)
            .map_err(|error| self.refuse(format!("{pointer}/name"), error.to_string()))
            .ok();
        let aggregation = Aggregation::parse(&rule.metric.aggregation)
            .map_err(|error| self.refuse(format!("{pointer}/aggregation"), error.to_string()))
            .ok();
        let window = self.window(rule.metric.window, &format!("{pointer}/window"));
        let (metric, aggregation, window) = (metric?, aggregation?, window?);
        if metric.is_latency() && matches!(aggregation, Aggregation::Sum | Aggregation::Count) {
            let detail = format!(
                "{} cannot be summed or counted: leave the aggregation out to measure it over the whole window",
                metric.name()
            );
            self.refuse(format!("{pointer}/aggregation"), detail);
            return None;
        }
        let spec = SignalSpec {
            metric,
            window,
            aggregation,
        };
        let existing = self.signals.iter().position(|signal| *signal == spec);
        let index = existing.unwrap_or_else(|| {
            self.signals.push(spec);
            self.signals.len() - 1
        });
        Some((metric, index))
    }

    fn window(&mut self, window: Span, pointer: &str) -> Option<Span> {
        let step = match window {
            window if window <= BY_SECOND_MAX => Span::from_secs(1),
            window if window <= BY_TEN_MAX => Span::from_secs(10),
            _ => Span::from_secs(60),
        };
        let detail = if window < Span::from_secs(1) {
            format!(
                "a window of {window} is too short: measurements are taken each second, so write at least 1s"
            )
        } else if window > WINDOW_MAX {
            format!("a window of {window} is too long: write at most {WINDOW_MAX}")
        } else if !window.millis().is_multiple_of(step.millis()) {
            format!(
                "a window of {window} does not fit: write whole seconds up to {BY_SECOND_MAX}, multiples of 10s up to {BY_TEN_MAX}, and multiples of 1m beyond"
            )
        } else {
            return Some(window);
        };
        self.refuse(pointer, detail);
        None
    }

    fn track(
        &mut self,
        metric: Option<Metric>,
        track: &TrackSpec,
        pointer: &str,
    ) -> Option<RuleKind> {
        let tolerance = parse_tolerance(&track.tolerance)
            .map_err(|detail| self.refuse(format!("{pointer}/tolerance"), detail))
            .ok();
        let target = value_of(metric?, &track.target)
            .map_err(|detail| self.refuse(format!("{pointer}/target"), detail))
            .ok()?;
        if target == 0.0 {
            let detail = "a target of 0 can never be met: write how much one instance should carry";
            self.refuse(format!("{pointer}/target"), detail);
            return None;
        }
        Some(RuleKind::Track {
            target,
            tolerance: tolerance?,
        })
    }

    fn threshold(
        &mut self,
        metric: Option<Metric>,
        when: Option<&str>,
        scale: &ScaleSpec,
        pointer: &str,
    ) -> Option<RuleKind> {
        let action = self.action(metric, scale, &format!("{pointer}/scale"));
        let condition = match (when, metric) {
            (Some(text), Some(metric)) => Some(
                Condition::parse(metric, text)
                    .map_err(|detail| self.refuse(format!("{pointer}/when"), detail))
                    .ok()?,
            ),
            (Some(_), None) => None,
            (None, _) if scale.steps.is_some() => None,
            (None, _) => {
                let detail = "the rule has no condition: write when it holds, such as \"> 4\"";
                self.refuse(format!("{pointer}/when"), detail);
                return None;
            }
        };
        Some(RuleKind::Threshold {
            condition,
            direction: scale.direction,
            action: action?,
        })
    }

    fn action(
        &mut self,
        metric: Option<Metric>,
        scale: &ScaleSpec,
        pointer: &str,
    ) -> Option<Action> {
        match (&scale.by, scale.to, &scale.steps) {
            (Some(by), None, None) => Amount::parse(by, INSTANCES_MAX)
                .map(Action::By)
                .map_err(|detail| self.refuse(format!("{pointer}/by"), detail))
                .ok(),
            (None, Some(to), None) if to <= INSTANCES_MAX => Some(Action::To(to)),
            (None, Some(to), None) => {
                let detail = format!(
                    "{to} is more than {INSTANCES_MAX}, the most that a deployment may have"
                );
                self.refuse(format!("{pointer}/to"), detail);
                None
            }
            (None, None, Some(steps)) => {
                self.steps(metric, scale.direction, steps, &format!("{pointer}/steps"))
            }
            (None, None, None) => {
                self.refuse(
                    pointer,
                    "the rule says not by how much: write one of by, to or steps",
                );
                None
            }
            _ => {
                self.refuse(
                    pointer,
                    "the rule says several amounts: keep one of by, to and steps",
                );
                None
            }
        }
    }

    fn steps(
        &mut self,
        metric: Option<Metric>,
        direction: Direction,
        specs: &[StepSpec],
        pointer: &str,
    ) -> Option<Action> {
        if specs.is_empty() || specs.len() > STEPS_MAX {
            self.refuse(
                pointer,
                format!("there are {} steps: write 1 to {STEPS_MAX}", specs.len()),
            );
            return None;
        }
        let mut steps = Vec::new();
        for (index, spec) in specs.iter().enumerate() {
            steps.extend(self.step(metric, direction, spec, &format!("{pointer}/{index}")));
        }
        if steps.len() != specs.len() {
            return None;
        }
        match direction {
            Direction::Out => steps.sort_by(|a, b| a.bound.total_cmp(&b.bound)),
            Direction::In => steps.sort_by(|a, b| b.bound.total_cmp(&a.bound)),
        }
        if steps.windows(2).any(|pair| pair[0].bound == pair[1].bound) {
            self.refuse(
                pointer,
                "two steps begin at the same value: remove one of them",
            );
            return None;
        }
        Some(Action::Steps(steps))
    }

    fn step(
        &mut self,
        metric: Option<Metric>,
        direction: Direction,
        spec: &StepSpec,
        pointer: &str,
    ) -> Option<ScaleStep> {
        let by = Amount::parse(&spec.by, INSTANCES_MAX)
            .map_err(|detail| self.refuse(format!("{pointer}/by"), detail))
            .ok();
        let (field, bound, other) = match direction {
            Direction::Out => ("above", &spec.above, &spec.below),
            Direction::In => ("below", &spec.below, &spec.above),
        };
        if other.is_some() {
            let detail = match direction {
                Direction::Out => {
                    "a step of a rule that scales out begins `above` a value: replace `below`"
                }
                Direction::In => {
                    "a step of a rule that scales in begins `below` a value: replace `above`"
                }
            };
            self.refuse(pointer, detail);
            return None;
        }
        let Some(bound) = bound else {
            self.refuse(pointer, format!("the step has no bound: write `{field}`"));
            return None;
        };
        let bound = value_of(metric?, bound)
            .map_err(|detail| self.refuse(format!("{pointer}/{field}"), detail))
            .ok()?;
        Some(ScaleStep { bound, by: by? })
    }
}
