//! Consumers, one thread each. A thread polls for as long as its subscriber exists. A slow
//! subscriber makes it pause its partitions but never stop polling, or Kafka would revoke them.
//!
//! Invariant: a subscriber receives records of a bucket only between its `Assigned` and `Revoked`,
//! because one thread and one queue carry all of them.

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
use super::{LogContext, Shared, has_fatal_error, lock};
use crate::BusMessage;

/// How long a thread waits for a message before it checks whether to stop.
pub(super) const POLL_TIMEOUT: Duration = Duration::from_millis(100);

/// The poll timeout while the subscriber's queue is full.
const PAUSED_POLL_TIMEOUT: Duration = Duration::from_millis(10);

pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
pub(super) const RETRY_INTERVAL: Duration = Duration::from_millis(300);
const REBALANCE_ATTEMPTS_MAX: usize = 10;

/// Messages for one subscriber, in order.
pub(super) struct Outbox<T> {
    queue: VecDeque<T>,
    sender: mpsc::Sender<T>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FlushState {
    Flushed,
    Full,
    /// The subscriber is gone.
    Closed,
}

impl<T> Outbox<T> {
    pub fn new(sender: mpsc::Sender<T>) -> Self {
        Self {
            queue: VecDeque::new(),
            sender,
        }
    }

    pub fn push(&mut self, message: T) {
        self.queue.push_back(message);
    }

    pub fn flush(&mut self) -> FlushState {
        if self.sender.is_closed() {
            return FlushState::Closed;
        }
        while let Some(message) = self.queue.pop_front() {
            match self.sender.try_send(message) {
                Ok(()) => {}
                Err(TrySendError::Full(message)) => {
                    self.queue.push_front(message);
                    return FlushState::Full;
                }
                Err(TrySendError::Closed(_)) => return FlushState::Closed,
            }
        }
        FlushState::Flushed
    }
}

/// Pauses the assigned partitions while a subscriber's queue is full.
#[derive(Default)]
pub(super) struct Backpressure {
    paused: Option<TopicPartitionList>,
}

impl Backpressure {
    /// Pauses or resumes partitions, and returns the next poll timeout.
    pub fn apply<C: ConsumerContext>(
        &mut self,
        consumer: &BaseConsumer<C>,
        state: FlushState,
    ) -> Duration {
        let target = match state {
            FlushState::Full => consumer.assignment().ok(),
            _ => None,
        };
        if target == self.paused {
            return if target.is_some() {
                PAUSED_POLL_TIMEOUT
            } else {
                POLL_TIMEOUT
            };
        }
        if let Some(paused) = self.paused.take() {
            log_failure(consumer.resume(&paused), "resume");
        }
        if let Some(assigned) = &target {
            log_failure(consumer.pause(assigned), "pause");
        }
        self.paused = target;
        if self.paused.is_some() {
            PAUSED_POLL_TIMEOUT
        } else {
            POLL_TIMEOUT
        }
    }
}

fn log_failure(result: KafkaResult<()>, operation: &str) {
    if let Err(error) = result {
        tracing::debug!(%error, operation, "Kafka consumer operation failed");
    }
}

/// Every partition of a topic, at the same offset.
pub(super) fn partitions(topic: &str, count: u16, offset: Offset) -> TopicPartitionList {
    let mut list = TopicPartitionList::with_capacity(count.into());
    for partition in 0..count {
        // Fails only for invalid offsets, which these are not.
        let _ = list.add_partition_offset(topic, partition.into(), offset);
    }
    list
}

pub(super) fn create_consumer<C: ConsumerContext>(
    shared: &Shared,
    group: &str,
    context: C,
) -> Option<BaseConsumer<C>> {
    let config = shared.config.consumer(group);
    match BaseConsumer::from_config_and_context(&config, context) {
        Ok(consumer) => Some(consumer),
        Err(error) => {
            tracing::error!(%error, group, "failed to create a Kafka consumer");
            shared.pause(RETRY_INTERVAL);
            None
        }
    }
}

/// Resolves the ends of partitions to offsets, so that everything published after this call is
/// read.
pub(super) fn resolve_ends<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    list: &TopicPartitionList,
) -> KafkaResult<TopicPartitionList> {
    let mut request = list.clone();
    request.set_all_offsets(Offset::End)?;
    let ends = consumer.offsets_for_times(request, REQUEST_TIMEOUT)?;
    for element in ends.elements() {
        element.error()?;
        if !matches!(element.offset(), Offset::Offset(_)) {
            return Err(KafkaError::OffsetFetch(RDKafkaErrorCode::NoOffset));
        }
    }
    Ok(ends)
}

