//! `server`: what a preset sets, what a document overrides, and how a known server is recognized.
#![allow(clippy::unwrap_used)]

use contract::resources::{DeploymentSpec, Resource};
use documents::{Document, read, warnings};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Every server, as the message about an unknown one lists them.
fn servers() -> Vec<String> {
    let findings = resolve(&document(json!({"server": "?"}))).unwrap_err();
    let (_, names) = findings[0].rsplit_once(": ").unwrap();
    names.split(", ").map(str::to_owned).collect()
}

/// A deployment with the fields of `spec`.
fn document(spec: Value) -> Value {
    let mut document = json!({
        "apiVersion": "penstock/v1", "kind": "Deployment", "metadata": {"name": "blue", "endpoint": "iris"},
        "spec": {"backend": "process", "instanceType": "cpu-small", "command": ["./start", "{port}"]},
    });
    for (field, value) in spec.as_object().unwrap() {
        document["spec"][field] = value.clone();
    }
    document
}

fn resolve(document: &Value) -> Result<DeploymentSpec, Vec<String>> {
    let found = |findings: Vec<contract::problem::Finding>| {
        findings
            .into_iter()
            .map(|one| one.detail)
            .collect::<Vec<_>>()
    };
    match Document::new(document.clone()).resource().map_err(found)? {
        Resource::Deployment(deployment) => Ok(deployment.spec),
        other => panic!("{other:?}"),
    }
}

fn resolved(spec: Value) -> Value {
    let spec = resolve(&document(spec)).unwrap();
    serde_json::to_value(spec).unwrap()
}

/// Fields that presets set, with values that a document may have in place of theirs: the general default
/// first.
fn overrides() -> Vec<(&'static str, Vec<Value>)> {
    vec![
        (
            "/routes",
            vec![json!({}), json!({"scoring": "/a"}), json!(null)],
        ),
        (
            "/protocol",
            vec![json!("http"), json!("openai"), json!(null)],
        ),
        (
            "/errorMapping",
            vec![json!("azure"), json!("pass"), json!(null)],
        ),
        (
            "/startupTimeout",
            vec![json!("10m"), json!("1h"), json!(null)],
        ),
        ("/requestSettings", vec![json!({}), json!(null)]),
        ("/requestSettings/timeout", vec![json!("5s"), json!("20s")]),
        (
            "/requestSettings/maxDuration",
            vec![json!("2h"), json!(null)],
        ),
        (
            "/requestSettings/streamIdleTimeout",
            vec![json!("1m"), json!("9s"), json!(null)],
        ),
        (
            "/requestSettings/maxConcurrentRequestsPerInstance",
            vec![json!(1), json!(7)],
        ),
        (
            "/requestSettings/keepAliveIdle",
            vec![json!("2s"), json!("1s")],
        ),
        ("/readinessProbe", vec![json!({}), json!(null)]),
        ("/readinessProbe/path", vec![json!("/"), json!("/a")]),
        ("/readinessProbe/period", vec![json!("1s"), json!("3s")]),
        ("/livenessProbe", vec![json!({}), json!(null)]),
        ("/livenessProbe/path", vec![json!("/"), json!("/a")]),
        ("/livenessProbe/failureThreshold", vec![json!(30), json!(2)]),
        ("/livenessProbe/timeout", vec![json!("2s"), json!("3s")]),
        ("/env", vec![json!({}), json!(null)]),
        (
            "/env/MLSERVER_HOST",
            vec![json!(""), json!({"secretRef": "env:A"})],
        ),
        ("/env/A", vec![json!("{port}")]),
    ]
}

/// Whether each leaf that a document says is in the spec as it was said; an empty mapping has none.
fn contains(spec: &Value, said: &Value) -> bool {
    match (spec, said) {
        (_, Value::Null) => true,
        (Value::Object(spec), Value::Object(said)) => said
            .iter()
            .all(|(field, said)| contains(spec.get(field).unwrap_or(&json!({})), said)),
        _ => spec == said,
    }
}

