//! One server process: started so that it ends with this one, killed, paused, and its folder removed.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long a server may take to start or to end, on a slow and busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

const ASK_EVERY: Duration = Duration::from_millis(50);

/// Ports are chosen before they are used, so somebody else may be quicker.
const ATTEMPTS: usize = 3;

/// Starts a server on ports that are chosen anew each time.
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

/// The scripts that know how servers are run, shared with `make stack-up`.
pub fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../scripts/stack")
        .join(name)
}

/// Runs a script to its end, which must be a good one.
pub fn must_run(name: &str, arguments: &[&str]) {
    let output = Command::new(script(name)).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Runs a script to its end.
pub fn succeeds(name: &str, arguments: &[&str]) -> bool {
    let mut command = Command::new(script(name));
    command.args(arguments).stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.status().unwrap().success()
}

/// A port that nobody listens on now. Somebody else may take it before it is used.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

type Job = (Command, mpsc::Sender<io::Result<Child>>);

/// Starts a process from a thread that lives as long as this program: "my parent has ended" means
/// the thread that started it, and a test's thread ends with the test.
pub fn spawn(command: Command) -> Child {
    static KEEPER: OnceLock<Mutex<mpsc::Sender<Job>>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        thread::spawn(move || {
            for (mut command, answer) in jobs {
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(sender)
    });
    let (answer, child) = mpsc::channel();
    let keeper = keeper.lock().unwrap_or_else(PoisonError::into_inner);
    keeper.send((command, answer)).unwrap();
    child.recv().unwrap().unwrap()
}

/// A folder that is removed when this value is dropped, or soon after this program has ended.
pub struct Folder {
    path: PathBuf,
    /// Waits for the end of its input, which only we hold open.
    sweeper: Child,
}

impl Folder {
    pub fn below(parent: &Path, what: &str) -> Self {
        // Not below the repository: PostgreSQL may run as a user who is not let in there.
        let folder = tempfile::Builder::new()
            .prefix(&format!("penstock-{what}-"))
            .tempdir_in(parent)
            .unwrap();
        let path = folder.keep();
        // Readable by the user whom PostgreSQL runs as.
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
            sweeper: command.spawn().unwrap(),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(self.sweeper.stdin.take());
        let _ = self.sweeper.wait();
    }
}

/// A server that may be down now.
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

    /// Asks until the answer is yes; false if the process has ended before that.
    pub fn wait_until(&self, mut answers: impl FnMut() -> bool) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while !answers() {
            let mut child = self.lock();
            let ended = child
                .as_mut()
                .is_none_or(|child| child.try_wait().unwrap().is_some());
            if ended || Instant::now() > deadline {
                return false;
            }
            drop(child);
            thread::sleep(ASK_EVERY);
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

    pub fn stop(&self, how: Signal) {
        let Some(mut child) = self.lock().take() else {
            return;
        };
        signal(child.id(), how);
        let deadline = Instant::now() + PATIENCE;
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                let _ = child.kill();
            }
            thread::sleep(ASK_EVERY);
        }
    }

    /// To the process and to its children.
    pub fn signal(&self, what: Signal) {
        let Some(id) = self.id() else { return };
        signal(id, what);
        for id in children(id) {
            signal(id, what);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn signal(id: u32, what: Signal) {
    if let Some(pid) = Pid::from_raw(id as i32) {
        let _ = kill_process(pid, what);
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
    let deadline = Instant::now() + PATIENCE;
    while ids.iter().any(runs) && Instant::now() < deadline {
        thread::sleep(ASK_EVERY);
    }
}
