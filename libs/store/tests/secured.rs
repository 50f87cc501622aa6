//! PostgreSQL behind TLS and a password, on a real server: the store opens with the right ones, and says
//! what to change without them, and never what the password is.

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
async fn a_store_opens_with_the_right_password_over_tls_that_is_verified() {
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
async fn a_wrong_password_is_told_as_such_and_not_repeated() {
    let Some(postgres) = secured().await else {
        return;
    };
    let said = refusal(&url(postgres, "not-the-password", &verified(postgres))).await;
    assert!(said.contains("check the user and the password"), "{said}");
    assert!(!said.contains("not-the-password"), "{said}");
}

#[tokio::test]
async fn an_unknown_authority_is_told_with_the_option_that_names_it() {
    let Some(postgres) = secured().await else {
        return;
    };
    let secrets = postgres.secrets();
    let options = format!(
        "sslmode=verify-full&sslrootcert={}",
        secrets.other_ca.display()
    );
    let said = refusal(&url(postgres, &secrets.password, &options)).await;
    assert!(said.contains("sslrootcert=PATH"), "{said}");
    assert!(!said.contains(&secrets.password), "{said}");
}

#[tokio::test]
async fn a_server_that_demands_tls_is_told_apart_from_a_wrong_password() {
    let Some(postgres) = secured().await else {
        return;
    };
    let password = &postgres.secrets().password;
    let said = refusal(&url(postgres, password, "sslmode=disable")).await;
    assert!(said.contains("takes nobody without TLS"), "{said}");
    assert!(!said.contains(password), "{said}");
}

#[tokio::test]
async fn a_server_without_tls_is_not_spoken_to_where_tls_is_demanded() {
    let shared = tokio::task::spawn_blocking(Postgres::shared).await.unwrap();
    let Some(postgres) = shared else { return };
    let said = refusal(&format!("{}?sslmode=require", postgres.database())).await;
    assert!(said.contains("it has no TLS"), "{said}");
}
