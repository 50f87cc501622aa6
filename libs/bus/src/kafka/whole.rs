//! The whole log as Kafka has it, for rebuilding what was lost elsewhere.
//!
//! Invariant: an event is given as it was published, whether or not this release can read it. What is
//! missing is named. What has a position that was there before is told apart, so that every position is
//! given as an event once; [`Extent::whole`] is the position up to which every position was there, as
//! far as the chain of `prev` in each bucket can tell.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use contract::ids::{BUCKETS, Bucket, Position};
use contract::log::RawRecord;
use rdkafka::admin::AdminClient;
use rdkafka::client::Client;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::metadata::Metadata;
use rdkafka::topic_partition_list::Offset;
use tokio::sync::mpsc;

use super::message::decode_stored;
use super::reader::{POLL, Unread, partitions};
use super::reason::Reason;
use super::{KafkaConfig, Quiet, Topics, reason};
use crate::BusError;

/// Records read ahead of the caller.
const QUEUE_MAX: usize = 10_000;

/// Without any message and any end for about this long, the log cannot be read.
const PATIENCE: Duration = LogReader::PATIENCE;

/// How long one question to a broker may take.
const ASK_FOR: Duration = Duration::from_secs(3);

/// A store that was rebuilt goes on this far above what it knew, so this is no hole.
const REBUILD_JUMP: u64 = 1 << 20;

/// Messages that could not be read, named one by one up to here.
const UNREADABLE_NAMED_MAX: usize = 100;

/// What a reader of the whole log gives.
#[derive(Debug)]
pub enum LogItem {
    /// Buckets come in any order; within one, the order of the topic, which is that of positions
    /// unless something was published again.
    Event(RawRecord),
    /// Has the position of an event that was given before. Whoever must be sure that it is the same
    /// one compares them.
    Repeated(RawRecord),
    /// The last item.
    End(Extent),
}

/// How much of the log was there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Every position up to here was there.
    pub whole: Position,
    /// The highest position that was there.
    pub last: Position,
    /// Records that came, without those that had come before.
    pub records: u64,
    /// Records that were there before.
    pub repeated: u64,
    /// What is known to be missing.
    pub holes: Vec<Hole>,
    /// Places of messages that are no events, and why.
    pub unreadable: Vec<String>,
}

/// In `bucket` the record at `missing` was not there, which the one at `needed_by` follows. Others
/// before it may be missing too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hole {
    /// The position that was not there.
    pub missing: Position,
    /// The bucket whose chain is broken there.
    pub bucket: Bucket,
    /// The position of the record that names it as the one before.
    pub needed_by: Position,
}

/// The published log from its beginning, as a stream that ends.
pub struct LogReader {
    items: mpsc::Receiver<Result<LogItem, BusError>>,
}

impl LogReader {
    /// How long is waited for a broker, and for the next of what it has.
    pub const PATIENCE: Duration = Duration::from_secs(30);

    /// `None` after [`LogItem::End`] or an error.
    pub async fn next(&mut self) -> Option<Result<LogItem, BusError>> {
        self.items.recv().await
    }

    /// Everything at once, in order of position.
    ///
    /// # Errors
    ///
    /// [`BusError::Unreachable`] where no broker answers within [`PATIENCE`](Self::PATIENCE),
    /// [`BusError::Unreadable`] where a topic is missing or cannot be read to its end.
    pub async fn collect(mut self) -> Result<(Vec<RawRecord>, Extent), BusError> {
        let mut events = Vec::new();
        while let Some(item) = self.next().await {
            match item? {
                LogItem::Event(event) => events.push(event),
                LogItem::Repeated(_) => {}
                LogItem::End(extent) => {
                    events.sort_by_key(|event| event.position);
                    return Ok((events, extent));
                }
            }
        }
        Err(BusError::Unreadable("the reader ended early".to_owned()))
    }
}

/// Reads both topics of records from their beginnings to where they end when they are reached.
pub fn read_log(config: &KafkaConfig) -> LogReader {
    let (sender, items) = mpsc::channel(QUEUE_MAX);
    let config = config.clone();
    std::thread::spawn(move || {
        let last = match read(&config, &sender) {
            Ok(extent) => Ok(LogItem::End(extent)),
            Err(error) => Err(error),
        };
        let _ = sender.blocking_send(last);
    });
    LogReader { items }
}

