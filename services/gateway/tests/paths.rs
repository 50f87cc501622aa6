//! The paths that `routes` open, what they reach, and how they are shared and counted.

#![allow(clippy::unwrap_used, reason = "helpers of tests count as such")]

mod support;

use contract::resources::{HttpMethod, Routes};
use contract::route::RouteUpdate;
use contract::time::Span;
use http::{Method, Request, Response};
use support::*;

/// Responds with the method and the path of every request.
async fn telling_instance() -> TestInstance {
    TestInstance::start(|request| async move {
        let text = format!("{} {}", request.method(), request.uri());
        Response::new(full_body(text))
    })
    .await
}

/// Everything is opened: `/score` reaches `/invocations`.
fn open() -> Routes {
    Routes {
        scoring: Some("/invocations".into()),
        prefix: Some("/".into()),
        ..Routes::default()
    }
}

fn settings(routes: Routes) -> Settings {
    Settings {
        routes: Some(routes),
        ..Settings::default()
    }
}

/// Blue has no routes, green and red open every path.
fn mixed_route(entries: &[InstanceEntry]) -> RouteUpdate {
    let shares = [
        ("blue", 50, entries),
        ("green", 30, entries),
        ("red", 20, entries),
    ];
    let mut update = route(1, &settings(open()), &shares);
    let deployments = &mut update.route.as_mut().unwrap().deployments;
    deployments
        .get_mut(&"blue".parse().unwrap())
        .unwrap()
        .routes = None;
    update
}

async fn ask(gateway: &TestGateway, method: Method, path: &str) -> TestResponse {
    let request = request(&format!("/endpoints/iris{path}")).method(method);
    send(gateway.address, request.body(full_body("")).unwrap()).await
}

async fn ask_host(gateway: &TestGateway, method: Method, host: &str, path: &str) -> TestResponse {
    let request = Request::builder().method(method).uri(path);
    let request = request.header("host", host).body(full_body(""));
    send(gateway.address, request.unwrap()).await
}

fn of_host(name: &str) -> gateway::Config {
    gateway::Config {
        domain: Some(name.into()),
        ..config()
    }
}

/// Stops the gateway and sums all its frames.
async fn all_frames(gateway: TestGateway) -> FrameTotals {
    let mut total = FrameTotals::default();
    let frames = gateway.stop().await;
    frames.iter().for_each(|frame| total.add(frame));
    total
}

#[tokio::test]
async fn the_scoring_path_reaches_the_path_of_the_routes() {
    let instance = telling_instance().await;
    let gateway = start(&[blue_route(1, &settings(open()), &[instance.entry()])]).await;
    let response = ask(&gateway, Method::POST, "/score?a=b/..").await;
    assert_eq!(response.text(), "POST /invocations?a=b/..");
}

#[tokio::test]
async fn every_other_path_reaches_the_prefix_with_any_method() {
    let instance = telling_instance().await;
    let routes = Routes {
        prefix: Some("/api".into()),
        ..Routes::default()
    };
    let gateway = start(&[blue_route(1, &settings(routes), &[instance.entry()])]).await;
    for method in ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PURGE"] {
        let sent = method.parse().unwrap();
        let response = ask(&gateway, sent, "/v1/a%20b?x=1").await;
        assert_eq!(response.text(), format!("{method} /api/v1/a%20b?x=1"));
    }
    let head = ask(&gateway, Method::HEAD, "/v1/models").await;
    assert_eq!((head.status.as_u16(), head.text()), (200, ""));
}

#[tokio::test]
async fn the_host_name_of_an_endpoint_has_all_paths_for_itself() {
    let instance = telling_instance().await;
    let update = blue_route(1, &settings(open()), &[instance.entry()]);
    let gateway = start_with(of_host("ml.example"), &[update]).await;
    for (path, expected) in [
        ("/score", "GET /invocations"),
        ("/v1/models?x", "GET /v1/models?x"),
        ("/healthz", "GET /healthz"),
        ("/", "GET /"),
    ] {
        let response = ask_host(&gateway, Method::GET, "iris.ML.example:80", path).await;
        assert_eq!(response.text(), expected);
    }
}

