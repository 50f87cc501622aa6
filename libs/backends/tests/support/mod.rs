//! A tiny model server for tests: the test program itself, run with the name of a test that only serves,
//! so that there is no other program to build or find.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::env;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use backends::StartSpec;
use contract::ids::InstanceId;
use contract::resources::{EnvValue, SecretRef};

/// The test in each test program that acts as the server.
pub const SERVER_TEST: &str = "the_tiny_server";

/// How a server behaves, set through its environment.
#[derive(Clone, Debug, Default)]
pub struct Behaviour {
    env: BTreeMap<String, EnvValue>,
}

impl Behaviour {
    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        let value = EnvValue::Plain(value.to_string());
        self.env.insert(format!("TINY_{name}"), value);
        self
    }

    pub fn with_secret(mut self, name: &str, reference: &str) -> Self {
        let secret_ref = reference.to_owned();
        self.env
            .insert(name.to_owned(), EnvValue::Secret(SecretRef { secret_ref }));
        self
    }
}

pub fn start_spec(id: &str, generation: u64, behaviour: &Behaviour) -> StartSpec {
    let program = env::current_exe().unwrap();
    let spec = serde_json::json!({
        "backend": "process", "instanceType": "t",
        "command": [program, "--exact", SERVER_TEST, "--ignored", "--nocapture", "{port}"],
        "readinessProbe": {"path": "/ready", "period": "20ms", "timeout": "2s", "failureThreshold": 1500},
        "livenessProbe": {"path": "/live", "period": "20ms", "timeout": "2s", "failureThreshold": 5},
    });
    let mut start = StartSpec {
        id: InstanceId::from(id.to_owned()),
        generation,
        deployment: "iris/blue".into(),
        spec: serde_json::from_value(spec).unwrap(),
    };
    start.spec.env = behaviour.env.clone();
    start
        .spec
        .env
        .insert("TINY_SERVER".into(), EnvValue::Plain("1".into()));
    start
}

fn setting<T: std::str::FromStr>(name: &str) -> Option<T> {
    env::var(format!("TINY_{name}")).ok()?.parse().ok()
}

/// Runs the server; call it in the test named [`SERVER_TEST`]. Returns at once unless run as the server.
pub fn serve() {
    if env::var_os("TINY_SERVER").is_none() {
        return;
    }
    println!("instance {}", env::var("PENSTOCK_INSTANCE").unwrap());
    if let Some(millis) = setting("EXIT_AFTER_MS") {
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(millis));
            std::process::exit(setting("EXIT_CODE").unwrap_or(0));
        });
    }
    if setting::<u32>("IGNORE_TERM").is_some() {
        ignore_term();
    }
    if setting::<u32>("FAREWELL").is_some() {
        say_farewell();
    }
    if setting::<u32>("GRANDCHILD").is_some() {
        spawn_grandchild();
    }
    if setting::<u32>("CHATTER").is_some() {
        thread::spawn(|| {
            for n in 0_u64.. {
                println!("line {n} {}", "x".repeat(100));
                thread::sleep(Duration::from_micros(100));
            }
        });
    }
    if let Some(millis) = setting("START_DELAY_MS") {
        thread::sleep(Duration::from_millis(millis));
    }
    let port = env::args().next_back().unwrap();
    assert_eq!(env::var("PORT").as_ref(), Ok(&port));
    let listener = match setting::<u32>("WORKER") {
        Some(_) => inherited_listener(),
        None => {
            let host = setting("HOST").unwrap_or_else(|| env::var("PENSTOCK_HOST").unwrap());
            TcpListener::bind(format!("{host}:{port}")).unwrap()
        }
    };
    if setting::<u32>("LEADER").is_some() && setting::<u32>("WORKER").is_none() {
        lead(listener);
    }
    let further = setting::<String>("FURTHER").unwrap_or_default();
    let further = further.split(',').filter(|address| !address.is_empty());
    let _further: Vec<_> = further.map(|a| TcpListener::bind(a).unwrap()).collect();
    if let Some(folder) = setting::<String>("FOLDER") {
        let socket = std::os::unix::net::UnixListener::bind(format!("{folder}/socket"));
        std::mem::forget(socket.unwrap());
    }
    match setting::<String>("ESCAPES").as_deref() {
        Some("child") => spawn_in_session(),
        Some("listening") => spawn_escaping(listener.try_clone().ok(), false),
        Some(output) => spawn_escaping(None, output == "kept"),
        None => {}
    }
    static SICK: AtomicBool = AtomicBool::new(false);
    for stream in listener.incoming() {
        thread::spawn(move || {
            let stream = stream.unwrap();
            let mut lines = BufReader::new(&stream).lines();
            let first = lines.next().unwrap().unwrap();
            while lines.next().unwrap().unwrap() != "" {}
            let status = match first.split(' ').nth(1).unwrap() {
                "/ready" if setting::<u32>("FAIL_READINESS").is_some() => 503,
                "/ready" | "/live" if SICK.load(Ordering::SeqCst) => 500,
                "/sick" => {
                    SICK.store(true, Ordering::SeqCst);
                    200
                }
                "/burn" => burn(),
                "/missing" => 404,
                "/exit" => exit_soon(),
                "/orphan" => end_parent(),
                "/slow" => answer_late(),
                _ => 200,
            };
            let _ = (&stream).write_all(
                format!("HTTP/1.1 {status} x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                    .as_bytes(),
            );
        });
    }
}

