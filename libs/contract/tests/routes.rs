//! `routes` and `errorMapping`: in documents, and in the routes that gateways of other releases read.

#![allow(clippy::unwrap_used)]

use contract::resources::{DeploymentSpec, ErrorMapping, HttpMethod, Routes};
use contract::route::DeploymentRoute;
use serde_json::{Value, json};

fn spec() -> Value {
    json!({"backend": "process", "instanceType": "cpu-small"})
}

fn route() -> Value {
    json!({
        "uid": "00000000-0000-0000-0000-000000000001", "percent": 100, "latencyThresholdsUs": [], "instances": [],
        "requestSettings": {"timeout": "5s", "maxConcurrentRequestsPerInstance": 1, "maxQueueWait": "500ms"},
    })
}

#[test]
fn a_document_names_paths_and_methods() {
    let mut document = spec();
    document["routes"] =
        json!({"scoring": "/invocations", "prefix": "/", "countedMethods": ["GET"]});
    document["errorMapping"] = json!("pass");
    let read: DeploymentSpec = serde_json::from_value(document.clone()).unwrap();
    let expected = Routes {
        scoring: Some("/invocations".into()),
        prefix: Some("/".into()),
        counted_methods: [HttpMethod::Get].into(),
    };
    assert_eq!(read.routes, Some(expected));
    assert_eq!(read.error_mapping(), ErrorMapping::Pass);
    let written = serde_json::to_value(&read).unwrap();
    assert_eq!(written["routes"], document["routes"]);
}

#[test]
fn a_document_with_an_unknown_field_method_or_mapping_is_refused() {
    for (field, value) in [
        ("routes", json!({"scorings": "/a"})),
        ("routes", json!({"countedMethods": ["get"]})),
        ("errorMapping", json!("openai")),
    ] {
        let mut document = spec();
        document[field] = value.clone();
        let read = serde_json::from_value::<DeploymentSpec>(document);
        assert!(read.is_err(), "{field}: {value}");
    }
}

#[test]
fn what_is_left_out_is_not_written() {
    let read: DeploymentSpec = serde_json::from_value(spec()).unwrap();
    let written = serde_json::to_value(&read).unwrap();
    assert!(written.get("routes").is_none() && written.get("errorMapping").is_none());
}

#[test]
fn a_route_of_an_older_release_serves_as_it_did() {
    let read: DeploymentRoute = serde_json::from_value(route()).unwrap();
    assert_eq!(
        (&read.routes, read.error_mapping),
        (&None, ErrorMapping::Azure)
    );
    assert_eq!(serde_json::to_value(&read).unwrap(), route());
}

#[test]
fn every_method_is_written_as_in_a_request() {
    for name in [
        "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE",
    ] {
        let method: HttpMethod = serde_json::from_value(json!(name)).unwrap();
        assert_eq!(method.as_str(), name);
    }
}
