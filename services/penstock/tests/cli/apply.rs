//! `apply`: the order of requests, dry runs, and waiting.

use serde_json::json;

use crate::fake::Fake;
use crate::home::{DEPLOYMENT, ENDPOINT, Home, set_of_documents};

#[test]
fn apply_sends_endpoints_then_deployments_then_autoscales_and_the_split_last() {
    let (home, server) = (Home::new(), Fake::start());
    let file = home.file("all.yaml", &set_of_documents());
    let ran = home.run_with(&server, &["apply", "-f", file.to_str().unwrap()]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(
        ran.out,
        "endpoint iris created\ndeployment iris/blue created\nautoscale iris/blue created\ntraffic of iris changed\n"
    );
    assert_eq!(
        server.writes(),
        [
            "PUT /v1/endpoints/iris",
            "PUT /v1/endpoints/iris/deployments/blue",
            "PUT /v1/autoscale/iris/blue",
            "PUT /v1/endpoints/iris/traffic",
        ]
    );
    let endpoint = server.body_of("PUT /v1/endpoints/iris");
    assert_eq!(
        endpoint.pointer("/spec/traffic"),
        None,
        "the split must wait for blue"
    );
    assert_eq!(
        server.body_of("PUT /v1/endpoints/iris/traffic"),
        json!({"traffic": {"blue": 100}})
    );

    let again = home.run_with(&server, &["apply", "-f", file.to_str().unwrap()]);
    assert_eq!(
        again.out,
        "endpoint iris unchanged\ndeployment iris/blue unchanged\nautoscale iris/blue unchanged\n"
    );
}

#[test]
fn one_bad_document_anywhere_stops_everything_before_anything_is_sent() {
    let (home, server) = (Home::new(), Fake::start());
    home.file("docs/a.yaml", ENDPOINT);
    home.file(
        "docs/b.yaml",
        &DEPLOYMENT.replace("instanceType", "instanceTyp"),
    );
    let ran = home.run_with(&server, &["apply", "-f", "docs"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.err.contains("docs/b.yaml:5:"), "{}", ran.err);
    assert!(ran.err.contains("/spec/instanceTyp"), "{}", ran.err);
    assert!(server.requests().is_empty(), "{:?}", server.requests());
}

#[test]
fn apply_stops_at_the_first_refusal_and_says_what_stands() {
    let (home, server) = (Home::new(), Fake::start());
    server.refuse(
        "/v1/endpoints/iris/deployments/blue",
        409,
        json!({"type": "t", "title": "Conflict", "status": 409, "code": "conflict",
            "detail": "The backend is not allowed here.", "errors": [{"pointer": "/spec/backend", "detail": "use process"}]}),
    );
    let file = home.file("all.yaml", &set_of_documents());
    let ran = home.run_with(&server, &["apply", "-f", file.to_str().unwrap()]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert_eq!(ran.out, "endpoint iris created\n");
    assert!(
        ran.err
            .contains("deployment iris/blue: The backend is not allowed here."),
        "{}",
        ran.err
    );
    assert!(
        ran.err.contains("/spec/backend: use process"),
        "{}",
        ran.err
    );
    assert!(
        ran.err
            .contains("Applied before that: endpoint iris created."),
        "{}",
        ran.err
    );
    assert!(
        !server
            .writes()
            .iter()
            .any(|write| write.contains("autoscale"))
    );
}

#[test]
fn a_dry_run_asks_the_server_says_what_would_be_and_changes_nothing() {
    let (home, server) = (Home::new(), Fake::start());
    home.file("all.yaml", &set_of_documents());
    let words = ["apply", "-f", "all.yaml", "--dry-run"];
    let ran = home.run_with(&server, &words);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(
        ran.out,
        "endpoint iris would be created
deployment iris/blue would be created
autoscale iris/blue would be created
traffic of iris would be changed
"
    );
    assert_eq!(server.writes(), ["PUT /v1/endpoints/iris?dryRun=true"]);
    assert_eq!(home.run_with(&server, &["get", "endpoint", "iris"]).code, 1);

    home.run_with(&server, &["apply", "-f", "all.yaml"]);
    let changed = set_of_documents().replace("cpu-small", "cpu-large");
    home.file("all.yaml", &changed);
    let ran = home.run_with(&server, &words);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(
        ran.out,
        "endpoint iris would stay unchanged
deployment iris/blue would be changed
autoscale iris/blue would stay unchanged
"
    );
}

#[test]
fn a_dry_run_that_would_be_refused_exits_1_and_says_that_nothing_changed() {
    let (home, server) = (Home::new(), Fake::start());
    let problem = json!({"status": 409, "detail": "It is being deleted.", "code": "deleting"});
    server.refuse("/v1/endpoints/iris", 409, problem);
    home.file("iris.yaml", ENDPOINT);
    let ran = home.run_with(&server, &["apply", "-f", "iris.yaml", "--dry-run"]);
    assert_eq!((ran.code, ran.out.as_str()), (1, ""), "{ran:?}");
    assert!(ran.err.contains("It is being deleted."), "{}", ran.err);
    assert!(ran.err.contains("Nothing was changed."), "{}", ran.err);
}

#[test]
fn a_dry_run_sees_a_split_that_names_what_nothing_makes() {
    let (home, server) = (Home::new(), Fake::start());
    let split = ENDPOINT.replace("{blue: 100}", "{blue: 50, green: 50, old: 0}");
    home.file("a.yaml", &format!("{split}---{DEPLOYMENT}"));
    let ran = home.run_with(&server, &["apply", "-f", "a.yaml", "--dry-run"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(
        ran.err.contains("traffic of iris: it names `green`"),
        "{}",
        ran.err
    );
}

#[test]
fn waiting_ends_when_all_have_succeeded_or_one_has_failed() {
    let (home, server) = (Home::new(), Fake::start());
    let file = home.file("all.yaml", &set_of_documents());
    server.states(
        "/v1/endpoints/iris/deployments/blue",
        &["Creating", "Creating", "Succeeded"],
    );
    let words = [
        "apply",
        "-f",
        file.to_str().unwrap(),
        "--wait",
        "--timeout",
        "1m",
    ];
    let ran = home.run_with(&server, &words);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(
        ran.err
            .contains("deployment iris/blue Creating, instances ready 0/1"),
        "{}",
        ran.err
    );
    assert!(
        ran.err.contains("deployment iris/blue Succeeded"),
        "{}",
        ran.err
    );

    server.states(
        "/v1/endpoints/iris/deployments/blue",
        &["Updating", "Failed"],
    );
    let ran = home.run_with(&server, &words);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(
        ran.err.contains("Failed: no instance became ready"),
        "{}",
        ran.err
    );

    server.states("/v1/endpoints/iris/deployments/blue", &["Updating"]);
    let ran = home.run_with(
        &server,
        &["apply", "-f", "all.yaml", "--wait", "--timeout", "1s"],
    );
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(
        ran.err.contains("is still Updating after 1s"),
        "{}",
        ran.err
    );
}
