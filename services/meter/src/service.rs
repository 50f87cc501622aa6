//! The loop: frames and records in, events and panes out.
//!
//! Buckets come and go at any time. Frames of a bucket count once its history has been folded, since
//! that tells what has been counted; those that come before wait for it. Outages of the store end
//! nothing: what could not be written is due again.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bus::Bus;
use contract::events::Event;
use contract::frame::{Frame, FrameHead};
use contract::ids::{Bucket, Name};
use contract::log::{Actor, NewEvent, StreamKind, StreamName};
use contract::time::{Span, Timestamp};
use domain::usage::{Counted, Due, SAVED_EVERY, Usage};
use futures::StreamExt;
use runtime::clock::Clock;
use runtime::consumer::{Applied, Consumer, ConsumerConfig, ConsumerDeps, Step};
use runtime::health::Health;
use runtime::ids::Ids;
use runtime::metrics::Metrics;
use runtime::parking::catch_panic;
use store::{Append, Commit, CommitError, Committed, Fence, Store, StoreError};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::fold::MeterFold;
use crate::history::{History, HistoryError, Owned, Save, Saved};
use crate::metrics::MeterMetrics;
use crate::open::Open;
use crate::panes::Panes;
use crate::ready::Ready;

const SERVICE: &str = "meter";

/// How often it is looked whether minutes can be closed.
const TICK: Duration = Duration::from_millis(250);

/// Frames of one bucket that wait until its history has been folded; the oldest go first.
const WAITING_MAX: usize = 4096;

/// Frames that could not be read, of buckets whose history has not been folded, that wait for it.
const UNREADABLE_MAX: usize = 65_536;

/// Endpoints whose minutes are written at once.
const CLOSES_MAX: usize = 256;

/// Frames are asked of the bus again from so long before the open minutes were saved: clocks differ,
/// and some were late.
const HEARD_AGAIN: Span = Span::from_secs(60);

/// So long after frames were asked for again, or the last of the past has come, nothing is closed: they
/// must come first.
const COMES_AGAIN: Span = Span::from_secs(10);

/// But no longer than this: what comes even later are corrections.
const COMES_AGAIN_MAX: Span = Span::from_secs(300);

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
    consumer: Consumer<MeterFold>,
    frames: mpsc::Receiver<Arc<Frame>>,
    state: State,
}

/// What it knows; saved as far as the log does not have it.
struct State {
    buckets: BTreeMap<Bucket, Held>,
    panes: Panes,
    ready: Ready,
    saved_at: Timestamp,
    /// Frames that could not be read, of buckets that have not been folded.
    unreadable: Vec<FrameHead>,
    /// What could not be saved, or had no answer.
    unsaved: Option<Save>,
    writes_fail: bool,
}

/// A bucket that is ours.
struct Held {
    fence: Fence,
    usage: Usage,
    caught_up: bool,
    /// Somebody else has counted before us.
    taken_over: bool,
    /// From when on frames are to be heard again.
    again_from: Option<Timestamp>,
    /// Set once they have been asked for.
    again: Option<Again>,
    /// Frames that came before the history had been folded.
    waiting: VecDeque<Arc<Frame>>,
}

/// Frames of the past are on their way.
struct Again {
    from: Timestamp,
    /// Until when what has been heard is not complete.
    until: Timestamp,
    /// Until when that may be put off.
    at_most_until: Timestamp,
}

