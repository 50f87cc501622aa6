//! Whether a deployment can serve: what is said of failures, and what is done about them.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{
    DataFolder, Penstock, deployment_document, endpoint_document, eventually, scorer,
};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/e2e/model.py");
const PATH: &str = "/v1/endpoints/iris/deployments/blue";

async fn create(penstock: &Penstock, document: &Value) {
    penstock
        .put("/v1/endpoints/iris", &endpoint_document("iris"))
        .await;
    penstock.put(PATH, document).await;
    let traffic = json!({"traffic": {"blue": 100}});
    penstock.put("/v1/endpoints/iris/traffic", &traffic).await;
}

/// All events of these types, in order.
async fn events(penstock: &Penstock, types: &[&str]) -> Vec<Value> {
    let mut found = Vec::new();
    let mut after = 0;
    loop {
        let page = penstock
            .get(&format!("/v1/events?after={after}&limit=1000"))
            .await;
        let items = page["items"].as_array().unwrap();
        let Some(last) = items.last() else {
            return found;
        };
        after = last["position"].as_u64().unwrap();
        let wanted = |event: &&Value| types.contains(&event["type"].as_str().unwrap());
        found.extend(items.iter().filter(wanted).cloned());
    }
}

fn id(event: &Value) -> &str {
    event["data"]["id"].as_str().unwrap()
}

fn position(event: &Value) -> u64 {
    event["position"].as_u64().unwrap()
}

/// Milliseconds since 1970.
fn time(event: &Value) -> i64 {
    let time: contract::Timestamp = event["time"].as_str().unwrap().parse().unwrap();
    time.millis()
}

