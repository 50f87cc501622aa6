//! Two replicas of control on one log, one of which owns every bucket.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bus::{Bus, BusError, BusMessage, LocalBus, RouteMessage, Subscription};
use contract::events::Event;
use contract::frame::{Frame, Hello, Source, SourceKind};
use contract::ids::{Bucket, Position};
use contract::log::{Record, StreamName};
use contract::own_secrets::OwnSecrets;
use contract::route::RouteUpdate;
use control::{Control, ControlConfig, ControlDeps, NoHistory, NoLogs};
use domain::zones::ZoneData;
use runtime::clock::Clock;
use runtime::health::HealthRegistry;
use runtime::metrics::Metrics;
use serde_json::json;
use sqlx::Connection as _;
use support::{Setup, TestWorld, endpoint};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Far longer than anything takes; only reached when a test fails.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A bus that assigns no buckets to groups, as for a replica when others own all buckets.
struct NoBucketsBus(Arc<LocalBus>);

#[async_trait]
impl Bus for NoBucketsBus {
    async fn publish_records(&self, records: &[Arc<Record>]) -> Result<(), BusError> {
        self.0.publish_records(records).await
    }
    fn subscribe_records(&self, subscription: Subscription) -> mpsc::Receiver<BusMessage> {
        match subscription {
            Subscription::All => self.0.subscribe_records(subscription),
            Subscription::Group(_) => mpsc::channel(1).1,
        }
    }
    fn publish_frame(&self, frame: Arc<Frame>) {
        self.0.publish_frame(frame);
    }
    fn subscribe_frames(&self) -> mpsc::Receiver<Arc<Frame>> {
        self.0.subscribe_frames()
    }
    fn publish_route(&self, update: Arc<RouteUpdate>) {
        panic!("a replica without buckets must not publish routes: {update:?}");
    }
    fn subscribe_routes(&self) -> mpsc::Receiver<RouteMessage> {
        self.0.subscribe_routes()
    }
    fn dropped(&self) -> u64 {
        0
    }
    fn problem(&self) -> Option<String> {
        None
    }
    async fn close(&self) {}
}

/// A second control service on the store of a [`TestWorld`].
struct Replica {
    url: String,
    health: HealthRegistry,
    stop: CancellationToken,
    serving: JoinHandle<()>,
    _data: TempDir,
}

impl Replica {
    async fn start(world: &TestWorld) -> Self {
        let data = tempfile::tempdir().unwrap();
        let health = HealthRegistry::default();
        let deps = ControlDeps {
            store: world.store.clone(),
            bus: Arc::new(NoBucketsBus(world.bus.clone())),
            clock: world.clock.clone(),
            ids: world.ids.clone(),
            metrics: Metrics::default(),
            health: health.clone(),
            internal_token: None,
            zones: ZoneData::bundled(),
            logs: Arc::new(NoLogs),
            history: Arc::new(NoHistory),
        };
        let key = world.dir.path().join("seal.key");
        let config = ControlConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            data: data.path().to_owned(),
            seal_key: Some(format!("file:{}", key.display())),
            replica: Some("b".into()),
            only_node: None,
            gateway: None,
            limits: control::Limits::default(),
            own_secrets: OwnSecrets::default(),
            descriptors: Default::default(),
        };
        let control = Control::bind(config, deps).await.unwrap();
        let url = format!("http://{}", control.addr);
        let stop = CancellationToken::new();
        let stopping = stop.clone();
        let serving = tokio::spawn(async move { control.serve(stopping).await.unwrap() });
        health.until_ready().await;
        Self {
            url,
            health,
            stop,
            serving,
            _data: data,
        }
    }

    async fn stop(self) {
        self.stop.cancel();
        self.serving.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_see_each_others_writes_and_revocations() {
    let world = TestWorld::start().await;
    let other = Replica::start(&world).await;
    let url = format!("{}/v1/endpoints/iris", other.url);

    let put = world.put("/v1/endpoints/iris", &endpoint("iris")).await;
    let position = put.expect(201).position();
    let granted = json!({"name": "ci", "role": "viewer"});
    let granted = world.post("/v1/access", &granted).await.expect(201);
    let token = granted.body()["token"].as_str().unwrap().to_owned();
    let get = async || {
        let request = world.http.get(&url).bearer_auth(&token);
        let request = request.header("penstock-position", position);
        request.send().await.unwrap().status().as_u16()
    };
    // The token reaches the other replica through the log.
    while get().await == 401 {}
    assert_eq!(get().await, 200);
    // The start of the second replica did not replace the token of the first.
    world.get("/v1/endpoints/iris").await.expect(200);
    world.delete("/v1/access/ci").await.expect(200);
    while get().await != 401 {}
    other.stop().await;
    world.stop().await;
}

/// How often the lease for recording members was acquired.
async fn lease_generation(world: &TestWorld) -> i64 {
    let mut database = database(world).await;
    let generation = sqlx::query_scalar("SELECT generation FROM fences WHERE name = 'members'");
    let generation = generation.fetch_optional(&mut database).await.unwrap();
    generation.unwrap_or(0)
}

async fn database(world: &TestWorld) -> sqlx::SqliteConnection {
    let url = format!("sqlite:{}", world.dir.path().join("penstock.db").display());
    sqlx::SqliteConnection::connect(&url).await.unwrap()
}

async fn execute(world: &TestWorld, sql: &'static str) {
    let mut database = database(world).await;
    sqlx::query(sql).execute(&mut database).await.unwrap();
}

async fn wait_until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let waiting = async {
        while !condition().await {
            tokio::task::yield_now().await;
        }
    };
    let waited = tokio::time::timeout(TIMEOUT, waiting).await;
    waited.unwrap_or_else(|_| panic!("timed out: {what}"));
}

