//! Secrets of the server that its instances must not get.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{DataFolder, Penstock, deployment_document, endpoint_document, eventually};

const TOKEN: &str = "a token of this test and of no other installation";

#[tokio::test]
async fn an_instance_inherits_no_secrets_of_the_server() {
    let folder = DataFolder::new();
    let environment = [
        ("PENSTOCK_INTERNAL_TOKEN", "env:LC_OUR_TOKEN"),
        // A prefix that is otherwise inherited.
        ("LC_OUR_TOKEN", TOKEN),
        ("LC_ALL", "C.UTF-8"),
        ("PENSTOCK_TOKEN", TOKEN),
        ("PGPASSWORD", TOKEN),
        ("PGPASSFILE", "/nowhere/pgpass"),
        ("KAFKA_PASSWORD", TOKEN),
    ];
    let penstock = Penstock::start_in(&folder, &[], &environment).await;
    penstock.deploy("iris", "blue", 1).await;
    let instance = penstock.instances("iris", "blue", "ready").await.remove(0);
    let path = format!("/proc/{}/environ", instance["pid"]);
    let environ = String::from_utf8(std::fs::read(path).unwrap()).unwrap();
    assert!(environ.contains("LC_ALL=C.UTF-8"), "{environ}");
    assert!(!environ.contains(TOKEN), "{environ}");
    for name in ["PENSTOCK_INTERNAL_TOKEN", "PENSTOCK_TOKEN", "PGPASS"] {
        assert!(!environ.contains(name), "{environ}");
    }
    assert!(penstock.stop().await.success());
}

#[tokio::test]
async fn a_server_secret_is_refused_on_apply_and_through_a_link_by_the_node() {
    let folder = DataFolder::new();
    let outside = tempfile::tempdir().unwrap();
    let token = outside.path().join("token");
    std::fs::write(&token, TOKEN).unwrap();
    let reference = format!("file:{}", token.display());
    let penstock = Penstock::start_with(&folder, &["--internal-token", &reference]).await;
    penstock
        .put("/v1/endpoints/iris", &endpoint_document("iris"))
        .await;
    let path = "/v1/endpoints/iris/deployments/blue";
    let mut document = deployment_document("iris", "blue", 1);
    document["spec"]["env"] = json!({"DB": {"secretRef": reference}});
    let refused = penstock.api(Method::PUT, path).json(&document);
    let refused = refused.send().await.unwrap();
    assert_eq!(refused.status(), 400);
    let problem: Value = refused.json().await.unwrap();
    assert_eq!(problem["errors"][0]["pointer"], "/spec/env/DB/secretRef");

    let link = outside.path().join("link");
    std::os::unix::fs::symlink(&token, &link).unwrap();
    let reference = format!("file:{}", link.display());
    document["spec"]["env"] = json!({"DB": {"secretRef": reference}});
    penstock.put(path, &document).await;
    let failed = eventually("the deployment to fail", || async {
        let deployment = penstock.get(path).await;
        (deployment["status"]["provisioningState"] == "Failed").then_some(deployment)
    })
    .await;
    let status = failed["status"].to_string();
    assert!(status.contains("reserved for Penstock"), "{status}");
    assert!(!penstock.log().contains(TOKEN));
    assert!(!status.contains(TOKEN));
}
