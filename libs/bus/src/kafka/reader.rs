//! Consumers, a thread each. A thread polls for as long as its subscriber is there; a subscriber that
//! is slow makes it pause its partitions, never stop polling, or Kafka would take them away.
//!
//! Invariant: what a subscriber gets of a bucket lies between `Assigned` and `Revoked` of it, because
//! one thread and one queue carry both.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use contract::ids::{BUCKETS, Bucket};
use rdkafka::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::{RDKafkaErrorCode, RDKafkaRespErr};
use tokio::sync::mpsc::{self, error::TrySendError};

use super::message::decode_record;
use super::topics::FRAME_PARTITIONS;
use super::{Quiet, Shared, is_broken, lock};
use crate::BusMessage;

/// How long a thread waits for a message before it looks whether it is to end.
pub(super) const POLL: Duration = Duration::from_millis(100);

/// The same while the subscriber has no room.
const POLL_PAUSED: Duration = Duration::from_millis(10);

pub(super) const ANSWER_PATIENCE: Duration = Duration::from_secs(5);
pub(super) const RETRY_AFTER: Duration = Duration::from_millis(300);
const REBALANCE_TRIES: usize = 10;

/// Messages for one subscriber, in order.
pub(super) struct Outbox<T> {
    waiting: VecDeque<T>,
    sender: mpsc::Sender<T>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    Some,
    None,
    /// The subscriber is gone.
    Gone,
}

impl<T> Outbox<T> {
    pub fn new(sender: mpsc::Sender<T>) -> Self {
        Self {
            waiting: VecDeque::new(),
            sender,
        }
    }

    pub fn push(&mut self, message: T) {
        self.waiting.push_back(message);
    }

    pub fn flush(&mut self) -> Room {
        if self.sender.is_closed() {
            return Room::Gone;
        }
        while let Some(message) = self.waiting.pop_front() {
            match self.sender.try_send(message) {
                Ok(()) => {}
                Err(TrySendError::Full(message)) => {
                    self.waiting.push_front(message);
                    return Room::None;
                }
                Err(TrySendError::Closed(_)) => return Room::Gone,
            }
        }
        Room::Some
    }
}

/// Pauses whatever is assigned while a subscriber has no room.
#[derive(Default)]
pub(super) struct Brake {
    paused: TopicPartitionListOrNone,
}

type TopicPartitionListOrNone = Option<TopicPartitionList>;

impl Brake {
    /// How long to poll from here.
    pub fn apply<C: ConsumerContext>(
        &mut self,
        consumer: &BaseConsumer<C>,
        room: Room,
    ) -> Duration {
        let wanted = match room {
            Room::None => consumer.assignment().ok(),
            _ => None,
        };
        if wanted == self.paused {
            return if wanted.is_some() { POLL_PAUSED } else { POLL };
        }
        if let Some(paused) = self.paused.take() {
            report(consumer.resume(&paused), "resume");
        }
        if let Some(assigned) = &wanted {
            report(consumer.pause(assigned), "pause");
        }
        self.paused = wanted;
        if self.paused.is_some() {
            POLL_PAUSED
        } else {
            POLL
        }
    }
}

fn report(outcome: KafkaResult<()>, what: &str) {
    if let Err(error) = outcome {
        tracing::debug!(%error, what, "a Kafka consumer could not do as it was told");
    }
}

/// Every partition of a topic.
pub(super) fn partitions(topic: &str, count: u16, offset: Offset) -> TopicPartitionList {
    let mut list = TopicPartitionList::with_capacity(count.into());
    for partition in 0..count {
        // Fails for offsets that no partition can have, which these are not.
        let _ = list.add_partition_offset(topic, partition.into(), offset);
    }
    list
}

pub(super) fn consumer<C: ConsumerContext>(
    shared: &Shared,
    group: &str,
    context: C,
) -> Option<BaseConsumer<C>> {
    let config = shared.config.consumer(group);
    match BaseConsumer::from_config_and_context(&config, context) {
        Ok(consumer) => Some(consumer),
        Err(error) => {
            tracing::error!(%error, group, "there is no Kafka consumer");
            shared.pause(RETRY_AFTER);
            None
        }
    }
}

/// Turns "the end" into offsets, so that all that is published after this call is read.
pub(super) fn resolve_ends<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    list: &TopicPartitionList,
) -> KafkaResult<TopicPartitionList> {
    let mut asked = list.clone();
    asked.set_all_offsets(Offset::End)?;
    let ends = consumer.offsets_for_times(asked, ANSWER_PATIENCE)?;
    for element in ends.elements() {
        element.error()?;
        if !matches!(element.offset(), Offset::Offset(_)) {
            return Err(KafkaError::OffsetFetch(RDKafkaErrorCode::NoOffset));
        }
    }
    Ok(ends)
}

