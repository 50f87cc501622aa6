//! Questions to the store that outlive the wait for their answers. A consumer that has something to do
//! every second drops the feed's future that often; asked anew each time, a store that needs longer
//! than that would never answer.

use std::collections::BTreeMap;
use std::sync::Arc;

use contract::ids::{Bucket, Position};
use contract::log::{Record, StreamKind};
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
    Page(PageQuestion),
}

/// The page after a position, of one bucket or of the whole log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PageQuestion {
    bucket: Option<Bucket>,
    after: Position,
    /// Kinds of streams of which nothing is wanted, and how far that holds.
    left_out: Vec<StreamKind>,
    until: Position,
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
    /// There is more to read at once.
    is_full: bool,
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
    /// Stops where nobody wants it any more. While a page is dealt with, the one after it is read.
    asked: Option<Asked>,
}

type Asked = (Question, AbortOnDropHandle<Result<Answer, StoreError>>);

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
        let question = self.page_question(bucket, after);
        let page = self.answer(Question::Page(question)).await?.page;
        if page.is_full {
            let next = self.page_question(bucket, page.through);
            self.ask(Question::Page(next));
        }
        Ok(page)
    }

    fn page_question(&self, bucket: Option<Bucket>, after: Position) -> PageQuestion {
        let (left_out, until) = (self.wants)(after);
        PageQuestion {
            bucket,
            after,
            left_out,
            until,
        }
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
            None => self.ask(question),
        };
        let answer = answer.await;
        self.asked = None;
        answer.unwrap_or_else(|error| Err(StoreError::Database(error.to_string())))
    }

    fn ask(&mut self, question: Question) -> &mut Asked {
        let asking = ask(self.store.clone(), question.clone());
        let asking = AbortOnDropHandle::new(tokio::spawn(asking));
        self.asked.insert((question, asking))
    }
}

async fn ask(store: Store, question: Question) -> Result<Answer, StoreError> {
    let mut answer = Answer::default();
    match question {
        Question::Heads(buckets) => {
            answer.head = store.head().await?;
            answer.heads = store.bucket_heads(&buckets).await?;
        }
        Question::Page(page) => {
            // What is committed after this is not all among what is read.
            let until = page.until.min(store.head().await?);
            let entries = store
                .read_without(page.bucket, (page.after, until), &page.left_out, PAGE)
                .await?;
            answer.page.is_full = entries.len() == PAGE;
            answer.page.through = match entries.last() {
                Some(last) if answer.page.is_full => last.position(),
                _ => until,
            };
            answer.page.reads = entries.into_iter().map(Read::from).collect();
        }
    }
    Ok(answer)
}

impl From<Entry> for Read {
    fn from(entry: Entry) -> Self {
        let (bucket, prev, position) = match &entry {
            Entry::Record(record) => (record.bucket, record.prev, record.position),
            Entry::Unreadable(unreadable) => {
                (unreadable.bucket, unreadable.prev, unreadable.position)
            }
        };
        Self {
            bucket,
            prev,
            position,
            outcome: match entry {
                Entry::Record(record) => ReadOutcome::Record(record),
                Entry::Unreadable(unreadable) => ReadOutcome::Unreadable(unreadable),
            },
        }
    }
}
