//! Follows a `secretRef`: a variable of this node, or a file on it.
//!
//! Invariant: what is the server's own is not handed to instances, by whichever path it is reached. That
//! is asked of the file that was opened, so that no link can be changed between the question and the reading.
//! A further name (hard link) of a file deep in the data folder is not recognised; one of the files right
//! in it, or of a file that a setting names, is.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use contract::own_secrets::{OwnSecrets, PATH_REFUSED};
use rustix::fs::{OFlags, PROC_SUPER_MAGIC};

use super::lack::is_lack;
use super::launch::StartError;

/// Largest file that a `file:PATH` secret may be.
const SECRET_BYTES_MAX: u64 = 64 * 1024;

/// The value of a secret for a variable of an instance; on failure says in a sentence why not.
pub(super) fn resolve_secret(
    own: &OwnSecrets,
    name: &str,
    reference: &str,
) -> Result<OsString, StartError> {
    let refused = |why: &str| format!("the secret `{reference}` for spec.env.{name} {why}");
    if let Some(why) = own.refusal(reference) {
        return Err(refused(why).into());
    }
    match reference.split_once(':') {
        Some(("env", variable)) => env::var_os(variable).ok_or_else(|| {
            refused("is not set in the environment of this node; set it and start Penstock again")
                .into()
        }),
        Some(("file", path)) => read(own, Path::new(path)).map_err(|error| match error {
            StartError::Refused(why) => refused(&why).into(),
            lack => lack,
        }),
        _ => Err(refused("has an unknown form; write env:NAME or file:PATH").into()),
    }
}

fn read(own: &OwnSecrets, path: &Path) -> Result<OsString, StartError> {
    let failed =
        |error: io::Error| StartError::of(error, |e| format!("cannot be read on this node: {e}"));
    // Without it the opening of a pipe waits for somebody to write.
    let at_once = OFlags::NONBLOCK.bits() as i32;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(at_once)
        .open(path);
    let file = file.map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    let real = real_path(&file).map_err(failed)?;
    let of_processes = rustix::fs::fstatfs(&file).map_err(|errno| failed(errno.into()))?;
    let shows_processes = of_processes.f_type == PROC_SUPER_MAGIC;
    if shows_processes || own.has_path(&real) || is_among(own, &real, &meta).map_err(failed)? {
        return Err(PATH_REFUSED.to_owned().into());
    }
    if !meta.is_file() {
        return Err("is not a regular file".to_owned().into());
    }
    let mut text = String::new();
    let most = SECRET_BYTES_MAX + 1;
    file.take(most).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 == most {
        return Err(format!("is larger than {SECRET_BYTES_MAX} bytes").into());
    }
    Ok(text.strip_suffix('\n').unwrap_or(&text).into())
}

