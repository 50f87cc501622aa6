//! What every backend promises, run over each of them.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use backends::process::{ProcessBackend, ProcessConfig};
use backends::simulated::SimulatedBackend;
use backends::{Backend, BackendError, Observed, ObservedPhase, Order};
use contract::resources::SimulatedSpec;
use contract::time::{Span, Timestamp};
use support::Behaviour;
use tokio::sync::mpsc;

#[test]
#[ignore = "it is the server that the other tests start"]
fn the_tiny_server() {
    support::serve();
}

/// How an instance is to behave, in words that each backend has its own means for.
#[derive(Clone, Copy)]
enum Life {
    Healthy,
    /// Never gets ready before it is removed.
    Slow,
    /// Ends by itself once it is ready.
    Crashes,
}

#[async_trait]
trait Fixture: Send + Sync {
    fn backend(&self) -> Arc<dyn Backend>;
    fn order(&self, id: &str, generation: u64, life: Life) -> Order;
    /// The exit code of [`Life::Crashes`].
    fn crash_code(&self) -> i32;
    /// Lets time pass, where it does not by itself.
    async fn pass(&self);
}

struct Processes {
    backend: Arc<ProcessBackend>,
    _data: tempfile::TempDir,
}

impl Processes {
    async fn new() -> Self {
        let data = tempfile::tempdir().unwrap();
        let config = ProcessConfig::new(data.path().into(), "node-1".into(), "/".into());
        Self {
            backend: ProcessBackend::open(config).await.unwrap(),
            _data: data,
        }
    }
}

#[async_trait]
impl Fixture for Processes {
    fn backend(&self) -> Arc<dyn Backend> {
        self.backend.clone()
    }

    fn order(&self, id: &str, generation: u64, life: Life) -> Order {
        let behaviour = match life {
            Life::Healthy => Behaviour::default(),
            Life::Slow => Behaviour::default().with("START_DELAY_MS", 600_000),
            Life::Crashes => Behaviour::default()
                .with("EXIT_AFTER_MS", 500)
                .with("EXIT_CODE", 3),
        };
        support::order(id, generation, &behaviour)
    }

    fn crash_code(&self) -> i32 {
        3
    }

    async fn pass(&self) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

struct Simulation {
    backend: Arc<SimulatedBackend>,
    now: std::sync::Mutex<Timestamp>,
}

impl Simulation {
    fn new() -> Self {
        let now = Timestamp::from_secs(1_000);
        Self {
            backend: SimulatedBackend::new("node-1", now),
            now: now.into(),
        }
    }
}

#[async_trait]
impl Fixture for Simulation {
    fn backend(&self) -> Arc<dyn Backend> {
        self.backend.clone()
    }

    fn order(&self, id: &str, generation: u64, life: Life) -> Order {
        let mut order = support::order(id, generation, &Behaviour::default());
        order.spec.simulated = Some(match life {
            Life::Healthy => SimulatedSpec::default(),
            Life::Slow => SimulatedSpec {
                start_delay: Span::from_secs(1_000_000),
                ..SimulatedSpec::default()
            },
            Life::Crashes => SimulatedSpec {
                mean_time_to_failure: Span::from_secs(1),
                ..SimulatedSpec::default()
            },
        });
        order
    }

    fn crash_code(&self) -> i32 {
        134
    }

    async fn pass(&self) {
        let now = {
            let mut now = self.now.lock().unwrap();
            *now = *now + Span::from_millis(100);
            *now
        };
        self.backend.advance(now);
    }
}

/// Far more than anything takes; reached only when a test fails.
const PATIENCE: Duration = Duration::from_secs(60);

struct Watch<'a> {
    fixture: &'a dyn Fixture,
    changes: mpsc::Receiver<Observed>,
}

impl<'a> Watch<'a> {
    fn new(fixture: &'a dyn Fixture) -> Self {
        let changes = fixture.backend().watch();
        Self { fixture, changes }
    }