fn read(
    config: &KafkaConfig,
    sender: &mpsc::Sender<Result<LogItem, BusError>>,
) -> Result<Extent, BusError> {
    let topics = Topics::new(&config.prefix);
    let mut tally = Tally::default();
    for (topic, count, first) in [
        (&topics.events, BUCKETS, Bucket(0)),
        (&topics.global, 1, Bucket::GLOBAL),
    ] {
        check_exists(config, topic, count)?;
        let bucket = |partition: i32| Bucket(first.0 + partition as u16);
        read_topic(config, topic, count, |message| {
            let decoded = decode_stored(
                bucket(message.partition()),
                message.headers(),
                message.payload(),
            );
            match decoded {
                Ok(event) => {
                    let item = match tally.is_new(&event) {
                        true => LogItem::Event(event),
                        false => LogItem::Repeated(event),
                    };
                    sender.blocking_send(Ok(item)).is_ok()
                }
                Err(why) => {
                    tally.unreadable(message, &why);
                    true
                }
            }
        })?;
    }
    Ok(tally.extent())
}

/// A topic that is not there would be waited for.
fn check_exists(config: &KafkaConfig, topic: &str, count: u16) -> Result<(), BusError> {
    let client =
        AdminClient::from_config_and_context(&config.client("log"), Quiet).map_err(|error| {
            BusError::Failed {
                what: "the bus cannot be read".to_owned(),
                source: error.into(),
            }
        })?;
    let metadata = first_answer(config, client.inner(), topic)?;
    let partitions = metadata
        .topics()
        .iter()
        .map(|topic| topic.partitions().len());
    let found: usize = partitions.sum();
    if found == usize::from(count) {
        return Ok(());
    }
    Err(BusError::Unreadable(format!(
        "Kafka topic {topic} has {found} partitions and should have {count}; is the prefix right?"
    )))
}

/// Waits for a broker, but not where waiting cannot help.
fn first_answer(
    config: &KafkaConfig,
    client: &Client<Quiet>,
    topic: &str,
) -> Result<Metadata, BusError> {
    let began = Instant::now();
    let brokers = &config.brokers;
    loop {
        let left = PATIENCE.saturating_sub(began.elapsed());
        let error = match client.fetch_metadata(Some(topic), left.clamp(POLL, ASK_FOR)) {
            Ok(metadata) => return Ok(metadata),
            Err(error) => error,
        };
        match reason::of(config, &error) {
            Reason::Refused(why) => {
                return Err(BusError::Unreadable(format!("Kafka at {brokers}: {why}")));
            }
            Reason::Away(why) if began.elapsed() >= PATIENCE => {
                return Err(BusError::Unreachable(format!(
                    "Kafka at {brokers}: {why}, and none has for {} s. Start it, or name the address at \
                     which it can be reached from here, and try again",
                    PATIENCE.as_secs()
                )));
            }
            Reason::Away(_) => {}
        }
    }
}

/// Calls `take` with every message; it returns false when nobody wants more.
fn read_topic(
    config: &KafkaConfig,
    topic: &str,
    count: u16,
    mut take: impl FnMut(&BorrowedMessage<'_>) -> bool,
) -> Result<(), BusError> {
    let unreadable = |error: KafkaError| BusError::Failed {
        what: format!("the bus cannot be read: {topic}"),
        source: error.into(),
    };
    let mut settings = config.consumer("log");
    settings
        .set("enable.partition.eof", "true")
        .set("auto.offset.reset", "earliest")
        .set("queued.max.messages.kbytes", "65536");
    let consumer: BaseConsumer<Quiet> =
        BaseConsumer::from_config_and_context(&settings, Quiet).map_err(unreadable)?;
    let all = partitions(topic, count, Offset::Beginning);
    consumer.assign(&all).map_err(unreadable)?;
    let mut unread = Unread::up_to_ends(&consumer, &all).map_err(unreadable)?;
    let mut silent = Duration::ZERO;
    while !unread.is_empty() {
        match consumer.poll(POLL) {
            Some(Ok(message)) => {
                silent = Duration::ZERO;
                unread.read(&message);
                if !take(&message) {
                    return Err(BusError::Unreadable("nobody reads on".to_owned()));
                }
            }
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                silent = Duration::ZERO;
                unread.reached_end(partition);
            }
            Some(Err(error)) => {
                silent += POLL;
                tracing::debug!(%error, topic, "cannot read on yet");
            }
            None => silent += POLL,
        }
        if silent >= PATIENCE {
            return Err(BusError::Unreachable(format!(
                "Kafka at {}: nothing came of topic {topic} for {} s, and {} of its partitions have not \
                 been read to their end. See whether all of its brokers run, and try again",
                config.brokers,
                PATIENCE.as_secs(),
                unread.len()
            )));
        }
    }
    Ok(())
}

