//! Python servers and the packages they need.

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{Server, TempFolder, free_port, script, start_on_free_ports};

/// An interpreter with these packages (`NAME==VERSION`), which are downloaded once. `None` only if
/// `PENSTOCK_SKIP` names `python`.
pub fn python(packages: &[&str]) -> Option<PathBuf> {
    if crate::is_skipped("python") {
        return None;
    }
    let mut command = Command::new(script("python.sh"));
    let output = command.arg("with").args(packages).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let path = String::from_utf8(output.stdout).unwrap();
    Some(PathBuf::from(path.trim_end()))
}

/// A server that listens on one port.
pub struct PythonServer {
    _server: Server,
    pub address: SocketAddr,
    // Dropped after the server.
    _folder: TempFolder,
}

impl PythonServer {
    /// Runs `tests/servers/python/PROGRAM` with these arguments, in which `{port}` is replaced by the port to
    /// listen on; returns once it listens.
    pub fn start(interpreter: &Path, program: &str, arguments: &[&str]) -> Self {
        start_on_free_ports(program, || {
            let port = free_port();
            let folder = TempFolder::create_in(&std::env::temp_dir(), "python");
            let output = folder.path().join("output.log");
            let mut command = Command::new(interpreter);
            command.arg(
                Path::new(env!("CARGO_MANIFEST_DIR"))
                    .join("python")
                    .join(program),
            );
            let port_text = port.to_string();
            command.args(
                arguments
                    .iter()
                    .map(|text| text.replace("{port}", &port_text)),
            );
            let server = Server::default();
            server.start(command, &output);
            let address = SocketAddr::from(([127, 0, 0, 1], port));
            if server.wait_until(|| TcpStream::connect(address).is_ok()) {
                return Ok(Self {
                    _server: server,
                    address,
                    _folder: folder,
                });
            }
            Err(std::fs::read_to_string(output).unwrap_or_default())
        })
    }
}
