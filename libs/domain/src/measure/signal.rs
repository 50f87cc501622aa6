//! Aggregates over windows of panes. Floats are used here and nowhere before: each is one division
//! of integers, and sums of them run in time order.

use std::collections::BTreeMap;

use contract::decision::{Signal, Unmeasured};
use contract::frame::SourceKind;
use contract::histogram::Histogram;
use contract::ids::Uid;
use contract::time::Timestamp;

use super::group::Group;
use super::pane::{Coverage, Load, Merge, STALE_AFTER_SECONDS, step_of};
use super::row::Computation;
use super::spec::{Aggregation, SignalSpec};
use super::{AHEAD_MAX, SignalOptions};

/// Refusals are counted over at most this window: older ones say nothing about the capacity now.
const REFUSALS_WINDOW_MAX_SECONDS: i64 = 120;

/// Latencies of complete windows, shared by the quantiles that one policy reads.
pub(super) type LatencyCache = BTreeMap<(SourceKind, i64, i64), Histogram>;

pub(super) fn compute(
    group: &Group,
    deployment: Uid,
    spec: &SignalSpec,
    options: SignalOptions,
    now: Timestamp,
    latencies: &mut LatencyCache,
) -> Signal {
    let window = i64::from(spec.window_seconds());
    let end = window_end(group, now);
    let from = end - window;
    let zero = Load::default();
    let rings = group.load(deployment);
    let loads: BTreeMap<i64, &Load> = rings
        .map(|rings| rings.between(window, from, end).collect())
        .unwrap_or_default();
    let since = group.complete_since(deployment, window);
    // Only covered panes count: a second without any frame means nothing, not zero. Neither does one whose load is
    // unknown.
    let mut panes: Vec<(i64, Coverage, &Load)> = group
        .coverage()
        .between(window, from.max(since), end)
        .map(|(start, coverage)| (start, *coverage, *loads.get(&start).unwrap_or(&&zero)))
        .collect();
    add_before_creation(&mut panes, group, deployment, (window, from, end), &zero);
    let seconds: u32 = panes.iter().map(|(_, coverage, _)| coverage.seconds).sum();
    let wanted = spec.window_seconds();
    let row = spec.metric.row();
    let unmeasured = match seconds {
        0 => None,
        _ => unmeasured(row.computation, &panes),
    };
    let value = match (row.computation, spec.aggregation) {
        _ if seconds == 0 => None,
        (Computation::Latencies(_), _) if unmeasured.is_some() => oldest_in_flight_ms(&panes),
        (Computation::Share(_), _) if unmeasured.is_some() && !has_ended(&panes) => None,
        (Computation::Latencies(of), Aggregation::Average) => {
            let latency = latencies
                .entry((row.source.clone(), from, end))
                .or_insert_with(|| {
                    let mut whole = Histogram::default();
                    panes
                        .iter()
                        .for_each(|(_, _, load)| whole.merge(&load.latency));
                    whole
                });
            Some(of(latency).unwrap_or(0.0))
        }
        _ => aggregate(spec, options, &panes),
    };
    let instances = match row.computation {
        Computation::Instances { measured, .. } if value.is_some() => {
            let (coverage, load) = sum(&panes);
            measured(&coverage, &load)
        }
        _ => None,
    };
    Signal {
        value,
        seconds_covered: seconds.min(wanted),
        seconds_wanted: wanted,
        partial: panes
            .iter()
            .any(|(_, coverage, _)| coverage.partial_seconds > 0),
        warming: from.max(group.first_whole(deployment)) < since,
        refused: 0,
        outdated: panes
            .iter()
            .filter_map(|(_, _, load)| load.definitions)
            .any(|definitions| definitions < row.definitions)
            || (instances.is_some() && from < group.initialization_from(deployment)),
        unmeasured,
        instances,
        answered: None,
        complete_at: None,
    }
}

/// Adds the unmeasured seconds before the deployment existed, in which it had no load, if anything was measured:
/// silence alone is no evidence.
fn add_before_creation<'a>(
    panes: &mut Vec<(i64, Coverage, &'a Load)>,
    group: &Group,
    deployment: Uid,
    (window, from, end): (i64, i64, i64),
    zero: &'a Load,
) {
    let step = step_of(window);
    let first = from - from.rem_euclid(step);
    let lacking = |start, end| group.unmeasured_before_creation(deployment, window, (start, end));
    let is_measured = panes.iter().any(|(_, coverage, _)| coverage.seconds > 0);
    if !is_measured || lacking(first, end) == 0 {
        return;
    }
    for start in (first..end).step_by(usize::try_from(step).unwrap_or(1)) {
        let seconds = u32::try_from(lacking(start, (start + step).min(end))).unwrap_or(0);
        if seconds == 0 {
            continue;
        }
        let known = Coverage {
            seconds,
            length_us: u64::from(seconds) * 1_000_000,
            partial_seconds: 0,
        };
        match panes.binary_search_by_key(&start, |(start, ..)| *start) {
            Ok(at) => panes[at].1.merge(&known),
            Err(at) => panes.insert(at, (start, known, zero)),
        }
    }
}

