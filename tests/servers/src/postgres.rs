//! PostgreSQL: one server, and a fresh database on it for whoever asks.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use rustix::process::Signal;

use crate::process::{Folder, Server, free_port, must_run, script, start_on_free_ports, succeeds};
use crate::secrets::{Secrets, USER};

pub struct Postgres {
    server: Server,
    /// `postgres://…@HOST:PORT`, without a database.
    url: String,
    port: u16,
    secrets: Option<Secrets>,
    is_synced: bool,
    // Dropped after the server.
    folder: Option<Folder>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Secured,
    /// Loses what it has acknowledged if it is killed.
    Unsynced,
}

impl Postgres {
    /// A server of this test's own, which it may kill. `None` only if `PENSTOCK_SKIP` names `postgres`.
    pub fn start() -> Option<Self> {
        Self::start_in(&std::env::temp_dir())
    }

    /// One that nobody kills needs no disk to hold what it says, and answers sooner.
    fn start_unsynced() -> Option<Self> {
        if crate::skipped("postgres") {
            return None;
        }
        Some(start_on_free_ports("PostgreSQL", || {
            Self::try_start(&std::env::temp_dir(), Kind::Unsynced)
        }))
    }

    /// The same, with its data below a folder that every user can reach.
    pub fn start_in(parent: &Path) -> Option<Self> {
        if crate::skipped("postgres") {
            return None;
        }
        Some(start_on_free_ports("PostgreSQL", || {
            Self::try_start(parent, Kind::Plain)
        }))
    }

    /// A server that lets in over the network only who comes with TLS and shows a password.
    pub fn start_secured() -> Option<Self> {
        if crate::skipped("postgres") {
            return None;
        }
        Some(start_on_free_ports("PostgreSQL", || {
            Self::try_start(&std::env::temp_dir(), Kind::Secured)
        }))
    }

    /// Of a server that was started with them.
    pub fn secrets(&self) -> &Secrets {
        self.secrets.as_ref().unwrap()
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
                secrets: None,
                is_synced: true,
                folder: None,
            }),
            Err(_) => Self::start_unsynced(),
        });
        shared.as_ref()
    }

    fn try_start(parent: &Path, kind: Kind) -> Result<Self, String> {
        let port = free_port();
        let folder = Folder::below(parent, "postgres");
        let secrets =
            (kind == Kind::Secured).then(|| Secrets::write(&folder.path().join("secrets")));
        let postgres = Self {
            server: Server::default(),
            url: format!("postgres://postgres@127.0.0.1:{port}"),
            port,
            secrets,
            is_synced: kind != Kind::Unsynced,
            folder: Some(folder),
        };
        postgres.launch()?;
        if let Some(secrets) = &postgres.secrets {
            let maintenance = postgres.maintenance("postgres");
            must_run(
                "postgres.sh",
                &["role", &maintenance, USER, &secrets.password],
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

    /// The URL of a new, empty database. Of a secured server it is without a password.
    pub fn database(&self) -> String {
        let name = crate::unique("t");
        let maintenance = self.maintenance("postgres");
        let mut arguments = vec!["createdb", &maintenance, &name];
        if self.secrets.is_some() {
            arguments.push(USER);
        }
        must_run("postgres.sh", &arguments);
        match self.secrets {
            Some(_) => format!("postgres://{USER}@127.0.0.1:{}/{name}", self.port),
            None => format!("{}/{name}", self.url),
        }
    }

    /// How its owner gets in.
    fn maintenance(&self, database: &str) -> String {
        match (&self.secrets, self.folder()) {
            (Some(_), Some(folder)) => format!(
                "postgresql:///{database}?user=postgres&host={}&port={}",
                folder.display(),
                self.port
            ),
            _ => format!("{}/{database}", self.url),
        }
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