impl Meter {
    /// Opens the history, takes back what was saved, and listens from now on.
    pub async fn open(config: Config, deps: Deps) -> Result<Self, MeterError> {
        let component = deps.health.component(SERVICE);
        let frames = deps.bus.subscribe_frames();
        let consumer_config = ConsumerConfig {
            waits_for_writes: true,
            ..ConsumerConfig::shared(SERVICE)
        };
        let consumer_deps = ConsumerDeps {
            store: deps.store.clone(),
            bus: deps.bus.clone(),
            clock: deps.clock.clone(),
        };
        let consumer = Consumer::open(consumer_config, MeterFold, consumer_deps, component);
        let history = History::open(&config.history).await?;
        let state = State {
            buckets: BTreeMap::new(),
            panes: Panes::default(),
            ready: Ready::default(),
            saved_at: deps.clock.now(),
            unreadable: Vec::new(),
            unsaved: None,
            writes_fail: false,
        };
        Ok(Self {
            metrics: MeterMetrics::new(&deps.metrics),
            deps,
            history,
            retention: config.retention,
            consumer,
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
                _ = ticks.tick() => self.tick().await?,
                step = self.consumer.next() => self.handle(step?).await?,
                Some(frame) = self.frames.recv() => self.hear(frame),
            }
        }
        self.hear_waiting();
        let ours: Vec<Bucket> = self.state.buckets.keys().copied().collect();
        self.save(self.deps.clock.now(), &ours).await;
        self.consumer.save_all().await;
        Ok(())
    }

    async fn handle(&mut self, step: Step<Vec<(Name, u32)>>) -> Result<(), StoreError> {
        match step {
            Step::Applied(applied) => applied.into_iter().for_each(|one| self.applied(one)),
            // What its minutes hold is still there, and what was applied once changes nothing again.
            Step::Rebuilt { applied, .. } => {
                applied.into_iter().for_each(|one| self.applied(one));
            }
            Step::Taken(buckets) => {
                let fence =
                    |bucket: &Bucket| Some((*bucket, self.consumer.fence(*bucket)?.clone()));
                let fences: Vec<(Bucket, Fence)> = buckets.iter().filter_map(fence).collect();
                let mut saved = self.claim(&fences).await;
                for (bucket, fence) in fences {
                    let saved = saved.remove(&bucket);
                    match self.state.buckets.contains_key(&bucket) {
                        true => self.hold_again(bucket, fence, saved),
                        false => self.hold(bucket, fence, saved),
                    }
                }
                self.consumer.slices_from(self.slices_from());
            }
            Step::Released(buckets) => self.release(&buckets).await,
            Step::CaughtUp(buckets) => self.caught_up(&buckets),
            // What its minutes hold stays.
            Step::Parked(_) | Step::Unreadable { .. } | Step::Passed(_) => {}
        }
        Ok(())
    }

    fn applied(&mut self, applied: Applied<Vec<(Name, u32)>>) {
        let Applied { record, effect } = applied;
        let Some(held) = self.state.buckets.get_mut(&record.bucket) else {
            return;
        };
        let applies = effect.is_some();
        self.state
            .ready
            .changed(&record, effect.unwrap_or_default());
        if applies && let Err(detail) = catch_panic(|| held.usage.apply(&record)) {
            let key = record.endpoint();
            tracing::error!(position = %record.position, detail, "an event cannot be taken from open minutes");
            if let Some(key) = key {
                self.consumer.park(&key, &detail);
            }
        }
    }

    /// From here on no former owner saves anything of these buckets. History is not the log: where it
    /// fails, the bucket begins with the log alone.
    async fn claim(&self, fences: &[(Bucket, Fence)]) -> BTreeMap<Bucket, Saved> {
        let generation = |(bucket, fence): &(Bucket, Fence)| (*bucket, fence.generation);
        let generations = fences.iter().map(generation).collect();
        let claimed = self.history.claim(&generations).await;
        claimed.unwrap_or_else(|error| {
            tracing::error!(%error, "open minutes could not be read");
            BTreeMap::new()
        })
    }