/// Partitions that have not been read up to where they ended when the reading began. Kafka's own word
/// on that comes when nothing is left, so never where something new comes all the time.
#[derive(Default)]
pub(super) struct Unread(BTreeMap<i32, i64>);

impl Unread {
    pub fn up_to_ends<C: ConsumerContext>(
        consumer: &BaseConsumer<C>,
        list: &TopicPartitionList,
    ) -> KafkaResult<Self> {
        let ends = resolve_ends(consumer, list)?;
        let ends = ends.elements();
        let ends = ends.iter().filter_map(|of| match of.offset() {
            Offset::Offset(end) if end > 0 => Some((of.partition(), end)),
            _ => None,
        });
        Ok(Self(ends.collect()))
    }

    pub fn read(&mut self, message: &BorrowedMessage<'_>) {
        let partition = message.partition();
        let end = self.0.get(&partition);
        if end.is_some_and(|end| message.offset() + 1 >= *end) {
            self.0.remove(&partition);
        }
    }

    /// Kafka says so; what stood there at last may be gone by now.
    pub fn reached_end(&mut self, partition: i32) {
        self.0.remove(&partition);
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// Whether every partition of the log, of frames and of routes can be read.
pub(super) fn all_answer(shared: &Shared) -> KafkaResult<()> {
    let config = shared.config.consumer("health");
    let consumer: BaseConsumer<Quiet> = BaseConsumer::from_config_and_context(&config, Quiet)?;
    let topics = &shared.topics;
    for (topic, count) in [
        (&topics.events, BUCKETS),
        (&topics.global, 1),
        (&topics.frames, FRAME_PARTITIONS),
        (&topics.routes, BUCKETS),
    ] {
        resolve_ends(&consumer, &partitions(topic, count, Offset::End))?;
    }
    Ok(())
}

/// The same from within a rebalance, which cannot wait for ever.
fn resolve_ends_soon<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    list: &TopicPartitionList,
) -> TopicPartitionList {
    for _ in 0..REBALANCE_TRIES {
        match resolve_ends(consumer, list) {
            Ok(ends) => return ends,
            Err(error) => {
                tracing::debug!(%error, "the ends of new buckets are not known yet")
            }
        }
        std::thread::sleep(RETRY_AFTER);
    }
    // From wherever the end will be when a broker answers.
    let mut ends = list.clone();
    let _ = ends.set_all_offsets(Offset::End);
    ends
}

/// Assigns partitions from their ends on; tries until a broker answers. False: it is time to stop.
pub(super) fn assign_from_ends(
    shared: &Shared,
    consumer: &BaseConsumer<Quiet>,
    list: &TopicPartitionList,
) -> bool {
    while !shared.stopping() {
        let assigned = resolve_ends(consumer, list).and_then(|ends| consumer.assign(&ends));
        match assigned {
            Ok(()) => return true,
            Err(error) => {
                tracing::debug!(%error, "partitions cannot be read yet")
            }
        }
        shared.pause(RETRY_AFTER);
    }
    false
}

/// All buckets, in this process.
pub(super) fn read_all(shared: &Shared, sender: mpsc::Sender<BusMessage>) {
    let mut list = partitions(&shared.topics.events, BUCKETS, Offset::End);
    let _ = list.add_partition_offset(&shared.topics.global, 0, Offset::End);
    let assigned = BusMessage::Assigned(Bucket::of_endpoints().collect());
    read_assigned(shared, &list, Some(assigned), sender);
}

/// The bucket that everybody reads whole.
pub(super) fn read_global(shared: &Shared, sender: mpsc::Sender<BusMessage>) {
    let list = partitions(&shared.topics.global, 1, Offset::End);
    read_assigned(shared, &list, None, sender);
}

fn read_assigned(
    shared: &Shared,
    list: &TopicPartitionList,
    first: Option<BusMessage>,
    sender: mpsc::Sender<BusMessage>,
) {
    if !shared.wait_for_topics() {
        return;
    }
    let mut outbox = Outbox::new(sender);
    let mut first = first;
    while !shared.stopping() && outbox.flush() != Room::Gone {
        let Some(consumer) = consumer(shared, "whole", Quiet) else {
            continue;
        };
        if !assign_from_ends(shared, &consumer, list) {
            return;
        }
        first
            .take()
            .into_iter()
            .for_each(|first| outbox.push(first));
        let mut brake = Brake::default();
        while !shared.stopping() && !is_broken(consumer.client()) {
            let room = outbox.flush();
            if room == Room::Gone {
                return;
            }
            let patience = brake.apply(&consumer, room);
            if let Some(message) = poll(&consumer, patience) {
                outbox.extend_with(read_record(shared, &message));
            }
        }
    }
}

impl Outbox<BusMessage> {
    fn extend_with(&mut self, message: Option<BusMessage>) {
        self.waiting.extend(message);
    }
}

/// A message, if there is one. Errors of the connection pass; [`super::health`] reports them.
pub(super) fn poll<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    patience: Duration,
) -> Option<BorrowedMessage<'_>> {
    match consumer.poll(patience)? {
        Ok(message) => Some(message),
        Err(error) => {
            tracing::debug!(%error, "a Kafka consumer could not read");
            None
        }
    }
}

