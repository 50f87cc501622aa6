//! `errorMapping`: how failures of models, and refusals, reach clients.

#![allow(clippy::unwrap_used, reason = "helpers of tests count as such")]

mod support;

use contract::resources::{ErrorMapping, Protocol};
use contract::time::Span;
use http::Response;
use serde_json::Value;
use support::*;

fn pass() -> Settings {
    Settings {
        error_mapping: ErrorMapping::Pass,
        ..Settings::default()
    }
}

/// Responds with the status in the query, and with its second part as `retry-after`, if there is one.
async fn failing_instance() -> TestInstance {
    TestInstance::start(|request| async move {
        let query = request.uri().query().unwrap();
        let (status, retry_after) = query.split_once('&').unwrap_or((query, ""));
        let mut response = Response::builder().status(status.parse::<u16>().unwrap());
        if !retry_after.is_empty() {
            response = response.header("retry-after", retry_after);
        }
        response.body(full_body("why")).unwrap()
    })
    .await
}

async fn ask(gateway: &TestGateway, query: &str) -> TestResponse {
    let request = request(&format!("/endpoints/iris/score?{query}"));
    send(gateway.address, request.body(full_body("x")).unwrap()).await
}

/// The error in the body, checked to have the code of the header.
fn error(response: &TestResponse) -> Value {
    assert_eq!(response.header("content-type"), "application/json");
    let body: Value = serde_json::from_slice(&response.body).unwrap();
    let error = &body["error"];
    assert_eq!(error["code"], response.header("penstock-error-code"));
    assert!(
        error["message"]
            .as_str()
            .is_some_and(|text| text.len() > 10)
    );
    error.clone()
}

#[tokio::test]
async fn a_models_error_is_passed_on_with_its_own_status() {
    let instance = failing_instance().await;
    let gateway = start(&[blue_route(1, &pass(), &[instance.entry()])]).await;
    for (status, code) in [("200", ""), ("404", "model-error"), ("500", "model-error")] {
        let response = ask(&gateway, status).await;
        assert_eq!(response.status.as_str(), status);
        assert_eq!(response.header("penstock-error-code"), code);
        assert_eq!(response.header("penstock-model-status"), "");
        assert_eq!(response.text(), "why");
    }
}

#[tokio::test]
async fn a_model_that_refuses_for_now_is_passed_on_with_a_time_to_retry() {
    let instance = failing_instance().await;
    let gateway = start(&[blue_route(1, &pass(), &[instance.entry()])]).await;
    for (query, expected) in [
        ("429", "1"),
        ("503&7", "7"),
        ("503&900", "120"),
        ("500", ""),
    ] {
        let response = ask(&gateway, query).await;
        assert_eq!(response.header("retry-after"), expected, "{query}");
    }
}

#[tokio::test]
async fn refusals_have_the_shape_of_openais_errors() {
    let settings = Settings {
        keys: vec!["secret"],
        body_max: 1,
        ..pass()
    };
    let gateway = start(&[blue_route(1, &settings, &[])]).await;
    let send_with = async |deployment: &str, authorization: &str, body: &'static str| {
        let request = request("/endpoints/iris/score")
            .header("penstock-deployment", deployment)
            .header("authorization", authorization);
        send(gateway.address, request.body(full_body(body)).unwrap()).await
    };
    let response = send_with("blue", "Bearer wrong", "").await;
    assert_eq!(response.status, 401);
    assert_eq!(error(&response)["type"], "authentication_error");
    for (deployment, status) in [("none", 404), ("blue", 413)] {
        let response = send_with(deployment, "Bearer secret", "xx").await;
        assert_eq!(response.status, status);
        assert_eq!(error(&response)["type"], "invalid_request_error");
    }
}

#[tokio::test]
async fn clients_of_the_open_inference_protocol_get_an_error_of_text() {
    let settings = Settings {
        keys: vec!["secret"],
        body_max: 1,
        protocol: Protocol::OpenInference,
        ..pass()
    };
    let gateway = start(&[blue_route(1, &settings, &[])]).await;
    // Before the deployment is chosen, and after.
    for (key, status) in [("wrong", 401), ("secret", 413)] {
        let request = request("/endpoints/iris/score");
        let request = request.header("authorization", format!("Bearer {key}"));
        let response = send(gateway.address, request.body(full_body("xx")).unwrap()).await;
        assert_eq!(response.status, status);
        let body: Value = serde_json::from_slice(&response.body).unwrap();
        assert!(body["error"].as_str().unwrap().len() > 10, "{body}");
    }
}

