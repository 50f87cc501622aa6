//! PostgreSQL for tests: a server that the user points to (`PENSTOCK_TEST_POSTGRES`), or one of the
//! installed package, started in a scratch folder on a free port, one per test process.
//!
//! Invariant: whatever becomes of the test process, the server that it started ends and its folder
//! is removed: a small script waits for its own standard input to close.

#![allow(dead_code)]

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};

const URL: &str = "PENSTOCK_TEST_POSTGRES";
const SKIP: &str = "PENSTOCK_SKIP";

/// Whether the user has opted out of what needs PostgreSQL.
pub fn skipped() -> bool {
    let skip = std::env::var(SKIP).unwrap_or_default();
    let skipped = skip.split(',').any(|name| name.trim() == "postgres");
    if skipped {
        eprintln!("skipped, for {SKIP} says so: this needs PostgreSQL");
    }
    skipped
}

/// Whether the server syncs to disk: without it the tests are quicker and prove the same, unless the
/// server itself is killed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Sync {
    Off,
    On,
}

const SCRIPT: &str = r#"
set -e
if [ ! -e "$DATA/PG_VERSION" ]; then
  "$BIN/initdb" -D "$DATA" -U postgres -A trust --no-sync -E UTF8 --locale=C >"$DATA.initdb" 2>&1
fi
"$BIN/pg_ctl" -D "$DATA" -l "$DATA.log" -w -t 60 \
  -o "-p $PORT -k $FOLDER -c listen_addresses=127.0.0.1 -c fsync=$FSYNC -c max_connections=300 -c autovacuum=off" \
  start >/dev/null
echo ready
cat >/dev/null
"$BIN/pg_ctl" -D "$DATA" -m immediate -w stop >/dev/null 2>&1 || true
if [ "$REMOVE" = yes ]; then rm -rf "$FOLDER"; fi
"#;

/// A server of our own.
pub struct Server {
    folder: PathBuf,
    port: u16,
    sync: Sync,
    script: Option<(Child, ChildStdin)>,
}

impl Server {
    pub fn start(sync: Sync) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("penstock-postgres-")
            .tempdir()
            .unwrap()
            .keep();
        if is_root() {
            let owner = Command::new("chown").arg("postgres:").arg(&folder).status();
            assert!(owner.unwrap().success(), "no user `postgres`: {}", how());
        }
        let mut server = Self {
            folder,
            port: 0,
            sync,
            script: None,
        };
        // Somebody else may take a port between our looking for it and the server's start.
        for _ in 0..5 {
            server.port = free_port();
            if server.try_start().is_ok() {
                return server;
            }
        }
        panic!("PostgreSQL does not start: {}", server.log());
    }

    /// Starts it again, with the data it had.
    pub fn restart(&mut self) {
        // Processes of a killed server may live on for a moment, and nobody says when they are gone.
        for _ in 0..100 {
            if self.try_start().is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        panic!("PostgreSQL does not start again: {}", self.log());
    }

    fn try_start(&mut self) -> Result<(), ()> {
        let bin = binaries().unwrap_or_else(|| panic!("PostgreSQL cannot be had: {}", how()));
        let mut command = match is_root() {
            false => Command::new("sh"),
            true => {
                let mut command = Command::new("setpriv");
                command.args([
                    "--reuid=postgres",
                    "--regid=postgres",
                    "--init-groups",
                    "sh",
                ]);
                command
            }
        };
        let mut child = command
            .args(["-c", SCRIPT])
            .env("BIN", bin)
            .env("FOLDER", &self.folder)
            .env("DATA", self.folder.join("data"))
            .env("PORT", self.port.to_string())
            .env("FSYNC", if self.sync == Sync::On { "on" } else { "off" })
            .env("REMOVE", "yes")
            .env("LC_ALL", "C")
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let mut line = String::new();
        let _ = BufReader::new(child.stdout.take().unwrap()).read_line(&mut line);
        if line.trim() == "ready" {
            self.script = Some((child, stdin));
            return Ok(());
        }
        drop(stdin);
        let _ = child.wait();
        Err(())
    }

    /// Kills the server as a loss of power would, as far as it can tell.
    pub fn kill(&mut self) {
        let pid = std::fs::read_to_string(self.folder.join("data/postmaster.pid")).unwrap();
        let pid = pid.lines().next().unwrap().to_owned();
        let killed = Command::new("kill").args(["-9", &pid]).status();
        assert!(killed.unwrap().success());
        // Its script must not tidy up: end it before it sees its input close.
        if let Some((mut script, stdin)) = self.script.take() {
            script.kill().unwrap();
            script.wait().unwrap();
            drop(stdin);
        }
    }

    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    fn log(&self) -> String {
        let mut text = String::new();
        for name in ["data.initdb", "data.log"] {
            if let Ok(mut file) = std::fs::File::open(self.folder.join(name)) {
                let _ = file.read_to_string(&mut text);
            }
        }
        text
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some((mut script, stdin)) = self.script.take() {
            drop(stdin);
            let _ = script.wait();
        } else {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }
}

fn how() -> String {
    format!(
        "install it (Debian: scripts/setup.sh stack), or name a server with {URL}=postgres://…, or leave out what needs it with {SKIP}=postgres"
    )
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|me| std::os::unix::fs::MetadataExt::uid(&me) == 0)
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Where the server's programs are: Debian keeps them out of the path.
fn binaries() -> Option<PathBuf> {
    let has = |folder: &Path| {
        ["initdb", "pg_ctl", "postgres"]
            .iter()
            .all(|name| folder.join(name).exists())
    };
    let packaged = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten();
    let mut packaged: Vec<PathBuf> = packaged
        .filter_map(|version| Some(version.ok()?.path().join("bin")))
        .filter(|folder| has(folder))
        .collect();
    packaged.sort();
    let path = std::env::var_os("PATH").unwrap_or_default();
    packaged
        .pop()
        .or_else(|| std::env::split_paths(&path).find(|folder| has(folder)))
}

/// The server that all tests of this process share: its URL without a database.
fn shared() -> &'static str {
    static SERVER: OnceLock<(String, Option<Server>)> = OnceLock::new();
    let (url, _) = SERVER.get_or_init(|| match std::env::var(URL) {
        Ok(url) => (url, None),
        // Never dropped: its script ends it when this process has gone.
        Err(_) => {
            let server = Server::start(Sync::Off);
            (server.url("postgres"), Some(server))
        }
    });
    url
}

