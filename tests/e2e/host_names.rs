//! Endpoints by host name.

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::support::{DataFolder, Penstock};

/// Scores with this Host header; returns the status and the body.
async fn score_by_host(penstock: &Penstock, host: &str, key: &str) -> (StatusCode, String) {
    let response = penstock
        .http
        .post(format!("{}/score", penstock.gateway))
        .header("host", host)
        .bearer_auth(key)
        .json(&json!({"data": [[5.1, 3.5, 1.4, 0.2]]}))
        .send()
        .await
        .unwrap();
    (response.status(), response.text().await.unwrap())
}

#[tokio::test]
async fn an_endpoint_answers_at_its_name_under_the_domain_of_the_flag() {
    let folder = DataFolder::new();
    let flag = ["--gateway-domain", "models.example.com"];
    let penstock = Penstock::start_with(&folder, &flag).await;
    penstock.deploy("iris", "blue", 1).await;
    let key = penstock.key("iris").await;
    for host in ["iris.models.example.com", "iris.Models.Example.com:8080"] {
        let (status, body) = score_by_host(&penstock, host, &key).await;
        assert_eq!(status, StatusCode::OK, "{host}: {body}");
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["scores"].as_array().unwrap().len(), 1, "{body}");
    }
    for host in ["other.models.example.com", "iris.example.com", "iris"] {
        let (status, body) = score_by_host(&penstock, host, &key).await;
        assert_eq!(status, StatusCode::NOT_FOUND, "{host}: {body}");
    }
    let score = penstock.score("iris", &key).send().await.unwrap();
    assert_eq!(score.status(), StatusCode::OK);
}

#[tokio::test]
async fn the_domain_can_be_set_in_the_configuration_file() {
    let folder = DataFolder::new();
    let file = folder.path().join("penstock.conf");
    std::fs::write(&file, "gateway-domain: models.example.com\n").unwrap();
    let file = file.display().to_string();
    let penstock = Penstock::start_with(&folder, &["--config", &file]).await;
    penstock.deploy("iris", "blue", 1).await;
    let key = penstock.key("iris").await;
    let (status, body) = score_by_host(&penstock, "iris.models.example.com", &key).await;
    assert_eq!(status, StatusCode::OK, "{body}");
}
