//! Tools that read `/openapi.json`: a generator of clients, and a tester of APIs.

use std::path::{Path, PathBuf};
use std::process::Output;

use tokio::process::Command;

use crate::support::{DataFolder, Penstock, endpoint_document};

const GENERATOR: &str = "openapi-python-client==0.29.1";
const TESTER: &str = "schemathesis==4.32.5";
/// Fixed, so that a failure can be reproduced.
const SEED: &str = "1";

/// Runs Python, with the programs of its environment on its PATH.
async fn python(interpreter: &Path, folder: &Path, arguments: &[&str]) -> Output {
    let mut paths = vec![interpreter.parent().unwrap().to_owned()];
    let path = std::env::var_os("PATH").unwrap_or_default();
    paths.extend(std::env::split_paths(&path));
    let mut command = Command::new(interpreter);
    command
        .env("PATH", std::env::join_paths(paths).unwrap())
        .current_dir(folder)
        .args(arguments);
    command.output().await.unwrap()
}

#[track_caller]
fn assert_success(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    text
}

/// Prints the name and the authentication of an endpoint, through the generated client.
const CALL: &str = "
import sys
from client import AuthenticatedClient
from client.api.default import get_endpoint
api = AuthenticatedClient(base_url=sys.argv[1], token=sys.argv[2])
endpoint = get_endpoint.sync('iris', client=api)
print(endpoint.metadata.name, endpoint.spec.auth)
";

#[tokio::test]
async fn a_generated_client_reads_an_endpoint() {
    let Some(interpreter) = servers::python(&[GENERATOR]) else {
        return;
    };
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    penstock
        .put("/v1/endpoints/iris", &endpoint_document("iris"))
        .await;
    let document = format!("{}/openapi.json", penstock.control);
    let arguments = [
        "-m",
        "openapi_python_client",
        "generate",
        "--url",
        &document,
        "--output-path",
        "client",
        "--meta",
        "none",
    ];
    let generated = python(&interpreter, folder.path(), &arguments).await;
    assert_success(&generated);
    let arguments = ["-c", CALL, &penstock.control, &penstock.token];
    let called = python(&interpreter, folder.path(), &arguments).await;
    assert_eq!(assert_success(&called), "iris key\n");
}

#[tokio::test]
async fn generated_requests_find_no_deviation_from_the_openapi_document() {
    let Some(interpreter) = servers::python(&[TESTER]) else {
        return;
    };
    let folder = DataFolder::new();
    let penstock = Penstock::start(&folder).await;
    let document = format!("{}/openapi.json", penstock.control);
    let authorization = format!("Authorization: Bearer {}", penstock.token);
    let config = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../schemas/schemathesis.toml")
        .display()
        .to_string();
    let arguments = [
        "-m",
        "schemathesis.cli",
        "--config-file",
        &config,
        "run",
        &document,
        "--header",
        &authorization,
        "--max-examples",
        "3",
        "--seed",
        SEED,
        "--generation-database",
        "none",
    ];
    let output = python(&interpreter, folder.path(), &arguments).await;
    assert_success(&output);
    penstock.verify().await;
}
