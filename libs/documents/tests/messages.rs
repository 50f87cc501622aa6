//! The exact message of each kind of fault.
#![allow(clippy::unwrap_used)]

use documents::{DEPTH_MAX, read, read_trees};

const ENDPOINT: &str = "\
apiVersion: penstock/v1
kind: Endpoint
metadata: {name: iris, labels: {team: vision}}
spec:
  auth: key
  traffic: {blue: 100}
  mirror: {green: 0}
  modelClientErrors: good
  limits: {requestBytesMax: 1000}
";

const DEPLOYMENT: &str = "\
apiVersion: penstock/v1
kind: Deployment
metadata: {name: blue, endpoint: iris}
spec:
  backend: simulated
  instanceType: cpu-small
  env: {LEVEL: \"2\"}
  instances: 1
  simulated: {seed: 1}
  requestSettings: {timeout: 5s}
";

const AUTOSCALE: &str = "\
apiVersion: penstock/v1
kind: Autoscale
spec:
  target: {endpoint: iris, deployment: blue}
  mode: live
  profiles:
  - name: default
    priority: 1
    capacity: {min: 1, max: 5, default: 2}
    rules:
    - name: busy
      metric: {name: concurrency, window: 30s, perInstance: true}
      when: \"> 4\"
      scale: {direction: out, by: 1}
";

/// A part of a document, its replacement, and the expected messages.
type Case = (&'static str, &'static str, &'static [&'static str]);

