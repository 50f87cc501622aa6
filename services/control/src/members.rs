//! The single writer of the stream of members: observes the frames of gateways and nodes, and records
//! who joins and who leaves. One replica at a time does this, under a lease; the others wait for the
//! lease.
//!
//! Invariant: what is written follows from the frames observed since the lease was acquired, and from
//! the stream; a replica without the lease writes nothing. It keeps running through store outages.

use std::sync::Arc;
use std::time::Duration;

use contract::events::Event;
use contract::frame::Frame;
use contract::ids::{Bucket, Position};
use contract::log::{Actor, NewEvent, StreamName};
use contract::time::Timestamp;
use domain::members::{MemberWatch, Members};
use runtime::health::Component;
use runtime::lease;
use runtime::retry::retry_while_unavailable;
use store::{Append, Commit, CommitError, Committed, Fence, LogEntry, StoreError};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::deps::ControlDeps;

/// The name of the lease, and of the health component.
const MEMBERS: &str = "members";
/// How often due events are recorded: the longest that a new gateway waits for slots after its first
/// frame, and a new node for instances.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// Records per read of the log.
const PAGE: usize = 1000;

/// Records members whenever it holds the lease, until `shutdown`, or until this process closes the
/// store. The component is ready at once, since another replica may hold the lease. `only_node` is the
/// node in this process, if there can be no other.
pub async fn run(deps: ControlDeps, only_node: Option<String>, shutdown: CancellationToken) {
    let component = deps.health.component(MEMBERS);
    component.ready();
    // Unique per run, not only per replica: writes still in flight from a previous run must not be
    // mistaken for ours.
    let (store, holder) = (deps.store.clone(), deps.ids.uid().to_string());
    lease::hold(&store, MEMBERS, &holder, &shutdown, |fence, lost| {
        let (deps, component) = (deps.clone(), component.clone());
        let watch = MemberWatch::new(only_node.clone());
        async move {
            let recording = Box::pin(record_members(deps, component.clone(), fence, watch));
            if let Some(Err(error)) = lost.run_until_cancelled(recording).await {
                tracing::debug!(%error, "no longer recording members");
            }
            component.set_problem(None);
        }
    })
    .await;
}

/// Records members for one tenure: until cancelled, or until another process takes the lease.
async fn record_members(
    deps: ControlDeps,
    component: Component,
    fence: Fence,
    watch: MemberWatch,
) -> Result<(), StoreError> {
    let mut frames = deps.bus.subscribe_frames();
    let mut recorder = MemberRecorder {
        deps,
        component,
        fence,
        watch,
        members: Members::default(),
        read_position: Position::START,
        is_fenced: false,
        is_failing: false,
    };
    recorder.catch_up().await?;
    let mut ticks = tokio::time::interval(CHECK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !recorder.is_fenced {
        tokio::select! {
            biased;
            Some(frame) = frames.recv() => recorder.observe(&frame, &mut frames),
            _ = ticks.tick() => recorder.record_due().await?,
        }
    }
    Ok(())
}

struct MemberRecorder {
    deps: ControlDeps,
    component: Component,
    fence: Fence,
    watch: MemberWatch,
    members: Members,
    /// How far `members` has been read from the log.
    read_position: Position,
    is_fenced: bool,
    is_failing: bool,
}

impl MemberRecorder {
    fn observe(&mut self, first: &Frame, frames: &mut mpsc::Receiver<Arc<Frame>>) {
        let now = self.deps.clock.now();
        self.watch.observe(first, now);
        while let Ok(frame) = frames.try_recv() {
            self.watch.observe(&frame, now);
        }
    }

    /// Writes the events that are due. Those that cannot be written now are due again next time.
    async fn record_due(&mut self) -> Result<(), StoreError> {
        let now = self.deps.clock.now();
        let events = self.watch.due(&self.members, now);
        if events.is_empty() {
            return Ok(());
        }
        let append = Append {
            stream: StreamName::members(),
            expected_version: self.members.version,
            events: events.into_iter().map(|e| self.new_event(now, e)).collect(),
        };
        let commit = Commit {
            appends: vec![append],
            fence: Some(self.fence.clone()),
            ..Commit::default()
        };
        match self.deps.store.commit(commit).await {
            Ok(Committed::Written { records }) => {
                self.is_failing = false;
                records.iter().for_each(|record| self.members.apply(record));
            }
            Ok(Committed::Duplicate { .. }) => {}
            Err(CommitError::Conflict { .. }) => self.catch_up().await?,
            Err(CommitError::Fenced { .. }) => {
                tracing::warn!("stream of members taken over by another process");
                self.is_fenced = true;
            }
            Err(CommitError::Store(StoreError::Closed)) => return Err(StoreError::Closed),
            // Logged once per outage, not on every attempt.
            Err(error) => {
                if !std::mem::replace(&mut self.is_failing, true) {
                    tracing::warn!(%error, "cannot record members, retrying");
                }
            }
        }
        Ok(())
    }

    /// Reads the rest of the stream. Unreadable events are skipped, or no member could be recorded again.
    async fn catch_up(&mut self) -> Result<(), StoreError> {
        let stream = StreamName::members();
        loop {
            let after = self.read_position;
            let read = || {
                let store = &self.deps.store;
                store.read_bucket_entries(Bucket::GLOBAL, after, PAGE)
            };
            let page = retry_while_unavailable(&self.component, read).await?;
            let Some(last) = page.last().map(LogEntry::position) else {
                return Ok(());
            };
            self.read_position = last;
            for entry in &page {
                match entry {
                    LogEntry::Record(record) => self.members.apply(record),
                    LogEntry::Unreadable(unreadable) if unreadable.stream == stream.as_str() => {
                        let (position, detail) = (unreadable.position, &unreadable.detail);
                        tracing::error!(%position, detail, "skipping unreadable member event");
                        self.members.skip(position, unreadable.version);
                    }
                    LogEntry::Unreadable(_) => {}
                }
            }
        }
    }

    fn new_event(&self, now: Timestamp, event: Event) -> NewEvent {
        NewEvent {
            id: self.deps.ids.event_id(now),
            time: now,
            actor: Actor::service("control"),
            event,
        }
    }
}
