//! The configuration of control.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use contract::own_secrets::OwnSecrets;
use runtime::descriptors::Descriptors;

/// The file in the data folder that tells clients where the server is.
pub const CLIENT_FILE: &str = "client.json";
/// The file in the data folder that holds the key for sealed secrets.
pub const SEAL_FILE: &str = "seal.key";

#[derive(Clone, Debug)]
pub struct ControlConfig {
    /// Where the API listens; port 0 picks a free one.
    pub listen: SocketAddr,
    /// The directory of `client.json` and `seal.key`.
    pub data: PathBuf,
    /// A reference to the key for sealed secrets: `env:NAME` or `file:PATH`. Replicas must share one key.
    /// None: `seal.key` in the data folder, created on the first start.
    pub seal_key: Option<String>,
    /// The name of this replica, part of the name of the token in `client.json`. None: there is only
    /// one replica.
    pub replica: Option<String>,
    /// The node in this process, if there can be no other. None: nodes come and go.
    pub only_node: Option<String>,
    /// The gateway's address as clients see it, such as `http://127.0.0.1:8080`.
    pub gateway: Option<String>,
    pub limits: Limits,
    /// The sources of this process's own secrets. Documents that refer to them are rejected.
    pub own_secrets: OwnSecrets,
    /// Notified when connections cannot be accepted for want of file descriptors.
    pub descriptors: Descriptors,
}

/// Limits on what clients may use of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Maximum open connections; further ones wait until one closes.
    pub connections: usize,
    /// Maximum concurrent event and log streams; further ones are rejected. Must be below `connections`,
    /// so that short requests always get one.
    pub streams: usize,
    /// From when a connection opens, or the previous response ends, to the end of a request's head.
    pub head: Duration,
    /// From the end of a request's head to the end of its body.
    pub body: Duration,
    /// How long a client may stop reading a response.
    pub write_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 512,
            streams: 128,
            head: Duration::from_secs(30),
            body: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
        }
    }
}
