//! Turns an order into a running process: command line, environment, secrets, port, output file.
//!
//! Secrets go into the environment of the child and nowhere else; the server's own do not go there either.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{IpAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use contract::own_secrets::OwnSecrets;
use contract::resources::EnvValue;
use rustix::fs::{FlockOperation, flock};

use super::lack::{is_lack, is_lack_of_start, seen};
use super::limit;
use super::record::lock_soon;
use super::secret::resolve_secret;
use crate::Order;

pub(super) const INSTALLATION: &str = "PENSTOCK_INSTALLATION";
pub(super) const INSTANCE: &str = "PENSTOCK_INSTANCE";
pub(super) const GENERATION: &str = "PENSTOCK_GENERATION";

/// Where the instance is to listen; beside `PORT`, which most servers know.
const HOST: &str = "PENSTOCK_HOST";

/// What of our own environment an instance gets. Everything else stays here: a secret that one
/// deployment refers to as `env:NAME` is not for all the others.
const PASSED_ON: &[&str] = &[
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "TZ",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "VIRTUAL_ENV",
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
];

/// Where and as whom instances are started.
#[derive(Clone, Debug)]
pub(super) struct Surroundings {
    pub installation: String,
    /// Where `serve` was started: relative programs are looked up from here, and instances run here.
    pub working_directory: PathBuf,
    /// The address that instances listen on.
    pub listen: IpAddr,
    /// What no instance is given.
    pub own: OwnSecrets,
    /// The limit of descriptors that instances get, where ours is another.
    pub descriptors: Option<u64>,
}

/// Why there is no process.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    /// Of ours: the same order may be carried out later.
    #[error("this process lacks the means: {0}")]
    Lack(io::Error),
    #[error("{0}")]
    Refused(String),
}

impl StartError {
    /// What stands in the way of a file, or of this process.
    pub(super) fn of(error: io::Error, sentence: impl FnOnce(&io::Error) -> String) -> Self {
        match is_lack(&error) {
            true => Self::Lack(error),
            false => Self::Refused(sentence(&error)),
        }
    }
}

impl From<String> for StartError {
    fn from(sentence: String) -> Self {
        Self::Refused(sentence)
    }
}

/// A port that nobody listens on now, and that is not among `taken`: an instance that has not bound
/// its port yet looks like nobody.
pub(super) fn free_port(listen: IpAddr, taken: impl Fn(u16) -> bool) -> io::Result<u16> {
    const TRIES: u32 = 64;
    for _ in 0..TRIES {
        let port = TcpListener::bind((listen, 0))?.local_addr()?.port();
        if !taken(port) {
            return Ok(port);
        }
    }
    Err(io::Error::new(
        io::ErrorKind::AddrInUse,
        format!("no free port was found on {listen}"),
    ))
}

/// Somebody listens on the port. Only a lack is an error.
pub(super) fn is_taken(listen: IpAddr, port: u16) -> io::Result<bool> {
    match TcpListener::bind((listen, port)) {
        Err(error) if is_lack(&error) => Err(error),
        Err(error) => Ok(error.kind() == io::ErrorKind::AddrInUse),
        Ok(_) => Ok(false),
    }
}

/// Starts the process; on failure says in a sentence why not. `output` is opened for append and
/// locked: the lock lives in the open file, which the process and its children share, so it is held
/// for exactly as long as any of them can still write, whoever started them and whatever became of us.
pub(super) fn launch(
    order: &Order,
    surroundings: &Surroundings,
    port: u16,
    output: &Path,
) -> Result<Child, StartError> {
    let mut command = command(order, surroundings, port)?;
    let stdout = open_output(output)?;
    let stderr = stdout.try_clone();
    let stderr =
        stderr.map_err(|error| StartError::of(error, |e| format!("{}: {e}", output.display())))?;
    let program = command.get_program().to_owned();
    if let Some(descriptors) = surroundings.descriptors {
        command =
            limit::behind(&command, descriptors).map_err(|error| cannot_run(&program, &error))?;
    }
    command
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr)
        .process_group(0)
        .spawn()
        .map_err(|error| match is_lack_of_start(&error) {
            true => StartError::Lack(error),
            false => cannot_run(&program, &error),
        })
}

fn cannot_run(program: &OsStr, error: &io::Error) -> StartError {
    StartError::Refused(format!(
        "`{}` cannot be run: {error}; check spec.command",
        program.to_string_lossy()
    ))
}

