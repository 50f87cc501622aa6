//! Finds tables with unreadable pages, and recreates those that hold nothing that the log does not.

use sqlx::SqliteConnection;

use crate::sql::db_error::is_damage;

/// Returns the names of these tables that have unreadable pages, in their own pages or in those of an
/// index. Reads all of them.
pub(crate) async fn damaged<'t>(
    connection: &mut SqliteConnection,
    tables: &[&'t str],
) -> sqlx::Result<Vec<&'t str>> {
    let mut damaged = Vec::new();
    for table in tables {
        let found =
            sqlx::query_scalar::<_, String>("SELECT quick_check FROM pragma_quick_check($1)")
                .bind(*table)
                .fetch_all(&mut *connection)
                .await;
        match found {
            Ok(found) if found == ["ok"] => {}
            Ok(_) => damaged.push(*table),
            Err(error) if is_damage(&error) => damaged.push(*table),
            Err(error) => return Err(error),
        }
    }
    Ok(damaged)
}

/// Replaces tables by empty ones with the same columns and indexes, within a transaction. `DROP` and
/// `DELETE` would read the pages of the old ones, which fails; so these are removed from the schema only, and
/// their pages stay allocated until the file is copied.
pub(crate) async fn recreate(
    connection: &mut SqliteConnection,
    tables: &[&str],
) -> sqlx::Result<()> {
    let mut definitions = Vec::new();
    for table in tables {
        // The table before its indexes.
        let of_table = sqlx::query_scalar::<_, String>(
            "SELECT sql FROM sqlite_master WHERE tbl_name = $1 AND sql IS NOT NULL ORDER BY rowid",
        );
        definitions.extend(of_table.bind(*table).fetch_all(&mut *connection).await?);
    }
    sqlx::query("PRAGMA writable_schema = ON")
        .execute(&mut *connection)
        .await?;
    for table in tables {
        sqlx::query("DELETE FROM sqlite_master WHERE tbl_name = $1")
            .bind(*table)
            .execute(&mut *connection)
            .await?;
    }
    // Also rereads the schema.
    sqlx::query("PRAGMA writable_schema = RESET")
        .execute(&mut *connection)
        .await?;
    for definition in definitions {
        sqlx::query(sqlx::AssertSqlSafe(definition))
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}
