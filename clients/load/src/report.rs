//! The results of a run, as JSON and as text.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::stats::{Percentiles, Totals};

/// The share of requests that may be sent late before the report warns.
const LATE_SHARE_MAX: f64 = 0.01;

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadReport {
    pub url: String,
    /// Requests that were due; each of them was sent.
    pub due: u64,
    pub seconds: f64,
    /// Completed requests per second.
    pub rate: f64,
    /// Whether Ctrl-C ended the run.
    pub interrupted: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub errors_max: Option<u64>,
    #[serde(flatten)]
    pub totals: Totals,
    pub warnings: Vec<String>,
}

impl LoadReport {
    pub(super) fn new(
        url: String,
        due: u64,
        elapsed: Duration,
        interrupted: bool,
        errors_max: Option<u64>,
        totals: Totals,
    ) -> Self {
        let seconds = elapsed.as_secs_f64();
        Self {
            url,
            due,
            seconds,
            rate: totals.sent as f64 / seconds.max(1e-3),
            interrupted,
            errors_max,
            warnings: warnings(&totals),
            totals,
        }
    }

    /// Whether the run stayed within `--max-errors`.
    pub fn passed(&self) -> bool {
        self.errors_max
            .is_none_or(|errors_max| self.totals.errors <= errors_max)
    }

    /// Requests per second over time, for a chart: (seconds from the start, requests).
    pub fn load_points(&self) -> Vec<(f64, f64)> {
        let seconds = self.totals.timeline.iter();
        seconds
            .map(|second| (second.second as f64, second.sent as f64))
            .collect()
    }

    /// Ready instances over time, for a chart; empty if they were not sampled.
    pub fn instance_points(&self) -> Vec<(f64, u32)> {
        let sampled = self.totals.timeline.iter();
        sampled
            .filter(|second| !second.instances.is_empty())
            .map(|second| (second.second as f64, second.instances.values().sum()))
            .collect()
    }

    /// The report as text; ends with a newline.
    pub fn text(&self) -> String {
        let totals = &self.totals;
        let mut text = format!(
            "requests  {} in {:.1} s ({:.1}/s), {} ok, {} failed{}\n",
            totals.sent,
            self.seconds,
            self.rate,
            totals.ok,
            totals.errors,
            if self.interrupted {
                " (interrupted)"
            } else {
                ""
            },
        );
        for (kind, count) in &totals.errors_by_kind {
            text += &format!("  failed  {count} x {kind}\n");
        }
        if !totals.deployments.is_empty() {
            text += &format!("split     {}\n", self.split());
        }
        text += &format!("latency   {}\n", percentile_line(&totals.latency));
        text += &format!("service   {}\n", percentile_line(&totals.service_time));
        if let Some(seconds) = totals.instance_seconds {
            text += &format!("instances {seconds} instance-seconds\n");
        }
        for warning in &self.warnings {
            text += &format!("warning: {warning}\n");
        }
        if let Some(errors_max) = self.errors_max
            && !self.passed()
        {
            text += &format!(
                "failed: {} requests failed, and --max-errors allows {errors_max}\n",
                totals.errors
            );
        }
        text
    }

    fn split(&self) -> String {
        let answered: u64 = self.totals.deployments.values().sum();
        let shares = self.totals.deployments.iter().map(|(name, count)| {
            let share = 100.0 * *count as f64 / answered as f64;
            format!("{name} {count} ({share:.2} %)")
        });
        shares.collect::<Vec<_>>().join(", ")
    }
}

fn warnings(totals: &Totals) -> Vec<String> {
    let late = totals.late;
    let share = |count: u64| count as f64 / totals.sent.max(1) as f64;
    let mut warnings = Vec::new();
    if share(late.connections_taken) > LATE_SHARE_MAX {
        warnings.push(format!(
            "{:.1} % of the requests waited for a connection, because all were in use: the wait counts as \
             latency. Raise --connections if real clients would not wait like this.",
            100.0 * share(late.connections_taken)
        ));
    }
    if share(late.generator_behind) > LATE_SHARE_MAX {
        warnings.push(format!(
            "{:.1} % of the requests were sent more than 10 ms late, because this machine could not keep up with \
             the schedule: part of the latency is the load generator's own.",
            100.0 * share(late.generator_behind)
        ));
    }
    warnings
}

/// One progress line.
pub(super) struct ProgressLine {
    pub elapsed: Duration,
    pub length: Option<Duration>,
    pub rate: f64,
    pub sent: u64,
    pub ok: u64,
    pub errors: u64,
    /// Of the requests that ended since the previous line.
    pub latency: Option<Percentiles>,
    pub instances: Option<u32>,
}

