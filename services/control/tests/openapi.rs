//! The API conforms to its description, and the checked-in schemas match the code.
//! `UPDATE_GOLDEN=1` regenerates them.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bus::RouteMessage;
use bytes::Bytes;
use contract::decision::{CarriedState, DecisionInputs, InstanceCounts, Pause};
use contract::events::{Event, InstanceEvent, InstanceRequested, InstanceStarted, RequestReason};
use contract::ids::{DeploymentRef, InstanceId, Uid};
use contract::log::StreamKind;
use contract::resources::{AutoscaleSpec, KINDS, document_schema};
use contract::route::RouteUpdate;
use control::api::routes;
use control::{HistoryQuery, HistorySource, LogQuery, LogSource, SourceError};
use domain::zones::ZoneData;
use futures::StreamExt;
use futures::stream::BoxStream;
use schemars::generate::SchemaSettings;
use serde_json::{Value, json};
use support::{Setup, TestWorld, autoscale, deployment, endpoint};

struct FakeSources;

#[async_trait]
impl LogSource for FakeSources {
    async fn logs(
        &self,
        of: &DeploymentRef,
        query: LogQuery,
    ) -> Result<BoxStream<'static, std::io::Result<Bytes>>, SourceError> {
        let line = format!("{of} {:?}\n", query.lines);
        Ok(futures::stream::once(async move { Ok(Bytes::from(line)) }).boxed())
    }
}

#[async_trait]
impl HistorySource for FakeSources {
    async fn history(&self, query: HistoryQuery) -> Result<Vec<Value>, SourceError> {
        Ok(vec![
            json!({"time": query.from, "endpoint": query.endpoint, "step": query.step}),
        ])
    }
}