#[tokio::test]
async fn without_routes_only_the_scoring_path_and_what_is_below_it_are_served() {
    let instance = telling_instance().await;
    let settings = Settings {
        keys: vec!["secret"],
        ..Settings::default()
    };
    let gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    for (path, code) in [
        ("/score", "no-key"),
        ("/score/a", "no-key"),
        ("/scores", "unknown-endpoint"),
        ("/v1", "unknown-endpoint"),
        ("/", "unknown-endpoint"),
        ("", "unknown-endpoint"),
        ("/../v1", "unknown-endpoint"),
    ] {
        assert_eq!(
            ask(&gateway, Method::POST, path).await.code(),
            code,
            "{path}"
        );
    }
}

#[tokio::test]
async fn routes_that_open_only_the_scoring_path_open_nothing_below_it() {
    let instance = telling_instance().await;
    let routes = Routes {
        prefix: None,
        ..open()
    };
    let gateway = start(&[blue_route(1, &settings(routes), &[instance.entry()])]).await;
    let response = ask(&gateway, Method::POST, "/score").await;
    assert_eq!(response.text(), "POST /invocations");
    for path in ["/score/a", "/invocations"] {
        let response = ask(&gateway, Method::POST, path).await;
        assert_eq!(
            (response.status.as_u16(), response.code()),
            (404, "unknown-endpoint")
        );
    }
}

#[tokio::test]
async fn an_open_path_requires_the_key_and_has_no_segments_of_dots() {
    let instance = telling_instance().await;
    let settings = Settings {
        keys: vec!["secret"],
        ..settings(open())
    };
    let gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let response = ask(&gateway, Method::GET, "/v1").await;
    assert_eq!((response.status.as_u16(), response.code()), (401, "no-key"));
    for path in ["/..", "/v1/%2e%2e/x", "/v1/..;/x", "/./v1"] {
        let response = ask(&gateway, Method::GET, path).await;
        assert_eq!(
            (response.status.as_u16(), response.code()),
            (400, "bad-path"),
            "{path}"
        );
    }
}

#[tokio::test]
async fn a_path_is_shared_among_the_deployments_that_open_it_in_their_proportion() {
    let instance = telling_instance().await;
    let gateway = start(&[mixed_route(&[instance.entry()])]).await;
    let shares = async |paths: &[&str], requests: usize| {
        let mut counts = [0; 3];
        for number in 0..requests {
            let path = paths[number % paths.len()];
            let response = ask(&gateway, Method::POST, path).await;
            let name = response.header("penstock-deployment").to_owned();
            let index = ["blue", "green", "red"].iter().position(|n| *n == name);
            counts[index.unwrap()] += 1;
        }
        counts
    };
    assert_eq!(shares(&["/v1/a", "/v1/b"], 50).await, [0, 30, 20]);
    assert_eq!(shares(&["/score"], 100).await, [50, 30, 20]);
    assert_eq!(shares(&["/score/a"], 100).await, [50, 30, 20]);
}

#[tokio::test]
async fn requests_to_other_paths_do_not_shift_the_shares_of_the_scoring_path() {
    let instance = telling_instance().await;
    let gateway = start(&[mixed_route(&[instance.entry()])]).await;
    let mut blue = 0;
    for _ in 0..100 {
        let scored = ask(&gateway, Method::POST, "/score").await;
        blue += u32::from(scored.header("penstock-deployment") == "blue");
        ask(&gateway, Method::POST, "/v1").await;
    }
    assert_eq!(blue, 50);
}

#[tokio::test]
async fn a_deployment_that_does_not_open_the_path_is_404_by_name_and_in_no_frame() {
    let instance = telling_instance().await;
    let gateway = start(&[mixed_route(&[instance.entry()])]).await;
    for header in ["penstock-deployment", "azureml-model-deployment"] {
        let request = request("/endpoints/iris/v1").header(header, "blue");
        let response = send(gateway.address, request.body(full_body("")).unwrap()).await;
        assert_eq!(
            (response.status.as_u16(), response.code()),
            (404, "unknown-endpoint")
        );
    }
    let named = request("/endpoints/iris/v1").header("penstock-deployment", "green");
    let named = send(gateway.address, named.body(full_body("")).unwrap()).await;
    assert_eq!(named.text(), "POST /v1");
    let total = all_frames(gateway).await;
    assert_eq!((total.arrivals, total.outcomes.total()), (1, 1));
}

