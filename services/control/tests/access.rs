//! Tokens, roles, keys and repeated requests.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::fs::PermissionsExt;

use contract::events::AccessRole;
use contract::time::Span;
use control::api::routes;
use control::table::Gate;
use reqwest::Method;
use serde_json::{Value, json};
use support::{Setup, TestWorld, endpoint};

async fn token(world: &TestWorld, name: &str, role: &str) -> String {
    let body = json!({"name": name, "role": role});
    let granted = world.post("/v1/access", &body).await.expect(201).body();
    granted["token"].as_str().unwrap().to_owned()
}

/// Fills in the parameters of a path template.
fn concrete(path: &str) -> String {
    path.replace("{endpoint}", "none")
        .replace("{deployment}", "none")
        .replace("{slot}", "primary")
        .replace("{name}", "none")
        .replace("{id}", "00000000-0000-7000-8000-000000000000")
}

#[tokio::test(flavor = "multi_thread")]
async fn each_route_admits_its_minimum_role_and_higher_ones() {
    let world = TestWorld::start().await;
    let mut tokens: Vec<(Option<AccessRole>, Option<String>)> = vec![(None, None)];
    for (role, role_name) in [
        (AccessRole::Viewer, "viewer"),
        (AccessRole::Operator, "operator"),
        (AccessRole::Admin, "admin"),
    ] {
        tokens.push((
            Some(role),
            Some(token(&world, &format!("a-{role_name}"), role_name).await),
        ));
    }
    for entry in routes() {
        for (role, token) in &tokens {
            let url = format!("http://{}{}", world.addr, concrete(entry.path));
            let mut request = world.http.request(entry.method.clone(), &url);
            if let Some(token) = token {
                request = request.bearer_auth(token);
            }
            // Do not read the body: a stream has no end.
            let status = request.send().await.unwrap().status().as_u16();
            let context = format!("{} {} as {role:?}: {status}", entry.method, entry.path);
            let minimum = match entry.gate {
                Gate::Open | Gate::Health | Gate::Loopback => {
                    assert!(![401, 403].contains(&status), "{context}");
                    continue;
                }
                Gate::Role(minimum) => minimum,
            };
            match role {
                None => assert_eq!(status, 401, "{context}"),
                Some(role) if *role < minimum => assert_eq!(status, 403, "{context}"),
                Some(_) => assert!(![401, 403].contains(&status), "{context}"),
            }
        }
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_expired_and_revoked_tokens_are_rejected() {
    let world = TestWorld::start().await;
    let list_endpoints = |token: String| {
        let url = format!("http://{}/v1/endpoints", world.addr);
        world.send(world.http.get(url).bearer_auth(token))
    };
    let reply = list_endpoints("penstock_00".into()).await.expect(401);
    assert_eq!(
        (reply.code().as_str(), reply.header("www-authenticate")),
        ("unauthorized", Some("Bearer"))
    );
    let body =
        json!({"name": "ci", "role": "viewer", "expires": support::START + Span::from_secs(60)});
    let ci = world.post("/v1/access", &body).await.expect(201).body()["token"]
        .as_str()
        .unwrap()
        .to_owned();
    list_endpoints(ci.clone()).await.expect(200);
    world.clock.advance(Span::from_secs(60));
    assert!(
        list_endpoints(ci)
            .await
            .expect(401)
            .text
            .contains("expired")
    );
    let other = token(&world, "other", "viewer").await;
    list_endpoints(other.clone()).await.expect(200);
    world.delete("/v1/access/other").await.expect(200);
    list_endpoints(other).await.expect(401);
    world
        .post("/v1/access", &json!({"name": "admin", "role": "viewer"}))
        .await
        .expect(409);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_listed_without_their_secrets_and_files_are_private() {
    let world = TestWorld::start().await;
    let ci = token(&world, "ci", "operator").await;
    let head = world.head().await;
    let list = world.get_at("/v1/access", head).await.expect(200);
    assert!(!list.text.contains(&ci) && !list.text.contains("hash"));
    let names: Vec<Value> = list.body()["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|i| i["name"].clone())
        .collect();
    assert_eq!(names, ["ci", "admin"]);
    for file in ["client.json", "seal.key"] {
        let mode = std::fs::metadata(world.dir.path().join(file))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_client_file_is_replaced_by_one_with_a_new_token() {
    let world = TestWorld::start().await;
    let old = world.token.clone();
    let dir = world.stop().await;
    std::fs::remove_file(dir.path().join("client.json")).unwrap();
    let world = TestWorld::start_with(Setup {
        dir,
        seed: 3,
        ..Setup::default()
    })
    .await;
    assert_ne!(world.token, old);
    world.get("/v1/endpoints").await.expect(200);
    let url = format!("http://{}/v1/endpoints", world.addr);
    world
        .send(world.http.get(url).bearer_auth(old))
        .await
        .expect(401);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_names_who_caused_it() {
    let world = TestWorld::start().await;
    let ci = token(&world, "ci", "operator").await;
    let url = format!("http://{}/v1/endpoints/iris", world.addr);
    let request = world.http.put(url).bearer_auth(ci).json(&endpoint("iris"));
    world.send(request).await.expect(201);
    world.wait_until_settled().await;
    let events = world.get("/v1/events?limit=1000").await.expect(200).body();
    let actors: Vec<(String, String)> = events["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| {
            (
                e["type"].as_str().unwrap().to_owned(),
                e["actor"].as_str().unwrap().to_owned(),
            )
        })
        .collect();
    let expected = [
        ("access.granted", "service:control"),
        ("access.granted", "token:admin"),
        ("endpoint.created", "token:ci"),
        ("endpoint.state-changed", "service:control"),
    ];
    assert_eq!(actors, expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_shown_to_admins_stored_sealed_and_replaced_one_at_a_time() {
    let world = TestWorld::with_iris().await;
    let before = world
        .get("/v1/endpoints/iris/keys")
        .await
        .expect(200)
        .body();
    let after = world
        .post("/v1/endpoints/iris/keys/primary/regenerate", &json!({}))
        .await
        .expect(200)
        .body();
    assert_ne!(before["primary"], after["primary"]);
    assert_eq!(before["secondary"], after["secondary"]);
    assert_eq!(after["primary"].as_str().unwrap().len(), 64);
    world.wait_until_settled().await;
    let log = world.get("/v1/events?limit=1000").await.expect(200).text;
    let view = world.get("/v1/endpoints/iris").await.expect(200).text;
    for key in [&before["primary"], &after["primary"], &after["secondary"]] {
        let key = key.as_str().unwrap();
        assert!(!log.contains(key) && !view.contains(key));
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_post_with_its_idempotency_key_returns_the_first_response() {
    let world = TestWorld::with_blue().await;
    world.wait_until_settled().await;
    let requests = [
        ("/v1/access", json!({"name": "ci", "role": "viewer"}), 201),
        ("/v1/endpoints/iris/keys/primary/regenerate", json!({}), 200),
        (
            "/v1/autoscale/iris/blue/pause",
            json!({"scaleIn": true}),
            200,
        ),
    ];
    for (path, body, status) in requests {
        let post = |body: &Value| {
            let request = world.request(Method::POST, path).json(body);
            world.send(request.header("idempotency-key", "0199-abc"))
        };
        let first = post(&body).await.expect(status);
        let head = world.head().await;
        let second = post(&body).await.expect(status);
        assert_eq!(first.body(), second.body(), "{path}");
        assert_eq!(first.position(), second.position(), "{path}");
        assert_eq!(world.head().await, head, "{path}");
        // Another body with the same key is an error of the caller.
        let other = match path {
            "/v1/access" => json!({"name": "other", "role": "viewer"}),
            _ => json!({"scaleIn": true, "scaleOut": true}),
        };
        assert_eq!(
            post(&other).await.expect(422).code(),
            "idempotency-key-reused",
            "{path}"
        );
    }
    // The key is scoped to the path: on another path it is a new request.
    let request = world.request(Method::POST, "/v1/endpoints/iris/keys/secondary/regenerate");
    world
        .send(request.header("idempotency-key", "0199-abc"))
        .await
        .expect(200);
    world.stop().await;
}
