//! Enforces repository rules that the compiler cannot: the direction of imports, purity of crates, the
//! form of manifests and files. Each failure lists every offender and the remedy.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests may panic as tests do; the lint knows only the tests themselves"
)]

mod cycles;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use cargo_metadata::{Metadata, MetadataCommand, Package};

/// The workspace crates that each crate may depend on, including for tests. Services communicate through
/// events only; the gateway has no access to the store, so that it keeps serving when the store is down.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("penstock-contract", &[]),
    // Only crates that read user input link a YAML parser.
    ("penstock-documents", &["penstock-contract"]),
    ("penstock-domain", &["penstock-contract"]),
    ("penstock-store", &["penstock-contract"]),
    ("penstock-bus", &["penstock-contract"]),
    ("penstock-backends", &["penstock-contract"]),
    (
        "penstock-runtime",
        &[
            "penstock-contract",
            "penstock-store",
            "penstock-bus",
            "penstock-backends",
        ],
    ),
    (
        "penstock-gateway",
        &[
            "penstock-contract",
            "penstock-domain",
            "penstock-runtime",
            "penstock-bus",
        ],
    ),
    (
        "penstock-control",
        &[
            "penstock-contract",
            "penstock-documents",
            "penstock-domain",
            "penstock-runtime",
            "penstock-store",
            "penstock-bus",
        ],
    ),
    ("penstock-autoscaler", SERVICE_IMPORTS),
    ("penstock-meter", SERVICE_IMPORTS),
    (
        "penstock-actuator",
        &[
            "penstock-contract",
            "penstock-domain",
            "penstock-runtime",
            "penstock-store",
            "penstock-bus",
            "penstock-backends",
        ],
    ),
    ("penstock-load", &["penstock-contract"]),
    // A client talks to servers through the API only; it checks documents with the engines.
    (
        "penstock-cli",
        &[
            "penstock-contract",
            "penstock-documents",
            "penstock-domain",
            "penstock-load",
        ],
    ),
    // A model server knows nothing of Penstock.
    ("penstock-scorer", &[]),
    ("penstock-test-servers", &[]),
];

/// Real servers for tests: a dev-dependency of any crate, and nothing else.
const TEST_SERVERS: &str = "penstock-test-servers";

const SERVICE_IMPORTS: &[&str] = &[
    "penstock-contract",
    "penstock-domain",
    "penstock-runtime",
    "penstock-store",
    "penstock-bus",
];

/// The binary and the tests use everything.
const MAY_IMPORT_ALL: &[&str] = &["penstock", "penstock-tests"];

/// Crates that must not be linked, even transitively: the gateway keeps serving when the store is down, and
/// accepts only requests and routes; the client is built without server-only dependencies.
const MUST_NOT_REACH: &[(&str, &[&str])] = &[
    (
        "penstock-gateway",
        &[
            "penstock-documents",
            "penstock-store",
            "saphyr",
            "saphyr-parser",
            "sqlx",
            "sqlx-core",
        ],
    ),
    (
        "penstock-cli",
        &["penstock-runtime", "rdkafka", "sqlx", "sqlx-core"],
    ),
];

/// Crates whose results depend only on their arguments.
const PURE: &[&str] = &["contract", "documents", "domain"];

/// Libraries that do I/O, run concurrently or draw random numbers.
const IMPURE_LIBRARIES: &[&str] = &[
    "async-trait",
    "axum",
    "fastrand",
    "futures",
    "getrandom",
    "hyper",
    "hyper-util",
    "procfs",
    "rand",
    "reqwest",
    "rustix",
    "socket2",
    "sqlx",
    "tempfile",
    "tokio",
    "tokio-util",
    "tracing",
];

/// Implicit time, randomness, I/O and unstable order.
const IMPURE_WORDS: &[&str] = &[
    "HashMap",
    "HashSet",
    "SystemTime",
    "Instant::now",
    "Utc::now",
    "Local::now",
    "now_v7",
    "new_v4",
    "RandomState",
    "std::fs",
    "std::net",
    "std::env",
    "std::thread",
    "async fn",
    ".await",
];

const FILE_LINES_MAX: usize = 1000;

fn root() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        root.canonicalize().unwrap()
    })
}

fn metadata() -> &'static Metadata {
    static METADATA: OnceLock<Metadata> = OnceLock::new();
    METADATA.get_or_init(|| {
        MetadataCommand::new()
            .manifest_path(root().join("Cargo.toml"))
            .no_deps()
            .exec()
            .unwrap()
    })
}

