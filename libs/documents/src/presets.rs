//! Presets: what `server` sets in a Deployment that the document leaves out.
//!
//! Owns the table, how it is merged into a document, and how a known server is recognized by its command.
//! Invariants: what a document says wins. The result is an ordinary spec, which stays as it is when
//! it is read again: each value that is set here is written by the type even if it is the default.

use std::borrow::Cow;

use contract::problem::{Finding, escape};
use contract::resources::{DeploymentSpec, Resource, Server};
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// One server.
struct Preset {
    server: Server,
    /// The server's name for people.
    name: &'static str,
    /// How it is started: a program or Python module, and its subcommands.
    commands: &'static [&'static str],
    /// A part of the spec.
    spec: fn() -> Value,
}

/// The servers, one row each. Values are read from the versions named.
const PRESETS: &[Preset] = &[
    Preset {
        server: Server::Generic,
        name: "another server",
        commands: &[],
        spec: || json!({}),
    },
    // MLflow 3.17: the options of `models serve` read the variables; a request takes at most 60 s.
    // Instances report no usage, for which MLflow and BentoML would write into the home folder.
    Preset {
        server: Server::Mlflow,
        name: "MLflow",
        commands: &["mlflow models serve"],
        spec: || {
            json!({
                "routes": {"scoring": "/invocations", "prefix": "/"},
                "readinessProbe": {"path": "/health"},
                "requestSettings": {"timeout": "1m"},
                "env": {
                    "MLFLOW_HOST": "{host}",
                    "MLFLOW_PORT": "{port}",
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                },
            })
        },
    },
    // MLServer 1.7: three ports, two folders in the working directory that instances would share. There is
    // no path for `/score`: the path of an inference contains the model's name.
    Preset {
        server: Server::OpenInference,
        name: "MLServer",
        commands: &["mlserver start"],
        spec: || {
            json!({
                "routes": {"prefix": "/"},
                "protocol": "open-inference",
                "errorMapping": "pass",
                "readinessProbe": {"path": "/v2/health/ready"},
                "livenessProbe": liveness("/v2/health/live"),
                "terminationGrace": "15s",
                "env": {
                    "MLSERVER_HOST": "{host}",
                    "MLSERVER_HTTP_PORT": "{port}",
                    "MLSERVER_GRPC_PORT": "{port:grpc}",
                    "MLSERVER_METRICS_PORT": "{port:metrics}",
                    "MLSERVER_METRICS_DIR": "{folder}/metrics",
                    "MLSERVER_ENVIRONMENTS_DIR": "{folder}/environments",
                },
            })
        },
    },
    // Triton takes its ports as arguments only, and gives requests 30 s to end.
    Preset {
        server: Server::Triton,
        name: "Triton",
        commands: &["tritonserver"],
        spec: || {
            json!({
                "routes": {"prefix": "/"},
                "protocol": "open-inference",
                "errorMapping": "pass",
                "readinessProbe": {"path": "/v2/health/ready"},
                "livenessProbe": liveness("/v2/health/live"),
                "terminationGrace": "35s",
                "startupTimeout": "30m",
            })
        },
    },
    // The health path differs among servers of OpenAI's API; all list their models, once they are loaded.
    Preset {
        server: Server::Openai,
        name: "a server of OpenAI's API",
        commands: &[
            "llama-server",
            "llama_cpp.server",
            "sglang.launch_server",
            "text-generation-launcher",
        ],
        spec: || {
            json!({
                "routes": {"scoring": "/v1/chat/completions", "prefix": "/"},
                "protocol": "openai",
                "errorMapping": "pass",
                "readinessProbe": {"path": "/v1/models"},
                "requestSettings": language_model(32),
                "terminationGrace": "30s",
                "startupTimeout": "30m",
            })
        },
    },
    // vLLM takes its port as an argument: VLLM_PORT and VLLM_HOST_IP are for its own processes. Its caches
    // stay shared: they hold models.
    Preset {
        server: Server::Vllm,
        name: "vLLM",
        commands: &["vllm serve", "vllm.entrypoints.openai.api_server"],
        spec: || {
            json!({
                "routes": {"scoring": "/v1/chat/completions", "prefix": "/"},
                "protocol": "openai",
                "errorMapping": "pass",
                "readinessProbe": {"path": "/health"},
                "livenessProbe": liveness("/health"),
                // It batches up to `--max-num-seqs` requests, 256 or more by default, and queues the rest.
                "requestSettings": language_model(256),
                "terminationGrace": "30s",
                "startupTimeout": "30m",
            })
        },
    },
    // TorchServe 0.12 reads the variables if its configuration file has `enable_envvars_config=true`. It
    // refuses to start beside another with the same TMPDIR, and keeps its workers' sockets in TEMP. With a
    // token for each start, in a file, no client could call it; models cannot be added without
    // `enable_model_api`. `/invocations` serves the model that was named at the start if it is the only one.
    Preset {
        server: Server::Torchserve,
        name: "TorchServe",
        commands: &["torchserve"],
        spec: || {
            json!({
                "routes": {"scoring": "/invocations", "prefix": "/"},
                "readinessProbe": {"path": "/ping"},
                "requestSettings": {"timeout": "2m"},
                "terminationGrace": "30s",
                "env": {
                    "TS_INFERENCE_ADDRESS": "http://{host}:{port}",
                    "TS_MANAGEMENT_ADDRESS": "http://{host}:{port:management}",
                    "TS_METRICS_ADDRESS": "http://{host}:{port:metrics}",
                    "TS_GRPC_INFERENCE_PORT": "{port:grpc}",
                    "TS_GRPC_MANAGEMENT_PORT": "{port:grpc-management}",
                    "TS_DISABLE_TOKEN_AUTHORIZATION": "true",
                    "LOG_LOCATION": "{folder}/logs",
                    "METRICS_LOCATION": "{folder}/logs",
                    "TEMP": "{folder}",
                    "TMPDIR": "{folder}",
                },
            })
        },
    },
    // BentoML 1.4: a path for each method of the service; a request takes at most 60 s. BENTOML_HOME
    // stays shared: it holds the models.
    Preset {
        server: Server::Bentoml,
        name: "BentoML",
        commands: &["bentoml serve"],
        spec: || {
            json!({
                "routes": {"prefix": "/"},
                "readinessProbe": {"path": "/readyz"},
                "requestSettings": {"timeout": "1m"},
                "terminationGrace": "30s",
                "env": {
                    "BENTOML_HOST": "{host}",
                    "BENTOML_PORT": "{port}",
                    "BENTOML_DO_NOT_TRACK": "true",
                },
            })
        },
    },
    // LitServe 0.2: a script of the user starts it and gives it its port, so no command names it. A
    // request waits at most 30 s for its turn. For half a minute after its worker has died it accepts requests
    // that nobody answers. Its processes leave a folder for temporary files behind.
    Preset {
        server: Server::Litserve,
        name: "LitServe",
        commands: &[],
        spec: || {
            json!({
                "routes": {"scoring": "/predict", "prefix": "/"},
                "readinessProbe": {"path": "/health", "failureThreshold": 3},
                "requestSettings": {"timeout": "30s"},
                "env": {"TMPDIR": "{folder}"},
            })
        },
    },
    // azureml-inference-server-http 1.5 takes its port as an argument only, and listens on all addresses. Its
    // gunicorn has a control socket that all instances would share.
    Preset {
        server: Server::Azureml,
        name: "Azure's inference server",
        commands: &["azmlinfsrv", "azureml_inference_server_http"],
        spec: || {
            json!({
                "routes": {"scoring": "/score", "prefix": "/"},
                "readinessProbe": {"path": "/"},
                "env": {"XDG_RUNTIME_DIR": "{folder}"},
            })
        },
    },
];

