//! Ownership and the head of the log, on either database: leases, fences and the watch.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use contract::ids::Position;
use store::{Commit, CommitError, Store};
use support::database::*;

const LONG: Duration = Duration::from_secs(3600);
const EXPIRED: Duration = Duration::ZERO;

async fn a_lease_has_one_holder_until_it_expires(db: TestDatabase) {
    let store = db.open().await;
    let first = store
        .acquire_lease("relay", "a", LONG)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(store.acquire_lease("relay", "b", LONG).await.unwrap(), None);
    assert!(
        store
            .acquire_lease("other", "b", LONG)
            .await
            .unwrap()
            .is_some()
    );
    // It expires immediately.
    assert!(store.renew_lease(&first, "a", EXPIRED).await.unwrap());
    let second = store
        .acquire_lease("relay", "b", LONG)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(second.generation, first.generation + 1);
    assert!(!store.renew_lease(&first, "a", LONG).await.unwrap());
    assert!(store.renew_lease(&second, "b", LONG).await.unwrap());
}

async fn a_commit_with_the_fence_of_a_lease_fails_after_a_take_over(db: TestDatabase) {
    let store = db.open().await;
    let old = store
        .acquire_lease("relay", "a", EXPIRED)
        .await
        .unwrap()
        .unwrap();
    let fenced = |fence: &store::Fence, version| Commit {
        fence: Some(fence.clone()),
        ..commit_to(stream("iris"), version, 1)
    };
    // The fence of an expired lease is valid until another holder acquires it.
    records(&store, fenced(&old, 0)).await;
    let new = store
        .acquire_lease("relay", "b", LONG)
        .await
        .unwrap()
        .unwrap();
    let refused = store.commit(fenced(&old, 1)).await.unwrap_err();
    assert!(matches!(refused, CommitError::Fenced { .. }), "{refused}");
    records(&store, fenced(&new, 1)).await;
}

async fn a_released_lease_can_be_acquired_at_once(db: TestDatabase) {
    let store = db.open().await;
    let first = store
        .acquire_lease("relay", "a", LONG)
        .await
        .unwrap()
        .unwrap();
    store.release_lease(&first).await.unwrap();
    let second = store
        .acquire_lease("relay", "b", LONG)
        .await
        .unwrap()
        .unwrap();
    // Releasing a lease that was taken over has no effect.
    store.release_lease(&first).await.unwrap();
    assert_eq!(store.acquire_lease("relay", "a", LONG).await.unwrap(), None);
    assert!(store.renew_lease(&second, "b", LONG).await.unwrap());
}

async fn a_restarted_holder_reacquires_its_lease_and_fences_its_former_self(db: TestDatabase) {
    let store = db.open().await;
    let before = store
        .acquire_lease("relay", "a", LONG)
        .await
        .unwrap()
        .unwrap();
    store.close().await;
    let store = db.open().await;
    let after = store
        .acquire_lease("relay", "a", LONG)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(after.generation, before.generation + 1);
    assert!(!store.renew_lease(&before, "a", LONG).await.unwrap());
}

async fn one_of_many_concurrent_holders_acquires_a_lease(db: TestDatabase) {
    let store = db.open().await;
    let attempts: Vec<_> = (0..20)
        .map(|n| {
            let store = store.clone();
            let holder = format!("h{n}");
            tokio::spawn(async move { store.acquire_lease("relay", &holder, LONG).await.unwrap() })
        })
        .collect();
    let mut acquired = 0;
    for attempt in attempts {
        acquired += usize::from(attempt.await.unwrap().is_some());
    }
    assert_eq!(acquired, 1);
}

async fn taking_a_fence_ends_its_lease(db: TestDatabase) {
    let store = db.open().await;
    let lease = store
        .acquire_lease("relay", "a", LONG)
        .await
        .unwrap()
        .unwrap();
    let taken = store.acquire_fence("relay").await.unwrap();
    assert_eq!(taken.generation, lease.generation + 1);
    assert!(!store.renew_lease(&lease, "a", LONG).await.unwrap());
    assert!(
        store
            .acquire_lease("relay", "b", LONG)
            .await
            .unwrap()
            .is_some()
    );
}

/// Waits until the watched head reaches this position.
async fn wait_for_head(store: &Store, position: u64) {
    let mut watch = store.head_watch();
    let reached = watch.wait_for(|head| *head >= Position(position));
    tokio::time::timeout(Duration::from_secs(30), reached)
        .await
        .expect("the head never reached the position")
        .unwrap();
}

async fn the_head_is_known_after_opening_and_follows_commits(db: TestDatabase) {
    let store = db.open().await;
    let watch = store.head_watch();
    assert_eq!(*watch.borrow(), Position::START);
    fill(&store, "iris", 3).await;
    assert_eq!(
        *watch.borrow(),
        Position(3),
        "known before the commit returns"
    );
    store.close().await;
    let store = db.open().await;
    assert_eq!(*store.head_watch().borrow(), Position(3));
}

async fn the_head_follows_other_processes_and_never_decreases(db: TestDatabase) {
    let (here, there) = (db.open().await, db.open().await);
    let mut watch = here.head_watch();
    let writing = tokio::spawn(async move {
        fill(&there, "iris", 50).await;
        there
    });
    let mut last = Position::START;
    while last < Position(50) {
        tokio::time::timeout(Duration::from_secs(30), watch.changed())
            .await
            .unwrap()
            .unwrap();
        let head = *watch.borrow_and_update();
        assert!(head > last);
        // Everything up to it can be read.
        let read = here.read_all(last, 100).await.unwrap();
        assert!(read.iter().any(|record| record.position == head));
        last = head;
    }
    writing.await.unwrap();
}

async fn the_head_is_followed_without_notifications(db: TestDatabase) {
    let store = db.open().await;
    wait_for_head(&store, 0).await;
    // Bypasses the store, so nobody is notified.
    db
        .execute_directly(
            "INSERT INTO events VALUES (1, 0, 1, 'endpoint/default/x', 1, 'x', 'x', 1, 0, 'x', '{}', '')",
        )
        .await;
    wait_for_head(&store, 1).await;
}

support::suite! {
    a_lease_has_one_holder_until_it_expires
    a_commit_with_the_fence_of_a_lease_fails_after_a_take_over
    a_released_lease_can_be_acquired_at_once
    a_restarted_holder_reacquires_its_lease_and_fences_its_former_self
    one_of_many_concurrent_holders_acquires_a_lease
    taking_a_fence_ends_its_lease
    the_head_is_known_after_opening_and_follows_commits
    @sqlite
    @postgres
    the_head_follows_other_processes_and_never_decreases
    the_head_is_followed_without_notifications
}