fn package(name: &str) -> &'static Package {
    let mut packages = metadata().packages.iter();
    packages.find(|package| package.name == name).unwrap()
}

/// Every file of the repository below `folder`, by its path from the root, except built and hidden ones.
fn files(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let hidden = name.starts_with('.') && name != ".ci";
            if hidden || name == "target" || path.is_symlink() {
                continue;
            }
            match path.is_dir() {
                true => folders.push(path),
                false => found.push(path.strip_prefix(root()).unwrap().to_owned()),
            }
        }
    }
    found.sort();
    found
}

fn sources(folder: &str) -> Vec<PathBuf> {
    let is_rust = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "rs");
    files(folder).into_iter().filter(is_rust).collect()
}

/// The text of a file; `None` if it is binary.
fn text(path: &Path) -> Option<String> {
    String::from_utf8(fs::read(root().join(path)).unwrap()).ok()
}

fn assert_none(offenders: Vec<String>, remedy: &str) {
    assert!(
        offenders.is_empty(),
        "{remedy}:\n  {}",
        offenders.join("\n  ")
    );
}

#[test]
fn every_crate_imports_only_what_its_layer_allows() {
    let allowed: BTreeMap<_, _> = MAY_IMPORT.iter().copied().collect();
    let workspace: BTreeSet<&str> = metadata()
        .packages
        .iter()
        .map(|package| package.name.as_str())
        .collect();
    let mut offenders = Vec::new();
    for package in &metadata().packages {
        let name = package.name.as_str();
        if MAY_IMPORT_ALL.contains(&name) {
            continue;
        }
        let Some(allowed) = allowed.get(name) else {
            offenders.push(format!("{name} has no line in MAY_IMPORT"));
            continue;
        };
        for dependency in &package.dependencies {
            let import = dependency.name.as_str();
            let in_tests = dependency.kind == cargo_metadata::DependencyKind::Development;
            if import == TEST_SERVERS && in_tests {
                continue;
            }
            if workspace.contains(import) && !allowed.contains(&import) {
                offenders.push(format!("{name} imports {import}"));
            }
        }
    }
    assert_none(offenders, "the direction of imports is in ARCHITECTURE.md");
}