    /// A bucket is ours: its minutes begin with what was saved, or with the log alone.
    fn hold(&mut self, bucket: Bucket, fence: Fence, saved: Option<Saved>) {
        let now = self.deps.clock.now();
        let saved = saved.unwrap_or_else(|| Saved {
            panes_before: now.secs() + 1,
            ..Saved::default()
        });
        let open = saved.open.and_then(|open| open.for_owner(&fence));
        let taken_over = open.is_none() && fence.generation > 1;
        self.state.panes.forget(bucket);
        if taken_over {
            self.state.panes.begin(bucket, saved.panes_before);
        }
        self.state.ready.begin(bucket, saved.ready_through);
        let (mut usage, saved_at) = open.unwrap_or_default();
        // The history is older than the snapshot, or is gone: what it lacks is in the log only.
        if self.consumer.position(bucket) > saved.ready_through {
            self.consumer.discard_snapshot(bucket);
        }
        for (key, entry) in self.consumer.folds().lock().of(bucket) {
            if entry.state.usage.version() >= usage.version(key) {
                usage.know(key, &entry.state.usage);
            }
        }
        let held = Held {
            taken_over,
            again_from: saved_at.map(|at| before(at, HEARD_AGAIN)),
            again: None,
            usage,
            fence,
            caught_up: false,
            waiting: VecDeque::new(),
        };
        self.state.buckets.insert(bucket, held);
    }

    /// History is read before frames are counted, and takes from open minutes only what was saved of them:
    /// slices from before that need not be decoded. Once frames are counted, all slices matter.
    fn slices_from(&self) -> Timestamp {
        let from = |held: &Held| match held.caught_up {
            true => Timestamp::MIN,
            false => held.usage.oldest_open().unwrap_or(Timestamp::MAX),
        };
        let held = self.state.buckets.values();
        held.map(from).min().unwrap_or(Timestamp::MIN)
    }

    /// What was fenced while it was still ours has been taken once more. Its minutes stay: what somebody
    /// else has told of them comes with the feed, and is taken away.
    fn hold_again(&mut self, bucket: Bucket, fence: Fence, saved: Option<Saved>) {
        let saved = saved.map(|saved| saved.panes_before);
        let begin = saved.unwrap_or_else(|| self.deps.clock.now().secs() + 1);
        self.state.panes.begin(bucket, begin);
        if let Some(held) = self.state.buckets.get_mut(&bucket) {
            held.fence = fence;
        }
    }

    /// Buckets are somebody else's from here on, who begins with what is saved now.
    async fn release(&mut self, buckets: &[Bucket]) {
        self.hear_waiting();
        let held = buckets.iter().filter_map(|b| self.state.buckets.get(b));
        if held.filter(|held| held.caught_up).count() > 0 {
            self.save(self.deps.clock.now(), buckets).await;
        }
        for bucket in buckets {
            self.state.buckets.remove(bucket);
            self.state.panes.forget(*bucket);
            self.state.ready.forget(*bucket);
        }
    }

    fn caught_up(&mut self, buckets: &[Bucket]) {
        self.consumer.slices_from(Timestamp::MIN);
        let now = self.deps.clock.now();
        let mut since: Option<Timestamp> = None;
        for bucket in buckets {
            let Some(held) = self.state.buckets.get_mut(bucket) else {
                continue;
            };
            // Minutes that were heard before go on.
            if std::mem::replace(&mut held.caught_up, true) {
                continue;
            }
            if held.taken_over {
                let untold = held.usage.taken_over(now);
                held.again_from = Some(before(untold, HEARD_AGAIN));
            }
            if let Some(from) = held.again_from.filter(|from| *from < now) {
                held.again = Some(Again {
                    from,
                    until: now + COMES_AGAIN,
                    at_most_until: now + COMES_AGAIN_MAX,
                });
                since = Some(since.map_or(from, |since| since.min(from)));
            }
        }
        if let Some(since) = since {
            self.listen_since(since);
        }
        for bucket in buckets {
            let held = self.state.buckets.get_mut(bucket);
            let waiting = held.map(|held| std::mem::take(&mut held.waiting));
            for frame in waiting.into_iter().flatten() {
                self.count(&frame);
            }
        }
    }

    /// The former owner's open minutes are counted again, where the bus still has their frames. What
    /// comes twice is counted once.
    fn listen_since(&mut self, since: Timestamp) {
        let frames = self.deps.bus.subscribe_frames_since(since);
        // What the old subscription still holds may be from before what the new one brings.
        self.hear_waiting();
        self.frames = frames;
    }

