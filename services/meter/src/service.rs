//! The loop: frames and records in, events and panes out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bus::Bus;
use contract::events::Event;
use contract::frame::Frame;
use contract::ids::Bucket;
use contract::log::{Actor, NewEvent, Record, StreamKind, StreamName};
use contract::time::{Span, Timestamp};
use domain::usage::{Counted, Due, SAVED_EVERY, Usage};
use futures::future::join_all;
use runtime::clock::Clock;
use runtime::feed::{Feed, FeedItem};
use runtime::health::{Component, Health};
use runtime::ids::Ids;
use runtime::metrics::Metrics;
use store::{Append, Commit, CommitError, Committed, Fence, Store, StoreError};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::history::{History, HistoryError, Save};
use crate::metrics::MeterMetrics;
use crate::panes::Panes;
use crate::ready::Ready;

const SERVICE: &str = "meter";

/// How often it is looked whether minutes can be closed.
const TICK: Duration = Duration::from_millis(250);

#[derive(Clone)]
pub struct Deps {
    pub store: Store,
    pub bus: Arc<dyn Bus>,
    pub clock: Arc<dyn Clock>,
    pub ids: Arc<dyn Ids>,
    pub metrics: Metrics,
    pub health: Health,
}

#[derive(Debug, thiserror::Error)]
pub enum MeterError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    History(#[from] HistoryError),
}

/// The meter, opened and listening, not running yet.
pub struct Meter {
    deps: Deps,
    history: History,
    retention: Span,
    metrics: MeterMetrics,
    component: Component,
    feed: Feed,
    frames: mpsc::Receiver<Arc<Frame>>,
    state: State,
}

/// What it knows; saved as far as the log does not have it.
struct State {
    buckets: BTreeMap<Bucket, Usage>,
    fences: BTreeMap<Bucket, Fence>,
    panes: Panes,
    ready: Ready,
    caught_up: bool,
    saved_at: Timestamp,
}

impl Meter {
    /// Opens the history, takes back what was saved, and listens from now on.
    pub async fn open(config: Config, deps: Deps) -> Result<Self, MeterError> {
        let component = deps.health.component(SERVICE);
        component.waiting("reads the log");
        let frames = deps.bus.subscribe_frames();
        let feed = Feed::open(
            deps.store.clone(),
            deps.bus.clone(),
            SERVICE,
            BTreeMap::new(),
        );
        let history = History::open(&config.history).await?;
        let saved = history.load().await?;
        let state = State {
            buckets: saved.open,
            fences: BTreeMap::new(),
            panes: Panes::default(),
            ready: Ready::new(saved.position),
            caught_up: false,
            saved_at: deps.clock.now(),
        };
        Ok(Self {
            metrics: MeterMetrics::new(&deps.metrics),
            deps,
            history,
            retention: config.retention,
            component,
            feed,
            frames,
            state,
        })
    }

    /// A handle for those who read the past.
    pub fn history(&self) -> History {
        self.history.clone()
    }

