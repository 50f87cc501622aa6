//! Carries what is committed from the store to the bus, in order of position.
//!
//! Within one process, commits go straight to the bus ([`run`]). For a bus that outlives processes,
//! one of them at a time reads the store and publishes ([`run_durable`]): the cursor moves, under the
//! lease's fence, when the bus has confirmed, so that nothing is left out; what was published before
//! a crash and after the last move is published once more.
//!
//! The bus may lose or repeat what it was given: a [`Feed`](crate::feed::Feed) finds it in the store,
//! and drops what it has had.

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use bus::Bus;
use contract::ids::{Bucket, Position};
use contract::log::RawRecord;
use prometheus_client::metrics::gauge::Gauge;
use store::{Commit, CommitError, CursorMove, Fence, Store, StoreError};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::health::Component;
use crate::lease;
use crate::metrics::Metrics;
use crate::retry::until_answered;

/// The lease, the consumer of the cursor, and the component of health.
pub const RELAY: &str = "relay";

/// Most events that are handed to the bus at once. All of them are confirmed before the next are sent,
/// so a backlog drains the quicker the more there are.
const PAGE: usize = 4000;

/// Without a word from the store it is looked into after this time.
const RECHECK_EVERY: Duration = Duration::from_secs(1);

/// After the bus has refused: doubled each time, up to the longest.
const PAUSES: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_millis(100))
    .with_max_delay(Duration::from_secs(5))
    .without_max_times();

/// Publishes every commit made after this call, until the store is closed or `shutdown` is
/// cancelled; what was committed by then is published first.
pub fn run(
    store: Store,
    bus: Arc<dyn Bus>,
    shutdown: CancellationToken,
) -> impl Future<Output = ()> + Send + use<> {
    // Subscribed here and not when the future first runs, so that no commit falls in between.
    let mut committed = store.committed();
    // A handle kept here would keep the store open.
    drop(store);
    async move {
        loop {
            tokio::select! {
                biased;
                records = committed.recv() => match records {
                    Some(records) => {
                        if let Err(error) = bus.publish_records(&records).await {
                            tracing::warn!(%error, "feeds will find it in the store");
                        }
                    }
                    None => return,
                },
                () = shutdown.cancelled() => return,
            }
        }
    }
}

/// What the durable relay works with.
#[derive(Clone)]
pub struct RelayDeps {
    /// Whose log is published.
    pub store: Store,
    /// Where it is published.
    pub bus: Arc<dyn Bus>,
    /// Names this process among those that may hold the lease; never the same for two.
    pub holder: String,
    /// Readiness says here what cannot be reached.
    pub component: Component,
    /// Where its counts are registered.
    pub metrics: Metrics,
}

/// Publishes the log from where the cursor stands whenever this process holds the lease, until
/// `shutdown`. Ready at once: another process may be the one that publishes.
pub async fn run_durable(deps: RelayDeps, shutdown: CancellationToken) {
    let lag = Gauge::<i64>::default();
    deps.metrics.register(|registry| {
        registry.register(
            "penstock_relay_lag_events",
            "Positions of the log that are not confirmed by the bus yet, told by the process that publishes",
            lag.clone(),
        );
    });
    deps.component.ready();
    let (store, holder) = (deps.store.clone(), deps.holder.clone());
    lease::hold(&store, RELAY, &holder, &shutdown, |fence, lost| {
        let relay = Relay {
            deps: deps.clone(),
            fence,
            lost,
            lag: lag.clone(),
            published: Position::START,
            confirming: None,
        };
        Box::pin(relay.run())
    })
    .await;
    deps.component.trouble(None);
    lag.set(0);
}

/// One tenure.
struct Relay {
    deps: RelayDeps,
    fence: Fence,
    lost: CancellationToken,
    lag: Gauge<i64>,
    /// Everything up to here has been confirmed by the bus.
    published: Position,
    /// The move of the cursor that is under way.
    confirming: Option<JoinHandle<Result<(), MoveError>>>,
}

/// Why the cursor does not move, and the tenure ends.
#[derive(Debug, thiserror::Error)]
enum MoveError {
    #[error("somebody else publishes: {0}")]
    NotOurs(CommitError),
    #[error(transparent)]
    Store(StoreError),
}

impl Relay {
    async fn run(mut self) {
        let lost = self.lost.clone();
        let ended = tokio::select! {
            biased;
            () = lost.cancelled() => Ok(()),
            ended = self.publish_all() => ended,
        };
        // What the bus has confirmed need not be published again by the next one.
        let confirmed = self.confirmed().await;
        self.lag.set(0);
        self.deps.component.trouble(None);
        if let Err(error) = ended.and(confirmed) {
            tracing::warn!(%error, "the relay gives way");
        }
    }

