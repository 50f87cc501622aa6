//! What a gateway is told at its start. Everything has a limit; the defaults are meant to be kept.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use runtime::descriptors::Descriptors;

/// Longest request head, request line and headers together; more is answered 431.
pub const HEAD_BYTES_MAX: usize = 32 * 1024;
/// Most headers of a request; more is answered 431.
pub const HEADERS_MAX: usize = 100;
/// Bodies up to this size with a known length are read whole before an instance is chosen: a slow
/// sender then holds no instance, and the request can be sent again where that is safe.
pub const REPLAY_BYTES_MAX: u64 = 64 * 1024;

#[derive(Clone, Debug)]
pub struct Config {
    /// Stable over restarts; routes deal out slots by it and frames carry it.
    pub id: String,
    /// Port 0 picks a free one.
    pub address: SocketAddr,
    /// Where the admin listener of this process answers, as a URL; others are told in frames.
    pub admin: Option<String>,
    /// Serving threads; each has its own runtime, listener and connections.
    pub threads: usize,
    /// Where `gateway-routes.json` is kept; none: nothing survives a restart.
    pub data: Option<PathBuf>,
    /// Endpoints are also found by host name, `{endpoint}.<domain>`.
    pub domain: Option<String>,
    /// Client connections at once, where there are descriptors for so many. Past it the one that has
    /// rested longest makes room; if none rests, new ones are refused.
    pub connections_max: usize,
    /// What there is for connections.
    pub descriptors: Descriptors,
    /// From the first byte of a request's head to its last, and from accept to the first byte.
    pub head_timeout: Duration,
    /// How long a client's connection may rest between requests.
    pub idle_timeout: Duration,
    /// How long a client may take none of the answer's bytes.
    pub write_timeout: Duration,
    pub connect_timeout: Duration,
    /// How long the deletion of an endpoint is remembered, so that an older update that comes late
    /// does not bring it back.
    pub deleted_kept: Duration,
    /// How long requests in flight may go on after the order to stop.
    pub grace: Duration,
}

impl Config {
    /// A gateway with an id and an address, and the defaults for the rest.
    pub fn new(id: impl Into<String>, address: SocketAddr) -> Self {
        Self {
            id: id.into(),
            address,
            admin: None,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            data: None,
            domain: None,
            connections_max: 10_000,
            descriptors: Descriptors::default(),
            head_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(75),
            write_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(1),
            deleted_kept: Duration::from_secs(15 * 60),
            grace: Duration::from_secs(30),
        }
    }
}
