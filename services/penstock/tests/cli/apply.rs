//! `apply`: the order of requests, dry runs, and waiting.

use serde_json::json;

use crate::fake::FakeServer;
use crate::home::{AUTOSCALE, DEPLOYMENT, ENDPOINT, Home, all_documents};

#[test]
fn apply_and_diff_print_the_warnings_of_the_server() {
    let (home, server) = (Home::new(), FakeServer::start());
    home.file("parents.yaml", &[DEPLOYMENT, ENDPOINT].join("---"));
    let odd = AUTOSCALE.replace("spec:", "metadata: {labels: {warned: yes}}\nspec:");
    home.file("odd.yaml", &odd);
    home.run_with(&server, &["apply", "-f", "parents.yaml"]);
    for command in ["diff", "apply"] {
        let result = home.run_with(&server, &[command, "-f", "odd.yaml"]);
        assert_eq!(result.code, 0, "{result:?}");
        let warning = "warning: autoscale iris/blue: /spec/mode: it is odd: change it\n";
        assert_eq!(result.err, warning, "{command}");
    }
}

#[test]
fn a_planned_document_is_checked_for_warnings_without_the_server() {
    let (home, server) = (Home::new(), FakeServer::start());
    let documents = all_documents().replace("Mon-Fri", "7");
    home.file("all.yaml", &documents);
    let result = home.run_with(&server, &["apply", "-f", "all.yaml", "--dry-run"]);
    assert_eq!(result.code, 0, "{result:?}");
    assert!(result.err.contains("write Sun"), "{}", result.err);
}

