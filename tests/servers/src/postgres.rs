//! PostgreSQL: a server, and new databases on it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use rustix::process::Signal;

use crate::process::{
    Server, TempFolder, free_port, must_run, script, start_on_free_ports, succeeds,
};
use crate::secrets::{Secrets, USER};

pub struct Postgres {
    server: Server,
    /// `postgres://…@HOST:PORT`, without a database.
    url: String,
    port: u16,
    secrets: Option<Secrets>,
    is_synced: bool,
    // Dropped after the server.
    folder: Option<TempFolder>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ServerKind {
    Plain,
    Secured,
    /// May lose acknowledged writes if it is killed.
    Unsynced,
}

impl Postgres {
    /// A private server, which the test may kill. `None` only if `PENSTOCK_SKIP` names `postgres`.
    pub fn start() -> Option<Self> {
        Self::start_in(&std::env::temp_dir())
    }

    /// A server without fsync, which is faster; sufficient if it is never killed.
    fn start_unsynced() -> Option<Self> {
        if crate::is_skipped("postgres") {
            return None;
        }
        Some(start_on_free_ports("PostgreSQL", || {
            Self::try_start(&std::env::temp_dir(), ServerKind::Unsynced)
        }))
    }

    /// As [`start`](Self::start), with its data inside a folder that every user can access.
    pub fn start_in(parent: &Path) -> Option<Self> {
        if crate::is_skipped("postgres") {
            return None;
        }
        Some(start_on_free_ports("PostgreSQL", || {
            Self::try_start(parent, ServerKind::Plain)
        }))
    }

    /// A server that requires TLS and a password over the network.
    pub fn start_secured() -> Option<Self> {
        if crate::is_skipped("postgres") {
            return None;
        }
        Some(start_on_free_ports("PostgreSQL", || {
            Self::try_start(&std::env::temp_dir(), ServerKind::Secured)
        }))
    }

    /// The secrets of a secured server.
    ///
    /// # Panics
    /// If the server was started without them.
    pub fn secrets(&self) -> &Secrets {
        self.secrets.as_ref().unwrap()
    }

    /// One server shared by all tests of this program, which must not kill it, and which use a
    /// [`database`](Self::database) each. `PENSTOCK_TEST_POSTGRES=postgres://USER@HOST:PORT` names an
    /// external one; the user must be allowed to create databases.
    pub fn shared() -> Option<&'static Self> {
        static SHARED: OnceLock<Option<Postgres>> = OnceLock::new();
        let shared = SHARED.get_or_init(|| match std::env::var("PENSTOCK_TEST_POSTGRES") {
            Ok(url) => Some(Self {
                server: Server::default(),
                url: url.trim_end_matches('/').to_owned(),
                port: 0,
                secrets: None,
                is_synced: true,
                folder: None,
            }),
            Err(_) => Self::start_unsynced(),
        });
        shared.as_ref()
    }

    fn try_start(parent: &Path, kind: ServerKind) -> Result<Self, String> {
        let port = free_port();
        let folder = TempFolder::create_in(parent, "postgres");
        let secrets =
            (kind == ServerKind::Secured).then(|| Secrets::write(&folder.path().join("secrets")));
        let postgres = Self {
            server: Server::default(),
            url: format!("postgres://postgres@127.0.0.1:{port}"),
            port,
            secrets,
            is_synced: kind != ServerKind::Unsynced,
            folder: Some(folder),
        };
        postgres.launch()?;
        if let Some(secrets) = &postgres.secrets {
            let admin_url = postgres.admin_url("postgres");
            must_run(
                "postgres.sh",
                &["role", &admin_url, USER, &secrets.password],
            );
        }
        Ok(postgres)
    }

    /// The URL of a database.
    pub fn url(&self, database: &str) -> String {
        format!("{}/{database}", self.url)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The URL of a new, empty database; for a secured server, without the password.
    pub fn database(&self) -> String {
        let name = crate::unique("t");
        let admin_url = self.admin_url("postgres");
        let mut arguments = vec!["createdb", &admin_url, &name];
        if self.secrets.is_some() {
            arguments.push(USER);
        }
        must_run("postgres.sh", &arguments);
        match self.secrets {
            Some(_) => format!("postgres://{USER}@127.0.0.1:{}/{name}", self.port),
            None => format!("{}/{name}", self.url),
        }
    }

    /// The URL for the superuser.
    fn admin_url(&self, database: &str) -> String {
        match (&self.secrets, self.folder()) {
            (Some(_), Some(folder)) => format!(
                "postgresql:///{database}?user=postgres&host={}&port={}",
                folder.display(),
                self.port
            ),
            _ => format!("{}/{database}", self.url),
        }
    }

    /// SIGKILL to the server and all its processes.
    pub fn kill(&self) {
        self.server.kill();
    }

    /// A fast shutdown: closes connections and flushes everything.
    pub fn stop(&self) {
        self.server.stop(Signal::INT);
    }

    /// Restarts a killed or stopped server in its folder and on its port; returns when it has recovered and
    /// answers.
    pub fn restart(&self) {
        self.server.kill();
        if let Err(why) = self.launch() {
            panic!("PostgreSQL did not restart: {why}");
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
            return Err("an external server cannot be started".to_owned());
        };
        // Left by a killed server; another process may have its id by now.
        let _ = std::fs::remove_file(folder.join("data/postmaster.pid"));
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        command.arg(script("postgres.sh")).arg("run").arg(&folder);
        // QUIT: its child processes end with it.
        command.args([&self.port.to_string(), "QUIT"]);
        if let Some(secrets) = &self.secrets {
            command.env("POSTGRES_SECURED", &secrets.folder);
        }
        let options = if self.is_synced { "" } else { "-c fsync=off" };
        command.env("POSTGRES_OPTIONS", options);
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
