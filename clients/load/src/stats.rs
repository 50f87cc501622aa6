//! Counts the results of requests. Invariant: every request that was sent is counted once, as good
//! or as one kind of error, in its own second. Latency is recorded for all of them, including
//! errors, because a client waits for those as well.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::sender::{CompletedRequest, RequestFailure};

/// Percentiles are accurate to three digits, up to an hour.
const MICROS_MAX: u64 = 3_600_000_000;
/// A request sent later than this was not on schedule.
const LATE_THRESHOLD: Duration = Duration::from_millis(10);
/// Maximum length of the timeline in seconds (a week), to bound memory.
const TIMELINE_SECONDS_MAX: usize = 7 * 24 * 3600;

pub struct LoadStats {
    pub sent: u64,
    pub ok: u64,
    errors: BTreeMap<String, u64>,
    deployments: BTreeMap<String, u64>,
    latency: Histogram<u64>,
    service: Histogram<u64>,
    late: LateCounts,
    timeline: Vec<TimelineSecond>,
    recent: RecentStats,
}

/// Results since the last progress line.
pub struct RecentStats {
    pub completed: u64,
    pub latency: Histogram<u64>,
}

/// Requests sent later than they were due.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LateCounts {
    /// Because all connections were in use.
    pub connections_taken: u64,
    /// Because the generator itself fell behind.
    pub generator_behind: u64,
}

/// One second of the run, by when requests were due.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TimelineSecond {
    pub second: u64,
    pub sent: u64,
    pub ok: u64,
    pub latency_max_us: u64,
    /// Ready instances by deployment, if they were sampled.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub instances: BTreeMap<String, u32>,
}

/// Percentiles in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Percentiles {
    pub mean_us: f64,
    pub p50_us: u64,
    pub p90_us: u64,
    pub p99_us: u64,
    pub p999_us: u64,
    pub max_us: u64,
}

/// All results, for people and programs.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Totals {
    pub sent: u64,
    pub ok: u64,
    pub errors: u64,
    /// By status and `penstock-error-code`, or by what went wrong if there was no response.
    pub errors_by_kind: BTreeMap<String, u64>,
    /// Requests by the deployment that responded.
    pub deployments: BTreeMap<String, u64>,
    /// From when each request was due.
    pub latency: Percentiles,
    /// From when each request was sent.
    pub service_time: Percentiles,
    pub late: LateCounts,
    /// Sum of the sampled instances over the seconds; `None` if there were no samples.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance_seconds: Option<u64>,
    pub timeline: Vec<TimelineSecond>,
}

impl LoadStats {
    pub fn new() -> Self {
        Self {
            sent: 0,
            ok: 0,
            errors: BTreeMap::new(),
            deployments: BTreeMap::new(),
            latency: histogram(),
            service: histogram(),
            late: LateCounts::default(),
            timeline: Vec::new(),
            recent: RecentStats {
                completed: 0,
                latency: histogram(),
            },
        }
    }

    pub fn record(&mut self, completed: &CompletedRequest) {
        let latency_us = micros(completed.latency);
        self.sent += 1;
        // Values above the maximum saturate: they are still the worst ones.
        self.latency.saturating_record(latency_us);
        self.service.saturating_record(micros(completed.service));
        self.recent.completed += 1;
        self.recent.latency.saturating_record(latency_us);
        if completed.lag > LATE_THRESHOLD {
            let late = match completed.queued {
                true => &mut self.late.connections_taken,
                false => &mut self.late.generator_behind,
            };
            *late += 1;
        }
        if let Ok(response) = &completed.result
            && let Some(deployment) = &response.deployment
        {
            *self.deployments.entry(deployment.clone()).or_default() += 1;
        }

        let error = error_kind(completed);
        if let Some(second) = self.second(completed.due.as_secs()) {
            second.sent += 1;
            second.ok += u64::from(error.is_none());
            second.latency_max_us = second.latency_max_us.max(latency_us);
        }
        match error {
            None => self.ok += 1,
            Some(kind) => *self.errors.entry(kind).or_default() += 1,
        }
    }

