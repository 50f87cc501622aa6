//! What the past was: panes of the live role gathered into steps, with what is known of each.

use std::collections::{BTreeMap, BTreeSet};

use contract::ids::{Bucket, EndpointKey, Name};
use contract::time::{Span, Timestamp};
use serde::Serialize;
use store::sql::Connection;

use super::HistoryError;
use super::sql::Sql;
use crate::panes::{Pane, Spans};

/// Most points of one deployment that a query may ask for: a day of seconds.
pub const POINTS_MAX: u64 = 86_400;

type Deployment = (String, String);

/// Which part of the history.
#[derive(Clone, Debug)]
pub struct Query {
    pub endpoint: Option<Name>,
    pub deployment: Option<Name>,
    pub from: Timestamp,
    pub to: Timestamp,
    /// Whole seconds, one at least.
    pub step: Span,
}

/// One deployment in one step; rates are per second of what is covered.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Point {
    /// When the step begins.
    pub time: Timestamp,
    pub endpoint: Name,
    pub deployment: Name,
    /// Seconds of the step of which every gateway has told; the others are gaps.
    pub covered_seconds: u64,
    pub requests: u64,
    pub requests_per_second: f64,
    pub errors_per_second: f64,
    /// Requests being served, on average.
    pub concurrency: f64,
    pub concurrency_max: u32,
    /// Requests waiting for an instance, on average.
    pub queued: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_p50_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_p99_ms: Option<f64>,
    /// Instances ready at the end of the step, where the log has said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instances: Option<u32>,
    /// The counts themselves, for backtests.
    #[serde(skip)]
    pub pane: Pane,
}

/// A part of the past of which not every gateway has told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct GapSpan {
    pub from: Timestamp,
    pub to: Timestamp,
}

/// The steps of a query.
#[derive(Clone, Copy)]
pub(super) struct StepFrame {
    from: i64,
    to: i64,
    step: i64,
}

impl StepFrame {
    pub(super) fn new(query: &Query) -> Result<Self, HistoryError> {
        let step = query.step.secs();
        if step == 0 {
            let sentence = "`step` must be one second at least";
            return Err(HistoryError::Refused(sentence.to_owned()));
        }
        if query.to.since(query.from).secs() / step > POINTS_MAX {
            return Err(HistoryError::Refused(format!(
                "that is more than {POINTS_MAX} steps: ask for a shorter time or a longer step"
            )));
        }
        Ok(Self {
            from: query.from.secs(),
            to: query.to.secs(),
            step: step as i64,
        })
    }

    fn of(&self, second: i64) -> i64 {
        self.from + (second - self.from).div_euclid(self.step) * self.step
    }

    fn starts(self) -> impl Iterator<Item = i64> {
        let starts = std::iter::successors(Some(self.from), move |start| Some(start + self.step));
        starts.take_while(move |start| *start < self.to)
    }
}

/// What a query has found.
pub(super) struct Read {
    /// By deployment and step.
    panes: BTreeMap<Deployment, BTreeMap<i64, Pane>>,
    ready: BTreeMap<Deployment, Vec<(i64, u32)>>,
    covered: BTreeMap<Bucket, Spans>,
}

pub(super) async fn read(
    reader: &mut Connection<'_>,
    query: &Query,
    frame: StepFrame,
) -> sqlx::Result<Read> {
    let panes = read_panes(reader, query, frame).await?;
    let ready = read_ready(reader, query, frame).await?;
    let buckets: BTreeSet<Bucket> = panes.keys().chain(ready.keys()).map(bucket_of).collect();
    let mut spans = BTreeMap::new();
    for bucket in buckets {
        spans.insert(bucket, covered(reader, bucket, frame.from, frame.to).await?);
    }
    Ok(Read {
        panes,
        ready,
        covered: spans,
    })
}

fn bucket_of((endpoint, _): &Deployment) -> Bucket {
    Bucket::of(endpoint)
}

