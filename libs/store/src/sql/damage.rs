//! Describes a store with unreadable pages: where it is, what is still intact, and how to recover.

use contract::ids::Position;

use crate::model::error::StoreError;
use crate::sql::connection::{Connection, Pool};
use crate::sql::location::Location;
use crate::sql::statements;

/// The number of events that are read at once; halved when a read fails.
const PAGE: usize = 1_024;

/// Which events of a damaged log can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    /// The last position before the damage.
    whole: Position,
    /// The first and last readable positions after the damage; None if there is no damage, or nothing after
    /// it can be read.
    again: Option<(Position, Position)>,
    /// Whether no part of the log is damaged.
    all: bool,
}

/// Returns the error for a damaged store that cannot be opened.
pub(crate) async fn at_open(location: &Location, detail: String) -> StoreError {
    let place = location.to_string();
    let Ok(readers) = location.open_readers().await else {
        return StoreError::Refused(sentence(&place, &detail, None));
    };
    let sentence = of(&readers, &place, &detail).await;
    readers.close().await;
    StoreError::Refused(sentence)
}

/// Describes the damage, based on what can be read.
pub(crate) async fn of(readers: &Pool, place: &str, detail: &str) -> String {
    let extent = match readers.acquire().await {
        Ok(mut reader) => extent(&mut reader.get()).await,
        Err(_) => None,
    };
    sentence(place, detail, extent)
}

async fn extent(connection: &mut Connection<'_>) -> Option<Extent> {
    // Of archived events, the table may have only the last of some streams.
    let sealed = statements::sealed(connection).await;
    let (mut whole, mut limit) = (sealed.unwrap_or_default(), PAGE);
    loop {
        match statements::read_all(connection, whole, limit).await {
            Ok(page) => match page.last() {
                Some(last) => whole = last.position,
                None => {
                    return Some(Extent {
                        whole,
                        again: None,
                        all: true,
                    });
                }
            },
            Err(StoreError::Damaged(_)) if limit > 1 => limit /= 2,
            Err(StoreError::Damaged(_)) => break,
            Err(_) => return None,
        }
    }
    let again = read_again(connection, whole).await;
    Some(Extent {
        whole,
        again,
        all: false,
    })
}

/// Reads from the end backwards to the damage.
async fn read_again(
    connection: &mut Connection<'_>,
    whole: Position,
) -> Option<(Position, Position)> {
    let (mut again, mut limit) = (None, PAGE);
    loop {
        let before = again.map(|(first, _)| first);
        match statements::read_back(connection, before, limit).await {
            Ok(page) => {
                let (first, last) = (page.last()?.position, page.first()?.position);
                if first <= whole {
                    return again;
                }
                again = Some((first, again.map_or(last, |(_, last)| last)));
            }
            Err(StoreError::Damaged(_)) if limit > 1 => limit /= 2,
            Err(_) => return again,
        }
    }
}

fn sentence(place: &str, detail: &str, extent: Option<Extent>) -> String {
    let what = match extent {
        None
        | Some(Extent {
            whole: Position::START,
            again: None,
            all: false,
        }) => "nothing of it can be read".to_owned(),
        Some(Extent { whole, all, .. }) if all => format!(
            "all events, up to position {whole}, can be read; an index or another table cannot"
        ),
        Some(Extent { whole, again, .. }) => {
            let before = match whole {
                Position::START => "no event before the damage can be read".to_owned(),
                whole => format!("events up to position {whole} can be read"),
            };
            let lost = match again {
                None => "none after that can".to_owned(),
                Some((first, last)) => format!(
                    "those between {whole} and {first} cannot, and those from {first} to {last} can"
                ),
            };
            format!("{before}, {lost}")
        }
    };
    format!(
        "{place} is damaged ({detail}): {what}. Stop every process that uses it and keep it unchanged; \
         then restore the store from a backup (`penstock store rebuild --from BACKUP --store \
         sqlite:NEW.db`), or, if the log is published, from Kafka (`--from kafka://HOST:PORT/PREFIX`)"
    )
}
