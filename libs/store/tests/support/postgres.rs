//! Test databases on the real PostgreSQL server of `tests/servers`.

#![allow(dead_code)]

use std::sync::atomic::{AtomicU32, Ordering};

use servers::Postgres;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};

/// Whether tests that need PostgreSQL are skipped.
pub fn skipped() -> bool {
    servers::is_skipped("postgres")
}

/// Returns the maintenance URL of the server that all tests of this process share.
fn shared() -> String {
    let server = Postgres::shared().expect("asked for where PENSTOCK_SKIP names postgres");
    server.url("postgres")
}

/// A database for one test; dropped at its end.
pub struct PostgresDatabase {
    maintenance: String,
    name: String,
}

impl PostgresDatabase {
    pub async fn new() -> Self {
        let url = tokio::task::spawn_blocking(shared).await.unwrap();
        Self::on(&url, "ENCODING 'UTF8' TEMPLATE template0").await
    }

    /// Creates a database on another server, or with other properties.
    pub async fn on(maintenance: &str, properties: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("penstock_test_{}_{count}", std::process::id());
        let database = Self {
            maintenance: maintenance.to_owned(),
            name,
        };
        database
            .run(format!("DROP DATABASE IF EXISTS {}", database.name))
            .await;
        database
            .run(format!("CREATE DATABASE {} {properties}", database.name))
            .await;
        database
    }

    pub async fn with(properties: &str) -> Self {
        let url = tokio::task::spawn_blocking(shared).await.unwrap();
        Self::on(&url, properties).await
    }

    async fn run(&self, sql: String) {
        let options: PgConnectOptions = self.maintenance.parse().unwrap();
        let mut connection = options
            .connect()
            .await
            .unwrap_or_else(|error| panic!("the test's PostgreSQL cannot be reached: {error}"));
        sqlx::query(AssertSqlSafe(sql))
            .execute(&mut connection)
            .await
            .unwrap();
        connection.close().await.unwrap();
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn url(&self) -> String {
        let (base, query) = match self.maintenance.split_once('?') {
            Some((base, query)) => (base, format!("?{query}")),
            None => (self.maintenance.as_str(), String::new()),
        };
        let (server, _) = base.rsplit_once('/').unwrap();
        format!("{server}/{}{query}", self.name)
    }

    /// Opens a connection that bypasses the store.
    pub async fn connect(&self) -> PgConnection {
        self.url()
            .parse::<PgConnectOptions>()
            .unwrap()
            .connect()
            .await
            .unwrap()
    }
}

impl Drop for PostgresDatabase {
    fn drop(&mut self) {
        let sql = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name);
        let maintenance = self.maintenance.clone();
        // A runtime cannot block on another runtime.
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async {
                let options: PgConnectOptions =
                    maintenance.parse().map_err(std::io::Error::other)?;
                let connecting = options.connect();
                let mut connection = connecting.await.map_err(std::io::Error::other)?;
                let dropping = sqlx::query(AssertSqlSafe(sql)).execute(&mut connection);
                dropping.await.map_err(std::io::Error::other).map(|_| ())
            })
        });
        let _ = dropping.join();
    }
}
