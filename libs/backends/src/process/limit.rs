//! Instances get the descriptor limit that this process was started with, not the one that it raised
//! for itself: programs that use `select` break above 1,024, and programs that iterate over all possible
//! descriptors become slow.
//!
//! The limit must apply from the first instruction, so it cannot be set from outside once the program
//! runs: the child is this program again, which lowers its own limit and then execs the instance.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use rustix::fs::{Access, access};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The first argument of a child that becomes an instance.
const BECOME_INSTANCE: &str = "become-instance";

/// This program, even if its file has been replaced since it was started.
const CURRENT_EXE: &str = "/proc/self/exe";

/// The exit code that shells use for a program that cannot be run.
const CANNOT_RUN: u8 = 126;

/// Wraps the command in a start of this program that sets the limit first.
pub(super) fn wrap(command: &Command, descriptors: u64) -> io::Result<Command> {
    check_executable(command)?;
    let mut outer = Command::new(CURRENT_EXE);
    outer
        .arg0("penstock")
        .args([BECOME_INSTANCE, &descriptors.to_string()])
        .arg(command.get_program())
        .args(command.get_args())
        .env_clear();
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            outer.env(name, value);
        }
    }
    if let Some(folder) = command.get_current_dir() {
        outer.current_dir(folder);
    }
    Ok(outer)
}

/// Checked up front, so that a missing program is an error of the start, as it is without the wrapper.
fn check_executable(command: &Command) -> io::Result<()> {
    let program = Path::new(command.get_program());
    if program.components().count() > 1 {
        return Ok(access(program, Access::EXEC_OK)?);
    }
    let envs = command.get_envs();
    let path = envs
        .filter(|(name, _)| *name == "PATH")
        .find_map(|(_, value)| value)
        .unwrap_or(OsStr::new("/bin:/usr/bin"));
    let mut files = std::env::split_paths(path).map(|folder| folder.join(program));
    match files.any(|file| file.is_file() && access(file, Access::EXEC_OK).is_ok()) {
        true => Ok(()),
        false => Err(io::ErrorKind::NotFound.into()),
    }
}

/// If this process is such a child, becomes the instance and returns only on failure. Must be called
/// before anything else.
pub fn become_instance(mut arguments: impl Iterator<Item = OsString>) -> Option<ExitCode> {
    let _program = arguments.next();
    if arguments
        .next()
        .is_none_or(|first| first != BECOME_INSTANCE)
    {
        return None;
    }
    let limit = arguments.next()?.to_str()?.parse().ok()?;
    let program = arguments.next()?;
    let maximum = getrlimit(Resource::Nofile).maximum;
    let lowered = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(limit),
            maximum,
        },
    );
    let error = match lowered {
        Ok(()) => Command::new(&program).args(arguments).exec(),
        Err(error) => error.into(),
    };
    // Goes to the output of the instance.
    eprintln!("`{}` cannot be run: {error}", program.to_string_lossy());
    Some(ExitCode::from(CANNOT_RUN))
}