const ENDPOINT_CASES: &[Case] = &[
    (
        "auth: key",
        "auth: token",
        &["5:3: /spec/auth: token authentication is not available yet; use `key` or `none`"],
    ),
    (
        "auth: key",
        "auth: kee",
        &["5:3: /spec/auth: `kee` is not a valid value; use one of: key, none"],
    ),
    (
        "auth: key",
        "auth: password",
        &["5:3: /spec/auth: `password` is not a valid value; use one of: key, none"],
    ),
    (
        "auth: key",
        "auth: 5",
        &[
            "5:3: /spec/auth: this is the integer `5`, but string or map is expected; write string or map",
        ],
    ),
    (
        "auth: key",
        "auth: {key: 1}",
        &["5:3: /spec/auth: this is the integer `1`, but unit is expected; write unit"],
    ),
    ("auth: key", "auth: {key: ~}", &[]),
    (
        "auth: key",
        "auth: {key: 1, none: 2}",
        &[
            "5:3: /spec/auth: this is a mapping, but map with a single key is expected; write map with a single key",
        ],
    ),
    (
        "auth: key",
        "auth: [key]",
        &["5:3: /spec/auth: this is a list, but string or map is expected; write string or map"],
    ),
    (
        "auth: key",
        "auth:",
        &[
            "5:3: /spec/auth: this is empty, but string or map is expected; fill it in or remove the field",
        ],
    ),
    (
        "auth: key",
        "auth: {oauth: {}}",
        &["5:3: /spec/auth: `oauth` is not a valid value; use one of: key, none"],
    ),
    (
        "auth: key",
        "cors: true",
        &["5:3: /spec/cors: `cors` is not available yet; remove it"],
    ),
    (
        "auth: key",
        "outh: key",
        &["5:3: /spec/outh: `outh` is not a field here; did you mean `auth`?"],
    ),
    (
        "auth: key",
        "authentication: key",
        &[
            "5:3: /spec/authentication: `authentication` is not a field here; remove it, or use one of: auth, traffic, mirror, modelClientErrors, limits",
        ],
    ),
    (
        "auth: key",
        "\"a`b\": key",
        &[
            "5:3: /spec/a`b: `a`b` is not a field here; remove it, or use one of: auth, traffic, mirror, modelClientErrors, limits",
        ],
    ),
    (
        "auth: key",
        "auth: \"k`ee\"",
        &["5:3: /spec/auth: `k`ee` is not a valid value; use one of: key, none"],
    ),
    (
        "auth: key",
        "\"a/b~c\": key",
        &[
            "5:3: /spec/a~1b~0c: `a/b~c` is not a field here; remove it, or use one of: auth, traffic, mirror, modelClientErrors, limits",
        ],
    ),
    (
        "{blue: 100}",
        "{blue: 300}",
        &[
            "6:13: /spec/traffic/blue: this is the integer `300`, but a whole percentage from 0 to 100 is expected; write a whole percentage from 0 to 100",
        ],
    ),
    (
        "{blue: 100}",
        "{blue: -1}",
        &[
            "6:13: /spec/traffic/blue: this is the integer `-1`, but a whole percentage from 0 to 100 is expected; write a whole percentage from 0 to 100",
        ],
    ),
    (
        "{blue: 100}",
        "{blue: 99.5}",
        &[
            "6:13: /spec/traffic/blue: this is the floating point `99.5`, but a whole percentage from 0 to 100 is expected; write a whole percentage from 0 to 100",
        ],
    ),
    (
        "{blue: 100}",
        "{blue: many}",
        &[
            "6:13: /spec/traffic/blue: this is the string \"many\", but a whole percentage from 0 to 100 is expected; write a whole percentage from 0 to 100",
        ],
    ),
    (
        "{blue: 100}",
        "{blue: true}",
        &[
            "6:13: /spec/traffic/blue: this is the boolean `true`, but a whole percentage from 0 to 100 is expected; write a whole percentage from 0 to 100",
        ],
    ),
    (
        "{blue: 100}",
        "{blue: }",
        &[
            "6:13: /spec/traffic/blue: this is empty, but a whole percentage from 0 to 100 is expected; fill it in or remove the field",
        ],
    ),
    (
        "{blue: 100}",
        "{blue: [1]}",
        &[
            "6:13: /spec/traffic/blue: this is a list, but a whole percentage from 0 to 100 is expected; write a whole percentage from 0 to 100",
        ],
    ),
    (
        "{blue: 100}",
        "{blue: {a: 1}}",
        &[
            "6:13: /spec/traffic/blue: this is a mapping, but a whole percentage from 0 to 100 is expected; write a whole percentage from 0 to 100",
        ],
    ),
    (
        "{blue: 100}",
        "{Blue: 100}",
        &[
            "6:13: /spec/traffic/Blue: `Blue` is not a valid name: use 1 to 32 lower-case letters, digits and dashes, starting with a letter and not ending with a dash",
        ],
    ),
    (
        "{blue: 100}",
        "[100]",
        &["6:3: /spec/traffic: this is a list, but a mapping is expected; write a mapping"],
    ),
    (
        "{blue: 100}",
        "100",
        &[
            "6:3: /spec/traffic: this is the integer `100`, but a mapping is expected; write a mapping",
        ],
    ),
    (
        "{blue: 100}",
        "\"a, expected b\"",
        &[
            "6:3: /spec/traffic: this is the string \"a, expected b\", but a mapping is expected; write a mapping",
        ],
    ),
    (
        "{green: 0}",
        "{green: \"0\"}",
        &[
            "7:12: /spec/mirror/green: this is the string \"0\", but a whole percentage from 0 to 100 is expected; write a whole percentage from 0 to 100",
        ],
    ),
    (
        "{green: 0}",
        "{green: 5}",
        &[
            "7:12: /spec/mirror/green: requests are not copied to other deployments yet: leave `mirror` out, or set the share to 0",
        ],
    ),
    (
        "limits: {requestBytesMax: 1000}",
        "limits: 1",
        &[
            "9:3: /spec/limits: this is the integer `1`, but a mapping of fields is expected; write a mapping of fields",
        ],
    ),
    ("limits: {requestBytesMax: 1000}", "limits: []", &[]),
    (
        "limits: {requestBytesMax: 1000}",
        "limits: [5, 6]",
        &["9:3: /spec/limits: invalid length 2, expected fewer elements in array"],
    ),
    (
        "requestBytesMax: 1000",
        "requestBytesMax: -5",
        &[
            "9:12: /spec/limits/requestBytesMax: this is the integer `-5`, but a whole number that is not negative is expected; write a whole number that is not negative",
        ],
    ),
    (
        "requestBytesMax: 1000",
        "requestBytesMax: 1.5",
        &[
            "9:12: /spec/limits/requestBytesMax: this is the floating point `1.5`, but a whole number that is not negative is expected; write a whole number that is not negative",
        ],
    ),
    (
        "requestBytesMax: 1000",
        "requestBytesMax: 1e300",
        &[
            "9:12: /spec/limits/requestBytesMax: this is the floating point `1e+300`, but a whole number that is not negative is expected; write a whole number that is not negative",
        ],
    ),
    (
        "requestBytesMax: 1000",
        "limits: 1000",
        &[
            "9:12: /spec/limits/limits: `limits` is not a field here; remove it, or use one of: requestBytesMax",
        ],
    ),
    (
        "name: iris",
        "name: 5",
        &["3:12: /metadata/name: this is the integer `5`, but text is expected; put it in quotes"],
    ),
    (
        "name: iris",
        "name: Iris",
        &[
            "3:12: /metadata/name: `Iris` is not a valid name: use 1 to 32 lower-case letters, digits and dashes, starting with a letter and not ending with a dash",
        ],
    ),
    (
        "name: iris, ",
        "",
        &["3:1: /metadata/name: `name` is missing; add it"],
    ),
    (
        "name: iris",
        "name: iris, endpoint: a",
        &[
            "3:24: /metadata/endpoint: `endpoint` is not a field here; remove it, or use one of: name, labels",
        ],
    ),
    (
        "name: iris",
        "name: \"a\\\"b\"",
        &[
            "3:12: /metadata/name: `a\"b` is not a valid name: use 1 to 32 lower-case letters, digits and dashes, starting with a letter and not ending with a dash",
        ],
    ),
    (
        "{name: iris, labels: {team: vision}}",
        "iris",
        &[
            "3:1: /metadata: this is the string \"iris\", but a mapping of fields is expected; write a mapping of fields",
        ],
    ),
    (
        "{name: iris, labels: {team: vision}}",
        "",
        &[
            "3:1: /metadata: this is empty, but a mapping of fields is expected; fill it in or remove the field",
        ],
    ),
    (
        "team: vision",
        "team: 1",
        &[
            "3:33: /metadata/labels/team: this is the integer `1`, but text is expected; put it in quotes",
        ],
    ),
    (
        "{team: vision}",
        "vision",
        &[
            "3:24: /metadata/labels: this is the string \"vision\", but a mapping is expected; write a mapping",
        ],
    ),
    (
        "{team: vision}",
        "",
        &[
            "3:24: /metadata/labels: this is empty, but a mapping is expected; fill it in or remove the field",
        ],
    ),
];