impl fmt::Display for ProgressLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>4}", self.elapsed.as_secs())?;
        if let Some(length) = self.length {
            write!(f, "/{}", length.as_secs())?;
        }
        write!(
            f,
            " s  {:>6.1}/s  sent {}  ok {}  failed {}",
            self.rate, self.sent, self.ok, self.errors
        )?;
        if let Some(latency) = &self.latency {
            let (p50, p99) = (millis(latency.p50_us), millis(latency.p99_us));
            write!(f, "  p50 {p50}  p99 {p99}")?;
        }
        if let Some(instances) = self.instances {
            write!(f, "  instances {instances}")?;
        }
        Ok(())
    }
}

fn percentile_line(latency: &Percentiles) -> String {
    format!(
        "p50 {}  p90 {}  p99 {}  p99.9 {}  max {}",
        millis(latency.p50_us),
        millis(latency.p90_us),
        millis(latency.p99_us),
        millis(latency.p999_us),
        millis(latency.max_us),
    )
}

/// Three significant digits, or whole milliseconds from 100 ms.
fn millis(micros: u64) -> String {
    let millis = micros as f64 / 1000.0;
    match micros {
        0..10_000 => format!("{millis:.2} ms"),
        10_000..100_000 => format!("{millis:.1} ms"),
        _ => format!("{millis:.0} ms"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::stats::LateCounts;
    use super::*;

    fn totals() -> Totals {
        Totals {
            sent: 1000,
            ok: 997,
            errors: 3,
            errors_by_kind: BTreeMap::from([("503 no-instance-ready".to_owned(), 3)]),
            deployments: BTreeMap::from([("blue".to_owned(), 900), ("green".to_owned(), 100)]),
            latency: Percentiles {
                mean_us: 2000.0,
                p50_us: 1_234,
                p90_us: 9_999,
                p99_us: 45_600,
                p999_us: 100_000,
                max_us: 2_000_400,
            },
            instance_seconds: Some(77),
            ..Totals::default()
        }
    }

    fn report(errors_max: Option<u64>, totals: Totals) -> LoadReport {
        let elapsed = Duration::from_secs(10);
        LoadReport::new(
            "http://x/score".into(),
            1000,
            elapsed,
            false,
            errors_max,
            totals,
        )
    }

    #[test]
    fn the_summary_has_counts_shares_and_percentiles() {
        let text = report(None, totals()).text();
        let expected = "\
requests  1000 in 10.0 s (100.0/s), 997 ok, 3 failed
  failed  3 x 503 no-instance-ready
split     blue 900 (90.00 %), green 100 (10.00 %)
latency   p50 1.23 ms  p90 10.00 ms  p99 45.6 ms  p99.9 100 ms  max 2000 ms
service   p50 0.00 ms  p90 0.00 ms  p99 0.00 ms  p99.9 0.00 ms  max 0.00 ms
instances 77 instance-seconds
";
        assert_eq!(text, expected);
    }

    #[test]
    fn more_errors_than_allowed_fail_the_run() {
        assert!(report(None, totals()).passed());
        assert!(report(Some(3), totals()).passed());
        let failed = report(Some(2), totals());
        assert!(!failed.passed());
        assert!(failed.text().contains("--max-errors allows 2"));
    }

    #[test]
    fn a_missed_schedule_is_reported_with_its_cause() {
        let late = |connections_taken, generator_behind| Totals {
            late: LateCounts {
                connections_taken,
                generator_behind,
            },
            ..totals()
        };
        assert!(report(None, late(10, 10)).warnings.is_empty());
        let taken = report(None, late(11, 0)).warnings;
        assert!(taken[0].contains("--connections"), "{taken:?}");
        let behind = report(None, late(0, 11)).warnings;
        assert!(behind[0].contains("could not keep up"), "{behind:?}");
    }

    #[test]
    fn a_report_in_json_is_flat() {
        let json = serde_json::to_value(report(Some(0), totals())).unwrap();
        assert_eq!(json["sent"], 1000);
        assert_eq!(json["errorsByKind"]["503 no-instance-ready"], 3);
        assert_eq!(json["latency"]["p99Us"], 45_600);
        assert_eq!(json["errorsMax"], 0);
    }

    #[test]
    fn progress_omits_what_is_unknown() {
        let mut progress = ProgressLine {
            elapsed: Duration::from_secs(7),
            length: Some(Duration::from_secs(60)),
            rate: 50.0,
            sent: 350,
            ok: 348,
            errors: 1,
            latency: Some(totals().latency),
            instances: Some(4),
        };
        assert_eq!(
            progress.to_string(),
            "   7/60 s    50.0/s  sent 350  ok 348  failed 1  p50 1.23 ms  p99 45.6 ms  instances 4"
        );
        (progress.length, progress.latency, progress.instances) = (None, None, None);
        assert_eq!(
            progress.to_string(),
            "   7 s    50.0/s  sent 350  ok 348  failed 1"
        );
    }
}
