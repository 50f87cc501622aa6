//! SQL statements built from static pieces and bound values, the same for both databases.

use sqlx::postgres::PgRow;
use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, FromRow};
use store::sql::{Connection, with_timeout};

pub(super) struct Sql {
    text: String,
    args: Vec<Arg>,
}

pub(super) enum Arg {
    Text(String),
    Number(i64),
}

impl From<&str> for Arg {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Arg {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<i64> for Arg {
    fn from(number: i64) -> Self {
        Self::Number(number)
    }
}

/// Binds arguments to a query of either database.
macro_rules! bound {
    ($args:expr, $query:expr) => {{
        let mut query = $query;
        for arg in $args {
            query = match arg {
                Arg::Text(text) => query.bind(text),
                Arg::Number(number) => query.bind(number),
            };
        }
        query
    }};
}

impl Sql {
    pub(super) fn new(text: &'static str) -> Self {
        Self {
            text: text.to_owned(),
            args: Vec::new(),
        }
    }

    pub(super) fn push(mut self, text: &'static str) -> Self {
        self.text.push_str(text);
        self
    }

    /// Appends a placeholder and binds a value to it.
    pub(super) fn bind(mut self, arg: impl Into<Arg>) -> Self {
        self.args.push(arg.into());
        self.text.push_str(&format!("${}", self.args.len()));
        self
    }

    /// Binds values to the numbered placeholders of the text.
    pub(super) fn with<const N: usize>(mut self, args: [Arg; N]) -> Self {
        self.args.extend(args);
        self
    }

    /// Appends `VALUES (…), (…)`.
    pub(super) fn values<const N: usize>(mut self, rows: impl Iterator<Item = [Arg; N]>) -> Self {
        for (index, row) in rows.enumerate() {
            self = self.push(if index == 0 { " VALUES (" } else { ", (" });
            for (column, arg) in row.into_iter().enumerate() {
                if column > 0 {
                    self = self.push(", ");
                }
                self = self.bind(arg);
            }
            self = self.push(")");
        }
        self
    }

    pub(super) async fn fetch<T>(self, connection: &mut Connection<'_>) -> sqlx::Result<Vec<T>>
    where
        T: for<'r> FromRow<'r, SqliteRow> + for<'r> FromRow<'r, PgRow> + Send + Unpin,
    {
        let text = AssertSqlSafe(self.text);
        match connection {
            Connection::Sqlite(connection) => {
                let query = bound!(self.args, sqlx::query_as(text));
                query.fetch_all(&mut **connection).await
            }
            Connection::Postgres(connection, limit) => {
                let query = bound!(self.args, sqlx::query_as(text));
                with_timeout(*limit, query.fetch_all(&mut **connection)).await
            }
        }
    }

    /// Executes the statement and returns the number of affected rows.
    pub(super) async fn execute(self, connection: &mut Connection<'_>) -> sqlx::Result<u64> {
        let text = AssertSqlSafe(self.text);
        match connection {
            Connection::Sqlite(connection) => {
                let query = bound!(self.args, sqlx::query(text));
                let done = query.execute(&mut **connection).await?;
                Ok(done.rows_affected())
            }
            Connection::Postgres(connection, limit) => {
                let query = bound!(self.args, sqlx::query(text));
                let done = with_timeout(*limit, query.execute(&mut **connection)).await?;
                Ok(done.rows_affected())
            }
        }
    }
}