/// The output of `cargo tree --prefix depth` for a package alone: its normal dependencies, transitively.
/// Cargo's metadata cannot be used for this: there each crate has the features that any crate of the
/// workspace enables.
fn tree(package: &str) -> String {
    let output = Command::new(env!("CARGO"))
        .current_dir(root())
        .args([
            "tree",
            "--offline",
            "--edges",
            "normal",
            "--prefix",
            "depth",
        ])
        .args(["--package", package])
        .output()
        .unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// The paths from the root of a tree to forbidden crates, each as `root > … > forbidden`.
fn paths_to(tree: &str, forbidden: &[&str]) -> Vec<String> {
    let mut above: Vec<&str> = Vec::new();
    let mut found = Vec::new();
    for line in tree.lines() {
        let name = line.trim_start_matches(|c: char| c.is_ascii_digit());
        let depth: usize = line[..line.len() - name.len()].parse().unwrap();
        let name = name.split(' ').next().unwrap();
        above.truncate(depth);
        assert_eq!(above.len(), depth, "`{line}` has no parent");
        above.push(name);
        if depth > 0 && forbidden.contains(&name) {
            found.push(above.join(" > "));
        }
    }
    found
}

#[test]
fn no_crate_links_what_it_must_not() {
    let mut offenders = Vec::new();
    for (package, forbidden) in MUST_NOT_REACH {
        let tree = tree(package);
        assert!(
            tree.starts_with(&format!("0{package} ")) && tree.contains("penstock-contract"),
            "this is not the tree of {package}:\n{tree}"
        );
        offenders.extend(paths_to(&tree, forbidden));
    }
    assert_none(
        offenders,
        "remove one of the links, or put it behind a feature that is not enabled here",
    );
}

#[test]
fn a_path_to_a_forbidden_crate_is_found_at_any_depth() {
    let tree = "\
0gateway v0.1.0 (/src/gateway)
1contract v0.1.0 (/src/contract)
2serde v1.0.0
1runtime v0.1.0 (/src/runtime)
2contract v0.1.0 (/src/contract) (*)
2store v0.1.0 (/src/store)
3sqlx v0.9.0
1sqlx-like v1.0.0
";
    assert_eq!(
        paths_to(tree, &["sqlx", "saphyr"]),
        ["gateway > runtime > store > sqlx"]
    );
    assert_eq!(paths_to(tree, &["store"]), ["gateway > runtime > store"]);
    assert!(paths_to(tree, &["gateway", "sql", "saphyr"]).is_empty());
}

#[test]
fn crates_forbidden_in_the_gateway_are_found_where_they_are_linked() {
    let (_, forbidden) = MUST_NOT_REACH[0];
    let tree = tree("penstock-control");
    for name in forbidden {
        assert!(
            !paths_to(&tree, &[name]).is_empty(),
            "no crate has this name: {name}"
        );
    }
}

#[test]
fn modules_of_a_crate_import_each_other_one_way() {
    let mut offenders = Vec::new();
    for package in &metadata().packages {
        let folder = package.manifest_path.parent().unwrap().as_std_path();
        let folder = folder.strip_prefix(root()).unwrap().join("src");
        // The crate of these tests has none.
        let Some(folder) = folder
            .to_str()
            .filter(|folder| root().join(folder).is_dir())
        else {
            continue;
        };
        let mut graph = cycles::Crate::default();
        for path in sources(folder) {
            let source = text(&path).unwrap();
            let lines = shipped_lines(&path, &source).map(|(_, line)| line);
            let code = lines.collect::<Vec<&str>>().join("\n");
            graph.add(path.strip_prefix(folder).unwrap(), &code);
        }
        let cycles = graph.cycles().into_iter();
        offenders.extend(cycles.map(|cycle| format!("{folder}: {cycle}")));
    }
    assert_none(
        offenders,
        "move what both sides need into a module below them",
    );
}

/// Names of types that are used several times for the same thing: what each crate defines to fill a shared
/// pattern, and what takes the place of another without a feature.
const PATTERN_TYPES: [&str; 4] = ["BoxedError", "Config", "Deps", "KafkaLog"];

/// The name of the type that a line declares for other modules.
fn shared_type(line: &str) -> Option<&str> {
    let mut words = line.split([' ', '<', '(', ';', '{', ':', '=']);
    let public = words.next()? == "pub";
    let keywords = ["struct", "enum", "trait", "type", "union"];
    let mut words = words.skip_while(|word| word.ends_with(')'));
    let declares = public && keywords.contains(&words.next()?);
    words.next().filter(|_| declares)
}

#[test]
fn a_type_name_means_one_thing() {
    let mut files = BTreeMap::<String, BTreeSet<PathBuf>>::new();
    for package in &metadata().packages {
        let folder = package.manifest_path.parent().unwrap().as_std_path();
        let folder = folder.strip_prefix(root()).unwrap();
        // Examples are independent of Penstock; the crate of these tests has no sources.
        if folder.starts_with("deploy") || !root().join(folder).join("src").is_dir() {
            continue;
        }
        for path in sources(folder.join("src").to_str().unwrap()) {
            let source = text(&path).unwrap();
            for (_, line) in shipped_lines(&path, &source) {
                if let Some(name) = shared_type(line) {
                    files
                        .entry(name.to_owned())
                        .or_default()
                        .insert(path.clone());
                }
            }
        }
    }
    let offenders = files
        .into_iter()
        .filter(|(name, files)| files.len() > 1 && !PATTERN_TYPES.contains(&name.as_str()))
        .map(|(name, files)| format!("{name}: {files:?}"));
    assert_none(offenders.collect(), "give each its own name");
}

/// The message of a log macro: the last text among its arguments, which begin here.
fn log_message(arguments: &str) -> &str {
    let (mut depth, mut message, mut text_from) = (1, "", None);
    let mut chars = arguments.char_indices();
    while let (true, Some((at, char))) = (depth > 0, chars.next()) {
        match (char, text_from) {
            ('\\', Some(_)) => drop(chars.next()),
            ('"', Some(from)) => {
                message = &arguments[from..at];
                text_from = None;
            }
            (_, Some(_)) => {}
            ('"', None) => text_from = Some(at + 1),
            ('(', None) => depth += 1,
            (')', None) => depth -= 1,
            _ => {}
        }
    }
    message
}

#[test]
fn a_log_message_is_one_clause() {
    let mut offenders = Vec::new();
    for path in ["libs", "services", "clients"]
        .into_iter()
        .flat_map(sources)
    {
        let source = text(&path).unwrap();
        let code: Vec<&str> = shipped_lines(&path, &source)
            .map(|(_, line)| line)
            .collect();
        let code = code.join("\n");
        let calls = code.split("tracing::").skip(1);
        let calls = calls.filter_map(|call| call.split_once("!("));
        for (level, arguments) in calls {
            let message = log_message(arguments);
            let is_log = ["error", "warn", "info", "debug", "trace"].contains(&level);
            if is_log && message.contains(';') {
                offenders.push(format!("{}: {message}", path.display()));
            }
        }
    }
    assert_none(offenders, "what follows, or what to do, is a field");
}

#[test]
fn every_library_has_its_public_items_documented() {
    const LINTS: &str = "#![warn(missing_docs, clippy::missing_errors_doc)]";
    let mut offenders = Vec::new();
    for package in &metadata().packages {
        let folder = package.manifest_path.parent().unwrap().as_std_path();
        let folder = folder.strip_prefix(root()).unwrap();
        let source = folder.join("src/lib.rs");
        if folder.starts_with("libs") && !text(&source).unwrap().contains(LINTS) {
            offenders.push(format!("{}: no {LINTS}", source.display()));
        }
    }
    assert_none(offenders, "warnings are errors in `make check`");
}

#[test]
fn pure_crates_depend_on_nothing_impure() {
    let mut offenders = Vec::new();
    for name in PURE {
        for dependency in &package(&format!("penstock-{name}")).dependencies {
            let library = dependency.name.as_str();
            let shipped = dependency.kind != cargo_metadata::DependencyKind::Development;
            if shipped && IMPURE_LIBRARIES.contains(&library) {
                offenders.push(format!("{name} depends on {library}"));
            }
        }
    }
    assert_none(offenders, "time, ids and I/O come in as arguments");
}

#[test]
fn pure_crates_read_no_clock_and_iterate_in_order() {
    let mut offenders = Vec::new();
    for name in PURE {
        for path in sources(&format!("libs/{name}/src")) {
            let source = text(&path).unwrap();
            for (number, line) in shipped_lines(&path, &source) {
                let found = IMPURE_WORDS.iter().find(|word| line.contains(**word));
                if let Some(word) = found {
                    offenders.push(format!("{}:{number}: {word}", path.display()));
                }
            }
        }
    }
    assert_none(offenders, "pass it in, or use BTreeMap");
}

/// Lines of code outside tests and comments, with line numbers. Tests are at the end of a file, or in a
/// separate file, which the file that it belongs to declares anywhere.
fn shipped_lines<'a>(path: &Path, source: &'a str) -> impl Iterator<Item = (usize, &'a str)> {
    let is_test_file = path.components().any(|part| part.as_os_str() == "tests")
        || path.file_stem().is_some_and(|stem| stem == "tests");
    let lines = source.lines().zip(source.lines().skip(1).chain([""]));
    let begins_tests = |line: &str, next: &str| {
        line.starts_with("#[cfg(test)]") && !(next.starts_with("mod ") && next.ends_with(';'))
    };
    lines
        .enumerate()
        .take_while(move |(_, (line, next))| !is_test_file && !begins_tests(line, next))
        .map(|(index, (line, _))| (index + 1, line))
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
}

