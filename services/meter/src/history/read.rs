//! Queries: panes of the live role aggregated into steps, with the coverage of each.

use std::collections::{BTreeMap, BTreeSet};

use contract::ids::{Bucket, EndpointKey, Name};
use contract::time::{Span, Timestamp};
use serde::Serialize;
use store::sql::Connection;

use super::HistoryError;
use super::sql::Sql;
use crate::panes::{Pane, SecondRanges};

/// Most points of one deployment in a query: a day of seconds.
pub const POINTS_MAX: u64 = 86_400;

type DeploymentKey = (String, String);

/// Selects a part of the history.
#[derive(Clone, Debug)]
pub struct PointsQuery {
    pub endpoint: Option<Name>,
    pub deployment: Option<Name>,
    pub from: Timestamp,
    pub to: Timestamp,
    /// Whole seconds, at least one.
    pub step: Span,
}

/// One deployment in one step; rates are per covered second.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Point {
    /// The start of the step.
    pub time: Timestamp,
    pub endpoint: Name,
    pub deployment: Name,
    /// Seconds of the step that every gateway has reported; the others are gaps.
    pub covered_seconds: u64,
    pub requests: u64,
    pub requests_per_second: f64,
    pub errors_per_second: f64,
    /// Average number of requests being served.
    pub concurrency: f64,
    pub concurrency_max: u32,
    /// Average number of requests waiting for an instance.
    pub queued: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_p50_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_p99_ms: Option<f64>,
    /// Instances ready at the end of the step, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instances: Option<u32>,
    /// The raw counts, for backtests.
    #[serde(skip)]
    pub pane: Pane,
}

/// A time span that not every gateway has reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct GapSpan {
    pub from: Timestamp,
    pub to: Timestamp,
}

/// The time steps of a query.
#[derive(Clone, Copy)]
pub(super) struct StepGrid {
    from: i64,
    to: i64,
    step: i64,
}

impl StepGrid {
    pub(super) fn new(query: &PointsQuery) -> Result<Self, HistoryError> {
        let step = query.step.secs();
        if step == 0 {
            let sentence = "`step` must be one second at least";
            return Err(HistoryError::InvalidQuery(sentence.to_owned()));
        }
        if query.to.since(query.from).secs() / step > POINTS_MAX {
            return Err(HistoryError::InvalidQuery(format!(
                "that is more than {POINTS_MAX} steps: ask for a shorter time or a longer step"
            )));
        }
        Ok(Self {
            from: query.from.secs(),
            to: query.to.secs(),
            step: step as i64,
        })
    }

    fn start_of(&self, second: i64) -> i64 {
        self.from + (second - self.from).div_euclid(self.step) * self.step
    }

    fn starts(self) -> impl Iterator<Item = i64> {
        let starts = std::iter::successors(Some(self.from), move |start| Some(start + self.step));
        starts.take_while(move |start| *start < self.to)
    }
}

/// The rows that a query selects.
pub(super) struct HistoryRows {
    /// By deployment and step.
    panes: BTreeMap<DeploymentKey, BTreeMap<i64, Pane>>,
    ready: BTreeMap<DeploymentKey, Vec<(i64, u32)>>,
    coverage: BTreeMap<Bucket, SecondRanges>,
}

pub(super) async fn read(
    reader: &mut Connection<'_>,
    query: &PointsQuery,
    grid: StepGrid,
) -> sqlx::Result<HistoryRows> {
    let panes = read_panes(reader, query, grid).await?;
    let ready = read_ready(reader, query, grid).await?;
    let buckets: BTreeSet<Bucket> = panes.keys().chain(ready.keys()).map(bucket_of).collect();
    let mut spans = BTreeMap::new();
    for bucket in buckets {
        spans.insert(
            bucket,
            read_coverage(reader, bucket, grid.from, grid.to).await?,
        );
    }
    Ok(HistoryRows {
        panes,
        ready,
        coverage: spans,
    })
}

fn bucket_of((endpoint, _): &DeploymentKey) -> Bucket {
    Bucket::of(endpoint)
}

/// Adds the filters of a query to a statement that already has a condition.
fn filtered(mut sql: Sql, query: &PointsQuery) -> Sql {
    if let Some(endpoint) = &query.endpoint {
        let key = EndpointKey::new(endpoint);
        sql = sql.push(" AND endpoint = ").bind(key.as_str());
    }
    if let Some(deployment) = &query.deployment {
        sql = sql.push(" AND deployment = ").bind(deployment.as_str());
    }
    sql
}

async fn read_panes(
    reader: &mut Connection<'_>,
    query: &PointsQuery,
    grid: StepGrid,
) -> sqlx::Result<BTreeMap<DeploymentKey, BTreeMap<i64, Pane>>> {
    let sql = Sql::new(
        "SELECT endpoint, deployment, second, doc FROM history_panes \
         WHERE role = 'live' AND second >= $1 AND second < $2",
    )
    .with([grid.from.into(), grid.to.into()]);
    let rows: Vec<(String, String, i64, String)> = filtered(sql, query).fetch(reader).await?;
    let mut by_second: BTreeMap<(DeploymentKey, i64), Pane> = BTreeMap::new();
    for (endpoint, deployment, second, doc) in rows {
        let pane: Pane =
            serde_json::from_str(&doc).map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
        let key = ((endpoint, deployment), second);
        by_second.entry(key).or_default().add_concurrent(&pane);
    }
    let mut panes: BTreeMap<DeploymentKey, BTreeMap<i64, Pane>> = BTreeMap::new();
    for ((deployment, second), pane) in by_second {
        let steps = panes.entry(deployment).or_default();
        steps
            .entry(grid.start_of(second))
            .or_default()
            .add_later(&pane);
    }
    Ok(panes)
}

