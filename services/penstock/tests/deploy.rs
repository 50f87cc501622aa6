//! Checks `deploy/` against the binary and the repository: unknown settings of `serve`, missing mounted
//! files, plain-text secrets and publicly bound ports.
#![allow(clippy::unwrap_used, reason = "all of it is test code")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use saphyr::{LoadableYamlNode, Scalar, Yaml};
use serde_json::{Map, Value};

/// Variables that are not flags of `serve`, with the file that reads them.
const OTHER_VARIABLES: [(&str, &str); 7] = [
    ("PENSTOCK_LOG", "libs/runtime/src/telemetry.rs"),
    ("PENSTOCK_CONFIG", "clients/cli/src/client/config.rs"),
    ("PENSTOCK_SERVER", "clients/cli/src/client/config.rs"),
    ("PENSTOCK_TOKEN", "clients/cli/src/client/config.rs"),
    ("PENSTOCK_UID", "deploy/container/Dockerfile"),
    ("PENSTOCK_GID", "deploy/container/Dockerfile"),
    ("PENSTOCK_HOST", "libs/backends/src/process/launch.rs"),
];

/// The default admin port of the image.
const ADMIN_PORT: &str = "7071";
const CONTROL_PORT: &str = "7070";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn text(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The parsed help of `serve`.
struct Help {
    text: String,
    /// Flags, with their variables if they have one.
    flags: BTreeMap<String, Option<String>>,
}

fn help() -> &'static Help {
    static HELP: OnceLock<Help> = OnceLock::new();
    HELP.get_or_init(|| {
        let output = Command::new(env!("CARGO_BIN_EXE_penstock"))
            .args(["serve", "--help"])
            .env_clear()
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let (_, options) = text.split_once("\nOptions:\n").unwrap();
        let (options, _) = options.split_once("\nConnection:\n").unwrap();
        let of_flags = options.split("\n      --").map(|option| {
            // Lines wrap, even inside `[env: NAME=]`.
            let words: Vec<&str> = option.split_whitespace().collect();
            let flag = format!("--{}", words[0].trim_start_matches("--"));
            let variable = words.iter().skip_while(|word| **word != "[env:").nth(1);
            (
                flag,
                variable.map(|name| name.trim_end_matches(['=', ']']).to_owned()),
            )
        });
        Help {
            flags: of_flags.collect(),
            text: text.split_whitespace().collect::<Vec<_>>().join(" "),
        }
    })
}

/// The services of the binary.
fn services() -> BTreeSet<&'static str> {
    let (_, named) = help().text.split_once("or some of ").unwrap();
    let (named, _) = named.split_once(" [").unwrap();
    named.split(' ').collect()
}

/// All files for operators, without the examples.
fn deploy_files() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root().join("deploy")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let shown = path.strip_prefix(root()).unwrap().display().to_string();
            // Skip secrets of this machine.
            if shown.starts_with("deploy/examples") || shown.starts_with("deploy/secrets") {
                continue;
            }
            match path.is_dir() {
                true => folders.push(path),
                false => drop(found.insert(shown, fs::read_to_string(&path).unwrap())),
            }
        }
    }
    found
}

fn variables(text: &str) -> BTreeSet<&str> {
    let of_name = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    text.split(|c: char| !of_name(c))
        .filter(|word| word.starts_with("PENSTOCK_") && *word != "PENSTOCK_")
        .collect()
}

/// YAML as a tree, with `<<` merged.
fn tree(yaml: &Yaml) -> Value {
    match yaml {
        Yaml::Sequence(items) => items.iter().map(tree).collect(),
        Yaml::Mapping(entries) => {
            let entries = entries.iter();
            let entries = entries.map(|(key, value)| (key.as_str().unwrap(), tree(value)));
            let (merged, own): (Vec<_>, Vec<_>) = entries.partition(|(key, _)| *key == "<<");
            let mut all = Map::new();
            for (_, value) in merged {
                all.extend(value.as_object().unwrap().clone());
            }
            all.extend(own.into_iter().map(|(key, value)| (key.to_owned(), value)));
            Value::Object(all)
        }
        Yaml::Value(Scalar::String(text)) => Value::String(text.to_string()),
        Yaml::Value(Scalar::Integer(number)) => (*number).into(),
        Yaml::Value(Scalar::Boolean(flag)) => (*flag).into(),
        Yaml::Value(Scalar::Null) => Value::Null,
        other => panic!("deploy/compose.yaml holds something unexpected: {other:?}"),
    }
}

