//! The data plane: routes client requests to the instances of deployments, and measures them.
//!
//! **Owns** no durable state except `gateway-routes.json`, a copy of the last routes. **In**: route
//! updates from the bus, client requests. **Out**: requests to instances, one frame per bucket and
//! second to the bus, Prometheus metrics.
//!
//! Invariants
//! - A request sees a single consistent snapshot of the routes; a lower revision never replaces a
//!   higher one.
//! - An instance never has more requests from this gateway than its slots, across all threads, and
//!   gets no new ones after a frame has reported the revision that drains it.
//! - A request is sent at most twice, and twice only if no model can have seen the first attempt or
//!   the request is idempotent (see `send`).
//! - Clients are admitted only while there are descriptors for them and for as many connections to
//!   instances. Running out of descriptors is reported as the gateway's own failure and never
//!   counts against an instance.
//! - A response that is cut, for whatever reason, cannot be taken for a complete one: a stream of
//!   server-sent events ends with an error event, any other with a reset; each is counted by reason.
//! - A client that disconnects frees its slot and closes the connection to the instance.
//! - Every request that reached a deployment is in exactly one frame as an arrival and in exactly
//!   one as an outcome, unless its deployment does not count its method: then in none.
//!
//! **Frames.** At the end of each wall-clock second every bucket gets a frame, even an empty one.
//! When a request waits and its deployment has no instance, the bucket gets a frame immediately: it
//! has the same `start` as the second's last frame, and its `length_us` is the part of the second
//! that it covers. So several frames of one source and bucket may share a `start`; their lengths
//! add up to the second, their sequences are consecutive, and their counts are to be added.
//! Requests that are refused before a deployment is chosen (400, 401, 404) are in no frame, since a
//! frame has no field for them; they are in `penstock_requests_total` with an empty deployment.
//! `at_or_below` counts good responses only: an immediate refusal is not a fast response. The time
//! that requests spend on an instance is counted by the worker threads, like that of the
//! deployment, so it is exact even when several run on an instance at once. The age of the oldest
//! request counts from its arrival, like latency, whether it is queued or being served; the time that its
//! client is waited for is left out, since a slow upload says nothing about the model.
//!
//! **Threads.** Each worker thread has its own runtime, listener (`SO_REUSEPORT`), connections and
//! pools; one more thread follows the routes and builds the frames.

mod admission;
mod arrival_times;
mod body;
mod client;
mod config;
mod cut;
mod early_frames;
mod exchange;
mod forwarded;
mod framing;
mod guard;
mod hop_by_hop;
mod in_flight;
mod instance;
mod limits;
mod listen;
mod meter;
mod metrics;
mod outcome;
mod paths;
mod pool;
mod proxy;
mod receive;
mod refuse;
mod reply;
mod router;
mod saved_routes;
mod send;
mod service;
mod shard;
mod socket;
mod split;
mod target;
mod timer;
mod upload_buffers;
mod upstream;
mod wake_coalescer;
mod worker;

pub use config::Config;
pub use saved_routes::has_saved_routes;
pub use service::{Deps, Error, Gateway, run};
