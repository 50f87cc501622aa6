//! A gateway that starts reads the routes on the bus before it serves: its saved ones may name
//! instances that are gone.

#![allow(clippy::unwrap_used, reason = "helpers of tests count as such")]

mod support;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bus::{Bus, BusError, BusMessage, RouteMessage, Subscription};
use contract::frame::Frame;
use contract::log::Record;
use contract::route::RouteUpdate;
use gateway::{Deps, Gateway};
use runtime::clock::SystemClock;
use runtime::health::HealthRegistry;
use runtime::metrics::Metrics;
use support::*;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

/// A bus on which routes arrive when the test sends them.
struct SlowRoutes {
    routes: Mutex<Option<mpsc::Receiver<RouteMessage>>>,
    is_unreachable: bool,
    retains_routes: bool,
}

#[async_trait]
impl Bus for SlowRoutes {
    async fn publish_records(&self, _records: &[Arc<Record>]) -> Result<(), BusError> {
        Ok(())
    }
    fn subscribe_records(&self, _subscription: Subscription) -> mpsc::Receiver<BusMessage> {
        mpsc::channel(1).1
    }
    fn publish_frame(&self, _frame: Arc<Frame>) {}
    fn subscribe_frames(&self) -> mpsc::Receiver<Arc<Frame>> {
        mpsc::channel(1).1
    }
    fn publish_route(&self, _update: Arc<RouteUpdate>) {}
    fn retains_routes(&self) -> bool {
        self.retains_routes
    }
    fn subscribe_routes(&self) -> mpsc::Receiver<RouteMessage> {
        self.routes.lock().unwrap().take().expect("subscribed once")
    }
    fn dropped(&self) -> u64 {
        0
    }
    fn problem(&self) -> Option<String> {
        self.is_unreachable.then(|| "no broker answers".to_owned())
    }
    async fn close(&self) {}
}

struct StartingGateway {
    address: SocketAddr,
    health: HealthRegistry,
    routes: mpsc::Sender<RouteMessage>,
    _stops: DropGuard,
}

fn start_on_slow_routes(data: &Path, is_unreachable: bool) -> StartingGateway {
    let (routes, received) = mpsc::channel(8);
    let bus = SlowRoutes {
        routes: Mutex::new(Some(received)),
        is_unreachable,
        retains_routes: true,
    };
    start_on(data, bus, routes)
}

fn start_on(data: &Path, bus: SlowRoutes, routes: mpsc::Sender<RouteMessage>) -> StartingGateway {
    let health = HealthRegistry::default();
    let deps = Deps {
        bus: Arc::new(bus),
        clock: Arc::new(SystemClock),
        metrics: Metrics::default(),
        health: health.clone(),
    };
    let config = gateway::Config {
        data: Some(data.to_owned()),
        ..config()
    };
    let gateway = Gateway::bind(config, deps).unwrap();
    let address = gateway.address;
    let shutdown = CancellationToken::new();
    tokio::spawn(gateway.serve(shutdown.clone()));
    StartingGateway {
        address,
        health,
        routes,
        _stops: shutdown.drop_guard(),
    }
}

impl StartingGateway {
    async fn wait_until_missing(&self, missing: &[&str]) {
        within_timeout("the health status", async {
            while self.health.missing() != missing {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    async fn send_message(&self, message: RouteMessage) {
        self.routes.send(message).await.unwrap();
    }

    /// Publishes a route to this instance alone.
    async fn send_route_to(&self, instance: &TestInstance) {
        let update = blue_route(8, &Settings::default(), &[instance.entry()]);
        self.send_message(RouteMessage::Update(Arc::new(update)))
            .await;
    }

    async fn post(&self) -> TestResponse {
        let request = request("/endpoints/iris/score")
            .body(full_body("x"))
            .unwrap();
        send(self.address, request).await
    }
}

const READS_ROUTES: &[&str] = &["gateway: reading the routes from the bus"];

/// Leaves saved routes of a gateway that has served from this instance.
async fn save_routes_to(data: &Path, instance: &TestInstance) {
    let update = blue_route(7, &Settings::default(), &[instance.entry()]);
    let config = gateway::Config {
        data: Some(data.to_owned()),
        ..config()
    };
    start_with(config, &[update]).await.stop().await;
}

#[tokio::test]
async fn instances_removed_while_it_was_down_get_no_requests() {
    let data = temp_dir();
    let instance = TestInstance::responding_with("gone").await;
    save_routes_to(data.path(), &instance).await;
    drop(instance);

    let gateway = start_on_slow_routes(data.path(), false);
    gateway.wait_until_missing(READS_ROUTES).await;
    let new = TestInstance::responding_with("new").await;
    gateway.send_route_to(&new).await;
    gateway.send_message(RouteMessage::CaughtUp).await;
    assert_eq!(gateway.post().await.text(), "new");
    gateway.wait_until_missing(&[]).await;
}

#[tokio::test]
async fn without_the_bus_it_serves_the_saved_routes() {
    let data = temp_dir();
    let instance = TestInstance::responding_with("still here").await;
    save_routes_to(data.path(), &instance).await;

    let gateway = start_on_slow_routes(data.path(), true);
    gateway.wait_until_missing(READS_ROUTES).await;
    assert_eq!(gateway.post().await.text(), "still here");
    gateway.wait_until_missing(&[]).await;
}

#[tokio::test]
async fn routes_received_before_an_interruption_are_applied() {
    let data = temp_dir();
    let instance = TestInstance::responding_with("gone").await;
    save_routes_to(data.path(), &instance).await;
    drop(instance);

    let gateway = start_on_slow_routes(data.path(), true);
    let new = TestInstance::responding_with("new").await;
    gateway.send_route_to(&new).await;
    assert_eq!(gateway.post().await.text(), "new");
}

/// A process that contains everything publishes its routes after it has read the log, which may take minutes.
#[tokio::test]
async fn on_a_bus_without_earlier_routes_it_serves_the_saved_ones_until_it_is_ready() {
    let data = temp_dir();
    let instance = TestInstance::responding_with("still here").await;
    save_routes_to(data.path(), &instance).await;

    let (routes, received) = mpsc::channel(8);
    let bus = SlowRoutes {
        routes: Mutex::new(Some(received)),
        is_unreachable: false,
        retains_routes: false,
    };
    let gateway = start_on(data.path(), bus, routes);
    assert_eq!(gateway.post().await.text(), "still here");
    gateway.wait_until_missing(READS_ROUTES).await;
    gateway.send_message(RouteMessage::CaughtUp).await;
    gateway.wait_until_missing(&[]).await;
}