/// Appends a decision and an instance as the other services would.
async fn append_decision_and_instance(world: &TestWorld) -> u64 {
    let view = world
        .get("/v1/endpoints/iris/deployments/blue")
        .await
        .expect(200)
        .body();
    let uid: Uid = serde_json::from_value(view["metadata"]["uid"].clone()).unwrap();
    let of: DeploymentRef = "iris/blue".parse().unwrap();
    let policy: AutoscaleSpec =
        serde_json::from_value(autoscale("iris", "blue")["spec"].clone()).unwrap();
    let inputs = DecisionInputs {
        pinned_by: None,
        failed_starts: None,
        starts_at_default: false,
        policy_revision: 1,
        policy: Some(policy.into()),
        fixed_instances: 1,
        pin: None,
        pause: Pause::default(),
        instances: InstanceCounts::default(),
        signals: BTreeMap::new(),
        carried: CarriedState::default(),
        zone_data: None,
    };
    let decision =
        domain::autoscale::decide(&of, uid, inputs, &ZoneData::bundled(), support::START);
    let scaling = world.stream(StreamKind::Scaling, "iris");
    world
        .write(scaling, vec![Event::ScalingDecided(Box::new(decision))])
        .await;
    let id = InstanceId::from("iris-blue-1".to_owned());
    let requested = InstanceRequested {
        id: id.clone(),
        generation: 1,
        deployment: of,
        deployment_uid: uid,
        revision: 1,
        node: "n1".into(),
        decision: None,
        reason: RequestReason::ScaleOut,
        spec: serde_json::from_value(view["spec"].clone()).unwrap(),
    };
    let instances = world.stream(StreamKind::Instances, "iris");
    world
        .write(
            instances,
            vec![Event::InstanceRequested(Box::new(requested))],
        )
        .await;
    let started = InstanceStarted {
        id: id.clone(),
        generation: 1,
        address: "127.0.0.1:9000".into(),
        pid: Some(7),
        adopted: false,
    };
    let node = contract::log::StreamName::of_node(&"default/iris".parse().unwrap(), "n1");
    world
        .write(
            node,
            vec![
                Event::InstanceStarted(started),
                Event::InstanceReady(InstanceEvent { id }),
            ],
        )
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_conforms_to_the_openapi_document() {
    let world = TestWorld::start_with(Setup {
        logs: Arc::new(FakeSources),
        history: Arc::new(FakeSources),
        ..Setup::default()
    })
    .await;
    world.create_endpoint("iris").await;
    world.create_deployment("iris", "blue").await;
    world.create_deployment("iris", "green").await;
    world
        .put("/v1/autoscale/iris/blue", &autoscale("iris", "blue"))
        .await
        .expect(201);
    world.wait_until_settled().await;
    let position = append_decision_and_instance(&world).await;
    world.get_at("/v1/instances", position).await.expect(200);
    world.wait_until_settled().await;
    for path in [
        "/v1/endpoints",
        "/v1/endpoints/iris",
        "/v1/endpoints/iris/keys",
        "/v1/endpoints/iris/deployments",
        "/v1/endpoints/iris/deployments/blue",
        "/v1/deployments",
        "/v1/autoscale",
        "/v1/autoscale/iris/blue",
        "/v1/autoscale/iris/blue/preview",
        "/v1/instances?endpoint=iris",
        "/v1/logs/iris/blue?limit=5",
        "/v1/history?endpoint=iris&since=1m&step=10s",
        "/v1/events",
        "/v1/events/verify",
        "/v1/events/heads",
        "/v1/access",
        "/openapi.json",
        "/healthz",
        "/readyz",
        "/metrics",
    ] {
        world.get(path).await.expect(200);
    }
    let archived = world.post("/v1/archive", &json!({"before": 3})).await;
    assert_eq!(archived.expect(200).body()["events"], 2);
    world.wait_for_state("iris/blue", "Succeeded").await;
    let view = world
        .get("/v1/endpoints/iris/deployments/blue")
        .await
        .body();
    assert_eq!(view["status"]["instances"]["ready"], 1);
    let instances = world.get("/v1/instances").await.body();
    assert_eq!(
        (
            &instances["items"][0]["state"],
            &instances["items"][0]["pid"]
        ),
        (&json!("ready"), &json!(7))
    );
    let decisions = world
        .get("/v1/decisions?endpoint=iris&since=1h")
        .await
        .expect(200)
        .body();
    let decision = &decisions["items"][0];
    assert_eq!(
        (&decision["endpoint"], &decision["deployment"]),
        (&json!("iris"), &json!("blue"))
    );
    let id = decision["id"].as_str().unwrap();
    assert_eq!(
        world
            .get(&format!("/v1/decisions/{id}"))
            .await
            .expect(200)
            .body(),
        *decision
    );
    let replayed = world
        .post("/v1/events/replay", &json!({"checkDecisions": true}))
        .await
        .expect(200)
        .body();
    assert_eq!(
        (&replayed["ok"], &replayed["equal"]),
        (&json!(true), &json!(1)),
        "{replayed}"
    );
    let verified = world.get("/v1/events/verify").await.expect(200).body();
    assert_eq!(verified["ok"], true, "{verified}");
    let heads = world.get("/v1/events/heads").await.expect(200).body();
    let mut stored = json!({"heads": heads["items"]});
    let verified = world
        .post("/v1/events/verify", &stored)
        .await
        .expect(200)
        .body();
    assert_eq!(verified["ok"], true, "{verified}");
    // A head of another log.
    stored["heads"][0]["hash"] = json!("00".repeat(32));
    let verified = world
        .post("/v1/events/verify", &stored)
        .await
        .expect(200)
        .body();
    assert_eq!(verified["ok"], false, "{verified}");
    let problem = verified["problems"][0].as_str().unwrap();
    assert!(
        problem.contains("does not match the recorded head"),
        "{problem}"
    );

    world
        .put(
            "/v1/endpoints/iris/traffic",
            &json!({"traffic": {"blue": 100}}),
        )
        .await
        .expect(200);
    world
        .post("/v1/endpoints/iris/keys/primary/regenerate", &json!({}))
        .await
        .expect(200);
    world
        .put("/v1/autoscale/iris/blue/pin", &json!({"instances": 2}))
        .await
        .expect(200);
    world
        .delete("/v1/autoscale/iris/blue/pin")
        .await
        .expect(200);
    world
        .post("/v1/autoscale/iris/blue/pause", &json!({}))
        .await
        .expect(200);
    world
        .post("/v1/autoscale/iris/blue/resume", &json!({}))
        .await
        .expect(200);
    world.delete("/v1/autoscale/iris/blue").await.expect(200);
    world
        .post("/v1/access", &json!({"name": "ci", "role": "viewer"}))
        .await
        .expect(201);
    world.delete("/v1/access/ci").await.expect(200);
    check_parking_routes(&world).await;
    world
        .delete("/v1/endpoints/iris/deployments/green")
        .await
        .expect(202);
    world.delete("/v1/endpoints/iris").await.expect(202);

    let is_success = |status: &u16| *status < 300;
    let responses = world.responses.lock().unwrap().clone();
    let responses: BTreeSet<String> = responses
        .iter()
        .filter(|(_, _, status)| is_success(status))
        .map(|(method, path, _)| format!("{method} {path}"))
        .collect();
    let table: BTreeSet<String> = routes()
        .iter()
        // The stream has no end; `streams.rs` tests it.
        .filter(|entry| entry.id != "streamEvents")
        .map(|entry| format!("{} {}", entry.method, entry.path))
        .collect();
    assert_eq!(responses, table);
    world.stop().await;
}

/// Nothing is really parked: the row is written here as a consumer would write it.
async fn check_parking_routes(world: &TestWorld) {
    let doc = json!({
        "consumer": "autoscaler", "endpoint": "iris", "position": 1, "eventType": "endpoint.created",
        "detail": "poison", "since": "2026-10-10T12:00:00.000Z"
    });
    let row = contract::log::RowChange {
        model: runtime::parking::PARKED,
        key: "autoscaler/default/iris".into(),
        endpoint: "default/iris".into(),
        deployment: String::new(),
        position: contract::ids::Position(1),
        time: contract::time::Timestamp::from_secs(1),
        doc: Some(doc.to_string()),
    };
    let commit = store::Commit {
        rows: vec![row],
        ..Default::default()
    };
    world.store.commit(commit).await.unwrap();
    let parked = world.get("/v1/events/parked").await.expect(200).body();
    assert_eq!(parked["items"], json!([doc]));
    let endpoint = world.get("/v1/events?limit=1000").await.body();
    let position = endpoint["items"]
        .as_array()
        .unwrap()
        .iter()
        .find(|event| event["type"] == "endpoint.created")
        .unwrap()["position"]
        .clone();
    let skip = format!("/v1/events/{position}/skip");
    let body = json!({"consumer": "autoscaler", "reason": "a test"});
    let skipped = world.post(&skip, &body).await.expect(200).body();
    assert_eq!(skipped["endpoint"], "iris");
    let no_reason = json!({"consumer": "autoscaler"});
    world.post(&skip, &no_reason).await.expect(400);
    world
        .post("/v1/events/999999/skip", &body)
        .await
        .expect(404);
    world
        .post("/v1/endpoints/iris/unpark", &body)
        .await
        .expect(200);
    let other = json!({"consumer": "meter"});
    world
        .post("/v1/endpoints/iris/unpark", &other)
        .await
        .expect(404);
    let events = world.get("/v1/events?limit=1000").await.body();
    let kinds = |kind: &str| {
        let events = events["items"].as_array().unwrap().iter();
        events.filter(|event| event["type"] == kind).count()
    };
    assert_eq!(kinds("event.skipped"), 1);
    assert_eq!(kinds("consumer.unparked"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn gateways_get_a_route_for_every_change() {
    let world = TestWorld::start().await;
    let mut routes = support::bus_of(&world).subscribe_routes();
    world.create_endpoint("iris").await;
    world.create_deployment("iris", "blue").await;
    world.wait_until_settled().await;
    let position = append_decision_and_instance(&world).await;
    let mut updates = Vec::new();
    while updates
        .last()
        .is_none_or(|last: &Arc<RouteUpdate>| last.revision.0 < position)
    {
        if let RouteMessage::Update(update) = routes.recv().await.unwrap() {
            updates.push(update);
        }
    }
    assert!(
        updates.is_sorted_by_key(|update| update.revision),
        "{updates:?}"
    );
    let route = updates.last().unwrap().route.as_ref().unwrap();
    let blue = &route.deployments[&"blue".parse().unwrap()];
    assert_eq!(blue.instances[0].address, "127.0.0.1:9000");
    assert_eq!(route.key_hashes.len(), 2);
    world.stop().await;
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../schemas")
}

#[track_caller]
fn golden(name: &str, text: &str) {
    let path = root().join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(root()).unwrap();
        std::fs::write(&path, text).unwrap();
        return;
    }
    let stored = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        stored == text,
        "{} differs from the code; run `UPDATE_GOLDEN=1 cargo test -p penstock-control --test openapi` and review the difference",
        path.display()
    );
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap() + "\n"
}

#[test]
fn the_checked_in_openapi_document_is_up_to_date() {
    golden("openapi.json", &control::openapi::text());
}

#[test]
fn every_parameter_states_which_texts_it_takes() {
    let document = control::openapi::document();
    let operations = document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, methods)| {
            let methods = methods.as_object().unwrap().values();
            methods.map(move |operation| (path, operation))
        });
    for (path, operation) in operations {
        let parameters = operation["parameters"].as_array().unwrap();
        let names: Vec<&str> = path
            .split('/')
            .filter(|part| part.starts_with('{'))
            .collect();
        let in_path = parameters
            .iter()
            .filter(|parameter| parameter["in"] == "path");
        assert_eq!(in_path.count(), names.len(), "{path}");
        for parameter in parameters {
            let schema = &parameter["schema"];
            // Filters match nothing for a name that does not exist, whatever it is.
            let is_filter = ["endpoint", "deployment", "instance"]
                .map(Value::from)
                .contains(&parameter["name"])
                && parameter["in"] == "query";
            let is_limited = schema["type"] == "boolean"
                || schema["minimum"].is_number() && schema["maximum"].is_number()
                || ["pattern", "format", "enum", "anyOf", "$ref"]
                    .iter()
                    .any(|key| !schema[key].is_null());
            assert!(is_filter || is_limited, "{path}: {parameter}");
        }
    }
}

