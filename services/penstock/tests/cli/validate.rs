//! `validate`: every fault at its place, without a server.

use std::path::Path;
use std::process::Stdio;

use crate::home::{AUTOSCALE, DEPLOYMENT, ENDPOINT, Home, Ran, set_of_documents};

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
fn the_examples_that_ship_are_valid() {
    let home = Home::new();
    let quickstart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/examples/quickstart");
    let ran = home.run(&["validate", "-f", quickstart.to_str().unwrap()]);
    assert_eq!(ran.code, 0, "{ran:?}");
}
