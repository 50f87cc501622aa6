//! Reading frames from Kafka: live, for consumers that measure the present, and replayed, for a
//! consumer that takes over what another was counting.
//!
//! Invariant: a replay loses no frame that Kafka still has, however long it takes; a live
//! subscriber whose queue is full loses frames, and they are counted.

use std::sync::{Arc, Mutex};

use contract::frame::{Frame, FrameError};
use contract::time::Timestamp;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaResult;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use tokio::sync::mpsc::{self, error::TrySendError};

use super::message::decode_frame;
use super::reader::{
    Backpressure, FlushState, Outbox, POLL_TIMEOUT, REQUEST_TIMEOUT, RETRY_INTERVAL,
    assign_from_ends, create_consumer, partitions, poll, resolve_ends, skip_message,
};
use super::topics::FRAME_PARTITIONS;
use super::{LogContext, Shared, has_fatal_error, lock};

/// Reads all frames for all subscribers in this process. A subscriber whose queue is full loses
/// them.
pub(super) fn read_live(shared: &Shared, subscribers: &Mutex<Vec<mpsc::Sender<Arc<Frame>>>>) {
    if !shared.wait_for_topics() {
        return;
    }
    let list = partitions(&shared.topics.frames, FRAME_PARTITIONS, Offset::End);
    while !shared.is_stopping() {
        let Some(consumer) = create_consumer(shared, "frames", LogContext) else {
            continue;
        };
        if !assign_from_ends(shared, &consumer, &list) {
            return;
        }
        while !shared.is_stopping() && !has_fatal_error(consumer.client()) {
            let Some(message) = poll(&consumer, POLL_TIMEOUT) else {
                continue;
            };
            if let Some(frame) = decode(shared, &message) {
                broadcast(shared, subscribers, Arc::new(frame));
            }
        }
    }
}

/// Decodes a frame. If it is unreadable but its head is not, the head is recorded.
fn decode(shared: &Shared, message: &BorrowedMessage<'_>) -> Option<Frame> {
    let error = match decode_frame(message.payload()) {
        Ok(frame) => return Some(frame),
        Err(error) => error,
    };
    skip_message(shared, message, &error);
    if let FrameError::Unreadable { head, .. } = error {
        shared.record_unreadable(*head);
    }
    None
}

fn broadcast(
    shared: &Shared,
    subscribers: &Mutex<Vec<mpsc::Sender<Arc<Frame>>>>,
    frame: Arc<Frame>,
) {
    lock(subscribers).retain(|subscriber| match subscriber.try_send(frame.clone()) {
        Ok(()) => true,
        Err(TrySendError::Full(_)) => {
            shared.count_dropped();
            true
        }
        Err(TrySendError::Closed(_)) => false,
    });
}

/// Replays all frames since `since`, then continues with later ones. Waits for a slow subscriber.
pub(super) fn read_since(shared: &Shared, since: Timestamp, sender: mpsc::Sender<Arc<Frame>>) {
    if !shared.wait_for_topics() {
        return;
    }
    let mut outbox = Outbox::new(sender);
    // Where to continue reading; known once a broker has answered, and kept when the client is
    // replaced.
    let mut positions: Option<TopicPartitionList> = None;
    while !shared.is_stopping() && outbox.flush() != FlushState::Closed {
        let Some(consumer) = create_replay_consumer(shared) else {
            continue;
        };
        let start = match &positions {
            Some(positions) => Ok(positions.clone()),
            None => offsets_since(&shared.topics.frames, &consumer, since),
        };
        let cursor = match start.and_then(|cursor| consumer.assign(&cursor).map(|()| cursor)) {
            Ok(cursor) => positions.insert(cursor),
            Err(error) => {
                tracing::debug!(%error, "failed to start replaying frames, retrying");
                shared.pause(RETRY_INTERVAL);
                continue;
            }
        };
        let mut brake = Backpressure::default();
        while !shared.is_stopping() && !has_fatal_error(consumer.client()) {
            let state = outbox.flush();
            if state == FlushState::Closed {
                return;
            }
            let timeout = brake.apply(&consumer, state);
            let Some(message) = poll(&consumer, timeout) else {
                continue;
            };
            let next = Offset::Offset(message.offset() + 1);
            if let Err(error) =
                cursor.set_partition_offset(message.topic(), message.partition(), next)
            {
                tracing::debug!(%error, "failed to record the position in the frames");
            }
            if let Some(frame) = decode(shared, &message) {
                outbox.push(Arc::new(frame));
            }
        }
    }
}

/// The requested offset may have been deleted by now; then start with the oldest available.
fn create_replay_consumer(shared: &Shared) -> Option<BaseConsumer<LogContext>> {
    let mut config = shared.config.consumer("frames");
    config.set("auto.offset.reset", "earliest");
    match BaseConsumer::from_config_and_context(&config, LogContext) {
        Ok(consumer) => Some(consumer),
        Err(error) => {
            tracing::error!(%error, "failed to create a Kafka consumer for replaying frames");
            shared.pause(RETRY_INTERVAL);
            None
        }
    }
}

/// The first offset of each partition since `since`. Where there is none, the end as it was before
/// that lookup, so that nothing is missed in between.
fn offsets_since(
    topic: &str,
    consumer: &BaseConsumer<LogContext>,
    since: Timestamp,
) -> KafkaResult<TopicPartitionList> {
    let mut start = resolve_ends(consumer, &partitions(topic, FRAME_PARTITIONS, Offset::End))?;
    let timestamp = Offset::Offset(since.millis().max(0));
    let offsets = consumer.offsets_for_times(
        partitions(topic, FRAME_PARTITIONS, timestamp),
        REQUEST_TIMEOUT,
    )?;
    for element in offsets.elements() {
        element.error()?;
        if let Offset::Offset(_) = element.offset() {
            start.set_partition_offset(topic, element.partition(), element.offset())?;
        }
    }
    Ok(start)
}
