//! Resolves a `secretRef`: an environment variable of this node, or a file on it.
//!
//! Invariant: instances never get the server's own secrets, by whichever path they are reached. This is
//! checked on the opened file, so that no link can change between check and read. Hard links are recognised
//! only for files directly in the data folder and for files named by a setting, not for files in subfolders.

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

use super::shortage::{StartError, is_shortage};

/// Largest file that `file:PATH` may refer to.
const SECRET_BYTES_MAX: u64 = 64 * 1024;

/// Returns the value of a secret for a variable of an instance.
pub(super) fn resolve_secret(
    own_secrets: &OwnSecrets,
    name: &str,
    reference: &str,
) -> Result<OsString, StartError> {
    let refused = |why: &str| format!("the secret `{reference}` for spec.env.{name} {why}");
    if let Some(why) = own_secrets.refusal(reference) {
        return Err(refused(why).into());
    }
    match reference.split_once(':') {
        Some(("env", variable)) => env::var_os(variable).ok_or_else(|| {
            refused("is not set in the environment of this node; set it and start Penstock again")
                .into()
        }),
        Some(("file", path)) => {
            read_secret(own_secrets, Path::new(path)).map_err(|error| match error {
                StartError::Refused(why) => refused(&why).into(),
                shortage => shortage,
            })
        }
        _ => Err(refused("has an unknown form; write env:NAME or file:PATH").into()),
    }
}

fn read_secret(own_secrets: &OwnSecrets, path: &Path) -> Result<OsString, StartError> {
    let failed = |error: io::Error| {
        StartError::from_io(error, |e| format!("cannot be read on this node: {e}"))
    };
    // Otherwise opening a pipe waits for a writer.
    let nonblocking = OFlags::NONBLOCK.bits() as i32;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(nonblocking)
        .open(path);
    let file = file.map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    let real = real_path(&file).map_err(failed)?;
    let filesystem = rustix::fs::fstatfs(&file).map_err(|errno| failed(errno.into()))?;
    let is_procfs = filesystem.f_type == PROC_SUPER_MAGIC;
    if is_procfs
        || own_secrets.has_path(&real)
        || is_own_file(own_secrets, &real, &meta).map_err(failed)?
    {
        return Err(PATH_REFUSED.to_owned().into());
    }
    if !meta.is_file() {
        return Err("is not a regular file".to_owned().into());
    }
    let mut text = String::new();
    let limit = SECRET_BYTES_MAX + 1;
    file.take(limit).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 == limit {
        return Err(format!("is larger than {SECRET_BYTES_MAX} bytes").into());
    }
    Ok(text.strip_suffix('\n').unwrap_or(&text).into())
}

/// Returns the path of an open file with all links resolved.
fn real_path(file: &File) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Whether the file is one of the server's own under another path: a hard link, or a file in an own folder
/// that is also mounted elsewhere. A resource shortage is an error, not a no.
fn is_own_file(own_secrets: &OwnSecrets, real: &Path, meta: &Metadata) -> io::Result<bool> {
    let mut own_files = BTreeSet::new();
    let identity = |meta: Metadata| (meta.dev(), meta.ino());
    for place in own_secrets.paths() {
        own_files.extend(fs::metadata(place).map(identity));
        match fs::read_dir(place) {
            Ok(within) => {
                let within = within.flatten().filter_map(|entry| entry.metadata().ok());
                own_files.extend(within.map(identity));
            }
            Err(error) if is_shortage(&error) => return Err(error),
            // A file, or missing.
            Err(_) => {}
        }
    }
    let mut folders = real.ancestors().skip(1);
    Ok(own_files.contains(&(meta.dev(), meta.ino()))
        || folders.any(|folder| {
            fs::metadata(folder).is_ok_and(|meta| own_files.contains(&identity(meta)))
        }))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const SECRET: &str = "correct-horse-battery";

    /// A data folder with a key, next to a folder that belongs to somebody else.
    struct Folders {
        root: tempfile::TempDir,
        own_secrets: OwnSecrets,
    }

    impl Folders {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir_all(root.path().join("data/deep")).unwrap();
            fs::create_dir(root.path().join("models")).unwrap();
            let mut own_secrets = OwnSecrets::default();
            own_secrets.add_path(&root.path().join("data"));
            for name in ["data/seal.key", "data/deep/record", "token"] {
                fs::write(root.path().join(name), SECRET).unwrap();
            }
            own_secrets.add_path(&root.path().join("token"));
            Self { root, own_secrets }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.root.path().join(name)
        }

        fn resolve(&self, path: &Path) -> Result<OsString, String> {
            resolve_secret(&self.own_secrets, "DB", &format!("file:{}", path.display()))
                .map_err(|error| error.to_string())
        }

        #[track_caller]
        fn refuses(&self, path: &Path) {
            let refused = self.resolve(path).unwrap_err();
            assert!(refused.contains("reserved for Penstock"), "{refused}");
            assert!(refused.contains("spec.env.DB"), "{refused}");
            assert!(!refused.contains(SECRET), "{refused}");
        }
    }

    #[test]
    fn an_own_file_is_refused_by_every_path_to_it() {
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
    fn procfs_files_are_refused() {
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
    fn a_data_folder_named_by_a_link_is_also_protected_by_its_real_name() {
        let mut folders = Folders::new();
        symlink(folders.path("data"), folders.path("link")).unwrap();
        folders.own_secrets = OwnSecrets::default();
        folders.own_secrets.add_path(&folders.path("link"));
        folders.refuses(&folders.path("link/deep/record"));
        folders.refuses(&folders.path("data/deep/record"));
    }

    #[test]
    fn own_variables_are_refused_before_lookup() {
        let mut own_secrets = OwnSecrets::default();
        own_secrets.add_variable("KAFKA_PASSWORD");
        for variable in ["PENSTOCK_STORE", "PGPASSWORD", "KAFKA_PASSWORD"] {
            let refused = resolve_secret(&own_secrets, "DB", &format!("env:{variable}"))
                .unwrap_err()
                .to_string();
            assert!(refused.contains("reserved for Penstock"), "{refused}");
        }
    }

    #[test]
    fn a_secret_from_a_file_loses_the_newline_at_its_end_only() {
        let folders = Folders::new();
        let path = folders.path("models/secret");
        fs::write(&path, "two\nlines\n").unwrap();
        assert_eq!(folders.resolve(&path).unwrap(), "two\nlines");
        // Containers mount secrets this way.
        symlink("secret", folders.path("models/link")).unwrap();
        let linked = folders.resolve(&folders.path("models/link"));
        assert_eq!(linked.unwrap(), "two\nlines");
    }

    #[test]
    fn unbounded_and_irregular_files_are_refused() {
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
    fn a_missing_secret_is_named_with_its_variable() {
        for reference in ["env:A_TEST_NOT_SET", "file:/nonexistent/x", "vault:x"] {
            let error = resolve_secret(&OwnSecrets::default(), "DB", reference)
                .unwrap_err()
                .to_string();
            assert!(error.contains(reference), "{error}");
            assert!(error.contains("spec.env.DB"), "{error}");
        }
    }
}
