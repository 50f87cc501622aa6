//! PostgreSQL: one server, and a fresh database on it for whoever asks.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use rustix::process::Signal;

use crate::process::{Folder, Server, free_port, script, succeeds};

/// Ports are chosen before they are used, so somebody else may be quicker.
const ATTEMPTS: usize = 3;

pub struct Postgres {
    server: Server,
    /// `postgres://…@HOST:PORT`, without a database.
    url: String,
    port: u16,
    // Dropped after the server.
    folder: Option<Folder>,
}

impl Postgres {
    /// A server of this test's own, which it may kill. `None` only if `PENSTOCK_SKIP` names `postgres`.
    pub fn start() -> Option<Self> {
        Self::start_in(&std::env::temp_dir())
    }

    /// The same, with its data below a folder that every user can reach.
    pub fn start_in(parent: &Path) -> Option<Self> {
        if crate::skipped("postgres") {
            return None;
        }
        for _ in 1..ATTEMPTS {
            if let Ok(postgres) = Self::try_start(parent) {
                return Some(postgres);
            }
        }
        match Self::try_start(parent) {
            Ok(postgres) => Some(postgres),
            Err(why) => panic!("PostgreSQL did not start: {why}"),
        }
    }

    /// One server that all tests of this program share: nobody kills it, and everybody takes a
    /// [`database`](Self::database) of their own. `PENSTOCK_TEST_POSTGRES=postgres://USER@HOST:PORT`
    /// names one to be used instead, by a user who may create databases.
    pub fn shared() -> Option<&'static Self> {
        static SHARED: OnceLock<Option<Postgres>> = OnceLock::new();
        let shared = SHARED.get_or_init(|| match std::env::var("PENSTOCK_TEST_POSTGRES") {
            Ok(url) => Some(Self {
                server: Server::default(),
                url: url.trim_end_matches('/').to_owned(),
                port: 0,
                folder: None,
            }),
            Err(_) => Self::start(),
        });
        shared.as_ref()
    }

    fn try_start(parent: &Path) -> Result<Self, String> {
        let port = free_port();
        let postgres = Self {
            server: Server::default(),
            url: format!("postgres://postgres@127.0.0.1:{port}"),
            port,
            folder: Some(Folder::below(parent, "postgres")),
        };
        postgres.launch()?;
        Ok(postgres)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The URL of a new, empty database.
    pub fn database(&self) -> String {
        let name = crate::unique("t");
        let output = Command::new(script("postgres.sh"))
            .args(["createdb", &format!("{}/postgres", self.url), &name])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        format!("{}/{name}", self.url)
    }

    /// SIGKILL to the server and to all its processes.
    pub fn kill(&self) {
        self.server.kill();
    }

    /// Ends connections and writes everything down first.
    pub fn stop(&self) {
        self.server.stop(Signal::INT);
    }

    /// Starts a server that was killed or stopped, in its folder and on its port; returns when it
    /// answers, which is after it has recovered.
    pub fn restart(&self) {
        self.server.kill();
        if let Err(why) = self.launch() {
            panic!("PostgreSQL did not start again: {why}");
        }
    }

    /// SIGSTOP to all its processes: connections stay open and nothing is answered.
    pub fn pause(&self) {
        self.server.signal(Signal::STOP);
    }

    pub fn resume(&self) {
        self.server.signal(Signal::CONT);
    }

    fn launch(&self) -> Result<(), String> {
        let Some(folder) = self.folder() else {
            return Err("it is not ours to start".to_owned());
        };
        // A server that was killed leaves this, and its id may be somebody else's by now.
        let _ = std::fs::remove_file(folder.join("data/postmaster.pid"));
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        command.arg(script("postgres.sh")).arg("run").arg(&folder);
        // QUIT: its own processes end with it.
        command.args([&self.port.to_string(), "QUIT"]);
        let output = folder.with_extension("log");
        self.server.start(command, &output);
        let port = self.port.to_string();
        let answers = || succeeds("postgres.sh", &["answers", &port]);
        if self.server.wait_until(answers) {
            return Ok(());
        }
        Err(std::fs::read_to_string(output).unwrap_or_default())
    }

    fn folder(&self) -> Option<PathBuf> {
        Some(self.folder.as_ref()?.path().join("postgres"))
    }
}
