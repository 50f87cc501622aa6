//! `validate`: every fault with its location, without a server.

use std::path::Path;
use std::process::Stdio;

use crate::home::{AUTOSCALE, CommandResult, DEPLOYMENT, ENDPOINT, Home, all_documents};

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
    let result = home.run(&["validate", "-f", file.to_str().unwrap()]);
    assert_eq!(result.code, 1, "{result:?}");
    assert_eq!(result.out, "");
    let lines: Vec<&str> = result.err.lines().collect();
    assert_eq!(lines.len(), 3, "{}", result.err);
    assert!(
        lines[0].starts_with(&format!("{}:5:", file.display())),
        "{}",
        result.err
    );
    assert!(lines[0].contains("/spec/traffic"), "{}", result.err);
    assert!(lines[1].contains("/spec/backend"), "{}", result.err);

    let good = home.file("good.yaml", &all_documents());
    let result = home.run(&["validate", "-f", good.to_str().unwrap()]);
    assert_eq!((result.code, result.err.as_str()), (0, ""), "{result:?}");
    assert!(
        result.out.contains("autoscale iris/blue is valid"),
        "{}",
        result.out
    );
}

#[test]
fn validate_warns_of_what_is_valid_and_probably_not_intended() {
    let home = Home::new();
    home.file("week.yaml", &AUTOSCALE.replace("Mon-Fri", "7"));
    let result = home.run(&["validate", "-f", "week.yaml"]);
    assert_eq!(result.code, 0, "{result:?}");
    assert!(
        result.err.starts_with("warning: week.yaml:10:"),
        "{}",
        result.err
    );
    assert!(result.err.contains("/schedule/cron: "), "{}", result.err);
    assert!(result.err.contains("write Sun"), "{}", result.err);
}

#[test]
fn validate_names_the_line_for_a_known_servers_command() {
    let home = Home::new();
    let document = "apiVersion: penstock/v1
kind: Deployment
metadata: {name: blue, endpoint: iris}
spec:
  backend: process
  instanceType: cpu-small
  command: [vllm, serve, m, --port, \"{port}\"]
";
    home.file("vllm.yaml", document);
    let result = home.run(&["validate", "-f", "vllm.yaml"]);
    assert_eq!(result.code, 0, "{result:?}");
    let begin = "warning: vllm.yaml:7:3: /spec/command: this starts vLLM; add `server: vllm` ";
    assert!(result.err.starts_with(begin), "{}", result.err);
    home.file("vllm.yaml", &format!("{document}  server: generic\n"));
    let result = home.run(&["validate", "-f", "vllm.yaml"]);
    assert_eq!((result.code, result.err.as_str()), (0, ""), "{result:?}");
}

#[test]
fn validate_shows_every_fault_of_every_file_at_any_depth() {
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
    let result = home.run(&words);
    assert_eq!(result.code, 1, "{result:?}");
    let places: Vec<&str> = result
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
        result.err
    );
}

#[test]
fn validate_truncates_many_faults_and_counts_them() {
    let home = Home::new();
    let wrong = DEPLOYMENT.replace("cpu-small", "'cpu small'");
    home.file("many.yaml", &vec![wrong; 150].join("---"));
    let result = home.run(&["validate", "-f", "many.yaml"]);
    assert_eq!(result.code, 1, "{result:?}");
    assert_eq!(result.err.lines().count(), 101);
    let last = result.err.lines().last().unwrap();
    assert_eq!(
        last,
        "penstock: 150 faults in the documents; the first 100 are shown"
    );
}

#[test]
fn validate_detects_engine_faults_and_duplicates() {
    let home = Home::new();
    home.file(
        "a.yaml",
        &AUTOSCALE.replace("Europe/Paris", "Europe/Pariss"),
    );
    let result = home.run(&["validate", "-f", "a.yaml"]);
    assert_eq!(result.code, 1, "{result:?}");
    assert!(result.err.contains("a.yaml:10:"), "{}", result.err);
    assert!(
        result.err.contains("/spec/profiles/1/schedule/timeZone"),
        "{}",
        result.err
    );

    home.file("twice.yaml", &format!("{ENDPOINT}---{ENDPOINT}"));
    let result = home.run(&["validate", "-f", "twice.yaml"]);
    assert_eq!(result.code, 1, "{result:?}");
    assert!(
        result
            .err
            .contains("Endpoint iris is already defined at twice.yaml:2:1"),
        "{}",
        result.err
    );
}

#[test]
fn placeholders_take_their_values_from_set() {
    let home = Home::new();
    home.file("t.yaml", &DEPLOYMENT.replace("cpu-small", "\"{{type}}\""));
    let result = home.run(&["validate", "-f", "t.yaml"]);
    assert!(
        result.err.contains("t.yaml:5:") && result.err.contains("--set type="),
        "{}",
        result.err
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
    let result = CommandResult::of(child.wait_with_output().unwrap());
    assert_eq!(result.code, 1, "{result:?}");
    assert!(result.err.starts_with("<stdin>:1:1:"), "{}", result.err);
}

#[test]
fn the_examples_that_ship_are_valid() {
    let home = Home::new();
    let quickstart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/examples/quickstart");
    let result = home.run(&["validate", "-f", quickstart.to_str().unwrap()]);
    assert_eq!(result.code, 0, "{result:?}");
}