#[tokio::test]
async fn an_open_path_without_traffic_says_that_there_is_none() {
    let instance = telling_instance().await;
    let entries = [instance.entry()];
    let mut update = route(
        1,
        &settings(open()),
        &[("blue", 100, &entries), ("green", 0, &entries)],
    );
    let deployments = &mut update.route.as_mut().unwrap().deployments;
    deployments
        .get_mut(&"blue".parse().unwrap())
        .unwrap()
        .routes = None;
    let gateway = start(&[update]).await;
    assert_eq!(
        ask(&gateway, Method::POST, "/v1").await.code(),
        "no-traffic"
    );
}

#[tokio::test]
async fn with_routes_methods_other_than_post_count_only_where_they_are_named() {
    let instance = telling_instance().await;
    let routes = Routes {
        counted_methods: [HttpMethod::Put].into(),
        ..open()
    };
    let gateway = start(&[blue_route(1, &settings(routes), &[instance.entry()])]).await;
    for method in ["GET", "DELETE", "GET", "PUT", "POST", "POST"] {
        ask(&gateway, method.parse().unwrap(), "/v1").await;
    }
    let total = all_frames(gateway).await;
    assert_eq!((total.arrivals, total.outcomes.success), (3, 3));
    assert_eq!(
        (total.latency_count, total.status_classes.successful),
        (3, 3)
    );
    assert_eq!(total.instance_requests.values().sum::<u64>(), 6);
}

#[tokio::test]
async fn without_routes_every_method_counts() {
    let instance = telling_instance().await;
    let gateway = start_serving(&[instance.entry()]).await;
    ask(&gateway, Method::GET, "/score").await;
    assert_eq!(all_frames(gateway).await.arrivals, 1);
}

#[tokio::test]
async fn a_request_that_does_not_count_occupies_its_instance() {
    let instance = RawInstance::start().await;
    let mut settings = Settings::one_at_a_time();
    settings.routes = Some(open());
    settings.request.max_queue_wait = Span::from_millis(1);
    let gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let get = ask(&gateway, Method::GET, "/v1");
    let (get, post) = tokio::join!(get, async {
        let mut stream = instance.accept_request().await;
        let post = gateway.post("x").await;
        write_text(&mut stream, EMPTY_OK).await;
        post
    });
    assert_eq!(
        (get.status.as_u16(), post.code()),
        (200, "too-many-pending")
    );
    let total = all_frames(gateway).await;
    assert_eq!((total.arrivals, total.in_flight_max), (1, 1));
    assert!(total.in_flight_us > 0);
}

#[tokio::test]
async fn the_gateway_answers_for_its_own_health() {
    let settings = Settings {
        keys: vec!["secret"],
        ..settings(open())
    };
    let config = of_host("ml.example");
    let gateway = start_with(config, &[blue_route(1, &settings, &[])]).await;
    for host in ["127.0.0.1", "ml.example", "gateway.ml.example"] {
        let response = ask_host(&gateway, Method::GET, host, "/healthz").await;
        assert_eq!((response.status.as_u16(), response.text()), (200, "ok\n"));
        assert!(!response.header("x-request-id").is_empty());
    }
    let head = ask_host(&gateway, Method::HEAD, "127.0.0.1", "/healthz").await;
    assert_eq!((head.status.as_u16(), head.text()), (200, ""));
    let post = ask_host(&gateway, Method::POST, "127.0.0.1", "/healthz").await;
    assert_eq!(post.code(), "unknown-endpoint");
}

#[tokio::test]
async fn changed_routes_apply_from_the_next_request() {
    let instance = telling_instance().await;
    let entries = [instance.entry()];
    let mut gateway = start(&[blue_route(1, &Settings::default(), &entries)]).await;
    assert_eq!(
        ask(&gateway, Method::GET, "/v1").await.code(),
        "unknown-endpoint"
    );
    gateway
        .apply(blue_route(2, &settings(open()), &entries))
        .await;
    assert_eq!(ask(&gateway, Method::GET, "/v1").await.text(), "GET /v1");
}
