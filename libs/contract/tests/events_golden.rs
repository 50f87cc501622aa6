//! Stored events stay readable forever: a golden file for each (type, version) of event. Files are never
//! edited by hand; `UPDATE_GOLDEN=1` writes missing ones, and the diff is reviewed.

use std::collections::BTreeMap;
use std::path::PathBuf;

use contract::events::{EVENT_TYPES, Event};
use contract::frame::{Measure, Role};
use serde_json::{Value, json};

fn golden_path(type_name: &str, version: u32) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join(format!("tests/golden/events/{type_name}.v{version}.json"))
}

/// Returns example data for each event type, as the current version writes it.
fn examples() -> BTreeMap<&'static str, Value> {
    let uid = "019a0000-0000-7000-8000-000000000001";
    let key = json!({"hash": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", "sealed": "bm9uY2U="});
    let endpoint_spec = json!({"auth": "key", "modelClientErrors": "good", "limits": {"requestBytesMax": 104857600}});
    let probe = |period: &str| json!({"path": "/", "initialDelay": "0s", "period": period, "timeout": "2s", "successThreshold": 1, "failureThreshold": 30});
    let deployment_spec = json!({
        "backend": "process", "instanceType": "cpu-small", "purchase": "on-demand",
        "command": ["./scorer", "--port", "{port}"],
        "env": {"LEVEL": "2", "DB": {"secretRef": "file:/run/secrets/db"}}, "instances": 1,
        "requestSettings": {"timeout": "5s", "maxConcurrentRequestsPerInstance": 1, "maxQueueWait": "500ms"},
        "readinessProbe": probe("1s"), "livenessProbe": probe("5s")
    });
    let autoscale_spec = json!({
        "target": {"endpoint": "iris", "deployment": "blue"}, "mode": "live",
        "cooldown": {"out": "30s", "in": "5m"}, "stabilization": {"out": "0s", "in": "5m"}, "missing": "hold",
        "profiles": [{"name": "default", "priority": 0, "capacity": {"min": 1, "max": 20, "default": 2}, "rules": [{
            "name": "busy",
            "metric": {"name": "concurrency", "window": "30s", "aggregation": "average", "perInstance": true},
            "when": "> 4", "scale": {"direction": "out", "by": "50%", "cooldown": "30s"}
        }]}]
    });
    let id = "iris-blue-000000000001";
    let ended = json!({"id": id, "reason": "exited", "exitCode": 1});
    let zero = json!({"success": 2, "modelClientError": 0, "modelServerError": 0, "timeout": 0, "unreachable": 0,
        "unavailable": 0, "internal": 0, "tooManyPending": 0, "refused": 0, "clientLeft": 0});
    let source = json!({"kind": "gateway", "id": "gateway"});
    let minute = "2026-11-22T10:00:00.000Z";
    let counted = json!([{"source": source, "boot": uid, "first": 0, "last": 59}]);
    let usage = json!({
        "deployment": "blue", "deploymentUid": uid, "minute": minute,
        "slices": [{"byRole": {
            "live": {"outcomes": zero, "arrivals": 2, "statusClasses": {"2xx": 2}, "inFlightUs": 2500, "queuedUs": 0, "requestBytes": 64,
                "responseBytes": 128, "oldestInFlightUsMax": 1250, "atOrBelow": {"latency": {"300000": 2}, "time_to_first_token": {"100000": 1}},
                "tokens": {"input": 900, "cached": 300, "output": 250}},
            "batch": {"outcomes": zero, "arrivals": 2, "inFlightUs": 2500, "queuedUs": 0, "requestBytes": 64, "responseBytes": 128}},
            "byInstance": {id: {"requests": 2, "busyUs": 2400, "inFlightUs": {"live": 2500}, "cpuUs": 1900, "memoryBytesMax": 4194304,
                "measuredUs": 10000000, "gpuUs": 700, "gpuMemoryBytesMax": 2147483648u64}}}],
        "counted": counted
    });
    let idle = json!({
        "deployment": "blue", "deploymentUid": uid, "minute": minute, "minutes": 25,
        "slices": [{"byRole": {}, "byInstance": {id: {"requests": 0, "busyUs": 0, "cpuUs": 1900, "memoryBytesMax": 4194304, "measuredUs": 1500000000}}}],
        "counted": [{"source": source, "boot": uid, "first": 60, "last": 1559}]
    });
    let decision: Value = serde_json::from_str(include_str!("golden/decision.json"))
        .expect("the decision example is JSON");
    let of_deployment = json!({"deployment": "blue"});
    BTreeMap::from([
        (
            "endpoint.created",
            json!({"uid": uid, "name": "iris", "labels": {"team": "a"}, "spec": endpoint_spec, "keys": {"primary": key, "secondary": key}}),
        ),
        (
            "endpoint.updated",
            json!({"labels": {}, "spec": endpoint_spec}),
        ),
        (
            "endpoint.traffic-set",
            json!({"traffic": {"blue": 90, "green": 10}, "mirror": {}}),
        ),
        (
            "endpoint.key-regenerated",
            json!({"slot": "primary", "key": key}),
        ),
        (
            "endpoint.state-changed",
            json!({"state": "Succeeded", "reason": ""}),
        ),
        ("endpoint.deletion-requested", json!({})),
        ("endpoint.deleted", json!({})),
        (
            "deployment.created",
            json!({"uid": uid, "deployment": "blue", "labels": {}, "spec": deployment_spec}),
        ),
        (
            "deployment.updated",
            json!({"deployment": "blue", "revision": 2, "labels": {}, "spec": deployment_spec}),
        ),
        (
            "deployment.state-changed",
            json!({"deployment": "blue", "state": "Failed", "reason": "5 starts failed"}),
        ),
        ("deployment.deletion-requested", of_deployment.clone()),
        ("deployment.deleted", of_deployment.clone()),
        (
            "autoscale.set",
            json!({"deployment": "blue", "revision": 1, "labels": {}, "spec": autoscale_spec}),
        ),
        ("autoscale.removed", of_deployment.clone()),
        (
            "autoscale.pinned",
            json!({"deployment": "blue", "pin": {"instances": 3, "until": "2026-11-22T11:00:00.000Z"}}),
        ),
        ("autoscale.released", of_deployment),
        (
            "autoscale.pause-set",
            json!({"deployment": "blue", "pause": {"scaleIn": true, "scaleOut": false}}),
        ),
        ("scaling.decided", decision),
        (
            "clock.stepped",
            json!({"recorded": "2026-11-22T11:00:00.000Z", "clock": "2026-11-22T10:00:00.000Z"}),
        ),
        (
            "instance.requested",
            json!({
                "id": id, "generation": 1, "deployment": {"endpoint": "iris", "deployment": "blue"}, "deploymentUid": uid,
                "revision": 1, "node": "node-1", "decision": uid, "reason": "scale-out", "spec": deployment_spec
            }),
        ),
        (
            "instance.draining",
            json!({"id": id, "reason": "scale-in", "decision": uid, "timeout": "15s"}),
        ),
        (
            "instance.removal-requested",
            json!({"id": id, "generation": 2, "node": "node-1", "grace": "10s", "reason": "scale-in"}),
        ),
        (
            "instance.started",
            json!({"id": id, "generation": 1, "address": "127.0.0.1:4001", "pid": 4242, "adopted": false}),
        ),
        ("instance.ready", json!({"id": id})),
        (
            "instance.starting",
            json!({"id": id, "detail": "probe `/` answers 404: set `readinessProbe.path`"}),
        ),
        (
            "instance.unready",
            json!({"id": id, "reason": "the probe was answered 503"}),
        ),
        (
            "instance.unhealthy",
            json!({"id": id, "reason": "its liveness probe `/live` failed 3 times in a row; the last: it answered 500"}),
        ),
        ("instance.failed", ended.clone()),
        ("instance.stopped", ended),
        ("usage.closed", usage),
        ("usage.corrected", idle),
        (
            "usage.gap",
            json!({"minute": "2026-11-22T10:00:00.000Z", "source": source, "boot": uid, "first": 3, "last": 4}),
        ),
        (
            "access.granted",
            json!({"name": "ci", "role": "operator", "hash": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", "expires": null}),
        ),
        ("access.revoked", json!({"name": "ci"})),
        (
            "member.joined",
            json!({"source": {"kind": "node", "id": "n1"}, "address": "http://10.0.0.7:7071", "backends": ["process"]}),
        ),
        ("member.left", json!({"source": source, "reason": "silent"})),
        (
            "event.skipped",
            json!({"consumer": "autoscaler", "position": 17, "reason": "a release wrote it that is gone"}),
        ),
        (
            "consumer.unparked",
            json!({"consumer": "autoscaler", "reason": "mended in this release"}),
        ),
    ])
}

#[test]
fn every_type_is_written_as_in_its_golden_file() {
    let examples = examples();
    for (type_name, version) in EVENT_TYPES {
        let path = golden_path(type_name, *version);
        let example = examples
            .get(type_name)
            .unwrap_or_else(|| panic!("no example of {type_name}"));
        let event = Event::decode(type_name, *version, &example.to_string())
            .unwrap_or_else(|error| panic!("{type_name}: {error}"));
        let text = format!(
            "{}\n",
            serde_json::to_string_pretty(&event.data().unwrap()).unwrap()
        );
        if std::env::var_os("UPDATE_GOLDEN").is_some() && !path.exists() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &text).unwrap();
        }
        let golden = std::fs::read_to_string(&path)
            .unwrap_or_else(|_| panic!("{} is missing: run with UPDATE_GOLDEN=1", path.display()));
        assert_eq!(
            text, golden,
            "{type_name} v{version} is written differently: raise its version"
        );
    }
}

#[test]
fn every_golden_file_of_any_version_is_readable() {
    let folder = golden_path("x", 1).parent().unwrap().to_owned();
    let mut read = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap();
        let (type_name, version) = stem.rsplit_once(".v").unwrap();
        let data = std::fs::read_to_string(&path).unwrap();
        Event::decode(type_name, version.parse().unwrap(), &data)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        read += 1;
    }
    assert!(read >= EVENT_TYPES.len());
}

