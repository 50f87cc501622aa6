//! PostgreSQL with TLS and a password, on a real server: the store opens with the right settings, reports
//! what to change otherwise, and never reveals the password.

#![allow(clippy::unwrap_used)]

use std::sync::OnceLock;

use servers::{Postgres, USER};
use store::Store;

/// One server for all tests of this file.
async fn secured() -> Option<&'static Postgres> {
    static SHARED: OnceLock<Option<Postgres>> = OnceLock::new();
    let start = || SHARED.get_or_init(Postgres::start_secured).as_ref();
    tokio::task::spawn_blocking(start).await.unwrap()
}

/// The URL of an empty database, with a password and options.
fn url(postgres: &Postgres, password: &str, options: &str) -> String {
    let user = format!("{USER}@");
    let database = postgres.database();
    let url = database.replacen(&user, &format!("{USER}:{password}@"), 1);
    format!("{url}?{options}")
}

fn verified(postgres: &Postgres) -> String {
    let ca = postgres.secrets().ca.display();
    format!("sslmode=verify-full&sslrootcert={ca}")
}

async fn refusal(url: &str) -> String {
    Store::open(url).await.err().unwrap().to_string()
}

#[tokio::test]
async fn a_store_opens_with_the_right_password_over_verified_tls() {
    let Some(postgres) = secured().await else {
        return;
    };
    let password = &postgres.secrets().password;
    let store = Store::open(&url(postgres, password, &verified(postgres))).await;
    let store = store.unwrap();
    // Readers have connections of their own.
    assert_eq!(store.head().await.unwrap().0, 0);
    store.close().await;
}

#[tokio::test]
async fn a_wrong_password_is_reported_and_not_repeated() {
    let Some(postgres) = secured().await else {
        return;
    };
    let message = refusal(&url(postgres, "not-the-password", &verified(postgres))).await;
    assert!(
        message.contains("check the user and the password"),
        "{message}"
    );
    assert!(!message.contains("not-the-password"), "{message}");
}

#[tokio::test]
async fn the_error_for_an_unknown_authority_names_the_option_to_set() {
    let Some(postgres) = secured().await else {
        return;
    };
    let secrets = postgres.secrets();
    let options = format!(
        "sslmode=verify-full&sslrootcert={}",
        secrets.other_ca.display()
    );
    let message = refusal(&url(postgres, &secrets.password, &options)).await;
    assert!(message.contains("sslrootcert=PATH"), "{message}");
    assert!(!message.contains(&secrets.password), "{message}");
}

#[tokio::test]
async fn a_server_that_requires_tls_is_distinguished_from_a_wrong_password() {
    let Some(postgres) = secured().await else {
        return;
    };
    let password = &postgres.secrets().password;
    let message = refusal(&url(postgres, password, "sslmode=disable")).await;
    assert!(message.contains("the server requires TLS"), "{message}");
    assert!(!message.contains(password), "{message}");
}

#[tokio::test]
async fn a_server_without_tls_is_refused_if_tls_is_required() {
    let shared = tokio::task::spawn_blocking(Postgres::shared).await.unwrap();
    let Some(postgres) = shared else { return };
    let message = refusal(&format!("{}?sslmode=require", postgres.database())).await;
    assert!(message.contains("it does not support TLS"), "{message}");
}
