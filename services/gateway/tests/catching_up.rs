//! A gateway that starts reads the routes on the bus before it serves: its own may name instances
//! that are gone.

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
use runtime::health::Health;
use runtime::metrics::Metrics;
use support::*;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

/// A bus on which routes come when the test says so.
struct SlowRoutes {
    routes: Mutex<Option<mpsc::Receiver<RouteMessage>>>,
    is_away: bool,
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
    fn subscribe_routes(&self) -> mpsc::Receiver<RouteMessage> {
        self.routes.lock().unwrap().take().expect("subscribed once")
    }
    fn dropped(&self) -> u64 {
        0
    }
    fn trouble(&self) -> Option<String> {
        self.is_away.then(|| "no broker answers".to_owned())
    }
    async fn close(&self) {}
}

struct Starting {
    address: SocketAddr,
    health: Health,
    routes: mpsc::Sender<RouteMessage>,
    _stops: DropGuard,
}

fn start_on_slow_routes(data: &Path, is_away: bool) -> Starting {
    let (routes, received) = mpsc::channel(8);
    let health = Health::default();
    let deps = Deps {
        bus: Arc::new(SlowRoutes {
            routes: Mutex::new(Some(received)),
            is_away,
        }),
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
    Starting {
        address,
        health,
        routes,
        _stops: shutdown.drop_guard(),
    }
}

impl Starting {
    async fn until_missing(&self, missing: &[&str]) {
        soon("the word of health", async {
            while self.health.missing() != missing {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    async fn tell(&self, message: RouteMessage) {
        self.routes.send(message).await.unwrap();
    }

    /// The next route leads to this instance alone.
    async fn tell_of(&self, instance: &Instance) {
        let update = blue(8, &Settings::default(), &[instance.place()]);
        self.tell(RouteMessage::Update(Arc::new(update))).await;
    }

    async fn ask(&self) -> Answer {
        let ask = request("/endpoints/iris/score").body(whole("x")).unwrap();
        send(self.address, ask).await
    }
}

const READS_ROUTES: &[&str] = &["gateway: reads the routes from the bus"];

/// What a gateway leaves behind that has served by a route to this instance.
async fn left_behind(data: &Path, instance: &Instance) {
    let update = blue(7, &Settings::default(), &[instance.place()]);
    let config = gateway::Config {
        data: Some(data.to_owned()),
        ..config()
    };
    start_with(config, &[update]).await.stop().await;
}

#[tokio::test]
async fn instances_that_went_while_it_was_away_are_not_asked() {
    let data = scratch();
    let instance = Instance::saying("gone").await;
    left_behind(data.path(), &instance).await;
    drop(instance);

    let gateway = start_on_slow_routes(data.path(), false);
    gateway.until_missing(READS_ROUTES).await;
    let new = Instance::saying("new").await;
    gateway.tell_of(&new).await;
    gateway.tell(RouteMessage::CaughtUp).await;
    assert_eq!(gateway.ask().await.text(), "new");
    gateway.until_missing(&[]).await;
}

#[tokio::test]
async fn where_the_bus_is_away_it_serves_by_the_routes_that_it_has() {
    let data = scratch();
    let instance = Instance::saying("still here").await;
    left_behind(data.path(), &instance).await;

    let gateway = start_on_slow_routes(data.path(), true);
    gateway.until_missing(READS_ROUTES).await;
    assert_eq!(gateway.ask().await.text(), "still here");
    gateway.until_missing(&[]).await;
}

#[tokio::test]
async fn what_came_of_an_interrupted_reading_counts() {
    let data = scratch();
    let instance = Instance::saying("gone").await;
    left_behind(data.path(), &instance).await;
    drop(instance);

    let gateway = start_on_slow_routes(data.path(), true);
    let new = Instance::saying("new").await;
    gateway.tell_of(&new).await;
    assert_eq!(gateway.ask().await.text(), "new");
}
