//! The file of one-second panes, and the open minutes beside them.
//!
//! Invariant: panes and open minutes are saved in one transaction, so that after a crash a frame is
//! in both or in neither. What is not covered by every gateway is a gap, and is said to be one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::open::Open;
use contract::frame::Role;
use contract::ids::{Bucket, EndpointKey, Name, Position};
use contract::time::{Span, Timestamp};
use serde::Serialize;
use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection, QueryBuilder, Sqlite, SqliteConnection, SqlitePool};
use tokio::sync::Mutex;

use crate::panes::{Pane, Place, Spans};
use crate::ready::ReadyChange;

/// Most points of one deployment that a query may ask for: a day of seconds.
pub const POINTS_MAX: u64 = 86_400;

/// Rows per insert.
const CHUNK: usize = 100;

/// Old panes that one save deletes at most, so that no save takes long.
const PRUNED_MAX: i64 = 20_000;

static MIGRATIONS: Migrator = sqlx::migrate!("./migrations");

#[derive(Clone, Debug, thiserror::Error)]
pub enum HistoryError {
    #[error("the history in {path} failed: {detail}")]
    Database { path: String, detail: String },
    #[error("{0}")]
    Refused(String),
}

/// A cheap handle to the history.
#[derive(Clone)]
pub struct History {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    writer: Mutex<SqliteConnection>,
    readers: SqlitePool,
}

/// What is saved together.
#[derive(Default)]
pub(crate) struct Save {
    pub panes: BTreeMap<Place, Pane>,
    pub covered: BTreeMap<Bucket, Spans>,
    pub ready: Vec<ReadyChange>,
    pub open: Vec<(Bucket, String)>,
    /// Changes of what is ready are saved up to here.
    pub position: Position,
    /// Panes of earlier seconds are deleted.
    pub prune_before: i64,
}

/// What was saved, for a successor.
#[derive(Default)]
pub(crate) struct Saved {
    pub open: BTreeMap<Bucket, Open>,
    pub position: Position,
}

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

type Deployment = (String, String);

impl History {
    /// Opens the file, or makes it.
    pub async fn open(path: &Path) -> Result<Self, HistoryError> {
        let failed = |detail: String| HistoryError::Database {
            path: path.display().to_string(),
            detail,
        };
        let options = SqliteConnectOptions::new()
            .filename(path)
            .disable_statement_logging();
        let mut writer = options
            .clone()
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .connect()
            .await
            .map_err(|error| failed(error.to_string()))?;
        MIGRATIONS
            .run_direct(None, &mut writer, false)
            .await
            .map_err(|error| failed(error.to_string()))?;
        let readers = SqlitePoolOptions::new()
            .max_connections(2)
            .connect_with(options.read_only(true))
            .await
            .map_err(|error| failed(error.to_string()))?;
        Ok(Self {
            inner: Arc::new(Inner {
                path: path.to_owned(),
                writer: Mutex::new(writer),
                readers,
            }),
        })
    }

    fn failed(&self, error: &sqlx::Error) -> HistoryError {
        HistoryError::Database {
            path: self.inner.path.display().to_string(),
            detail: error.to_string(),
        }
    }

    pub(crate) async fn load(&self) -> Result<Saved, HistoryError> {
        let mut writer = self.inner.writer.lock().await;
        let stored: Vec<(i64, String)> = sqlx::query_as("SELECT bucket, doc FROM open")
            .fetch_all(&mut *writer)
            .await
            .map_err(|error| self.failed(&error))?;
        let position: Option<String> =
            sqlx::query_scalar("SELECT value FROM meta WHERE key = 'position'")
                .fetch_optional(&mut *writer)
                .await
                .map_err(|error| self.failed(&error))?;
        let mut saved = Saved {
            position: Position(position.and_then(|p| p.parse().ok()).unwrap_or(0)),
            ..Saved::default()
        };
        for (bucket, doc) in stored {
            match Open::decode(&doc) {
                Ok(open) => {
                    saved.open.insert(Bucket(bucket as u16), open);
                }
                // The log still says what was counted; only the open minute is lost.
                Err(error) => tracing::error!(bucket, %error, "a saved minute cannot be read"),
            }
        }
        Ok(saved)
    }

    pub(crate) async fn save(&self, save: &Save) -> Result<(), HistoryError> {
        let mut writer = self.inner.writer.lock().await;
        write(&mut writer, save)
            .await
            .map_err(|error| self.failed(&error))
    }

