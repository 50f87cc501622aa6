//! Minutes of usage in version 1 of the event. Defined here because the types of `contract` are those of
//! the newest version.

use std::collections::BTreeMap;

use anyhow::Context;
use contract::events::Event;
use contract::frame::Source;
use contract::ids::{InstanceId, Name, Uid};
use contract::time::Timestamp;
use serde::Serialize;
use uuid::Uuid;

/// Name and version of the event.
pub const TYPE: (&str, u32) = ("usage.closed", 1);

const SLICES: usize = 6;
const SLICE_SECONDS: f64 = 10.0;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Minute {
    pub deployment: Name,
    pub deployment_uid: Uid,
    pub minute: Timestamp,
    slices: Vec<Slice>,
    pub counted: Vec<Range>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Slice {
    by_role: BTreeMap<&'static str, Counts>,
    by_instance: BTreeMap<InstanceId, OfInstance>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Counts {
    outcomes: Outcomes,
    arrivals: u64,
    in_flight_us: u64,
    queued_us: u64,
    request_bytes: u64,
    response_bytes: u64,
}

#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Outcomes {
    success: u64,
    model_client_error: u64,
    model_server_error: u64,
    timeout: u64,
    unreachable: u64,
    unavailable: u64,
    internal: u64,
    too_many_pending: u64,
    refused: u64,
    client_left: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct OfInstance {
    requests: u64,
    busy_us: u64,
    cpu_us: u64,
    memory_bytes_max: u64,
}

/// Frames of one source that were counted.
#[derive(Clone, Serialize)]
pub struct Range {
    pub source: Source,
    pub boot: Uuid,
    pub first: u64,
    pub last: u64,
}

/// The load of a deployment, averaged over ten seconds.
#[derive(Clone, Copy)]
pub struct Load {
    /// Requests in flight.
    pub concurrency: f64,
    /// Latency in seconds.
    pub latency: f64,
    /// Whether the requests are mirrored copies.
    pub is_mirrored: bool,
}

impl Load {
    /// Requests per second.
    pub fn rate(self) -> f64 {
        self.concurrency / self.latency
    }
}

impl Minute {
    /// The usage of the ready instances under these loads, one per slice.
    pub fn new(
        (deployment, deployment_uid): (Name, Uid),
        minute: Timestamp,
        loads: [Load; SLICES],
        ready: &[InstanceId],
        rng: &mut fastrand::Rng,
    ) -> Self {
        let slices = loads.map(|load| Slice::new(load, ready, rng));
        Self {
            deployment,
            deployment_uid,
            minute,
            slices: slices.into(),
            counted: Vec::new(),
        }
    }

    /// The data of the event.
    ///
    /// # Errors
    /// If this build cannot read the data, which means that this file is wrong.
    pub fn data(&self, is_first: bool) -> anyhow::Result<String> {
        let data = serde_json::to_string(self)?;
        if is_first {
            let (name, version) = TYPE;
            Event::decode(name, version, &data).context("usage of version 1")?;
        }
        Ok(data)
    }
}

impl Slice {
    fn new(load: Load, ready: &[InstanceId], rng: &mut fastrand::Rng) -> Self {
        let requests = arrivals(load.rate() * SLICE_SECONDS, rng);
        // Empty slices have no counts.
        if requests == 0 {
            return Self {
                by_role: BTreeMap::new(),
                by_instance: BTreeMap::new(),
            };
        }
        let is_one_of = |rng: &mut fastrand::Rng, of: u32| u64::from(rng.u32(0..of) == 0);
        let failed = is_one_of(rng, 60).min(requests);
        let refused = is_one_of(rng, 40) * (requests / 50);
        let served = requests as f64 * load.latency;
        let micros = |seconds: f64| (seconds * 1e6) as u64;
        let counts = Counts {
            outcomes: Outcomes {
                success: requests - failed,
                model_server_error: failed,
                too_many_pending: refused,
                ..Outcomes::default()
            },
            arrivals: requests + refused,
            in_flight_us: micros(served),
            queued_us: rng.u64(0..100) * requests,
            request_bytes: requests * rng.u64(400..2_000),
            response_bytes: requests * rng.u64(200..6_000),
        };
        let role = if load.is_mirrored { "shadow" } else { "live" };
        let used = ready.len().min(requests as usize).max(1);
        let busy = (served / used as f64).min(SLICE_SECONDS);
        let by_instance = ready.iter().take(used).map(|id| {
            let used = OfInstance {
                requests: requests / used as u64,
                busy_us: micros(busy),
                cpu_us: micros(busy * rng.f64()),
                memory_bytes_max: rng.u64(200..900) * 1024 * 1024,
            };
            (id.clone(), used)
        });
        Self {
            by_role: BTreeMap::from([(role, counts)]),
            by_instance: by_instance.collect(),
        }
    }
}

/// A random number of requests around the expected one; the variation matters for small numbers.
fn arrivals(expected: f64, rng: &mut fastrand::Rng) -> u64 {
    const CHANCES: u32 = 64;
    let chances = f64::from(CHANCES);
    if expected > chances / 2.0 {
        return (expected * (0.9 + 0.2 * rng.f64())).round() as u64;
    }
    (0..CHANCES)
        .filter(|_| rng.f64() * chances < expected)
        .count() as u64
}