const DEPLOYMENT_CASES: &[Case] = &[
    (
        "backend: simulated",
        "backend: simulate",
        &["5:3: /spec/backend: `simulate` is not a known backend; use one of: process, simulated"],
    ),
    (
        "backend: simulated",
        "backend: container",
        &[
            "5:3: /spec/backend: the container backend is not available yet; use `process` or `simulated`",
            "9:3: /spec/simulated: `simulated` belongs to the simulated backend; remove it, or set `backend: simulated`",
        ],
    ),
    (
        "backend: simulated",
        "backend: kubernetes",
        &[
            "5:3: /spec/backend: the kubernetes backend is not available yet; use `process` or `simulated`",
            "9:3: /spec/simulated: `simulated` belongs to the simulated backend; remove it, or set `backend: simulated`",
        ],
    ),
    (
        "backend: simulated",
        "backend: cloud",
        &[
            "5:3: /spec/backend: `cloud` is not a known backend; use one of: process, simulated",
            "9:3: /spec/simulated: `simulated` belongs to the simulated backend; remove it, or set `backend: simulated`",
        ],
    ),
    (
        "  backend: simulated\n",
        "",
        &["4:1: /spec/backend: `backend` is missing; add it"],
    ),
    (
        "backend: simulated",
        "backend: simulated\n  image: a",
        &[
            "6:3: /spec/image: `image` is not available yet; give a `command` for the process backend",
        ],
    ),
    (
        "backend: simulated",
        "backend: simulated\n  model: {a: 1}",
        &[
            "6:3: /spec/model: `model` is not available yet; give a `command` for the process backend",
        ],
    ),
    (
        "backend: simulated",
        "backend: simulated\n  code: a",
        &["6:3: /spec/code: `code` is not available yet; give a `command` for the process backend"],
    ),
    (
        "backend: simulated",
        "backend: simulated\n  environment: a",
        &["6:3: /spec/environment: `environment` is not available yet; give a `command` and `env`"],
    ),
    (
        "backend: simulated",
        "backend: simulated\n  purchase: spott",
        &[
            "6:3: /spec/purchase: `spott` is not a valid value; use one of: on-demand, spot, reserved, savings-plan",
        ],
    ),
    (
        "backend: simulated",
        "backend: simulated\n  command: ./a",
        &["6:3: /spec/command: this is the string \"./a\", but a list is expected; write a list"],
    ),
    (
        "backend: simulated",
        "backend: simulated\n  command: {a: b}",
        &["6:3: /spec/command: this is a mapping, but a list is expected; write a list"],
    ),
    (
        "backend: simulated",
        "backend: simulated\n  command: [1, [a], ~]",
        &[
            "6:13: /spec/command/0: this is the integer `1`, but text is expected; put it in quotes",
            "6:16: /spec/command/1: this is a list, but text is expected; write text",
            "6:21: /spec/command/2: this is empty, but text is expected; fill it in or remove the field",
        ],
    ),
    (
        "backend: simulated",
        "backend: simulated\n  region: [eu]",
        &["6:3: /spec/region: this is a list, but text is expected; write text"],
    ),
    (
        "LEVEL: \"2\"",
        "LEVEL: 2",
        &[
            "7:9: /spec/env/LEVEL: this is the integer `2`, but text in quotes, or a mapping with secretRef is expected; write text in quotes, or a mapping with secretRef",
        ],
    ),
    (
        "LEVEL: \"2\"",
        "LEVEL: ",
        &[
            "7:9: /spec/env/LEVEL: this is empty, but text in quotes, or a mapping with secretRef is expected; fill it in or remove the field",
        ],
    ),
    (
        "LEVEL: \"2\"",
        "LEVEL: [a]",
        &[
            "7:9: /spec/env/LEVEL: this is a list, but text in quotes, or a mapping with secretRef is expected; write text in quotes, or a mapping with secretRef",
        ],
    ),
    (
        "LEVEL: \"2\"",
        "LEVEL: {}",
        &["7:9: /spec/env/LEVEL/secretRef: `secretRef` is missing; add it"],
    ),
    (
        "LEVEL: \"2\"",
        "LEVEL: {secretRef: 1}",
        &[
            "7:17: /spec/env/LEVEL/secretRef: this is the integer `1`, but text is expected; put it in quotes",
        ],
    ),
    (
        "LEVEL: \"2\"",
        "LEVEL: {secret: env:A}",
        &[
            "7:9: /spec/env/LEVEL/secretRef: `secretRef` is missing; add it",
            "7:17: /spec/env/LEVEL/secret: `secret` is not a field here; remove it, or use one of: secretRef",
        ],
    ),
    (
        "LEVEL: \"2\"",
        "LEVEL: {secretRef: env:A, b: 1}",
        &["7:35: /spec/env/LEVEL/b: `b` is not a field here; remove it, or use one of: secretRef"],
    ),
    (
        "instances: 1",
        "instances: 1.0",
        &[
            "8:3: /spec/instances: this is the floating point `1.0`, but a whole number that is not negative is expected; write a whole number that is not negative",
        ],
    ),
    (
        "instances: 1",
        "instances: 5000000000",
        &[
            "8:3: /spec/instances: this is the integer `5000000000`, but a whole number that is not negative is expected; write a whole number that is not negative",
        ],
    ),
    (
        "instances: 1",
        "instances: \"1\"",
        &[
            "8:3: /spec/instances: this is the string \"1\", but a whole number that is not negative is expected; write a whole number that is not negative",
        ],
    ),
    (
        "seed: 1",
        "seed: -1",
        &[
            "9:15: /spec/simulated/seed: this is the integer `-1`, but a whole number that is not negative is expected; write a whole number that is not negative",
        ],
    ),
    (
        "seed: 1",
        "sed: 1",
        &["9:15: /spec/simulated/sed: `sed` is not a field here; did you mean `seed`?"],
    ),
    (
        "{timeout: 5s}",
        "{timeout: 5}",
        &[
            "10:21: /spec/requestSettings/timeout: this is the integer `5`, but text is expected; put it in quotes",
        ],
    ),
    (
        "{timeout: 5s}",
        "{timeout: soon}",
        &[
            "10:21: /spec/requestSettings/timeout: `soon` is not a duration: write a whole number and a unit, such as 500ms, 30s, 5m, 1h or 7d",
        ],
    ),
    (
        "{timeout: 5s}",
        "{timeout: ~}",
        &[
            "10:21: /spec/requestSettings/timeout: this is empty, but text is expected; fill it in or remove the field",
        ],
    ),
    (
        "{timeout: 5s}",
        "{timeout: 5s, maxDuration: 2s}",
        &[
            "10:34: /spec/requestSettings/maxDuration: 2s is less than `timeout`, 5s, within which the response has only to begin; use 5s or more",
        ],
    ),
    (
        "{timeout: 5s}",
        "{streamIdleTimeout: 0s, maxDuration: 2d}",
        &[
            "10:21: /spec/requestSettings/streamIdleTimeout: a stream needs time from one byte to the next; use 1ms or more",
            "10:44: /spec/requestSettings/maxDuration: 2d is too long; use at most 1d",
        ],
    ),
    (
        "instances: 1",
        "routes: {scoring: invocations, prefix: /v1?x, countedMethods: [get]}",
        &[
            "8:12: /spec/routes/scoring: `invocations` is not a path; start it with `/` and use no spaces, `?` or `#`, such as /invocations",
            "8:34: /spec/routes/prefix: `/v1?x` is not a path; start it with `/` and use no spaces, `?` or `#`, such as /invocations",
            "8:66: /spec/routes/countedMethods/0: `get` is not a valid value; use one of: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE",
        ],
    ),
    (
        "instances: 1",
        "routes: {scoring: /a/%2E./b, prefix: /50%}",
        &[
            "8:12: /spec/routes/scoring: `/a/%2E./b` has a segment `.` or `..`; write the path that it leads to",
            "8:32: /spec/routes/prefix: `/50%` has a `%` without two hexadecimal digits; write %25 for the character itself",
        ],
    ),
    (
        "instances: 1",
        "routes: {scorings: /a}",
        &["8:12: /spec/routes/scorings: `scorings` is not a field here; did you mean `scoring`?"],
    ),
    (
        "instances: 1",
        "errorMapping: openai",
        &["8:3: /spec/errorMapping: `openai` is not a valid value; use one of: azure, pass"],
    ),
    (
        "instances: 1",
        "readinessProbe: {protocol: udp}",
        &[
            "8:20: /spec/readinessProbe/protocol: `udp` is not a valid value; use one of: http, tcp, grpc",
        ],
    ),
    (
        "instances: 1",
        "readinessProbe: {protocol: tcp, path: /health, service: iris}",
        &[
            "8:35: /spec/readinessProbe/path: only an http probe has a path; remove it, or remove `protocol`",
            "8:50: /spec/readinessProbe/service: only a grpc probe has a service; remove it, or use `protocol: grpc`",
        ],
    ),
    (
        "instances: 1",
        "startupTimeout: 10s\n  readinessProbe: {initialDelay: 10s}",
        &[
            "8:3: /spec/startupTimeout: 10s is over before the first readiness probe, after 10s; use more",
        ],
    ),
    (
        "instances: 1",
        "startupTimeout: 500ms",
        &["8:3: /spec/startupTimeout: a start needs time; use 1s or more"],
    ),
    (
        "instances: 1",
        "terminationGrace: 500ms",
        &["8:3: /spec/terminationGrace: a server needs time to end; use 1s or more"],
    ),
    (
        "instances: 1",
        "terminationGrace: 2h",
        &["8:3: /spec/terminationGrace: 2h is too long; use at most 1h"],
    ),
    (
        "simulated\n  instanceType: cpu-small\n  env: {LEVEL: \"2\"}\n  instances: 1\n  simulated: {seed: 1}",
        "process\n  instanceType: cpu-small\n  command: [./serve, \"{port}\", \"{port:a}\", \"{port:GRPC}\"]\n  env: {A: \"{port:b c}\"}",
        &[
            "7:44: /spec/command/3: `{port:GRPC}` does not name a port; use up to 16 lowercase letters, digits and dashes, starting with a letter, such as {port:grpc}",
            "8:9: /spec/env/A: `{port:b c}` does not name a port; use up to 16 lowercase letters, digits and dashes, starting with a letter, such as {port:grpc}",
        ],
    ),
    (
        "simulated\n  instanceType: cpu-small\n  env: {LEVEL: \"2\"}\n  instances: 1\n  simulated: {seed: 1}",
        "process\n  instanceType: cpu-small\n  command: [./serve, \"{port}{port:a}{port:b}{port:c}{port:d}{port:e}{port:f}{port:g}{port:h}{port:i}\"]",
        &["7:3: /spec/command: 9 further ports are too many; keep at most 8"],
    ),
    (
        "instances: 1",
        "drainTimeout: 2d",
        &["8:3: /spec/drainTimeout: 2d is too long; use at most 1d"],
    ),
    (
        "{timeout: 5s}",
        "5s",
        &[
            "10:3: /spec/requestSettings: this is the string \"5s\", but a mapping of fields is expected; write a mapping of fields",
        ],
    ),
];

