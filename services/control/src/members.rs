//! The single owner of the stream of members: hears the frames of gateways and nodes, and writes down
//! who has joined and who has left.
//!
//! Invariant: what is written follows from what was heard since the lease was taken, and from what
//! the stream says; a replica without the lease writes nothing.

use std::sync::Arc;
use std::time::Duration;

use contract::events::Event;
use contract::frame::Frame;
use contract::log::{Actor, NewEvent, StreamName};
use contract::time::Timestamp;
use domain::members::{MemberWatch, Members};
use store::{Append, Commit, CommitError, Committed, Fence, StoreError};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::deps::ControlDeps;

const LEASE: &str = "members";
/// A newcomer gets slots, and a node instances, this much after its first frame at the latest.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Records per read of the stream.
const PAGE: usize = 1000;

/// Runs until `shutdown`, or until the store fails for good.
pub async fn run(deps: ControlDeps, shutdown: CancellationToken) -> Result<(), StoreError> {
    while !shutdown.is_cancelled() {
        // Raises the lease's generation, so that a former owner can write no more.
        let fence = deps.store.take(LEASE).await?;
        own(deps.clone(), fence, shutdown.clone()).await?;
    }
    Ok(())
}

/// The owner's work: until `stop`, or until somebody else holds the lease.
async fn own(deps: ControlDeps, fence: Fence, stop: CancellationToken) -> Result<(), StoreError> {
    let mut frames = deps.bus.subscribe_frames();
    let mut owner = Owner {
        deps,
        fence,
        watch: MemberWatch::default(),
        members: Members::default(),
        fenced: false,
    };
    owner.read_on().await?;
    let mut looks = tokio::time::interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !owner.fenced {
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(frame) = frames.recv() => owner.observe(&frame, &mut frames),
            _ = looks.tick() => owner.look().await?,
        }
    }
    Ok(())
}

struct Owner {
    deps: ControlDeps,
    fence: Fence,
    watch: MemberWatch,
    members: Members,
    fenced: bool,
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
                records.iter().for_each(|record| self.members.apply(record));
            }
            Ok(Committed::Before { .. }) => {}
            Err(CommitError::Conflict { .. }) => self.read_on().await?,
            Err(CommitError::Fenced { .. }) => {
                tracing::warn!("the stream of members was taken over by another process");
                self.fenced = true;
            }
            Err(CommitError::Store(StoreError::Closed)) => return Err(StoreError::Closed),
            Err(error) => {
                tracing::warn!(%error, "who joined or left cannot be recorded, trying again");
            }
        }
        Ok(())
    }

    async fn read_on(&mut self) -> Result<(), StoreError> {
        let stream = StreamName::members();
        loop {
            let version = self.members.version;
            let records = self.deps.store.read_stream(&stream, version, PAGE).await?;
            if records.is_empty() {
                return Ok(());
            }
            records.iter().for_each(|record| self.members.apply(record));
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
