//! The single owner of the stream of members: hears the frames of gateways and nodes, and writes down
//! who has joined and who has left. One replica at a time does it, under a lease; the others wait
//! for it.
//!
//! Invariant: what is written follows from what was heard since the lease was acquired, and from what
//! the stream says; a replica without the lease writes nothing. Outages of the store end nothing.

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
use runtime::retry::until_answered;
use store::{Append, Commit, CommitError, Committed, Entry, Fence, StoreError};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::deps::ControlDeps;

/// The lease, and the component of health.
const MEMBERS: &str = "members";
/// A newcomer gets slots, and a node instances, this much after its first frame at the latest.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Records per read of the log.
const PAGE: usize = 1000;

/// Works whenever it holds the lease, until `shutdown`, or until this process closes the store.
/// Ready at once: another replica may be the one that does it.
pub async fn run(deps: ControlDeps, shutdown: CancellationToken) {
    let component = deps.health.component(MEMBERS);
    component.ready();
    // Never the same for two, also not for two lives of one replica: what a former life still has
    // in flight must not pass for ours.
    let (store, holder) = (deps.store.clone(), deps.ids.uid().to_string());
    lease::hold(&store, MEMBERS, &holder, &shutdown, |fence, lost| {
        let (deps, component) = (deps.clone(), component.clone());
        async move {
            let owning = Box::pin(own(deps, component.clone(), fence));
            if let Some(Err(error)) = lost.run_until_cancelled(owning).await {
                tracing::debug!(%error, "who joins and leaves is not recorded any more");
            }
            component.trouble(None);
        }
    })
    .await;
}

/// One tenure, until it is cancelled, or until somebody else holds the lease.
async fn own(deps: ControlDeps, component: Component, fence: Fence) -> Result<(), StoreError> {
    let mut frames = deps.bus.subscribe_frames();
    let mut owner = Owner {
        deps,
        component,
        fence,
        watch: MemberWatch::default(),
        members: Members::default(),
        read_to: Position::START,
        fenced: false,
        writes_fail: false,
    };
    owner.read_on().await?;
    let mut looks = tokio::time::interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !owner.fenced {
        tokio::select! {
            biased;
            Some(frame) = frames.recv() => owner.observe(&frame, &mut frames),
            _ = looks.tick() => owner.look().await?,
        }
    }
    Ok(())
}

struct Owner {
    deps: ControlDeps,
    component: Component,
    fence: Fence,
    watch: MemberWatch,
    members: Members,
    /// How far the log has been read for it.
    read_to: Position,
    fenced: bool,
    writes_fail: bool,
}

impl Owner {
    fn observe(&mut self, first: &Frame, frames: &mut mpsc::Receiver<Arc<Frame>>) {
        let now = self.deps.clock.now();
        self.watch.observe(first, now);
        while let Ok(frame) = frames.try_recv() {
            self.watch.observe(&frame, now);
        }
    }

    /// Writes what is due. What cannot be written now is due again the next time.
    async fn look(&mut self) -> Result<(), StoreError> {
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
            Ok(Committed::Now { records }) => {
                self.writes_fail = false;
                records.iter().for_each(|record| self.members.apply(record));
            }
            Ok(Committed::Before { .. }) => {}
            Err(CommitError::Conflict { .. }) => self.read_on().await?,
            Err(CommitError::Fenced { .. }) => {
                tracing::warn!("the stream of members was taken over by another process");
                self.fenced = true;
            }
            Err(CommitError::Store(StoreError::Closed)) => return Err(StoreError::Closed),
            // Once for an outage, not once for each look.
            Err(error) => {
                if !std::mem::replace(&mut self.writes_fail, true) {
                    tracing::warn!(%error, "who joined or left cannot be recorded, trying again");
                }
            }
        }
        Ok(())
    }

    /// An event that cannot be read is passed over, or nobody would be recorded any more.
    async fn read_on(&mut self) -> Result<(), StoreError> {
        let stream = StreamName::members();
        loop {
            let after = self.read_to;
            let read = || {
                let store = &self.deps.store;
                store.read_bucket_entries(Bucket::GLOBAL, after, PAGE)
            };
            let page = until_answered(&self.component, read).await?;
            let Some(last) = page.last().map(Entry::position) else {
                return Ok(());
            };
            self.read_to = last;
            for entry in &page {
                match entry {
                    Entry::Record(record) => self.members.apply(record),
                    Entry::Unreadable(unreadable) if unreadable.stream == stream.as_str() => {
                        let (position, detail) = (unreadable.position, &unreadable.detail);
                        tracing::error!(%position, detail, "an event about a member cannot be read, and is passed over");
                        self.members.pass_over(position, unreadable.version);
                    }
                    Entry::Unreadable(_) => {}
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