fn burn() -> u16 {
    let begin = Instant::now();
    let mut memory = vec![1_u8; 20 << 20];
    while begin.elapsed() < Duration::from_millis(300) {
        memory
            .iter_mut()
            .for_each(|byte| *byte = byte.wrapping_mul(3));
    }
    std::mem::forget(memory);
    200
}

fn ignore_term() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let kind = tokio::signal::unix::SignalKind::terminate();
    let signals = runtime.block_on(async { tokio::signal::unix::signal(kind) });
    // The handler lasts as long as the program.
    std::mem::forget((runtime, signals));
}

/// On SIGTERM, says so a little later and exits.
fn say_farewell() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let kind = tokio::signal::unix::SignalKind::terminate();
    let mut signals = {
        let _context = runtime.enter();
        tokio::signal::unix::signal(kind).unwrap()
    };
    thread::spawn(move || {
        runtime.block_on(signals.recv());
        thread::sleep(Duration::from_millis(300));
        match setting::<u32>("WORKER") {
            Some(_) => println!("farewell of the child"),
            None => println!("farewell"),
        }
        std::process::exit(0);
    });
}

/// Lets a child serve, which ignores SIGTERM, and waits for it.
fn lead(listener: TcpListener) -> ! {
    let mut child = Command::new(env::current_exe().unwrap())
        .args(env::args().skip(1))
        .env("TINY_WORKER", "1")
        .env("TINY_IGNORE_TERM", "1")
        .stdin(OwnedFd::from(listener))
        .spawn()
        .unwrap();
    child.wait().unwrap();
    std::process::exit(0)
}

fn inherited_listener() -> TcpListener {
    let socket = std::io::stdin().as_fd().try_clone_to_owned();
    socket.unwrap().into()
}

fn end_parent() -> u16 {
    let parent = std::os::unix::process::parent_id().to_string();
    let status = Command::new("kill").args(["-9", &parent]).status();
    assert!(status.unwrap().success());
    200
}

/// Takes a while to answer, and exits afterwards.
fn answer_late() -> u16 {
    println!("answering late");
    thread::sleep(Duration::from_secs(1));
    exit_soon()
}

/// Spawns a child in a session of its own, with an empty environment and without output.
fn spawn_in_session() {
    let child = Command::new("setsid")
        .args(["env", "-i", "sleep", "600"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    println!("grandchild {}", child.id());
    std::mem::forget(child);
}

/// Spawns a process in the same group that outlives its parent unless it is killed.
fn spawn_grandchild() {
    let child = Command::new("sleep").arg("600").spawn().unwrap();
    println!("grandchild {}", child.id());
    std::mem::forget(child);
}

/// Exits once the answer has been sent.
fn exit_soon() -> u16 {
    thread::spawn(|| {
        thread::sleep(Duration::from_millis(50));
        std::process::exit(5);
    });
    200
}

/// Spawns a process in a session of its own, with an empty environment, with our output or none, and with
/// this socket.
fn spawn_escaping(socket: Option<TcpListener>, keeps_output: bool) {
    let output = if keeps_output { "" } else { ">/dev/null 2>&1" };
    let script = format!("echo grandchild $$; exec sleep 600 {output}");
    let status = Command::new("setsid")
        .args(["--fork", "env", "-i", "sh", "-c", &script])
        .stdin(socket.map_or_else(Stdio::null, |socket| OwnedFd::from(socket).into()))
        .status();
    assert!(status.unwrap().success());
}

/// Sends a request to a server for its side effect.
pub fn call(address: &str, path: &str) {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut first = String::new();
    BufReader::new(stream).read_line(&mut first).unwrap();
    assert!(first.starts_with("HTTP/1.1 200"), "{first}");
}

pub fn is_running(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .unwrap()
            .trim_start()
            .starts_with('Z')
    })
}
