//! Questions to the store that outlive the wait for their answers. A consumer that has something to do
//! every second drops the feed's future that often; asked anew each time, a store that needs longer
//! than that would never answer.

use contract::ids::{Bucket, Position};
use store::{Entry, Store, StoreError};
use tokio_util::task::AbortOnDropHandle;

use super::PAGE;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Question {
    Head,
    /// The page of a bucket after a position.
    Bucket(Bucket, Position),
    /// The page of the whole log.
    All(Position),
}

/// The head or a page, as was asked.
#[derive(Default)]
struct Answer {
    head: Position,
    page: Vec<Entry>,
}

pub(super) struct Reads {
    store: Store,
    /// Stops where nobody wants it any more.
    asked: Option<(Question, AbortOnDropHandle<Result<Answer, StoreError>>)>,
}

impl Reads {
    pub fn new(store: Store) -> Self {
        Self { store, asked: None }
    }

    pub async fn head(&mut self) -> Result<Position, StoreError> {
        Ok(self.answer(Question::Head).await?.head)
    }

    pub async fn page(&mut self, question: Question) -> Result<Vec<Entry>, StoreError> {
        Ok(self.answer(question).await?.page)
    }

    /// What is asked from here on is answered by the store as it is from here on.
    pub fn forget(&mut self) {
        self.asked = None;
    }

    async fn answer(&mut self, question: Question) -> Result<Answer, StoreError> {
        let (_, answer) = match self.asked.take_if(|(asked, _)| *asked == question) {
            Some(asked) => self.asked.insert(asked),
            None => {
                let asking = tokio::spawn(ask(self.store.clone(), question));
                self.asked
                    .insert((question, AbortOnDropHandle::new(asking)))
            }
        };
        let answer = answer.await;
        self.asked = None;
        answer.unwrap_or_else(|error| Err(StoreError::Database(error.to_string())))
    }
}

async fn ask(store: Store, question: Question) -> Result<Answer, StoreError> {
    let mut answer = Answer::default();
    match question {
        Question::Head => answer.head = store.head().await?,
        Question::Bucket(bucket, after) => {
            answer.page = store.read_bucket_entries(bucket, after, PAGE).await?;
        }
        Question::All(after) => answer.page = store.read_all_entries(after, PAGE).await?,
    }
    Ok(answer)
}