/// When the window of a signal that lacks something will be complete, if nothing is lacking from now on.
pub(super) fn complete_at(
    group: &Group,
    deployment: Uid,
    spec: &SignalSpec,
    now: Timestamp,
) -> Option<Timestamp> {
    let window = i64::from(spec.window_seconds());
    let step = step_of(window);
    let row = spec.metric.row();
    let end = window_end(group, now);
    let from = end - window;
    let coverage: BTreeMap<i64, &Coverage> = group.coverage().between(window, from, end).collect();
    let is_whole = |start: i64| {
        let pane_end = (start + step).min(end);
        let known = group.unmeasured_before_creation(deployment, window, (start, pane_end));
        let measured = coverage.get(&start).map_or((0, 0), |coverage| {
            (i64::from(coverage.seconds), coverage.partial_seconds)
        });
        measured.1 == 0 && measured.0 + known >= pane_end - start
    };
    let first = from - from.rem_euclid(step);
    let starts = (first..end).step_by(usize::try_from(step).unwrap_or(1));
    let lacking = starts.filter(|start| !is_whole(*start)).last();
    let rings = group.load(deployment);
    let outdated = rings.and_then(|rings| {
        let outdated = |load: &Load| load.definitions.is_some_and(|of| of < row.definitions);
        let panes = rings.between(window, from, end);
        panes
            .filter(|(_, load)| outdated(load))
            .map(|(start, _)| start)
            .last()
    });
    let complete_since = group.complete_since(deployment, window);
    let unknown_before = match complete_since <= group.first_whole(deployment) {
        true => i64::MIN,
        false => complete_since,
    };
    let initialized = match row.computation {
        Computation::Instances { .. } => group.initialization_from(deployment),
        _ => i64::MIN,
    };
    let lasts = [lacking, outdated].into_iter().flatten();
    let ends = lasts.map(|start| start + step);
    ends.chain([unknown_before, initialized])
        .filter(|until| *until > from)
        .max()
        .map(|until| Timestamp::from_secs(until + window))
}

/// The first second that a signal of this window may need.
pub(super) fn first_needed(window: i64, now: Timestamp) -> i64 {
    let step = step_of(window);
    let from = now.secs() - STALE_AFTER_SECONDS - window;
    from - from.rem_euclid(step)
}

/// The requests to the deployment that the model answered, over the window of a signal.
pub(super) fn answered(
    gateways: &Group,
    deployment: Uid,
    spec: &SignalSpec,
    now: Timestamp,
) -> u64 {
    let Some(rings) = gateways.load(deployment) else {
        return 0;
    };
    let window = i64::from(spec.window_seconds());
    let end = window_end(gateways, now);
    rings
        .between(window, end - window, end)
        .map(|(_, load)| load.outcomes.answered())
        .sum()
}

/// The requests to the deployment that gateways refused for lack of capacity, over the window of a
/// signal.
pub(super) fn refused(gateways: &Group, deployment: Uid, spec: &SignalSpec, now: Timestamp) -> u64 {
    let Some(rings) = gateways.load(deployment) else {
        return 0;
    };
    let window = i64::from(spec.window_seconds()).min(REFUSALS_WINDOW_MAX_SECONDS);
    let end = window_end(gateways, now);
    rings
        .between(window, end - window, end)
        .map(|(_, load)| load.outcomes.refused_for_capacity())
        .sum()
}

/// Why the panes give the metric no value although there is a report.
fn unmeasured(computation: Computation, panes: &[(i64, Coverage, &Load)]) -> Option<Unmeasured> {
    let has_traffic = || panes.iter().any(|(_, _, load)| load.has_traffic());
    let is_answered = |load: &Load| match computation {
        Computation::Counts(_) | Computation::Instances { .. } => true,
        Computation::Share(_) => load.outcomes.answered() > 0,
        Computation::Latencies(_) => !load.latency.is_empty(),
    };
    if let Computation::Instances { average, .. } = computation {
        let is_measured = panes.iter().any(|(_, _, load)| average(load).is_some());
        return (!is_measured && !panes.is_empty()).then_some(Unmeasured::NoInstance);
    }
    let is_unanswered = match computation {
        Computation::Counts(_) => false,
        _ => !panes.iter().any(|(_, _, load)| is_answered(load)) && has_traffic(),
    };
    is_unanswered.then_some(Unmeasured::Unanswered)
}

