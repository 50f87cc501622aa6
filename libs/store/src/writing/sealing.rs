//! Lists the next archive file, in one transaction.
//!
//! Invariants: listed files are contiguous; the first one raises the store's format to that of stores with
//! archives.

use contract::ids::Position;

use crate::archive::archive_set::FOLDER;
use crate::model::archive::Archive;
use crate::model::error::StoreError;
use crate::schema::format::FORMAT_WITH_ARCHIVES;
use crate::sql::connection::Connection;
use crate::sql::statements;

pub(crate) struct NewArchive {
    pub archive: Archive,
    /// The last position of the previous file.
    pub after: Position,
    /// The archive folder, if it is not the default one.
    pub folder: Option<String>,
}

impl NewArchive {
    pub(crate) async fn write(&self, connection: &mut Connection<'_>) -> Result<(), StoreError> {
        let sealed = statements::sealed(connection).await?;
        if sealed != self.after {
            return Err(StoreError::refused(format!(
                "another process has archived up to position {sealed} in the meantime: run this again"
            )));
        }
        statements::insert_archive(connection, &self.archive).await?;
        if let Some(folder) = &self.folder {
            statements::set_meta(connection, FOLDER, folder).await?;
        }
        statements::set_meta(connection, "format", &FORMAT_WITH_ARCHIVES.to_string()).await
    }
}
