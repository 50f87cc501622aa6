//! The real binary against a small stand-in for the control API: order of requests, exit codes,
//! credentials, what is printed where.
#![allow(clippy::unwrap_used, reason = "all of it is test code")]

mod cli {
    pub mod fake;
    pub mod home;
}

use std::io::BufRead;
use std::path::Path;
use std::process::Stdio;

use cli::fake::Fake;
use cli::home::{Home, Ran};
use serde_json::{Value, json};

const AUTOSCALE: &str = "
apiVersion: penstock/v1
kind: Autoscale
spec:
  target: {endpoint: iris, deployment: blue}
  profiles:
  - name: default
    capacity: {min: 1, max: 4, default: 1}
  - name: office-hours
    schedule: {cron: '0 9 * * Mon-Fri', duration: 9h, timeZone: Europe/Paris}
    capacity: {min: 2, max: 8, default: 2}
";
const DEPLOYMENT: &str = "
apiVersion: penstock/v1
kind: Deployment
metadata: {name: blue, endpoint: iris}
spec: {backend: simulated, instanceType: cpu-small}
";
const ENDPOINT: &str = "
apiVersion: penstock/v1
kind: Endpoint
metadata: {name: iris}
spec: {traffic: {blue: 100}}
";

fn set_of_documents() -> String {
    [AUTOSCALE, DEPLOYMENT, ENDPOINT].join("---")
}

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
fn a_dry_run_asks_the_server_and_changes_nothing() {
    let (home, server) = (Home::new(), Fake::start());
    let file = home.file("all.yaml", &set_of_documents());
    let ran = home.run_with(
        &server,
        &["apply", "-f", file.to_str().unwrap(), "--dry-run"],
    );
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(
        ran.out.contains("endpoint iris created (dry run)"),
        "{}",
        ran.out
    );
    assert!(
        ran.out.contains("deployment iris/blue created (dry run)"),
        "{}",
        ran.out
    );
    assert_eq!(server.writes(), ["PUT /v1/endpoints/iris?dryRun=true"]);
    assert_eq!(home.run_with(&server, &["get", "endpoint", "iris"]).code, 1);
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

#[test]
fn validate_names_file_line_column_field_and_remedy_without_a_server() {
    let home = Home::new();
    let file = home.file(
        "bad.yaml",
        &format!(
            "{}---{}",
            ENDPOINT.replace("100", "90"),
            DEPLOYMENT.replace("simulated", "simulatd")
        ),
    );
    let ran = home.run(&["validate", "-f", file.to_str().unwrap()]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert_eq!(ran.out, "");
    let lines: Vec<&str> = ran.err.lines().collect();
    assert_eq!(lines.len(), 3, "{}", ran.err);
    assert!(
        lines[0].starts_with(&format!("{}:5:", file.display())),
        "{}",
        ran.err
    );
    assert!(lines[0].contains("/spec/traffic"), "{}", ran.err);
    assert!(lines[1].contains("/spec/backend"), "{}", ran.err);

    let good = home.file("good.yaml", &set_of_documents());
    let ran = home.run(&["validate", "-f", good.to_str().unwrap()]);
    assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{ran:?}");
    assert!(
        ran.out.contains("autoscale iris/blue is valid"),
        "{}",
        ran.out
    );
}

#[test]
fn validate_shows_every_fault_of_every_file_however_deep() {
    let home = Home::new();
    home.file(
        "a.yaml",
        "apiVersion: penstock/v1
kind: Autoscale
spec:
  target: {endpoint: iris, deployment: blue}
  profiles:
  - name: default
    capacity: {min: one, max: 4, default: 1}
    rules:
    - name: busy
      metric: {name: concurency, window: 30s}
      when: '> 4'
      scale: {direction: out, by: 1}
  - name: office-hours
    schedule: {cron: '0 9 * * Mon-Fri', duration: 9h, timeZone: Europe/Pariss}
    capacity: {min: 2, max: 8, default: 2}
    prority: 3
",
    );
    home.file("b.yaml", "kind: [Endpoint\n");
    home.file("c.yaml", &ENDPOINT.replace("100", "90"));
    let words = ["validate", "-f", "a.yaml", "-f", "b.yaml", "-f", "c.yaml"];
    let ran = home.run(&words);
    assert_eq!(ran.code, 1, "{ran:?}");
    let places: Vec<&str> = ran
        .err
        .lines()
        .map(|line| line.split(": ").next().unwrap())
        .collect();
    assert_eq!(
        places,
        [
            "a.yaml:7:16",
            "a.yaml:10:16",
            "a.yaml:14:55",
            "a.yaml:16:5",
            "b.yaml:2:1",
            "c.yaml:5:8",
            "penstock"
        ],
        "{}",
        ran.err
    );
}

#[test]
fn validate_cuts_off_a_flood_of_faults_and_counts_them() {
    let home = Home::new();
    let wrong = DEPLOYMENT.replace("cpu-small", "'cpu small'");
    home.file("many.yaml", &vec![wrong; 150].join("---"));
    let ran = home.run(&["validate", "-f", "many.yaml"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert_eq!(ran.err.lines().count(), 101);
    let last = ran.err.lines().last().unwrap();
    assert_eq!(
        last,
        "penstock: 150 faults in the documents; the first 100 are shown"
    );
}

#[test]
fn validate_sees_what_only_the_engine_knows_and_what_stands_twice() {
    let home = Home::new();
    home.file(
        "a.yaml",
        &AUTOSCALE.replace("Europe/Paris", "Europe/Pariss"),
    );
    let ran = home.run(&["validate", "-f", "a.yaml"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.err.contains("a.yaml:10:"), "{}", ran.err);
    assert!(
        ran.err.contains("/spec/profiles/1/schedule/timeZone"),
        "{}",
        ran.err
    );

    home.file("twice.yaml", &format!("{ENDPOINT}---{ENDPOINT}"));
    let ran = home.run(&["validate", "-f", "twice.yaml"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(
        ran.err
            .contains("Endpoint iris stands at twice.yaml:2:1 already"),
        "{}",
        ran.err
    );
}

#[test]
fn placeholders_take_their_values_from_set() {
    let home = Home::new();
    home.file("t.yaml", &DEPLOYMENT.replace("cpu-small", "\"{{type}}\""));
    let ran = home.run(&["validate", "-f", "t.yaml"]);
    assert!(
        ran.err.contains("t.yaml:5:") && ran.err.contains("--set type="),
        "{}",
        ran.err
    );
    assert_eq!(
        home.run(&["validate", "-f", "t.yaml", "--set", "type=cpu-small"])
            .code,
        0
    );
}

#[test]
fn documents_come_from_standard_input_too() {
    use std::io::Write;
    let home = Home::new();
    let mut child = home
        .command(&["validate", "-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"kind: Endpoint\n")
        .unwrap();
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.err.starts_with("<stdin>:1:1:"), "{}", ran.err);
}

#[test]
fn exit_codes_tell_refusals_usage_and_an_unreachable_server_apart() {
    let (home, server) = (Home::new(), Fake::start());
    assert_eq!(home.run_with(&server, &["get", "endpoints"]).code, 0);
    assert_eq!(home.run_with(&server, &["get", "endpoint", "none"]).code, 1);
    assert_eq!(home.run_with(&server, &["get", "nonsense"]).code, 2);
    assert_eq!(home.run_with(&server, &["scale", "iris/blue"]).code, 2);
    assert_eq!(
        home.run_with(&server, &["traffic", "iris", "blue=90"]).code,
        2
    );
    assert_eq!(home.run(&["--help"]).code, 0);
    assert_eq!(
        home.run(&["get", "endpoints"]).code,
        3,
        "no server is known"
    );

    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    let ran = home.run(&["get", "endpoints", "--server", &format!("http://{address}")]);
    assert_eq!(ran.code, 3, "{ran:?}");
    assert!(ran.err.contains("cannot be reached"), "{}", ran.err);
    assert_eq!(ran.out, "");
}

#[test]
fn the_token_comes_from_the_environment_or_from_the_servers_own_file() {
    let (home, server) = (Home::new(), Fake::start());
    let config = json!({"server": server.url, "token": "from-file"}).to_string();
    home.file("penstock/client.json", &config);
    let file = home.file(
        "other.json",
        &config.replace("from-file", "from-other-file"),
    );

    home.run(&["get", "endpoints"]);
    assert_eq!(server.last_token().as_deref(), Some("Bearer from-file"));

    let mut command = home.command(&["get", "endpoints"]);
    command.env("PENSTOCK_CONFIG", &file);
    command.output().unwrap();
    assert_eq!(
        server.last_token().as_deref(),
        Some("Bearer from-other-file")
    );

    let mut command = home.command(&["get", "endpoints"]);
    command
        .env("PENSTOCK_CONFIG", &file)
        .env("PENSTOCK_TOKEN", "mine");
    command.output().unwrap();
    assert_eq!(server.last_token().as_deref(), Some("Bearer mine"));

    let other = Fake::start();
    home.run_with(&other, &["get", "endpoints"]);
    assert_eq!(
        other.last_token(),
        None,
        "a file's token went to another server"
    );
    let mut command = home.command(&["get", "endpoints", "--server", &server.url]);
    command.env("PENSTOCK_SERVER", &other.url);
    command.output().unwrap();
    assert_eq!(
        server.last_token().as_deref(),
        Some("Bearer from-file"),
        "the flag goes before the environment"
    );
}

#[test]
fn tables_are_plain_and_json_is_the_body_unchanged() {
    let (home, server) = (Home::new(), Fake::start());
    let file = home.file("all.yaml", &set_of_documents());
    home.run_with(&server, &["apply", "-f", file.to_str().unwrap()]);
    let table = home.run_with(&server, &["get", "deployments", "iris"]).out;
    let lines: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(lines[0][..4], ["NAME", "STATE", "READY", "TRAFFIC"]);
    assert_eq!(
        lines[1][..6],
        [
            "iris/blue",
            "Succeeded",
            "1/1",
            "100%",
            "simulated",
            "cpu-small"
        ]
    );
    assert_eq!(
        home.run_with(&server, &["get", "ep"]).out.lines().count(),
        2
    );

    let body = home
        .run_with(&server, &["get", "endpoint", "iris", "-o", "json"])
        .out;
    assert_eq!(body.trim_end(), server.stored("/v1/endpoints/iris"));
    let yaml = home
        .run_with(&server, &["get", "endpoint", "iris", "-o", "yaml"])
        .out;
    assert!(yaml.starts_with("apiVersion: penstock/v1"), "{yaml}");
}

#[test]
fn a_read_after_a_write_asks_for_the_position_of_that_write() {
    let (home, server) = (Home::new(), Fake::start());
    let file = home.file("e.yaml", &ENDPOINT.replace("{traffic: {blue: 100}}", "{}"));
    home.run_with(&server, &["apply", "-f", file.to_str().unwrap(), "--wait"]);
    let read = server
        .requests()
        .into_iter()
        .rfind(|request| request.line.starts_with("GET /v1/endpoints/iris"));
    assert_eq!(read.unwrap().position.as_deref(), Some("7"));
}

#[test]
fn pins_and_pauses_are_sent_as_the_api_takes_them() {
    let (home, server) = (Home::new(), Fake::start());
    let ran = home.run_with(
        &server,
        &["scale", "iris/blue", "--instances", "5", "--for", "1h"],
    );
    assert_eq!(ran.code, 0, "{ran:?}");
    let pin = server.body_of("PUT /v1/autoscale/iris/blue/pin");
    assert_eq!(pin["instances"], 5);
    assert!(pin["until"].is_string());
    assert_eq!(
        home.run_with(&server, &["scale", "iris/blue", "--release"])
            .code,
        0
    );
    assert_eq!(
        home.run_with(&server, &["pause", "iris/blue", "--scale-in"])
            .code,
        0
    );
    assert_eq!(
        server.body_of("POST /v1/autoscale/iris/blue/pause"),
        json!({"scaleIn": true, "scaleOut": false})
    );
    assert_eq!(home.run_with(&server, &["resume", "iris/blue"]).code, 0);
    assert_eq!(
        server.writes(),
        [
            "PUT /v1/autoscale/iris/blue/pin",
            "DELETE /v1/autoscale/iris/blue/pin",
            "POST /v1/autoscale/iris/blue/pause",
            "POST /v1/autoscale/iris/blue/resume",
        ]
    );
}

#[test]
fn invoke_takes_the_key_from_the_api_and_shows_who_answered() {
    let (home, server) = (Home::new(), Fake::start());
    let file = home.file("e.yaml", &ENDPOINT.replace("{traffic: {blue: 100}}", "{}"));
    home.run_with(&server, &["apply", "-f", file.to_str().unwrap()]);
    let ran = home.run_with(
        &server,
        &[
            "invoke",
            "iris",
            "--data",
            "[1, 2]",
            "--deployment",
            "green",
        ],
    );
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(ran.out, "{\"echo\":[1, 2]}\n");
    assert!(
        ran.err.contains("200 OK, from green, request r-1, "),
        "{}",
        ran.err
    );
    assert_eq!(server.last_token().as_deref(), Some("Bearer primary-key"));

    let ran = home.run_with(&server, &["invoke", "iris", "--data", "\"fail\""]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(
        ran.err.contains("424") && ran.err.contains("model said 500"),
        "{}",
        ran.err
    );
}

#[test]
fn the_log_is_exported_whole_over_pages() {
    let (home, server) = (Home::new(), Fake::start());
    let ran = home.run_with(&server, &["events", "export", "--out", "events.ndjson"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let text = std::fs::read_to_string(home.dir.path().join("events.ndjson")).unwrap();
    let positions: Vec<u64> = text
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).unwrap()["position"]
                .as_u64()
                .unwrap()
        })
        .collect();
    assert_eq!(positions, (1..=2500).collect::<Vec<u64>>());
}

#[test]
fn tail_shows_the_last_events_and_what_comes_after_them() {
    let (home, server) = (Home::new(), Fake::start());
    let words = ["events", "tail", "-n", "2", "--no-follow"];
    let ran = home.run_with(&server, &words);
    assert_eq!(ran.code, 0, "{ran:?}");
    let first_words = |text: &str| -> Vec<String> {
        let lines = text.lines();
        lines
            .map(|line| line.split_whitespace().next().unwrap().to_owned())
            .collect()
    };
    assert_eq!(first_words(&ran.out), ["2499", "2500"]);

    let mut child = home
        .command(&["events", "tail", "--after", "2500", "--type", "scaling."])
        .env("PENSTOCK_SERVER", &server.url)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    out.read_line(&mut line).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(
        first_words(&line),
        ["2502"],
        "the usage event is filtered out"
    );
}

#[test]
fn logs_are_passed_on_byte_by_byte() {
    let (home, server) = (Home::new(), Fake::start());
    let ran = home.run_with(&server, &["logs", "iris/blue", "--since", "10m"]);
    assert_eq!((ran.code, ran.out.as_str()), (0, "{\"a\": 1}\n"), "{ran:?}");
    let asked = server.requests().pop().unwrap().line;
    assert_eq!(asked, "GET /v1/logs/iris/blue?since=10m");
}

#[test]
fn a_preview_of_a_file_needs_no_server_and_shows_the_hours_of_the_zone() {
    let home = Home::new();
    home.file("rules.yaml", AUTOSCALE);
    let words = [
        "autoscale",
        "preview",
        "-f",
        "rules.yaml",
        "--from",
        "2026-10-23T00:00:00Z",
        "--to",
        "2026-10-27T00:00:00Z",
        "-o",
        "json",
    ];
    let ran = home.run(&words);
    assert_eq!(ran.code, 0, "{ran:?}");
    let body: Value = serde_json::from_str(&ran.out).unwrap();
    let shown: Vec<(String, String)> = body["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| {
            (
                one["at"].as_str().unwrap().into(),
                one["profile"].as_str().unwrap().into(),
            )
        })
        .collect();
    let expected = [
        ("2026-10-23T00:00:00.000Z", "default"),
        ("2026-10-23T07:00:00.000Z", "office-hours"),
        ("2026-10-23T16:00:00.000Z", "default"),
        // Clocks went back on Sunday.
        ("2026-10-26T08:00:00.000Z", "office-hours"),
        ("2026-10-26T17:00:00.000Z", "default"),
    ];
    assert_eq!(
        shown,
        expected.map(|(at, profile)| (at.to_owned(), profile.to_owned()))
    );
}

#[test]
fn the_examples_that_ship_are_valid() {
    let home = Home::new();
    let quickstart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/examples/quickstart");
    let ran = home.run(&["validate", "-f", quickstart.to_str().unwrap()]);
    assert_eq!(ran.code, 0, "{ran:?}");
}

#[test]
fn one_frame_of_top_is_plain_text() {
    let (home, server) = (Home::new(), Fake::start());
    let file = home.file("all.yaml", &set_of_documents());
    home.run_with(&server, &["apply", "-f", file.to_str().unwrap()]);
    let ran = home.run_with(&server, &["top", "--once"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.out.contains("iris/blue"), "{}", ran.out);
    assert!(!ran.out.contains('\x1b'), "{}", ran.out);
}
