//! PostgreSQL specifics: opening a database, timeouts and migrations.
//!
//! Invariants: many processes may open and write the store; acknowledged commits have reached the disk of
//! the server (`synchronous_commit` is never off); neither side waits forever for the other.

use std::str::FromStr;
use std::time::Duration;

use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, PgConnection};

use crate::model::error::StoreError;
use crate::sql::connection::{OwnedConnection, Pool, with_timeout};

pub(crate) mod inserts;
pub(crate) mod locks;

pub(crate) static MIGRATIONS: Migrator = sqlx::migrate!("migrations/postgres");

/// The maximum number of concurrent readers per process; one more connection is for notifications.
const READERS_MAX: u32 = 5;

/// The default time limit of a statement, a connection attempt or a lock wait; the URL can set another
/// (`?timeout=SECONDS`).
const TIMEOUT: Duration = Duration::from_secs(10);

/// How much longer than the server's time limit the client waits.
const GRACE: Duration = Duration::from_secs(1);

/// PostgreSQL's codes for a failed login.
const INVALID_PASSWORD: &str = "28P01";
const INVALID_AUTHORIZATION: &str = "28000";

/// What makes bytes of a text, before and after it.
pub(crate) const AS_BYTES: (&str, &str) = ("convert_to(", ", 'UTF8')");

/// Whether the kind of an event's stream is not in a list such as `,usage/,access/,`.
pub(crate) const KIND_IS_INCLUDED: &str =
    "strpos($5, ',' || split_part(stream, '/', 1) || '/,') = 0";

/// Whether a table of the store exists already.
pub(crate) const TABLE_EXISTS: &str = "SELECT COUNT(*) FROM information_schema.tables \
     WHERE table_schema = current_schema() AND table_name = $1";

/// Milliseconds since 1970, by the server's clock.
pub(crate) const NOW: &str = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)";

