//! A private home directory for the binary under test, and results of running it.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use super::fake::FakeServer;

/// An empty home directory, so that no settings of the machine leak into a test.
pub struct Home {
    pub dir: tempfile::TempDir,
}

impl Home {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir }
    }

    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
        for name in [
            "PENSTOCK_SERVER",
            "PENSTOCK_TOKEN",
            "PENSTOCK_CONFIG",
            "PENSTOCK_KEY",
        ] {
            command.env_remove(name);
        }
        command
            .args(words)
            .env("XDG_DATA_HOME", self.dir.path())
            .env("HOME", self.dir.path())
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, words: &[&str]) -> CommandResult {
        CommandResult::of(self.command(words).output().unwrap())
    }

    pub fn run_with(&self, server: &FakeServer, words: &[&str]) -> CommandResult {
        let mut command = self.command(words);
        command.env("PENSTOCK_SERVER", &server.url);
        CommandResult::of(command.output().unwrap())
    }
}

#[derive(Debug)]
pub struct CommandResult {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl CommandResult {
    pub fn of(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

pub const AUTOSCALE: &str = "
apiVersion: penstock/v1
kind: Autoscale
spec:
  target: {endpoint: iris, deployment: blue}
  profiles:
  - name: default
    capacity: {min: 1, max: 4, default: 1}
  - name: office-hours
    schedule: {cron: '0 9 * * Mon-Fri', duration: 9h, timeZone: Europe/Paris}
    capacity: {min: 2, max: 8, default: 2}
";

pub const DEPLOYMENT: &str = "
apiVersion: penstock/v1
kind: Deployment
metadata: {name: blue, endpoint: iris}
spec: {backend: simulated, instanceType: cpu-small}
";

pub const ENDPOINT: &str = "
apiVersion: penstock/v1
kind: Endpoint
metadata: {name: iris}
spec: {traffic: {blue: 100}}
";

pub fn all_documents() -> String {
    [AUTOSCALE, DEPLOYMENT, ENDPOINT].join("---")
}
