//! What control is told at its start.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use contract::own_secrets::OwnSecrets;
use runtime::descriptors::Descriptors;

/// The file in the data directory that tells clients where the server is.
pub const CLIENT_FILE: &str = "client.json";
/// The file in the data directory with the key that opens sealed secrets.
pub const SEAL_FILE: &str = "seal.key";

#[derive(Clone, Debug)]
pub struct ControlConfig {
    /// Where the API listens; port 0 picks a free one.
    pub listen: SocketAddr,
    /// Where `client.json` and `seal.key` are kept.
    pub data: PathBuf,
    /// Where the key is that opens sealed secrets: `env:NAME` or `file:PATH`. Replicas must share one.
    /// None: `seal.key` in the data directory, made on the first start.
    pub seal_key: Option<String>,
    /// Which of several replicas this is; it stands in the name of the token in `client.json`. None:
    /// there is only one.
    pub replica: Option<String>,
    /// The gateway's address as clients see it, such as `http://127.0.0.1:8080`.
    pub gateway: Option<String>,
    pub limits: Limits,
    /// What this process has its own secrets from: documents that refer to it are refused.
    pub own: OwnSecrets,
    /// Whom to tell when connections cannot be accepted.
    pub descriptors: Descriptors,
}

/// What clients can take of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Open connections; more wait until one of these is closed.
    pub connections: usize,
    /// Event streams and readers of logs at the same time; more are refused. Fewer than connections, so
    /// that short requests always find one.
    pub streams: usize,
    /// From the opening of a connection, or the end of the answer before, to the end of a request's head.
    pub head: Duration,
    /// From the end of a request's head to the end of its body.
    pub body: Duration,
    /// How long a client may read nothing of an answer.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 512,
            streams: 128,
            head: Duration::from_secs(30),
            body: Duration::from_secs(30),
            stall: Duration::from_secs(30),
        }
    }
}