/// Whether any request ended that counts.
fn has_ended(panes: &[(i64, Coverage, &Load)]) -> bool {
    panes.iter().any(|(_, _, load)| load.outcomes.counted() > 0)
}

/// The highest age that a request reached without an answer, in milliseconds: its latency is going to be
/// higher.
fn oldest_in_flight_ms(panes: &[(i64, Coverage, &Load)]) -> Option<f64> {
    let ages = panes.iter().map(|(_, _, load)| load.oldest_in_flight_us);
    let oldest_us = ages.max().filter(|oldest_us| *oldest_us > 0)?;
    Some(oldest_us as f64 / 1000.0)
}

/// The second after the window.
fn window_end(group: &Group, now: Timestamp) -> i64 {
    let stale = now.secs() - STALE_AFTER_SECONDS;
    match group.closed() {
        // A source whose clock is ahead may have closed a second that has not started here.
        Some(closed) => (closed + 1).clamp(stale, now.secs() + AHEAD_MAX.secs() as i64 + 1),
        None => stale,
    }
}

/// The window as one period, without its latencies.
fn sum(panes: &[(i64, Coverage, &Load)]) -> (Coverage, Load) {
    let mut coverage = Coverage::default();
    let mut load = Load::default();
    for (_, part, of) in panes {
        coverage.seconds += part.seconds;
        coverage.length_us += part.length_us;
        load.merge_numbers(of);
    }
    (coverage, load)
}

fn aggregate(
    spec: &SignalSpec,
    options: SignalOptions,
    panes: &[(i64, Coverage, &Load)],
) -> Option<f64> {
    if spec.aggregation == Aggregation::Average {
        let (coverage, load) = sum(panes);
        return value_of(spec.metric.row().computation, options, &coverage, &load);
    }
    let values: Vec<(u32, f64)> = panes
        .iter()
        .filter(|(_, coverage, _)| coverage.seconds > 0)
        .filter_map(|(_, coverage, load)| {
            value_of(spec.metric.row().computation, options, coverage, load)
                .map(|value| (coverage.seconds, value))
        })
        .collect();
    match spec.aggregation {
        Aggregation::Average => None,
        Aggregation::Min => values.iter().map(|(_, value)| *value).reduce(f64::min),
        Aggregation::Max => values.iter().map(|(_, value)| *value).reduce(f64::max),
        Aggregation::Last => values.last().map(|(_, value)| *value),
        Aggregation::Count => Some(values.iter().map(|(seconds, _)| f64::from(*seconds)).sum()),
        Aggregation::Sum => (!values.is_empty()).then(|| {
            values
                .iter()
                .map(|(seconds, value)| f64::from(*seconds) * value)
                .sum()
        }),
        Aggregation::Quantile(per_10000) => quantile(values, per_10000),
    }
}

/// The smallest value such that at least the given share of seconds is at or below it.
fn quantile(mut values: Vec<(u32, f64)>, per_10000: u32) -> Option<f64> {
    values.sort_by(|(_, a), (_, b)| a.total_cmp(b));
    let seconds: u64 = values.iter().map(|(seconds, _)| u64::from(*seconds)).sum();
    let rank = (seconds * u64::from(per_10000)).div_ceil(10_000).max(1);
    let mut seen = 0;
    for (seconds, value) in values {
        seen += u64::from(seconds);
        if seen >= rank {
            return Some(value);
        }
    }
    None
}

/// The metric over one period; `None` if it has no value there.
fn value_of(
    computation: Computation,
    options: SignalOptions,
    coverage: &Coverage,
    load: &Load,
) -> Option<f64> {
    match computation {
        Computation::Counts(of) => of(coverage, load, options),
        Computation::Instances { average, .. } => average(load),
        Computation::Share(of) => match load.outcomes.counted() {
            0 => (!load.has_traffic()).then_some(0.0),
            counted => Some(of(&load.outcomes, options) as f64 / counted as f64),
        },
        Computation::Latencies(of) => {
            of(&load.latency).or_else(|| (!load.has_traffic()).then_some(0.0))
        }
    }
}
