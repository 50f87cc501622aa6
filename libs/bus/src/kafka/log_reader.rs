//! Reads the complete log from Kafka, to rebuild what was lost elsewhere.
//!
//! Invariant: events are returned as published, whether or not this release can read them. Gaps are
//! named. A position that was seen before is returned as a repeat, so each position is returned as
//! an event once. [`Extent`] says up to which position the log is contiguous, as far as the `prev`
//! chain of each bucket can tell.

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

use super::diagnosis::Diagnosis;
use super::message::decode_stored;
use super::reader::{POLL_TIMEOUT, UnreadPartitions, partitions};
use super::{KafkaConfig, LogContext, Topics, diagnosis};
use crate::BusError;

/// Records read ahead of the caller.
const QUEUE_MAX: usize = 10_000;

/// The read fails after about this long without a message or an end of partition.
const PATIENCE: Duration = LogReader::PATIENCE;

/// The timeout of one request to a broker.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);

/// A rebuilt store continues this far above the last known position, so such a jump is not a gap.
const REBUILD_JUMP: u64 = 1 << 20;

/// The most unreadable messages that are listed one by one.
const UNREADABLE_NAMED_MAX: usize = 100;

/// An item of the log.
#[derive(Debug)]
pub enum LogItem {
    /// An event. Buckets come in any order; within a bucket, events come in topic order, which is
    /// position order unless something was published again.
    Event(RawRecord),
    /// An event whose position was returned before. A caller that must know whether it is the same
    /// event compares them.
    Repeated(RawRecord),
    /// The last item.
    End(Extent),
}

/// How much of the log was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Every position up to here was found.
    pub contiguous: Position,
    /// The highest position found.
    pub last: Position,
    /// The number of distinct records.
    pub records: u64,
    /// The number of repeated records.
    pub repeated: u64,
    /// Known gaps.
    pub gaps: Vec<MissingPosition>,
    /// The locations of messages that are not events, and why.
    pub unreadable: Vec<String>,
}

/// In `bucket`, the record at `needed_by` follows the one at `missing`, which was not found.
/// Earlier records may be missing too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MissingPosition {
    /// The missing position.
    pub missing: Position,
    /// The bucket whose chain is broken.
    pub bucket: Bucket,
    /// The position of the record that names it as its predecessor.
    pub needed_by: Position,
}

/// The published log from its start, as a finite stream.
pub struct LogReader {
    items: mpsc::Receiver<Result<LogItem, BusError>>,
}

impl LogReader {
    /// How long to wait for a broker, and for the next message.
    pub const PATIENCE: Duration = Duration::from_secs(30);

    /// Returns the next item, or `None` after [`LogItem::End`] or an error.
    pub async fn next(&mut self) -> Option<Result<LogItem, BusError>> {
        self.items.recv().await
    }

    /// Collects all events, in order of position.
    ///
    /// # Errors
    ///
    /// [`BusError::Unreachable`] if no broker answers in time, [`BusError::Unreadable`] if a topic
    /// is missing or cannot be read to its end.
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

/// Reads both record topics from their start to their end at the time of the read.
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
                    tally.unreadable(message, &why.to_string());
                    true
                }
            }
        })?;
    }
    Ok(tally.extent())
}

