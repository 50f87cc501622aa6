//! A process that has run out of descriptors: what it cannot do for an instance is not held against the
//! instance, and is done as soon as possible.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader, Lines, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use backends::process::{ProcessBackend, ProcessConfig, ResourceLimits};
use backends::{Backend, BackendError, ObservedPhase, StartSpec};
use contract::time::Span;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::{Behaviour, is_running, start_spec};
use tokio::task::JoinHandle;

/// Far longer than anything takes; reached only if a test fails.
const TIMEOUT: Duration = Duration::from_secs(60);

const DATA: &str = "LIMITED_DATA";
const START: &str = "LIMITED_START";
const LIMIT: u64 = 64;

#[test]
#[ignore = "the server that other tests start"]
fn the_tiny_server() {
    support::serve();
}

/// Reads one command per line from stdin, and prints what happens.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the Penstock with few descriptors that other tests control"]
async fn limited_parent() {
    let (Ok(data), Ok(start)) = (std::env::var(DATA), std::env::var(START)) else {
        return;
    };
    let maximum = getrlimit(Resource::Nofile).maximum;
    let current = Some(LIMIT);
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
    let start: StartSpec = serde_json::from_str(&start).unwrap();
    let backend = open(Path::new(&data)).await;
    let mut changes = backend.watch();
    tokio::spawn(async move {
        while let Some(change) = changes.recv().await {
            let pid = change.pid.unwrap_or_default();
            match change.phase {
                ObservedPhase::Ready => println!("ready {pid}"),
                phase => println!("phase {phase:?}"),
            }
        }
    });
    let mut files = Vec::new();
    let mut exhaustion: Option<JoinHandle<()>> = None;
    println!("open");
    for command in std::io::stdin().lines() {
        match command.unwrap().as_str() {
            "take" => {
                files.extend(std::iter::from_fn(|| File::open("/dev/null").ok()));
                // Operations in progress release descriptors; take those as well.
                exhaustion = Some(tokio::spawn(keep_exhausted()));
                println!("taken");
            }
            "free" => {
                if let Some(exhaustion) = exhaustion.take() {
                    exhaustion.abort();
                    let _ = exhaustion.await;
                }
                files.clear();
            }
            "ensure" => match backend.ensure(start.clone()).await {
                Ok(()) => println!("ensured"),
                Err(BackendError::OutOfResources { .. }) => println!("ensure later"),
                Err(error) => println!("refused {error}"),
            },
            "remove" => match backend.remove(&start.id, 2, Span::from_secs(1)).await {
                Ok(()) => println!("removing"),
                Err(BackendError::OutOfResources { .. }) => println!("remove later"),
                Err(error) => println!("refused {error}"),
            },
            other => panic!("{other}"),
        }
    }
}

/// Takes every descriptor that is released.
async fn keep_exhausted() {
    let mut files = Vec::new();
    loop {
        files.extend(std::iter::from_fn(|| File::open("/dev/null").ok()));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn open(data: &Path) -> Arc<ProcessBackend> {
    let resource_limits = ResourceLimits {
        listener: Arc::new(|what, error| println!("lacks {what}: {error}")),
        ..ResourceLimits::default()
    };
    let config = ProcessConfig {
        resource_limits,
        ..ProcessConfig::new(data.into(), "node-1".into(), "/".into())
    };
    ProcessBackend::open(config).await.unwrap()
}

struct LimitedParent {
    child: Child,
    input: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
    instance: Option<u32>,
}

impl LimitedParent {
    fn start(data: &Path, start: &StartSpec) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "limited_parent", "--ignored", "--nocapture"])
            .env(DATA, data)
            .env(START, serde_json::to_string(start).unwrap())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut parent = Self {
            child,
            input,
            lines,
            instance: None,
        };
        parent.until("open");
        parent
    }

    fn send(&mut self, command: &str) {
        writeln!(self.input, "{command}").unwrap();
    }

    /// Returns the rest of the next line with this prefix. No line before it may report an exit.
    fn until(&mut self, beginning: &str) -> String {
        loop {
            let line = self.lines.next().unwrap().unwrap();
            if let Some(rest) = line.strip_prefix(beginning) {
                return rest.trim().to_owned();
            }
            let is_bad = line.contains("Exited") || line.starts_with("refused");
            assert!(!is_bad, "{line}");
        }
    }

    fn start_and_wait_ready(&mut self) -> u32 {
        self.send("ensure");
        self.until("ensured");
        let pid = self.until("ready").parse().unwrap();
        self.instance = Some(pid);
        pid
    }

    fn exhaust_descriptors(&mut self) {
        self.send("take");
        self.until("taken");
    }
}

impl Drop for LimitedParent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Even a failed test must not leave a process behind.
        if let Some(pid) = self.instance.filter(|pid| is_running(*pid)) {
            let pid = pid.to_string();
            let _ = Command::new("kill").args(["-9", &pid]).status();
        }
    }
}

fn until_gone(pid: u32) {
    let deadline = Instant::now() + TIMEOUT;
    while is_running(pid) {
        assert!(Instant::now() < deadline, "process {pid} runs on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn probes_that_cannot_be_made_do_not_fail_the_instance() {
    let data = tempfile::tempdir().unwrap();
    let mut parent = LimitedParent::start(data.path(), &start_spec("a", 1, &Behaviour::default()));
    let pid = parent.start_and_wait_ready();
    parent.exhaust_descriptors();
    // More often than the liveness probe may fail.
    for _ in 0..8 {
        parent.until("lacks a probe");
    }
    parent.send("free");
    parent.send("remove");
    parent.until("removing");
    parent.until("phase Removed");
    until_gone(pid);
}

#[test]
fn a_start_without_free_descriptors_is_retried_and_fails_nothing() {
    let data = tempfile::tempdir().unwrap();
    let mut parent = LimitedParent::start(data.path(), &start_spec("a", 1, &Behaviour::default()));
    parent.exhaust_descriptors();
    parent.send("ensure");
    parent.until("ensure later");
    parent.send("free");
    let pid = parent.start_and_wait_ready();
    parent.send("remove");
    parent.until("phase Removed");
    until_gone(pid);
}

#[test]
fn an_instance_is_ended_without_free_descriptors_and_reported_once_visible() {
    let data = tempfile::tempdir().unwrap();
    let ignores_term = Behaviour::default().with("IGNORE_TERM", 1);
    let mut parent = LimitedParent::start(data.path(), &start_spec("a", 1, &ignores_term));
    let pid = parent.start_and_wait_ready();
    parent.send("remove");
    parent.until("removing");
    parent.exhaust_descriptors();
    until_gone(pid);
    parent.until("lacks the end of an instance");
    parent.send("free");
    parent.until("phase Removed");
}

#[test]
fn a_removal_that_cannot_be_recorded_is_rejected_and_can_be_retried() {
    let data = tempfile::tempdir().unwrap();
    let mut parent = LimitedParent::start(data.path(), &start_spec("a", 1, &Behaviour::default()));
    let pid = parent.start_and_wait_ready();
    parent.exhaust_descriptors();
    parent.send("remove");
    parent.until("remove later");
    assert!(is_running(pid));
    parent.send("free");
    parent.send("remove");
    parent.until("removing");
    parent.until("phase Removed");
    until_gone(pid);
}
