//! A process that has run out of descriptors: what it cannot do for an instance is no fault of the
//! instance, and is done as soon as it can be.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader, Lines, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use backends::process::{Means, ProcessBackend, ProcessConfig};
use backends::{Backend, BackendError, ObservedPhase, Order};
use contract::time::Span;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::{Behaviour, is_running, order};
use tokio::task::JoinHandle;

/// Far more than anything takes; reached only when a test fails.
const PATIENCE: Duration = Duration::from_secs(60);

const DATA: &str = "NARROW_DATA";
const ORDER: &str = "NARROW_ORDER";
const LIMIT: u64 = 64;

#[test]
#[ignore = "it is the server that the other tests start"]
fn the_tiny_server() {
    support::serve();
}

/// Does what it is told on its input, a word a line, and says what happens.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it is the Penstock with few descriptors that the other tests tell what to do"]
async fn a_narrow_parent() {
    let (Ok(data), Ok(order)) = (std::env::var(DATA), std::env::var(ORDER)) else {
        return;
    };
    let maximum = getrlimit(Resource::Nofile).maximum;
    let current = Some(LIMIT);
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
    let order: Order = serde_json::from_str(&order).unwrap();
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
    let mut taken = Vec::new();
    let mut starving: Option<JoinHandle<()>> = None;
    println!("open");
    for word in std::io::stdin().lines() {
        match word.unwrap().as_str() {
            "take" => {
                taken.extend(std::iter::from_fn(|| File::open("/dev/null").ok()));
                // What was under way gives back what it had; that is taken as well.
                starving = Some(tokio::spawn(starve()));
                println!("taken");
            }
            "free" => {
                if let Some(starving) = starving.take() {
                    starving.abort();
                    let _ = starving.await;
                }
                taken.clear();
            }
            "ensure" => match backend.ensure(order.clone()).await {
                Ok(()) => println!("ensured"),
                Err(BackendError::Lacking { .. }) => println!("ensure later"),
                Err(error) => println!("refused {error}"),
            },
            "remove" => match backend.remove(&order.id, 2, Span::from_secs(1)).await {
                Ok(()) => println!("condemned"),
                Err(BackendError::Lacking { .. }) => println!("remove later"),
                Err(error) => println!("refused {error}"),
            },
            other => panic!("{other}"),
        }
    }
}

/// Takes whatever anybody gives back.
async fn starve() {
    let mut taken = Vec::new();
    loop {
        taken.extend(std::iter::from_fn(|| File::open("/dev/null").ok()));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn open(data: &Path) -> Arc<ProcessBackend> {
    let means = Means {
        listener: Arc::new(|what, error| println!("lacks {what}: {error}")),
        ..Means::default()
    };
    let config = ProcessConfig {
        means,
        ..ProcessConfig::new(data.into(), "node-1".into(), "/".into())
    };
    ProcessBackend::open(config).await.unwrap()
}

struct Parent {
    child: Child,
    input: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
    instance: Option<u32>,
}

impl Parent {
    fn start(data: &Path, order: &Order) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_narrow_parent", "--ignored", "--nocapture"])
            .env(DATA, data)
            .env(ORDER, serde_json::to_string(order).unwrap())
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

    fn tell(&mut self, word: &str) {
        writeln!(self.input, "{word}").unwrap();
    }

    /// The rest of the next line that begins so. No line before it may tell of an end.
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

    fn ready(&mut self) -> u32 {
        self.tell("ensure");
        self.until("ensured");
        let pid = self.until("ready").parse().unwrap();
        self.instance = Some(pid);
        pid
    }

    fn take_all(&mut self) {
        self.tell("take");
        self.until("taken");
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // A failed test must leave nothing behind.
        if let Some(pid) = self.instance.filter(|pid| is_running(*pid)) {
            let pid = pid.to_string();
            let _ = Command::new("kill").args(["-9", &pid]).status();
        }
    }
}

fn until_gone(pid: u32) {
    let deadline = Instant::now() + PATIENCE;
    while is_running(pid) {
        assert!(Instant::now() < deadline, "process {pid} runs on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn an_instance_is_not_given_up_for_probes_that_we_cannot_make() {
    let data = tempfile::tempdir().unwrap();
    let mut parent = Parent::start(data.path(), &order("a", 1, &Behaviour::default()));
    let pid = parent.ready();
    parent.take_all();
    // More often than its liveness probe may fail.
    for _ in 0..8 {
        parent.until("lacks a probe");
    }
    parent.tell("free");
    parent.tell("remove");
    parent.until("condemned");
    parent.until("phase Removed");
    until_gone(pid);
}

#[test]
fn a_start_that_we_lack_the_means_for_is_made_later_and_fails_nobody() {
    let data = tempfile::tempdir().unwrap();
    let mut parent = Parent::start(data.path(), &order("a", 1, &Behaviour::default()));
    parent.take_all();
    parent.tell("ensure");
    parent.until("ensure later");
    parent.tell("free");
    let pid = parent.ready();
    parent.tell("remove");
    parent.until("phase Removed");
    until_gone(pid);
}

#[test]
fn an_instance_is_ended_without_a_descriptor_and_gone_when_that_can_be_seen() {
    let data = tempfile::tempdir().unwrap();
    let stubborn = Behaviour::default().with("IGNORE_TERM", 1);
    let mut parent = Parent::start(data.path(), &order("a", 1, &stubborn));
    let pid = parent.ready();
    parent.tell("remove");
    parent.until("condemned");
    parent.take_all();
    until_gone(pid);
    parent.until("lacks the end of an instance");
    parent.tell("free");
    parent.until("phase Removed");
}

#[test]
fn a_removal_that_cannot_be_recorded_is_told_and_made_when_it_can() {
    let data = tempfile::tempdir().unwrap();
    let mut parent = Parent::start(data.path(), &order("a", 1, &Behaviour::default()));
    let pid = parent.ready();
    parent.take_all();
    parent.tell("remove");
    parent.until("remove later");
    assert!(is_running(pid));
    parent.tell("free");
    parent.tell("remove");
    parent.until("condemned");
    parent.until("phase Removed");
    until_gone(pid);
}