#[tokio::test]
async fn before_a_deployment_is_chosen_the_one_with_the_largest_share_says_how_to_refuse() {
    let mut update = route(1, &pass(), &[("blue", 40, &[]), ("green", 60, &[])]);
    let deployments = &mut update.route.as_mut().unwrap().deployments;
    let green = deployments.get_mut(&"green".parse().unwrap()).unwrap();
    green.error_mapping = ErrorMapping::Azure;
    let mut other = update.clone();
    other.revision.0 += 1;
    for deployment in other.route.as_mut().unwrap().deployments.values_mut() {
        deployment.percent = 100 - deployment.percent;
    }
    let mut gateway = start(&[update]).await;
    let send_to_none = async |gateway: &TestGateway| {
        let request = request("/endpoints/iris/score").header("penstock-deployment", "none");
        send(gateway.address, request.body(full_body("")).unwrap()).await
    };
    let response = send_to_none(&gateway).await;
    assert_eq!(response.header("content-type"), "application/problem+json");
    gateway.apply(other).await;
    error(&send_to_none(&gateway).await);
}

#[tokio::test]
async fn a_models_timeout_is_504_and_not_to_be_retried() {
    let instance = RawInstance::start().await;
    let mut settings = pass();
    settings.request.timeout = Span::from_millis(200);
    let mut gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let (response, _stream) = tokio::join!(gateway.post("x"), instance.accept_request());
    assert_eq!(response.status, 504);
    assert_eq!(response.header("x-should-retry"), "false");
    let error = error(&response);
    assert_eq!(
        (&error["code"], &error["type"]),
        (&"model-timeout".into(), &"timeout".into())
    );
    let total = gateway.totals(1).await;
    assert_eq!(
        (total.outcomes.timeout, total.status_classes.server_error),
        (1, 1)
    );
}

#[tokio::test]
async fn a_passed_error_counts_as_before_and_has_the_class_of_its_status() {
    let instance = failing_instance().await;
    let mut gateway = start(&[blue_route(1, &pass(), &[instance.entry()])]).await;
    ask(&gateway, "400").await;
    ask(&gateway, "500").await;
    let total = gateway.totals(2).await;
    let (outcomes, classes) = (total.outcomes, total.status_classes);
    assert_eq!(
        (outcomes.model_client_error, outcomes.model_server_error),
        (1, 1)
    );
    assert_eq!((classes.client_error, classes.server_error), (1, 1));
    let metrics = gateway.metrics.clone();
    gateway.stop().await;
    let text = metrics.encode();
    for class in ["4xx", "5xx"] {
        let labels = format!("deployment=\"blue\",role=\"live\",code_class=\"{class}\"");
        let line = format!("penstock_requests_total{{endpoint=\"iris\",{labels}}} 1\n");
        assert!(text.contains(&line), "{line} in {text}");
    }
}

#[tokio::test]
async fn what_is_not_there_is_refused_in_the_shape_of_the_protocol() {
    let instance = TestInstance::echo().await;
    let gateway = start(&[blue_route(1, &pass(), &[instance.entry()])]).await;
    for (request, code) in [
        (request("/endpoints/iris/v1/none"), "unknown-endpoint"),
        (
            request("/endpoints/iris/score").header("penstock-deployment", "none"),
            "unknown-deployment",
        ),
    ] {
        let response = send(gateway.address, request.body(full_body("x")).unwrap()).await;
        assert_eq!(response.status, 404);
        assert_eq!(error(&response)["code"], code);
    }
}

#[tokio::test]
async fn every_429_and_503_says_when_to_retry_within_two_minutes() {
    for error_mapping in [ErrorMapping::Azure, ErrorMapping::Pass] {
        let mut settings = Settings {
            error_mapping,
            ..Settings::one_at_a_time()
        };
        settings.request.max_queue_wait = Span::from_millis(1);
        let gateway = start(&[blue_route(1, &settings, &[])]).await;
        let response = gateway.post("x").await;
        assert_eq!(
            (response.status.as_u16(), response.header("retry-after")),
            (503, "1")
        );

        let instance = RawInstance::start().await;
        let gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
        let (_, response) = tokio::join!(gateway.post("x"), async {
            let mut stream = instance.accept_request().await;
            let response = gateway.post("x").await;
            write_text(&mut stream, EMPTY_OK).await;
            response
        });
        assert_eq!(
            (response.status.as_u16(), response.header("retry-after")),
            (429, "1")
        );
    }
}

#[tokio::test]
async fn a_long_queue_says_to_retry_after_two_minutes() {
    let mut settings = Settings::one_at_a_time();
    settings.request.max_queue_wait = Span::from_secs(300);
    settings.request.max_concurrent_requests_per_instance = 0;
    let gateway = start(&[blue_route(1, &settings, &[])]).await;
    let response = gateway.post("x").await;
    assert_eq!(
        (response.status.as_u16(), response.header("retry-after")),
        (429, "120")
    );
}