fn compose() -> &'static Value {
    static COMPOSE: OnceLock<Value> = OnceLock::new();
    COMPOSE.get_or_init(|| {
        let text = text("deploy/compose.yaml");
        tree(&Yaml::load_from_str(&text).unwrap()[0])
    })
}

fn containers() -> impl Iterator<Item = (&'static str, &'static Value)> {
    let services = compose()["services"].as_object().unwrap().iter();
    services.map(|(name, service)| (name.as_str(), service))
}

fn strings(list: &Value) -> Vec<&str> {
    let items = list.as_array().into_iter().flatten();
    items.map(|item| item.as_str().unwrap()).collect()
}

/// The containers that run Penstock, with their services.
fn processes() -> BTreeMap<&'static str, (&'static str, &'static Value)> {
    let with_services = containers().filter_map(|(name, container)| {
        let services = container["environment"]["PENSTOCK_SERVICES"].as_str()?;
        Some((name, (services, container)))
    });
    with_services.collect()
}

#[test]
fn every_variable_in_use_is_one_that_something_reads() {
    let known: BTreeSet<&str> = help()
        .flags
        .values()
        .flatten()
        .map(String::as_str)
        .collect();
    assert!(
        known.len() > 10,
        "serve --help was not understood: {known:?}"
    );
    for (name, reader) in OTHER_VARIABLES {
        assert!(text(reader).contains(name), "{reader} does not read {name}");
    }
    let mut unknown = Vec::new();
    for (file, text) in deploy_files() {
        let others = OTHER_VARIABLES.map(|(name, _)| name);
        let of_file = variables(&text).into_iter();
        let of_file = of_file.filter(|name| !known.contains(name) && !others.contains(name));
        unknown.extend(of_file.map(|name| format!("{file}: {name}")));
    }
    assert_eq!(unknown, Vec::<String>::new(), "nothing reads these");
}

#[test]
fn every_flag_of_serve_is_in_the_operators_table_with_its_variable() {
    let readme = text("deploy/README.md");
    let rows: Vec<&str> = readme
        .lines()
        .filter(|line| line.starts_with("| `--"))
        .collect();
    let mut missing = Vec::new();
    for (flag, variable) in &help().flags {
        let variable = variable.as_deref().map(|name| format!("`{name}`"));
        let row = rows
            .iter()
            .find(|row| row.starts_with(&format!("| `{flag}`")));
        if row.is_none_or(|row| !row.contains(variable.as_deref().unwrap_or("–"))) {
            missing.push(format!("{flag} {}", variable.unwrap_or_default()));
        }
    }
    assert_eq!(missing, Vec::<String>::new(), "deploy/README.md, settings");
    for row in rows {
        let flag = row.split('`').nth(1).unwrap();
        assert!(help().flags.contains_key(flag), "serve has no {flag}");
    }
}

#[test]
fn compose_runs_every_service_and_two_gateways() {
    let processes = processes();
    let run: BTreeSet<&str> = processes
        .values()
        .flat_map(|(services, _)| services.split(','))
        .collect();
    assert_eq!(run, services());
    let gateways = processes
        .values()
        .filter(|(services, _)| *services == "gateway");
    assert_eq!(gateways.count(), 2);
}

#[test]
fn a_gateway_is_not_given_the_store() {
    for (name, (services, container)) in processes() {
        let environment = container["environment"].as_object().unwrap();
        let secrets = strings(&container["secrets"]);
        let has_store = environment.contains_key("PENSTOCK_STORE");
        assert_eq!(has_store, services != "gateway", "{name}");
        assert_eq!(secrets.contains(&"pgpass"), has_store, "{name}");
        assert_eq!(
            secrets.contains(&"seal-key"),
            services == "control",
            "{name}"
        );
        assert!(secrets.contains(&"internal-token"), "{name}");
    }
}

