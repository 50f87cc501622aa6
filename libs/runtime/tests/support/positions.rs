//! A consumer whose states say exactly which events were applied.

use std::collections::BTreeMap;
use std::sync::Arc;

use bus::{Bus, BusMessage};
use contract::events::{ConsumerUnparked, Empty, Event, EventSkipped};
use contract::ids::{Bucket, EndpointKey, Position};
use contract::log::{Record, StreamKind, StreamName};
use runtime::clock::SystemClock;
use runtime::consumer::{Consumer, ConsumerConfig, ConsumerDeps, Fold, Step};
use runtime::health::HealthRegistry;
use serde::{Deserialize, Serialize};
use store::Store;

use super::{ScriptedBus, append_to};

/// Collects the positions of an endpoint's events. Panics on an endpoint's deletion.
pub struct Positions<const VERSION: u32>;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AppliedPositions(Vec<Position>);

impl<const VERSION: u32> Fold for Positions<VERSION> {
    type State = AppliedPositions;
    /// How many events of the endpoint have been applied.
    type Effect = usize;

    const VERSION: u32 = VERSION;
    const READS: &'static [StreamKind] = &[StreamKind::Endpoint, StreamKind::Instances];

    fn apply(&self, _key: &EndpointKey, state: &mut AppliedPositions, record: &Record) -> usize {
        assert!(!matches!(record.event, Event::EndpointDeleted(_)), "poison");
        state.0.push(record.position);
        state.0.len()
    }

    fn writes(&self, stream: &StreamName) -> bool {
        stream.kind() == Some(StreamKind::Instances)
    }
}

/// A consumer, and what it has done since its start.
pub struct TestConsumer<const VERSION: u32, B = ScriptedBus> {
    pub consumer: Consumer<Positions<VERSION>>,
    pub bus: Arc<B>,
    /// Positions that were applied, in order.
    pub applied: Vec<u64>,
    /// By position.
    pub effects: BTreeMap<u64, usize>,
    pub parked: Vec<EndpointKey>,
}

impl<const VERSION: u32> TestConsumer<VERSION> {
    /// Starts a consumer that owns everything, and waits until it has caught up.
    pub async fn start(store: &Store, waits_for_writes: bool) -> Self {
        let bus = ScriptedBus::new();
        let mut test = Self::open(store, bus.clone(), waits_for_writes);
        bus.send(BusMessage::Assigned(Bucket::of_endpoints().collect()));
        while !matches!(test.step().await, Step::CaughtUp(_)) {}
        test
    }
}

impl<const VERSION: u32, B: Bus> TestConsumer<VERSION, B> {
    /// Opens a consumer that owns what the bus assigns to it.
    pub fn open(store: &Store, bus: Arc<B>, waits_for_writes: bool) -> Self {
        let config = ConsumerConfig {
            waits_for_writes,
            ..ConsumerConfig::shared("positions")
        };
        let deps = ConsumerDeps {
            store: store.clone(),
            bus: bus.clone(),
            clock: Arc::new(SystemClock),
        };
        let component = HealthRegistry::default().component("positions");
        Self {
            consumer: Consumer::open(config, Positions, deps, component),
            bus,
            applied: Vec::new(),
            effects: BTreeMap::new(),
            parked: Vec::new(),
        }
    }

    pub async fn step(&mut self) -> Step<usize> {
        let step = self.consumer.next().await.unwrap();
        match &step {
            Step::Applied(applied) => {
                let effects = applied
                    .iter()
                    .filter_map(|one| Some((one.record.position.0, one.effect?)));
                self.applied
                    .extend(effects.clone().map(|(position, _)| position));
                self.effects.extend(effects);
            }
            Step::Parked(key) => self.parked.push(key.clone()),
            _ => {}
        }
        step
    }

    pub async fn stop(mut self) -> BTreeMap<EndpointKey, String> {
        self.consumer.save_all().await;
        self.states()
    }

    pub fn states(&self) -> BTreeMap<EndpointKey, String> {
        let entries = self.consumer.folds().lock();
        let text =
            |(key, entry): (&EndpointKey, _)| (key.clone(), serde_json::to_string(entry).unwrap());
        entries.iter().map(text).collect()
    }
}

pub async fn touch(store: &Store, endpoint: &str) -> Position {
    let event = Event::EndpointDeletionRequested(Empty {});
    append_to(store, StreamKind::Endpoint, endpoint, event)
        .await
        .position
}

pub async fn poison(store: &Store, endpoint: &str) -> Position {
    let event = Event::EndpointDeleted(Empty {});
    append_to(store, StreamKind::Endpoint, endpoint, event)
        .await
        .position
}

pub async fn skip_and_unpark(store: &Store, endpoint: &str, position: Position) {
    let skipped = Event::EventSkipped(EventSkipped {
        consumer: "positions".into(),
        position,
        reason: "test".into(),
    });
    append_to(store, StreamKind::Parking, endpoint, skipped).await;
    let unparked = Event::ConsumerUnparked(ConsumerUnparked {
        consumer: "positions".into(),
        reason: "test".into(),
    });
    append_to(store, StreamKind::Parking, endpoint, unparked).await;
}