    async fn publish_all(&mut self) -> Result<(), MoveError> {
        let mut head = self.deps.store.head_watch();
        let (store, component) = (self.deps.store.clone(), self.deps.component.clone());
        let mut cursor = until_answered(&component, || store.cursor(RELAY, Bucket::GLOBAL))
            .await
            .map_err(MoveError::Store)?;
        self.published = cursor;
        let mut ahead = None;
        loop {
            let page = match ahead.take() {
                Some(page) => page,
                None => read(&store, &component, self.published).await?,
            };
            let Some(last) = page.last().map(|event| event.position) else {
                self.lag.set(0);
                self.wait(&mut head).await;
                continue;
            };
            self.show_lag(&head, last);
            // Where there is more, it is read while the bus confirms.
            let is_full = page.len() == PAGE;
            let next = async {
                match is_full {
                    true => read(&store, &component, last).await.map(Some),
                    false => Ok(None),
                }
            };
            let ((), next) = tokio::join!(self.publish(&page), next);
            self.published = last;
            // One move at a time, beside the publishing of the next page.
            self.confirmed().await?;
            self.confirming = Some(tokio::spawn(move_cursor(
                self.deps.clone(),
                self.fence.clone(),
                cursor,
                last,
                self.lost.clone(),
            )));
            cursor = last;
            ahead = next?;
        }
    }

    /// Waits for the store to have more; what was confirmed is written down meanwhile.
    async fn wait(&self, head: &mut watch::Receiver<Position>) {
        tokio::select! {
            changed = head.changed() => if changed.is_err() {
                // The store's watch has ended: look into it from time to time.
                sleep(RECHECK_EVERY).await;
            },
            () = sleep(RECHECK_EVERY) => {}
        }
    }

    fn show_lag(&self, head: &watch::Receiver<Position>, last: Position) {
        let head = head.borrow().max(last);
        self.lag.set(head.0.saturating_sub(self.published.0) as i64);
    }

    /// Hands a page to the bus until the bus has confirmed it.
    async fn publish(&self, page: &[RawRecord]) {
        let head = self.deps.store.head_watch();
        let mut troubled = false;
        for pause in PAUSES.build() {
            let Err(error) = self.deps.bus.publish_stored(page).await else {
                break;
            };
            if !troubled {
                tracing::warn!(%error, "the bus does not take records, trying again");
            }
            troubled = true;
            let trouble = format!("the bus cannot be reached: {error}");
            self.deps.component.trouble(Some(trouble));
            self.show_lag(&head, self.published);
            sleep(pause).await;
        }
        if troubled {
            self.deps.component.trouble(None);
        }
    }

    /// The move that is under way has been made.
    async fn confirmed(&mut self) -> Result<(), MoveError> {
        let Some(confirming) = self.confirming.take() else {
            return Ok(());
        };
        match confirming.await {
            Ok(moved) => moved,
            Err(error) => Err(MoveError::Store(StoreError::Database(error.to_string()))),
        }
    }
}

/// The next events, as the log has them: a newer release may have written what this one would lose.
async fn read(
    store: &Store,
    component: &Component,
    after: Position,
) -> Result<Vec<RawRecord>, MoveError> {
    until_answered(component, || store.read_raw(after, PAGE))
        .await
        .map_err(MoveError::Store)
}

async fn move_cursor(
    deps: RelayDeps,
    fence: Fence,
    from: Position,
    to: Position,
    lost: CancellationToken,
) -> Result<(), MoveError> {
    let cursor = CursorMove {
        consumer: RELAY,
        bucket: Bucket::GLOBAL,
        from,
        to,
    };
    let moving = async || {
        let commit = Commit {
            cursor: Some(cursor.clone()),
            fence: Some(fence.clone()),
            ..Commit::default()
        };
        match deps.store.commit(commit).await {
            Ok(_) => Ok(Ok(())),
            Err(CommitError::Store(error)) => Err(error),
            Err(error) => Ok(Err(error)),
        }
    };
    let mut tried = false;
    let answered = until_answered(&deps.component, || {
        let again = std::mem::replace(&mut tried, true);
        let moving = moving();
        let reached = deps.store.cursor(RELAY, Bucket::GLOBAL);
        async move {
            // A move whose answer was lost may have been made.
            if again && reached.await? == to {
                return Ok(Ok(()));
            }
            moving.await
        }
    });
    tokio::select! {
        moved = answered => moved.map_err(MoveError::Store)?.map_err(MoveError::NotOurs),
        // A try that hangs must not hold up the end of the tenure.
        () = async { lost.cancelled().await; sleep(RECHECK_EVERY).await } => Ok(()),
    }
}