/// Partitions not yet read up to their end at the start of the read. Kafka's end-of-partition event
/// arrives only when nothing is left, so never on a topic that is constantly written.
#[derive(Default)]
pub(super) struct UnreadPartitions(BTreeMap<i32, i64>);

impl UnreadPartitions {
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

    /// Marks a partition as read on Kafka's end-of-partition event; its last message may have been
    /// deleted.
    pub fn mark_end(&mut self, partition: i32) {
        self.0.remove(&partition);
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// Checks that every partition of the log, of frames and of routes can be read.
pub(super) fn check_partitions(shared: &Shared) -> KafkaResult<()> {
    let config = shared.config.consumer("health");
    let consumer: BaseConsumer<LogContext> =
        BaseConsumer::from_config_and_context(&config, LogContext)?;
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

/// Like [`resolve_ends`], for use within a rebalance, which cannot block indefinitely.
fn resolve_ends_or_latest<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    list: &TopicPartitionList,
) -> TopicPartitionList {
    for _ in 0..REBALANCE_ATTEMPTS_MAX {
        match resolve_ends(consumer, list) {
            Ok(ends) => return ends,
            Err(error) => {
                tracing::debug!(%error, "failed to resolve the end offsets of new buckets, retrying")
            }
        }
        std::thread::sleep(RETRY_INTERVAL);
    }
    // Start from the end at the time when a broker answers.
    let mut ends = list.clone();
    let _ = ends.set_all_offsets(Offset::End);
    ends
}

/// Assigns partitions from their ends on; retries until a broker answers. Returns false when the
/// bus is stopping.
pub(super) fn assign_from_ends(
    shared: &Shared,
    consumer: &BaseConsumer<LogContext>,
    list: &TopicPartitionList,
) -> bool {
    while !shared.is_stopping() {
        let assigned = resolve_ends(consumer, list).and_then(|ends| consumer.assign(&ends));
        match assigned {
            Ok(()) => return true,
            Err(error) => {
                tracing::debug!(%error, "failed to assign partitions, retrying")
            }
        }
        shared.pause(RETRY_INTERVAL);
    }
    false
}

/// Reads all buckets in this process.
pub(super) fn read_all(shared: &Shared, sender: mpsc::Sender<BusMessage>) {
    let mut list = partitions(&shared.topics.events, BUCKETS, Offset::End);
    let _ = list.add_partition_offset(&shared.topics.global, 0, Offset::End);
    let assigned = BusMessage::Assigned(Bucket::of_endpoints().collect());
    read_assigned(shared, &list, Some(assigned), sender);
}

/// Reads the global bucket, which every subscriber receives in full.
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
    while !shared.is_stopping() && outbox.flush() != FlushState::Closed {
        let Some(consumer) = create_consumer(shared, "whole", LogContext) else {
            continue;
        };
        if !assign_from_ends(shared, &consumer, list) {
            return;
        }
        first
            .take()
            .into_iter()
            .for_each(|first| outbox.push(first));
        let mut brake = Backpressure::default();
        while !shared.is_stopping() && !has_fatal_error(consumer.client()) {
            let state = outbox.flush();
            if state == FlushState::Closed {
                return;
            }
            let timeout = brake.apply(&consumer, state);
            if let Some(message) = poll(&consumer, timeout) {
                outbox.extend(read_record(shared, &message));
            }
        }
    }
}

impl Outbox<BusMessage> {
    fn extend(&mut self, message: Option<BusMessage>) {
        self.queue.extend(message);
    }
}

/// Returns the next message, if any. Connection errors are transient; [`super::health`] reports
/// them.
pub(super) fn poll<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    timeout: Duration,
) -> Option<BorrowedMessage<'_>> {
    match consumer.poll(timeout)? {
        Ok(message) => Some(message),
        Err(error) => {
            tracing::debug!(%error, "Kafka consumer poll failed");
            None
        }
    }
}

