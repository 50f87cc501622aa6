//! Starts the process of an instance: command line, environment, secrets, port, output file.
//!
//! Secrets go into the environment of the child and nowhere else; the server's own secrets never do.

use std::collections::BTreeMap;
use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{IpAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use contract::own_secrets::OwnSecrets;
use contract::resources::{EnvValue, placeholders};
use rustix::fs::{FlockOperation, flock};

use super::limit;
use super::record::lock_with_retries;
use super::secret::resolve_secret;
use super::shortage::{StartError, is_shortage, is_start_shortage, ok_unless_shortage};
use crate::StartSpec;

pub(super) const INSTALLATION: &str = "PENSTOCK_INSTALLATION";
pub(super) const INSTANCE: &str = "PENSTOCK_INSTANCE";
pub(super) const GENERATION: &str = "PENSTOCK_GENERATION";
/// The further ports, by name: `grpc=4711,metrics=4712`.
pub(super) const PORTS: &str = "PENSTOCK_PORTS";

/// The address to listen on; complements `PORT`, which most servers know.
const HOST: &str = "PENSTOCK_HOST";

/// Variables that instances inherit. All others are withheld: a secret that one deployment refers to as
/// `env:NAME` must not reach the rest.
const INHERITED_VARIABLES: &[&str] = &[
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

/// What all starts have in common.
#[derive(Clone, Debug)]
pub(super) struct LaunchContext {
    pub installation: String,
    /// Where `serve` was started: the working directory of instances, from which relative programs are
    /// resolved.
    pub working_directory: PathBuf,
    /// The address that instances listen on.
    pub listen: IpAddr,
    /// Secrets that no instance may get.
    pub own_secrets: OwnSecrets,
    /// The descriptor limit of instances, if different from that of this process.
    pub descriptors: Option<u64>,
}

/// The ports of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ports {
    /// The one on which it is probed and gets requests.
    pub main: u16,
    /// Further ones, by name.
    pub named: BTreeMap<String, u16>,
}

/// Reads further ports as they are in the environment.
pub(super) fn parse_ports(text: &str) -> Option<BTreeMap<String, u16>> {
    let pairs = text.split(',').filter(|pair| !pair.is_empty());
    let parse = |pair: &str| {
        let (name, port) = pair.split_once('=')?;
        Some((name.to_owned(), port.parse().ok()?))
    };
    pairs.map(parse).collect()
}

fn format_ports(ports: &BTreeMap<String, u16>) -> String {
    let pairs: Vec<String> = ports
        .iter()
        .map(|(name, port)| format!("{name}={port}"))
        .collect();
    pairs.join(",")
}

/// Returns a port on which nobody listens and that is not reserved for an instance that has yet to
/// bind it.
pub(super) fn find_free_port(listen: IpAddr, is_reserved: impl Fn(u16) -> bool) -> io::Result<u16> {
    const ATTEMPTS: u32 = 64;
    for _ in 0..ATTEMPTS {
        let port = TcpListener::bind((listen, 0))?.local_addr()?.port();
        if !is_reserved(port) {
            return Ok(port);
        }
    }
    Err(io::Error::new(
        io::ErrorKind::AddrInUse,
        format!("no free port was found on {listen}"),
    ))
}

/// Whether somebody listens on one of the ports. Only a shortage is an error.
pub(super) fn is_any_port_taken(listen: IpAddr, ports: &[u16]) -> io::Result<bool> {
    for port in ports {
        match TcpListener::bind((listen, *port)) {
            Err(error) if is_shortage(&error) => return Err(error),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Ok(true),
            Err(_) | Ok(_) => {}
        }
    }
    Ok(false)
}

/// Starts the process. `output` is opened for append and locked: the lock belongs to the open file,
/// which the process and its children share, so it is held for exactly as long as any of them can still
/// write, even if Penstock is gone.
pub(super) fn launch(
    start: &StartSpec,
    context: &LaunchContext,
    ports: &Ports,
    folder: Option<&Path>,
    output: &Path,
) -> Result<Child, StartError> {
    let mut command = command(start, context, ports, folder)?;
    let stdout = open_output(output)?;
    let stderr = stdout.try_clone();
    let stderr = stderr
        .map_err(|error| StartError::from_io(error, |e| format!("{}: {e}", output.display())))?;
    let program = command.get_program().to_owned();
    if let Some(descriptors) = context.descriptors {
        command =
            limit::wrap(&command, descriptors).map_err(|error| cannot_run(&program, &error))?;
    }
    command
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr)
        .process_group(0)
        .spawn()
        .map_err(|error| match is_start_shortage(&error) {
            true => StartError::Shortage(error),
            false => cannot_run(&program, &error),
        })
}

fn cannot_run(program: &OsStr, error: &io::Error) -> StartError {
    StartError::Refused(format!(
        "`{}` cannot be run: {error}; check spec.command",
        program.to_string_lossy()
    ))
}

