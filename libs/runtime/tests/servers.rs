//! Snapshots of a consumer whose store is in PostgreSQL and whose bus is Kafka, on real servers.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use bus::Bus;
use bus::kafka::{KafkaBus, KafkaConfig};
use contract::ids::{Bucket, EndpointKey, Position};
use proptest::prelude::*;
use runtime::health::HealthRegistry;
use runtime::metrics::Metrics;
use runtime::relay::{RelayDeps, run_durable};
use servers::{Kafka, Postgres};
use store::Store;
use support::key;
use support::positions::{TestConsumer, poison, skip_and_unpark, touch};
use tokio_util::sync::CancellationToken;

const NAMES: [&str; 5] = ["iris", "rose", "tulip", "lily", "aster"];

/// What happens next, and to which endpoint.
type Change = (u32, usize);

fn changes() -> impl Strategy<Value = Vec<Change>> {
    prop::collection::vec((0u32..8, 0..NAMES.len()), 1..30)
}

/// A log in PostgreSQL that is published on Kafka.
struct Setup {
    database: String,
    store: Store,
    bus_config: KafkaConfig,
    relay_bus: Arc<KafkaBus>,
    shutdown: CancellationToken,
    poisoned: Vec<(usize, Position)>,
    /// The last event of each bucket.
    last: BTreeMap<Bucket, Position>,
}

/// What a consumer has made of the log.
struct Outcome {
    states: BTreeMap<EndpointKey, String>,
    effects: BTreeMap<u64, usize>,
    parked: Vec<Option<Position>>,
    applied: usize,
}

impl Setup {
    /// `None` if a server is to be skipped.
    async fn new() -> Option<Self> {
        let database = || Some((Postgres::shared()?.database(), Kafka::shared()?));
        let (database, kafka) = tokio::task::spawn_blocking(database).await.unwrap()?;
        let store = Store::open(&database).await.unwrap();
        let bus_config = KafkaConfig::parse(&kafka.url(&kafka.prefix())).unwrap();
        let relay_bus = KafkaBus::open(bus_config.clone()).await.unwrap();
        let shutdown = CancellationToken::new();
        let relay = RelayDeps {
            store: store.clone(),
            bus: relay_bus.clone(),
            holder: "test".to_owned(),
            component: HealthRegistry::default().component("relay"),
            metrics: Metrics::default(),
        };
        tokio::spawn(run_durable(relay, shutdown.clone()));
        Some(Self {
            database,
            store,
            bus_config,
            relay_bus,
            shutdown,
            poisoned: Vec::new(),
            last: BTreeMap::new(),
        })
    }

    async fn make(&mut self, changes: &[Change]) {
        for (change, endpoint) in changes {
            let name = NAMES[*endpoint];
            match (change, self.poisoned.pop()) {
                (0, before) => {
                    self.poisoned.extend(before);
                    let position = poison(&self.store, name).await;
                    self.poisoned.push((*endpoint, position));
                }
                (1, Some((endpoint, position))) => {
                    skip_and_unpark(&self.store, NAMES[endpoint], position).await;
                }
                (_, before) => {
                    self.poisoned.extend(before);
                    touch(&self.store, name).await;
                }
            }
        }
        // Only once this has been applied, everything before it in the bucket has been as well, also the
        // history of an unparked endpoint.
        for name in NAMES {
            let position = touch(&self.store, name).await;
            self.last.insert(key(name).bucket(), position);
        }
    }

    /// Starts a consumer that gets all buckets and everything that happens in them from Kafka.
    async fn start(&self) -> TestConsumer<1, KafkaBus> {
        let bus = KafkaBus::open(self.bus_config.clone()).await.unwrap();
        let mut test = TestConsumer::open(&self.store, bus, false);
        let all = Bucket::of_endpoints().count();
        while test.consumer.buckets().count() < all || !test.consumer.all_caught_up() {
            test.step().await;
        }
        test
    }

    async fn until_applied(&self, test: &mut TestConsumer<1, KafkaBus>) {
        for (bucket, position) in &self.last {
            while test.consumer.position(*bucket) < *position {
                test.step().await;
            }
        }
    }

    async fn delete_snapshots(&self) {
        use sqlx::Connection as _;
        let mut connection = sqlx::PgConnection::connect(&self.database).await.unwrap();
        let deleted = sqlx::query("DELETE FROM snapshots");
        deleted.execute(&mut connection).await.unwrap();
    }
}

fn parked<B: Bus>(test: &TestConsumer<1, B>) -> Vec<Option<Position>> {
    let parking = test.consumer.parking();
    let parked_at = |name: &&str| parking.parked_at(&key(name));
    NAMES.iter().map(parked_at).collect()
}

/// Stops a consumer, which stores its snapshots and leaves its buckets.
async fn stop(test: TestConsumer<1, KafkaBus>) -> Outcome {
    let (effects, applied) = (test.effects.clone(), test.applied.len());
    let (parked, bus) = (parked(&test), test.bus.clone());
    let states = test.stop().await;
    bus.close().await;
    Outcome {
        states,
        effects,
        parked,
        applied,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 4, ..ProptestConfig::with_cases(2) })]

    /// Each round: what happens while no consumer runs, and while one does. Between rounds it stops.
    #[test]
    fn states_are_the_same_from_snapshots_at_random_positions_and_from_none(
        rounds in prop::collection::vec((changes(), changes()), 2..4),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let Some(mut setup) = Setup::new().await else { return };
            let mut resumed = None;
            for (before, meanwhile) in &rounds {
                setup.make(before).await;
                let mut test = setup.start().await;
                setup.make(meanwhile).await;
                setup.until_applied(&mut test).await;
                resumed = Some(stop(test).await);
            }
            let resumed = resumed.unwrap();
            setup.delete_snapshots().await;
            let mut test = setup.start().await;
            setup.until_applied(&mut test).await;
            let fresh = stop(test).await;
            assert!(resumed.applied < fresh.applied, "it did not start from snapshots");
            assert_eq!(resumed.states, fresh.states);
            assert_eq!(resumed.parked, fresh.parked);
            for (position, effect) in &resumed.effects {
                assert_eq!(fresh.effects.get(position), Some(effect), "at {position}");
            }

            // The same log in a file gives the same, without Kafka.
            let folder = tempfile::tempdir().unwrap();
            let copy = support::open(&folder).await;
            store::copy(&setup.store, &copy, |_, _| {}).await.unwrap();
            let in_file = TestConsumer::<1>::start(&copy, false).await;
            assert_eq!(in_file.states(), fresh.states);
            assert_eq!(parked(&in_file), fresh.parked);
            setup.shutdown.cancel();
            setup.relay_bus.close().await;
        });
    }
}
