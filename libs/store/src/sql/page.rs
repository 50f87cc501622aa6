//! A page of the log as the database's one answer: a single text, which costs a fraction of a row with
//! eleven values per event.
//!
//! Of each event first its numbers, each with a space after it: those of the columns, then how many
//! bytes each text has; then the texts, one after the other.
//!
//! Invariant: events come in order of position, or reading the page fails.

use contract::ids::{Bucket, Position};
use contract::log::{RawRecord, Record, StreamKind};
use contract::time::Timestamp;
use sqlx::AssertSqlSafe;

use crate::model::error::StoreError;
use crate::model::raw::{EventRow, Id, Unreadable};
use crate::sql::connection::{Connection, run};
use crate::sql::{postgres, sqlite};

/// Which events make a page, and how much of them.
#[derive(Clone, Copy, Debug)]
pub struct PageQuery<'a> {
    /// None: of all.
    pub bucket: Option<Bucket>,
    /// The first that may be among them is the one after it.
    pub after: Position,
    /// The last that may be among them.
    pub through: Position,
    /// Kinds of streams of which there are to be none.
    pub left_out: &'a [StreamKind],
    /// Usage that ended by then comes without its slices; [`Timestamp::MIN`] to have all of them.
    pub slices_from: Timestamp,
    /// How many events at most.
    pub limit: usize,
}

/// Events of one page.
pub(crate) struct Page {
    events: Events,
    after: Position,
    slices_from: Timestamp,
    pub last: Position,
}

/// As they came.
enum Events {
    Text(String),
    Raw(Vec<RawRecord>),
}

/// The next events; none where there are no more.
pub(crate) async fn read_page(
    connection: &mut Connection<'_>,
    query: &PageQuery<'_>,
) -> Result<Option<Page>, StoreError> {
    let through = i64::try_from(query.through.0).unwrap_or(i64::MAX);
    let bucket = query.bucket.map_or(-1, |bucket| i64::from(bucket.0));
    let left_out = left_out(query.left_out);
    let text = text(query, connection);
    let (text, last) = run!(
        connection,
        query_as<(Option<String>, Option<i64>)>.fetch_one,
        AssertSqlSafe(text.clone()),
        query.after.0 as i64,
        through,
        query.limit as i64,
        bucket,
        left_out.as_str()
    )?;
    let page = |(text, last)| Page {
        events: Events::Text(text),
        after: query.after,
        slices_from: query.slices_from,
        last: Position(last as u64),
    };
    Ok(text.zip(last).map(page))
}

/// Of constants only: every value is bound. What is not asked for is tested all the same, in a way that
/// costs nothing and lets the text have the same bindings.
fn text(query: &PageQuery<'_>, connection: &Connection<'_>) -> String {
    let bucket = match query.bucket {
        Some(_) => "bucket = $4",
        None => "$4 = -1",
    };
    let left_out = match (query.left_out.is_empty(), connection) {
        (true, _) => "$5 = ','",
        (false, Connection::Sqlite(_)) => sqlite::IS_WANTED,
        (false, Connection::Postgres(..)) => postgres::IS_WANTED,
    };
    format!(
        "SELECT string_agg(position || ' ' || prev || ' ' || bucket || ' ' || version || ' ' \
         || type_version || ' ' || time || ' ' || octet_length(stream) || ' ' || octet_length(id) \
         || ' ' || octet_length(type) || ' ' || octet_length(actor) || ' ' || octet_length(data) \
         || ' ' || stream || id || type || actor || data, ''), MAX(position) \
         FROM (SELECT * FROM events WHERE {bucket} AND position > $1 AND position <= $2 \
         AND {left_out} ORDER BY position LIMIT $3) AS page"
    )
}

/// `,usage/,access/,` for two kinds of streams.
fn left_out(kinds: &[StreamKind]) -> String {
    let names = kinds.iter().map(|kind| format!("{}/,", kind.as_str()));
    names.fold(String::from(","), |all, name| all + &name)
}

impl Page {
    /// Of events that do not come from the database; none without any.
    pub(crate) fn of(events: Vec<RawRecord>, query: &PageQuery<'_>) -> Option<Self> {
        let last = events.last()?.position;
        Some(Self {
            events: Events::Raw(events),
            after: query.after,
            slices_from: query.slices_from,
            last,
        })
    }

    /// Fails for what is no page; an event that cannot be decoded stands for itself.
    pub(crate) fn decode(&self) -> Result<Vec<Result<Record, Box<Unreadable>>>, StoreError> {
        let text = match &self.events {
            Events::Text(text) => text,
            Events::Raw(events) => {
                let events = events.iter();
                return Ok(events
                    .map(|event| EventRow::raw(event).read_since(self.slices_from))
                    .collect());
            }
        };
        let mut records = Vec::new();
        let mut rest = text.as_str();
        let mut before = self.after;
        while !rest.is_empty() {
            let event = take_event(&mut rest).filter(|event| event.position > before);
            let event = event.ok_or_else(|| StoreError::Unreadable {
                position: before,
                detail: "what the database gave after it is not a page of events".to_owned(),
            })?;
            before = event.position;
            records.push(event.read_since(self.slices_from));
        }
        Ok(records)
    }
}

fn take_event<'a>(rest: &mut &'a str) -> Option<EventRow<'a>> {
    let position = Position(take_number(rest)? as u64);
    let prev = Position(take_number(rest)? as u64);
    // What no store writes becomes what nobody knows.
    let bucket = Bucket(u16::try_from(take_number(rest)?).unwrap_or(u16::MAX));
    let version = take_number(rest)? as u64;
    let type_version = u32::try_from(take_number(rest)?).unwrap_or(u32::MAX);
    let time = Timestamp::from_millis(take_number(rest)?);
    let mut lengths = [0; 5];
    for length in &mut lengths {
        *length = usize::try_from(take_number(rest)?).ok()?;
    }
    let [stream, id, type_name, actor, data] = lengths;
    Some(EventRow {
        position,
        prev,
        // Who folds the log does not check its chain.
        prev_hash: None,
        bucket,
        stream: take_text(rest, stream)?,
        version,
        id: Id::Stored(take_text(rest, id)?),
        type_name: take_text(rest, type_name)?,
        type_version,
        time,
        actor: take_text(rest, actor)?,
        data: take_text(rest, data)?,
    })
}

fn take_number(rest: &mut &str) -> Option<i64> {
    let (number, after) = rest.split_once(' ')?;
    *rest = after;
    number.parse().ok()
}

fn take_text<'a>(rest: &mut &'a str, bytes: usize) -> Option<&'a str> {
    let (text, after) = rest.split_at_checked(bytes)?;
    *rest = after;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(text: &str) -> Page {
        Page {
            events: Events::Text(text.to_owned()),
            after: Position(4),
            slices_from: Timestamp::MIN,
            last: Position(9),
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
    fn texts_of_any_kind_keep_their_bounds() {
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
    fn a_page_that_is_cut_off_or_out_of_order_is_not_taken_for_one() {
        let whole = event(5, "a");
        for bad in [
            &whole[..whole.len() - 1],
            &event(4, "a"),
            &(whole.clone() + &whole),
            "x",
        ] {
            let refused = page(bad).decode().unwrap_err();
            assert!(matches!(refused, StoreError::Unreadable { .. }), "{bad}");
        }
    }
}