    fn hear(&mut self, frame: Arc<Frame>) {
        match self.state.buckets.get_mut(&frame.bucket) {
            Some(held) if held.caught_up => self.count(&frame),
            Some(held) => {
                if held.waiting.len() >= WAITING_MAX {
                    held.waiting.pop_front();
                }
                held.waiting.push_back(frame);
            }
            None => {}
        }
    }

    fn count(&mut self, frame: &Frame) {
        let Some(held) = self.state.buckets.get_mut(&frame.bucket) else {
            return;
        };
        let now = self.deps.clock.now();
        held.hear_again(frame, now);
        let counted = held.usage.count(frame, now);
        self.metrics.frame(counted);
        if counted != Counted::Before {
            self.state.panes.add(frame);
        }
    }

    fn hear_waiting(&mut self) {
        while let Ok(frame) = self.frames.try_recv() {
            self.hear(frame);
        }
    }

    /// Frames that nobody here can read are missing; those of a bucket that is not folded yet wait.
    fn miss_unreadable(&mut self) {
        let waiting = std::mem::take(&mut self.state.unreadable);
        let came = self.deps.bus.take_unreadable_frames();
        for head in waiting.into_iter().chain(came) {
            match self.state.buckets.get_mut(&head.bucket) {
                Some(held) if held.caught_up => {
                    held.usage.count_unreadable(&head);
                    self.metrics.unreadable_frame();
                }
                Some(_) if self.state.unreadable.len() < UNREADABLE_MAX => {
                    self.state.unreadable.push(head);
                }
                _ => {}
            }
        }
    }

    async fn tick(&mut self) -> Result<(), StoreError> {
        // What has come must be in before a minute is closed without it.
        self.hear_waiting();
        self.miss_unreadable();
        let now = self.deps.clock.now();
        self.close(now).await?;
        let clock_stepped_back = now < self.state.saved_at;
        if clock_stepped_back || now.since(self.state.saved_at) >= SAVED_EVERY {
            self.save(now, &[]).await;
        }
        Ok(())
    }

