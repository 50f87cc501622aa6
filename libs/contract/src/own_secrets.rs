//! Variables and files that hold the server's own secrets: no `secretRef` in a document may refer to
//! them.
//!
//! Owns the list. Control checks it when a document is applied, a node when it starts an instance.
//! Nothing here accesses the file system: a node checks again with the path that the kernel reports for
//! an opened file.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use crate::problem::Finding;
use crate::resources::limits::RESERVED_ENV_PREFIX;
use crate::resources::{DeploymentSpec, EnvValue};

/// The variables from which the PostgreSQL client takes passwords and keys.
pub const POSTGRES_VARIABLES: &[&str] = &["PGPASSWORD", "PGPASSFILE", "PGSSLKEY"];

/// Where the kernel exposes environments, memory and open files of processes, including the server's.
const PROCESS_PATHS: &[&str] = &["/proc", "/dev/fd"];

/// Variables and paths that this process takes its secrets from, in addition to the built-in ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnSecrets {
    variables: BTreeSet<String>,
    paths: BTreeSet<PathBuf>,
}

impl OwnSecrets {
    /// Adds an environment variable.
    pub fn add_variable(&mut self, name: &str) {
        self.variables.insert(name.to_owned());
    }

    /// Adds a file, or a folder with everything in it.
    pub fn add_path(&mut self, path: &Path) {
        self.paths.insert(normalize(path));
    }

    /// Adds the target of `env:NAME` or `file:PATH`.
    pub fn add_reference(&mut self, reference: &str) {
        match reference.split_once(':') {
            Some(("env", name)) => self.add_variable(name),
            Some(("file", path)) => self.add_path(Path::new(path)),
            _ => {}
        }
    }

    /// The files and folders that were added, without the built-in ones.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.paths.iter().map(PathBuf::as_path)
    }

    /// Whether the variable is reserved for the server.
    pub fn has_variable(&self, name: &str) -> bool {
        name.starts_with(RESERVED_ENV_PREFIX)
            || POSTGRES_VARIABLES.contains(&name)
            || self.variables.contains(name)
    }

    /// Whether the path is reserved for the server, or in a folder that is. The check is lexical: callers
    /// that follow links must check the target again.
    pub fn has_path(&self, path: &Path) -> bool {
        let path = normalize(path);
        let process_paths = PROCESS_PATHS.iter().map(Path::new);
        self.paths()
            .chain(process_paths)
            .any(|place| path.starts_with(place))
    }

    /// Returns why a reference is refused, as a predicate; `None` if it is allowed.
    pub fn refusal(&self, reference: &str) -> Option<&'static str> {
        match reference.split_once(':') {
            Some(("env", name)) if self.has_variable(name) => Some(VARIABLE_REFUSED),
            Some(("file", path)) if self.has_path(Path::new(path)) => Some(PATH_REFUSED),
            _ => None,
        }
    }

    /// Returns a finding for each refused reference of a deployment.
    pub fn findings(&self, spec: &DeploymentSpec) -> Vec<Finding> {
        let refused = spec.env.iter().filter_map(|(name, value)| {
            let EnvValue::Secret(secret) = value else {
                return None;
            };
            let refusal = self.refusal(&secret.secret_ref)?;
            let detail = format!("the secret {refusal}");
            Some(Finding::new(format!("/spec/env/{name}/secretRef"), detail))
        });
        refused.collect()
    }
}

const VARIABLE_REFUSED: &str = "is in a variable reserved for Penstock; name a variable that holds only what the instance needs";

/// Why a path, named or resolved, is refused.
pub const PATH_REFUSED: &str = "is in a file or folder reserved for Penstock; name a file that holds only what the instance needs";

/// Resolves `.` and `..` lexically.
fn normalize(path: &Path) -> PathBuf {
    let mut normalized = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                normalized.pop();
            }
            component => normalized.push(component),
        }
    }
    normalized
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets() -> OwnSecrets {
        let mut secrets = OwnSecrets::default();
        secrets.add_path(Path::new("/var/lib/penstock"));
        secrets.add_reference("file:/etc/penstock/./token");
        secrets.add_reference("env:KAFKA_PASSWORD");
        secrets
    }

    #[test]
    fn references_to_reserved_secrets_are_refused_however_they_are_written() {
        for reference in [
            "env:PENSTOCK_INTERNAL_TOKEN",
            "env:PENSTOCK_ANYTHING",
            "env:PGPASSWORD",
            "env:PGPASSFILE",
            "env:KAFKA_PASSWORD",
            "file:/var/lib/penstock",
            "file:/var/lib/penstock/seal.key",
            "file:/var/lib/../lib/./penstock//seal.key",
            "file:/../var/lib/penstock/a/../seal.key",
            "file:/etc/penstock/token",
            "file:/proc/self/environ",
            "file:/proc/1/root/etc/passwd",
            "file:/dev/fd/3",
        ] {
            assert!(secrets().refusal(reference).is_some(), "{reference}");
        }
        for reference in [
            "env:MODEL_KEY",
            "env:PGHOST",
            "file:/var/lib/penstock-models/key",
            "file:/etc/penstock/token2",
            "file:/etc/penstock/models/key",
        ] {
            assert_eq!(secrets().refusal(reference), None, "{reference}");
        }
    }

    #[test]
    fn a_finding_points_at_the_reference_and_does_not_repeat_it() {
        let spec = serde_json::json!({
            "backend": "process", "instanceType": "t", "command": ["x"],
            "env": {"A": {"secretRef": "env:KAFKA_PASSWORD"}, "B": {"secretRef": "env:B"}, "C": "PENSTOCK_X"},
        });
        let findings = secrets().findings(&serde_json::from_value(spec).unwrap());
        let [finding] = &findings[..] else {
            panic!("{findings:?}");
        };
        assert_eq!(finding.pointer, "/spec/env/A/secretRef");
        assert!(!finding.detail.contains("KAFKA"), "{}", finding.detail);
    }
}