#[test]
fn usage_of_version_1_is_unchanged_in_version_2() {
    for type_name in ["usage.closed", "usage.corrected"] {
        let golden = std::fs::read_to_string(golden_path(type_name, 1)).unwrap();
        let event = Event::decode(type_name, 1, &golden).unwrap();
        assert_eq!(event.version(), 2);
        // Byte for byte, so that rows of read models do not change.
        let text = serde_json::to_string_pretty(&event.data().unwrap()).unwrap();
        assert_eq!(text + "\n", golden);
    }
}

#[test]
fn thresholds_of_version_1_are_upcast_to_the_latency_of_live_requests() {
    let golden = std::fs::read_to_string(golden_path("usage.closed", 1)).unwrap();
    let mut data: Value = serde_json::from_str(&golden).unwrap();
    let slice = &mut data["slices"][0];
    slice["atOrBelow"] = json!({"300000": 2, "100000": 1});
    let mut without_requests = slice.clone();
    without_requests["byRole"] = json!({});
    data["slices"]
        .as_array_mut()
        .unwrap()
        .push(without_requests);
    let Event::UsageClosed(minute) = Event::decode("usage.closed", 1, &data.to_string()).unwrap()
    else {
        panic!("unexpected event")
    };
    let counts = BTreeMap::from([(100_000, 1), (300_000, 2)]);
    for (slice, arrivals) in minute.slices.iter().zip([2, 0]) {
        let live = &slice.by_role[&Role::LIVE];
        assert_eq!(live.arrivals, arrivals);
        assert_eq!(
            live.at_or_below,
            BTreeMap::from([(Measure::LATENCY, counts.clone())])
        );
    }
}