    /// Points of the live role, oldest first, then by endpoint and deployment. Steps of which
    /// nothing is known have none.
    pub async fn points(&self, query: &Query) -> Result<Vec<Point>, HistoryError> {
        let frame = StepFrame::new(query)?;
        let mut reader = self
            .inner
            .readers
            .begin()
            .await
            .map_err(|e| self.failed(&e))?;
        let read = read(&mut reader, query, frame)
            .await
            .map_err(|error| self.failed(&error))?;
        Ok(read.into_points(frame))
    }

    /// What is missing between two instants.
    pub async fn gaps(
        &self,
        endpoint: &EndpointKey,
        from: Timestamp,
        to: Timestamp,
    ) -> Result<Vec<GapSpan>, HistoryError> {
        let mut reader = self
            .inner
            .readers
            .acquire()
            .await
            .map_err(|e| self.failed(&e))?;
        let spans = covered(&mut reader, endpoint.bucket(), from.secs(), to.secs())
            .await
            .map_err(|error| self.failed(&error))?;
        let mut gaps = Vec::new();
        let mut next = from.secs();
        for (start, end) in spans {
            if start > next {
                gaps.push((next, start));
            }
            next = next.max(end);
        }
        if next < to.secs() {
            gaps.push((next, to.secs()));
        }
        let gap = |(from, to)| GapSpan {
            from: Timestamp::from_secs(from),
            to: Timestamp::from_secs(to),
        };
        Ok(gaps.into_iter().map(gap).collect())
    }
}

async fn write(writer: &mut SqliteConnection, save: &Save) -> sqlx::Result<()> {
    let mut transaction = writer.begin().await?;
    let panes: Vec<(&Place, String)> = save
        .panes
        .iter()
        .map(|(place, pane)| Ok((place, encode(pane)?)))
        .collect::<sqlx::Result<_>>()?;
    for chunk in panes.chunks(CHUNK) {
        QueryBuilder::<Sqlite>::new("INSERT INTO panes (endpoint, deployment, second, role, doc) ")
            .push_values(chunk, |mut row, (place, doc)| {
                row.push_bind(place.endpoint.as_str().to_owned())
                    .push_bind(place.deployment.as_str().to_owned())
                    .push_bind(place.second)
                    .push_bind(role_name(place.role))
                    .push_bind(doc.clone());
            })
            .build()
            .execute(&mut *transaction)
            .await?;
    }
    for (bucket, spans) in &save.covered {
        for (start, end) in spans {
            cover(&mut transaction, *bucket, *start, *end).await?;
        }
    }
    for change in &save.ready {
        sqlx::query(
            "INSERT INTO ready (endpoint, deployment, second, instances) VALUES ($1, $2, $3, $4) \
             ON CONFLICT (endpoint, deployment, second) DO UPDATE SET instances = excluded.instances",
        )
        .bind(change.endpoint.as_str())
        .bind(change.deployment.as_str())
        .bind(change.second)
        .bind(i64::from(change.instances))
        .execute(&mut *transaction)
        .await?;
    }
    for (bucket, doc) in &save.open {
        sqlx::query(
            "INSERT INTO open (bucket, doc) VALUES ($1, $2) \
             ON CONFLICT (bucket) DO UPDATE SET doc = excluded.doc",
        )
        .bind(i64::from(bucket.0))
        .bind(doc)
        .execute(&mut *transaction)
        .await?;
    }
    sqlx::query(
        "INSERT INTO meta (key, value) VALUES ('position', $1) \
         ON CONFLICT (key) DO UPDATE SET value = excluded.value",
    )
    .bind(save.position.to_string())
    .execute(&mut *transaction)
    .await?;
    prune(&mut transaction, save.prune_before).await?;
    transaction.commit().await
}

fn encode(pane: &Pane) -> sqlx::Result<String> {
    serde_json::to_string(pane).map_err(|error| sqlx::Error::Encode(Box::new(error)))
}