    /// Appends what is due, one commit per endpoint. What cannot be written is due again.
    async fn close(&mut self, now: Timestamp) -> Result<(), StoreError> {
        let mut due = Vec::new();
        for (bucket, held) in &mut self.state.buckets {
            // Somebody else may have taken it meanwhile.
            let is_ours = self.consumer.fence(*bucket) == Some(&held.fence);
            if !is_ours || !held.caught_up || held.is_hearing(now) {
                continue;
            }
            let parking = self.consumer.parking();
            let of_bucket = held.usage.due(now).into_iter();
            let wanted = of_bucket.filter(|due| !parking.is_parked(&due.endpoint));
            due.extend(wanted.map(|due| (*bucket, held.fence.clone(), due)));
        }
        let commits = due.into_iter().map(|(bucket, fence, due)| {
            let commit = self.commit(&due, &fence, now);
            let store = &self.deps.store;
            async move { (bucket, due.endpoint, store.commit(commit).await) }
        });
        // Not all at once: at the end of a minute they would keep decisions waiting for the writer.
        let outcomes: Vec<_> = futures::stream::iter(commits)
            .buffer_unordered(CLOSES_MAX)
            .collect()
            .await;
        for (bucket, endpoint, outcome) in outcomes {
            match outcome {
                Ok(Committed::Now { records }) => {
                    self.state.writes_fail = false;
                    let Some(held) = self.state.buckets.get_mut(&bucket) else {
                        continue;
                    };
                    for record in records {
                        self.metrics.written(&record.event);
                        held.usage.apply(&record);
                    }
                }
                Ok(Committed::Before { .. }) => {}
                // The feed brings what we have not seen yet.
                Err(CommitError::Conflict { .. }) => {
                    tracing::debug!(%endpoint, "the usage stream has moved on");
                }
                Err(CommitError::Fenced { .. }) => {
                    self.consumer.fenced(bucket);
                }
                Err(CommitError::Store(StoreError::Closed)) => return Err(StoreError::Closed),
                // Once for an outage, not once for each endpoint and try.
                Err(error) => {
                    if !std::mem::replace(&mut self.state.writes_fail, true) {
                        tracing::error!(%endpoint, %error, "usage could not be written, trying again");
                    }
                }
            }
        }
        let (mut open, mut idle) = (0, 0);
        let held = self.state.buckets.values_mut();
        for held in held.filter(|held| held.caught_up) {
            if !held.is_hearing(now) {
                held.usage.settle(now);
            }
            open += held.usage.open_minutes();
            idle += held.usage.idle_deployments();
        }
        self.metrics.open_minutes.set(open as i64);
        self.metrics.idle_deployments.set(idle as i64);
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
    async fn save(&mut self, now: Timestamp, leaving: &[Bucket]) {
        self.state.saved_at = now;
        if let Some(unsaved) = self.state.unsaved.take()
            && !self.save_all(unsaved, true).await
        {
            return;
        }
        let save = self.gather(now, leaving);
        if self.save_all(save, false).await {
            let before = now.secs() - self.retention.secs() as i64;
            if let Err(error) = self.history.prune(before).await {
                tracing::warn!(%error, "what is old in the history could not be deleted");
            }
        }
    }

    /// What is new of our buckets.
    fn gather(&mut self, now: Timestamp, leaving: &[Bucket]) -> Save {
        let State {
            buckets,
            panes,
            ready,
            ..
        } = &mut self.state;
        let known = buckets.iter().filter(|(_, held)| held.caught_up);
        let open: BTreeMap<Bucket, Owned> = known
            .filter_map(|(bucket, held)| owned(*bucket, held, ready, now))
            .collect();
        let is_ours = |bucket| open.contains_key(&bucket);
        let (panes, covered) = panes.take(now, is_ours, |bucket| leaving.contains(&bucket));
        Save {
            panes,
            covered,
            ready: ready.take(is_ours),
            open,
            now: now.secs(),
        }
    }

    async fn save_all(&mut self, save: Save, again: bool) -> bool {
        match self.history.save(&save, again).await {
            Ok(refused) => {
                for (bucket, owned) in &save.open {
                    if !refused.contains(bucket) {
                        self.consumer.confirm_written(*bucket, owned.ready_through);
                    }
                }
                // The newer owner counts the same frames.
                let buckets = refused.len();
                if buckets > 0 {
                    tracing::info!(buckets, "not saved: others own these buckets by now");
                }
                true
            }
            Err(error) => {
                tracing::error!(%error, "history and open minutes could not be saved");
                self.metrics.saves_failed.inc();
                self.state.unsaved = Some(save);
                false
            }
        }
    }
}

impl Held {
    /// Whether frames that were asked for again may still come.
    fn is_hearing(&self, now: Timestamp) -> bool {
        self.again.as_ref().is_some_and(|again| now < again.until)
    }

    /// A frame has come; where it is one of the past, others follow.
    fn hear_again(&mut self, frame: &Frame, now: Timestamp) {
        let is_past = now.since(frame.start) > COMES_AGAIN;
        if let Some(again) = self
            .again
            .as_mut()
            .filter(|again| is_past && now < again.until)
        {
            again.until = (now + COMES_AGAIN).min(again.at_most_until);
        }
    }

    /// Frames from before this have been heard.
    fn heard_until(&self, now: Timestamp) -> Timestamp {
        let again = self.again.as_ref().filter(|_| self.is_hearing(now));
        again.map_or(now, |again| again.from)
    }
}

fn before(at: Timestamp, span: Span) -> Timestamp {
    Timestamp::from_millis(at.millis() - span.millis() as i64)
}

fn owned(bucket: Bucket, held: &Held, ready: &Ready, now: Timestamp) -> Option<(Bucket, Owned)> {
    match Open::encode(&held.fence, held.heard_until(now), &held.usage) {
        Ok(doc) => {
            let owned = Owned {
                generation: held.fence.generation,
                doc,
                ready_through: ready.reached(bucket),
            };
            Some((bucket, owned))
        }
        Err(error) => {
            tracing::error!(%bucket, %error, "an open minute cannot be written");
            None
        }
    }
}
