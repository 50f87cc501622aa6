//! Reads a page of the log as a single text value, which costs a fraction of a row with eleven values per
//! event.
//!
//! Each event starts with its numbers, each followed by a space: the integer columns, then the length of
//! each text in bytes; the texts follow without separators. The text is read as bytes: SQLite would copy a
//! large text once more to terminate it.
//!
//! Invariant: events come in order of position, or reading the page fails.

use contract::ids::{Bucket, Position};
use contract::log::{RawRecord, Record, StreamKind};
use contract::time::Timestamp;
use sqlx::AssertSqlSafe;

use crate::model::error::StoreError;
use crate::model::raw::{EventId, EventRow, LogEntry, Unreadable};
use crate::sql::connection::{Connection, run};
use crate::sql::{postgres, sqlite};

/// Selects the events of a page, and how much of them is decoded.
#[derive(Clone, Copy, Debug)]
pub struct PageQuery<'a> {
    /// None for all buckets.
    pub bucket: Option<Bucket>,
    /// Exclusive.
    pub after: Position,
    /// Inclusive.
    pub through: Position,
    /// Kinds of streams to exclude.
    pub excluded_kinds: &'a [StreamKind],
    /// Usage that ended by then is decoded without its slices; [`Timestamp::MIN`] to decode all slices.
    pub slices_from: Timestamp,
    /// Maximum number of events.
    pub limit: usize,
}

/// A page of events, not decoded yet.
pub(crate) struct Page {
    events: PageEvents,
    after: Position,
    slices_from: Timestamp,
    pub last: Position,
    /// The number of events.
    pub count: usize,
}

/// The events in the form in which they were read.
enum PageEvents {
    Text(String),
    Raw(Vec<RawRecord>),
}

/// Reads the next events from the table, or returns None if there are no more.
pub(crate) async fn read_page(
    connection: &mut Connection<'_>,
    query: &PageQuery<'_>,
) -> Result<Option<Page>, StoreError> {
    let through = i64::try_from(query.through.0).unwrap_or(i64::MAX);
    let bucket = query.bucket.map_or(-1, |bucket| i64::from(bucket.0));
    let excluded_kinds = kind_list(query.excluded_kinds);
    let text = page_sql(query, connection);
    let (bytes, last, count) = run!(
        connection,
        query_as<(Option<Vec<u8>>, Option<i64>, i64)>.fetch_one,
        AssertSqlSafe(text.clone()),
        query.after.0 as i64,
        through,
        query.limit as i64,
        bucket,
        excluded_kinds.as_str()
    )?;
    let Some((bytes, last)) = bytes.zip(last) else {
        return Ok(None);
    };
    let text = String::from_utf8(bytes).map_err(|error| {
        StoreError::database(format!("a page of events is not text: {error}")).caused_by(error)
    })?;
    Ok(Some(Page {
        events: PageEvents::Text(text),
        after: query.after,
        slices_from: query.slices_from,
        last: Position(last as u64),
        count: count as usize,
    }))
}

/// Returns the SQL, which consists of constants only: every value is bound. Unused filters become trivial
/// conditions, so that the bindings are always the same.
fn page_sql(query: &PageQuery<'_>, connection: &Connection<'_>) -> String {
    let bucket = match query.bucket {
        Some(_) => "bucket = $4",
        None => "$4 = -1",
    };
    let excluded_kinds = match (query.excluded_kinds.is_empty(), connection) {
        (true, _) => "$5 = ','",
        (false, Connection::Sqlite(_)) => sqlite::KIND_IS_INCLUDED,
        (false, Connection::Postgres(..)) => postgres::KIND_IS_INCLUDED,
    };
    let as_bytes = match connection {
        Connection::Sqlite(_) => sqlite::AS_BYTES,
        Connection::Postgres(..) => postgres::AS_BYTES,
    };
    let (before, after) = as_bytes;
    format!(
        "SELECT {before}string_agg(position || ' ' || prev || ' ' || bucket || ' ' || version || ' ' \
         || type_version || ' ' || time || ' ' || octet_length(stream) || ' ' || octet_length(id) \
         || ' ' || octet_length(type) || ' ' || octet_length(actor) || ' ' || octet_length(data) \
         || ' ' || stream || id || type || actor || data, ''){after}, MAX(position), COUNT(*) \
         FROM (SELECT * FROM events WHERE {bucket} AND position > $1 AND position <= $2 \
         AND {excluded_kinds} ORDER BY position LIMIT $3) AS page"
    )
}

/// Returns a list such as `,usage/,access/,` for two kinds of streams.
fn kind_list(kinds: &[StreamKind]) -> String {
    let names = kinds.iter().map(|kind| format!("{}/,", kind.as_str()));
    names.fold(String::from(","), |all, name| all + &name)
}

impl Page {
    /// Makes a page of events from archives, or None if there are none.
    pub(crate) fn from_events(events: Vec<RawRecord>, query: &PageQuery<'_>) -> Option<Self> {
        let last = events.last()?.position;
        Some(Self {
            count: events.len(),
            events: PageEvents::Raw(events),
            after: query.after,
            slices_from: query.slices_from,
            last,
        })
    }

    /// Decodes the events, each with a result of its own. Fails if the text is not a valid page.
    pub(crate) fn decode(&self) -> Result<Vec<Result<Record, Box<Unreadable>>>, StoreError> {
        let mut records = Vec::with_capacity(self.count);
        self.decode_each(|record| records.push(record))?;
        Ok(records)
    }