    /// Records the instances ready in a second, by deployment.
    pub fn sample(&mut self, second: u64, instances: BTreeMap<String, u32>) {
        if let Some(entry) = self.second(second) {
            entry.instances = instances;
        }
    }

    pub fn errors(&self) -> u64 {
        self.sent - self.ok
    }

    pub fn instances_now(&self) -> Option<u32> {
        let last = self.timeline.iter().rev().take(3);
        let sampled = last.map(|second| &second.instances);
        sampled
            .filter(|instances| !instances.is_empty())
            .map(|instances| instances.values().sum())
            .next()
    }

    /// Takes the results since the last call.
    pub fn take_recent(&mut self) -> RecentStats {
        let empty = RecentStats {
            completed: 0,
            latency: histogram(),
        };
        std::mem::replace(&mut self.recent, empty)
    }

    pub fn totals(self) -> Totals {
        let instance_seconds = self
            .timeline
            .iter()
            .flat_map(|second| second.instances.values())
            .map(|count| u64::from(*count))
            .reduce(|sum, count| sum + count);
        Totals {
            sent: self.sent,
            ok: self.ok,
            errors: self.errors(),
            errors_by_kind: self.errors,
            deployments: self.deployments,
            latency: percentiles(&self.latency),
            service_time: percentiles(&self.service),
            late: self.late,
            instance_seconds,
            timeline: self.timeline,
        }
    }

    fn second(&mut self, second: u64) -> Option<&mut TimelineSecond> {
        let index = usize::try_from(second).ok()?;
        if index >= TIMELINE_SECONDS_MAX {
            return None;
        }
        while self.timeline.len() <= index {
            self.timeline.push(TimelineSecond {
                second: self.timeline.len() as u64,
                ..TimelineSecond::default()
            });
        }
        self.timeline.get_mut(index)
    }
}

/// Returns `None` for a model's 2xx or 3xx response.
fn error_kind(completed: &CompletedRequest) -> Option<String> {
    match &completed.result {
        Ok(response) if (200..400).contains(&response.status) => None,
        Ok(response) => Some(match &response.error_code {
            Some(code) => format!("{} {code}", response.status),
            None => response.status.to_string(),
        }),
        Err(RequestFailure::Connect(reason)) => Some(format!("no connection: {reason}")),
        Err(RequestFailure::Timeout) => Some("no answer in time".to_owned()),
        Err(RequestFailure::ClosedEarly) => Some("broken off".to_owned()),
    }
}

fn histogram() -> Histogram<u64> {
    // The library accepts these constant bounds and digits; the tests construct one.
    #[expect(clippy::unwrap_used)]
    Histogram::new_with_bounds(1, MICROS_MAX, 3).unwrap()
}

