//! The relay: publishes commits from the store on the bus, in order of position.
//!
//! Within one process, commits go straight to the bus ([`run`]). For a bus that outlives processes,
//! one process at a time reads the store and publishes ([`run_durable`]): the cursor moves, under
//! the lease's fence, once the bus has confirmed, so nothing is left out. What was published after
//! the last move before a crash is published again.
//!
//! The bus may lose or repeat records: a [`Feed`](crate::feed::Feed) finds lost ones in the store,
//! and drops repeats.

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
use crate::retry::retry_while_unavailable;

/// The name of the lease, of the cursor's consumer, and of the health component.
pub const RELAY: &str = "relay";

/// The most events handed to the bus at once. All of them must be confirmed before the next are
/// sent, so larger pages drain a backlog faster.
const PAGE: usize = 4000;

/// How often to check the store without a notification.
const RECHECK_EVERY: Duration = Duration::from_secs(1);

/// The pauses after the bus refused records.
const BACKOFF: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_millis(100))
    .with_max_delay(Duration::from_secs(5))
    .without_max_times();

/// Publishes every commit made after this call, until the store is closed or `shutdown` is
/// cancelled; commits made by then are published first.
pub fn run(
    store: Store,
    bus: Arc<dyn Bus>,
    shutdown: CancellationToken,
) -> impl Future<Output = ()> + Send + use<> {
    // Subscribe here and not when the future first runs, so that no commit is missed in between.
    let mut committed = store.subscribe();
    // Keeping a handle would keep the store open.
    drop(store);
    async move {
        loop {
            tokio::select! {
                biased;
                records = committed.recv() => match records {
                    Some(records) => {
                        if let Err(error) = bus.publish_records(&records).await {
                            tracing::warn!(%error, "failed to publish records, feeds will read them from the store");
                        }
                    }
                    None => return,
                },
                () = shutdown.cancelled() => return,
            }
        }
    }
}

/// Dependencies of the durable relay.
#[derive(Clone)]
pub struct RelayDeps {
    /// The store whose log is published.
    pub store: Store,
    /// The bus on which it is published.
    pub bus: Arc<dyn Bus>,
    /// The unique name of this process as a holder of the lease.
    pub holder: String,
    /// Reports to readiness what cannot be reached.
    pub component: Component,
    /// Where its metrics are registered.
    pub metrics: Metrics,
}

/// Publishes the log from the cursor on, whenever this process holds the lease, until `shutdown`.
/// Ready at once, since another process may be the publisher.
pub async fn run_durable(deps: RelayDeps, shutdown: CancellationToken) {
    let lag = Gauge::<i64>::default();
    deps.metrics.register(|registry| {
        registry.register(
            "penstock_relay_lag_events",
            "Positions of the log not yet confirmed by the bus, reported by the publishing process",
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
            cursor_move: None,
        };
        Box::pin(relay.run())
    })
    .await;
    deps.component.set_problem(None);
    lag.set(0);
}

/// The relay while it holds the lease.
struct Relay {
    deps: RelayDeps,
    fence: Fence,
    lost: CancellationToken,
    lag: Gauge<i64>,
    /// Everything up to here has been confirmed by the bus.
    published: Position,
    /// The cursor move in progress.
    cursor_move: Option<JoinHandle<Result<(), CursorMoveError>>>,
}

/// Why the cursor cannot be moved, which ends the tenure.
#[derive(Debug, thiserror::Error)]
enum CursorMoveError {
    #[error("another process publishes: {0}")]
    Superseded(CommitError),
    #[error(transparent)]
    Store(StoreError),
}

impl Relay {
    async fn run(mut self) {
        let lost = self.lost.clone();
        let result = tokio::select! {
            biased;
            () = lost.cancelled() => Ok(()),
            result = self.publish_all() => result,
        };
        // Finish the move, so that the next holder does not publish confirmed events again.
        let moved = self.finish_cursor_move().await;
        self.lag.set(0);
        self.deps.component.set_problem(None);
        if let Err(error) = result.and(moved) {
            tracing::warn!(%error, "relay stopped, releasing the lease");
        }
    }