fn set(spec: &mut Value, pointer: &str, value: Value) {
    let (parent, field) = pointer.rsplit_once('/').unwrap();
    if !parent.is_empty() && !spec.pointer(parent).is_some_and(Value::is_object) {
        set(spec, parent, json!({}));
    }
    spec.pointer_mut(parent).unwrap()[field] = value;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    /// So that `get -o yaml`, applied again, changes nothing, whatever was said.
    #[test]
    fn a_resolved_document_stays_as_it_is(
        server in 0..servers().len(),
        picks in proptest::collection::vec(proptest::option::of(any::<proptest::sample::Index>()), overrides().len()),
    ) {
        let mut spec = json!({"server": servers()[server]});
        for ((pointer, values), pick) in overrides().into_iter().zip(picks) {
            if let Some(pick) = pick {
                set(&mut spec, pointer, pick.get(&values).clone());
            }
        }
        let first = match resolve(&document(spec.clone())) {
            Ok(first) => first,
            Err(faults) => {
                // A `maxDuration` below the preset's `timeout`, and empty fields that no preset fills.
                let is_expected = |fault: &String| {
                    fault.contains("within which the response has only to begin")
                        || fault.starts_with("this is empty")
                };
                prop_assert!(faults.iter().all(is_expected), "{spec:#}: {faults:?}");
                return Ok(());
            }
        };
        let written = serde_json::to_value(&first).unwrap();
        prop_assert_eq!(resolve(&document(written.clone())).unwrap(), first);
        // What is the default everywhere is omitted.
        let mut shown = written.clone();
        for (part, field, default) in [
            ("", "errorMapping", "azure"),
            ("", "protocol", "http"),
            ("/requestSettings", "keepAliveIdle", "2s"),
        ] {
            let fields = shown.pointer_mut(part).unwrap().as_object_mut().unwrap();
            fields.entry(field).or_insert(json!(default));
        }
        prop_assert!(contains(&shown, &spec), "{spec:#}\n{written:#}");
    }
}

#[test]
fn every_server_is_complete_in_a_few_lines() {
    for server in servers() {
        let spec = resolve(&document(json!({"server": server}))).unwrap();
        assert_eq!(spec.server.unwrap().as_str(), server);
        assert_eq!(spec.routes.is_some(), server != "generic", "{server}");
    }
}

/// The row of a server in the README.
fn row(server: &str) -> String {
    let spec = resolved(json!({"server": server}));
    let path = |pointer: &str| match spec.pointer(pointer).and_then(Value::as_str) {
        Some(path) => format!("`{path}`"),
        None => "–".to_owned(),
    };
    let errors = spec.get("errorMapping").map_or("azure", |_| "pass");
    let env = spec.get("env").unwrap_or(&Value::Null).to_string();
    let port = match env.contains("{port}") {
        true => "set",
        false => "in the command",
    };
    let scoring = path("/routes/scoring");
    let ready = path("/readinessProbe/path");
    format!("| `{server}` | {scoring} | {ready} | {errors} | {port} |")
}

#[test]
fn the_readme_has_the_row_of_every_server() {
    let readme = include_str!("../../../README.md");
    for server in servers().iter().filter(|server| *server != "generic") {
        let row = row(server);
        assert!(readme.contains(&row), "README, Model servers, lacks: {row}");
    }
}

#[test]
fn without_a_server_or_with_a_generic_one_nothing_is_set() {
    let plain = resolved(json!({}));
    let mut generic = resolved(json!({"server": "generic"}));
    assert_eq!(generic["server"], "generic");
    generic.as_object_mut().unwrap().remove("server");
    assert_eq!(generic, plain);
    // As before there were presets: stored without what is the default.
    assert_eq!(resolved(json!({"errorMapping": "azure"})), plain);
}

#[test]
fn what_the_document_says_wins_field_by_field() {
    let spec = resolved(json!({
        "server": "open-inference", "errorMapping": "azure", "readinessProbe": {"period": "3s"},
        "env": {"MLSERVER_HTTP_PORT": "{port:other}", "LEVEL": "2"},
    }));
    assert_eq!(spec["errorMapping"], "azure");
    let probe = &spec["readinessProbe"];
    assert_eq!(
        (&probe["path"], &probe["period"]),
        (&json!("/v2/health/ready"), &json!("3s"))
    );
    let env = &spec["env"];
    assert_eq!(env["MLSERVER_HTTP_PORT"], "{port:other}");
    assert_eq!(
        (&env["LEVEL"], &env["MLSERVER_GRPC_PORT"]),
        (&json!("2"), &json!("{port:grpc}"))
    );
}

#[test]
fn a_probe_that_is_not_of_http_gets_no_path() {
    for server in servers() {
        let probe = json!({"protocol": "tcp"});
        let spec = resolve(&document(
            json!({"server": server, "readinessProbe": probe}),
        ));
        assert!(spec.unwrap().readiness_probe.has_default_path(), "{server}");
    }
}

#[test]
fn routes_are_replaced_as_a_whole() {
    for routes in [json!({}), json!({"scoring": "/a"})] {
        let spec = resolved(json!({"server": "mlflow", "routes": routes}));
        assert_eq!(spec["routes"], routes);
    }
}

#[test]
fn a_preset_that_gives_instances_their_port_needs_none_in_the_command() {
    for (server, command) in [
        ("open-inference", json!(["mlserver", "start", "."])),
        (
            "mlflow",
            json!(["mlflow", "models", "serve", "-m", "./model"]),
        ),
        ("bentoml", json!(["bentoml", "serve"])),
        ("torchserve", json!(["torchserve", "--foreground"])),
    ] {
        let said = document(json!({"server": server, "command": command}));
        assert!(resolve(&said).is_ok(), "{server}");
    }
    let without = resolve(&document(json!({"command": ["mlserver", "start", "."]})));
    let detail = without.unwrap_err().remove(0);
    assert!(
        detail.ends_with("or add `server: open-inference`, which does"),
        "{detail}"
    );
}

