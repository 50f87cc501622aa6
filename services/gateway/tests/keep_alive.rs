//! Real servers that close idle connections, and clients that send a request at that very moment.

#![allow(clippy::unwrap_used, reason = "helpers of tests count as such")]

mod support;

use std::time::Duration;

use contract::time::Span;
use futures::future::join_all;
use servers::{PythonServer, python};
use support::*;

const PACKAGES: [&str; 1] = ["uvicorn==0.54.0"];
/// Concurrent clients; each keeps one connection to an instance busy.
const CLIENTS: usize = 560;
/// Servers, their keep-alive in seconds, the gateway's `keepAliveIdle`, and the requests per
/// client: 10,080 requests in total.
const CASES: [(&str, u64, Span, usize); 6] = [
    ("http.server", 1, Span::from_millis(500), 3),
    ("http.server", 2, Span::from_secs(1), 3),
    ("http.server", 5, Span::from_secs(2), 3),
    ("uvicorn", 1, Span::from_millis(500), 3),
    ("uvicorn", 2, Span::from_secs(1), 3),
    ("uvicorn", 5, Span::from_secs(2), 3),
];

/// Returns how many requests failed, and what the server counted.
async fn send_at_keep_alive_expiry(
    server: &PythonServer,
    keep_alive: u64,
    idle: Span,
    rounds: usize,
) -> (usize, serde_json::Value) {
    let mut settings = Settings::default();
    settings.request.keep_alive_idle = idle;
    settings.request.max_concurrent_requests_per_instance = 1000;
    let gateway = start(&[blue_route(1, &settings, &[entry_at(server.address)])]).await;
    let client = async |client: usize| {
        let mut connection = TestClient::connect(gateway.address).await;
        let mut failed = 0;
        for round in 0..rounds {
            if round > 0 {
                tokio::time::sleep(Duration::from_secs(keep_alive)).await;
            }
            let number = format!("{client}-{round}");
            let request_builder =
                request("/endpoints/iris/score").header("x-request-number", number);
            let response = connection
                .send(request_builder.body(full_body("x")).unwrap())
                .await;
            failed += usize::from(response.status != 200);
        }
        failed
    };
    let failed = join_all((0..CLIENTS).map(client)).await.into_iter().sum();
    let counts = request("/endpoints/iris/score").method("GET");
    let counts = send(gateway.address, counts.body(full_body("")).unwrap()).await;
    (failed, serde_json::from_slice(&counts.body).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_or_is_duplicated_while_servers_close_idle_connections() {
    let Some(interpreter) = python(&PACKAGES) else {
        return;
    };
    let servers: Vec<_> = CASES
        .iter()
        .map(|(kind, keep_alive, ..)| {
            let keep_alive = keep_alive.to_string();
            PythonServer::start(&interpreter, "counting.py", &[kind, "{port}", &keep_alive])
        })
        .collect();
    let cases = CASES.iter().zip(&servers);
    let results = join_all(cases.map(|((_, keep_alive, idle, rounds), server)| {
        send_at_keep_alive_expiry(server, *keep_alive, *idle, *rounds)
    }))
    .await;
    for ((kind, keep_alive, _, rounds), (failed, counts)) in CASES.iter().zip(results) {
        let case = format!("{kind} with a keep-alive of {keep_alive} s");
        let all = CLIENTS * rounds;
        assert_eq!(failed, 0, "{case}");
        let expected = serde_json::json!({"requests": all, "distinct": all});
        assert_eq!(counts, expected, "{case}");
    }
}
