//! Describes a store with unreadable pages: where it is, what is still intact, and how to recover.

use contract::ids::Position;

use crate::model::error::{Failure, StoreError};
use crate::sql::connection::{Connection, Pool};
use crate::sql::location::Location;
use crate::sql::statements;

/// The number of events that are read at once; halved when a read fails.
const PAGE: usize = 1_024;

/// Which events of a damaged log can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ReadableExtent {
    /// The last position before the damage.
    intact_through: Position,
    /// The first and last readable positions after the damage; None if there is no damage, or nothing after
    /// it can be read.
    resumes: Option<(Position, Position)>,
    /// Whether no part of the log is damaged.
    is_intact: bool,
}

/// Returns the error for a damaged store that cannot be opened.
pub(crate) async fn open_error(location: &Location, damage: Failure) -> StoreError {
    let store = location.to_string();
    let Ok(readers) = location.open_readers().await else {
        return StoreError::refused(message(&store, damage.as_str(), None)).caused_by(damage);
    };
    let message = describe(&readers, &store, damage.as_str()).await;
    readers.close().await;
    StoreError::refused(message).caused_by(damage)
}

/// Describes the damage, based on what can be read.
pub(crate) async fn describe(readers: &Pool, store: &str, detail: &str) -> String {
    let extent = match readers.acquire().await {
        Ok(mut reader) => readable_extent(&mut reader.get()).await,
        Err(_) => None,
    };
    message(store, detail, extent)
}

async fn readable_extent(connection: &mut Connection<'_>) -> Option<ReadableExtent> {
    // Of archived events, the table may have only the last of some streams.
    let sealed = statements::sealed(connection).await;
    let (mut intact_through, mut limit) = (sealed.unwrap_or_default(), PAGE);
    loop {
        match statements::read_all(connection, intact_through, limit).await {
            Ok(page) => match page.last() {
                Some(last) => intact_through = last.position,
                None => {
                    return Some(ReadableExtent {
                        intact_through,
                        resumes: None,
                        is_intact: true,
                    });
                }
            },
            Err(StoreError::Damaged(_)) if limit > 1 => limit /= 2,
            Err(StoreError::Damaged(_)) => break,
            Err(_) => return None,
        }
    }
    let resumes = read_after_damage(connection, intact_through).await;
    Some(ReadableExtent {
        intact_through,
        resumes,
        is_intact: false,
    })
}

/// Reads from the end backwards to the damage.
async fn read_after_damage(
    connection: &mut Connection<'_>,
    intact_through: Position,
) -> Option<(Position, Position)> {
    let (mut resumes, mut limit) = (None, PAGE);
    loop {
        let before = resumes.map(|(first, _)| first);
        match statements::read_back(connection, before, limit).await {
            Ok(page) => {
                let (first, last) = (page.last()?.position, page.first()?.position);
                if first <= intact_through {
                    return resumes;
                }
                resumes = Some((first, resumes.map_or(last, |(_, last)| last)));
            }
            Err(StoreError::Damaged(_)) if limit > 1 => limit /= 2,
            Err(_) => return resumes,
        }
    }
}

fn message(store: &str, detail: &str, extent: Option<ReadableExtent>) -> String {
    let what = match extent {
        None
        | Some(ReadableExtent {
            intact_through: Position::START,
            resumes: None,
            is_intact: false,
        }) => "nothing of it can be read".to_owned(),
        Some(ReadableExtent {
            intact_through,
            is_intact,
            ..
        }) if is_intact => format!(
            "all events, up to position {intact_through}, can be read; an index or another table cannot"
        ),
        Some(ReadableExtent {
            intact_through,
            resumes,
            ..
        }) => {
            let before = match intact_through {
                Position::START => "no event before the damage can be read".to_owned(),
                intact_through => format!("events up to position {intact_through} can be read"),
            };
            let lost = match resumes {
                None => "none after that can".to_owned(),
                Some((first, last)) => format!(
                    "those between {intact_through} and {first} cannot, and those from {first} to {last} can"
                ),
            };
            format!("{before}, {lost}")
        }
    };
    format!(
        "{store} is damaged ({detail}): {what}. Stop every process that uses it and keep it unchanged; \
         then restore the store from a backup (`penstock store rebuild --from BACKUP --store \
         sqlite:NEW.db`), or, if the log is published, from Kafka (`--from kafka://HOST:PORT/PREFIX`)"
    )
}