/// The value of a metric of iris/blue, of the sample with this label.
async fn metric(penstock: &Penstock, name: &str, label: &str) -> f64 {
    let response = penstock.api(Method::GET, "/metrics").send().await.unwrap();
    let text = response.text().await.unwrap();
    let labels = [r#"endpoint="iris""#, r#"deployment="blue""#, label];
    let mut samples = text.lines().filter(|line| {
        line.starts_with(&format!("{name}{{")) && labels.iter().all(|label| line.contains(label))
    });
    let (_, value) = samples.next().unwrap().rsplit_once(' ').unwrap();
    assert_eq!(samples.next(), None, "{name} {label}");
    value.parse().unwrap()
}

fn kill(instance: &Value) {
    let pid = instance["pid"].as_u64().unwrap().to_string();
    std::process::Command::new("kill")
        .args(["-9", &pid])
        .status()
        .unwrap();
}

/// A program that can be deleted: the example scorer behind a script.
fn write_program(path: &Path) {
    let script = format!("#!/bin/sh\nexec {} \"$@\"\n", scorer());
    std::fs::write(path, script).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[tokio::test]
async fn a_deployment_whose_program_is_gone_is_not_available_and_says_why() {
    let folder = DataFolder::new();
    let elsewhere = tempfile::tempdir().unwrap();
    let program = elsewhere.path().join("model");
    write_program(&program);
    let penstock = Penstock::start(&folder).await;
    let mut document = deployment_document("iris", "blue", 1);
    document["spec"]["command"][0] = json!(program);
    create(&penstock, &document).await;
    penstock.until_ready_instances("iris", "blue", 1).await;
    let available = penstock.get(PATH).await["status"]["available"].clone();
    assert_eq!(
        (&available["status"], &available["reason"]),
        (&json!("True"), &json!("Ready"))
    );

    std::fs::remove_file(&program).unwrap();
    kill(&penstock.instances("iris", "blue", "ready").await[0]);
    let failing = eventually("the deployment to be failing", || async {
        let status = penstock.get(PATH).await["status"].clone();
        let message = status["available"]["message"].as_str()?.to_owned();
        // The first failure is the end of the instance that ran.
        (message.contains("cannot be run")).then_some(status)
    })
    .await;
    let available = &failing["available"];
    assert_eq!(
        (&available["status"], &available["reason"]),
        (&json!("False"), &json!("Failing"))
    );
    assert!(available["since"].is_string(), "{available:#}");
    let message = available["message"].as_str().unwrap();
    assert!(
        message.starts_with("0 of 1 instance is ready; "),
        "{message}"
    );
    assert!(message.contains(program.to_str().unwrap()), "{message}");
    assert_eq!(failing["provisioningState"], "Succeeded");

    let shown = penstock.cli(&["get", "deployments", "iris"]).await;
    let table = String::from_utf8(shown.stdout).unwrap();
    assert!(table.contains("Failing"), "{table}");
    let notices = String::from_utf8(shown.stderr).unwrap();
    assert!(
        notices.contains("iris/blue is Failing: 0 of 1"),
        "{notices}"
    );
    assert!(notices.contains(program.to_str().unwrap()), "{notices}");

    let described = penstock.cli(&["describe", "deployment", "iris/blue"]).await;
    let described = String::from_utf8(described.stdout).unwrap();
    let shown = described.split("newest failure:").collect::<Vec<_>>();
    for (part, words) in shown.iter().zip(["reason: Failing", "cannot be run"]) {
        assert!(part.contains(words), "{words}: {described}");
    }
    assert_eq!(shown.len(), 2, "{described}");

    let failures = eventually("the number of failures in a row", || async {
        let failures = metric(&penstock, "penstock_failures_in_a_row", "").await;
        (failures >= 2.0).then_some(failures)
    })
    .await;
    let failed = events(&penstock, &["instance.failed"]).await;
    assert!(failures <= failed.len() as f64, "{failed:#?}");
    for (reason, expected) in [
        ("Ready", 0.0),
        ("Degraded", 0.0),
        ("Starting", 0.0),
        ("Failing", 1.0),
        ("ScaledToZero", 0.0),
    ] {
        let label = format!("reason=\"{reason}\"");
        let value = metric(&penstock, "penstock_deployment_condition", &label).await;
        assert_eq!(value, expected, "{reason}");
    }

    let file = elsewhere.path().join("blue.yaml");
    std::fs::write(&file, document.to_string()).unwrap();
    let waited = penstock
        .cli(&[
            "apply",
            "-f",
            file.to_str().unwrap(),
            "--wait",
            "--timeout",
            "1s",
        ])
        .await;
    let errors = String::from_utf8(waited.stderr).unwrap();
    assert_eq!(waited.status.code(), Some(1), "{errors}");
    assert!(
        errors.contains("Failing: 0 of 1 instance is ready"),
        "{errors}"
    );
    assert!(errors.contains(program.to_str().unwrap()), "{errors}");
    penstock.verify().await;
}

#[tokio::test]
async fn a_crash_loop_beside_a_healthy_sibling_backs_off() {
    const FAILURES: usize = 4;
    let folder = DataFolder::new();
    let elsewhere = tempfile::tempdir().unwrap();
    let penstock = Penstock::start(&folder).await;
    let mut document = deployment_document("iris", "blue", 2);
    // Room for one.
    let script = format!(
        "mkdir {}/taken || exit 3; exec {} --host {{host}} --port {{port}}",
        elsewhere.path().display(),
        scorer()
    );
    document["spec"]["command"] = json!(["sh", "-c", script]);
    create(&penstock, &document).await;
    let failed = eventually("some failures in a row", || async {
        let failed = events(&penstock, &["instance.failed"]).await;
        (failed.len() >= FAILURES).then_some(failed)
    })
    .await;
    let available = penstock.get(PATH).await["status"]["available"].clone();
    assert_eq!(
        (&available["status"], &available["reason"]),
        (&json!("True"), &json!("Degraded"))
    );
    let sibling = penstock.instances("iris", "blue", "ready").await;
    assert_eq!(sibling.len(), 1, "{sibling:#?}");
    let warned = || -> Vec<u64> {
        let log = penstock.log();
        let lines = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let of_failures = lines.filter(|line| {
            let message = line["fields"]["message"].as_str().unwrap_or_default();
            line["level"] == "WARN" && message == "instances fail"
        });
        of_failures
            .filter_map(|line| line["fields"]["failures"].as_u64())
            .collect()
    };
    eventually("the last failure to be logged", || async {
        warned().contains(&4).then_some(())
    })
    .await;
    assert_eq!(warned(), [1, 2, 4]);

    let requested = events(&penstock, &["instance.requested"]).await;
    for (number, failed) in failed.iter().take(FAILURES - 1).enumerate() {
        let next = requested
            .iter()
            .find(|one| position(one) > position(failed));
        let waited = time(next.unwrap()) - time(failed);
        assert!(
            waited >= 1000 << number,
            "{waited} ms after failure {}",
            number + 1
        );
    }
    // One for each that failed, and the sibling.
    let failures = events(&penstock, &["instance.failed"]).await.len();
    assert!(requested.len() <= failures + 2, "{requested:#?}");
    penstock.verify().await;
}

/// A deployment of the test server with these arguments.
fn model(instances: u32, arguments: &[&str]) -> Value {
    let mut document = deployment_document("iris", "blue", instances);
    let command = ["python3", MODEL, "{port}"].iter().chain(arguments);
    document["spec"]["command"] = command.copied().collect();
    document["spec"]["readinessProbe"] = json!({"path": "/health", "period": "100ms"});
    document
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_that_fail_liveness_are_replaced_one_by_one_and_their_requests_end() {
    let folder = DataFolder::new();
    let elsewhere = tempfile::tempdir().unwrap();
    let sick = elsewhere.path().join("sick");
    let penstock = Penstock::start(&folder).await;
    let mut document = model(2, &["--sick", sick.to_str().unwrap()]);
    document["spec"]["livenessProbe"] =
        json!({"path": "/live", "period": "100ms", "failureThreshold": 2});
    document["spec"]["requestSettings"]["timeout"] = json!("30s");
    create(&penstock, &document).await;
    penstock.until_ready_instances("iris", "blue", 2).await;
    let key = penstock.key("iris").await;
    let before = penstock.instances("iris", "blue", "ready").await;

    let slow = || async {
        let url = format!("{}/endpoints/iris/score/wait?seconds=4", penstock.gateway);
        let sent = penstock.http.post(url).bearer_auth(&key).send().await;
        sent.unwrap().status().as_u16()
    };
    let sicken = async {
        let line =
            "penstock_inflight_requests{endpoint=\"iris\",deployment=\"blue\",role=\"live\"} 4\n";
        eventually("requests in flight on both", || async {
            let metrics = penstock.http.get(format!("{}/metrics", penstock.control));
            let text = metrics.send().await.unwrap().text().await.unwrap();
            text.contains(line).then_some(())
        })
        .await;
        let pids: Vec<String> = before.iter().map(|one| one["pid"].to_string()).collect();
        std::fs::write(&sick, pids.join(" ")).unwrap();
    };
    let (a, b, c, d, ()) = tokio::join!(slow(), slow(), slow(), slow(), sicken);
    assert_eq!([a, b, c, d], [200; 4]);
    eventually("both to be replaced", || async {
        let ready = penstock.instances("iris", "blue", "ready").await;
        let is_new = |one: &Value| before.iter().all(|old| old["id"] != one["id"]);
        let draining = penstock.instances("iris", "blue", "draining").await;
        (ready.len() == 2 && ready.iter().all(is_new) && draining.is_empty()).then_some(())
    })
    .await;

    let draining = events(&penstock, &["instance.draining"]).await;
    let [first, second] = draining.as_slice() else {
        panic!("{draining:#?}")
    };
    assert_eq!(first["data"]["reason"], "unhealthy", "{first:#}");
    let requested = events(&penstock, &["instance.requested"]).await;
    let removals = events(&penstock, &["instance.removal-requested"]).await;
    let ready = events(&penstock, &["instance.ready"]).await;
    for drained in [first, second] {
        let removal = removals.iter().find(|one| id(one) == id(drained)).unwrap();
        let replacement = requested
            .iter()
            .find(|one| position(one) > position(drained));
        let (asked, removed) = (position(replacement.unwrap()), position(removal));
        // The replacement need not wait for the requests in flight, which the removal waits for.
        assert!(position(drained) < asked, "{draining:#?}");
        assert!(
            asked < removed || drained == second,
            "{requested:#?} {removals:#?}"
        );
    }
    // The first two were ready at the beginning.
    assert!(
        position(&ready[2]) < position(second),
        "{ready:#?} {draining:#?}"
    );
    penstock.verify().await;
}

#[tokio::test]
async fn without_a_liveness_probe_only_readiness_is_probed() {
    // For longer than the period that a liveness probe has by default.
    const PROBES: usize = 120;
    let folder = DataFolder::new();
    let elsewhere = tempfile::tempdir().unwrap();
    let asked = elsewhere.path().join("asked");
    let penstock = Penstock::start(&folder).await;
    create(&penstock, &model(1, &["--asked", asked.to_str().unwrap()])).await;
    let paths = eventually("many probes", || async {
        let text = std::fs::read_to_string(&asked).unwrap_or_default();
        (text.lines().count() >= PROBES).then_some(text)
    })
    .await;
    let other = paths.lines().find(|path| *path != "/health");
    assert_eq!(other, None);
    assert_eq!(events(&penstock, &["instance.requested"]).await.len(), 1);
}
