//! What is particular to PostgreSQL: how a database is opened, with which timeouts, and migrated.
//!
//! Invariants: many processes may have the store open and write; what is acknowledged has reached
//! the disk of the server (`synchronous_commit` is never off); neither side waits for the other for
//! ever.

use std::str::FromStr;
use std::time::Duration;

use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, PgConnection};

use crate::model::error::StoreError;
use crate::sql::connection::{Owned, Pool, limited};

pub(crate) mod inserts;
pub(crate) mod locks;

pub(crate) static MIGRATIONS: Migrator = sqlx::migrate!("migrations/postgres");

/// Readers at once, per process; one more listens.
const READERS_MAX: u32 = 5;

/// How long one statement, a connection or a wait for a lock may take, unless the URL says otherwise
/// (`?timeout=SECONDS`).
const TIMEOUT: Duration = Duration::from_secs(10);

/// What the server answers after this much more than the limit is of no use to anybody.
const GRACE: Duration = Duration::from_secs(1);

/// PostgreSQL's codes of a login that failed.
const INVALID_PASSWORD: &str = "28P01";
const INVALID_AUTHORIZATION: &str = "28000";

/// Whether an event's stream is of none of the kinds in a list such as `,usage/,access/,`.
pub(crate) const IS_WANTED: &str = "strpos($5, ',' || split_part(stream, '/', 1) || '/,') = 0";

/// Whether a table of the store exists already.
pub(crate) const TABLE_EXISTS: &str = "SELECT COUNT(*) FROM information_schema.tables \
     WHERE table_schema = current_schema() AND table_name = $1";

/// Milliseconds since 1970, by the server's clock.
pub(crate) const NOW: &str = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)";

