//! Malformed requests: each returns a problem, and changes nothing.
#![allow(clippy::unwrap_used)]

mod support;

use reqwest::Method;
use serde_json::json;
use support::{ENDPOINT, TestWorld, autoscale};

/// Method, path, body, status, code, and a part of the detail.
type Request = (
    &'static str,
    &'static str,
    &'static str,
    u16,
    &'static str,
    &'static str,
);

const REQUESTS: &[Request] = &[
    (
        "PUT",
        "/v1/endpoints/iris",
        "",
        400,
        "invalid-document",
        "the body is empty",
    ),
    (
        "PUT",
        "/v1/endpoints/iris",
        "[]",
        400,
        "invalid-document",
        "a resource is a mapping",
    ),
    (
        "PUT",
        "/v1/endpoints/iris",
        "--- {a: 1}\n--- {b: 1}",
        400,
        "invalid-document",
        "send one at a time",
    ),
    (
        "PUT",
        "/v1/endpoints/iris",
        "{\"kind\": \"Endpoint\", \"kind\": \"Endpoint\"}",
        400,
        "invalid-document",
        "given twice",
    ),
    (
        "PUT",
        "/v1/endpoints/Iris",
        "{}",
        400,
        "invalid-name",
        "lower-case letters",
    ),
    (
        "PUT",
        "/v1/endpoints/other",
        ENDPOINT,
        400,
        "invalid-document",
        "make them equal",
    ),
    (
        "PUT",
        "/v1/endpoints/iris/deployments/blue",
        ENDPOINT,
        400,
        "invalid-document",
        "send it to its own path",
    ),
    (
        "PUT",
        "/v1/endpoints/none/deployments/blue",
        "{\"apiVersion\":\"penstock/v1\",\"kind\":\"Deployment\",\"metadata\":{\"name\":\"blue\",\"endpoint\":\"none\"},\"spec\":{\"backend\":\"simulated\",\"instanceType\":\"a\"}}",
        404,
        "not-found",
        "create it first",
    ),
    (
        "PUT",
        "/v1/endpoints/iris?dryrun=true",
        ENDPOINT,
        400,
        "invalid-request",
        "use one of: dryRun",
    ),
    (
        "PUT",
        "/v1/endpoints/iris?dryRun=yes",
        ENDPOINT,
        400,
        "invalid-request",
        "write true or false",
    ),
    (
        "PUT",
        "/v1/endpoints/iris/traffic",
        "{\"traffic\": {\"red\": 100}}",
        400,
        "invalid-document",
        "create it first, or take it out",
    ),
    (
        "PUT",
        "/v1/endpoints/iris/traffic",
        "{\"traffic\": {\"blue\": 50}}",
        400,
        "invalid-document",
        "sum to 100",
    ),
    (
        "PUT",
        "/v1/endpoints/iris/traffic",
        "{\"trafic\": {}}",
        400,
        "invalid-document",
        "did you mean `traffic`?",
    ),
    (
        "PUT",
        "/v1/endpoints/none/traffic",
        "{}",
        404,
        "not-found",
        "create it first",
    ),
    (
        "POST",
        "/v1/endpoints/iris/keys/tertiary/regenerate",
        "",
        404,
        "not-found",
        "primary and secondary",
    ),
    (
        "PUT",
        "/v1/autoscale/iris/blue/pin",
        "{}",
        400,
        "invalid-document",
        "`instances` is missing",
    ),
    (
        "PUT",
        "/v1/autoscale/iris/blue/pin",
        "{\"instances\": 1001}",
        400,
        "invalid-document",
        "use 0 to 1000",
    ),
    (
        "PUT",
        "/v1/autoscale/iris/blue/pin",
        "{\"instances\": 2, \"until\": \"2001-01-01T00:00:00Z\"}",
        400,
        "invalid-document",
        "give a later one",
    ),
    (
        "PUT",
        "/v1/autoscale/iris/blue/pin",
        "{\"instances\": 2, \"until\": \"2101-01-01T00:00:00Z\", \"for\": \"1h\"}",
        400,
        "invalid-document",
        "keep one of the two",
    ),
    (
        "PUT",
        "/v1/autoscale/iris/blue/pin",
        "{\"instances\": 2, \"for\": \"0s\"}",
        400,
        "invalid-document",
        "write a duration such as 1h",
    ),
    (
        "PUT",
        "/v1/autoscale/iris/blue/pin",
        "{\"instances\": 2, \"until\": \"tomorrow\"}",
        400,
        "invalid-document",
        "RFC 3339",
    ),
    (
        "PUT",
        "/v1/autoscale/iris/green/pin",
        "{\"instances\": 2}",
        404,
        "not-found",
        "create it first",
    ),
    (
        "POST",
        "/v1/autoscale/iris/blue/pause",
        "{\"scaleIn\": false, \"scaleOut\": false}",
        400,
        "invalid-document",
        "name one",
    ),
    (
        "POST",
        "/v1/access",
        "{\"name\": \"ci\"}",
        400,
        "invalid-document",
        "`role` is missing",
    ),
    (
        "POST",
        "/v1/access",
        "{\"name\": \"ci\", \"role\": \"root\"}",
        400,
        "invalid-document",
        "use one of: viewer, operator, admin",
    ),
    (
        "POST",
        "/v1/access",
        "{\"name\": \"ci\", \"role\": \"viewer\", \"expires\": \"2001-01-01T00:00:00Z\"}",
        400,
        "invalid-document",
        "give a later one",
    ),
    (
        "DELETE",
        "/v1/access/nobody",
        "",
        404,
        "not-found",
        "nothing was revoked",
    ),
    (
        "DELETE",
        "/v1/access/admin",
        "",
        409,
        "last-admin",
        "grant another one first",
    ),
    (
        "DELETE",
        "/v1/endpoints/none",
        "",
        404,
        "not-found",
        "there is no endpoint",
    ),
    (
        "DELETE",
        "/v1/endpoints/iris/deployments/none",
        "",
        404,
        "not-found",
        "there is no deployment",
    ),
    (
        "GET",
        "/v1/endpoints?limit=0",
        "",
        400,
        "invalid-request",
        "use 1 to 1000",
    ),
    (
        "GET",
        "/v1/endpoints?limit=many",
        "",
        400,
        "invalid-request",
        "a whole number",
    ),
    (
        "GET",
        "/v1/endpoints?cursor=abc",
        "",
        400,
        "invalid-request",
        "nextCursor",
    ),
    (
        "GET",
        "/v1/endpoints?limit=1&limit=2",
        "",
        400,
        "invalid-request",
        "given twice",
    ),
    (
        "GET",
        "/v1/decisions?since=yesterday",
        "",
        400,
        "invalid-request",
        "a duration such as 10m",
    ),
    (
        "GET",
        "/v1/decisions/7",
        "",
        400,
        "invalid-request",
        "a UUID",
    ),
    (
        "GET",
        "/v1/autoscale/iris/blue/preview?from=1h&to=2h",
        "",
        400,
        "invalid-request",
        "must lie after `from`",
    ),
    (
        "GET",
        "/v1/history?step=10ms",
        "",
        400,
        "invalid-request",
        "whole seconds",
    ),
    (
        "GET",
        "/v1/logs/iris/none",
        "",
        404,
        "not-found",
        "there is no deployment",
    ),
    (
        "GET",
        "/v1/price-sheets",
        "",
        404,
        "unknown-path",
        "see /openapi.json",
    ),
    (
        "POST",
        "/v1/endpoints/iris/token",
        "",
        404,
        "unknown-path",
        "there is nothing at",
    ),
    (
        "PATCH",
        "/v1/endpoints/iris",
        "{}",
        405,
        "method-not-allowed",
        "Allow",
    ),
    (
        "POST",
        "/v1/events/replay",
        "{}",
        400,
        "invalid-document",
        "`checkDecisions` is missing",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn every_malformed_request_returns_a_problem_and_changes_nothing() {
    let world = TestWorld::with_blue().await;
    world
        .put("/v1/autoscale/iris/blue", &autoscale("iris", "blue"))
        .await
        .expect(201);
    let head = world.settled_head().await;
    for (method, path, body, status, code, detail) in REQUESTS {
        let method: Method = method.parse().unwrap();
        let reply = world
            .send(world.request(method.clone(), path).body(*body))
            .await;
        let context = format!("{method} {path} {body}\n{}", reply.text);
        assert_eq!(reply.status, *status, "{context}");
        assert_eq!(
            reply.header("content-type"),
            Some("application/problem+json"),
            "{context}"
        );
        let problem = reply.body();
        assert_eq!(problem["code"], *code, "{context}");
        assert_eq!(problem["status"], *status, "{context}");
        assert!(reply.text.contains(detail), "`{detail}`: {context}");
    }
    assert_eq!(world.head().await, head);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unsupported_method_gets_the_allowed_ones() {
    let world = TestWorld::start().await;
    let reply = world
        .post("/v1/endpoints/iris", &json!({}))
        .await
        .expect(405);
    let allowed = reply.header("allow").unwrap();
    for method in ["GET", "PUT", "DELETE"] {
        assert!(allowed.contains(method), "{allowed}");
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_and_documents_over_their_limits_are_rejected() {
    let world = TestWorld::start().await;
    let head = world.head().await;
    let put =
        |body: String| world.send(world.request(Method::PUT, "/v1/endpoints/iris").body(body));
    let large = format!("{ENDPOINT}# {}", "x".repeat(1024 * 1024));
    assert_eq!(put(large).await.expect(413).code(), "too-large");
    let deep = format!("{ENDPOINT}  x: {}{}", "[".repeat(40), "]".repeat(40));
    assert!(
        put(deep)
            .await
            .expect(400)
            .text
            .contains("flatten the document")
    );
    let deep_json = format!("{{\"a\": {}{}}}", "[".repeat(40), "]".repeat(40));
    assert!(
        put(deep_json)
            .await
            .expect(400)
            .text
            .contains("flatten the document")
    );
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..10 {
        let before = format!("*a{}, ", level - 1).repeat(10);
        bomb.push_str(&format!("a{level}: &a{level} [{before}]\n"));
    }
    assert!(
        put(bomb)
            .await
            .expect(400)
            .text
            .contains("after expanding aliases")
    );
    let cycle = format!("{ENDPOINT}  x: &x {{y: *x}}");
    assert!(
        put(cycle)
            .await
            .expect(400)
            .text
            .contains("inside the value that it refers to")
    );
    let labels: Vec<String> = (0..33).map(|n| format!("l{n}: x")).collect();
    let many = ENDPOINT.replace(
        "name: iris",
        &format!("name: iris\n  labels: {{{}}}", labels.join(", ")),
    );
    assert!(put(many).await.expect(400).text.contains("keep at most 32"));
    assert_eq!(world.head().await, head);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_openapi_document_excludes_is_rejected() {
    let world = TestWorld::with_blue().await;
    // Read as a list, its items would be the fields in their order.
    world
        .post("/v1/archive", &json!([null, null]))
        .await
        .expect(400);
    let beyond = "9223372036854775808";
    for path in ["/v1/events?after=", "/v1/access?cursor="] {
        world.get(&format!("{path}{beyond}")).await.expect(400);
    }
    // Also of a precondition that another one outweighs, and of a response that is stored.
    let regenerate = || {
        let path = "/v1/endpoints/iris/keys/primary/regenerate";
        world
            .request(Method::POST, path)
            .header("idempotency-key", "k")
    };
    world.send(regenerate()).await.expect(200);
    for request in [
        regenerate().header("if-none-match", "x"),
        regenerate()
            .header("if-none-match", "*")
            .header("if-match", "x"),
    ] {
        world.send(request).await.expect(400);
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whole_numbers_may_be_written_with_a_fraction_of_zero() {
    let world = TestWorld::with_blue().await;
    let pinned = world
        .request(Method::PUT, "/v1/autoscale/iris/blue/pin")
        .body(r#"{"instances": 2.0}"#);
    let pinned = world.send(pinned).await.expect(200).body();
    assert_eq!(pinned["pin"]["instances"], 2);
    let fraction = json!({"instances": 2.5});
    world
        .put("/v1/autoscale/iris/blue/pin", &fraction)
        .await
        .expect(400);
    world.stop().await;
}
