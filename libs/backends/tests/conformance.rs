//! The contract of [`Backend`], tested against every backend.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use backends::process::{ProcessBackend, ProcessConfig};
use backends::simulated::SimulatedBackend;
use backends::{Backend, BackendError, ObservedInstance, ObservedPhase, StartSpec};
use contract::resources::SimulatedSpec;
use contract::time::{Span, Timestamp};
use support::Behaviour;
use tokio::sync::mpsc;

#[test]
#[ignore = "the server that other tests start"]
fn the_tiny_server() {
    support::serve();
}

/// How an instance behaves; each fixture implements it in its own way.
#[derive(Clone, Copy)]
enum Scenario {
    Healthy,
    /// Does not become ready before it is removed.
    Slow,
    /// Exits by itself once it is ready.
    Crashes,
}

#[async_trait]
trait Fixture: Send + Sync {
    fn backend(&self) -> Arc<dyn Backend>;
    fn start_spec(&self, id: &str, generation: u64, scenario: Scenario) -> StartSpec;
    /// The exit code of [`Scenario::Crashes`].
    fn crash_code(&self) -> i32;
    /// Advances time, where it does not pass by itself.
    async fn advance(&self);
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

    fn start_spec(&self, id: &str, generation: u64, scenario: Scenario) -> StartSpec {
        let behaviour = match scenario {
            Scenario::Healthy => Behaviour::default(),
            Scenario::Slow => Behaviour::default().with("START_DELAY_MS", 600_000),
            Scenario::Crashes => Behaviour::default()
                .with("EXIT_AFTER_MS", 500)
                .with("EXIT_CODE", 3),
        };
        support::start_spec(id, generation, &behaviour)
    }

    fn crash_code(&self) -> i32 {
        3
    }

    async fn advance(&self) {
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

    fn start_spec(&self, id: &str, generation: u64, scenario: Scenario) -> StartSpec {
        let mut start = support::start_spec(id, generation, &Behaviour::default());
        start.spec.simulated = Some(match scenario {
            Scenario::Healthy => SimulatedSpec::default(),
            Scenario::Slow => SimulatedSpec {
                start_delay: Span::from_secs(1_000_000),
                ..SimulatedSpec::default()
            },
            Scenario::Crashes => SimulatedSpec {
                mean_time_to_failure: Span::from_secs(1),
                ..SimulatedSpec::default()
            },
        });
        start
    }

    fn crash_code(&self) -> i32 {
        134
    }

    async fn advance(&self) {
        let now = {
            let mut now = self.now.lock().unwrap();
            *now = *now + Span::from_millis(100);
            *now
        };
        self.backend.advance(now);
    }
}

/// Far longer than anything takes; reached only if a test fails.
const TIMEOUT: Duration = Duration::from_secs(60);

struct Watch<'a> {
    fixture: &'a dyn Fixture,
    changes: mpsc::Receiver<ObservedInstance>,
}

impl<'a> Watch<'a> {
    fn new(fixture: &'a dyn Fixture) -> Self {
        let changes = fixture.backend().watch();
        Self { fixture, changes }
    }

    async fn next(&mut self) -> ObservedInstance {
        let wait = async {
            loop {
                tokio::select! {
                    biased;
                    change = self.changes.recv() => return change.unwrap(),
                    () = self.fixture.advance() => {}
                }
            }
        };
        tokio::time::timeout(TIMEOUT, wait).await.unwrap()
    }

