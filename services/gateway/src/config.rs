//! Configuration of a gateway. Everything has a limit; the defaults suit most installations.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use runtime::descriptors::Descriptors;

/// Maximum size of a request head (request line and headers); larger heads are answered with 431.
pub const HEAD_BYTES_MAX: usize = 32 * 1024;
/// Maximum number of request headers; more are answered with 431.
pub const HEADERS_MAX: usize = 100;
/// Bodies of known length up to this size are always read in full before an instance is chosen, however
/// much is buffered for others.
pub const SMALL_BODY_BYTES_MAX: u64 = 64 * 1024;

#[derive(Clone, Debug)]
pub struct Config {
    /// Stable across restarts: routes allocate slots by it, and frames carry it.
    pub id: String,
    /// Port 0 picks a free port.
    pub address: SocketAddr,
    /// URL of this process's admin listener, announced in frames.
    pub admin: Option<String>,
    /// Worker threads; each has its own runtime, listener and connections.
    pub threads: usize,
    /// Where `gateway-routes.json` is kept. `None`: the routes are not kept across restarts.
    pub data: Option<PathBuf>,
    /// Endpoints are also addressed by host name, `{endpoint}.<domain>`.
    pub domain: Option<String>,
    /// Addresses of proxies that are believed what they say about the client. None by default.
    pub trusted_proxies: Vec<IpNet>,
    /// How much of a body is received before an instance is chosen: a slow sender occupies
    /// none until then, and a body that is no longer can be sent again where that is safe.
    pub upload_buffer_bytes: u64,
    /// Maximum number of client connections, if there are enough descriptors. At the limit, the
    /// connection that has been idle longest is closed for a new one; if none is idle, new ones are
    /// refused.
    pub connections_max: usize,
    /// Descriptors available for connections.
    pub descriptors: Descriptors,
    /// From the first byte of a request head to its last, and from accept to the first byte.
    pub head_timeout: Duration,
    /// How long a client connection may be idle between requests.
    pub idle_timeout: Duration,
    /// How long a client may go without reading any of the response.
    pub write_timeout: Duration,
    pub connect_timeout: Duration,
    /// How long the deletion of an endpoint is remembered, so that an older update that arrives
    /// late does not bring it back.
    pub deleted_retention: Duration,
    /// How long requests in flight may continue after shutdown begins.
    pub grace: Duration,
}

impl Config {
    /// Returns the default configuration with this id and address.
    pub fn new(id: impl Into<String>, address: SocketAddr) -> Self {
        Self {
            id: id.into(),
            address,
            admin: None,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            data: None,
            domain: None,
            trusted_proxies: Vec::new(),
            upload_buffer_bytes: 1 << 20,
            connections_max: 10_000,
            descriptors: Descriptors::default(),
            head_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(75),
            write_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(1),
            deleted_retention: Duration::from_secs(15 * 60),
            grace: Duration::from_secs(30),
        }
    }
}
