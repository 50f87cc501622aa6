//! The generator against real servers that misbehave.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};

use clap::Parser;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use super::*;

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    load: LoadArgs,
}

fn args(line: &str) -> LoadArgs {
    let words = std::iter::once("load").chain(line.split_whitespace());
    Command::try_parse_from(words).unwrap().load
}

fn no_signals() -> StopSignals {
    StopSignals {
        stop: CancellationToken::new(),
        abandon: CancellationToken::new(),
    }
}

fn target(url: String) -> LoadTarget {
    LoadTarget {
        url,
        key: Some("secret".to_owned()),
        instances: None,
    }
}

/// Serves each request with `answer(number of the request, request)`, counting from 0.
async fn server<A, F>(answer: A) -> String
where
    A: Fn(u64, Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!(
        "http://{}/endpoints/iris/score",
        listener.local_addr().unwrap()
    );
    let numbers = Arc::new(AtomicU64::new(0));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (answer, numbers) = (answer.clone(), numbers.clone());
            let service = service_fn(move |request| {
                let response = answer(numbers.fetch_add(1, Ordering::Relaxed), request);
                async move { Ok::<_, Infallible>(response.await) }
            });
            tokio::spawn(
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service),
            );
        }
    });
    url
}

fn plain(status: u16) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from_static(b"{}")));
    *response.status_mut() = status.try_into().unwrap();
    response
}

#[tokio::test]
async fn every_request_of_the_schedule_is_sent_and_counted() {
    let url = server(|number, request| async move {
        assert_eq!(request.headers()["authorization"], "Bearer secret");
        assert_eq!(request.headers()["penstock-deployment"], "green");
        assert_eq!(request.uri().path(), "/endpoints/iris/score");
        let mut response = plain(if number % 10 == 3 { 503 } else { 200 });
        let headers = response.headers_mut();
        if number % 10 == 3 {
            headers.insert("penstock-error-code", "no-instance-ready".parse().unwrap());
        } else {
            headers.insert("penstock-deployment", "green".parse().unwrap());
        }
        response
    })
    .await;
    let args = args("iris --rate 1000 --for 200ms --deployment green --max-errors 19");
    let report = run_until(&args, target(url), no_signals()).await.unwrap();
    assert_eq!(report.due, 200);
    assert_eq!((report.totals.sent, report.totals.ok), (200, 180));
    assert_eq!(report.totals.errors_by_kind["503 no-instance-ready"], 20);
    assert_eq!(report.totals.deployments["green"], 180);
    assert!(!report.passed());
}

#[tokio::test]
async fn a_stall_shows_in_every_request_that_it_delayed() {
    let stall = Duration::from_millis(400);
    let url = server(move |number, _| async move {
        if number == 0 {
            tokio::time::sleep(stall).await;
        }
        plain(200)
    })
    .await;
    // One connection: while the first request is stalled, those due after it cannot be sent.
    let args = args("iris --rate 100 --for 600ms --connections 1");
    let report = run_until(&args, target(url), no_signals()).await.unwrap();
    let totals = &report.totals;
    assert_eq!((totals.sent, totals.ok), (60, 60));
    // Due at 0, 10, … 300 ms and answered after 400 ms at the earliest: 31 of 60 waited at least
    // 100 ms.
    assert!(totals.latency.p50_us >= 99_000, "{:?}", totals.latency);
    assert!(totals.latency.mean_us > totals.service_time.mean_us);
    assert!(totals.late.connections_taken >= 31, "{:?}", totals.late);
    assert!(report.warnings[0].contains("--connections"));
}

#[tokio::test]
async fn a_request_does_not_wait_for_the_one_before() {
    // All requests are answered together, once the last of them has arrived.
    let barrier = Arc::new(tokio::sync::Barrier::new(20));
    let url = server(move |_, _| {
        let barrier = barrier.clone();
        async move {
            barrier.wait().await;
            plain(200)
        }
    })
    .await;
    let args = args("iris --rate 200 --for 100ms --timeout 1m");
    let report = run_until(&args, target(url), no_signals()).await.unwrap();
    assert_eq!((report.totals.sent, report.totals.ok), (20, 20));
}