#[test]
fn an_unknown_type_or_version_is_rejected_by_name() {
    let unknown = Event::decode("endpoint.exploded", 1, "{}")
        .unwrap_err()
        .to_string();
    assert!(unknown.contains("endpoint.exploded"), "{unknown}");
    let newer = Event::decode("endpoint.deleted", 99, "{}")
        .unwrap_err()
        .to_string();
    assert!(newer.contains("99"), "{newer}");
}

#[test]
fn the_liveness_probe_that_nobody_asked_for_in_version_1_is_none() {
    for type_name in [
        "deployment.created",
        "deployment.updated",
        "instance.requested",
    ] {
        let golden = std::fs::read_to_string(golden_path(type_name, 1)).unwrap();
        let spec = |data: &str, version| {
            let event = Event::decode(type_name, version, data).unwrap();
            event.data().unwrap()["spec"].clone()
        };
        assert_eq!(
            spec(&golden, 1)["livenessProbe"],
            Value::Null,
            "{type_name}"
        );
        let mut asked: Value = serde_json::from_str(&golden).unwrap();
        asked["spec"]["livenessProbe"]["path"] = json!("/live");
        let kept = spec(&asked.to_string(), 1);
        assert_eq!(kept["livenessProbe"]["path"], "/live", "{type_name}");
        let explicit = spec(&golden, 2);
        assert_eq!(explicit["livenessProbe"]["period"], "10s", "{type_name}");
    }
}