/// Checks that a topic exists: the consumer would wait for a missing one.
fn check_exists(config: &KafkaConfig, topic: &str, count: u16) -> Result<(), BusError> {
    let client = AdminClient::from_config_and_context(&config.client("log"), LogContext).map_err(
        |error| BusError::Failed {
            what: "the bus cannot be read".to_owned(),
            source: error.into(),
        },
    )?;
    let metadata = wait_for_metadata(config, client.inner(), topic)?;
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

/// Waits for a broker, unless waiting cannot help.
fn wait_for_metadata(
    config: &KafkaConfig,
    client: &Client<LogContext>,
    topic: &str,
) -> Result<Metadata, BusError> {
    let began = Instant::now();
    let brokers = &config.brokers;
    loop {
        let left = PATIENCE.saturating_sub(began.elapsed());
        let error =
            match client.fetch_metadata(Some(topic), left.clamp(POLL_TIMEOUT, REQUEST_TIMEOUT)) {
                Ok(metadata) => return Ok(metadata),
                Err(error) => error,
            };
        match diagnosis::diagnose(config, &error) {
            Diagnosis::Refused(why) => {
                return Err(BusError::Unreadable(format!("Kafka at {brokers}: {why}")));
            }
            Diagnosis::Unreachable(why) if began.elapsed() >= PATIENCE => {
                return Err(BusError::Unreachable(format!(
                    "Kafka at {brokers}: {why}, and none has for {} s. Start it, or use an address at \
                     which it can be reached from here, and try again",
                    PATIENCE.as_secs()
                )));
            }
            Diagnosis::Unreachable(_) => {}
        }
    }
}

/// Calls `on_message` with every message until it returns false, which means that the receiver is
/// gone.
fn read_topic(
    config: &KafkaConfig,
    topic: &str,
    count: u16,
    mut on_message: impl FnMut(&BorrowedMessage<'_>) -> bool,
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
    let consumer: BaseConsumer<LogContext> =
        BaseConsumer::from_config_and_context(&settings, LogContext).map_err(unreadable)?;
    let all = partitions(topic, count, Offset::Beginning);
    consumer.assign(&all).map_err(unreadable)?;
    let mut unread = UnreadPartitions::up_to_ends(&consumer, &all).map_err(unreadable)?;
    let mut idle = Duration::ZERO;
    while !unread.is_empty() {
        match consumer.poll(POLL_TIMEOUT) {
            Some(Ok(message)) => {
                idle = Duration::ZERO;
                unread.read(&message);
                if !on_message(&message) {
                    return Err(BusError::Unreadable("the receiver is gone".to_owned()));
                }
            }
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                idle = Duration::ZERO;
                unread.mark_end(partition);
            }
            Some(Err(error)) => {
                idle += POLL_TIMEOUT;
                tracing::debug!(%error, topic, "failed to read, retrying");
            }
            None => idle += POLL_TIMEOUT,
        }
        if idle >= PATIENCE {
            return Err(BusError::Unreachable(format!(
                "Kafka at {}: no message of topic {topic} arrived for {} s, and {} of its partitions have not \
                 been read to their end. Check that all of its brokers are running, and try again",
                config.brokers,
                PATIENCE.as_secs(),
                unread.len()
            )));
        }
    }
    Ok(())
}

/// What was found, and what must exist.
#[derive(Default)]
struct Tally {
    seen: Ranges,
    /// Predecessors named by records and not found yet: by whom, and in which bucket.
    missing: BTreeMap<Position, (Bucket, Position)>,
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
        self.missing.remove(&event.position);
        if event.prev > Position::START && !self.seen.contains(event.prev.0) {
            self.missing
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
        let missing = self.missing.iter();
        self.extent.gaps = missing
            .map(|(missing, (bucket, needed_by))| MissingPosition {
                missing: *missing,
                bucket: *bucket,
                needed_by: *needed_by,
            })
            .collect();
        self.extent.contiguous = Position(self.seen.contiguous_end(REBUILD_JUMP));
        let first_gap = self.extent.gaps.first();
        if let Some(gap) = first_gap {
            self.extent.contiguous = self.extent.contiguous.min(Position(gap.missing.0 - 1));
        }
        self.extent
    }
}

/// A set of mostly consecutive numbers: from the first to the last of each run.
#[derive(Default)]
struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    fn contains(&self, number: u64) -> bool {
        let before = self.0.range(..=number).next_back();
        before.is_some_and(|(_, last)| *last >= number)
    }

    /// Returns false if it was in the set already.
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

    /// The end of the run from 1 on. A step of at least `jump` is not a gap: those numbers were
    /// skipped on purpose.
    fn contiguous_end(&self, jump: u64) -> u64 {
        let mut end = 0;
        for (first, last) in &self.0 {
            let step = first - end;
            if step > 1 && step < jump {
                break;
            }
            end = *last;
        }
        end
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
        assert_eq!(ranges.contiguous_end(REBUILD_JUMP), REBUILD_JUMP + 5);
        assert_eq!(ranges.contiguous_end(u64::MAX), 3);
    }

    proptest! {
        #[test]
        fn ranges_match_a_set(numbers in prop::collection::vec(1u64..60, 0..80)) {
            let (mut ranges, mut set) = (Ranges::default(), BTreeSet::new());
            for number in numbers {
                prop_assert_eq!(ranges.insert(number), set.insert(number));
            }
            for number in 0..62 {
                prop_assert_eq!(ranges.contains(number), set.contains(&number));
            }
            let end = (1..).take_while(|number| set.contains(number)).count() as u64;
            prop_assert_eq!(ranges.contiguous_end(u64::MAX), end);
        }
    }
}