/// Requires a chain hash on new events, so that a running release without the chain can no longer append.
pub(crate) async fn require_chain(connection: &mut PgConnection) -> sqlx::Result<()> {
    // NOT VALID: existing rows are not checked, however long the log is.
    sqlx::raw_sql(
        "ALTER TABLE events DROP CONSTRAINT IF EXISTS events_chained; \
         ALTER TABLE events ADD CONSTRAINT events_chained CHECK (prev_hash IS NOT NULL) NOT VALID",
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// The PostgreSQL database of a store.
#[derive(Clone)]
pub(crate) struct PostgresDatabase {
    options: PgConnectOptions,
    limit: Duration,
    name: String,
}

/// Omits the options, which may contain a password.
impl std::fmt::Debug for PostgresDatabase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

impl PostgresDatabase {
    pub(crate) fn parse(url: &str) -> Result<Self, StoreError> {
        let (url, limit) = split_timeout(url)?;
        // The URL is not repeated, as it may contain a password.
        let options = PgConnectOptions::from_str(&url).map_err(|error| {
            StoreError::refused(format!(
                "the store's URL is invalid ({error}): use postgres://USER:PASSWORD@HOST:PORT/DATABASE"
            )).caused_by(error)
        })?;
        let database = options.get_database().map(str::to_owned);
        let Some(database) = database.filter(|database| !database.is_empty()) else {
            return Err(StoreError::refused(
                "the store's URL names no database: use postgres://USER:PASSWORD@HOST:PORT/DATABASE"
                    .to_owned(),
            ));
        };
        let name = format!("{}:{}/{database}", options.get_host(), options.get_port());
        let options = match options.get_application_name() {
            Some(_) => options,
            None => options.application_name("penstock"),
        };
        Ok(Self {
            options: options.disable_statement_logging(),
            limit,
            name,
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The server-side settings of a connection. Those that the URL's own `options` set take precedence.
    fn settings(&self) -> Vec<(&'static str, String)> {
        let millis = self.limit.as_millis().to_string();
        let configured = self.options.get_options().unwrap_or_default().to_owned();
        let defaults = [
            ("statement_timeout", millis.clone()),
            ("lock_timeout", millis.clone()),
            // A process that is paused within a transaction must not keep holding the commit lock.
            ("idle_in_transaction_session_timeout", millis.clone()),
            ("tcp_keepalives_idle", "10".to_owned()),
            ("tcp_keepalives_interval", "5".to_owned()),
            ("tcp_keepalives_count", "3".to_owned()),
            ("tcp_user_timeout", millis),
            // Pages are read in the order of an index. With statistics that are missing or old, the planner
            // would rather fetch and sort all that follows: 240 ms a page in place of 1 ms, at 200,000 events.
            ("enable_bitmapscan", "off".to_owned()),
            ("max_parallel_workers_per_gather", "0".to_owned()),
        ];
        let remaining = defaults
            .into_iter()
            .filter(|(name, _)| !configured.contains(name));
        remaining.collect()
    }

    async fn connect(&self, options: &PgConnectOptions) -> Result<PgConnection, StoreError> {
        let connecting = with_timeout(self.limit, options.connect());
        let mut connection = connecting.await.map_err(|error| self.failed(error))?;
        self.prepare(&mut connection).await?;
        Ok(connection)
    }

    /// Refuses a database that cannot store every text, and ensures that commits are durable.
    async fn prepare(&self, connection: &mut PgConnection) -> Result<(), StoreError> {
        let query = sqlx::query_as::<_, (String, String)>(
            "SELECT current_setting('server_encoding'), CASE current_setting('synchronous_commit') \
             WHEN 'off' THEN set_config('synchronous_commit', 'on', false) ELSE '' END",
        )
        .fetch_one(connection);
        let (encoding, _) = with_timeout(self.limit, query)
            .await
            .map_err(|error| self.failed(error))?;
        if encoding == "UTF8" {
            return Ok(());
        }
        Err(StoreError::refused(format!(
            "{} has the encoding {encoding}: create a database with ENCODING 'UTF8'",
            self.name
        )))
    }

    pub(crate) async fn open_writer(&self) -> Result<OwnedConnection, StoreError> {
        let options = self.options.clone().options(self.settings());
        let connection = self.connect(&options).await?;
        Ok(OwnedConnection::Postgres(connection, self.limit + GRACE))
    }

    /// Opens a connection without server-side timeouts: migrating large tables may take long.
    pub(crate) async fn open_migrator(&self) -> Result<OwnedConnection, StoreError> {
        let connection = self.connect(&self.options).await?;
        Ok(OwnedConnection::Postgres(connection, self.limit + GRACE))
    }

    pub(crate) async fn open_readers(&self) -> Result<Pool, StoreError> {
        let options = self.options.clone().options(self.settings());
        let pool = PgPoolOptions::new()
            .max_connections(READERS_MAX + 1)
            .min_connections(0)
            .acquire_timeout(self.limit)
            .connect_lazy_with(options);
        Ok(Pool::Postgres(pool, self.limit + GRACE))
    }

    fn failed(&self, error: sqlx::Error) -> StoreError {
        let remedy = remedy(&error).map_or(String::new(), |remedy| format!("; {remedy}"));
        let text = format!("{} cannot be opened: {error}{remedy}", self.name);
        let failure = match is_transient(&error) {
            true => StoreError::database(text),
            false => StoreError::refused(text),
        };
        failure.caused_by(error)
    }
}

/// Whether a connection error may resolve by itself. Failed logins (class 28), a missing database (3D000)
/// and invalid settings of ours do not.
fn is_transient(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(error) => {
            let code = error.code().unwrap_or_default();
            !code.starts_with("28") && code != "3D000"
        }
        sqlx::Error::Configuration(_) | sqlx::Error::Tls(_) => false,
        _ => true,
    }
}

/// Returns advice on a failed connection.
fn remedy(error: &sqlx::Error) -> Option<&'static str> {
    if let sqlx::Error::Database(refused) = error {
        let message = refused.message();
        return match refused.code()?.as_ref() {
            INVALID_PASSWORD => Some(
                "check the user and the password in the store's URL, or in the file that PGPASSFILE names",
            ),
            INVALID_AUTHORIZATION if message.contains("no encryption") => Some(
                "the server requires TLS: add sslmode=verify-full to the store's URL, and sslrootcert=PATH for a private certificate authority",
            ),
            INVALID_AUTHORIZATION
                if message.contains("SSL encryption") || message.contains("pg_hba") =>
            {
                Some("its pg_hba.conf has no entry for this user, database and address")
            }
            _ => None,
        };
    }
    let message = error.to_string();
    if message.contains("UnknownIssuer") {
        return Some(
            "its certificate is not signed by a trusted authority: name the authority's certificate file with sslrootcert=PATH in the store's URL",
        );
    }
    if message.contains("NotValidForName") {
        return Some(
            "its certificate is for another host name: use the name in the certificate in the store's URL",
        );
    }
    if message.contains("server does not support TLS") {
        return Some(
            "it does not support TLS: enable it on the server, or remove sslmode from the store's URL",
        );
    }
    None
}

/// Removes `timeout=SECONDS`, our own parameter, from the URL.
fn split_timeout(url: &str) -> Result<(String, Duration), StoreError> {
    let Some((base, query)) = url.split_once('?') else {
        return Ok((url.to_owned(), TIMEOUT));
    };
    let mut limit = TIMEOUT;
    let mut rest = Vec::new();
    for pair in query.split('&') {
        let Some(seconds) = pair.strip_prefix("timeout=") else {
            rest.push(pair);
            continue;
        };
        let parsed = seconds.parse().ok().filter(|seconds| *seconds > 0);
        limit = parsed.map(Duration::from_secs).ok_or_else(|| {
            StoreError::refused(format!(
                "`timeout={seconds}` in the store's URL is not a number of seconds above 0"
            ))
        })?;
    }
    let url = match rest.is_empty() {
        true => base.to_owned(),
        false => format!("{base}?{}", rest.join("&")),
    };
    Ok((url, limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_location_contains_no_password() {
        let database =
            PostgresDatabase::parse("postgres://me:secret@db.example:6000/log?timeout=3").unwrap();
        assert_eq!(database.name(), "db.example:6000/log");
        assert_eq!(database.limit, Duration::from_secs(3));
        assert_eq!(format!("{database:?}"), "db.example:6000/log");
    }

    #[test]
    fn only_the_timeout_is_removed_from_the_url() {
        let (url, limit) = split_timeout("postgres://h/d?sslmode=require&timeout=7&a=b").unwrap();
        assert_eq!(url, "postgres://h/d?sslmode=require&a=b");
        assert_eq!(limit, Duration::from_secs(7));
        for bad in ["0", "x", "-1"] {
            assert!(split_timeout(&format!("postgres://h/d?timeout={bad}")).is_err());
        }
    }

    #[test]
    fn a_url_without_a_database_is_refused() {
        let refused = PostgresDatabase::parse("postgres://me:secret@db.example").unwrap_err();
        assert!(refused.to_string().contains("names no database"));
        assert!(!refused.to_string().contains("secret"));
    }
}
