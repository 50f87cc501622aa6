//! What instances learn of a client and clients of an instance, by headers.

#![allow(clippy::unwrap_used, reason = "helpers of tests count as such")]

mod support;

use contract::resources::Authorization;
use http::Response;
use support::*;

/// An instance that responds with the headers of each request, one per line.
async fn header_echo() -> TestInstance {
    TestInstance::start(|request| async move {
        let lines = request.headers().iter();
        let lines = lines.map(|(name, value)| format!("{name}: {}\n", value.to_str().unwrap()));
        Response::new(full_body(lines.collect::<String>()))
    })
    .await
}

/// Sends a request with these headers.
async fn send_with(gateway: &TestGateway, headers: &[(&str, &str)]) -> TestResponse {
    let mut request = request("/endpoints/iris/score");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    send(gateway.address, request.body(full_body("x")).unwrap()).await
}

#[tokio::test]
async fn a_clients_well_formed_request_id_is_kept() {
    let instance = header_echo().await;
    let gateway = start_serving(&[instance.entry()]).await;
    let longest = "a".repeat(128);
    for id in ["A.b_c-9", &longest] {
        let response = send_with(&gateway, &[("x-request-id", id)]).await;
        assert_eq!(response.header("x-request-id"), id);
        let sent = format!("x-request-id: {id}\n");
        assert!(response.text().contains(&sent), "{}", response.text());
    }
}

#[tokio::test]
async fn any_other_request_id_is_replaced() {
    let instance = header_echo().await;
    let gateway = start_serving(&[instance.entry()]).await;
    let too_long = "a".repeat(129);
    for ids in [
        &[""][..],
        &["a b"],
        &["a/b"],
        &["\u{e9}"],
        &[&too_long],
        &["a", "b"],
    ] {
        let headers: Vec<_> = ids.iter().map(|id| ("x-request-id", *id)).collect();
        let mut request = request("/endpoints/iris/score");
        for (name, value) in headers {
            request = request.header(name, value.as_bytes());
        }
        let response = send(gateway.address, request.body(full_body("x")).unwrap()).await;
        let id: uuid::Uuid = response.header("x-request-id").parse().unwrap();
        let sent = format!("x-request-id: {id}\n");
        assert!(response.text().contains(&sent), "{}", response.text());
    }
}

#[tokio::test]
async fn a_refusal_carries_the_clients_request_id() {
    let gateway = start(&[]).await;
    let response = send_with(&gateway, &[("x-request-id", "mine")]).await;
    assert_eq!(
        (response.code(), response.header("x-request-id")),
        ("unknown-endpoint", "mine")
    );
}

const FORGED: [(&str, &str); 3] = [
    ("x-forwarded-for", "6.6.6.6"),
    ("x-forwarded-proto", "https"),
    ("forwarded", "for=6.6.6.6"),
];

#[tokio::test]
async fn an_instance_learns_the_clients_address_and_not_what_the_client_claims() {
    let instance = header_echo().await;
    let gateway = start_serving(&[instance.entry()]).await;
    let response = send_with(&gateway, &FORGED).await;
    let text = response.text();
    for line in [
        "x-forwarded-for: 127.0.0.1\n",
        "x-forwarded-host: gateway\n",
        "x-forwarded-proto: http\n",
        "x-forwarded-prefix: /endpoints/iris\n",
        "forwarded: for=127.0.0.1;proto=http;host=\"gateway\"\n",
    ] {
        assert_eq!(text.matches(line).count(), 1, "{line} in {text}");
    }
    assert!(!text.contains("6.6.6.6"), "{text}");
}

#[tokio::test]
async fn what_a_trusted_proxy_claims_is_kept() {
    let instance = header_echo().await;
    let config = gateway::Config {
        trusted_proxies: vec!["127.0.0.0/8".parse().unwrap()],
        ..config()
    };
    let route = blue_route(1, &Settings::default(), &[instance.entry()]);
    let gateway = start_with(config, &[route]).await;
    let response = send_with(&gateway, &FORGED).await;
    let text = response.text();
    for line in [
        "x-forwarded-for: 6.6.6.6, 127.0.0.1\n",
        "x-forwarded-proto: https\n",
        "forwarded: for=6.6.6.6, for=127.0.0.1;proto=http;host=\"gateway\"\n",
    ] {
        assert_eq!(text.matches(line).count(), 1, "{line} in {text}");
    }
}

#[tokio::test]
async fn authorization_reaches_an_instance_only_if_its_deployment_asks_for_it() {
    let instance = header_echo().await;
    for (authorization, is_passed) in [(Authorization::Strip, false), (Authorization::Pass, true)] {
        let settings = Settings {
            authorization,
            ..Settings::default()
        };
        let gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
        let response = send_with(&gateway, &[("authorization", "Bearer theirs")]).await;
        let passed = response.text().contains("authorization: Bearer theirs\n");
        assert_eq!(passed, is_passed, "{}", response.text());
    }
}

#[tokio::test]
async fn a_location_at_the_instances_own_address_becomes_one_at_the_endpoint() {
    let instance = RawInstance::start().await;
    let gateway = start_serving(&[instance.entry()]).await;
    let own = instance.address;
    let cases = [
        (
            format!("http://{own}/score/?a=b"),
            "/endpoints/iris/score/?a=b",
        ),
        (format!("HTTP://{own}"), "/endpoints/iris/"),
        (format!("http://{own}?a"), "/endpoints/iris/?a"),
        (format!("http://{own}0/score"), ""),
        (format!("https://{own}/score/"), "/endpoints/iris/score/"),
        (format!("//{own}/score/"), "/endpoints/iris/score/"),
        (format!("http://{own}//score"), ""),
        (format!("http://{own}/\\other.example"), ""),
        ("http://other.example/score".into(), ""),
        ("/score/2".into(), ""),
    ];
    for (location, expected) in cases {
        let (response, ()) = tokio::join!(gateway.post("x"), async {
            let mut stream = instance.accept_request().await;
            let head = "HTTP/1.1 307 Temporary Redirect\r\nconnection: close\r\ncontent-length: 0";
            write_text(
                &mut stream,
                &format!("{head}\r\nlocation: {location}\r\n\r\n"),
            )
            .await;
        });
        let expected = if expected.is_empty() {
            &location
        } else {
            expected
        };
        assert_eq!(response.header("location"), expected);
    }
}

#[tokio::test]
async fn a_host_name_is_compared_without_case_and_with_a_dot_at_its_end() {
    let instance = TestInstance::echo().await;
    let config = gateway::Config {
        domain: Some("ml.example".into()),
        ..config()
    };
    let route = blue_route(1, &Settings::default(), &[instance.entry()]);
    let gateway = start_with(config, &[route]).await;
    for host in ["Iris.ML.Example", "iris.ml.example.", "IRIS.ml.example.:80"] {
        let mut request = request("/score").body(full_body("x")).unwrap();
        request.headers_mut().insert("host", host.parse().unwrap());
        assert_eq!(send(gateway.address, request).await.status, 200, "{host}");
    }
}