    async fn next(&mut self) -> Observed {
        let wait = async {
            loop {
                tokio::select! {
                    biased;
                    change = self.changes.recv() => return change.unwrap(),
                    () = self.fixture.pass() => {}
                }
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap()
    }

    async fn until(&mut self, wanted: fn(&ObservedPhase) -> bool) -> Observed {
        loop {
            let change = self.next().await;
            if wanted(&change.phase) {
                return change;
            }
        }
    }
}

fn is_ready(phase: &ObservedPhase) -> bool {
    *phase == ObservedPhase::Ready
}

fn is_removed(phase: &ObservedPhase) -> bool {
    matches!(phase, ObservedPhase::Removed { .. })
}

fn is_exited(phase: &ObservedPhase) -> bool {
    matches!(phase, ObservedPhase::Exited { .. })
}

const GRACE: Span = Span::from_secs(10);

async fn an_instance_starts_and_then_is_ready(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut watch = Watch::new(fixture);
    let order = fixture.order("a-1", 4, Life::Healthy);
    backend.ensure(order.clone()).await.unwrap();
    let first = watch.next().await;
    assert_eq!(first.phase, ObservedPhase::Starting);
    assert_eq!((&first.id, first.generation), (&order.id, 4));
    assert_eq!(first.node, "node-1");
    let second = watch.next().await;
    assert_eq!(second.phase, ObservedPhase::Ready);
    assert!(second.address.is_some() && !second.adopted);
    assert_eq!(backend.list().await.unwrap(), [second]);
    backend.remove(&order.id, 4, GRACE).await.unwrap();
    watch.until(is_removed).await;
}

async fn the_same_order_twice_is_one_instance(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut watch = Watch::new(fixture);
    let order = fixture.order("a-1", 1, Life::Healthy);
    backend.ensure(order.clone()).await.unwrap();
    backend.ensure(order.clone()).await.unwrap();
    let ready = watch.until(is_ready).await;
    backend.ensure(order.clone()).await.unwrap();
    assert_eq!(backend.list().await.unwrap(), [ready]);
    backend.remove(&order.id, 1, GRACE).await.unwrap();
    // A second start would show itself between.
    assert!(is_removed(&watch.next().await.phase));
}

async fn an_order_older_than_the_newest_is_refused(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut watch = Watch::new(fixture);
    let order = fixture.order("a-1", 5, Life::Healthy);
    backend.ensure(order.clone()).await.unwrap();
    let older = fixture.order("a-1", 4, Life::Healthy);
    let refused = backend.ensure(older).await;
    assert!(matches!(
        refused,
        Err(BackendError::Stale {
            ours: 4,
            newest: 5,
            ..
        })
    ));
    let refused = backend.remove(&order.id, 4, GRACE).await;
    assert!(matches!(
        refused,
        Err(BackendError::Stale {
            ours: 4,
            newest: 5,
            ..
        })
    ));
    watch.until(is_ready).await;
    assert_eq!(backend.list().await.unwrap().len(), 1);
    backend.remove(&order.id, 6, GRACE).await.unwrap();
    watch.until(is_removed).await;
}

async fn a_removed_instance_cannot_be_started_by_a_late_order(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut watch = Watch::new(fixture);
    let order = fixture.order("a-1", 1, Life::Healthy);
    backend.ensure(order.clone()).await.unwrap();
    watch.until(is_ready).await;
    backend.remove(&order.id, 2, GRACE).await.unwrap();
    assert_eq!(watch.until(is_removed).await.generation, 2);
    assert!(backend.list().await.unwrap().is_empty());
    for generation in [1, 2] {
        let late = fixture.order("a-1", generation, Life::Healthy);
        let refused = backend.ensure(late).await;
        assert!(matches!(
            refused,
            Err(BackendError::Stale { newest: 2, .. })
        ));
    }
    assert!(backend.list().await.unwrap().is_empty());
}

async fn a_removal_that_comes_before_its_order_wins(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut watch = Watch::new(fixture);
    let order = fixture.order("a-1", 1, Life::Healthy);
    backend.remove(&order.id, 2, GRACE).await.unwrap();
    assert!(is_removed(&watch.next().await.phase));
    let refused = backend.ensure(order).await;
    assert!(matches!(refused, Err(BackendError::Stale { .. })));
}

async fn a_removal_twice_is_told_twice(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut watch = Watch::new(fixture);
    let order = fixture.order("a-1", 1, Life::Healthy);
    backend.ensure(order.clone()).await.unwrap();
    backend.remove(&order.id, 2, GRACE).await.unwrap();
    watch.until(is_removed).await;
    backend.remove(&order.id, 2, GRACE).await.unwrap();
    assert!(is_removed(&watch.next().await.phase));
}

async fn an_instance_that_is_starting_can_be_removed(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut watch = Watch::new(fixture);
    let order = fixture.order("a-1", 1, Life::Slow);
    backend.ensure(order.clone()).await.unwrap();
    assert_eq!(watch.next().await.phase, ObservedPhase::Starting);
    backend.remove(&order.id, 2, GRACE).await.unwrap();
    assert!(is_removed(&watch.next().await.phase));
}

async fn a_crash_is_told_with_its_code_and_the_instance_stays_listed(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut watch = Watch::new(fixture);
    let order = fixture.order("a-1", 1, Life::Crashes);
    backend.ensure(order.clone()).await.unwrap();
    let exited = watch.until(is_exited).await;
    let ObservedPhase::Exited { code, reason } = &exited.phase else {
        unreachable!()
    };
    assert_eq!(*code, Some(fixture.crash_code()));
    assert!(!reason.is_empty());
    assert_eq!(backend.list().await.unwrap(), std::slice::from_ref(&exited));
    // The same order again does not start it anew, but says what became of it.
    backend.ensure(order.clone()).await.unwrap();
    assert_eq!(watch.next().await, exited);
    backend.remove(&order.id, 2, GRACE).await.unwrap();
    let code = Some(fixture.crash_code());
    assert_eq!(watch.next().await.phase, ObservedPhase::Removed { code });
    assert!(backend.list().await.unwrap().is_empty());
}

async fn a_newer_order_after_a_crash_starts_it_again(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut watch = Watch::new(fixture);
    let order = fixture.order("a-1", 1, Life::Crashes);
    backend.ensure(order.clone()).await.unwrap();
    watch.until(is_exited).await;
    let newer = fixture.order("a-1", 2, Life::Healthy);
    backend.ensure(newer).await.unwrap();
    assert_eq!(watch.until(is_ready).await.generation, 2);
    backend.remove(&order.id, 3, GRACE).await.unwrap();
    watch.until(is_removed).await;
}

async fn instances_do_not_disturb_each_other(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut watch = Watch::new(fixture);
    for id in ["a-1", "a-2"] {
        let order = fixture.order(id, 1, Life::Healthy);
        backend.ensure(order).await.unwrap();
    }
    let first = watch.until(is_ready).await;
    let second = watch.until(is_ready).await;
    assert_ne!(first.id, second.id);
    assert_ne!(first.address, second.address);
    backend.remove(&first.id, 2, GRACE).await.unwrap();
    watch.until(is_removed).await;
    assert_eq!(backend.list().await.unwrap(), std::slice::from_ref(&second));
    backend.remove(&second.id, 2, GRACE).await.unwrap();
    watch.until(is_removed).await;
}

async fn a_watcher_is_told_when_nothing_follows(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut changes = backend.watch();
    backend.release().await;
    assert_eq!(changes.recv().await, None);
}

macro_rules! conformance {
    ($($test:ident),* $(,)?) => {
        mod process {
            use super::*;
            $(#[tokio::test]
            async fn $test() {
                super::$test(&Processes::new().await).await;
            })*
        }
        mod simulated {
            use super::*;
            $(#[tokio::test]
            async fn $test() {
                super::$test(&Simulation::new()).await;
            })*
        }
    };
}

conformance! {
    an_instance_starts_and_then_is_ready,
    the_same_order_twice_is_one_instance,
    an_order_older_than_the_newest_is_refused,
    a_removed_instance_cannot_be_started_by_a_late_order,
    a_removal_that_comes_before_its_order_wins,
    a_removal_twice_is_told_twice,
    an_instance_that_is_starting_can_be_removed,
    a_crash_is_told_with_its_code_and_the_instance_stays_listed,
    a_newer_order_after_a_crash_starts_it_again,
    instances_do_not_disturb_each_other,
    a_watcher_is_told_when_nothing_follows,
}