#[test]
fn code_after_the_declaration_of_a_test_file_is_checked() {
    let source = "#[cfg(test)]\nmod tests;\n\nfn shipped() {}\n\n#[cfg(test)]\nmod more {\n}\n";
    let lines = shipped_lines(Path::new("a.rs"), source);
    assert!(
        lines
            .map(|(_, line)| line)
            .any(|line| line == "fn shipped() {}")
    );
    let lines = shipped_lines(Path::new("a.rs"), source);
    assert_eq!(lines.last(), Some((5, "")));
}

#[test]
fn every_manifest_takes_lints_and_dependencies_from_the_workspace() {
    let mut offenders = Vec::new();
    for package in &metadata().packages {
        let path = package.manifest_path.as_std_path();
        let path = path.strip_prefix(root()).unwrap();
        let manifest = text(path).unwrap();
        if !manifest.contains("[lints]\nworkspace = true\n") {
            offenders.push(format!("{}: no [lints] workspace = true", path.display()));
        }
        let mut section = "";
        for (index, line) in manifest.lines().enumerate() {
            if line.starts_with('[') {
                section = line;
            } else if section.ends_with("dependencies]")
                && !line.is_empty()
                && !line.starts_with('#')
            {
                // `name.workspace = true`, or `name = { workspace = true, … }`.
                if !line.contains("workspace = true") {
                    offenders.push(format!("{}:{}: {line}", path.display(), index + 1));
                }
            }
        }
    }
    assert_none(offenders, "write versions in the root Cargo.toml only");
}

