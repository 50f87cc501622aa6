//! Malformed documents: each is rejected with the field and a remedy, and changes nothing.
#![allow(clippy::unwrap_used)]

mod support;

use domain::zones::ZoneData;
use reqwest::Method;
use serde_json::json;
use support::{ENDPOINT, TestWorld, deployment};

const DEPLOYMENT: &str = "\
apiVersion: penstock/v1
kind: Deployment
metadata:
  name: blue
  endpoint: iris
spec:
  backend: process
  instanceType: cpu-small
  command: [./scorer, --port, \"{port}\"]
  instances: 1
";

const AUTOSCALE: &str = "\
apiVersion: penstock/v1
kind: Autoscale
spec:
  target: {endpoint: iris, deployment: blue}
  profiles:
  - name: default
    capacity: {min: 1, max: 5, default: 2}
    rules:
    - name: busy
      metric: {name: concurrency, window: 30s}
      when: \"> 4\"
      scale: {direction: out, by: 1}
";

/// A fault: the text to replace, its replacement, the expected field, and a part of the expected remedy.
/// `§` marks the expected location.
type Row = (&'static str, &'static str, &'static str, &'static str);

const IN_ENDPOINT: &[Row] = &[
    (
        "apiVersion: penstock/v1",
        "§apiVersion: penstock/v2",
        "/apiVersion",
        "write `penstock/v1`",
    ),
    (
        "apiVersion: penstock/v1\n",
        "§",
        "/apiVersion",
        "write `apiVersion: penstock/v1`",
    ),
    (
        "kind: Endpoint",
        "§kind: Endpont",
        "/kind",
        "did you mean `Endpoint`?",
    ),
    ("kind: Endpoint\n", "", "/kind", "write one of: Endpoint"),
    (
        "kind: Endpoint",
        "§kind: [Endpoint]",
        "/kind",
        "must be text",
    ),
    (
        "kind: Endpoint",
        "§kind: PriceSheet",
        "/kind",
        "`PriceSheet` is known but not available yet",
    ),
    (
        "kind: Endpoint",
        "§kind: ShadowTest",
        "/kind",
        "`ShadowTest` is known but not available yet",
    ),
    (
        "kind: Endpoint",
        "§kind: SLO",
        "/kind",
        "leave the document out",
    ),
    (
        "metadata:\n",
        "§metadaat:\n",
        "/metadaat",
        "did you mean `metadata`?",
    ),
    (
        "  name: iris",
        "  §name: Iris",
        "/metadata/name",
        "lower-case letters",
    ),
    (
        "  name: iris",
        "  §name: -iris",
        "/metadata/name",
        "starting with a letter",
    ),
    (
        "  name: iris",
        "  §name: 7",
        "/metadata/name",
        "put it in quotes",
    ),
    (
        "  name: iris",
        "  §name: iris-is-a-name-of-more-than-32-bytes",
        "/metadata/name",
        "1 to 32",
    ),
    (
        "  name: iris\n",
        "  labels: {a: b}\n",
        "/metadata/name",
        "`name` is missing; add it",
    ),
    (
        "  name: iris",
        "  name: iris\n  §labels: [a]",
        "/metadata/labels",
        "a mapping is expected",
    ),
    (
        "  name: iris",
        "  name: iris\n  labels: {§a: 1}",
        "/metadata/labels/a",
        "put it in quotes",
    ),
    (
        "  name: iris",
        "  name: iris\n  §nmae: x",
        "/metadata/nmae",
        "did you mean `name`?",
    ),
    (
        "spec:\n  auth: key\n",
        "",
        "/spec",
        "`spec` is missing; add it",
    ),
    (
        "  auth: key",
        "  §auth: token",
        "/spec/auth",
        "not available yet; use `key` or `none`",
    ),
    (
        "  auth: key",
        "  §auth: oauth",
        "/spec/auth",
        "use one of: key, none",
    ),
    (
        "  auth: key",
        "  §auht: key",
        "/spec/auht",
        "did you mean `auth`?",
    ),
    (
        "  auth: key",
        "  auth: key\n  §cors: {}",
        "/spec/cors",
        "not available yet; remove it",
    ),
    (
        "  auth: key",
        "  §auth: key\n  §auth: none",
        "/spec/auth",
        "`auth` is given twice",
    ),
    (
        "  auth: key",
        "  §traffic: {blue: 60, green: 60}",
        "/spec/traffic",
        "make them sum to 100, or to 0",
    ),
    (
        "  auth: key",
        "  traffic: {§blue: 101}",
        "/spec/traffic/blue",
        "use 0 to 100",
    ),
    (
        "  auth: key",
        "  traffic: {§blue: -1, green: 101}",
        "/spec/traffic/blue",
        "a whole percentage from 0 to 100",
    ),
    (
        "  auth: key",
        "  traffic: {§blue: 12.5}",
        "/spec/traffic/blue",
        "a whole percentage",
    ),
    (
        "  auth: key",
        "  mirror: {§green: 300}",
        "/spec/mirror/green",
        "from 0 to 100",
    ),
    (
        "  auth: key",
        "  limits: {§requestBytesMax: 0}",
        "/spec/limits/requestBytesMax",
        "use 1 to",
    ),
    (
        "  auth: key",
        "  §limits: 5",
        "/spec/limits",
        "a mapping of fields is expected",
    ),
    ("  auth: key", "  §auth: \"key", "", "not valid YAML"),
    (
        "  auth: key",
        "  auth: §!env KEY",
        "/spec/auth",
        "has no meaning here; remove it",
    ),
    (
        "  auth: key",
        "  a: {? §[x] : 1}",
        "/spec/a",
        "cannot be a key",
    ),
];

const IN_DEPLOYMENT: &[Row] = &[
    (
        "  backend: process",
        "  §backend: container",
        "/spec/backend",
        "not available yet; use `process`",
    ),
    (
        "  backend: process",
        "  §backend: lambda",
        "/spec/backend",
        "use one of: process, simulated",
    ),
    (
        "  backend: process\n",
        "",
        "/spec/backend",
        "`backend` is missing; add it",
    ),
    (
        "  endpoint: iris\n",
        "",
        "/metadata/endpoint",
        "`endpoint` is missing; add it",
    ),
    (
        "  instanceType: cpu-small",
        "  §instanceType: \"cpu small\"",
        "/spec/instanceType",
        "letters, digits, dots",
    ),
    (
        "  instanceType: cpu-small",
        "  §instanceType: \"\"",
        "/spec/instanceType",
        "use 1 to 64",
    ),
    (
        "  instanceType: cpu-small",
        "  instanceType: a\n  §region: \"eu/west\"",
        "/spec/region",
        "letters, digits, dots",
    ),
    (
        "  command: [./scorer, --port, \"{port}\"]\n",
        "",
        "/spec/command",
        "write a list such as",
    ),
    (
        "  command: [./scorer, --port, \"{port}\"]",
        "  §command: [./scorer]",
        "/spec/command",
        "put {port} into an argument",
    ),
    (
        "  command: [./scorer, --port, \"{port}\"]",
        "  §command: ./scorer {port}",
        "/spec/command",
        "write a list",
    ),
    (
        "  command: [./scorer, --port, \"{port}\"]",
        "  command: [§\"\", \"{port}\"]",
        "/spec/command/0",
        "name the program",
    ),
    (
        "  command: [./scorer, --port, \"{port}\"]",
        "  command: [a, \"{port}\", §8]",
        "/spec/command/2",
        "put it in quotes",
    ),
    (
        "  command: [./scorer, --port, \"{port}\"]",
        "  §image: scorer:1",
        "/spec/image",
        "give a `command`",
    ),
    (
        "  instances: 1",
        "  §instances: 1001",
        "/spec/instances",
        "use 0 to 1000",
    ),
    (
        "  instances: 1",
        "  §instances: -1",
        "/spec/instances",
        "a whole number that is not negative",
    ),
    (
        "  instances: 1",
        "  §instances: two",
        "/spec/instances",
        "a whole number",
    ),
    (
        "  instances: 1",
        "  §instance: 1",
        "/spec/instance",
        "did you mean `instances`?",
    ),
    (
        "  instances: 1",
        "  env: {§1A: x}",
        "/spec/env/1A",
        "not starting with a digit",
    ),
    (
        "  instances: 1",
        "  env: {§LEVEL: 2}",
        "/spec/env/LEVEL",
        "text in quotes",
    ),
    (
        "  instances: 1",
        "  env: {§PENSTOCK_ID: x}",
        "/spec/env/PENSTOCK_ID",
        "use another name",
    ),
    (
        "  instances: 1",
        "  env: {DB: {§secretRef: hunter2}}",
        "/spec/env/DB/secretRef",
        "write env:NAME or file:/ABSOLUTE/PATH",
    ),
    (
        "  instances: 1",
        "  env: {DB: {§secretRef: \"file:relative\"}}",
        "/spec/env/DB/secretRef",
        "file:/ABSOLUTE/PATH",
    ),
    (
        "  instances: 1",
        "  env: {DB: {§secret: x}}",
        "/spec/env/DB/secret",
        "use one of: secretRef",
    ),
    (
        "  instances: 1",
        "  §simulated: {}",
        "/spec/simulated",
        "set `backend: simulated`",
    ),
    (
        "  instances: 1",
        "  requestSettings: {§timeout: 5}",
        "/spec/requestSettings/timeout",
        "put it in quotes",
    ),
    (
        "  instances: 1",
        "  requestSettings: {§timeout: 5 sec}",
        "/spec/requestSettings/timeout",
        "such as 500ms",
    ),
    (
        "  instances: 1",
        "  requestSettings: {§timeout: 0s}",
        "/spec/requestSettings/timeout",
        "use 1ms or more",
    ),
    (
        "  instances: 1",
        "  requestSettings: {§timeout: 2h}",
        "/spec/requestSettings/timeout",
        "use at most 1h",
    ),
    (
        "  instances: 1",
        "  requestSettings: {§maxQueueWait: 1h}",
        "/spec/requestSettings/maxQueueWait",
        "use at most 5m",
    ),
    (
        "  instances: 1",
        "  requestSettings: {§keepAliveIdle: 6m}",
        "/spec/requestSettings/keepAliveIdle",
        "use at most 5m",
    ),
    (
        "  instances: 1",
        "  requestSettings: {§maxConcurrentRequestsPerInstance: 0}",
        "/spec/requestSettings/maxConcurrentRequestsPerInstance",
        "use 1 to 10000",
    ),
    (
        "  instances: 1",
        "  §requestSettings:",
        "/spec/requestSettings",
        "fill it in or remove the field",
    ),
    (
        "  instances: 1",
        "  readinessProbe: {§path: healthz}",
        "/spec/readinessProbe/path",
        "start it with `/`",
    ),
    (
        "  instances: 1",
        "  readinessProbe: {§failureThreshold: 0}",
        "/spec/readinessProbe/failureThreshold",
        "use 1 to",
    ),
    (
        "  instances: 1",
        "  livenessProbe: {§period: 1ms}",
        "/spec/livenessProbe/period",
        "use a longer period",
    ),
    (
        "  instances: 1",
        "  livenessProbe: {§successThreshold: 0}",
        "/spec/livenessProbe/successThreshold",
        "use 1 to",
    ),
    (
        "  instances: 1",
        "  livenessProbe: {§timeout: 0s}",
        "/spec/livenessProbe/timeout",
        "use 1ms or more",
    ),
    (
        "  instances: 1",
        "  §purchase: borrowed",
        "/spec/purchase",
        "use one of: on-demand",
    ),
];

const IN_AUTOSCALE: &[Row] = &[
    (
        "  target: {endpoint: iris, deployment: blue}\n",
        "",
        "/spec/target",
        "`target` is missing; add it",
    ),
    (
        "{endpoint: iris, deployment: blue}",
        "{endpoint: iris, §deployment: Blue}",
        "/spec/target/deployment",
        "lower-case letters",
    ),
    (
        "capacity: {min: 1, max: 5, default: 2}",
        "capacity: {min: 1, max: 5}",
        "/spec/profiles/0/capacity/default",
        "`default` is missing",
    ),
    (
        "capacity: {min: 1, max: 5, default: 2}",
        "capacity: {§min: 1.5, max: 5, default: 2}",
        "/spec/profiles/0/capacity/min",
        "a whole number",
    ),
    (
        "window: 30s}",
        "§window: 30}",
        "/spec/profiles/0/rules/0/metric/window",
        "put it in quotes",
    ),
    (
        "direction: out,",
        "§direction: up,",
        "/spec/profiles/0/rules/0/scale/direction",
        "use one of: out, in",
    ),
    (
        "by: 1}",
        "§by: [1]}",
        "/spec/profiles/0/rules/0/scale/by",
        "write one of the two",
    ),
    (
        "when: \"> 4\"",
        "§whne: \"> 4\"",
        "/spec/profiles/0/rules/0/whne",
        "did you mean `when`?",
    ),
];

/// Faults that the engine words: only the field is compared.
const ENGINE_FAULTS: &[Row] = &[
    (
        "min: 1, max: 5",
        "min: 6, max: 5",
        "/spec/profiles/0/capacity",
        "",
    ),
    (
        "when: \"> 4\"",
        "§when: \"more than 4\"",
        "/spec/profiles/0/rules/0/when",
        "",
    ),
    (
        "name: concurrency",
        "§name: happiness",
        "/spec/profiles/0/rules/0/metric/name",
        "",
    ),
    (
        "by: 1}",
        "§by: \"half\"}",
        "/spec/profiles/0/rules/0/scale",
        "",
    ),
    (
        "  - name: default",
        "  - name: default\n    schedule: {§cron: \"0 9\", duration: 1h}",
        "/spec/profiles/0/schedule",
        "",
    ),
];

struct Case {
    text: String,
    location: Option<(usize, usize)>,
    pointer: &'static str,
    remedy: &'static str,
}

fn cases(base: &str, rows: &[Row]) -> Vec<Case> {
    let case = |(find, replace, pointer, remedy): &Row| {
        assert!(base.contains(find), "`{find}` is not in the document");
        let marked = base.replacen(find, replace, 1);
        // The last of two marks counts: of a duplicate key, the second is the error.
        let location = marked.rfind('§').map(|at| {
            let before = marked[..at].replace('§', "");
            let line = before.matches('\n').count() + 1;
            (
                line,
                before.len() - before.rfind('\n').map_or(0, |newline| newline + 1) + 1,
            )
        });
        let text = marked.replace('§', "");
        Case {
            text,
            location,
            pointer,
            remedy,
        }
    };
    rows.iter().map(case).collect()
}

fn all_cases() -> Vec<(&'static str, Vec<Case>)> {
    vec![
        ("/v1/endpoints/iris", cases(ENDPOINT, IN_ENDPOINT)),
        (
            "/v1/endpoints/iris/deployments/blue",
            cases(DEPLOYMENT, IN_DEPLOYMENT),
        ),
        ("/v1/autoscale/iris/blue", cases(AUTOSCALE, IN_AUTOSCALE)),
        ("/v1/autoscale/iris/blue", cases(AUTOSCALE, ENGINE_FAULTS)),
    ]
}

#[test]
fn every_fault_is_found_offline_at_its_location_with_a_remedy() {
    for (_, cases) in all_cases() {
        for case in cases {
            let (read, mut faults) = documents::read(&case.text);
            for one in read {
                let found = domain::documents::validate(&one.resource, &ZoneData::bundled());
                faults.extend(one.document.locate_all(found));
            }
            let shown: Vec<String> = faults.iter().map(ToString::to_string).collect();
            let fault = faults.iter().find(|fault| {
                let pointer = &fault.finding.pointer;
                let is_match = if case.remedy.is_empty() {
                    pointer.starts_with(case.pointer)
                } else {
                    pointer == case.pointer
                };
                is_match && fault.finding.detail.contains(case.remedy)
            });
            let Some(fault) = fault
                .filter(|_| !case.pointer.is_empty())
                .or(faults.first().filter(|_| case.pointer.is_empty()))
            else {
                panic!(
                    "no fault at {} saying `{}` in\n{}\nbut {shown:#?}",
                    case.pointer, case.remedy, case.text
                );
            };
            if let (Some(location), false) = (case.location, case.pointer.is_empty()) {
                assert_eq!(
                    (fault.location.line, fault.location.column),
                    location,
                    "{shown:#?} in\n{}",
                    case.text
                );
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_malformed_document_is_rejected_and_changes_nothing() {
    let world = TestWorld::with_blue().await;
    let head = world.settled_head().await;
    let mut count = 0;
    for (path, cases) in all_cases() {
        for case in cases {
            count += 1;
            let request = world.request(Method::PUT, path).body(case.text.clone());
            let reply = world.send(request).await;
            assert_eq!(reply.status, 400, "{}\n{}", case.text, reply.text);
            assert_eq!(
                reply.header("content-type"),
                Some("application/problem+json")
            );
            let problem = reply.body();
            assert_eq!(problem["code"], "invalid-document");
            let errors = problem["errors"].as_array().unwrap();
            let is_reported = errors.iter().any(|error| {
                error["pointer"].as_str().unwrap().starts_with(case.pointer)
                    && error["detail"].as_str().unwrap().contains(case.remedy)
            });
            assert!(is_reported, "{} in {problem:#}", case.pointer);
        }
    }
    assert!(count >= 60, "{count} documents");
    assert_eq!(world.head().await, head);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reference_to_a_secret_of_penstock_is_rejected_at_apply() {
    let world = TestWorld::with_iris().await;
    let head = world.settled_head().await;
    let path = "/v1/endpoints/iris/deployments/blue";
    let inside = world.dir.path().join("deep/../seal.key");
    let inside = format!("file:{}", inside.display());
    let mut document = deployment("iris", "blue");
    for reference in [
        "env:PENSTOCK_INTERNAL_TOKEN",
        "env:PGPASSWORD",
        "env:BUS_PASSWORD",
        "file:/proc/self/environ",
        &inside,
    ] {
        document["spec"]["env"] = json!({"LEVEL": "2", "DB": {"secretRef": reference}});
        let rejected = world.put(path, &document).await.expect(400);
        assert_eq!(rejected.code(), "invalid-document");
        let errors = rejected.body()["errors"].clone();
        assert_eq!(errors[0]["pointer"], "/spec/env/DB/secretRef", "{errors}");
        let detail = errors[0]["detail"].as_str().unwrap();
        assert!(detail.contains("reserved for Penstock"), "{detail}");
    }
    assert_eq!(world.head().await, head);
    document["spec"]["env"] = json!({"DB": {"secretRef": "env:MODEL_PASSWORD"}});
    world.put(path, &document).await.expect(201);
    world.stop().await;
}

#[test]
fn all_faults_of_a_document_are_reported_together() {
    let text = "\
apiVersion: penstock/v1
kind: Deployment
metadata: {name: blue, endpoint: iris}
spec:
  backend: process
  instanceType: \"cpu small\"
  command: [./scorer]
  instances: 5000
  readinessProbe: {path: x}
";
    let (_, faults) = documents::read(text);
    let shown: Vec<String> = faults
        .iter()
        .map(|f| format!("{} {}", f.location, f.finding.pointer))
        .collect();
    assert_eq!(
        shown,
        [
            "6:3 /spec/instanceType",
            "7:3 /spec/command",
            "8:3 /spec/instances",
            "9:20 /spec/readinessProbe/path",
        ]
    );
    let (_, unknown) = documents::read(
        "apiVersion: penstock/v1\nkind: Endpoint\nmetadata: {name: a}\nspec: {x: 1, y: 2}\n",
    );
    assert_eq!(unknown.len(), 2);
}

#[test]
fn a_file_may_contain_many_documents_and_each_fault_keeps_its_line() {
    let text = format!(
        "{ENDPOINT}---\n{}---\n# nothing\n---\n{AUTOSCALE}",
        DEPLOYMENT.replace("instances: 1", "instances: x")
    );
    let (read, faults) = documents::read(&text);
    assert_eq!(read.len(), 2);
    let lines: Vec<String> = faults.iter().map(ToString::to_string).collect();
    assert_eq!(lines.len(), 1);
    assert!(
        lines[0].starts_with("17:3: /spec/instances: "),
        "{}",
        lines[0]
    );
}
