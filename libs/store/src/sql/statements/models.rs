//! Statements on the rows of read models.

use contract::ids::Position;
use contract::log::RowChange;
use contract::time::Timestamp;
use sqlx::AssertSqlSafe;

use super::Result;
use crate::model::rows::{Row, RowQuery};
use crate::sql::connection::{Connection, run};
use crate::sql::{postgres, sqlite};

type RowColumns = (String, String, String, i64, i64, String);

fn row_of(columns: RowColumns) -> Row {
    let (key, endpoint, deployment, position, time, doc) = columns;
    Row {
        key,
        endpoint,
        deployment,
        position: Position(position as u64),
        time: Timestamp::from_millis(time),
        doc,
    }
}

pub(crate) async fn row(
    connection: &mut Connection<'_>,
    model: &str,
    key: &str,
) -> Result<Option<Row>> {
    let found = run!(
        connection,
        query_as<RowColumns>.fetch_optional,
        "SELECT key, endpoint, deployment, position, time, doc \
         FROM rows WHERE model = $1 AND key = $2",
        model,
        key
    )?;
    Ok(found.map(row_of))
}

/// Newest first; rows of one position in descending order of their key.
pub(crate) async fn rows(connection: &mut Connection<'_>, query: &RowQuery) -> Result<Vec<Row>> {
    let mut select = Select::rows(query);
    if let Some(before) = query.before {
        select.and("position <", Arg::Number(before.0 as i64));
    }
    let page = select.end("ORDER BY position DESC, key DESC", Some(query.limit));
    let mut page = page.fetch(connection).await?;
    if let Some(last) = page.last().filter(|_| page.len() == query.limit) {
        // A page is continued by position alone, so rows of one position must not be split.
        let mut select = Select::rows(query);
        select.and("position =", Arg::Number(last.position.0 as i64));
        select.and("key <", Arg::Text(last.key.clone()));
        page.extend(
            select
                .end("ORDER BY key DESC", None)
                .fetch(connection)
                .await?,
        );
    }
    Ok(page)
}

/// A query assembled from constant pieces, with its bindings.
struct Select {
    text: String,
    args: Vec<Arg>,
}

enum Arg {
    Text(String),
    Number(i64),
}

impl Select {
    fn rows(query: &RowQuery) -> Self {
        let mut select = Self {
            text:
                "SELECT key, endpoint, deployment, position, time, doc FROM rows WHERE model = $1"
                    .to_owned(),
            args: vec![Arg::Text(query.model.clone())],
        };
        if let Some(endpoint) = &query.endpoint {
            select.and("endpoint =", Arg::Text(endpoint.clone()));
        }
        if let Some(deployment) = &query.deployment {
            select.and("deployment =", Arg::Text(deployment.clone()));
        }
        if let Some(since) = query.since {
            select.and("time >=", Arg::Number(since.millis()));
        }
        select
    }

    fn and(&mut self, compared: &'static str, arg: Arg) {
        self.args.push(arg);
        let index = self.args.len();
        self.text.push_str(&format!(" AND {compared} ${index}"));
    }

    fn end(mut self, order: &'static str, limit: Option<usize>) -> Self {
        self.text.push_str(&format!(" {order}"));
        if let Some(limit) = limit {
            self.args.push(Arg::Number(limit as i64));
            let index = self.args.len();
            self.text.push_str(&format!(" LIMIT ${index}"));
        }
        self
    }

    async fn fetch(self, connection: &mut Connection<'_>) -> Result<Vec<Row>> {
        /// Binds the arguments, with the types of either database.
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
        let text = AssertSqlSafe(self.text);
        let found: Vec<RowColumns> = match connection {
            Connection::Sqlite(connection) => {
                let query = bound!(self.args, sqlx::query_as(text));
                query.fetch_all(&mut **connection).await?
            }
            Connection::Postgres(connection, limit) => {
                let query = bound!(self.args, sqlx::query_as(text));
                crate::sql::connection::with_timeout(*limit, query.fetch_all(&mut **connection))
                    .await?
            }
        };
        Ok(found.into_iter().map(row_of).collect())
    }
}

pub(crate) async fn count_rows(connection: &mut Connection<'_>, model: &str) -> Result<usize> {
    let rows = run!(
        connection,
        query_scalar<i64>.fetch_one,
        "SELECT COUNT(*) FROM rows WHERE model = $1",
        model
    )?;
    Ok(rows as usize)
}

/// Returns the row keys of a model, in order.
pub(crate) async fn row_keys(
    connection: &mut Connection<'_>,
    model: &str,
    after: &str,
    limit: usize,
) -> Result<Vec<String>> {
    Ok(run!(
        connection,
        query_scalar<String>.fetch_all,
        "SELECT key FROM rows WHERE model = $1 AND key > $2 ORDER BY key LIMIT $3",
        model,
        after,
        limit as i64
    )?)
}

/// Returns the rows of a model in order of their key, for scans over all of them.
pub(crate) async fn rows_by_key(
    connection: &mut Connection<'_>,
    model: &str,
    after: Option<&str>,
    limit: usize,
) -> Result<Vec<Row>> {
    let found = run!(
        connection,
        query_as<RowColumns>.fetch_all,
        "SELECT key, endpoint, deployment, position, time, doc \
         FROM rows WHERE model = $1 AND key > $2 ORDER BY key LIMIT $3",
        model,
        // Keys are never empty, so the empty text sorts before all of them.
        after.unwrap_or_default(),
        limit as i64
    )?;
    Ok(found.into_iter().map(row_of).collect())
}

/// Writes rows, with at most one change per row. Returns how many rows were changed.
pub(crate) async fn write_rows(
    connection: &mut Connection<'_>,
    changes: &[&RowChange],
) -> sqlx::Result<u64> {
    if changes.is_empty() {
        return Ok(0);
    }
    match connection {
        Connection::Sqlite(connection) => sqlite::inserts::write_rows(connection, changes).await,
        Connection::Postgres(connection, limit) => {
            postgres::inserts::write_rows(connection, *limit, changes).await
        }
    }
}