const AUTOSCALE_CASES: &[Case] = &[
    (
        "{endpoint: iris, deployment: blue}",
        "iris/blue",
        &[
            "4:3: /spec/target: this is the string \"iris/blue\", but a mapping of fields is expected; write a mapping of fields",
        ],
    ),
    (
        "{endpoint: iris, deployment: blue}",
        "[iris]",
        &["4:3: /spec/target: invalid length 1, expected struct DeploymentRef with 2 elements"],
    ),
    (
        "{endpoint: iris, deployment: blue}",
        "[iris, Blue]",
        &[
            "4:18: /spec/target/1: `Blue` is not a valid name: use 1 to 32 lower-case letters, digits and dashes, starting with a letter and not ending with a dash",
        ],
    ),
    (
        "{endpoint: iris, deployment: blue}",
        "[]",
        &["4:3: /spec/target: invalid length 0, expected struct DeploymentRef with 2 elements"],
    ),
    (
        "priority: 1",
        "priority: high",
        &[
            "8:5: /spec/profiles/0/priority: this is the string \"high\", but a whole number is expected; write a whole number",
        ],
    ),
    (
        "priority: 1",
        "priority: 3000000000",
        &[
            "8:5: /spec/profiles/0/priority: this is the integer `3000000000`, but a whole number is expected; write a whole number",
        ],
    ),
    (
        "perInstance: true",
        "perInstance: yes",
        &[
            "12:48: /spec/profiles/0/rules/0/metric/perInstance: this is the string \"yes\", but true or false is expected; write true or false",
        ],
    ),
    (
        "perInstance: true",
        "perInstance: 1",
        &[
            "12:48: /spec/profiles/0/rules/0/metric/perInstance: this is the integer `1`, but true or false is expected; write true or false",
        ],
    ),
    (
        "mode: live",
        "mode: alive",
        &["5:3: /spec/mode: `alive` is not a valid value; use one of: live, shadow, paused"],
    ),
    (
        "mode: live",
        "mode: off",
        &["5:3: /spec/mode: `off` is not a valid value; use one of: live, shadow, paused"],
    ),
    (
        "by: 1",
        "by: true",
        &[
            "14:31: /spec/profiles/0/rules/0/scale/by: this must be a number, or text such as \"50%\"; write one of the two",
        ],
    ),
    ("by: 1", "by: ", &[]),
    (
        "by: 1",
        "by: [1]",
        &[
            "14:31: /spec/profiles/0/rules/0/scale/by: this must be a number, or text such as \"50%\"; write one of the two",
        ],
    ),
    (
        "by: 1",
        "by: {a: 1}",
        &[
            "14:31: /spec/profiles/0/rules/0/scale/by: this must be a number, or text such as \"50%\"; write one of the two",
        ],
    ),
    (
        "by: 1",
        "steps: [{above: 1, by: {}}, {by: []}, {above: true, by: 1}, {}]",
        &[
            "14:50: /spec/profiles/0/rules/0/scale/steps/0/by: this must be a number, or text such as \"50%\"; write one of the two",
            "14:60: /spec/profiles/0/rules/0/scale/steps/1/by: this must be a number, or text such as \"50%\"; write one of the two",
            "14:70: /spec/profiles/0/rules/0/scale/steps/2/above: this must be a number, or text such as \"50%\"; write one of the two",
            "14:91: /spec/profiles/0/rules/0/scale/steps/3/by: `by` is missing; add it",
        ],
    ),
    (
        "by: 1",
        "steps: {above: 1}",
        &[
            "14:31: /spec/profiles/0/rules/0/scale/steps: this is a mapping, but a list is expected; write a list",
        ],
    ),
    (
        "direction: out",
        "direction: up",
        &[
            "14:15: /spec/profiles/0/rules/0/scale/direction: `up` is not a valid value; use one of: out, in",
        ],
    ),
    (
        "{min: 1, max: 5, default: 2}",
        "{}",
        &[
            "9:5: /spec/profiles/0/capacity/min: `min` is missing; add it",
            "9:5: /spec/profiles/0/capacity/max: `max` is missing; add it",
            "9:5: /spec/profiles/0/capacity/default: `default` is missing; add it",
        ],
    ),
    (
        "{min: 1, max: 5, default: 2}",
        "[1, 5]",
        &[
            "9:5: /spec/profiles/0/capacity: invalid length 2, expected struct Capacity with 3 elements",
        ],
    ),
    (
        "{min: 1, max: 5, default: 2}",
        "[1, 5, 2, 3]",
        &["9:5: /spec/profiles/0/capacity: invalid length 4, expected fewer elements in array"],
    ),
    (
        "window: 30s",
        "window: 30",
        &[
            "12:35: /spec/profiles/0/rules/0/metric/window: this is the integer `30`, but text is expected; put it in quotes",
        ],
    ),
    (
        "window: 30s",
        "window: -30s",
        &[
            "12:35: /spec/profiles/0/rules/0/metric/window: `-30s` is not a duration: write a whole number and a unit, such as 500ms, 30s, 5m, 1h or 7d",
        ],
    ),
    (
        "window: 30s",
        "window: 99999999999999999999d",
        &[
            "12:35: /spec/profiles/0/rules/0/metric/window: `99999999999999999999d` is not a duration: write a whole number and a unit, such as 500ms, 30s, 5m, 1h or 7d",
        ],
    ),
];

