//! Malformed documents and requests: each is refused with the field and the remedy, and changes
//! nothing.

mod support;

use contract::resources::document;
use reqwest::Method;
use serde_json::json;
use support::{World, autoscale, deployment, endpoint};

const ENDPOINT: &str = "\
apiVersion: penstock/v1
kind: Endpoint
metadata:
  name: iris
spec:
  auth: key
";

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

/// A fault: the text that is replaced, what by, the field, and a part of the sentence that says what
/// to do. `§` marks the place that must be named.
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
        "a mapping is wanted",
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
        "a mapping of fields is wanted",
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

/// Rows whose words are the engine's: only the field is compared.
const BY_THE_ENGINE: &[Row] = &[
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
    place: Option<(usize, usize)>,
    pointer: &'static str,
    remedy: &'static str,
}

fn cases(base: &str, rows: &[Row]) -> Vec<Case> {
    let case = |(find, replace, pointer, remedy): &Row| {
        assert!(base.contains(find), "`{find}` is not in the document");
        let marked = base.replacen(find, replace, 1);
        // Of two marks the last one counts: a second key is the one too many.
        let place = marked.rfind('§').map(|at| {
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
            place,
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
        ("/v1/autoscale/iris/blue", cases(AUTOSCALE, BY_THE_ENGINE)),
    ]
}

#[test]
fn every_fault_is_found_offline_at_its_place_with_its_remedy() {
    for (_, cases) in all_cases() {
        for case in cases {
            let (read, mut faults) = document::read(&case.text);
            for one in read {
                let found = domain::documents::validate(&one.resource);
                faults.extend(one.document.locate_all(found));
            }
            let shown: Vec<String> = faults.iter().map(ToString::to_string).collect();
            let fault = faults.iter().find(|fault| {
                let pointer = &fault.finding.pointer;
                let near = if case.remedy.is_empty() {
                    pointer.starts_with(case.pointer)
                } else {
                    pointer == case.pointer
                };
                near && fault.finding.detail.contains(case.remedy)
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
            if let (Some(place), false) = (case.place, case.pointer.is_empty()) {
                assert_eq!(
                    (fault.place.line, fault.place.column),
                    place,
                    "{shown:#?} in\n{}",
                    case.text
                );
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_malformed_document_is_refused_and_changes_nothing() {
    let world = World::start().await;
    world
        .put("/v1/endpoints/iris", &endpoint("iris"))
        .await
        .expect(201);
    world
        .put(
            "/v1/endpoints/iris/deployments/blue",
            &deployment("iris", "blue"),
        )
        .await
        .expect(201);
    world.settled().await;
    let head = world.head().await;
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
            let named = errors.iter().any(|error| {
                error["pointer"].as_str().unwrap().starts_with(case.pointer)
                    && error["detail"].as_str().unwrap().contains(case.remedy)
            });
            assert!(named, "{} in {problem:#}", case.pointer);
        }
    }
    assert!(count >= 60, "{count} documents");
    assert_eq!(world.head().await, head);
    world.stop().await;
}

/// Method, path, body, status, code, part of what is said.
type Request = (
    &'static str,
    &'static str,
    &'static str,
    u16,
    &'static str,
    &'static str,
);

const REQUESTS: &[Request] = &[
    (
        "PUT",
        "/v1/endpoints/iris",
        "",
        400,
        "invalid-document",
        "the body is empty",
    ),
    (
        "PUT",
        "/v1/endpoints/iris",
        "[]",
        400,
        "invalid-document",
        "a resource is a mapping",
    ),
    (
        "PUT",
        "/v1/endpoints/iris",
        "--- {a: 1}\n--- {b: 1}",
        400,
        "invalid-document",
        "send one at a time",
    ),
    (
        "PUT",
        "/v1/endpoints/iris",
        "{\"kind\": \"Endpoint\", \"kind\": \"Endpoint\"}",
        400,
        "invalid-document",
        "given twice",
    ),
    (
        "PUT",
        "/v1/endpoints/Iris",
        "{}",
        400,
        "invalid-name",
        "lower-case letters",
    ),
    (
        "PUT",
        "/v1/endpoints/other",
        ENDPOINT,
        400,
        "invalid-document",
        "make them equal",
    ),
    (
        "PUT",
        "/v1/endpoints/iris/deployments/blue",
        ENDPOINT,
        400,
        "invalid-document",
        "send it to its own path",
    ),
    (
        "PUT",
        "/v1/endpoints/none/deployments/blue",
        "{\"apiVersion\":\"penstock/v1\",\"kind\":\"Deployment\",\"metadata\":{\"name\":\"blue\",\"endpoint\":\"none\"},\"spec\":{\"backend\":\"simulated\",\"instanceType\":\"a\"}}",
        404,
        "not-found",
        "create it first",
    ),
    (
        "PUT",
        "/v1/endpoints/iris?dryrun=true",
        ENDPOINT,
        400,
        "invalid-request",
        "use one of: dryRun",
    ),
    (
        "PUT",
        "/v1/endpoints/iris?dryRun=yes",
        ENDPOINT,
        400,
        "invalid-request",
        "write true or false",
    ),
    (
        "PUT",
        "/v1/endpoints/iris/traffic",
        "{\"traffic\": {\"red\": 100}}",
        400,
        "invalid-document",
        "create it first, or take it out",
    ),
    (
        "PUT",
        "/v1/endpoints/iris/traffic",
        "{\"traffic\": {\"blue\": 50}}",
        400,
        "invalid-document",
        "sum to 100",
    ),
    (
        "PUT",
        "/v1/endpoints/iris/traffic",
        "{\"trafic\": {}}",
        400,
        "invalid-document",
        "did you mean `traffic`?",
    ),
    (
        "PUT",
        "/v1/endpoints/none/traffic",
        "{}",
        404,
        "not-found",
        "create it first",
    ),
    (
        "POST",
        "/v1/endpoints/iris/keys/tertiary/regenerate",
        "",
        404,
        "not-found",
        "primary and secondary",
    ),
    (
        "PUT",
        "/v1/autoscale/iris/blue/pin",
        "{}",
        400,
        "invalid-document",
        "`instances` is missing",
    ),
    (
        "PUT",
        "/v1/autoscale/iris/blue/pin",
        "{\"instances\": 1001}",
        400,
        "invalid-document",
        "use 0 to 1000",
    ),
    (
        "PUT",
        "/v1/autoscale/iris/blue/pin",
        "{\"instances\": 2, \"until\": \"2001-01-01T00:00:00Z\"}",
        400,
        "invalid-document",
        "name a later one",
    ),
    (
        "PUT",
        "/v1/autoscale/iris/blue/pin",
        "{\"instances\": 2, \"until\": \"tomorrow\"}",
        400,
        "invalid-document",
        "RFC 3339",
    ),
    (
        "PUT",
        "/v1/autoscale/iris/green/pin",
        "{\"instances\": 2}",
        404,
        "not-found",
        "create it first",
    ),
    (
        "POST",
        "/v1/autoscale/iris/blue/pause",
        "{\"scaleIn\": false, \"scaleOut\": false}",
        400,
        "invalid-document",
        "name one",
    ),
    (
        "POST",
        "/v1/access",
        "{\"name\": \"ci\"}",
        400,
        "invalid-document",
        "`role` is missing",
    ),
    (
        "POST",
        "/v1/access",
        "{\"name\": \"ci\", \"role\": \"root\"}",
        400,
        "invalid-document",
        "use one of: viewer, operator, admin",
    ),
    (
        "POST",
        "/v1/access",
        "{\"name\": \"ci\", \"role\": \"viewer\", \"expires\": \"2001-01-01T00:00:00Z\"}",
        400,
        "invalid-document",
        "name a later one",
    ),
    (
        "DELETE",
        "/v1/access/nobody",
        "",
        404,
        "not-found",
        "nothing was revoked",
    ),
    (
        "DELETE",
        "/v1/access/admin",
        "",
        409,
        "last-admin",
        "grant another one first",
    ),
    (
        "DELETE",
        "/v1/endpoints/none",
        "",
        404,
        "not-found",
        "there is no endpoint",
    ),
    (
        "DELETE",
        "/v1/endpoints/iris/deployments/none",
        "",
        404,
        "not-found",
        "there is no deployment",
    ),
    (
        "GET",
        "/v1/endpoints?limit=0",
        "",
        400,
        "invalid-request",
        "use 1 to 1000",
    ),
    (
        "GET",
        "/v1/endpoints?limit=many",
        "",
        400,
        "invalid-request",
        "a whole number",
    ),
    (
        "GET",
        "/v1/endpoints?cursor=abc",
        "",
        400,
        "invalid-request",
        "nextCursor",
    ),
    (
        "GET",
        "/v1/endpoints?limit=1&limit=2",
        "",
        400,
        "invalid-request",
        "given twice",
    ),
    (
        "GET",
        "/v1/decisions?since=yesterday",
        "",
        400,
        "invalid-request",
        "a duration such as 10m",
    ),
    (
        "GET",
        "/v1/decisions/7",
        "",
        400,
        "invalid-request",
        "a UUID",
    ),
    (
        "GET",
        "/v1/autoscale/iris/blue/preview?from=1h&to=2h",
        "",
        400,
        "invalid-request",
        "must lie after `from`",
    ),
    (
        "GET",
        "/v1/history?step=10ms",
        "",
        400,
        "invalid-request",
        "whole seconds",
    ),
    (
        "GET",
        "/v1/logs/iris/none",
        "",
        404,
        "not-found",
        "there is no deployment",
    ),
    (
        "GET",
        "/v1/price-sheets",
        "",
        404,
        "unknown-path",
        "see /openapi.json",
    ),
    (
        "POST",
        "/v1/endpoints/iris/token",
        "",
        404,
        "unknown-path",
        "there is nothing at",
    ),
    (
        "PATCH",
        "/v1/endpoints/iris",
        "{}",
        405,
        "method-not-allowed",
        "Allow",
    ),
    (
        "POST",
        "/v1/events/replay",
        "{}",
        400,
        "invalid-document",
        "`checkDecisions` is missing",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn every_malformed_request_is_a_problem_and_changes_nothing() {
    let world = World::start().await;
    world
        .put("/v1/endpoints/iris", &endpoint("iris"))
        .await
        .expect(201);
    world
        .put(
            "/v1/endpoints/iris/deployments/blue",
            &deployment("iris", "blue"),
        )
        .await
        .expect(201);
    world
        .put("/v1/autoscale/iris/blue", &autoscale("iris", "blue"))
        .await
        .expect(201);
    world.settled().await;
    let head = world.head().await;
    for (method, path, body, status, code, says) in REQUESTS {
        let method: Method = method.parse().unwrap();
        let reply = world
            .send(world.request(method.clone(), path).body(*body))
            .await;
        let told = format!("{method} {path} {body}\n{}", reply.text);
        assert_eq!(reply.status, *status, "{told}");
        assert_eq!(
            reply.header("content-type"),
            Some("application/problem+json"),
            "{told}"
        );
        let problem = reply.body();
        assert_eq!(problem["code"], *code, "{told}");
        assert_eq!(problem["status"], *status, "{told}");
        assert!(reply.text.contains(says), "`{says}`: {told}");
    }
    assert_eq!(world.head().await, head);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_method_that_is_not_possible_is_answered_with_those_that_are() {
    let world = World::start().await;
    let reply = world
        .post("/v1/endpoints/iris", &json!({}))
        .await
        .expect(405);
    let allowed = reply.header("allow").unwrap();
    for method in ["GET", "PUT", "DELETE"] {
        assert!(allowed.contains(method), "{allowed}");
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_and_documents_past_their_limits_are_refused() {
    let world = World::start().await;
    let head = world.head().await;
    let put =
        |body: String| world.send(world.request(Method::PUT, "/v1/endpoints/iris").body(body));
    let large = format!("{ENDPOINT}# {}", "x".repeat(1024 * 1024));
    assert_eq!(put(large).await.expect(413).code(), "too-large");
    let deep = format!("{ENDPOINT}  x: {}{}", "[".repeat(40), "]".repeat(40));
    assert!(
        put(deep)
            .await
            .expect(400)
            .text
            .contains("flatten the document")
    );
    let deep_json = format!("{{\"a\": {}{}}}", "[".repeat(40), "]".repeat(40));
    assert!(
        put(deep_json)
            .await
            .expect(400)
            .text
            .contains("flatten the document")
    );
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..10 {
        let before = format!("*a{}, ", level - 1).repeat(10);
        bomb.push_str(&format!("a{level}: &a{level} [{before}]\n"));
    }
    assert!(put(bomb).await.expect(400).text.contains("aliases counted"));
    let cycle = format!("{ENDPOINT}  x: &x {{y: *x}}");
    assert!(
        put(cycle)
            .await
            .expect(400)
            .text
            .contains("inside what it refers to")
    );
    let labels: Vec<String> = (0..33).map(|n| format!("l{n}: x")).collect();
    let many = ENDPOINT.replace(
        "name: iris",
        &format!("name: iris\n  labels: {{{}}}", labels.join(", ")),
    );
    assert!(put(many).await.expect(400).text.contains("keep at most 32"));
    assert_eq!(world.head().await, head);
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
    let (_, faults) = document::read(text);
    let shown: Vec<String> = faults
        .iter()
        .map(|f| format!("{} {}", f.place, f.finding.pointer))
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
    let (_, unknown) = document::read(
        "apiVersion: penstock/v1\nkind: Endpoint\nmetadata: {name: a}\nspec: {x: 1, y: 2}\n",
    );
    assert_eq!(unknown.len(), 2);
}

#[test]
fn a_file_may_hold_many_documents_and_each_fault_keeps_its_line() {
    let text = format!(
        "{ENDPOINT}---\n{}---\n# nothing\n---\n{AUTOSCALE}",
        DEPLOYMENT.replace("instances: 1", "instances: x")
    );
    let (read, faults) = document::read(&text);
    assert_eq!(read.len(), 2);
    let lines: Vec<String> = faults.iter().map(ToString::to_string).collect();
    assert_eq!(lines.len(), 1);
    assert!(
        lines[0].starts_with("17:3: /spec/instances: "),
        "{}",
        lines[0]
    );
}