/// Adds a span of covered seconds; most often it goes on where the last one ended.
async fn cover(
    connection: &mut SqliteConnection,
    bucket: Bucket,
    start: i64,
    end: i64,
) -> sqlx::Result<()> {
    let longer = sqlx::query("UPDATE coverage SET \"end\" = $3 WHERE bucket = $1 AND \"end\" = $2")
        .bind(i64::from(bucket.0))
        .bind(start)
        .bind(end)
        .execute(&mut *connection)
        .await?;
    if longer.rows_affected() == 0 {
        sqlx::query(
            "INSERT INTO coverage (bucket, start, \"end\") VALUES ($1, $2, $3) \
             ON CONFLICT (bucket, start) DO UPDATE SET \"end\" = MAX(\"end\", excluded.\"end\")",
        )
        .bind(i64::from(bucket.0))
        .bind(start)
        .bind(end)
        .execute(connection)
        .await?;
    }
    Ok(())
}

async fn prune(connection: &mut SqliteConnection, before: i64) -> sqlx::Result<()> {
    sqlx::query(
        "DELETE FROM panes WHERE rowid IN (SELECT rowid FROM panes WHERE second < $1 LIMIT $2)",
    )
    .bind(before)
    .bind(PRUNED_MAX)
    .execute(&mut *connection)
    .await?;
    sqlx::query("DELETE FROM coverage WHERE \"end\" < $1")
        .bind(before)
        .execute(&mut *connection)
        .await?;
    // The last change before the limit still says how many are ready after it.
    sqlx::query(
        "DELETE FROM ready WHERE second < $1 AND second < (SELECT MAX(newer.second) FROM ready AS newer \
         WHERE newer.endpoint = ready.endpoint AND newer.deployment = ready.deployment AND newer.second <= $1)",
    )
    .bind(before)
    .execute(connection)
    .await?;
    Ok(())
}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::Live => "live",
        Role::Shadow => "shadow",
    }
}

/// The steps of a query.
#[derive(Clone, Copy)]
struct StepFrame {
    from: i64,
    to: i64,
    step: i64,
}

impl StepFrame {
    fn new(query: &Query) -> Result<Self, HistoryError> {
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
struct Read {
    /// By deployment and step.
    panes: BTreeMap<Deployment, BTreeMap<i64, Pane>>,
    ready: BTreeMap<Deployment, Vec<(i64, u32)>>,
    covered: BTreeMap<Bucket, Spans>,
}

async fn read(
    reader: &mut SqliteConnection,
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
fn filter(sql: &mut QueryBuilder<Sqlite>, query: &Query) {
    if let Some(endpoint) = &query.endpoint {
        sql.push(" AND endpoint = ")
            .push_bind(EndpointKey::new(endpoint).as_str().to_owned());
    }
    if let Some(deployment) = &query.deployment {
        sql.push(" AND deployment = ")
            .push_bind(deployment.as_str().to_owned());
    }
}

async fn read_panes(
    reader: &mut SqliteConnection,
    query: &Query,
    frame: StepFrame,
) -> sqlx::Result<BTreeMap<Deployment, BTreeMap<i64, Pane>>> {
    let mut sql = QueryBuilder::new(
        "SELECT endpoint, deployment, second, doc FROM panes WHERE role = 'live' AND second >= ",
    );
    sql.push_bind(frame.from)
        .push(" AND second < ")
        .push_bind(frame.to);
    filter(&mut sql, query);
    let rows: Vec<(String, String, i64, String)> = sql.build_query_as().fetch_all(reader).await?;
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
    reader: &mut SqliteConnection,
    query: &Query,
    frame: StepFrame,
) -> sqlx::Result<BTreeMap<Deployment, Vec<(i64, u32)>>> {
    let mut sql = QueryBuilder::new(
        "SELECT endpoint, deployment, second, instances FROM ready WHERE second < ",
    );
    sql.push_bind(frame.to);
    filter(&mut sql, query);
    sql.push(" ORDER BY second");
    let rows: Vec<(String, String, i64, i64)> = sql.build_query_as().fetch_all(reader).await?;
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
async fn covered(
    reader: &mut SqliteConnection,
    bucket: Bucket,
    from: i64,
    to: i64,
) -> sqlx::Result<Spans> {
    let rows: Spans = sqlx::query_as(
        "SELECT start, \"end\" FROM coverage \
         WHERE bucket = $1 AND \"end\" > $2 AND start < $3 ORDER BY start",
    )
    .bind(i64::from(bucket.0))
    .bind(from)
    .bind(to)
    .fetch_all(reader)
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
    fn into_points(self, frame: StepFrame) -> Vec<Point> {
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