fn command(order: &Order, surroundings: &Surroundings, port: u16) -> Result<Command, StartError> {
    let listen = surroundings.listen.to_string();
    let fill = |text: &str| {
        text.replace("{port}", &port.to_string())
            .replace("{host}", &listen)
    };
    let mut words = order.spec.command.iter().map(|word| fill(word));
    let program = words
        .next()
        .filter(|program| !program.is_empty())
        .ok_or_else(|| "spec.command is empty; name the program and its arguments".to_owned())?;
    let mut command = Command::new(resolve(&program, &surroundings.working_directory));
    command
        .args(words)
        .current_dir(&surroundings.working_directory)
        .env_clear()
        .envs(passed_on(&surroundings.own));
    for (name, value) in &order.spec.env {
        let value = match value {
            EnvValue::Plain(text) => fill(text).into(),
            EnvValue::Secret(secret) => {
                resolve_secret(&surroundings.own, name, &secret.secret_ref)?
            }
        };
        command.env(name, value);
    }
    command
        .env("PORT", port.to_string())
        .env(HOST, &listen)
        .env(INSTALLATION, &surroundings.installation)
        .env(INSTANCE, order.id.as_str())
        .env(GENERATION, order.generation.to_string());
    Ok(command)
}

/// A bare name is looked for in PATH; anything with a slash is a path from the working directory.
fn resolve(program: &str, working_directory: &Path) -> PathBuf {
    if program.contains('/') {
        working_directory.join(program)
    } else {
        PathBuf::from(program)
    }
}

fn passed_on(own: &OwnSecrets) -> impl Iterator<Item = (OsString, OsString)> {
    env::vars_os().filter(|(name, _)| name.to_str().is_some_and(|name| is_passed_on(own, name)))
}

fn is_passed_on(own: &OwnSecrets, name: &str) -> bool {
    (PASSED_ON.contains(&name) || name.starts_with("LC_")) && !own.has_variable(name)
}

fn open_output(path: &Path) -> Result<File, StartError> {
    let failed = |error: io::Error| {
        StartError::of(error, |e| {
            format!("its log {} cannot be opened: {e}", path.display())
        })
    };
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .map_err(failed)?;
    lock_soon(&file).map_err(|_| {
        format!(
            "a process of this instance still runs: it holds {}",
            path.display()
        )
    })?;
    Ok(file)
}

/// A process that was started with this output file still has it open.
pub(super) fn is_output_held(path: &Path) -> io::Result<bool> {
    let file = seen(OpenOptions::new().append(true).open(path))?;
    Ok(file.is_some_and(|file| flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::Ipv4Addr;

    use contract::ids::InstanceId;

    use super::*;

    #[test]
    fn what_is_ours_is_not_inherited() {
        let mut own = OwnSecrets::default();
        own.add_variable("LC_SECRET");
        for name in [
            "PENSTOCK_INTERNAL_TOKEN",
            "PENSTOCK_SEAL_KEY",
            "PENSTOCK_STORE",
            "PENSTOCK_BUS",
            "PENSTOCK_TOKEN",
            "PGPASSWORD",
            "PGPASSFILE",
            "KAFKA_PASSWORD",
            "LC_SECRET",
        ] {
            assert!(!is_passed_on(&own, name), "{name}");
        }
        for name in PASSED_ON.iter().chain(&["LC_ALL"]) {
            assert!(is_passed_on(&own, name), "{name}");
        }
    }

    #[test]
    fn host_and_port_replace_their_placeholders_wherever_they_stand() {
        let spec = serde_json::json!({
            "backend": "process", "instanceType": "t",
            "command": ["./scorer", "--listen={host}:{port}", "{port}"],
            "env": {"URL": "http://{host}:{port}/"},
        });
        let order = Order {
            id: InstanceId::from("a".to_owned()),
            generation: 1,
            deployment: "iris/blue".into(),
            spec: serde_json::from_value(spec).unwrap(),
        };
        let surroundings = Surroundings {
            installation: "i".into(),
            working_directory: "/srv".into(),
            listen: "127.0.0.2".parse().unwrap(),
            own: OwnSecrets::default(),
            descriptors: None,
        };
        let command = command(&order, &surroundings, 4711).unwrap();
        assert_eq!(command.get_program(), "/srv/./scorer");
        let args: Vec<_> = command.get_args().collect();
        assert_eq!(args, ["--listen=127.0.0.2:4711", "4711"]);
        let told: BTreeMap<_, _> = command.get_envs().collect();
        let told = |name: &str| told[std::ffi::OsStr::new(name)].unwrap();
        assert_eq!(told("URL"), "http://127.0.0.2:4711/");
        assert_eq!(told("PENSTOCK_HOST"), "127.0.0.2");
        assert_eq!(told("PORT"), "4711");
    }

    #[test]
    fn a_port_that_is_promised_to_an_instance_is_not_given_to_another() {
        let refused = std::cell::Cell::new(0);
        let port = free_port(Ipv4Addr::LOCALHOST.into(), |_| {
            refused.replace(refused.get() + 1) < 3
        })
        .unwrap();
        assert!(port > 0);
        assert_eq!(refused.get(), 4);
    }
}
