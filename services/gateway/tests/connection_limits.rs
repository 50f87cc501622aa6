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

/// Capacity for this many clients, and as many connections to instances.
const CLIENTS: usize = 4;

fn limited_config() -> Config {
    Config {
        threads: 1,
        descriptors: Descriptors::new(100, 2 * CLIENTS),
        ..config()
    }
}

fn score_request() -> Request<AnyBody> {
    request("/endpoints/iris/score")
        .body(full_body("x"))
        .unwrap()
}

async fn gateway(entry: InstanceEntry) -> TestGateway {
    let mut settings = Settings::default();
    settings.request.timeout = Span::from_secs(60);
    start_with(limited_config(), &[blue_route(1, &settings, &[entry])]).await
}

#[tokio::test]
async fn a_client_beyond_the_limit_is_refused_immediately_with_a_reason() {
    let gate = Arc::new(Semaphore::new(0));
    let arrived = Arc::new(Notify::new());
    let (held, seen) = (gate.clone(), arrived.clone());
    let instance = TestInstance::start(move |_| {
        let (gate, arrived) = (held.clone(), seen.clone());
        async move {
            arrived.notify_one();
            gate.acquire().await.unwrap().forget();
            Response::new(full_body("done"))
        }
    })
    .await;
    let gateway = gateway(instance.entry()).await;
    let mut served = Vec::new();
    for _ in 0..CLIENTS {
        let address = gateway.address;
        served.push(tokio::spawn(
            async move { send(address, score_request()).await },
        ));
        within_timeout("a request on the instance", arrived.notified()).await;
    }
    let refused = send(gateway.address, score_request()).await;
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
async fn the_client_that_has_been_idle_longest_is_closed_for_a_new_one() {
    let instance = TestInstance::responding_with("done").await;
    let gateway = gateway(instance.entry()).await;
    let mut idle = Vec::new();
    for _ in 0..CLIENTS {
        let mut client = TestClient::connect(gateway.address).await;
        assert_eq!(client.send(score_request()).await.status, StatusCode::OK);
        idle.push(client);
    }
    // Refused until one has been idle for long enough.
    within_timeout("a new client to be served", async {
        while send(gateway.address, score_request()).await.status != StatusCode::OK {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    within_timeout("the first to be closed", async {
        while !idle[0].sender.is_closed() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(idle[CLIENTS - 1].send(score_request()).await.status, 200);
    gateway.stop().await;
}