    /// Runs until `shutdown`; then takes in what has come by then and saves it.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), MeterError> {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                _ = ticks.tick(), if self.state.caught_up => self.tick().await?,
                item = self.feed.next() => self.take_in(item?).await?,
                // Until the log has been read it is not known what has been counted already.
                Some(frame) = self.frames.recv(), if self.state.caught_up => self.count(&frame),
            }
        }
        if self.state.caught_up {
            self.count_waiting();
            let now = self.deps.clock.now();
            self.save(now).await;
        }
        Ok(())
    }

    async fn take_in(&mut self, item: FeedItem) -> Result<(), StoreError> {
        match item {
            FeedItem::Records(records) => records.iter().for_each(|record| self.apply(record)),
            FeedItem::Assigned(buckets) => self.take(buckets).await?,
            FeedItem::Revoked(buckets) => {
                for bucket in buckets {
                    self.state.fences.remove(&bucket);
                    self.state.buckets.remove(&bucket);
                }
            }
            FeedItem::CaughtUp => {
                self.state.caught_up = true;
                self.component.ready();
            }
        }
        Ok(())
    }

    /// Raises the generation of each bucket, so that a former owner can write no more.
    async fn take(&mut self, buckets: Vec<Bucket>) -> Result<(), StoreError> {
        let names: Vec<String> = buckets.iter().map(|b| format!("{SERVICE}/{b}")).collect();
        let fences = join_all(names.iter().map(|name| self.deps.store.take(name))).await;
        for (bucket, fence) in buckets.into_iter().zip(fences) {
            self.state.fences.insert(bucket, fence?);
        }
        Ok(())
    }

    fn apply(&mut self, record: &Record) {
        self.state.ready.apply(record);
        let usage = self.state.buckets.entry(record.bucket).or_default();
        usage.apply(record);
    }

    fn count(&mut self, frame: &Frame) {
        if !self.state.fences.contains_key(&frame.bucket) {
            return;
        }
        let now = self.deps.clock.now();
        let usage = self.state.buckets.entry(frame.bucket).or_default();
        let counted = usage.count(frame, now);
        self.metrics.frame(counted);
        if counted != Counted::Before {
            self.state.panes.add(frame);
        }
    }

    fn count_waiting(&mut self) {
        while let Ok(frame) = self.frames.try_recv() {
            self.count(&frame);
        }
    }

    async fn tick(&mut self) -> Result<(), StoreError> {
        // What has come must be in before a minute is closed without it.
        self.count_waiting();
        let now = self.deps.clock.now();
        self.close(now).await?;
        let clock_stepped_back = now < self.state.saved_at;
        if clock_stepped_back || now.since(self.state.saved_at) >= SAVED_EVERY {
            self.save(now).await;
        }
        Ok(())
    }

    /// Appends what is due, one commit per endpoint. What cannot be written is due again.
    async fn close(&mut self, now: Timestamp) -> Result<(), StoreError> {
        let mut commits = Vec::new();
        for (bucket, usage) in &self.state.buckets {
            let Some(fence) = self.state.fences.get(bucket) else {
                continue;
            };
            for due in usage.due(now) {
                let commit = self.commit(&due, fence, now);
                let store = &self.deps.store;
                commits.push(async move { (*bucket, due.endpoint, store.commit(commit).await) });
            }
        }
        let mut fenced = Vec::new();
        for (bucket, endpoint, outcome) in join_all(commits).await {
            match outcome {
                Ok(Committed::Now { records }) => {
                    let usage = self.state.buckets.entry(bucket).or_default();
                    for record in records {
                        self.metrics.written(&record.event);
                        usage.apply(&record);
                    }
                }
                Ok(Committed::Before { .. }) => {}
                // The feed brings what we have not seen yet.
                Err(CommitError::Conflict { .. }) => {
                    tracing::debug!(%endpoint, "the usage stream has moved on");
                }
                Err(CommitError::Fenced { .. }) => fenced.push(bucket),
                Err(CommitError::Store(StoreError::Closed)) => return Err(StoreError::Closed),
                Err(error) => tracing::error!(%endpoint, %error, "usage could not be written"),
            }
        }
        fenced.dedup();
        if !fenced.is_empty() {
            tracing::warn!(buckets = fenced.len(), "taken over, and taking again");
            self.take(fenced).await?;
        }
        let usages = self.state.buckets.values_mut();
        let open: usize = usages
            .map(|usage| {
                usage.settle(now);
                usage.open_minutes()
            })
            .sum();
        self.metrics.open_minutes.set(open as i64);
        Ok(())
    }

    fn commit(&self, due: &Due, fence: &Fence, now: Timestamp) -> Commit {
        let new_event = |event: &Event| NewEvent {
            id: self.deps.ids.event_id(now),
            time: now,
            actor: Actor::service(SERVICE),
            event: event.clone(),
        };
        Commit {
            appends: vec![Append {
                stream: StreamName::of(StreamKind::Usage, &due.endpoint),
                expected_version: due.expected_version,
                events: due.events.iter().map(new_event).collect(),
            }],
            fence: Some(fence.clone()),
            ..Commit::default()
        }
    }

    /// Saves panes and open minutes. History is not the log: a failure is told, and tried again.
    async fn save(&mut self, now: Timestamp) {
        self.state.saved_at = now;
        let (panes, covered) = self.state.panes.take(now);
        let (ready, position) = self.state.ready.take();
        let open = self.state.buckets.iter().filter_map(encoded).collect();
        let save = Save {
            panes,
            covered,
            ready,
            open,
            position,
            prune_before: now.secs() - self.retention.secs() as i64,
        };
        if let Err(error) = self.history.save(&save).await {
            tracing::error!(%error, "history and open minutes could not be saved");
            self.metrics.saves_failed.inc();
            self.state.panes.put_back(save.panes);
            self.state.ready.put_back(save.ready);
        }
    }
}

fn encoded((bucket, usage): (&Bucket, &Usage)) -> Option<(Bucket, String)> {
    match serde_json::to_string(usage) {
        Ok(doc) => Some((*bucket, doc)),
        Err(error) => {
            tracing::error!(%bucket, %error, "an open minute cannot be written");
            None
        }
    }
}
