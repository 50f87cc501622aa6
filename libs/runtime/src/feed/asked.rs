//! Questions to the store that outlive the wait for their answers. A consumer that has something to do
//! every second drops the feed's future that often; asked anew each time, a store that needs longer
//! than that would never answer.

use std::collections::BTreeMap;
use std::sync::Arc;

use contract::ids::{Bucket, Position};
use contract::log::{RawRecord, Record, StreamKind};
use store::{Entry, Store, StoreError, Unreadable};
use tokio_util::task::AbortOnDropHandle;

use super::{ALL_KINDS, PAGE};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Question {
    /// The head of the log, and the newest position of each of these buckets.
    Heads(Vec<Bucket>),
    /// The page of a bucket after a position.
    Bucket(Bucket, Position),
    /// The page of the whole log.
    All(Position),
}

/// Heads or a page, as was asked.
#[derive(Default)]
struct Answer {
    head: Position,
    heads: BTreeMap<Bucket, Position>,
    page: Vec<Read>,
}

/// One event of the log, decoded if its kind is read.
pub(super) struct Read {
    pub bucket: Bucket,
    pub prev: Position,
    pub position: Position,
    pub outcome: ReadOutcome,
}

pub(super) enum ReadOutcome {
    Record(Arc<Record>),
    Unreadable(Unreadable),
    NotRead,
}

pub(super) struct Reads {
    store: Store,
    pub kinds: &'static [StreamKind],
    /// Stops where nobody wants it any more.
    asked: Option<(Question, AbortOnDropHandle<Result<Answer, StoreError>>)>,
}

impl Reads {
    pub fn new(store: Store) -> Self {
        Self {
            store,
            kinds: ALL_KINDS,
            asked: None,
        }
    }

    pub async fn heads(
        &mut self,
        of: Vec<Bucket>,
    ) -> Result<(Position, BTreeMap<Bucket, Position>), StoreError> {
        let answer = self.answer(Question::Heads(of)).await?;
        Ok((answer.head, answer.heads))
    }

    pub async fn page(&mut self, question: Question) -> Result<Vec<Read>, StoreError> {
        Ok(self.answer(question).await?.page)
    }

    /// What the bus has brought.
    pub fn sort(&self, record: Arc<Record>) -> Read {
        Read {
            bucket: record.bucket,
            prev: record.prev,
            position: record.position,
            outcome: match is_read(self.kinds, record.stream.as_str()) {
                true => ReadOutcome::Record(record),
                false => ReadOutcome::NotRead,
            },
        }
    }

    /// What is asked from here on is answered by the store as it is from here on.
    pub fn forget(&mut self) {
        self.asked = None;
    }

    async fn answer(&mut self, question: Question) -> Result<Answer, StoreError> {
        let (_, answer) = match self.asked.take_if(|(asked, _)| *asked == question) {
            Some(asked) => self.asked.insert(asked),
            None => {
                let asking = ask(self.store.clone(), question.clone(), self.kinds);
                let asking = AbortOnDropHandle::new(tokio::spawn(asking));
                self.asked.insert((question, asking))
            }
        };
        let answer = answer.await;
        self.asked = None;
        answer.unwrap_or_else(|error| Err(StoreError::Database(error.to_string())))
    }
}

async fn ask(
    store: Store,
    question: Question,
    kinds: &'static [StreamKind],
) -> Result<Answer, StoreError> {
    let mut answer = Answer::default();
    let page = match question {
        Question::Heads(buckets) => {
            answer.head = store.head().await?;
            answer.heads = store.bucket_heads(&buckets).await?;
            return Ok(answer);
        }
        Question::Bucket(bucket, after) => store.read_bucket_raw(bucket, after, PAGE).await?,
        Question::All(after) => store.read_raw(after, PAGE).await?,
    };
    answer.page = page.into_iter().map(|raw| decode(raw, kinds)).collect();
    Ok(answer)
}

fn decode(raw: RawRecord, kinds: &[StreamKind]) -> Read {
    Read {
        bucket: raw.bucket,
        prev: raw.prev,
        position: raw.position,
        outcome: match is_read(kinds, &raw.stream) {
            false => ReadOutcome::NotRead,
            true => match Entry::from(raw) {
                Entry::Record(record) => ReadOutcome::Record(record),
                Entry::Unreadable(unreadable) => ReadOutcome::Unreadable(unreadable),
            },
        },
    }
}

/// What people decided about an endpoint concerns every consumer, and so may what is not known yet.
fn is_read(kinds: &[StreamKind], stream: &str) -> bool {
    let kind = StreamKind::of_name(stream);
    kind.is_none_or(|kind| kind == StreamKind::Parking || kinds.contains(&kind))
}
