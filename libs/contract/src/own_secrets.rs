//! What of variables and files is the server's own: no `secretRef` of a document may name it.
//!
//! Owns the list; control asks it when a document is applied, a node when it starts an instance. Nothing
//! here looks at the machine: a node asks again with the path that the kernel gives an opened file.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use crate::problem::Finding;
use crate::resources::limits::RESERVED_ENV_PREFIX;
use crate::resources::{DeploymentSpec, EnvValue};

/// Where the client of PostgreSQL finds passwords and keys.
pub const OF_POSTGRES: &[&str] = &["PGPASSWORD", "PGPASSFILE", "PGSSLKEY"];

/// Where the kernel shows environments, memory and open files of processes, ours among them.
const OF_PROCESSES: &[&str] = &["/proc", "/dev/fd"];

/// Variables and places that this process has its secrets from, beside those that are always ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnSecrets {
    variables: BTreeSet<String>,
    places: BTreeSet<PathBuf>,
}

impl OwnSecrets {
    /// A variable of the environment, by its name.
    pub fn add_variable(&mut self, name: &str) {
        self.variables.insert(name.to_owned());
    }

    /// A file, or a folder with all that is in it.
    pub fn add_place(&mut self, path: &Path) {
        self.places.insert(normal(path));
    }

    /// What `env:NAME` or `file:PATH` refers to.
    pub fn add_reference(&mut self, reference: &str) {
        match reference.split_once(':') {
            Some(("env", name)) => self.add_variable(name),
            Some(("file", path)) => self.add_place(Path::new(path)),
            _ => {}
        }
    }

    /// The files and folders that were added, without those that are always ours.
    pub fn places(&self) -> impl Iterator<Item = &Path> {
        self.places.iter().map(PathBuf::as_path)
    }

    /// Whether a variable of this name is ours.
    pub fn has_variable(&self, name: &str) -> bool {
        name.starts_with(RESERVED_ENV_PREFIX)
            || OF_POSTGRES.contains(&name)
            || self.variables.contains(name)
    }

    /// Whether a path is ours, or lies in a folder that is. It is taken as it is written: who
    /// follows links asks again with what they lead to.
    pub fn has_path(&self, path: &Path) -> bool {
        let path = normal(path);
        let of_processes = OF_PROCESSES.iter().map(Path::new);
        self.places()
            .chain(of_processes)
            .any(|place| path.starts_with(place))
    }

    /// Why a reference is refused, as what is said of it; none if it may be followed.
    pub fn refusal(&self, reference: &str) -> Option<&'static str> {
        match reference.split_once(':') {
            Some(("env", name)) if self.has_variable(name) => Some(VARIABLE_REFUSED),
            Some(("file", path)) if self.has_path(Path::new(path)) => Some(PATH_REFUSED),
            _ => None,
        }
    }

    /// A finding for each reference of a deployment that is refused.
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

const VARIABLE_REFUSED: &str = "is in a variable that Penstock has for itself, which is not for instances; name a variable that only holds what the instance needs";

/// Of a path, named or found.
pub const PATH_REFUSED: &str = "is in a file or folder that Penstock has for itself, which is not for instances; name a file that only holds what the instance needs";

/// Without `.` and `..`, as far as that can be told from the text.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                normal.pop();
            }
            part => normal.push(part),
        }
    }
    normal
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> OwnSecrets {
        let mut own = OwnSecrets::default();
        own.add_place(Path::new("/var/lib/penstock"));
        own.add_reference("file:/etc/penstock/./token");
        own.add_reference("env:KAFKA_PASSWORD");
        own
    }

    #[test]
    fn references_to_what_is_ours_are_refused_however_they_are_written() {
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
            assert!(own().refusal(reference).is_some(), "{reference}");
        }
        for reference in [
            "env:MODEL_KEY",
            "env:PGHOST",
            "file:/var/lib/penstock-models/key",
            "file:/etc/penstock/token2",
            "file:/etc/penstock/models/key",
        ] {
            assert_eq!(own().refusal(reference), None, "{reference}");
        }
    }

    #[test]
    fn a_finding_points_at_the_reference_and_does_not_repeat_it() {
        let spec = serde_json::json!({
            "backend": "process", "instanceType": "t", "command": ["x"],
            "env": {"A": {"secretRef": "env:KAFKA_PASSWORD"}, "B": {"secretRef": "env:B"}, "C": "PENSTOCK_X"},
        });
        let findings = own().findings(&serde_json::from_value(spec).unwrap());
        let [finding] = &findings[..] else {
            panic!("{findings:?}");
        };
        assert_eq!(finding.pointer, "/spec/env/A/secretRef");
        assert!(!finding.detail.contains("KAFKA"), "{}", finding.detail);
    }
}