/// Where an open file is, whatever links led to it.
fn real_path(file: &File) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// It is ours under another path: another name of the same file, or in a folder of ours that is mounted
/// elsewhere too. What cannot be looked at for want of a descriptor is an error, not a no.
fn is_among(own: &OwnSecrets, real: &Path, meta: &Metadata) -> io::Result<bool> {
    let mut ours = BTreeSet::new();
    let identity = |meta: Metadata| (meta.dev(), meta.ino());
    for place in own.places() {
        ours.extend(fs::metadata(place).map(identity));
        match fs::read_dir(place) {
            Ok(within) => {
                let within = within.flatten().filter_map(|entry| entry.metadata().ok());
                ours.extend(within.map(identity));
            }
            Err(error) if is_lack(&error) => return Err(error),
            // It is a file, or is not there.
            Err(_) => {}
        }
    }
    let mut folders = real.ancestors().skip(1);
    Ok(ours.contains(&(meta.dev(), meta.ino()))
        || folders
            .any(|folder| fs::metadata(folder).is_ok_and(|meta| ours.contains(&identity(meta)))))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const OURS: &str = "correct-horse-battery";

    /// A data folder with a key, and beside it a folder of somebody else.
    struct Folders {
        root: tempfile::TempDir,
        own: OwnSecrets,
    }

    impl Folders {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir_all(root.path().join("data/deep")).unwrap();
            fs::create_dir(root.path().join("models")).unwrap();
            let mut own = OwnSecrets::default();
            own.add_place(&root.path().join("data"));
            for name in ["data/seal.key", "data/deep/record", "token"] {
                fs::write(root.path().join(name), OURS).unwrap();
            }
            own.add_place(&root.path().join("token"));
            Self { root, own }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.root.path().join(name)
        }

        fn resolve(&self, path: &Path) -> Result<OsString, String> {
            resolve_secret(&self.own, "DB", &format!("file:{}", path.display()))
                .map_err(|error| error.to_string())
        }

        #[track_caller]
        fn refuses(&self, path: &Path) {
            let refused = self.resolve(path).unwrap_err();
            assert!(refused.contains("Penstock has for itself"), "{refused}");
            assert!(refused.contains("spec.env.DB"), "{refused}");
            assert!(!refused.contains(OURS), "{refused}");
        }
    }

    #[test]
    fn a_file_of_ours_is_refused_by_every_path_to_it() {
        let folders = Folders::new();
        symlink(folders.path("data"), folders.path("models/folder")).unwrap();
        symlink(folders.path("data/seal.key"), folders.path("models/key")).unwrap();
        symlink("key", folders.path("models/key2")).unwrap();
        fs::hard_link(folders.path("data/seal.key"), folders.path("models/hard")).unwrap();
        fs::hard_link(folders.path("token"), folders.path("models/token")).unwrap();
        for name in [
            "data/seal.key",
            "data/deep/record",
            "models/../data/seal.key",
            "models/folder/seal.key",
            "models/folder/deep/record",
            "models/folder/deep/../seal.key",
            "models/key",
            "models/key2",
            "models/hard",
            "token",
            "models/token",
        ] {
            folders.refuses(&folders.path(name));
        }
    }

    #[test]
    fn what_the_kernel_shows_of_processes_is_refused() {
        let folders = Folders::new();
        let open = File::open(folders.path("data/seal.key")).unwrap();
        let fd = open.as_raw_fd();
        let process = std::process::id();
        let root = format!("/proc/self/root{}", folders.path("data/seal.key").display());
        symlink("/proc/self/environ", folders.path("models/environ")).unwrap();
        symlink(format!("/proc/self/fd/{fd}"), folders.path("models/open")).unwrap();
        symlink(&root, folders.path("models/root")).unwrap();
        for path in [
            "/proc/self/environ".to_owned(),
            "/proc/thread-self/environ".to_owned(),
            format!("/proc/{process}/cmdline"),
            format!("/proc/{process}/cwd/Cargo.toml"),
            format!("/proc/self/fd/{fd}"),
            format!("/dev/fd/{fd}"),
            root,
        ] {
            folders.refuses(Path::new(&path));
        }
        for link in ["environ", "open", "root"] {
            folders.refuses(&folders.path("models").join(link));
        }
    }

    #[test]
    fn a_data_folder_that_is_named_by_a_link_is_ours_by_its_own_name_too() {
        let mut folders = Folders::new();
        symlink(folders.path("data"), folders.path("link")).unwrap();
        folders.own = OwnSecrets::default();
        folders.own.add_place(&folders.path("link"));
        folders.refuses(&folders.path("link/deep/record"));
        folders.refuses(&folders.path("data/deep/record"));
    }

    #[test]
    fn variables_of_ours_are_refused_before_they_are_looked_up() {
        let mut own = OwnSecrets::default();
        own.add_variable("KAFKA_PASSWORD");
        for variable in ["PENSTOCK_STORE", "PGPASSWORD", "KAFKA_PASSWORD"] {
            let refused = resolve_secret(&own, "DB", &format!("env:{variable}"))
                .unwrap_err()
                .to_string();
            assert!(refused.contains("Penstock has for itself"), "{refused}");
        }
    }

    #[test]
    fn a_secret_from_a_file_loses_the_newline_at_its_end_only() {
        let folders = Folders::new();
        let path = folders.path("models/secret");
        fs::write(&path, "two\nlines\n").unwrap();
        assert_eq!(folders.resolve(&path).unwrap(), "two\nlines");
        // As secrets are mounted in containers.
        symlink("secret", folders.path("models/link")).unwrap();
        let linked = folders.resolve(&folders.path("models/link"));
        assert_eq!(linked.unwrap(), "two\nlines");
    }

    #[test]
    fn what_has_no_end_or_no_size_is_no_secret() {
        let folders = Folders::new();
        let large = folders.path("models/large");
        fs::write(&large, vec![b'x'; SECRET_BYTES_MAX as usize + 1]).unwrap();
        let refused = folders.resolve(&large).unwrap_err();
        assert!(refused.contains("is larger than"), "{refused}");
        for path in ["/dev/zero", "/"] {
            let refused = folders.resolve(Path::new(path)).unwrap_err();
            assert!(refused.contains("is not a regular file"), "{refused}");
        }
    }

    #[test]
    fn a_secret_that_is_missing_is_named_with_the_variable_that_wants_it() {
        for reference in ["env:A_TEST_NOT_SET", "file:/nonexistent/x", "vault:x"] {
            let error = resolve_secret(&OwnSecrets::default(), "DB", reference)
                .unwrap_err()
                .to_string();
            assert!(error.contains(reference), "{error}");
            assert!(error.contains("spec.env.DB"), "{error}");
        }
    }
}
