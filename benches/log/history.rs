//! A long log of realistic events.

#![allow(
    clippy::disallowed_methods,
    reason = "tests use the real clock and fresh ids"
)]

use std::collections::BTreeMap;

use contract::events::{EVENT_TYPES, Event};
use contract::ids::{EndpointKey, Position};
use contract::log::{StreamKind, StreamName};
use contract::time::Timestamp;
use store::{RawRecord, Store, append_raw};
use uuid::Uuid;

const ENDPOINTS: usize = 200;

/// Events per batch.
const BATCH: usize = 20_000;

/// Writes at least this many events into an empty store; returns how many.
pub async fn write(store: &Store, events: usize) -> u64 {
    let mut writer = Writer::new();
    writer.write(store, events).await;
    let count = writer.position;
    let bytes = writer.bytes / count;
    println!("{count} events of {ENDPOINTS} endpoints, {bytes} bytes of data each on average");
    count
}

/// The repeated sequence of an endpoint's events: (type, kind of stream).
const CYCLE: [(&str, StreamKind); 20] = {
    use StreamKind::{Instances, Node, Scaling, Usage};
    [
        ("scaling.decided", Scaling),
        ("instance.requested", Instances),
        ("instance.started", Node),
        ("instance.ready", Node),
        ("usage.closed", Usage),
        ("usage.closed", Usage),
        ("usage.closed", Usage),
        ("instance.unready", Node),
        ("instance.ready", Node),
        ("usage.closed", Usage),
        ("usage.closed", Usage),
        ("instance.unready", Node),
        ("instance.ready", Node),
        ("usage.closed", Usage),
        ("usage.closed", Usage),
        ("scaling.decided", Scaling),
        ("instance.draining", Instances),
        ("usage.closed", Usage),
        ("instance.removal-requested", Instances),
        ("instance.stopped", Node),
    ]
};

/// The current version of an event type.
fn version_of(name: &str) -> u32 {
    let known = EVENT_TYPES.iter().find(|(known, _)| *known == name);
    known.unwrap().1
}

struct Writer {
    templates: BTreeMap<&'static str, String>,
    prev: BTreeMap<u16, u64>,
    versions: BTreeMap<String, u64>,
    position: u64,
    bytes: u64,
}

impl Writer {
    fn new() -> Self {
        let folder = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../libs/contract/tests/golden/events"
        );
        let types = CYCLE.iter().map(|(name, _)| *name);
        let templates = types
            .chain(["endpoint.created", "deployment.created"])
            .map(|name| {
                let version = version_of(name);
                let file = format!("{folder}/{name}.v{version}.json");
                let text = std::fs::read_to_string(file).unwrap();
                let event = Event::decode(name, version, &text).unwrap();
                let data = event.data_json().unwrap();
                // All of the same incarnation.
                (
                    name,
                    data.replace(
                        "00000000-0000-0000-0000-000000000007",
                        "019a0000-0000-7000-8000-000000000001",
                    ),
                )
            });
        Self {
            templates: templates.collect(),
            prev: BTreeMap::new(),
            versions: BTreeMap::new(),
            position: 0,
            bytes: 0,
        }
    }

    fn event(&mut self, endpoint: usize, kind: StreamKind, name: &str, turn: usize) -> RawRecord {
        let key = EndpointKey::new(&format!("e{endpoint}").parse().unwrap());
        let stream = match kind {
            StreamKind::Node => StreamName::of_node(&key, "node-1"),
            kind => StreamName::of(kind, &key),
        };
        let minute = Timestamp::from_secs(1_700_000_000 / 60 * 60 + self.position as i64 * 60);
        let data = self.templates[name]
            .replace(
                "iris-blue-000000000001",
                &format!("e{endpoint}-blue-{turn:012}"),
            )
            .replace("\"iris\"", &format!("\"e{endpoint}\""))
            .replace(
                "\"2026-11-22T10:00:00.000Z\"",
                &serde_json::to_string(&minute).unwrap(),
            );
        self.position += 1;
        self.bytes += data.len() as u64;
        let version = self.versions.entry(stream.to_string()).or_default();
        *version += 1;
        let prev = self.prev.insert(key.bucket().0, self.position);
        RawRecord {
            position: Position(self.position),
            prev: Position(prev.unwrap_or(0)),
            prev_hash: None,
            bucket: key.bucket(),
            stream: stream.to_string(),
            version: *version,
            id: Uuid::now_v7().to_string(),
            type_name: name.to_owned(),
            type_version: version_of(name),
            time: minute,
            actor: "service:bench".to_owned(),
            data,
        }
    }

    async fn write(&mut self, store: &Store, events: usize) {
        let mut batch = Vec::new();
        for endpoint in 0..ENDPOINTS {
            batch.push(self.event(endpoint, StreamKind::Endpoint, "endpoint.created", 0));
            batch.push(self.event(endpoint, StreamKind::Endpoint, "deployment.created", 0));
        }
        for turn in 0.. {
            for (name, kind) in CYCLE {
                for endpoint in 0..ENDPOINTS {
                    batch.push(self.event(endpoint, kind, name, turn));
                }
            }
            let done = self.position as usize >= events;
            if batch.len() >= BATCH || done {
                append_raw(store, std::mem::take(&mut batch)).await.unwrap();
            }
            if done {
                return;
            }
        }
    }
}