async fn read_ready(
    reader: &mut Connection<'_>,
    query: &PointsQuery,
    grid: StepGrid,
) -> sqlx::Result<BTreeMap<DeploymentKey, Vec<(i64, u32)>>> {
    let sql = Sql::new(
        "SELECT endpoint, deployment, second, instances FROM history_ready WHERE second < $1",
    )
    .with([grid.to.into()]);
    let sql = filtered(sql, query).push(" ORDER BY second");
    let rows: Vec<(String, String, i64, i64)> = sql.fetch(reader).await?;
    let mut ready: BTreeMap<DeploymentKey, Vec<(i64, u32)>> = BTreeMap::new();
    for (endpoint, deployment, second, instances) in rows {
        let changes = ready.entry((endpoint, deployment)).or_default();
        changes.push((second, instances as u32));
    }
    // A deployment with nothing ready since before the window is not part of it.
    ready.retain(|_, changes| {
        let last = changes.last().copied().unwrap_or_default();
        last.1 > 0 || last.0 >= grid.from
    });
    Ok(ready)
}

/// Returns the covered spans within a window, ascending and merged.
pub(super) async fn read_coverage(
    reader: &mut Connection<'_>,
    bucket: Bucket,
    from: i64,
    to: i64,
) -> sqlx::Result<SecondRanges> {
    let rows: SecondRanges = Sql::new(
        "SELECT start, \"end\" FROM history_coverage \
         WHERE bucket = $1 AND \"end\" > $2 AND start < $3 ORDER BY start",
    )
    .with([i64::from(bucket.0).into(), from.into(), to.into()])
    .fetch(reader)
    .await?;
    let mut spans = SecondRanges::new();
    for (start, end) in rows {
        let (start, end) = (start.max(from), end.min(to));
        match spans.last_mut() {
            Some((_, last)) if *last >= start => *last = (*last).max(end),
            _ => spans.push((start, end)),
        }
    }
    Ok(spans)
}

impl HistoryRows {
    pub(super) fn into_points(self, grid: StepGrid) -> Vec<Point> {
        let deployments: BTreeSet<&DeploymentKey> =
            self.panes.keys().chain(self.ready.keys()).collect();
        let mut points = Vec::new();
        for start in grid.starts() {
            for deployment in &deployments {
                points.extend(self.point(deployment, start, grid));
            }
        }
        points
    }

    fn point(&self, deployment_key: &DeploymentKey, start: i64, grid: StepGrid) -> Option<Point> {
        let end = (start + grid.step).min(grid.to);
        let pane = self
            .panes
            .get(deployment_key)
            .and_then(|steps| steps.get(&start));
        let covered_seconds = self
            .coverage
            .get(&bucket_of(deployment_key))
            .map_or(0, |spans| overlap(spans, start, end));
        if pane.is_none() && covered_seconds == 0 {
            return None;
        }
        let endpoint: EndpointKey = deployment_key.0.parse().ok()?;
        let deployment: Name = deployment_key.1.parse().ok()?;
        let pane = pane.cloned().unwrap_or_default();
        // A step without coverage may still have data.
        let seconds = if covered_seconds == 0 {
            (end - start) as f64
        } else {
            covered_seconds as f64
        };
        let millis = |micros: u64| micros as f64 / 1000.0;
        Some(Point {
            time: Timestamp::from_secs(start),
            endpoint: endpoint.endpoint(),
            deployment,
            covered_seconds,
            requests: pane.arrivals,
            requests_per_second: pane.arrivals as f64 / seconds,
            errors_per_second: pane.outcomes.bad() as f64 / seconds,
            concurrency: pane.in_flight_us as f64 / 1e6 / seconds,
            concurrency_max: pane.in_flight_max,
            queued: pane.queued_us as f64 / 1e6 / seconds,
            latency_p50_ms: pane.latency.quantile_micros(5000).map(millis),
            latency_p99_ms: pane.latency.quantile_micros(9900).map(millis),
            instances: self.ready_at(deployment_key, end - 1),
            pane,
        })
    }

    fn ready_at(&self, deployment_key: &DeploymentKey, second: i64) -> Option<u32> {
        let changes = self.ready.get(deployment_key)?;
        let after = changes.partition_point(|(changed, _)| *changed <= second);
        Some(changes.get(after.checked_sub(1)?)?.1)
    }
}

fn overlap(spans: &SecondRanges, start: i64, end: i64) -> u64 {
    spans
        .iter()
        .map(|(from, to)| (*to.min(&end) - *from.max(&start)).max(0) as u64)
        .sum()
}

/// Returns what is not covered by the spans, which are ascending.
pub(super) fn gaps_between(spans: &SecondRanges, from: Timestamp, to: Timestamp) -> Vec<GapSpan> {
    let mut gaps = Vec::new();
    let mut next = from.secs();
    for (start, end) in spans {
        if *start > next {
            gaps.push((next, *start));
        }
        next = next.max(*end);
    }
    if next < to.secs() {
        gaps.push((next, to.secs()));
    }
    let gap = |(from, to)| GapSpan {
        from: Timestamp::from_secs(from),
        to: Timestamp::from_secs(to),
    };
    gaps.into_iter().map(gap).collect()
}
