//! Server processes that end with this one, and temporary folders for them.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long a server may take to start or to stop, on a slow and busy machine.
const TIMEOUT: Duration = Duration::from_secs(90);

const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Attempts to start: a chosen port may be taken before it is used.
const ATTEMPTS: usize = 3;

/// Starts a server; each attempt chooses new ports.
pub fn start_on_free_ports<T>(name: &str, mut start: impl FnMut() -> Result<T, String>) -> T {
    let mut why = String::new();
    for _ in 0..ATTEMPTS {
        match start() {
            Ok(server) => return server,
            Err(reason) => why = reason,
        }
    }
    panic!("{name} did not start: {why}");
}

/// A script that runs servers, shared with `make stack-up`.
pub fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../scripts/stack")
        .join(name)
}

/// Runs a script, which must succeed.
pub fn must_run(name: &str, arguments: &[&str]) {
    let output = Command::new(script(name)).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Runs a script; returns whether it succeeded.
pub fn succeeds(name: &str, arguments: &[&str]) -> bool {
    let mut command = Command::new(script(name));
    command.args(arguments).stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.status().unwrap().success()
}

/// A free port. Another process may take it before it is used.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

type SpawnRequest = (Command, mpsc::Sender<io::Result<Child>>);

/// Spawns a process from a thread that lives as long as this program. The parent-death signal refers to
/// the spawning thread, and a test's thread ends with the test.
pub fn spawn(command: Command) -> Child {
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<SpawnRequest>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, requests) = mpsc::channel::<SpawnRequest>();
        thread::spawn(move || {
            for (mut command, answer) in requests {
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(sender)
    });
    let (answer, child) = mpsc::channel();
    let spawner = spawner.lock().unwrap_or_else(PoisonError::into_inner);
    spawner.send((command, answer)).unwrap();
    child.recv().unwrap().unwrap()
}

/// A folder that is removed on drop, or soon after this program has ended.
pub struct TempFolder {
    path: PathBuf,
    /// Removes the folder when its standard input, which only we hold open, is closed.
    cleaner: Child,
}

impl TempFolder {
    pub fn create_in(parent: &Path, name: &str) -> Self {
        // Not inside the repository: PostgreSQL may run as a user without access to it.
        let folder = tempfile::Builder::new()
            .prefix(&format!("penstock-{name}-"))
            .tempdir_in(parent)
            .unwrap();
        let path = folder.keep();
        // Readable by the user that PostgreSQL runs as.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&path, mode).unwrap();
        let mut command = Command::new("bash");
        command.args([
            "-c",
            r#"trap "" INT TERM HUP; cat; for i in {1..50}; do rm -rf "$0" && exit; sleep 0.2; done"#,
        ]);
        command.arg(&path).stdin(Stdio::piped());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Self {
            path,
            cleaner: command.spawn().unwrap(),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        drop(self.cleaner.stdin.take());
        let _ = self.cleaner.wait();
    }
}

/// A server process, which may be stopped.
#[derive(Default)]
pub struct Server {
    child: Mutex<Option<Child>>,
}

impl Server {
    pub fn start(&self, mut command: Command, output: &Path) {
        let file = std::fs::File::create(output).unwrap();
        command.stdin(Stdio::null());
        command.stdout(file.try_clone().unwrap()).stderr(file);
        *self.lock() = Some(spawn(command));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn id(&self) -> Option<u32> {
        self.lock().as_ref().map(Child::id)
    }

    /// Polls until `answers` returns true; returns false if the process ends or the timeout expires first.
    pub fn wait_until(&self, mut answers: impl FnMut() -> bool) -> bool {
        let deadline = Instant::now() + TIMEOUT;
        while !answers() {
            let mut child = self.lock();
            let ended = child
                .as_mut()
                .is_none_or(|child| child.try_wait().unwrap().is_some());
            if ended || Instant::now() > deadline {
                return false;
            }
            drop(child);
            thread::sleep(POLL_INTERVAL);
        }
        true
    }

    /// SIGKILL to the process and to its children; returns when all have ended.
    pub fn kill(&self) {
        let Some(mut child) = self.lock().take() else {
            return;
        };
        let children = children(child.id());
        let _ = child.kill();
        child.wait().unwrap();
        for id in &children {
            signal(*id, Signal::KILL);
        }
        wait_for_end(&children);
    }

    pub fn stop(&self, kind: Signal) {
        let Some(mut child) = self.lock().take() else {
            return;
        };
        signal(child.id(), kind);
        let deadline = Instant::now() + TIMEOUT;
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                let _ = child.kill();
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Sends a signal to the process and its children.
    pub fn signal(&self, kind: Signal) {
        let Some(id) = self.id() else { return };
        signal(id, kind);
        for id in children(id) {
            signal(id, kind);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn signal(id: u32, kind: Signal) {
    if let Some(pid) = Pid::from_raw(id as i32) {
        let _ = kill_process(pid, kind);
    }
}

fn children(parent: u32) -> Vec<u32> {
    let processes = procfs::process::all_processes().unwrap().flatten();
    processes
        .filter_map(|process| process.stat().ok())
        .filter(|stat| stat.ppid == parent as i32)
        .map(|stat| stat.pid as u32)
        .collect()
}

fn wait_for_end(ids: &[u32]) {
    let runs = |id: &u32| {
        procfs::process::Process::new(*id as i32)
            .and_then(|process| process.stat())
            .is_ok_and(|stat| stat.state != 'Z')
    };
    let deadline = Instant::now() + TIMEOUT;
    while ids.iter().any(runs) && Instant::now() < deadline {
        thread::sleep(POLL_INTERVAL);
    }
}