    async fn until(&mut self, predicate: fn(&ObservedPhase) -> bool) -> ObservedInstance {
        loop {
            let change = self.next().await;
            if predicate(&change.phase) {
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
    let start = fixture.start_spec("a-1", 4, Scenario::Healthy);
    backend.ensure(start.clone()).await.unwrap();
    let first = watch.next().await;
    assert_eq!(first.phase, ObservedPhase::Starting);
    assert_eq!((&first.id, first.generation), (&start.id, 4));
    assert_eq!(first.node, "node-1");
    let second = watch.next().await;
    assert_eq!(second.phase, ObservedPhase::Ready);
    assert!(second.address.is_some() && !second.adopted);
    assert_eq!(backend.list().await.unwrap(), [second]);
    backend.remove(&start.id, 4, GRACE).await.unwrap();
    watch.until(is_removed).await;
}

async fn the_same_start_twice_is_one_instance(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut watch = Watch::new(fixture);
    let start = fixture.start_spec("a-1", 1, Scenario::Healthy);
    backend.ensure(start.clone()).await.unwrap();
    backend.ensure(start.clone()).await.unwrap();
    let ready = watch.until(is_ready).await;
    backend.ensure(start.clone()).await.unwrap();
    assert_eq!(backend.list().await.unwrap(), [ready]);
    backend.remove(&start.id, 1, GRACE).await.unwrap();
    // A second start would be observed in between.
    assert!(is_removed(&watch.next().await.phase));
}

async fn a_request_older_than_the_newest_is_refused(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut watch = Watch::new(fixture);
    let start = fixture.start_spec("a-1", 5, Scenario::Healthy);
    backend.ensure(start.clone()).await.unwrap();
    let older = fixture.start_spec("a-1", 4, Scenario::Healthy);
    let refused = backend.ensure(older).await;
    assert!(matches!(
        refused,
        Err(BackendError::Stale {
            requested: 4,
            newest: 5,
            ..
        })
    ));
    let refused = backend.remove(&start.id, 4, GRACE).await;
    assert!(matches!(
        refused,
        Err(BackendError::Stale {
            requested: 4,
            newest: 5,
            ..
        })
    ));
    watch.until(is_ready).await;
    assert_eq!(backend.list().await.unwrap().len(), 1);
    backend.remove(&start.id, 6, GRACE).await.unwrap();
    watch.until(is_removed).await;
}

async fn a_removed_instance_cannot_be_started_by_a_late_request(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut watch = Watch::new(fixture);
    let start = fixture.start_spec("a-1", 1, Scenario::Healthy);
    backend.ensure(start.clone()).await.unwrap();
    watch.until(is_ready).await;
    backend.remove(&start.id, 2, GRACE).await.unwrap();
    assert_eq!(watch.until(is_removed).await.generation, 2);
    assert!(backend.list().await.unwrap().is_empty());
    for generation in [1, 2] {
        let late = fixture.start_spec("a-1", generation, Scenario::Healthy);
        let refused = backend.ensure(late).await;
        assert!(matches!(
            refused,
            Err(BackendError::Stale { newest: 2, .. })
        ));
    }
    assert!(backend.list().await.unwrap().is_empty());
}

async fn a_removal_that_precedes_the_start_wins(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut watch = Watch::new(fixture);
    let start = fixture.start_spec("a-1", 1, Scenario::Healthy);
    backend.remove(&start.id, 2, GRACE).await.unwrap();
    assert!(is_removed(&watch.next().await.phase));
    let refused = backend.ensure(start).await;
    assert!(matches!(refused, Err(BackendError::Stale { .. })));
}

async fn a_repeated_removal_is_reported_again(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut watch = Watch::new(fixture);
    let start = fixture.start_spec("a-1", 1, Scenario::Healthy);
    backend.ensure(start.clone()).await.unwrap();
    backend.remove(&start.id, 2, GRACE).await.unwrap();
    watch.until(is_removed).await;
    backend.remove(&start.id, 2, GRACE).await.unwrap();
    assert!(is_removed(&watch.next().await.phase));
}

async fn an_instance_that_is_starting_can_be_removed(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut watch = Watch::new(fixture);
    let start = fixture.start_spec("a-1", 1, Scenario::Slow);
    backend.ensure(start.clone()).await.unwrap();
    assert_eq!(watch.next().await.phase, ObservedPhase::Starting);
    backend.remove(&start.id, 2, GRACE).await.unwrap();
    assert!(is_removed(&watch.next().await.phase));
}

async fn a_crash_is_reported_with_its_code_and_the_instance_stays_listed(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut watch = Watch::new(fixture);
    let start = fixture.start_spec("a-1", 1, Scenario::Crashes);
    backend.ensure(start.clone()).await.unwrap();
    let exited = watch.until(is_exited).await;
    let ObservedPhase::Exited { code, reason } = &exited.phase else {
        unreachable!()
    };
    assert_eq!(*code, Some(fixture.crash_code()));
    assert!(!reason.is_empty());
    assert_eq!(backend.list().await.unwrap(), std::slice::from_ref(&exited));
    // Starting the same generation again does not restart it, but reports how it ended.
    backend.ensure(start.clone()).await.unwrap();
    assert_eq!(watch.next().await, exited);
    backend.remove(&start.id, 2, GRACE).await.unwrap();
    let code = Some(fixture.crash_code());
    assert_eq!(watch.next().await.phase, ObservedPhase::Removed { code });
    assert!(backend.list().await.unwrap().is_empty());
}

async fn a_newer_generation_after_a_crash_starts_it_again(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut watch = Watch::new(fixture);
    let start = fixture.start_spec("a-1", 1, Scenario::Crashes);
    backend.ensure(start.clone()).await.unwrap();
    watch.until(is_exited).await;
    let newer = fixture.start_spec("a-1", 2, Scenario::Healthy);
    backend.ensure(newer).await.unwrap();
    assert_eq!(watch.until(is_ready).await.generation, 2);
    backend.remove(&start.id, 3, GRACE).await.unwrap();
    watch.until(is_removed).await;
}

async fn instances_do_not_disturb_each_other(fixture: &dyn Fixture) {
    let backend = fixture.backend();
    let mut watch = Watch::new(fixture);
    for id in ["a-1", "a-2"] {
        let start = fixture.start_spec(id, 1, Scenario::Healthy);
        backend.ensure(start).await.unwrap();
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

async fn release_closes_watchers(fixture: &dyn Fixture) {
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
    the_same_start_twice_is_one_instance,
    a_request_older_than_the_newest_is_refused,
    a_removed_instance_cannot_be_started_by_a_late_request,
    a_removal_that_precedes_the_start_wins,
    a_repeated_removal_is_reported_again,
    an_instance_that_is_starting_can_be_removed,
    a_crash_is_reported_with_its_code_and_the_instance_stays_listed,
    a_newer_generation_after_a_crash_starts_it_again,
    instances_do_not_disturb_each_other,
    release_closes_watchers,
}