/// What was seen, and what must have been there.
#[derive(Default)]
struct Tally {
    seen: Ranges,
    /// Positions that a record names as the one before it, and that were not seen yet.
    wanted: BTreeMap<Position, (Bucket, Position)>,
    extent: Extent,
}

impl Tally {
    fn is_new(&mut self, event: &RawRecord) -> bool {
        if !self.seen.insert(event.position.0) {
            self.extent.repeated += 1;
            return false;
        }
        self.extent.records += 1;
        self.extent.last = self.extent.last.max(event.position);
        self.wanted.remove(&event.position);
        if event.prev > Position::START && !self.seen.contains(event.prev.0) {
            self.wanted
                .insert(event.prev, (event.bucket, event.position));
        }
        true
    }

    fn unreadable(&mut self, message: &BorrowedMessage<'_>, why: &str) {
        if self.extent.unreadable.len() < UNREADABLE_NAMED_MAX {
            self.extent.unreadable.push(format!(
                "{} partition {} offset {}: {why}",
                message.topic(),
                message.partition(),
                message.offset()
            ));
        }
    }

    fn extent(mut self) -> Extent {
        let holes = self.wanted.iter();
        self.extent.holes = holes
            .map(|(missing, (bucket, needed_by))| Hole {
                missing: *missing,
                bucket: *bucket,
                needed_by: *needed_by,
            })
            .collect();
        self.extent.whole = Position(self.seen.whole(REBUILD_JUMP));
        let first_hole = self.extent.holes.first();
        if let Some(hole) = first_hole {
            self.extent.whole = self.extent.whole.min(Position(hole.missing.0 - 1));
        }
        self.extent
    }
}

/// A set of numbers that are mostly consecutive: from the first to the last of each run.
#[derive(Default)]
struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    fn contains(&self, number: u64) -> bool {
        let before = self.0.range(..=number).next_back();
        before.is_some_and(|(_, last)| *last >= number)
    }

    /// False: it was there already.
    fn insert(&mut self, number: u64) -> bool {
        if self.contains(number) {
            return false;
        }
        let last = self.0.remove(&(number + 1)).unwrap_or(number);
        let before = self.0.range_mut(..number).next_back();
        match before {
            Some((_, end)) if *end + 1 == number => *end = last,
            _ => {
                self.0.insert(number, last);
            }
        }
        true
    }

    /// The end of the run from 1 on. A step of at least `jump` is no gap: numbers were left out on
    /// purpose.
    fn whole(&self, jump: u64) -> u64 {
        let mut whole = 0;
        for (first, last) in &self.0 {
            let step = first - whole;
            if step > 1 && step < jump {
                break;
            }
            whole = *last;
        }
        whole
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_run_ends_at_a_gap_but_not_at_a_rebuild() {
        let mut ranges = Ranges::default();
        for number in [
            3,
            1,
            2,
            REBUILD_JUMP + 4,
            REBUILD_JUMP + 5,
            REBUILD_JUMP + 7,
        ] {
            assert!(ranges.insert(number));
        }
        assert_eq!(ranges.whole(REBUILD_JUMP), REBUILD_JUMP + 5);
        assert_eq!(ranges.whole(u64::MAX), 3);
    }

    proptest! {
        #[test]
        fn runs_hold_what_a_set_would(numbers in prop::collection::vec(1u64..60, 0..80)) {
            let (mut ranges, mut set) = (Ranges::default(), BTreeSet::new());
            for number in numbers {
                prop_assert_eq!(ranges.insert(number), set.insert(number));
            }
            for number in 0..62 {
                prop_assert_eq!(ranges.contains(number), set.contains(&number));
            }
            let whole = (1..).take_while(|number| set.contains(number)).count() as u64;
            prop_assert_eq!(ranges.whole(u64::MAX), whole);
        }
    }
}