    async fn publish_all(&mut self) -> Result<(), CursorMoveError> {
        let mut head = self.deps.store.head_watch();
        let (store, component) = (self.deps.store.clone(), self.deps.component.clone());
        let mut cursor =
            retry_while_unavailable(&component, || store.cursor(RELAY, Bucket::GLOBAL))
                .await
                .map_err(CursorMoveError::Store)?;
        self.published = cursor;
        let mut prefetched = None;
        loop {
            let page = match prefetched.take() {
                Some(page) => page,
                None => read_page(&store, &component, self.published).await?,
            };
            let Some(last) = page.last().map(|event| event.position) else {
                self.lag.set(0);
                self.wait(&mut head).await;
                continue;
            };
            self.update_lag(&head, last);
            // Prefetch the next page while the bus confirms this one.
            let is_full = page.len() == PAGE;
            let next = async {
                match is_full {
                    true => read_page(&store, &component, last).await.map(Some),
                    false => Ok(None),
                }
            };
            let ((), next) = tokio::join!(self.publish(&page), next);
            self.published = last;
            // One move at a time, concurrently with publishing the next page.
            self.finish_cursor_move().await?;
            self.cursor_move = Some(tokio::spawn(move_cursor(
                self.deps.clone(),
                self.fence.clone(),
                cursor,
                last,
                self.lost.clone(),
            )));
            cursor = last;
            prefetched = next?;
        }
    }

    /// Waits for new events in the store; a cursor move may finish meanwhile.
    async fn wait(&self, head: &mut watch::Receiver<Position>) {
        tokio::select! {
            changed = head.changed() => if changed.is_err() {
                // The store's watch has ended: poll instead.
                sleep(RECHECK_EVERY).await;
            },
            () = sleep(RECHECK_EVERY) => {}
        }
    }

    fn update_lag(&self, head: &watch::Receiver<Position>, last: Position) {
        let head = head.borrow().max(last);
        self.lag.set(head.0.saturating_sub(self.published.0) as i64);
    }

    /// Publishes a page, retrying until the bus has confirmed it.
    async fn publish(&self, page: &[RawRecord]) {
        let head = self.deps.store.head_watch();
        let mut is_failing = false;
        for pause in BACKOFF.build() {
            let Err(error) = self.deps.bus.publish_stored(page).await else {
                break;
            };
            if !is_failing {
                tracing::warn!(%error, "failed to publish records, retrying");
            }
            is_failing = true;
            let problem = format!("the bus cannot be reached: {error}");
            self.deps.component.set_problem(Some(problem));
            self.update_lag(&head, self.published);
            sleep(pause).await;
        }
        if is_failing {
            self.deps.component.set_problem(None);
        }
    }

    /// Waits for the cursor move in progress, if any.
    async fn finish_cursor_move(&mut self) -> Result<(), CursorMoveError> {
        let Some(cursor_move) = self.cursor_move.take() else {
            return Ok(());
        };
        match cursor_move.await {
            Ok(moved) => moved,
            Err(error) => Err(CursorMoveError::Store(
                StoreError::database(error.to_string()).caused_by(error),
            )),
        }
    }
}

/// Reads the next events as stored: decoding would lose what a newer release has written.
async fn read_page(
    store: &Store,
    component: &Component,
    after: Position,
) -> Result<Vec<RawRecord>, CursorMoveError> {
    retry_while_unavailable(component, || store.read_raw(after, PAGE))
        .await
        .map_err(CursorMoveError::Store)
}

async fn move_cursor(
    deps: RelayDeps,
    fence: Fence,
    from: Position,
    to: Position,
    lost: CancellationToken,
) -> Result<(), CursorMoveError> {
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
    let mut has_tried = false;
    let answered = retry_while_unavailable(&deps.component, || {
        let is_retry = std::mem::replace(&mut has_tried, true);
        let moving = moving();
        let current = deps.store.cursor(RELAY, Bucket::GLOBAL);
        async move {
            // A move whose reply was lost may have been committed.
            if is_retry && current.await? == to {
                return Ok(Ok(()));
            }
            moving.await
        }
    });
    tokio::select! {
        moved = answered => moved.map_err(CursorMoveError::Store)?.map_err(CursorMoveError::Superseded),
        // A hanging attempt must not delay the end of the tenure.
        () = async { lost.cancelled().await; sleep(RECHECK_EVERY).await } => Ok(()),
    }
}