/// A database of its own for one test; dropped at its end.
pub struct Database {
    maintenance: String,
    name: String,
}

impl Database {
    pub async fn new() -> Self {
        let url = tokio::task::spawn_blocking(shared).await.unwrap();
        Self::on(url, "ENCODING 'UTF8' TEMPLATE template0").await
    }

    /// On a server of one's own, or with other properties.
    pub async fn on(maintenance: &str, properties: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("penstock_test_{}_{count}", std::process::id());
        let database = Self {
            maintenance: maintenance.to_owned(),
            name,
        };
        database
            .run(format!("DROP DATABASE IF EXISTS {}", database.name))
            .await;
        database
            .run(format!("CREATE DATABASE {} {properties}", database.name))
            .await;
        database
    }

    pub async fn with(properties: &str) -> Self {
        let url = tokio::task::spawn_blocking(shared).await.unwrap();
        Self::on(url, properties).await
    }

    async fn run(&self, sql: String) {
        let options: PgConnectOptions = self.maintenance.parse().unwrap();
        let mut connection = options.connect().await.unwrap_or_else(|error| {
            panic!(
                "the test's PostgreSQL cannot be reached ({error}): {}",
                how()
            )
        });
        sqlx::query(AssertSqlSafe(sql))
            .execute(&mut connection)
            .await
            .unwrap();
        connection.close().await.unwrap();
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn url(&self) -> String {
        let (base, query) = match self.maintenance.split_once('?') {
            Some((base, query)) => (base, format!("?{query}")),
            None => (self.maintenance.as_str(), String::new()),
        };
        let (server, _) = base.rsplit_once('/').unwrap();
        format!("{server}/{}{query}", self.name)
    }

    /// A connection past the store.
    pub async fn connect(&self) -> PgConnection {
        self.url()
            .parse::<PgConnectOptions>()
            .unwrap()
            .connect()
            .await
            .unwrap()
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let sql = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name);
        let maintenance = self.maintenance.clone();
        // A runtime cannot wait for another within itself.
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async {
                let options: PgConnectOptions =
                    maintenance.parse().map_err(std::io::Error::other)?;
                let connecting = options.connect();
                let mut connection = connecting.await.map_err(std::io::Error::other)?;
                let dropping = sqlx::query(AssertSqlSafe(sql)).execute(&mut connection);
                dropping.await.map_err(std::io::Error::other).map(|_| ())
            })
        });
        let _ = dropping.join();
    }
}