/// A probe of a path that says that the server lives, whatever its models do. Five minutes without an answer,
/// since a long request may block a server.
fn liveness(path: &str) -> Value {
    json!({"path": path, "period": "10s", "timeout": "5s", "failureThreshold": 30})
}

/// An answer that is not streamed begins when its last token is there: OpenAI's client waits 10 minutes. One
/// that is streamed goes on for longer, token by token.
fn language_model(concurrent_requests: u32) -> Value {
    json!({
        "timeout": "10m",
        "streamIdleTimeout": "1m",
        "maxDuration": "1h",
        "maxConcurrentRequestsPerInstance": concurrent_requests,
    })
}

/// Values that are omitted when nobody says otherwise. One that a document spells out is kept only where it
/// contradicts a preset, so that such documents are stored as those without it.
const OMITTED: [(&str, &str); 2] = [("errorMapping", "azure"), ("protocol", "http")];

/// A document with what its server sets, and where.
pub(crate) struct Resolved<'a> {
    /// The complete document.
    pub(crate) value: Cow<'a, Value>,
    /// The server, and pointers to the values that it set.
    filled: Option<(Server, Vec<String>)>,
}

/// Adds to a document what its server sets and the document leaves out. An empty field is left out. A
/// document that is no Deployment, or names no known server, stays as it is.
pub(crate) fn resolve(document: &Value) -> Resolved<'_> {
    let unchanged = Resolved {
        value: Cow::Borrowed(document),
        filled: None,
    };
    let is_deployment = document.get("kind").and_then(Value::as_str) == Some("Deployment");
    if !is_deployment || !document.get("spec").is_some_and(Value::is_object) {
        return unchanged;
    }
    let server = match &document["spec"]["server"] {
        Value::Null => Some(Server::Generic),
        name => Server::deserialize(name).ok(),
    };
    let Some(preset) = server.and_then(preset_of) else {
        return unchanged;
    };
    let mut value = document.clone();
    let mut filled = Vec::new();
    if let (Value::Object(spec), Value::Object(part)) = (&mut value["spec"], (preset.spec)()) {
        for (field, default) in OMITTED {
            let said = spec.get(field).and_then(Value::as_str) == Some(default);
            if said && !part.contains_key(field) {
                spec.remove(field);
            }
        }
        fill(spec, part, SPEC_POINTER, &mut filled);
    }
    Resolved {
        value: Cow::Owned(value),
        filled: Some((preset.server, filled)),
    }
}