/// Unreadable records are skipped: the next record's `prev` reveals the gap, which is filled from
/// the store.
fn read_record(shared: &Shared, message: &BorrowedMessage<'_>) -> Option<BusMessage> {
    let bucket = bucket_of(shared, message);
    match decode_record(bucket, message.headers(), message.payload()) {
        Ok(record) => Some(BusMessage::Record(Arc::new(record))),
        Err(why) => {
            skip_message(shared, message, why.as_ref());
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

pub(super) fn skip_message(
    shared: &Shared,
    message: &BorrowedMessage<'_>,
    why: &dyn std::error::Error,
) {
    shared.count_dropped();
    tracing::warn!(
        topic = message.topic(),
        partition = message.partition(),
        offset = message.offset(),
        %why,
        "skipping a foreign message"
    );
}

/// Reads the buckets that Kafka assigns to this member of a group.
pub(super) fn read_group(shared: &Shared, group: &str, sender: mpsc::Sender<BusMessage>) {
    if !shared.wait_for_topics() {
        return;
    }
    let outbox = Arc::new(Mutex::new(Outbox::new(sender)));
    while !shared.is_stopping() && lock(&outbox).flush() != FlushState::Closed {
        let context = GroupContext {
            outbox: outbox.clone(),
        };
        let Some(consumer) = create_consumer(shared, group, context) else {
            continue;
        };
        if let Err(error) = consumer.subscribe(&[&shared.topics.events]) {
            tracing::error!(%error, group, "failed to join the Kafka group");
            shared.pause(RETRY_INTERVAL);
            continue;
        }
        let mut brake = Backpressure::default();
        while !shared.is_stopping() && !has_fatal_error(consumer.client()) {
            let state = lock(&outbox).flush();
            if state == FlushState::Closed {
                break;
            }
            let timeout = brake.apply(&consumer, state);
            if let Some(message) = poll(&consumer, timeout) {
                lock(&outbox).extend(read_record(shared, &message));
            }
        }
        // Leaves the group; our buckets are revoked on the way out.
        drop(consumer);
    }
    lock(&outbox).flush();
}

/// Receives Kafka's rebalance callbacks, which run within a poll.
struct GroupContext {
    outbox: Arc<Mutex<Outbox<BusMessage>>>,
}

impl ClientContext for GroupContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        LogContext.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        LogContext.error(error, reason);
    }
}

impl ConsumerContext for GroupContext {
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
            // Resolve offsets first: a record published after `Assigned` was sent must not be
            // missed.
            let ends = resolve_ends_or_latest(consumer, list);
            log_failure(consumer.incremental_assign(&ends), "assign");
            notify(&self.outbox, buckets, BusMessage::Assigned);
        } else {
            log_failure(consumer.incremental_unassign(list), "unassign");
            notify(&self.outbox, buckets, BusMessage::Revoked);
        }
    }
}

fn notify(
    outbox: &Mutex<Outbox<BusMessage>>,
    buckets: Vec<Bucket>,
    message: fn(Vec<Bucket>) -> BusMessage,
) {
    if !buckets.is_empty() {
        lock(outbox).push(message(buckets));
    }
}
