//! A control group (version 2) for each instance, where this process may create one. A process stays in it
//! whatever it does to its session, its process group and its environment.
//!
//! Invariant: without control groups instances are found by all other means; nothing fails for lack of one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::shortage::ok_unless_shortage;

/// Where control groups of instances are created.
#[derive(Clone, Debug, Default)]
pub(super) struct ControlGroups {
    /// The control group of this process; `None` without version 2.
    own: Option<PathBuf>,
    installation: String,
}

impl ControlGroups {
    /// Those of an installation. Its instances get none if they are not `enabled`.
    pub(super) fn open(installation: &str, enabled: bool) -> Self {
        Self {
            own: own_folder().filter(|_| enabled),
            installation: installation.to_owned(),
        }
    }

    /// Moves a process that has just been started into the control group of its instance.
    pub(super) fn add(&self, instance: &str, pid: i32) {
        let Some(folder) = self.folder(instance) else {
            return;
        };
        let added = match fs::create_dir(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => fs::write(folder.join("cgroup.procs"), pid.to_string()),
        };
        if let Err(error) = added {
            // Usual without root, or without a delegated group.
            tracing::debug!(instance, %error, "the instance gets no control group");
        }
    }

    /// Removes the control group of an instance whose processes have ended.
    pub(super) fn remove(&self, instance: &str) {
        if let Some(folder) = self.folder(instance) {
            let _ = fs::remove_dir(folder);
        }
    }

    fn folder(&self, instance: &str) -> Option<PathBuf> {
        let name = format!("{}{instance}", prefix(&self.installation));
        Some(self.own.as_ref()?.join(name))
    }
}

/// The instance of this installation in whose control group a process is, wherever that is in the
/// hierarchy.
pub(super) fn instance_of(pid: i32, installation: &str) -> io::Result<Option<String>> {
    let groups = ok_unless_shortage(fs::read_to_string(format!("/proc/{pid}/cgroup")))?;
    Ok(groups.and_then(|groups| instance_in(&groups, installation)))
}

fn instance_in(groups: &str, installation: &str) -> Option<String> {
    let prefix = prefix(installation);
    let mut names = unified(groups)?.split('/');
    let instance = names.find_map(|name| name.strip_prefix(&prefix))?;
    Some(instance.to_owned())
}

fn prefix(installation: &str) -> String {
    format!("penstock-{installation}-")
}

/// The path in the hierarchy of version 2, from the content of `/proc/PID/cgroup`.
fn unified(groups: &str) -> Option<&str> {
    groups.lines().find_map(|line| line.strip_prefix("0::"))
}

/// The folder of the control group that this process is in.
fn own_folder() -> Option<PathBuf> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    folder_of(unified(&groups)?, &mounts)
}

fn folder_of(group: &str, mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        if kind.split(' ').next() != Some("cgroup2") {
            return None;
        }
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let below = Path::new(group).strip_prefix(root).ok()?;
        Some(Path::new(point).join(below))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "31 1 0:5 / /proc rw - proc proc rw\n\
        41 31 0:38 /docker/1 /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw\n";

    #[test]
    fn the_own_folder_is_below_the_mount_of_version_2() {
        let folder = folder_of("/docker/1/penstock.service", MOUNTS).unwrap();
        assert_eq!(folder, Path::new("/sys/fs/cgroup/penstock.service"));
        assert_eq!(folder_of("/elsewhere", MOUNTS), None);
        assert_eq!(folder_of("/", "31 1 0:5 / /proc rw - proc proc rw\n"), None);
    }

    #[test]
    fn the_instance_is_known_from_any_level_of_the_control_group() {
        let groups = "4:memory:/x\n0::/system.slice/penstock-abc-iris-blue-1/worker\n";
        assert_eq!(instance_in(groups, "abc").as_deref(), Some("iris-blue-1"));
        assert_eq!(instance_in(groups, "other"), None);
        assert_eq!(instance_in("4:memory:/penstock-abc-x\n", "abc"), None);
    }
}
