//! Questions to the store that outlive the wait for their answers. A consumer that has something to do
//! every second drops the feed's future that often; asked anew each time, a store that needs longer
//! than that would never answer.

use std::collections::BTreeMap;
use std::sync::Arc;

use contract::ids::{Bucket, Position};
use contract::log::{RawRecord, Record, StreamKind};
use store::{Entry, Store, StoreError, Unreadable};
use tokio_util::task::AbortOnDropHandle;

use super::PAGE;

/// Which events are wanted after a position: those that are not of the kinds of streams that are left out.
/// The position that comes with them is how far that holds.
pub type Wants = Arc<dyn Fn(Position) -> (Vec<StreamKind>, Position) + Send + Sync>;

/// Where everything is wanted.
pub(super) fn everything() -> Wants {
    Arc::new(|_| (Vec::new(), Position(u64::MAX)))
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Question {
    /// The head of the log, and the newest position of each of these buckets.
    Heads(Vec<Bucket>),
    /// The page after a position, of one bucket or of the whole log.
    Page(Option<Bucket>, Position),
}

#[derive(Default)]
struct Answer {
    head: Position,
    heads: BTreeMap<Bucket, Position>,
    page: Page,
}

/// What was read of the log.
#[derive(Default)]
pub(super) struct Page {
    pub reads: Vec<Read>,
    /// All that is wanted up to here is among them.
    pub through: Position,
}

/// One event of the log.
pub(super) struct Read {
    pub bucket: Bucket,
    pub prev: Position,
    pub position: Position,
    pub outcome: ReadOutcome,
}

pub(super) enum ReadOutcome {
    Record(Arc<Record>),
    Unreadable(Unreadable),
    /// Not wanted.
    Passed,
}

pub(super) struct Reads {
    store: Store,
    pub wants: Wants,
    /// Stops where nobody wants it any more.
    asked: Option<(Question, AbortOnDropHandle<Result<Answer, StoreError>>)>,
}

impl Reads {
    pub fn new(store: Store) -> Self {
        Self {
            store,
            wants: everything(),
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

    pub async fn page(
        &mut self,
        bucket: Option<Bucket>,
        after: Position,
    ) -> Result<Page, StoreError> {
        Ok(self.answer(Question::Page(bucket, after)).await?.page)
    }

    /// What the bus has brought.
    pub fn sort(&self, record: Arc<Record>) -> Read {
        let before = Position(record.position.0.saturating_sub(1));
        let (left_out, _) = (self.wants)(before);
        let is_left_out = record
            .stream
            .kind()
            .is_some_and(|kind| left_out.contains(&kind));
        Read {
            bucket: record.bucket,
            prev: record.prev,
            position: record.position,
            outcome: match is_left_out {
                true => ReadOutcome::Passed,
                false => ReadOutcome::Record(record),
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
                let asking = ask(self.store.clone(), question.clone(), self.wants.clone());
                let asking = AbortOnDropHandle::new(tokio::spawn(asking));
                self.asked.insert((question, asking))
            }
        };
        let answer = answer.await;
        self.asked = None;
        answer.unwrap_or_else(|error| Err(StoreError::Database(error.to_string())))
    }
}

async fn ask(store: Store, question: Question, wants: Wants) -> Result<Answer, StoreError> {
    let mut answer = Answer::default();
    match question {
        Question::Heads(buckets) => {
            answer.head = store.head().await?;
            answer.heads = store.bucket_heads(&buckets).await?;
        }
        Question::Page(bucket, after) => {
            let (left_out, until) = wants(after);
            // What is committed after this is not all among what is read.
            let until = until.min(store.head().await?);
            let raw = store
                .read_without(bucket, (after, until), &left_out, PAGE)
                .await?;
            answer.page.through = match raw.last() {
                Some(last) if raw.len() == PAGE => last.position,
                _ => until,
            };
            answer.page.reads = raw.into_iter().map(decode).collect();
        }
    }
    Ok(answer)
}

fn decode(raw: RawRecord) -> Read {
    Read {
        bucket: raw.bucket,
        prev: raw.prev,
        position: raw.position,
        outcome: match Entry::from(raw) {
            Entry::Record(record) => ReadOutcome::Record(record),
            Entry::Unreadable(unreadable) => ReadOutcome::Unreadable(unreadable),
        },
    }
}