pub fn percentiles(histogram: &Histogram<u64>) -> Percentiles {
    if histogram.is_empty() {
        return Percentiles::default();
    }
    // A bucket's upper bound can exceed the maximum; the maximum itself is kept exactly.
    let max_us = histogram.max();
    let at = |quantile| histogram.value_at_quantile(quantile).min(max_us);
    Percentiles {
        mean_us: histogram.mean(),
        p50_us: at(0.5),
        p90_us: at(0.9),
        p99_us: at(0.99),
        p999_us: at(0.999),
        max_us,
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::sender::ResponseInfo;
    use super::*;

    fn completed(
        due_ms: u64,
        latency_ms: u64,
        result: Result<ResponseInfo, RequestFailure>,
    ) -> CompletedRequest {
        CompletedRequest {
            due: Duration::from_millis(due_ms),
            lag: Duration::ZERO,
            queued: false,
            latency: Duration::from_millis(latency_ms),
            service: Duration::from_millis(latency_ms / 2),
            result,
        }
    }

    fn response(
        status: u16,
        code: Option<&str>,
        deployment: Option<&str>,
    ) -> Result<ResponseInfo, RequestFailure> {
        Ok(ResponseInfo {
            status,
            error_code: code.map(str::to_owned),
            deployment: deployment.map(str::to_owned),
        })
    }

    #[test]
    fn every_request_is_counted_once_by_its_result() {
        let mut stats = LoadStats::new();
        for result in [
            response(200, None, Some("blue")),
            response(304, None, Some("green")),
            response(424, None, Some("blue")),
            response(503, Some("no-instance-ready"), None),
            response(503, Some("no-instance-ready"), None),
            response(503, Some("draining"), None),
            Err(RequestFailure::Timeout),
            Err(RequestFailure::ClosedEarly),
            Err(RequestFailure::Connect("connection refused".to_owned())),
        ] {
            stats.record(&completed(0, 1, result));
        }
        let totals = stats.totals();
        assert_eq!((totals.sent, totals.ok, totals.errors), (9, 2, 7));
        let kinds: Vec<(&str, u64)> = totals
            .errors_by_kind
            .iter()
            .map(|(kind, count)| (kind.as_str(), *count))
            .collect();
        assert_eq!(
            kinds,
            [
                ("424", 1),
                ("503 draining", 1),
                ("503 no-instance-ready", 2),
                ("broken off", 1),
                ("no answer in time", 1),
                ("no connection: connection refused", 1),
            ]
        );
        assert_eq!(totals.deployments["blue"], 2);
        assert_eq!(totals.deployments["green"], 1);
    }

    #[test]
    fn percentiles_are_those_of_all_requests() {
        let mut stats = LoadStats::new();
        for latency in 1..=1000 {
            stats.record(&completed(0, latency, response(200, None, None)));
        }
        let latency = stats.totals().latency;
        let near = |value: u64, millis: u64| value.abs_diff(millis * 1000) <= millis;
        assert!(near(latency.p50_us, 500), "{latency:?}");
        assert!(near(latency.p90_us, 900), "{latency:?}");
        assert!(near(latency.p99_us, 990), "{latency:?}");
        assert!(near(latency.p999_us, 999), "{latency:?}");
        assert!(near(latency.max_us, 1000), "{latency:?}");
    }

    #[test]
    fn a_second_contains_what_was_due_in_it() {
        let mut stats = LoadStats::new();
        stats.record(&completed(2100, 5, response(200, None, None)));
        stats.record(&completed(300, 4000, Err(RequestFailure::Timeout)));
        let timeline = stats.totals().timeline;
        let counts: Vec<(u64, u64, u64)> = timeline
            .iter()
            .map(|second| (second.second, second.sent, second.ok))
            .collect();
        assert_eq!(counts, [(0, 1, 0), (1, 0, 0), (2, 1, 1)]);
        assert_eq!(timeline[0].latency_max_us, 4_000_000);
    }

    #[test]
    fn late_requests_are_counted_by_cause() {
        let mut stats = LoadStats::new();
        for (lag_ms, queued) in [(9, true), (11, true), (11, false), (500, false)] {
            stats.record(&CompletedRequest {
                lag: Duration::from_millis(lag_ms),
                queued,
                ..completed(0, 1000, response(200, None, None))
            });
        }
        let late = stats.totals().late;
        assert_eq!((late.connections_taken, late.generator_behind), (1, 2));
    }

    #[test]
    fn instance_seconds_are_summed_over_seconds_and_deployments() {
        let mut stats = LoadStats::new();
        let counts = |blue, green| BTreeMap::from([("blue".into(), blue), ("green".into(), green)]);
        stats.sample(0, counts(2, 1));
        stats.sample(1, counts(4, 1));
        assert_eq!(stats.instances_now(), Some(5));
        assert_eq!(stats.totals().instance_seconds, Some(8));
        assert_eq!(LoadStats::new().totals().instance_seconds, None);
    }

    #[test]
    fn an_empty_run_has_no_latency() {
        assert_eq!(LoadStats::new().totals().latency, Percentiles::default());
    }

    #[test]
    fn latencies_over_an_hour_saturate() {
        let mut stats = LoadStats::new();
        stats.record(&completed(0, 10_000_000, Err(RequestFailure::Timeout)));
        assert!(stats.totals().latency.max_us >= MICROS_MAX);
    }
}