#[tokio::test]
async fn a_timeout_is_an_error_of_its_own() {
    let url = server(|_, _| std::future::pending()).await;
    let args = args("iris --rate 50 --for 100ms --timeout 50ms");
    let report = run_until(&args, target(url), no_signals()).await.unwrap();
    assert_eq!(report.totals.errors_by_kind["no answer in time"], 5);
}

#[tokio::test]
async fn a_refused_connection_is_an_error_of_its_own() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/score", listener.local_addr().unwrap());
    drop(listener);
    let args = args("iris --rate 50 --for 100ms");
    let report = run_until(&args, target(url), no_signals()).await.unwrap();
    let kinds: Vec<_> = report.totals.errors_by_kind.into_iter().collect();
    assert_eq!(kinds, [("no connection: connection refused".to_owned(), 5)]);
}

#[tokio::test]
async fn a_server_that_closes_after_each_response_loses_no_request() {
    let url = server(|_, _| async {
        let mut response = plain(200);
        let headers = response.headers_mut();
        headers.insert("connection", "close".parse().unwrap());
        response
    })
    .await;
    let args = args("iris --rate 200 --for 250ms");
    let report = run_until(&args, target(url), no_signals()).await.unwrap();
    assert_eq!((report.totals.sent, report.totals.ok), (50, 50));
}

#[tokio::test]
async fn an_interrupt_ends_the_run_with_the_results_so_far() {
    let stop = no_signals();
    let token = stop.stop.clone();
    let url = server(move |number, _| {
        if number == 5 {
            token.cancel();
        }
        async { plain(200) }
    })
    .await;
    let args = args("iris --rate 1000");
    let report = run_until(&args, target(url), stop).await.unwrap();
    assert!(report.interrupted);
    assert!(report.totals.sent >= 6);
    assert_eq!(report.totals.sent, report.totals.ok);
}

#[tokio::test]
async fn instances_are_sampled_while_the_load_runs() {
    let url = server(|_, _| async { plain(200) }).await;
    let sampler: InstanceSampler = Arc::new(|| {
        Box::pin(async {
            Ok(BTreeMap::from([
                ("blue".to_owned(), 2),
                ("green".to_owned(), 1),
            ]))
        })
    });
    let target = LoadTarget {
        instances: Some(sampler),
        ..target(url)
    };
    let args = args("iris --rate 20 --for 500ms");
    let report = run_until(&args, target, no_signals()).await.unwrap();
    assert_eq!(report.totals.timeline[0].instances["blue"], 2);
    assert!(report.totals.instance_seconds >= Some(3));
}

#[tokio::test]
async fn invalid_loads_are_refused_before_anything_is_sent() {
    for (line, url, expected) in [
        ("iris --rate 1", "https://x/score", "only http://"),
        ("iris --rate 1", "not a url", "is not a URL"),
        (
            "iris --rate 1 --data {",
            "http://x/",
            "neither JSON nor a readable file",
        ),
        (
            "iris --trace /nowhere",
            "http://x/",
            "cannot open the trace",
        ),
        (
            "iris --trace /nowhere --step 0s",
            "http://x/",
            "--step is 0",
        ),
    ] {
        let error = run_until(&args(line), target(url.to_owned()), no_signals())
            .await
            .unwrap_err();
        let message = format!("{error:#}");
        assert!(message.contains(expected), "{line} {url}: {message}");
    }
}

#[test]
fn wrong_arguments_are_usage_errors() {
    for line in [
        "iris",
        "--rate 5",
        "iris --rate 0",
        "iris --rate -1",
        "iris --rate nan",
        "iris --rate 5 --trace x",
        "iris --url http://x/ --rate 5",
        "iris --rate 5 --connections 0",
        "iris --rate 5 --compress 0",
        "iris --rate 5 --for 10",
    ] {
        let words = std::iter::once("load").chain(line.split_whitespace());
        assert!(Command::try_parse_from(words).is_err(), "{line}");
    }
}
