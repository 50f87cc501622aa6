//! Single-owner work under a lease.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use runtime::lease::hold;
use store::{Fence, Store};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

async fn open(folder: &TempDir) -> Store {
    let url = format!("sqlite:{}", folder.path().join("log.db").display());
    Store::open(&url).await.unwrap()
}

struct Worker {
    begun: mpsc::UnboundedReceiver<Fence>,
    ended: mpsc::UnboundedReceiver<()>,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

/// Works until its lease is lost.
fn worker(store: &Store, holder: &'static str) -> Worker {
    let (begun, began) = mpsc::unbounded_channel();
    let (ended, end) = mpsc::unbounded_channel();
    let (store, stop) = (store.clone(), CancellationToken::new());
    let shutdown = stop.clone();
    let task = tokio::spawn(async move {
        let (begun, ended) = (Arc::new(begun), Arc::new(ended));
        hold(&store, "relay", holder, &shutdown, |fence, lost| {
            let (begun, ended) = (begun.clone(), ended.clone());
            async move {
                begun.send(fence).unwrap();
                lost.cancelled().await;
                ended.send(()).unwrap();
            }
        })
        .await;
    });
    Worker {
        begun: began,
        ended: end,
        stop,
        task,
    }
}

#[tokio::test]
async fn one_holder_works_and_another_takes_over_under_a_higher_generation() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let mut first = worker(&store, "a");
    let before = first.begun.recv().await.unwrap();
    let mut second = worker(&store, "b");
    // While the first one holds it, nobody else can.
    let refused = store.acquire_lease("relay", "c", Duration::from_secs(5));
    assert_eq!(refused.await.unwrap(), None);
    assert!(second.begun.try_recv().is_err());
    first.stop.cancel();
    first.task.await.unwrap();
    let after = second.begun.recv().await.unwrap();
    assert!(after.generation > before.generation);
    second.stop.cancel();
    second.task.await.unwrap();
}

#[tokio::test]
async fn work_is_cancelled_when_its_lease_is_taken_and_restarts_when_reacquired() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let mut worker = worker(&store, "a");
    let before = worker.begun.recv().await.unwrap();
    store.acquire_fence("relay").await.unwrap();
    worker.ended.recv().await.unwrap();
    let after = worker.begun.recv().await.unwrap();
    assert!(after.generation > before.generation);
    worker.stop.cancel();
    worker.task.await.unwrap();
}