    /// The same, one by one.
    pub(crate) fn decode_each(
        &self,
        mut handle: impl FnMut(Result<Record, Box<Unreadable>>),
    ) -> Result<(), StoreError> {
        self.for_each(|event| handle(event.decode_entry_since(self.slices_from)))
    }

    /// Decodes the events that are not of these kinds, unless another reader of the page has done so before.
    /// `decoded` is what has been decoded so far, in the order of the page.
    pub(crate) fn decode_more(
        &self,
        excluded_kinds: &[StreamKind],
        decoded: &mut Vec<Option<LogEntry>>,
        entries: &mut Vec<LogEntry>,
    ) -> Result<(), StoreError> {
        decoded.reserve(self.count.saturating_sub(decoded.len()));
        let mut index = 0;
        self.for_each(|event| {
            if decoded.len() == index {
                decoded.push(None);
            }
            let kind = StreamKind::from_stream_name(event.stream);
            if kind.is_none_or(|kind| !excluded_kinds.contains(&kind))
                && let Some(entry) = decoded.get_mut(index)
            {
                let decode = || LogEntry::from(event.decode_entry_since(self.slices_from));
                entries.push(entry.get_or_insert_with(decode).clone());
            }
            index += 1;
        })
    }

    /// Calls `handle` with each event. Fails if the text is not a valid page.
    fn for_each<'a>(&'a self, mut handle: impl FnMut(EventRow<'a>)) -> Result<(), StoreError> {
        let text = match &self.events {
            PageEvents::Text(text) => text,
            PageEvents::Raw(events) => {
                events.iter().map(EventRow::from_raw).for_each(handle);
                return Ok(());
            }
        };
        let mut rest = text.as_str();
        let mut before = self.after;
        while !rest.is_empty() {
            let event = parse_event(&mut rest).filter(|event| event.position > before);
            let event = event.ok_or_else(|| StoreError::Unreadable {
                position: before,
                detail: "the database did not return a valid page of events after it".into(),
            })?;
            before = event.position;
            handle(event);
        }
        Ok(())
    }
}

fn parse_event<'a>(rest: &mut &'a str) -> Option<EventRow<'a>> {
    let position = Position(parse_number(rest)? as u64);
    let prev = Position(parse_number(rest)? as u64);
    // Invalid values are mapped to a bucket that does not exist.
    let bucket = Bucket(u16::try_from(parse_number(rest)?).unwrap_or(u16::MAX));
    let version = parse_number(rest)? as u64;
    let type_version = u32::try_from(parse_number(rest)?).unwrap_or(u32::MAX);
    let time = Timestamp::from_millis(parse_number(rest)?);
    let mut lengths = [0; 5];
    for length in &mut lengths {
        *length = usize::try_from(parse_number(rest)?).ok()?;
    }
    let [stream, id, type_name, actor, data] = lengths;
    Some(EventRow {
        position,
        prev,
        // Consumers do not check the chain.
        prev_hash: None,
        bucket,
        stream: parse_text(rest, stream)?,
        version,
        id: EventId::Stored(parse_text(rest, id)?),
        type_name: parse_text(rest, type_name)?,
        type_version,
        time,
        actor: parse_text(rest, actor)?,
        data: parse_text(rest, data)?,
    })
}

fn parse_number(rest: &mut &str) -> Option<i64> {
    let (number, after) = rest.split_once(' ')?;
    *rest = after;
    number.parse().ok()
}

fn parse_text<'a>(rest: &mut &'a str, bytes: usize) -> Option<&'a str> {
    let (text, after) = rest.split_at_checked(bytes)?;
    *rest = after;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(text: &str) -> Page {
        Page {
            events: PageEvents::Text(text.to_owned()),
            after: Position(4),
            slices_from: Timestamp::MIN,
            last: Position(9),
            count: 2,
        }
    }

    fn event(position: u64, actor: &str) -> String {
        let bytes = actor.len();
        format!(
            "{position} 0 7 1 1 -3 27 36 27 {bytes} 2 endpoint/default/iris-roses\
             019a0000-0000-7000-8000-000000000001endpoint.deletion-requested{actor}{{}}"
        )
    }

    #[test]
    fn texts_may_contain_any_characters() {
        let text = event(5, "token:ä 9 \n") + &event(9, "");
        let records = page(&text).decode().unwrap();
        let records: Vec<Record> = records.into_iter().map(Result::unwrap).collect();
        let actors: Vec<&str> = records.iter().map(|r| r.actor.0.as_str()).collect();
        assert_eq!(actors, ["token:ä 9 \n", ""]);
        assert_eq!(records[1].position, Position(9));
        assert_eq!(records[0].time, Timestamp::from_millis(-3));
        assert_eq!(records[0].stream.as_str(), "endpoint/default/iris-roses");
    }

    #[test]
    fn a_truncated_or_unordered_page_is_refused() {
        let text = event(5, "a");
        for bad in [
            &text[..text.len() - 1],
            &event(4, "a"),
            &(text.clone() + &text),
            "x",
        ] {
            let refused = page(bad).decode().unwrap_err();
            assert!(matches!(refused, StoreError::Unreadable { .. }), "{bad}");
        }
    }
}
