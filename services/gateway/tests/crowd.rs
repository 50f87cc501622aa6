//! More clients than there are descriptors for.

#![allow(clippy::unwrap_used, reason = "helpers of tests count as such")]

mod support;

use std::sync::Arc;

use contract::time::Span;
use gateway::Config;
use http::{Request, Response, StatusCode};
use runtime::descriptors::Descriptors;
use support::*;
use tokio::sync::{Notify, Semaphore};

/// Room for this many clients, and as many connections to instances.
const CLIENTS: usize = 4;

fn narrow() -> Config {
    Config {
        threads: 1,
        descriptors: Descriptors::new(100, 2 * CLIENTS),
        ..config()
    }
}

fn score() -> Request<AnyBody> {
    request("/endpoints/iris/score").body(whole("x")).unwrap()
}

async fn gateway(place: Place) -> Running {
    let mut settings = Settings::default();
    settings.request.timeout = Span::from_secs(60);
    start_with(narrow(), &[blue(1, &settings, &[place])]).await
}

#[tokio::test]
async fn a_client_beyond_the_last_that_is_served_is_refused_at_once_and_told_why() {
    let gate = Arc::new(Semaphore::new(0));
    let came = Arc::new(Notify::new());
    let (held, seen) = (gate.clone(), came.clone());
    let instance = Instance::start(move |_| {
        let (gate, came) = (held.clone(), seen.clone());
        async move {
            came.notify_one();
            gate.acquire().await.unwrap().forget();
            Response::new(whole("done"))
        }
    })
    .await;
    let gateway = gateway(instance.place()).await;
    let mut served = Vec::new();
    for _ in 0..CLIENTS {
        let address = gateway.address;
        served.push(tokio::spawn(async move { send(address, score()).await }));
        soon("a request on the instance", came.notified()).await;
    }
    let refused = send(gateway.address, score()).await;
    assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(refused.code(), "too-many-connections");
    assert_eq!(refused.header("connection"), "close");
    assert_eq!(refused.header("retry-after"), "1");
    gate.add_permits(CLIENTS);
    for served in served {
        assert_eq!(served.await.unwrap().status, StatusCode::OK);
    }
    gateway.stop().await;
}

#[tokio::test]
async fn the_client_that_has_rested_longest_makes_room_for_a_new_one() {
    let instance = Instance::saying("done").await;
    let gateway = gateway(instance.place()).await;
    let mut resting = Vec::new();
    for _ in 0..CLIENTS {
        let mut client = Client::connect(gateway.address).await;
        assert_eq!(client.send(score()).await.status, StatusCode::OK);
        resting.push(client);
    }
    // Refused as long as none has rested for long.
    soon("a new client to be served", async {
        while send(gateway.address, score()).await.status != StatusCode::OK {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    soon("the first to be closed", async {
        while !resting[0].sender.is_closed() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(resting[CLIENTS - 1].send(score()).await.status, 200);
    gateway.stop().await;
}