#[test]
fn apply_sends_endpoints_then_deployments_then_autoscales_and_the_split_last() {
    let (home, server) = (Home::new(), FakeServer::start());
    let file = home.file("all.yaml", &all_documents());
    let result = home.run_with(&server, &["apply", "-f", file.to_str().unwrap()]);
    assert_eq!(result.code, 0, "{result:?}");
    assert_eq!(
        result.out,
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
fn one_invalid_document_aborts_before_anything_is_sent() {
    let (home, server) = (Home::new(), FakeServer::start());
    home.file("docs/a.yaml", ENDPOINT);
    home.file(
        "docs/b.yaml",
        &DEPLOYMENT.replace("instanceType", "instanceTyp"),
    );
    let result = home.run_with(&server, &["apply", "-f", "docs"]);
    assert_eq!(result.code, 1, "{result:?}");
    assert!(result.err.contains("docs/b.yaml:5:"), "{}", result.err);
    assert!(result.err.contains("/spec/instanceTyp"), "{}", result.err);
    assert!(server.requests().is_empty(), "{:?}", server.requests());
}

#[test]
fn apply_stops_at_the_first_refusal_and_reports_what_was_applied() {
    let (home, server) = (Home::new(), FakeServer::start());
    server.refuse(
        "/v1/endpoints/iris/deployments/blue",
        409,
        json!({"type": "t", "title": "Conflict", "status": 409, "code": "conflict",
            "detail": "The backend is not allowed here.", "errors": [{"pointer": "/spec/backend", "detail": "use process"}]}),
    );
    let file = home.file("all.yaml", &all_documents());
    let result = home.run_with(&server, &["apply", "-f", file.to_str().unwrap()]);
    assert_eq!(result.code, 1, "{result:?}");
    assert_eq!(result.out, "endpoint iris created\n");
    assert!(
        result
            .err
            .contains("deployment iris/blue: The backend is not allowed here."),
        "{}",
        result.err
    );
    assert!(
        result.err.contains("/spec/backend: use process"),
        "{}",
        result.err
    );
    assert!(
        result
            .err
            .contains("Applied before that: endpoint iris created."),
        "{}",
        result.err
    );
    assert!(
        !server
            .writes()
            .iter()
            .any(|write| write.contains("autoscale"))
    );
}

#[test]
fn a_dry_run_asks_the_server_and_changes_nothing() {
    let (home, server) = (Home::new(), FakeServer::start());
    home.file("all.yaml", &all_documents());
    let words = ["apply", "-f", "all.yaml", "--dry-run"];
    let result = home.run_with(&server, &words);
    assert_eq!(result.code, 0, "{result:?}");
    assert_eq!(
        result.out,
        "endpoint iris would be created
deployment iris/blue would be created
autoscale iris/blue would be created
traffic of iris would be changed
"
    );
    assert_eq!(server.writes(), ["PUT /v1/endpoints/iris?dryRun=true"]);
    assert_eq!(home.run_with(&server, &["get", "endpoint", "iris"]).code, 1);

    home.run_with(&server, &["apply", "-f", "all.yaml"]);
    let changed = all_documents().replace("cpu-small", "cpu-large");
    home.file("all.yaml", &changed);
    let result = home.run_with(&server, &words);
    assert_eq!(result.code, 0, "{result:?}");
    assert_eq!(
        result.out,
        "endpoint iris would stay unchanged
deployment iris/blue would be changed
autoscale iris/blue would stay unchanged
"
    );
}

#[test]
fn a_refused_dry_run_exits_1_and_reports_that_nothing_changed() {
    let (home, server) = (Home::new(), FakeServer::start());
    let problem = json!({"status": 409, "detail": "It is being deleted.", "code": "deleting"});
    server.refuse("/v1/endpoints/iris", 409, problem);
    home.file("iris.yaml", ENDPOINT);
    let result = home.run_with(&server, &["apply", "-f", "iris.yaml", "--dry-run"]);
    assert_eq!((result.code, result.out.as_str()), (1, ""), "{result:?}");
    assert!(
        result.err.contains("It is being deleted."),
        "{}",
        result.err
    );
    assert!(
        result.err.contains("Nothing was changed."),
        "{}",
        result.err
    );
}

#[test]
fn a_dry_run_detects_a_split_with_an_unknown_deployment() {
    let (home, server) = (Home::new(), FakeServer::start());
    let split = ENDPOINT.replace("{blue: 100}", "{blue: 50, green: 50, old: 0}");
    home.file("a.yaml", &format!("{split}---{DEPLOYMENT}"));
    let result = home.run_with(&server, &["apply", "-f", "a.yaml", "--dry-run"]);
    assert_eq!(result.code, 1, "{result:?}");
    assert!(
        result.err.contains("traffic of iris: it names `green`"),
        "{}",
        result.err
    );
}

#[test]
fn waiting_ends_when_all_have_succeeded_or_one_has_failed() {
    let (home, server) = (Home::new(), FakeServer::start());
    let file = home.file("all.yaml", &all_documents());
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
    let result = home.run_with(&server, &words);
    assert_eq!(result.code, 0, "{result:?}");
    assert!(
        result
            .err
            .contains("deployment iris/blue Creating, instances ready 0/1"),
        "{}",
        result.err
    );
    assert!(
        result.err.contains("deployment iris/blue Succeeded"),
        "{}",
        result.err
    );

    server.states(
        "/v1/endpoints/iris/deployments/blue",
        &["Updating", "Failed"],
    );
    let result = home.run_with(&server, &words);
    assert_eq!(result.code, 1, "{result:?}");
    assert!(
        result.err.contains("Failed: no instance became ready"),
        "{}",
        result.err
    );

    server.states("/v1/endpoints/iris/deployments/blue", &["Updating"]);
    let result = home.run_with(
        &server,
        &["apply", "-f", "all.yaml", "--wait", "--timeout", "1s"],
    );
    assert_eq!(result.code, 1, "{result:?}");
    assert!(
        result.err.contains("is still Updating after 1s"),
        "{}",
        result.err
    );
}

#[test]
fn waiting_goes_on_while_a_deployment_that_has_succeeded_is_failing() {
    let (home, server) = (Home::new(), FakeServer::start());
    let file = home.file("all.yaml", &all_documents());
    let words = ["apply", "-f", file.to_str().unwrap(), "--wait", "--timeout"];
    let path = "/v1/endpoints/iris/deployments/blue";
    server.states(path, &["Succeeded Failing"]);
    let result = home.run_with(&server, &[&words[..], &["1s"]].concat());
    assert_eq!(result.code, 1, "{result:?}");
    let still = "is still Succeeded after 1s, Failing: it exited with 1";
    assert!(result.err.contains(still), "{}", result.err);

    for reached in ["Succeeded Ready", "Succeeded ScaledToZero"] {
        server.states(path, &["Succeeded Failing", reached]);
        let result = home.run_with(&server, &[&words[..], &["1m"]].concat());
        assert_eq!(result.code, 0, "{reached}: {result:?}");
    }
}

#[test]
fn waiting_goes_on_until_the_revision_of_an_autoscale_was_evaluated() {
    let (home, server) = (Home::new(), FakeServer::start());
    let file = home.file("all.yaml", &all_documents());
    let words = ["apply", "-f", file.to_str().unwrap(), "--wait", "--timeout"];
    let undecided = "deployment iris/blue Succeeded, its Autoscale has not decided yet";

    server.evaluated(&[0, 0, 1]);
    let result = home.run_with(&server, &[&words[..], &["1m"]].concat());
    assert_eq!(result.code, 0, "{result:?}");
    assert!(result.err.contains(undecided), "{}", result.err);

    server.evaluated(&[0]);
    let result = home.run_with(&server, &[&words[..], &["1s"]].concat());
    assert_eq!(result.code, 1, "{result:?}");
}

#[test]
fn an_autoscale_alone_waits_for_its_deployment_if_its_decisions_are_carried_out() {
    let (home, server) = (Home::new(), FakeServer::start());
    home.file("parents.yaml", &[DEPLOYMENT, ENDPOINT].join("---"));
    home.run_with(&server, &["apply", "-f", "parents.yaml"]);
    let words = ["apply", "-f", "rules.yaml", "--wait"];
    let path = "/v1/endpoints/iris/deployments/blue";

    home.file("rules.yaml", AUTOSCALE);
    server.states(path, &["Succeeded Degraded", "Succeeded Ready"]);
    let result = home.run_with(&server, &words);
    assert_eq!(result.code, 0, "{result:?}");
    let waited = "deployment iris/blue Succeeded, Degraded: it exited with 1";
    assert!(result.err.contains(waited), "{}", result.err);

    let shadow = AUTOSCALE.replace("spec:", "spec:\n  mode: shadow");
    home.file("rules.yaml", &shadow);
    server.states(path, &["Succeeded Degraded"]);
    let result = home.run_with(&server, &words);
    assert_eq!(result.code, 0, "{result:?}");
}
