//! Backs up the history to a file, which is one of the meter wherever the original is: the tables have the same
//! names and columns in both databases.

use std::path::Path;

use sqlx::FromRow;
use sqlx::postgres::PgRow;
use sqlx::sqlite::SqliteRow;
use store::sql::{AuxiliaryDatabase, Connection};
use store::{StoreError, backup_file, write_new_file};

use super::sql::{Arg, Sql};
use super::{HistoryLocation, TABLES};

/// Copies the history into a new file, as of one moment. Returns whether there is one.
///
/// # Errors
///
/// [`StoreError::Refused`] if the file exists or cannot be written, others if the history cannot be read.
pub async fn backup_history(from: &HistoryLocation, to: &Path) -> Result<bool, StoreError> {
    let url = match from {
        HistoryLocation::File(file) if file.exists() => {
            return backup_file(file, to).await.map(|()| true);
        }
        HistoryLocation::File(_) => return Ok(false),
        HistoryLocation::Database(url) => url,
    };
    let mut reader = AuxiliaryDatabase::database(url)?
        .pool()
        .await?
        .acquire()
        .await?;
    let mut snapshot = reader.snapshot().await?;
    let mut tables = snapshot.get();
    if !has_table(&mut tables, "history_panes").await? {
        return Ok(false);
    }
    write_new_file(to, async |partial| {
        let file = AuxiliaryDatabase::file(partial);
        file.migrate(&TABLES).await?;
        let Some(mut writer) = file.writer().await? else {
            return Ok(false);
        };
        let copied = async {
            let mut transaction = writer.begin().await?;
            copy_tables(&mut tables, &mut transaction.get()).await?;
            transaction.commit().await
        };
        let copied = copied.await;
        writer.close().await;
        copied?;
        Ok(true)
    })
    .await
}

async fn has_table(from: &mut Connection<'_>, name: &str) -> sqlx::Result<bool> {
    let found: Vec<(bool,)> = Sql::new("SELECT to_regclass($1) IS NOT NULL")
        .with([name.into()])
        .fetch(from)
        .await?;
    Ok(found.contains(&(true,)))
}

async fn copy_tables(from: &mut Connection<'_>, to: &mut Connection<'_>) -> sqlx::Result<()> {
    type PaneRow = (String, String, i64, String, String);
    let columns = "endpoint, deployment, second, role, doc";
    copy_table(
        from,
        to,
        "history_panes",
        columns,
        |(e, d, s, r, doc): PaneRow| [e.into(), d.into(), s.into(), r.into(), doc.into()],
    )
    .await?;
    type ReadyRow = (String, String, i64, i64);
    let columns = "endpoint, deployment, second, instances";
    copy_table(
        from,
        to,
        "history_ready",
        columns,
        |(e, d, s, i): ReadyRow| [e.into(), d.into(), s.into(), i.into()],
    )
    .await?;
    type CoveredRow = (i64, i64, i64);
    let columns = "bucket, start, \"end\"";
    copy_table(
        from,
        to,
        "history_coverage",
        columns,
        |(b, s, e): CoveredRow| [b.into(), s.into(), e.into()],
    )
    .await?;
    type OpenRow = (i64, i64, i64, i64, String);
    let columns = "bucket, generation, ready_through, panes_before, doc";
    copy_table(
        from,
        to,
        "history_open",
        columns,
        |(b, g, r, p, doc): OpenRow| [b.into(), g.into(), r.into(), p.into(), doc.into()],
    )
    .await?;
    type MeasuredRow = (i64, String, i64, i64, i64, i64);
    let columns = "bucket, kind, start, \"end\", partial, length_us";
    copy_table(
        from,
        to,
        "history_measured",
        columns,
        |(b, k, s, e, p, l): MeasuredRow| {
            [b.into(), k.into(), s.into(), e.into(), p.into(), l.into()]
        },
    )
    .await?;
    type ChunkRow = (String, String, i64, i64, String);
    let columns = "endpoint, deployment, start, \"end\", doc";
    copy_table(
        from,
        to,
        "history_instances",
        columns,
        |(e, d, s, end, doc): ChunkRow| [e.into(), d.into(), s.into(), end.into(), doc.into()],
    )
    .await
}

/// Copies a table page by page, unless it does not exist: the history of an earlier release may lack the
/// newest.
async fn copy_table<T, const N: usize>(
    from: &mut Connection<'_>,
    to: &mut Connection<'_>,
    table: &'static str,
    columns: &'static str,
    row: impl Fn(T) -> [Arg; N],
) -> sqlx::Result<()>
where
    T: for<'r> FromRow<'r, SqliteRow> + for<'r> FromRow<'r, PgRow> + Send + Unpin,
{
    if !has_table(from, table).await? {
        return Ok(());
    }
    Sql::new("DECLARE copy_of_")
        .push(table)
        .push(" CURSOR FOR SELECT ")
        .push(columns)
        .push(" FROM ")
        .push(table)
        .execute(from)
        .await?;
    loop {
        let page: Vec<T> = Sql::new("FETCH 500 FROM copy_of_")
            .push(table)
            .fetch(from)
            .await?;
        if page.is_empty() {
            return Ok(());
        }
        Sql::new("INSERT INTO ")
            .push(table)
            .push(" (")
            .push(columns)
            .push(")")
            .values(page.into_iter().map(&row))
            .execute(to)
            .await?;
    }
}