/// What cannot be read is skipped: a record's `prev` shows the hole, and the store fills it.
fn read_record(shared: &Shared, message: &BorrowedMessage<'_>) -> Option<BusMessage> {
    let bucket = bucket_of(shared, message);
    match decode_record(bucket, message.headers(), message.payload()) {
        Ok(record) => Some(BusMessage::Record(Arc::new(record))),
        Err(why) => {
            skip(shared, message, &why);
            None
        }
    }
}

pub(super) fn bucket_of(shared: &Shared, message: &BorrowedMessage<'_>) -> Bucket {
    if message.topic() == shared.topics.global {
        return Bucket::GLOBAL;
    }
    Bucket(message.partition() as u16)
}

pub(super) fn skip(shared: &Shared, message: &BorrowedMessage<'_>, why: &str) {
    shared.count_dropped();
    tracing::warn!(
        topic = message.topic(),
        partition = message.partition(),
        offset = message.offset(),
        "skips a message that is not ours: {why}"
    );
}

/// The buckets that Kafka deals to this member of a group.
pub(super) fn read_as_member(shared: &Shared, group: &str, sender: mpsc::Sender<BusMessage>) {
    if !shared.wait_for_topics() {
        return;
    }
    let outbox = Arc::new(Mutex::new(Outbox::new(sender)));
    while !shared.stopping() && lock(&outbox).flush() != Room::Gone {
        let member = Member {
            outbox: outbox.clone(),
        };
        let Some(consumer) = consumer(shared, group, member) else {
            continue;
        };
        if let Err(error) = consumer.subscribe(&[&shared.topics.events]) {
            tracing::error!(%error, group, "cannot join the Kafka group");
            shared.pause(RETRY_AFTER);
            continue;
        }
        let mut brake = Brake::default();
        while !shared.stopping() && !is_broken(consumer.client()) {
            let room = lock(&outbox).flush();
            if room == Room::Gone {
                break;
            }
            let patience = brake.apply(&consumer, room);
            if let Some(message) = poll(&consumer, patience) {
                lock(&outbox).extend_with(read_record(shared, &message));
            }
        }
        // Leaves the group: what was ours is revoked on the way out.
        drop(consumer);
    }
    lock(&outbox).flush();
}

/// Told by Kafka, from within a poll, which buckets come and go.
struct Member {
    outbox: Arc<Mutex<Outbox<BusMessage>>>,
}

impl ClientContext for Member {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        Quiet.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        Quiet.error(error, reason);
    }
}

impl ConsumerContext for Member {
    fn rebalance(
        &self,
        consumer: &BaseConsumer<Self>,
        event: RDKafkaRespErr,
        list: &mut TopicPartitionList,
    ) {
        let partitions = list.elements();
        let buckets: Vec<Bucket> = partitions
            .iter()
            .map(|element| Bucket(element.partition() as u16))
            .collect();
        if event == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS {
            // Offsets first: a record published after `Assigned` was sent must not be missed.
            let ends = resolve_ends_soon(consumer, list);
            report(consumer.incremental_assign(&ends), "assign");
            tell(&self.outbox, buckets, BusMessage::Assigned);
        } else {
            report(consumer.incremental_unassign(list), "unassign");
            tell(&self.outbox, buckets, BusMessage::Revoked);
        }
    }
}

fn tell(
    outbox: &Mutex<Outbox<BusMessage>>,
    buckets: Vec<Bucket>,
    what: fn(Vec<Bucket>) -> BusMessage,
) {
    if !buckets.is_empty() {
        lock(outbox).push(what(buckets));
    }
}
