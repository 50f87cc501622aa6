//! Describes a store with unreadable pages: where it is, what is still intact, and how to recover.

use std::error::Error;

use contract::ids::Position;

use crate::model::error::{Failure, StoreError};
use crate::sql::connection::Connection;
use crate::sql::location::StoreLocation;
use crate::sql::{sqlite, statements};

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

/// The tables of an SQLite store.
pub(crate) const TABLES: &[&str] = &[
    "meta",
    "events",
    "rows",
    "cursors",
    "fences",
    "causes",
    SNAPSHOT_TABLES[0],
    SNAPSHOT_TABLES[1],
    "archives",
];

/// The tables of read models, and of snapshots: they hold nothing that the log does not, so they can be
/// recreated empty.
pub(crate) const ROW_TABLES: &[&str] = &["rows"];
pub(crate) const SNAPSHOT_TABLES: &[&str] = &["snapshots", "snapshot_parts"];

/// What is damaged; by default everything.
#[derive(Default)]
struct Damage {
    /// None if nothing can be read.
    extent: Option<ReadableExtent>,
    /// The tables with unreadable pages. In PostgreSQL they are not determined.
    tables: Vec<&'static str>,
}

impl Damage {
    async fn find(location: &StoreLocation) -> Self {
        let Ok(readers) = location.open_readers().await else {
            return Self::default();
        };
        let found = match readers.acquire().await {
            Ok(mut reader) => Self {
                extent: readable_extent(&mut reader.get()).await,
                tables: damaged_tables(&mut reader.get(), TABLES)
                    .await
                    .unwrap_or_default(),
            },
            Err(_) => Self::default(),
        };
        readers.close().await;
        found
    }

    fn is_log_readable(&self) -> bool {
        self.extent.is_some_and(|extent| extent.is_intact)
    }

    /// Whether the log can make everything that cannot be read.
    fn is_derivable(&self) -> bool {
        let mut tables = self.tables.iter();
        self.is_log_readable()
            && !self.tables.is_empty()
            && tables.all(|table| ROW_TABLES.contains(table) || SNAPSHOT_TABLES.contains(table))
    }
}

/// Returns those of these tables that have unreadable pages; in PostgreSQL none, as it does not tell.
pub(crate) async fn damaged_tables<'t>(
    connection: &mut Connection<'_>,
    tables: &[&'t str],
) -> Result<Vec<&'t str>, StoreError> {
    match connection {
        Connection::Sqlite(connection) => Ok(sqlite::tables::damaged(connection, tables).await?),
        Connection::Postgres(..) => Ok(Vec::new()),
    }
}

/// Whether one of these tables has unreadable pages, as far as the database tells. On a connection of its
/// own: after an error of this kind SQLite does not write in the same transaction.
pub(crate) async fn is_damaged(
    location: &StoreLocation,
    tables: &'static [&'static str],
) -> Result<bool, StoreError> {
    if let StoreLocation::Postgres(_) = location {
        return Ok(false);
    }
    let readers = location.open_readers().await?;
    let damaged = match readers.acquire().await {
        Ok(mut reader) => damaged_tables(&mut reader.get(), tables).await,
        Err(error) => Err(error),
    };
    readers.close().await;
    Ok(!damaged?.is_empty())
}

/// Returns the damage that a store reported, if that is behind an error.
pub fn damage_in<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e Failure> {
    let mut causes = std::iter::successors(Some(error), |&error| error.source());
    causes.find_map(|cause| match cause.downcast_ref() {
        Some(StoreError::Damaged(damage)) => Some(damage),
        _ => None,
    })
}

/// Returns the error of a store that reported damage, open or not: which events can be read, and how to
/// recover. None if the URL is invalid, or everything can be read.
pub async fn describe_damage(url: &str, damage: &Failure) -> Option<StoreError> {
    let location = StoreLocation::parse(url).ok()?;
    let found = Damage::find(&location).await;
    if found.is_log_readable() && found.tables.is_empty() {
        return None;
    }
    let message = message(&location, damage.as_str(), &found);
    Some(StoreError::refused(message).caused_by(damage.clone()))
}

/// Returns the error of a damaged store that cannot be opened.
pub(crate) async fn open_error(location: &StoreLocation, damage: Failure) -> StoreError {
    StoreError::refused(describe(location, damage.as_str()).await).caused_by(damage)
}

/// Describes the damage, based on what can be read.
pub(crate) async fn describe(location: &StoreLocation, detail: &str) -> String {
    message(location, detail, &Damage::find(location).await)
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

fn message(location: &StoreLocation, detail: &str, damage: &Damage) -> String {
    format!(
        "{location} is damaged ({detail}): {}. {}",
        readable(damage),
        advice(location, damage)
    )
}

/// Says what can be read.
fn readable(damage: &Damage) -> String {
    let Some(extent) = damage.extent else {
        return "nothing of it can be read".to_owned();
    };
    let ReadableExtent {
        intact_through,
        resumes,
        is_intact,
    } = extent;
    if is_intact {
        let tables = damage.tables.iter().map(|table| format!("`{table}`"));
        let rest = match tables.collect::<Vec<_>>().join(", ") {
            none if none.is_empty() => "an index or another table cannot".to_owned(),
            tables => format!("pages of the tables or indexes of {tables} cannot"),
        };
        return format!("all events, up to position {intact_through}, can be read; {rest}");
    }
    let before = match (intact_through, resumes) {
        (Position::START, None) => return "nothing of it can be read".to_owned(),
        (Position::START, _) => "no event before the damage can be read".to_owned(),
        _ => format!("events up to position {intact_through} can be read"),
    };
    match resumes {
        None => format!("{before}, none after that can"),
        Some((first, last)) => format!(
            "{before}, those between {intact_through} and {first} cannot, and those from {first} to {last} can"
        ),
    }
}

/// Says how to recover, with commands that need no server.
fn advice(location: &StoreLocation, damage: &Damage) -> String {
    if damage.is_derivable() {
        return format!(
            "The log is intact, and everything else is derived from it: stop every process that uses the store, \
             and run `penstock store rebuild --store sqlite:{location}`"
        );
    }
    let (keep, new) = match location {
        StoreLocation::Sqlite(_) => (
            "Stop every process that uses it and keep it unchanged",
            "sqlite:NEW.db",
        ),
        StoreLocation::Postgres(_) => (
            "Stop every process that uses it, and see PostgreSQL's log and documentation for the damaged relation",
            "postgres://HOST/NEW",
        ),
    };
    format!(
        "{keep}; then restore the store from a backup (`penstock store rebuild --from BACKUP --store {new}`), \
         or, if the log is published, from Kafka (`--from kafka://HOST:PORT/PREFIX`). `penstock store verify` \
         checks the result"
    )
}
