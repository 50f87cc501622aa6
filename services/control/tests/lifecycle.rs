//! Endpoints, deployments, traffic and autoscale over real HTTP.
#![allow(clippy::unwrap_used)]

mod support;

use contract::ids::EndpointKey;
use domain::views::MODEL_VERSION;
use reqwest::Method;
use serde_json::json;
use support::{Setup, TestWorld, autoscale, deployment, endpoint};

#[tokio::test(flavor = "multi_thread")]
async fn a_get_returns_what_was_put_with_uid_status_and_etag() {
    let world = TestWorld::start().await;
    let put = world
        .put("/v1/endpoints/iris", &endpoint("iris"))
        .await
        .expect(201);
    assert_eq!(put.body()["result"], "created");
    assert_eq!(put.header("etag"), Some("\"1\""));
    world.wait_until_settled().await;
    let got = world
        .get_at("/v1/endpoints/iris", put.position())
        .await
        .expect(200);
    let body = got.body();
    assert_eq!(
        body["metadata"]["uid"],
        put.body()["resource"]["metadata"]["uid"]
    );
    assert_eq!(body["status"]["provisioningState"], "Succeeded");
    assert_eq!(
        body["status"]["scoringUri"],
        "http://127.0.0.1:8080/endpoints/iris/score"
    );
    assert_eq!(got.header("etag"), Some("\"1\""));
    let list = world.get("/v1/endpoints").await.expect(200).body();
    assert_eq!(list["items"].as_array().unwrap().len(), 1);
    assert_eq!(list["nextCursor"], serde_json::Value::Null);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_put_reports_changes_and_an_equal_one_writes_nothing() {
    let world = TestWorld::with_iris().await;
    let path = "/v1/endpoints/iris/deployments/blue";
    world
        .put(path, &deployment("iris", "blue"))
        .await
        .expect(201);
    let head = world.settled_head().await;
    let again = world
        .put(path, &deployment("iris", "blue"))
        .await
        .expect(200)
        .body();
    assert_eq!(
        (again["result"].as_str(), again["changes"].clone()),
        (Some("unchanged"), json!([]))
    );
    assert_eq!(world.head().await, head);
    let mut changed = deployment("iris", "blue");
    changed["spec"]["instances"] = json!(3);
    let reply = world.put(path, &changed).await.expect(200).body();
    assert_eq!(reply["result"], "changed");
    assert_eq!(
        reply["changes"],
        json!([{"pointer": "/spec/instances", "from": 1, "to": 3}])
    );
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_reports_changes_without_making_them() {
    let world = TestWorld::start().await;
    let head = world.head().await;
    let put = world
        .put("/v1/endpoints/iris?dryRun=true", &endpoint("iris"))
        .await
        .expect(200)
        .body();
    assert_eq!(
        (put["result"].as_str(), put["dryRun"].as_bool()),
        (Some("created"), Some(true))
    );
    assert_eq!(world.head().await, head);
    world.get("/v1/endpoints/iris").await.expect(404);
    world.create_endpoint("iris").await;
    world.create_deployment("iris", "blue").await;
    let head = world.settled_head().await;
    let deleted = world
        .delete("/v1/endpoints/iris?dryRun=true")
        .await
        .expect(200)
        .body();
    assert_eq!(deleted["deployments"], json!(["blue"]));
    let mut changed = deployment("iris", "blue");
    changed["spec"]["instanceType"] = json!("gpu");
    let reply = world
        .put("/v1/endpoints/iris/deployments/blue?dryRun=true", &changed)
        .await
        .expect(200)
        .body();
    assert_eq!(
        reply["changes"],
        json!([{"pointer": "/spec/instanceType", "from": "cpu-small", "to": "gpu"}])
    );
    assert_eq!(world.head().await, head);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn if_match_guards_against_concurrent_changes() {
    let world = TestWorld::with_iris().await;
    let mut changed = endpoint("iris");
    changed["spec"]["auth"] = json!("none");
    let put = |tag: &'static str| {
        let request = world
            .request(Method::PUT, "/v1/endpoints/iris")
            .json(&changed);
        world.send(request.header("if-match", tag))
    };
    assert_eq!(put("\"7\"").await.expect(412).code(), "precondition-failed");
    put("\"1\"").await.expect(200);
    put("\"1\"").await.expect(412);
    put("*").await.expect(200);
    put("blue").await.expect(400);
    let request = world
        .request(Method::PUT, "/v1/endpoints/iris")
        .json(&changed);
    world
        .send(request.header("if-none-match", "*"))
        .await
        .expect(412);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn traffic_needs_existing_deployments_and_prevents_their_deletion() {
    let world = TestWorld::with_iris().await;
    for name in ["blue", "green"] {
        let path = format!("/v1/endpoints/iris/deployments/{name}");
        world
            .put(&path, &deployment("iris", name))
            .await
            .expect(201);
    }
    let path = "/v1/endpoints/iris/traffic";
    let put = world
        .put(path, &json!({"traffic": {"blue": 90, "green": 10}}))
        .await
        .expect(200);
    assert_eq!(
        put.body()["resource"]["spec"]["traffic"],
        json!({"blue": 90, "green": 10})
    );
    let rejected = world
        .put(
            path,
            &json!({"traffic": {"blue": 100}, "mirror": {"blue": 5}}),
        )
        .await
        .expect(400);
    assert_eq!(rejected.body()["errors"][0]["pointer"], "/mirror/blue");
    let mirrored = json!({"traffic": {"blue": 100}, "mirror": {"green": 5}});
    let rejected = world.put(path, &mirrored).await.expect(400).body();
    assert_eq!(rejected["errors"][0]["pointer"], "/mirror/green");
    let detail = rejected["errors"][0]["detail"].as_str().unwrap();
    assert!(
        detail.contains("not copied to other deployments yet"),
        "{detail}"
    );
    let mut document = endpoint("iris");
    document["spec"]["traffic"] = json!({"blue": 100});
    document["spec"]["mirror"] = json!({"green": 5});
    let rejected = world.put("/v1/endpoints/iris", &document).await;
    let rejected = rejected.expect(400).body();
    assert_eq!(rejected["errors"][0]["pointer"], "/spec/mirror/green");
    let none = json!({"traffic": {"blue": 90, "green": 10}, "mirror": {"green": 0}});
    world.put(path, &none).await.expect(200);
    world
        .put(path, &json!({"traffic": {"red": 100}}))
        .await
        .expect(400);
    let rejected = world
        .delete("/v1/endpoints/iris/deployments/green")
        .await
        .expect(409);
    assert_eq!(rejected.code(), "has-traffic");
    // An Endpoint document without traffic leaves the split as it is.
    let reply = world
        .put("/v1/endpoints/iris", &endpoint("iris"))
        .await
        .expect(200)
        .body();
    assert_eq!(reply["result"], "unchanged");
    world
        .put(path, &json!({"traffic": {"blue": 100}}))
        .await
        .expect(200);
    world
        .delete("/v1/endpoints/iris/deployments/green")
        .await
        .expect(202);
    world.wait_until_settled().await;
    world
        .get("/v1/endpoints/iris/deployments/green")
        .await
        .expect(404);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_an_endpoint_deletes_its_deployments_and_frees_the_name() {
    let world = TestWorld::start().await;
    let first = world
        .put("/v1/endpoints/iris", &endpoint("iris"))
        .await
        .expect(201)
        .body();
    world.create_deployment("iris", "blue").await;
    world
        .put(
            "/v1/endpoints/iris/traffic",
            &json!({"traffic": {"blue": 100}}),
        )
        .await
        .expect(200);
    world.delete("/v1/endpoints/iris").await.expect(202);
    world.wait_until_settled().await;
    world.get("/v1/endpoints/iris").await.expect(404);
    assert_eq!(
        world.get("/v1/deployments").await.body()["items"],
        json!([])
    );
    let second = world
        .put("/v1/endpoints/iris", &endpoint("iris"))
        .await
        .expect(201)
        .body();
    assert_ne!(
        first["resource"]["metadata"]["uid"],
        second["resource"]["metadata"]["uid"]
    );
    assert_eq!(second["resource"]["spec"]["traffic"], json!({}));
    world.delete("/v1/endpoints/none").await.expect(404);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn autoscale_pins_and_pauses_belong_to_the_deployment() {
    let world = TestWorld::with_blue().await;
    let path = "/v1/autoscale/iris/blue";
    let put = world
        .put(path, &autoscale("iris", "blue"))
        .await
        .expect(201);
    let got = world.get_at(path, put.position()).await.expect(200).body();
    assert_eq!(got["spec"]["profiles"][0]["capacity"]["max"], 5);
    let pinned = world
        .put(&format!("{path}/pin"), &json!({"instances": 3}))
        .await
        .expect(200)
        .body();
    assert_eq!(pinned["pin"], json!({"instances": 3, "until": null}));
    world
        .put(&format!("{path}/pin"), &json!({"instances": 1001}))
        .await
        .expect(400);
    let paused = world
        .post(&format!("{path}/pause"), &json!({"scaleIn": true}))
        .await
        .expect(200)
        .body();
    assert_eq!(paused["pause"], json!({"scaleIn": true, "scaleOut": false}));
    let resumed = world
        .post(&format!("{path}/resume"), &json!({}))
        .await
        .expect(200)
        .body();
    assert_eq!(
        resumed["pause"],
        json!({"scaleIn": false, "scaleOut": false})
    );
    let released = world
        .delete(&format!("{path}/pin"))
        .await
        .expect(200)
        .body();
    assert_eq!(released["pin"], json!(null));
    let preview = world
        .get(&format!("{path}/preview"))
        .await
        .expect(200)
        .body();
    assert_eq!(preview["items"][0]["profile"], "default");
    let deleted = world.delete(path).await.expect(200);
    world.get_at(path, deleted.position()).await.expect(404);
    world.delete(path).await.expect(404);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_to_an_autoscale_has_its_warnings_and_takes_it() {
    let world = TestWorld::with_blue().await;
    let path = "/v1/autoscale/iris/blue";
    let mut document = autoscale("iris", "blue");
    document["spec"]["profiles"][0]["capacity"] = json!({"min": 0, "max": 5, "default": 0});
    document["spec"]["profiles"][0]["rules"] = json!([
        {"name": "hot", "metric": {"name": "cpu_utilization"}, "track": {"target": 50}},
    ]);
    for (query, status) in [("?dryRun=true", 200), ("", 201)] {
        let answer = world.put(&format!("{path}{query}"), &document).await;
        let answer = answer.expect(status).body();
        let pointers = answer["warnings"].as_array().unwrap().iter();
        let mut pointers = pointers.map(|warning| &warning["pointer"]);
        assert!(
            pointers.any(|pointer| pointer == "/spec/profiles/0/capacity/min"),
            "{answer}"
        );
    }
    let fine = world.put(path, &autoscale("iris", "blue")).await;
    assert_eq!(fine.expect(200).body().get("warnings"), None);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_sets_is_stored_and_applying_it_again_changes_nothing() {
    let world = TestWorld::with_blue().await;
    let path = "/v1/endpoints/iris/deployments/green";
    let mut document = deployment("iris", "green");
    document["spec"]["server"] = json!("vllm");
    document["spec"]["errorMapping"] = json!("azure");
    let created = world.put(path, &document).await.expect(201);
    let shown = world.get_at(path, created.position()).await;
    let shown = shown.expect(200).body();
    let spec = &shown["spec"];
    assert_eq!(
        (&spec["server"], &spec["protocol"], &spec["errorMapping"]),
        (&json!("vllm"), &json!("openai"), &json!("azure"))
    );
    assert_eq!(spec["readinessProbe"]["path"], "/health");
    for again in [&document, &shown] {
        let mut again = again.clone();
        again.as_object_mut().unwrap().remove("status");
        let answer = world.put(path, &again).await.expect(200).body();
        assert_eq!(answer["result"], "unchanged", "{answer:#}");
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_to_a_deployment_names_the_line_for_a_known_servers_command() {
    let world = TestWorld::with_blue().await;
    let path = "/v1/endpoints/iris/deployments/green?dryRun=true";
    let mut document = deployment("iris", "green");
    document["spec"]["backend"] = json!("process");
    document["spec"]["command"] = json!(["vllm", "serve", "--port", "{port}"]);
    let answer = world.put(path, &document).await.expect(200).body();
    assert_eq!(answer["warnings"][0]["pointer"], "/spec/command");
    let detail = answer["warnings"][0]["detail"].as_str().unwrap();
    assert!(detail.contains("`server: vllm`"), "{detail}");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_for_a_duration_ends_by_the_servers_clock() {
    let world = TestWorld::with_blue().await;
    let until = support::START + contract::time::Span::from_secs(3600);
    let pinned = world
        .put(
            "/v1/autoscale/iris/blue/pin",
            &json!({"instances": 3, "for": "1h"}),
        )
        .await
        .expect(200)
        .body();
    assert_eq!(pinned["pin"], json!({"instances": 3, "until": until}));
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_an_autoscale_says_what_the_count_becomes_and_what_keeps_it() {
    let world = TestWorld::with_blue().await;
    let path = "/v1/autoscale/iris/blue";
    let both = json!({});
    let one = json!({"scaleOut": true});
    for (pinned, paused, held_by) in [
        (false, None, json!(null)),
        (false, Some(&both), json!("pause")),
        (false, Some(&one), json!("pause-of-scale-out")),
        (true, Some(&both), json!("pin")),
    ] {
        world
            .put(path, &autoscale("iris", "blue"))
            .await
            .expect(201);
        world
            .post(&format!("{path}/resume"), &json!({}))
            .await
            .expect(200);
        if let Some(directions) = paused {
            world
                .post(&format!("{path}/pause"), directions)
                .await
                .expect(200);
        }
        if pinned {
            world
                .put(&format!("{path}/pin"), &json!({"instances": 3}))
                .await
                .expect(200);
        }
        let deleted = world.delete(path).await.expect(200).body();
        assert_eq!(
            (&deleted["instances"], &deleted["heldBy"]),
            (&json!(1), &held_by)
        );
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_expires() {
    let world = TestWorld::with_blue().await;
    let until = support::START + contract::time::Span::from_secs(60);
    let body = json!({"instances": 3, "until": until});
    world
        .put("/v1/autoscale/iris/blue/pin", &body)
        .await
        .expect(200);
    let head = world.settled_head().await;
    world.clock.set(until);
    // Waits for the record of the release.
    let released = world.get_at("/v1/endpoints/iris/deployments/blue", head + 1);
    let mut body = released.await.expect(200).body();
    while !body["status"]["pin"].is_null() {
        tokio::task::yield_now().await;
        body = world
            .get("/v1/endpoints/iris/deployments/blue")
            .await
            .expect(200)
            .body();
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn state_and_token_survive_a_restart() {
    let world = TestWorld::with_iris().await;
    world.wait_until_settled().await;
    let (token, keys) = (
        world.token.clone(),
        world.get("/v1/endpoints/iris/keys").await.expect(200).text,
    );
    let dir = world.stop().await;
    let world = TestWorld::start_with(Setup {
        dir,
        seed: 2,
        ..Setup::default()
    })
    .await;
    assert_eq!(world.token, token);
    assert_eq!(
        world.get("/v1/endpoints/iris").await.expect(200).body()["metadata"]["revision"],
        1
    );
    assert_eq!(
        world.get("/v1/endpoints/iris/keys").await.expect(200).text,
        keys
    );
    let verified = world.get("/v1/events/verify").await.expect(200).body();
    assert_eq!(verified["ok"], true, "{verified}");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn control_stores_a_snapshot_on_shutdown() {
    let world = TestWorld::with_iris().await;
    let head = world.settled_head().await;
    let dir = world.stop().await;
    let url = format!("sqlite:{}", dir.path().join("penstock.db").display());
    let store = store::Store::open(&url).await.unwrap();
    let key = EndpointKey::new(&"iris".parse().unwrap());
    let snapshot = store.snapshot("views", key.bucket(), MODEL_VERSION).await;
    let snapshot = snapshot.unwrap().expect("control stored a snapshot");
    assert!(snapshot.parts.contains_key(key.as_str()), "{snapshot:?}");
    assert!(snapshot.meta.position.0 >= head, "{snapshot:?}");
    store.close().await;
}