#[test]
fn every_kind_of_document_can_be_put() {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    let entries = routes().into_iter();
    let bodies = entries.filter_map(|entry| Some((entry.method.clone(), entry.request?)));
    let titles: Vec<Value> = bodies
        .filter(|(method, _)| *method == http::Method::PUT)
        .map(|(_, body)| body(&mut generator).to_value()["title"].clone())
        .collect();
    for kind in KINDS {
        let is_put = titles.contains(&json!(kind));
        assert!(is_put, "no route of `control::api` takes a {kind}");
    }
}

#[test]
fn the_checked_in_document_schemas_are_up_to_date() {
    for kind in KINDS {
        let mut generator = SchemaSettings::draft2020_12().into_generator();
        let mut schema = document_schema(kind, &mut generator).to_value();
        schema["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
        schema["$defs"] = json!(generator.take_definitions(true));
        jsonschema::validator_for(&schema).unwrap();
        golden(
            &format!("{}.schema.json", kind.to_lowercase()),
            &pretty(&schema),
        );
    }
}

#[test]
fn the_checked_in_event_schemas_are_up_to_date() {
    let mut all = serde_json::Map::new();
    for (name, version, schema) in contract::events::event_schemas() {
        jsonschema::validator_for(schema.as_value()).unwrap();
        all.insert(format!("{name}/{version}"), schema.to_value());
    }
    golden("events.schema.json", &pretty(&Value::Object(all)));
}

#[test]
fn accepted_documents_match_their_schemas() {
    for (kind, document) in [
        ("Endpoint", endpoint("iris")),
        ("Deployment", deployment("iris", "blue")),
        ("Autoscale", autoscale("iris", "blue")),
    ] {
        let mut generator = SchemaSettings::draft2020_12().into_generator();
        let mut schema = document_schema(kind, &mut generator).to_value();
        schema["$defs"] = json!(generator.take_definitions(true));
        let validator = jsonschema::validator_for(&schema).unwrap();
        assert!(validator.is_valid(&document), "{kind}");
        let mut wrong = document.clone();
        wrong["spec"]["surprise"] = json!(1);
        assert!(!validator.is_valid(&wrong), "{kind}");
    }
}