const SPEC_POINTER: &str = "/spec";
/// The pointer to a deployment's server.
pub(crate) const SERVER_POINTER: &str = "/spec/server";

fn preset_of(server: Server) -> Option<&'static Preset> {
    PRESETS.iter().find(|preset| preset.server == server)
}

fn fill(
    target: &mut Map<String, Value>,
    part: Map<String, Value>,
    base: &str,
    filled: &mut Vec<String>,
) {
    for (field, value) in part {
        let pointer = format!("{base}/{}", escape(&field));
        match (target.get_mut(&field), value) {
            (None | Some(Value::Null), value) => {
                filled.push(pointer);
                target.insert(field, value);
            }
            // A single path of its own can be all that a deployment serves.
            (Some(Value::Object(said)), Value::Object(mut part)) if field != "routes" => {
                // Only an http probe has a path.
                if said
                    .get("protocol")
                    .is_some_and(|protocol| protocol != "http")
                {
                    part.remove("path");
                }
                fill(said, part, &pointer, filled);
            }
            _ => {}
        }
    }
}

impl Resolved<'_> {
    /// Attributes a finding about a value that the server set to the line that names the server.
    pub(crate) fn attribute(&self, finding: Finding) -> Finding {
        let Some((server, filled)) = &self.filled else {
            return finding;
        };
        let rest = |set: &String| finding.pointer.strip_prefix(set.as_str());
        let is_filled =
            |set| rest(set).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        if !filled.iter().any(is_filled) {
            return finding;
        }
        let field = finding
            .pointer
            .trim_start_matches("/spec/")
            .replace('/', ".");
        let server = server.as_str();
        let detail = format!(
            "`server: {server}` sets `{field}`, which the document can set itself: {}",
            finding.detail
        );
        Finding::new(SERVER_POINTER, detail)
    }
}

