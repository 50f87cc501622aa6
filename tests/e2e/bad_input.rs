//! Refused requests change nothing.

use reqwest::{Method, StatusCode};
use serde_json::Value;

use crate::support::{DataFolder, Penstock, endpoint_document};

#[tokio::test]
async fn a_refused_document_names_the_field_and_changes_nothing() {
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    let before = penstock.get("/v1/events?after=0&limit=1000").await;
    let mut document = endpoint_document("iris");
    document["spec"]["traffic"] = serde_json::json!({"blue": 60});
    let refused = penstock
        .api(Method::PUT, "/v1/endpoints/iris")
        .json(&document)
        .send()
        .await
        .unwrap();
    assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
    assert_eq!(
        refused.headers()["content-type"],
        "application/problem+json"
    );
    let problem: Value = refused.json().await.unwrap();
    assert_eq!(
        problem["errors"][0]["pointer"], "/spec/traffic",
        "{problem:#}"
    );
    assert_eq!(penstock.get("/v1/events?after=0&limit=1000").await, before);
}