#[test]
fn prometheus_scrapes_every_process() {
    let prometheus = text("deploy/prometheus/prometheus.yml");
    for (name, (services, container)) in processes() {
        let network = container["network_mode"]
            .as_str()
            .and_then(|mode| mode.strip_prefix("service:"));
        let own = container["environment"]["PENSTOCK_ADMIN_ADDR"].as_str();
        let port = match services {
            "control" => CONTROL_PORT,
            _ => own.map_or(ADMIN_PORT, |address| address.rsplit_once(':').unwrap().1),
        };
        let target = format!("\"{}:{port}\"", network.unwrap_or(name));
        assert!(
            prometheus.contains(&target),
            "{name} is no target: {target}"
        );
    }
    let dockerfile = text("deploy/container/Dockerfile");
    assert!(dockerfile.contains(&format!("PENSTOCK_ADMIN_ADDR=0.0.0.0:{ADMIN_PORT}")));
    assert!(dockerfile.contains(&format!("PENSTOCK_CONTROL_ADDR=0.0.0.0:{CONTROL_PORT}")));
}

#[test]
fn every_file_that_is_mounted_or_copied_exists() {
    let mut missing = Vec::new();
    for (name, container) in containers() {
        for volume in strings(&container["volumes"]) {
            let source = volume.split(':').next().unwrap();
            let exists = match source.starts_with('.') {
                // Created by the script, which has its own test.
                true if source.starts_with("./secrets/") => true,
                true => root().join("deploy").join(source).exists(),
                false => compose()["volumes"]
                    .as_object()
                    .unwrap()
                    .contains_key(source),
            };
            if !exists {
                missing.push(format!("{name}: {source}"));
            }
        }
        for secret in strings(&container["secrets"]) {
            if compose()["secrets"][secret].is_null() {
                missing.push(format!("{name}: secret {secret}"));
            }
        }
    }
    let dockerfile = text("deploy/container/Dockerfile");
    let copies = dockerfile
        .lines()
        .filter(|line| line.starts_with("COPY ") && !line.contains("--from"));
    for copy in copies {
        let source = copy
            .split(' ')
            .find(|word| !word.starts_with("--") && *word != "COPY")
            .unwrap();
        if !root().join(source).exists() {
            missing.push(format!("Dockerfile: {source}"));
        }
    }
    assert_eq!(missing, Vec::<String>::new());
}

#[test]
fn images_are_pinned_by_version() {
    let images = containers().map(|(_, container)| container["image"].as_str().unwrap().to_owned());
    let dockerfile = text("deploy/container/Dockerfile");
    let stages: BTreeSet<&str> = dockerfile
        .lines()
        .filter_map(|line| line.split(" AS ").nth(1))
        .collect();
    let bases = dockerfile
        .lines()
        .filter_map(|line| line.strip_prefix("FROM "));
    let bases = bases.map(|base| base.split(' ').next().unwrap().to_owned());
    for image in images.chain(bases.filter(|base| !stages.contains(base.as_str()))) {
        let tag = image.split_once(':').map_or("", |(_, tag)| tag);
        let version = tag.trim_start_matches('v');
        assert!(version.starts_with(|c: char| c.is_ascii_digit()), "{image}");
    }
}

#[test]
fn containers_of_penstock_have_the_version_of_the_binary() {
    let version = env!("CARGO_PKG_VERSION");
    for (name, (_, container)) in processes() {
        let image = container["image"].as_str().unwrap();
        assert!(image.ends_with(&format!(":{version}")), "{name}: {image}");
    }
}