/// Takes only events from now on that carry the hash of what was before them: a release from before the
/// chain that still runs can append nothing.
pub(crate) async fn only_chained(connection: &mut PgConnection) -> sqlx::Result<()> {
    // Not valid: what is there is not read again, however long the log.
    sqlx::raw_sql(
        "ALTER TABLE events DROP CONSTRAINT IF EXISTS events_chained; \
         ALTER TABLE events ADD CONSTRAINT events_chained CHECK (prev_hash IS NOT NULL) NOT VALID",
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// The database that a store is in.
#[derive(Clone)]
pub(crate) struct Place {
    options: PgConnectOptions,
    limit: Duration,
    name: String,
}

/// Without the password that its options may hold.
impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

impl Place {
    pub(crate) fn parse(url: &str) -> Result<Self, StoreError> {
        let (url, limit) = take_timeout(url)?;
        // The URL is not repeated: it may hold a password.
        let options = PgConnectOptions::from_str(&url).map_err(|error| {
            StoreError::Refused(format!(
                "the store's URL cannot be understood ({error}): use postgres://USER:PASSWORD@HOST:PORT/DATABASE"
            ))
        })?;
        let database = options.get_database().map(str::to_owned);
        let Some(database) = database.filter(|database| !database.is_empty()) else {
            return Err(StoreError::Refused(
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

    /// What the server is told of our patience. What the URL's own `options` name stays as it is.
    fn settings(&self) -> Vec<(&'static str, String)> {
        let millis = self.limit.as_millis().to_string();
        let theirs = self.options.get_options().unwrap_or_default().to_owned();
        let ours = [
            ("statement_timeout", millis.clone()),
            ("lock_timeout", millis.clone()),
            // A process that is paused within a transaction must not hold everybody's lock.
            ("idle_in_transaction_session_timeout", millis.clone()),
            ("tcp_keepalives_idle", "10".to_owned()),
            ("tcp_keepalives_interval", "5".to_owned()),
            ("tcp_keepalives_count", "3".to_owned()),
            ("tcp_user_timeout", millis),
        ];
        let free = ours.into_iter().filter(|(name, _)| !theirs.contains(name));
        free.collect()
    }

    async fn connect(&self, options: &PgConnectOptions) -> Result<PgConnection, StoreError> {
        let connecting = limited(self.limit, options.connect());
        let mut connection = connecting.await.map_err(|error| self.failed(&error))?;
        self.prepare(&mut connection).await?;
        Ok(connection)
    }

    /// Refuses a database that could not hold a log, and makes sure that commits are waited for.
    async fn prepare(&self, connection: &mut PgConnection) -> Result<(), StoreError> {
        let asking = sqlx::query_as::<_, (String, String)>(
            "SELECT current_setting('server_encoding'), CASE current_setting('synchronous_commit') \
             WHEN 'off' THEN set_config('synchronous_commit', 'on', false) ELSE '' END",
        )
        .fetch_one(connection);
        let (encoding, _) = limited(self.limit, asking)
            .await
            .map_err(|error| self.failed(&error))?;
        if encoding == "UTF8" {
            return Ok(());
        }
        Err(StoreError::Refused(format!(
            "{} is encoded in {encoding}: make a database with ENCODING 'UTF8'",
            self.name
        )))
    }

    pub(crate) async fn open_writer(&self) -> Result<Owned, StoreError> {
        let options = self.options.clone().options(self.settings());
        let connection = self.connect(&options).await?;
        Ok(Owned::Postgres(connection, self.limit + GRACE))
    }

    /// Without limits of the server: a change of large tables takes as long as it takes.
    pub(crate) async fn open_migrator(&self) -> Result<Owned, StoreError> {
        let connection = self.connect(&self.options).await?;
        Ok(Owned::Postgres(connection, self.limit + GRACE))
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

    fn failed(&self, error: &sqlx::Error) -> StoreError {
        let remedy = remedy(error).map_or(String::new(), |remedy| format!("; {remedy}"));
        let text = format!("{} cannot be opened: {error}{remedy}", self.name);
        match may_pass(error) {
            true => StoreError::Database(text),
            false => StoreError::Refused(text),
        }
    }
}

/// Whether a server that could not be opened may be opened later as it is. Not so who is not let in
/// (class 28), a database that there is not (3D000), and what our own settings make impossible.
fn may_pass(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(error) => {
            let code = error.code().unwrap_or_default();
            !code.starts_with("28") && code != "3D000"
        }
        sqlx::Error::Configuration(_) | sqlx::Error::Tls(_) => false,
        _ => true,
    }
}

/// What to do about a server that does not let us in.
fn remedy(error: &sqlx::Error) -> Option<&'static str> {
    if let sqlx::Error::Database(refused) = error {
        let said = refused.message();
        return match refused.code()?.as_ref() {
            INVALID_PASSWORD => Some(
                "check the user and the password in the store's URL, or where PGPASSFILE points to",
            ),
            INVALID_AUTHORIZATION if said.contains("no encryption") => Some(
                "the server takes nobody without TLS: put sslmode=verify-full into the store's URL, and sslrootcert=PATH for an authority of your own",
            ),
            INVALID_AUTHORIZATION if said.contains("SSL encryption") || said.contains("pg_hba") => {
                Some("its pg_hba.conf has no line for this user, database and address")
            }
            _ => None,
        };
    }
    let said = error.to_string();
    if said.contains("UnknownIssuer") {
        return Some(
            "its certificate is not signed by an authority that is known here: name the authority's file with sslrootcert=PATH in the store's URL",
        );
    }
    if said.contains("NotValidForName") {
        return Some(
            "its certificate is for another name: use the name that stands in it in the store's URL",
        );
    }
    if said.contains("server does not support TLS") {
        return Some("it has no TLS: turn it on there, or leave out sslmode in the store's URL");
    }
    None
}

/// Takes `timeout=SECONDS`, which is ours, out of the URL.
fn take_timeout(url: &str) -> Result<(String, Duration), StoreError> {
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
            StoreError::Refused(format!(
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
    fn the_name_of_a_place_holds_no_password() {
        let place = Place::parse("postgres://me:secret@db.example:6000/log?timeout=3").unwrap();
        assert_eq!(place.name(), "db.example:6000/log");
        assert_eq!(place.limit, Duration::from_secs(3));
        assert_eq!(format!("{place:?}"), "db.example:6000/log");
    }

    #[test]
    fn the_timeout_is_taken_out_of_the_url_and_the_rest_stays() {
        let (url, limit) = take_timeout("postgres://h/d?sslmode=require&timeout=7&a=b").unwrap();
        assert_eq!(url, "postgres://h/d?sslmode=require&a=b");
        assert_eq!(limit, Duration::from_secs(7));
        for bad in ["0", "x", "-1"] {
            assert!(take_timeout(&format!("postgres://h/d?timeout={bad}")).is_err());
        }
    }

    #[test]
    fn a_url_without_a_database_is_refused() {
        let refused = Place::parse("postgres://me:secret@db.example").unwrap_err();
        assert!(refused.to_string().contains("names no database"));
        assert!(!refused.to_string().contains("secret"));
    }
}
