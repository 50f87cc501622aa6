//! Ownership and the head of the log, on either database: leases, fences and the watch.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use contract::ids::Position;
use store::{Commit, CommitError, Store};
use support::place::*;

const LONG: Duration = Duration::from_secs(3600);
const OVER: Duration = Duration::ZERO;

async fn a_lease_is_given_to_one_holder_until_it_ends(place: Place) {
    let store = place.open().await;
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
    // Nothing is left of it: it ends now.
    assert!(store.renew_lease(&first, "a", OVER).await.unwrap());
    let second = store
        .acquire_lease("relay", "b", LONG)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(second.generation, first.generation + 1);
    assert!(!store.renew_lease(&first, "a", LONG).await.unwrap());
    assert!(store.renew_lease(&second, "b", LONG).await.unwrap());
}

async fn a_commit_with_the_fence_of_a_lease_fails_after_a_take_over(place: Place) {
    let store = place.open().await;
    let old = store
        .acquire_lease("relay", "a", OVER)
        .await
        .unwrap()
        .unwrap();
    let fenced = |fence: &store::Fence, version| Commit {
        fence: Some(fence.clone()),
        ..commit_to(stream("iris"), version, 1)
    };
    // A lease that has ended still counts while nobody else has it.
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

async fn a_released_lease_can_be_had_at_once(place: Place) {
    let store = place.open().await;
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
    // Too late to let go of what is somebody else's.
    store.release_lease(&first).await.unwrap();
    assert_eq!(store.acquire_lease("relay", "a", LONG).await.unwrap(), None);
    assert!(store.renew_lease(&second, "b", LONG).await.unwrap());
}

async fn a_holder_that_has_lost_its_memory_acquires_again_and_fences_itself(place: Place) {
    let store = place.open().await;
    let before = store
        .acquire_lease("relay", "a", LONG)
        .await
        .unwrap()
        .unwrap();
    store.close().await;
    let store = place.open().await;
    let after = store
        .acquire_lease("relay", "a", LONG)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(after.generation, before.generation + 1);
    assert!(!store.renew_lease(&before, "a", LONG).await.unwrap());
}

async fn of_many_that_want_a_lease_one_gets_it(place: Place) {
    let store = place.open().await;
    let attempts: Vec<_> = (0..20)
        .map(|n| {
            let store = store.clone();
            let holder = format!("h{n}");
            tokio::spawn(async move { store.acquire_lease("relay", &holder, LONG).await.unwrap() })
        })
        .collect();
    let mut got = 0;
    for attempt in attempts {
        got += usize::from(attempt.await.unwrap().is_some());
    }
    assert_eq!(got, 1);
}

async fn who_takes_ends_the_lease(place: Place) {
    let store = place.open().await;
    let lease = store
        .acquire_lease("relay", "a", LONG)
        .await
        .unwrap()
        .unwrap();
    let taken = store.take("relay").await.unwrap();
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

/// Waits until the watch shows at least this.
async fn reaches(store: &Store, position: u64) {
    let mut watch = store.head_watch();
    let reached = watch.wait_for(|head| *head >= Position(position));
    tokio::time::timeout(Duration::from_secs(30), reached)
        .await
        .expect("the watch never came so far")
        .unwrap();
}

async fn the_head_is_known_after_opening_and_follows_commits(place: Place) {
    let store = place.open().await;
    let watch = store.head_watch();
    assert_eq!(*watch.borrow(), Position::START);
    fill(&store, "iris", 3).await;
    assert_eq!(*watch.borrow(), Position(3), "known before the committer");
    store.close().await;
    let store = place.open().await;
    assert_eq!(*store.head_watch().borrow(), Position(3));
}

async fn the_head_shows_what_other_processes_commit_and_never_goes_back(place: Place) {
    let (here, there) = (place.open().await, place.open().await);
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
        // All below it can be read.
        let read = here.read_all(last, 100).await.unwrap();
        assert!(read.iter().any(|record| record.position == head));
        last = head;
    }
    writing.await.unwrap();
}

async fn the_head_is_followed_also_where_nobody_tells(place: Place) {
    let store = place.open().await;
    reaches(&store, 0).await;
    // Written past the store: nobody is told of it.
    place
        .behind_its_back(
            "INSERT INTO events VALUES (1, 0, 1, 'endpoint/default/x', 1, 'x', 'x', 1, 0, 'x', '{}', '')",
        )
        .await;
    reaches(&store, 1).await;
}

support::suite! {
    a_lease_is_given_to_one_holder_until_it_ends
    a_commit_with_the_fence_of_a_lease_fails_after_a_take_over
    a_released_lease_can_be_had_at_once
    a_holder_that_has_lost_its_memory_acquires_again_and_fences_itself
    of_many_that_want_a_lease_one_gets_it
    who_takes_ends_the_lease
    the_head_is_known_after_opening_and_follows_commits
    @sqlite
    @postgres
    the_head_shows_what_other_processes_commit_and_never_goes_back
    the_head_is_followed_also_where_nobody_tells
}