#[test]
fn no_secret_is_in_plain_text() {
    let secret = |name: &str| {
        ["PASSWORD", "TOKEN", "SECRET", "SEAL_KEY"]
            .iter()
            .any(|word| name.contains(word))
    };
    for (name, container) in containers() {
        let environment = container["environment"].as_object();
        for (variable, value) in environment.into_iter().flatten() {
            let value = value.as_str().unwrap();
            let is_reference = value.starts_with("file:/run/secrets/")
                || (variable.ends_with("_FILE") && value.starts_with("/run/secrets/"));
            assert!(!secret(variable) || is_reference, "{name}: {variable}");
        }
    }
    for (file, text) in deploy_files() {
        for line in text.lines() {
            let user = line
                .split("://")
                .nth(1)
                .and_then(|rest| rest.split_once('@'));
            let has_password =
                user.is_some_and(|(user, _)| user.contains(':') && !user.contains(['/', ' ']));
            assert!(!has_password, "{file}: a password in a URL: {line}");
            let (variable, value) = line
                .trim_start_matches('#')
                .split_once('=')
                .unwrap_or_default();
            let is_variable = variables(variable).contains(variable);
            let in_clear = is_variable && secret(variable) && !value.starts_with("file:");
            // In the manual, only placeholders such as `$TOKEN` are allowed.
            assert!(!in_clear || value.starts_with('$'), "{file}: {line}");
        }
    }
}

#[test]
fn ports_are_published_on_loopback_only() {
    let mut published = 0;
    for (name, container) in containers() {
        for port in strings(&container["ports"]) {
            assert!(port.starts_with("127.0.0.1:"), "{name}: {port}");
            published += 1;
        }
        assert_ne!(container["network_mode"], "host", "{name}");
    }
    assert!(published > 3);
}

#[test]
fn containers_of_penstock_run_unprivileged_on_a_read_only_file_system() {
    for (name, (_, container)) in processes() {
        assert_eq!(container["read_only"], true, "{name}");
        assert_eq!(strings(&container["cap_drop"]), ["ALL"], "{name}");
        // An init must reap orphaned children of model servers.
        assert_eq!(container["init"], true, "{name}");
        assert!(
            container["user"].is_null() && container["privileged"].is_null(),
            "{name}"
        );
    }
    assert!(text("deploy/container/Dockerfile").contains("\nUSER penstock\n"));
}

#[test]
fn units_use_only_folders_that_systemd_creates() {
    for unit in ["penstock.service", "penstock@.service"] {
        let text = text(&format!("deploy/systemd/{unit}"));
        let value = |name: &str| {
            let mut lines = text.lines();
            let found = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            found.unwrap_or_else(|| panic!("{unit}: {name}"))
        };
        let state = format!("/var/lib/{}", value("StateDirectory"));
        let cache = format!("/var/cache/{}", value("CacheDirectory"));
        assert_eq!(value("WorkingDirectory"), state, "{unit}");
        assert!(
            value("Environment").contains(&format!("PENSTOCK_DATA={state}")),
            "{unit}"
        );
        assert!(
            value("Environment").ends_with(&format!("TMPDIR={cache}")),
            "{unit}"
        );
        // Instances must outlive the actuator.
        assert_eq!(value("KillMode"), "process", "{unit}");
        assert_eq!(
            value("ExecStart"),
            "/usr/local/bin/penstock serve",
            "{unit}"
        );
    }
}

#[test]
fn secrets_are_created_once_and_only_for_their_owner() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("compose-secrets.sh");
    fs::copy(root().join("deploy/compose-secrets.sh"), &script).unwrap();
    let run = || Command::new("bash").arg(&script).output().unwrap();
    let first = run();
    assert!(
        first.status.success(),
        "{}",
        String::from_utf8_lossy(&first.stderr)
    );

    let made = folder.path().join("secrets");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&made), 0o700);
    for secret in ["internal-token", "seal-key", "pgpass", "postgres-password"] {
        assert_eq!(mode(&made.join(secret)), 0o600, "{secret}");
    }
    let named = compose()["secrets"].as_object().unwrap();
    for (name, secret) in named {
        let path = folder.path().join(secret["file"].as_str().unwrap());
        let text = fs::read_to_string(path).unwrap();
        let secret = text.trim_end().rsplit(':').next().unwrap();
        assert!(
            secret.len() == 64 && secret.bytes().all(|b| b.is_ascii_hexdigit()),
            "{name}"
        );
    }
    let token = |path: &str| fs::read_to_string(made.join(path)).unwrap();
    assert_eq!(token("internal-token"), token("prometheus/internal-token"));
    assert_ne!(token("internal-token"), token("seal-key"));
    assert!(token("pgpass").contains(&token("postgres-password")));

    let before = token("seal-key");
    let second = run();
    assert!(!second.status.success());
    assert_eq!(token("seal-key"), before);
}
