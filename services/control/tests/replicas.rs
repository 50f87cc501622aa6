//! Two replicas of control on one log, one of which owns every bucket.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;

use async_trait::async_trait;
use bus::{Bus, BusError, BusMessage, LocalBus, Subscription};
use contract::frame::Frame;
use contract::log::Record;
use contract::route::RouteUpdate;
use control::{Control, ControlConfig, ControlDeps, NoHistory, NoLogs};
use runtime::health::Health;
use runtime::metrics::Metrics;
use serde_json::json;
use support::{World, endpoint};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// A bus that deals no buckets to groups, as to a replica whose buckets are all with others.
struct NoBuckets(Arc<LocalBus>);

#[async_trait]
impl Bus for NoBuckets {
    async fn publish_records(&self, records: &[Arc<Record>]) -> Result<(), BusError> {
        self.0.publish_records(records).await
    }
    fn subscribe_records(&self, subscription: Subscription) -> mpsc::Receiver<BusMessage> {
        match subscription {
            Subscription::Whole => self.0.subscribe_records(subscription),
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
        panic!("a replica that owns nothing publishes no route: {update:?}");
    }
    fn subscribe_routes(&self) -> mpsc::Receiver<Arc<RouteUpdate>> {
        self.0.subscribe_routes()
    }
    fn dropped(&self) -> u64 {
        0
    }
    fn trouble(&self) -> Option<String> {
        None
    }
    async fn close(&self) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_replica_writes_the_other_shows_and_what_it_revokes_the_other_refuses() {
    let world = World::start().await;
    let data = tempfile::tempdir().unwrap();
    let health = Health::default();
    let deps = ControlDeps {
        store: world.store.clone(),
        bus: Arc::new(NoBuckets(world.bus.clone())),
        clock: world.clock.clone(),
        ids: world.ids.clone(),
        metrics: Metrics::default(),
        health: health.clone(),
        internal_token: None,
        logs: Arc::new(NoLogs),
        history: Arc::new(NoHistory),
    };
    let key = world.dir.path().join("seal.key");
    let config = ControlConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        data: data.path().to_owned(),
        seal_key: Some(format!("file:{}", key.display())),
        replica: Some("b".into()),
        gateway: None,
        limits: control::Limits::default(),
    };
    let other = Control::bind(config, deps).await.unwrap();
    let url = format!("http://{}/v1/endpoints/iris", other.addr);
    let stop = CancellationToken::new();
    let serving = tokio::spawn(other.serve(stop.clone()));
    health.until_ready().await;

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
    // The token reaches the other replica with the log.
    while get().await == 401 {}
    assert_eq!(get().await, 200);
    // The first replica's own token was not replaced by the second's start.
    world.get("/v1/endpoints/iris").await.expect(200);
    world.delete("/v1/access/ci").await.expect(200);
    while get().await != 401 {}
    stop.cancel();
    serving.await.unwrap().unwrap();
    world.stop().await;
}