/// Returns what is valid in a document and probably not intended: the command of a known server without its
/// preset.
pub fn warnings(resource: &Resource) -> Vec<Finding> {
    let Resource::Deployment(deployment) = resource else {
        return Vec::new();
    };
    let Some(preset) = suggested(&deployment.spec) else {
        return Vec::new();
    };
    let (name, server) = (preset.name, preset.server.as_str());
    let detail = format!(
        "this starts {name}; add `server: {server}` for its paths, probes and settings, or `server: generic` to go without"
    );
    vec![Finding::new("/spec/command", detail)]
}

/// The line that gives a known server its port, if the document lacks it.
pub(crate) fn line_with_port(spec: &DeploymentSpec) -> Option<String> {
    let preset = suggested(spec)?;
    let part = (preset.spec)();
    let gives_port = |value: &Value| value.as_str().is_some_and(|text| text.contains("{port}"));
    let env = part.get("env").and_then(Value::as_object)?;
    let server = preset.server.as_str();
    env.values()
        .any(gives_port)
        .then(|| format!("server: {server}"))
}

/// The preset of the server that the command starts, if the document names none.
fn suggested(spec: &DeploymentSpec) -> Option<&'static Preset> {
    if spec.server.is_some() {
        return None;
    }
    let words: Vec<&str> = spec.command.iter().map(String::as_str).collect();
    recognize(&words, SHELLS_MAX)
}

/// How many shells within shells are looked into.
const SHELLS_MAX: usize = 3;
const SHELLS: [&str; 5] = ["sh", "bash", "dash", "zsh", "ksh"];
/// Programs that start the program that follows, perhaps after options with values.
const LAUNCHERS: [&str; 11] = [
    "exec", "env", "uv", "uvx", "run", "nohup", "nice", "poetry", "pipenv", "conda", "timeout",
];

/// The server that a command starts.
fn recognize(words: &[&str], shells: usize) -> Option<&'static Preset> {
    let is_launcher = |word: &&str| LAUNCHERS.contains(&base_name(word));
    // What follows an option of a launcher may be its value, or the program.
    let starts = match words.iter().any(is_launcher) {
        true => words.len(),
        false => words.len().min(1),
    };
    (0..starts).find_map(|start| recognize_program(&words[start..], shells))
}

/// The server that a command starts first: after launchers, options and assignments, in a shell's text, as a
/// Python module.
fn recognize_program(words: &[&str], shells: usize) -> Option<&'static Preset> {
    let mut words = words.iter().copied();
    let program = words.find(|word| {
        let is_assignment = !word.starts_with('/') && word.contains('=');
        !word.starts_with('-') && !is_assignment && !LAUNCHERS.contains(&base_name(word))
    })?;
    let program = base_name(program);
    if SHELLS.contains(&program) {
        let script = words.find(|word| !word.starts_with('-'))?;
        return in_script(script, shells.checked_sub(1)?);
    }
    let module = match program.starts_with("python") {
        true => words.by_ref().skip_while(|word| *word != "-m").nth(1)?,
        false => program,
    };
    let words: Vec<&str> = [module]
        .into_iter()
        .chain(words.filter(|word| !word.starts_with('-')))
        .collect();
    let starts = |command: &&str| words.starts_with(&command.split(' ').collect::<Vec<_>>());
    let mut presets = PRESETS.iter();
    presets.find(|preset| preset.commands.iter().any(starts))
}

/// Looks into a shell's text, without its quoting: the words of a server's command need none.
fn in_script(script: &str, shells: usize) -> Option<&'static Preset> {
    script.split(['&', ';', '|', '\n']).find_map(|command| {
        let words: Vec<&str> = command
            .split_whitespace()
            .map(|word| word.trim_matches(['"', '\'']))
            .collect();
        recognize(&words, shells)
    })
}

fn base_name(program: &str) -> &str {
    program.rsplit('/').next().unwrap_or(program)
}