/// Each finding of a document: location, pointer, detail.
fn findings(spec: &str) -> Vec<String> {
    let text = format!(
        "apiVersion: penstock/v1\nkind: Deployment\nmetadata: {{name: blue, endpoint: iris}}\nspec:\n  backend: process\n  instanceType: cpu-small\n{spec}"
    );
    let (_, findings) = read(&text);
    findings.iter().map(ToString::to_string).collect()
}

#[test]
fn a_fault_in_what_the_server_sets_points_to_the_line_that_names_it() {
    let found = findings(
        "  command: [./start, \"{port}\"]\n  server: vllm\n  readinessProbe: {initialDelay: 45m}\n",
    );
    let expected = "8:3: /spec/server: `server: vllm` sets `startupTimeout`, which the document can set itself: \
        30m is over before the first readiness probe, after 45m; use more";
    assert_eq!(found, [expected]);
}

#[test]
fn a_fault_in_what_the_document_says_points_to_its_own_line() {
    let found = findings(
        "  command: [./start, \"{port}\"]\n  server: vllm\n  requestSettings: {maxDuration: 1s}\n",
    );
    assert_eq!(found.len(), 1);
    assert!(
        found[0].starts_with("9:21: /spec/requestSettings/maxDuration: 1s is less"),
        "{found:?}"
    );
}

#[test]
fn an_unknown_server_is_the_only_fault_of_a_document_that_relies_on_it() {
    let found = findings("  command: [mlserver, start, .]\n  server: mlserver\n");
    let expected = format!(
        "8:3: /spec/server: `mlserver` is not a valid value; use one of: {}",
        servers().join(", ")
    );
    assert_eq!(found, [expected]);
}

/// The line that a warning names for a command.
fn suggestion(command: &[&str], server: Option<&str>) -> Option<String> {
    let mut spec = json!({"command": command, "env": {"A": "{port}"}});
    if let Some(server) = server {
        spec["server"] = json!(server);
    }
    let resource = Document::new(document(spec)).resource().unwrap();
    let warning = warnings(&resource).pop()?;
    assert_eq!(warning.pointer, "/spec/command");
    warning.detail.split('`').nth(1).map(str::to_owned)
}

#[test]
fn the_command_of_a_known_server_is_recognized() {
    let table: &[(&[&str], &str)] = &[
        (&["mlserver", "start", "."], "open-inference"),
        (
            &["/opt/venv/bin/mlflow", "models", "serve", "-m", "m"],
            "mlflow",
        ),
        (&["python", "-m", "mlflow", "models", "serve"], "mlflow"),
        (&["uv", "run", "mlflow", "models", "serve"], "mlflow"),
        (&["vllm", "serve", "m"], "vllm"),
        (
            &["uv", "run", "--with", "vllm", "vllm", "serve", "m"],
            "vllm",
        ),
        (
            &[
                "timeout", "9", "conda", "run", "-n", "e", "vllm", "serve", "m",
            ],
            "vllm",
        ),
        (
            &[
                "python3.12",
                "-u",
                "-m",
                "vllm.entrypoints.openai.api_server",
            ],
            "vllm",
        ),
        (&["tritonserver", "--model-repository", "m"], "triton"),
        (&["torchserve", "--foreground"], "torchserve"),
        (&["bentoml", "serve", "."], "bentoml"),
        (&["azmlinfsrv", "--entry_script", "score.py"], "azureml"),
        (&["llama-server", "-m", "m.gguf"], "openai"),
        (&["bash", "-c", "exec mlserver start ."], "open-inference"),
        (
            &["sh", "-c", "cd /m && A=1 exec 'vllm' serve m --port $PORT"],
            "vllm",
        ),
        (
            &["env", "A=1", "bash", "-lc", "bash -c \"tritonserver --x\""],
            "triton",
        ),
    ];
    for (command, server) in table {
        let line = format!("server: {server}");
        assert_eq!(suggestion(command, None), Some(line), "{command:?}");
    }
}

#[test]
fn other_commands_are_not_recognized() {
    let table: [&[&str]; 8] = [
        &["mlflow", "server"],
        &["mlflow", "models"],
        &["python", "mlflow", "models", "serve"],
        &["python", "-m"],
        &["./mlserver.sh", "start"],
        &["sh", "-c", "echo mlserver start"],
        &["sh"],
        &["exec"],
    ];
    for command in table {
        assert_eq!(suggestion(command, None), None, "{command:?}");
    }
}

#[test]
fn a_document_that_names_a_server_gets_no_suggestion() {
    for server in servers() {
        assert_eq!(suggestion(&["mlserver", "start", "."], Some(&server)), None);
    }
}
