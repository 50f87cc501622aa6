//! Moving the oldest part of the log into archives, on schedule or on command: one process at a time does
//! it, under a lease that fences every commit.

use contract::time::Timestamp;
use store::{ARCHIVE_LEASE, SealLimits, SealedFile, Store, StoreError, seal};

use crate::lease;

/// Why nothing more was archived.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// Another holder has the lease.
    #[error("the log is being archived already: try again when that has ended")]
    Busy,
    /// The store failed or refused it; files sealed before stay.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Seals what these limits allow, and returns the new files. `holder` is unique to this call.
///
/// # Errors
///
/// If another holder has the lease, the store fails, or the folder of archives cannot be written.
pub async fn archive(
    store: &Store,
    holder: &str,
    limits: &SealLimits,
    now: Timestamp,
) -> Result<Vec<SealedFile>, ArchiveError> {
    // A crashed holder keeps it for as long as this.
    let within = lease::TTL + lease::RENEW_EVERY;
    let acquired = lease::acquire(store, ARCHIVE_LEASE, holder, within).await?;
    let fence = acquired.ok_or(ArchiveError::Busy)?;
    let log_file = |file: &SealedFile| {
        tracing::info!(
            file = file.archive.file,
            events = file.archive.events,
            bytes = file.archive.bytes,
            "archived"
        );
    };
    let sealing = seal(store, &fence, limits, now, log_file);
    let sealed = lease::keep(store, &fence, holder, sealing).await?;
    Ok(sealed.ok_or(ArchiveError::Busy)??)
}