#[test]
fn every_library_is_explained_in_the_architecture() {
    let architecture = text(Path::new("ARCHITECTURE.md")).unwrap();
    let libraries = architecture.split("\n## Libraries\n").nth(1).unwrap();
    let libraries = libraries.split("\n## ").next().unwrap();
    let manifest = text(Path::new("Cargo.toml")).unwrap();
    let dependencies = manifest.split("[workspace.dependencies]\n").nth(1).unwrap();
    let dependencies = dependencies.split("\n[").next().unwrap();
    let mut offenders = Vec::new();
    for line in dependencies.lines() {
        let Some((name, value)) = line.split_once(" = ") else {
            continue;
        };
        if !value.contains("path =") && !libraries.contains(&format!("`{name}`")) {
            offenders.push(name.to_owned());
        }
    }
    assert_none(
        offenders,
        "add a line to the table under `## Libraries` in ARCHITECTURE.md",
    );
}

#[test]
fn every_source_file_begins_with_its_purpose() {
    let mut offenders = Vec::new();
    for folder in ["libs", "clients", "services", "tests", "deploy"] {
        for path in sources(folder) {
            let source = text(&path).unwrap();
            let first = source.lines().next().unwrap_or_default();
            if !first.starts_with("//! ") {
                offenders.push(path.display().to_string());
            }
        }
    }
    assert_none(offenders, "begin the file with `//! ` and what it owns");
}

#[test]
fn no_source_file_is_too_long() {
    let mut offenders = Vec::new();
    for path in sources("") {
        let lines = text(&path).unwrap().lines().count();
        if lines > FILE_LINES_MAX {
            offenders.push(format!("{}: {lines} lines", path.display()));
        }
    }
    assert_none(offenders, "split what has more than one subject");
}

#[test]
fn no_file_contains_a_machine_specific_path() {
    // Each split in two, so that this file does not contain them.
    let places = [
        ["/ro", "ot/"],
        ["/wo", "rk/"],
        ["/Use", "rs/"],
        ["/tmp/", "bash"],
    ]
    .map(|parts| parts.concat());
    let mut offenders = Vec::new();
    for path in files("") {
        let Some(text) = text(&path) else {
            continue;
        };
        for (index, line) in text.lines().enumerate() {
            let absolute = |place: &String| {
                line.match_indices(place.as_str()).any(|(at, _)| {
                    let before = line[..at].chars().next_back();
                    before.is_none_or(|c| {
                        !c.is_alphanumeric() && !matches!(c, '/' | '.' | '-' | '_' | '}')
                    })
                })
            };
            if places.iter().any(absolute) {
                offenders.push(format!("{}:{}: {}", path.display(), index + 1, line.trim()));
            }
        }
    }
    assert_none(
        offenders,
        "use a path from the repository's root, or an argument",
    );
}

#[test]
fn every_target_of_the_makefile_is_in_its_help() {
    let makefile = text(Path::new("Makefile")).unwrap();
    let mut phony = BTreeSet::new();
    let mut helped = BTreeSet::new();
    for line in makefile.lines() {
        if let Some(names) = line.strip_prefix(".PHONY:") {
            phony.extend(names.split_whitespace());
        } else if let Some((name, _)) = line.split_once(':')
            && line.contains(": ## ")
            && !line.starts_with('\t')
        {
            helped.insert(name);
        }
    }
    assert_eq!(
        phony, helped,
        "each target is .PHONY and has `## ` with one line of help"
    );
}

#[test]
fn scripts_can_be_run_and_stop_at_the_first_error() {
    use std::os::unix::fs::PermissionsExt;
    let mut offenders = Vec::new();
    for path in files("scripts").into_iter().chain(files(".ci")) {
        let source = text(&path).unwrap();
        let mode = fs::metadata(root().join(&path))
            .unwrap()
            .permissions()
            .mode();
        let is_shell = source.starts_with("#!/usr/bin/env bash\n");
        if is_shell && (mode & 0o111 == 0 || !source.contains("\nset -euo pipefail\n")) {
            offenders.push(path.display().to_string());
        }
    }
    assert_none(offenders, "chmod +x it, and `set -euo pipefail` at its top");
}
