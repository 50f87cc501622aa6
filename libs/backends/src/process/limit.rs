//! Instances get the limit of descriptors that this process was started with, and not the one that
//! it has raised for itself: a program that uses `select` breaks above 1,024, and one that goes
//! through all possible descriptors is slow.
//!
//! A limit holds from a program's first instruction, so it is not set from outside once the program
//! runs: the child is this program again, which sets its own limit and becomes the instance.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use rustix::fs::{Access, access};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The first argument of the child that is to become an instance.
const BECOME: &str = "become-instance";

/// This program, also where its file has been replaced since it was started.
const OURSELVES: &str = "/proc/self/exe";

/// What shells answer for a program that cannot be run.
const CANNOT_RUN: u8 = 126;

/// The command behind a start of this program that sets the limit first.
pub(super) fn behind(command: &Command, descriptors: u64) -> io::Result<Command> {
    find(command)?;
    let mut outer = Command::new(OURSELVES);
    outer
        .arg0("penstock")
        .args([BECOME, &descriptors.to_string()])
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

/// Looked for here, so that a program which is not there is an error of the start, as it is otherwise.
fn find(command: &Command) -> io::Result<()> {
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

/// Where this process is such a child: becomes the instance, and returns only if that fails. To be
/// called before anything else.
pub fn become_instance(mut arguments: impl Iterator<Item = OsString>) -> Option<ExitCode> {
    let _ourselves = arguments.next();
    if arguments.next().is_none_or(|first| first != BECOME) {
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
    // To the output of the instance.
    eprintln!("`{}` cannot be run: {error}", program.to_string_lossy());
    Some(ExitCode::from(CANNOT_RUN))
}