#[test]
fn each_fault_has_its_message() {
    let mut wrong = Vec::new();
    for (base, cases) in [
        (ENDPOINT, ENDPOINT_CASES),
        (DEPLOYMENT, DEPLOYMENT_CASES),
        (AUTOSCALE, AUTOSCALE_CASES),
    ] {
        for (part, replacement, expected) in cases {
            assert!(base.contains(part), "`{part}` is not in the document");
            let (_, faults) = read(&base.replacen(part, replacement, 1));
            let found: Vec<String> = faults.iter().map(ToString::to_string).collect();
            if found != *expected {
                wrong.push(format!("({part:?}, {replacement:?}, &{found:?}),"));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "unexpected messages:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn a_duplicate_key_in_json_that_yaml_reads_differently_is_named_in_full() {
    let text = r#"{"x": "\ud83d\ude00", "a at line b": 1, "a at line b": 2}"#;
    let (_, faults) = read(text);
    let found: Vec<&str> = faults.iter().map(|f| f.finding.detail.as_str()).collect();
    assert_eq!(found, ["`a at line b` is given twice; keep one of the two"]);
}

#[test]
fn json_and_yaml_have_the_same_depth_limit() {
    let nested =
        |levels: usize| format!("{{\"a\": {}1{}}}", "[".repeat(levels), "]".repeat(levels));
    let too_deep = |levels| {
        let (_, faults) = read_trees(&nested(levels));
        faults
            .iter()
            .any(|fault| fault.detail.contains("levels deep"))
    };
    assert!(!too_deep(DEPTH_MAX - 1));
    assert!(too_deep(DEPTH_MAX));
}
