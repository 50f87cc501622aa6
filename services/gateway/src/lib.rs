//! The data plane: routes requests of clients to instances of deployments, and measures them.
//!
//! **Owns** nothing durable but `gateway-routes.json`, a copy of the last routes. **In**: route
//! updates from the bus, requests from clients. **Out**: requests to instances, one frame per
//! bucket and second to the bus, Prometheus metrics.
//!
//! Invariants
//! - A request sees one whole snapshot of the routes; a lower revision never replaces a higher one.
//! - An instance never has more requests from this gateway than its slots, over all threads, and
//!   gets none after a frame has reported the revision that drains it.
//! - A request is sent at most twice, and twice only where the first cannot have been seen by a
//!   model or the method is idempotent (see `ask`).
//! - Clients are admitted only as far as there are descriptors for them and for as many connections
//!   to instances; a lack of ours is told as ours, and holds nothing against an instance.
//! - A client that leaves frees its slot and closes the connection to the instance.
//! - Every request that reached a deployment is in exactly one frame as an arrival and in exactly
//!   one as an outcome.
//!
//! **Frames.** A second on the clock is closed by one frame per bucket, also an empty one. When a
//! request waits and its deployment has no instance, the bucket gets a frame at once: it carries
//! the same `start` as the second's last frame will, and its `length_us` is the part of the second
//! that it covers. So several frames of one source and bucket may share a `start`; their lengths
//! add up to the second, their sequences follow each other, and their counts are to be added.
//! Requests that are refused before a deployment is chosen (400, 401, 404) are in no frame, since
//! a frame has no place for them; they are in `penstock_requests_total` with an empty deployment.
//! `at_or_below` counts good answers only: a refusal in no time is no fast answer. The time that requests
//! spend on an instance is counted by the threads, like that of the deployment, so that it is exact also
//! where several run on it at once. The age of the oldest request counts from its arrival, whether it
//! waits or is served.
//!
//! **Threads.** Each serving thread has its own runtime, listener (`SO_REUSEPORT`), connections and
//! pools; one more thread follows the routes and makes the frames.

mod admission;
mod arrivals;
mod ask;
mod body;
mod client;
mod config;
mod early;
mod exchange;
mod flight;
mod framing;
mod guard;
mod hop;
mod instance;
mod listen;
mod meter;
mod metrics;
mod outcome;
mod pool;
mod proxy;
mod receive;
mod refuse;
mod relay;
mod reply;
mod router;
mod saved;
mod service;
mod shard;
mod socket;
mod split;
mod target;
mod thread;
mod timer;
mod upstream;

pub use config::Config;
pub use saved::has_saved_routes;
pub use service::{Deps, Error, Gateway, run};