/// Adds the filters of a query to a statement that has a condition already.
fn filtered(mut sql: Sql, query: &Query) -> Sql {
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
    query: &Query,
    frame: StepFrame,
) -> sqlx::Result<BTreeMap<Deployment, BTreeMap<i64, Pane>>> {
    let sql = Sql::new(
        "SELECT endpoint, deployment, second, doc FROM history_panes \
         WHERE role = 'live' AND second >= $1 AND second < $2",
    )
    .with([frame.from.into(), frame.to.into()]);
    let rows: Vec<(String, String, i64, String)> = filtered(sql, query).fetch(reader).await?;
    let mut by_second: BTreeMap<(Deployment, i64), Pane> = BTreeMap::new();
    for (endpoint, deployment, second, doc) in rows {
        let pane: Pane =
            serde_json::from_str(&doc).map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
        let place = ((endpoint, deployment), second);
        by_second.entry(place).or_default().add(&pane);
    }
    let mut panes: BTreeMap<Deployment, BTreeMap<i64, Pane>> = BTreeMap::new();
    for ((deployment, second), pane) in by_second {
        let steps = panes.entry(deployment).or_default();
        steps.entry(frame.of(second)).or_default().follow(&pane);
    }
    Ok(panes)
}

async fn read_ready(
    reader: &mut Connection<'_>,
    query: &Query,
    frame: StepFrame,
) -> sqlx::Result<BTreeMap<Deployment, Vec<(i64, u32)>>> {
    let sql = Sql::new(
        "SELECT endpoint, deployment, second, instances FROM history_ready WHERE second < $1",
    )
    .with([frame.to.into()]);
    let sql = filtered(sql, query).push(" ORDER BY second");
    let rows: Vec<(String, String, i64, i64)> = sql.fetch(reader).await?;
    let mut ready: BTreeMap<Deployment, Vec<(i64, u32)>> = BTreeMap::new();
    for (endpoint, deployment, second, instances) in rows {
        let changes = ready.entry((endpoint, deployment)).or_default();
        changes.push((second, instances as u32));
    }
    // A deployment that has had nothing ready since before the window is not part of it.
    ready.retain(|_, changes| {
        let last = changes.last().copied().unwrap_or_default();
        last.1 > 0 || last.0 >= frame.from
    });
    Ok(ready)
}

/// Covered spans within a window, ascending and merged.
pub(super) async fn covered(
    reader: &mut Connection<'_>,
    bucket: Bucket,
    from: i64,
    to: i64,
) -> sqlx::Result<Spans> {
    let rows: Spans = Sql::new(
        "SELECT start, \"end\" FROM history_coverage \
         WHERE bucket = $1 AND \"end\" > $2 AND start < $3 ORDER BY start",
    )
    .with([i64::from(bucket.0).into(), from.into(), to.into()])
    .fetch(reader)
    .await?;
    let mut spans = Spans::new();
    for (start, end) in rows {
        let (start, end) = (start.max(from), end.min(to));
        match spans.last_mut() {
            Some((_, last)) if *last >= start => *last = (*last).max(end),
            _ => spans.push((start, end)),
        }
    }
    Ok(spans)
}

impl Read {
    pub(super) fn into_points(self, frame: StepFrame) -> Vec<Point> {
        let deployments: BTreeSet<&Deployment> =
            self.panes.keys().chain(self.ready.keys()).collect();
        let mut points = Vec::new();
        for start in frame.starts() {
            for deployment in &deployments {
                points.extend(self.point(deployment, start, frame));
            }
        }
        points
    }

    fn point(&self, of: &Deployment, start: i64, frame: StepFrame) -> Option<Point> {
        let end = (start + frame.step).min(frame.to);
        let pane = self.panes.get(of).and_then(|steps| steps.get(&start));
        let covered_seconds = self
            .covered
            .get(&bucket_of(of))
            .map_or(0, |spans| overlap(spans, start, end));
        if pane.is_none() && covered_seconds == 0 {
            return None;
        }
        let endpoint: EndpointKey = of.0.parse().ok()?;
        let deployment: Name = of.1.parse().ok()?;
        let pane = pane.cloned().unwrap_or_default();
        // Of a step that is not covered at all something has come in nevertheless.
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
            instances: self.ready_at(of, end - 1),
            pane,
        })
    }

    fn ready_at(&self, of: &Deployment, second: i64) -> Option<u32> {
        let changes = self.ready.get(of)?;
        let after = changes.partition_point(|(changed, _)| *changed <= second);
        Some(changes.get(after.checked_sub(1)?)?.1)
    }
}

fn overlap(spans: &Spans, start: i64, end: i64) -> u64 {
    spans
        .iter()
        .map(|(from, to)| (*to.min(&end) - *from.max(&start)).max(0) as u64)
        .sum()
}

/// What is not covered by any of the spans, which ascend.
pub(super) fn between(spans: &Spans, from: Timestamp, to: Timestamp) -> Vec<GapSpan> {
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