fn command(
    start: &StartSpec,
    context: &LaunchContext,
    ports: &Ports,
    folder: Option<&Path>,
) -> Result<Command, StartError> {
    let listen = context.listen.to_string();
    let mut replacements = vec![
        (placeholders::PORT.to_owned(), ports.main.to_string()),
        (placeholders::HOST.to_owned(), listen.clone()),
    ];
    if let Some(folder) = folder {
        let path = folder
            .to_str()
            .ok_or_else(|| format!("its folder {} is not valid UTF-8", folder.display()))?;
        replacements.push((placeholders::FOLDER.to_owned(), path.to_owned()));
    }
    let named = ports.named.iter();
    replacements
        .extend(named.map(|(name, port)| (placeholders::port_placeholder(name), port.to_string())));
    let fill = |text: &str| {
        replacements
            .iter()
            .fold(text.to_owned(), |text, (placeholder, value)| {
                text.replace(placeholder, value)
            })
    };
    let mut arguments = start.spec.command.iter().map(|argument| fill(argument));
    let program = arguments
        .next()
        .filter(|program| !program.is_empty())
        .ok_or_else(|| "spec.command is empty; name the program and its arguments".to_owned())?;
    let mut command = Command::new(resolve(&program, &context.working_directory));
    command
        .args(arguments)
        .current_dir(&context.working_directory)
        .env_clear()
        .envs(inherited_variables(&context.own_secrets))
        .env("HOST", &listen)
        // What Python prints reaches the log at once.
        .env("PYTHONUNBUFFERED", "1");
    for (name, port) in &ports.named {
        command.env(placeholders::port_variable(name), port.to_string());
    }
    for (name, value) in &start.spec.env {
        let value = match value {
            EnvValue::Plain(text) => fill(text).into(),
            EnvValue::Secret(secret) => {
                resolve_secret(&context.own_secrets, name, &secret.secret_ref)?
            }
        };
        command.env(name, value);
    }
    command
        .env("PORT", ports.main.to_string())
        .env(HOST, &listen)
        .env(INSTALLATION, &context.installation)
        .env(INSTANCE, start.id.as_str())
        .env(GENERATION, start.generation.to_string());
    if !ports.named.is_empty() {
        command.env(PORTS, format_ports(&ports.named));
    }
    Ok(command)
}

/// A bare name is looked up in PATH; anything with a slash is relative to the working directory.
fn resolve(program: &str, working_directory: &Path) -> PathBuf {
    if program.contains('/') {
        working_directory.join(program)
    } else {
        PathBuf::from(program)
    }
}

fn inherited_variables(own_secrets: &OwnSecrets) -> impl Iterator<Item = (OsString, OsString)> {
    env::vars_os().filter(|(name, _)| {
        name.to_str()
            .is_some_and(|name| is_inherited(own_secrets, name))
    })
}

fn is_inherited(own_secrets: &OwnSecrets, name: &str) -> bool {
    (INHERITED_VARIABLES.contains(&name) || name.starts_with("LC_"))
        && !own_secrets.has_variable(name)
}

fn open_output(path: &Path) -> Result<File, StartError> {
    let failed = |error: io::Error| {
        StartError::from_io(error, |e| {
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
    lock_with_retries(&file).map_err(|_| {
        format!(
            "a process of this instance still runs: it holds {}",
            path.display()
        )
    })?;
    Ok(file)
}

/// Whether a process started with this output file still has it open.
pub(super) fn is_output_locked(path: &Path) -> io::Result<bool> {
    let file = ok_unless_shortage(OpenOptions::new().append(true).open(path))?;
    Ok(file.is_some_and(|file| flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use contract::ids::InstanceId;

    use super::*;

    #[test]
    fn own_secrets_are_not_inherited() {
        let mut own_secrets = OwnSecrets::default();
        own_secrets.add_variable("LC_SECRET");
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
            assert!(!is_inherited(&own_secrets, name), "{name}");
        }
        for name in INHERITED_VARIABLES.iter().chain(&["LC_ALL"]) {
            assert!(is_inherited(&own_secrets, name), "{name}");
        }
    }

    #[test]
    fn host_and_port_placeholders_are_replaced_everywhere() {
        let spec = serde_json::json!({
            "backend": "process", "instanceType": "t",
            "command": ["./scorer", "--listen={host}:{port}", "{port}", "{folder}/cache"],
            "env": {"URL": "http://{host}:{port:a-b}/", "HOST": "mine", "PORT_C": "mine"},
        });
        let start = StartSpec {
            id: InstanceId::from("a".to_owned()),
            generation: 1,
            deployment: "iris/blue".into(),
            spec: serde_json::from_value(spec).unwrap(),
        };
        let context = LaunchContext {
            installation: "i".into(),
            working_directory: "/srv".into(),
            listen: "127.0.0.2".parse().unwrap(),
            own_secrets: OwnSecrets::default(),
            descriptors: None,
        };
        let ports = Ports {
            main: 4711,
            named: [("a-b".to_owned(), 4712), ("c".to_owned(), 4713)].into(),
        };
        let folder = Some(Path::new("/run/f"));
        let command = command(&start, &context, &ports, folder).unwrap();
        assert_eq!(command.get_program(), "/srv/./scorer");
        let args: Vec<_> = command.get_args().collect();
        assert_eq!(args, ["--listen=127.0.0.2:4711", "4711", "/run/f/cache"]);
        let env: BTreeMap<_, _> = command.get_envs().collect();
        let env = |name: &str| env[std::ffi::OsStr::new(name)].unwrap();
        assert_eq!(env("URL"), "http://127.0.0.2:4712/");
        assert_eq!(
            (env("PORT_A_B"), env("PORT_C")),
            ("4712".as_ref(), "mine".as_ref())
        );
        let tagged = env(PORTS).to_str().and_then(parse_ports);
        assert_eq!(tagged, Some(ports.named));
        assert_eq!(env("PENSTOCK_HOST"), "127.0.0.2");
        assert_eq!(env("PORT"), "4711");
        assert_eq!(env("PYTHONUNBUFFERED"), "1");
        assert_eq!(env("HOST"), "mine", "a document's own values stand");
    }

    #[test]
    fn a_port_reserved_for_one_instance_is_not_given_to_another() {
        let refused = std::cell::Cell::new(0);
        let port = find_free_port(Ipv4Addr::LOCALHOST.into(), |_| {
            refused.replace(refused.get() + 1) < 3
        })
        .unwrap();
        assert!(port > 0);
        assert_eq!(refused.get(), 4);
    }
}