/// Sends frames of a gateway until it is recorded as a member.
async fn join_gateway(world: &TestWorld, id: &str) {
    wait_until("the gateway is a member", async || {
        world.bus.publish_frame(Arc::new(gateway(world, id)));
        let stream = StreamName::members();
        let members = world.store.read_stream(&stream, 0, 1000).await.unwrap();
        members.iter().any(
            |record| matches!(&record.event, Event::MemberJoined(joined) if joined.source.id == id),
        )
    })
    .await;
}

fn gateway(world: &TestWorld, id: &str) -> Frame {
    Frame {
        source: Source {
            kind: SourceKind::GATEWAY,
            id: id.into(),
        },
        boot: Uuid::from_u128(1),
        sequence: 0,
        bucket: Bucket(0),
        start: world.clock.now(),
        length_us: 1_000_000,
        routes: BTreeMap::new(),
        members: Position::START,
        hello: Some(Hello {
            address: None,
            backends: Vec::new(),
        }),
        goodbye: false,
        deployments: Vec::new(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_replica_records_members_and_the_other_takes_over_when_it_stops() {
    let world = TestWorld::start().await;
    wait_until("the first holds the lease", async || {
        lease_generation(&world).await == 1
    })
    .await;
    let other = Replica::start(&world).await;
    join_gateway(&world, "a").await;
    // Meanwhile the second has tried to acquire it more than once.
    tokio::time::sleep(3 * runtime::lease::RENEW_EVERY).await;
    join_gateway(&world, "b").await;
    assert_eq!(
        lease_generation(&world).await,
        1,
        "the lease was taken from its holder"
    );
    assert!(!other.serving.is_finished());
    world.stop_control();
    join_gateway(&world, "c").await;
    assert_eq!(lease_generation(&world).await, 2);
    other.stop().await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_are_recorded_again_after_a_store_outage() {
    let world = TestWorld::start().await;
    join_gateway(&world, "a").await;
    execute(&world, "ALTER TABLE fences RENAME TO hidden").await;
    let other = Replica::start(&world).await;
    world.bus.publish_frame(Arc::new(gateway(&world, "b")));
    // Long enough for the lease to expire, so that it must be acquired again.
    tokio::time::sleep(runtime::lease::TTL + runtime::lease::RENEW_EVERY).await;
    assert!(!other.serving.is_finished(), "control has stopped");
    assert_eq!(other.health.missing(), Vec::<String>::new());
    execute(&world, "ALTER TABLE hidden RENAME TO fences").await;
    join_gateway(&world, "b").await;
    other.stop().await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_cannot_write_its_read_models_is_not_ready_until_it_can() {
    let world = TestWorld::start().await;
    let broken =
        "CREATE TRIGGER broken BEFORE INSERT ON rows BEGIN SELECT RAISE(ABORT, 'broken rows'); END";
    execute(&world, broken).await;
    world.create_endpoint("iris").await;
    wait_until("it is not ready", async || {
        let missing = world.health.missing();
        missing.iter().any(|reason| reason.contains("broken rows"))
    })
    .await;
    execute(&world, "DROP TRIGGER broken").await;
    wait_until("it is ready", async || world.health.missing().is_empty()).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_member_event_does_not_prevent_others_from_joining() {
    let world = TestWorld::start().await;
    join_gateway(&world, "a").await;
    let dir = world.stop().await;
    let url = format!("sqlite:{}", dir.path().join("penstock.db").display());
    let mut database = sqlx::SqliteConnection::connect(&url).await.unwrap();
    let poison = "UPDATE events SET type = 'x-' || type WHERE type = 'member.joined'";
    let updated = sqlx::query(poison).execute(&mut database).await.unwrap();
    assert_eq!(updated.rows_affected(), 1);
    database.close().await.unwrap();
    let setup = Setup {
        dir,
        seed: 2,
        ..Setup::default()
    };
    let world = TestWorld::start_with(setup).await;
    let joined = async || {
        world.bus.publish_frame(Arc::new(gateway(&world, "b")));
        let stream = StreamName::members();
        let after_poison = world.store.read_stream(&stream, 1, 10).await.unwrap();
        !after_poison.is_empty()
    };
    wait_until("another one joins", joined).await;
    world.stop().await;
}
