//! Frames as Kafka has them: from now on for whoever measures the present, and once more from the
//! past for whoever takes over what another one was counting.
//!
//! Invariant: whoever asks for the past loses nothing of it that Kafka still has, however long it
//! takes; whoever asks for the present and has no room loses frames, and they are counted.

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
    ANSWER_PATIENCE, Brake, Outbox, POLL, RETRY_AFTER, Room, assign_from_ends, consumer,
    partitions, poll, resolve_ends, skip,
};
use super::topics::FRAME_PARTITIONS;
use super::{Quiet, Shared, is_broken, lock};

/// All frames, for every subscriber in this process. One without room loses them.
pub(super) fn read(shared: &Shared, readers: &Mutex<Vec<mpsc::Sender<Arc<Frame>>>>) {
    if !shared.wait_for_topics() {
        return;
    }
    let list = partitions(&shared.topics.frames, FRAME_PARTITIONS, Offset::End);
    while !shared.stopping() {
        let Some(consumer) = consumer(shared, "frames", Quiet) else {
            continue;
        };
        if !assign_from_ends(shared, &consumer, &list) {
            return;
        }
        while !shared.stopping() && !is_broken(consumer.client()) {
            let Some(message) = poll(&consumer, POLL) else {
                continue;
            };
            if let Some(frame) = decoded(shared, &message) {
                hand_out(shared, readers, Arc::new(frame));
            }
        }
    }
}

/// The frame in a message. One that cannot be read is noted, if it says whose it is.
fn decoded(shared: &Shared, message: &BorrowedMessage<'_>) -> Option<Frame> {
    let error = match decode_frame(message.payload()) {
        Ok(frame) => return Some(frame),
        Err(error) => error,
    };
    skip(shared, message, &error.to_string());
    if let FrameError::Unreadable { head, .. } = error {
        shared.note_unreadable(*head);
    }
    None
}

fn hand_out(shared: &Shared, readers: &Mutex<Vec<mpsc::Sender<Arc<Frame>>>>, frame: Arc<Frame>) {
    lock(readers).retain(|reader| match reader.try_send(frame.clone()) {
        Ok(()) => true,
        Err(TrySendError::Full(_)) => {
            shared.count_dropped();
            true
        }
        Err(TrySendError::Closed(_)) => false,
    });
}

/// All frames that were sent since then, and every later one. A subscriber that is slow is waited
/// for.
pub(super) fn read_since(shared: &Shared, since: Timestamp, sender: mpsc::Sender<Arc<Frame>>) {
    if !shared.wait_for_topics() {
        return;
    }
    let mut outbox = Outbox::new(sender);
    // Where to read on; known once a broker has answered, and then kept over what befalls a client.
    let mut reached: Option<TopicPartitionList> = None;
    while !shared.stopping() && outbox.flush() != Room::Gone {
        let Some(consumer) = patient_consumer(shared) else {
            continue;
        };
        let begin = match &reached {
            Some(reached) => Ok(reached.clone()),
            None => first_since(&shared.topics.frames, &consumer, since),
        };
        let at = match begin.and_then(|at| consumer.assign(&at).map(|()| at)) {
            Ok(at) => reached.insert(at),
            Err(error) => {
                tracing::debug!(%error, "frames of the past cannot be read yet");
                shared.pause(RETRY_AFTER);
                continue;
            }
        };
        let mut brake = Brake::default();
        while !shared.stopping() && !is_broken(consumer.client()) {
            let room = outbox.flush();
            if room == Room::Gone {
                return;
            }
            let patience = brake.apply(&consumer, room);
            let Some(message) = poll(&consumer, patience) else {
                continue;
            };
            let next = Offset::Offset(message.offset() + 1);
            if let Err(error) = at.set_partition_offset(message.topic(), message.partition(), next)
            {
                tracing::debug!(%error, "a place in the frames cannot be kept");
            }
            if let Some(frame) = decoded(shared, &message) {
                outbox.push(Arc::new(frame));
            }
        }
    }
}

/// What it was to begin with may be gone by the time it asks; then it begins with the oldest there is.
fn patient_consumer(shared: &Shared) -> Option<BaseConsumer<Quiet>> {
    let mut config = shared.config.consumer("frames");
    config.set("auto.offset.reset", "earliest");
    match BaseConsumer::from_config_and_context(&config, Quiet) {
        Ok(consumer) => Some(consumer),
        Err(error) => {
            tracing::error!(%error, "there is no Kafka consumer for frames of the past");
            shared.pause(RETRY_AFTER);
            None
        }
    }
}

/// In each partition the first message since then. Where there is none it is the end as it was before
/// that was asked, so that nothing falls in between.
fn first_since(
    topic: &str,
    consumer: &BaseConsumer<Quiet>,
    since: Timestamp,
) -> KafkaResult<TopicPartitionList> {
    let mut begin = resolve_ends(consumer, &partitions(topic, FRAME_PARTITIONS, Offset::End))?;
    let then = Offset::Offset(since.millis().max(0));
    let found =
        consumer.offsets_for_times(partitions(topic, FRAME_PARTITIONS, then), ANSWER_PATIENCE)?;
    for element in found.elements() {
        element.error()?;
        if let Offset::Offset(_) = element.offset() {
            begin.set_partition_offset(topic, element.partition(), element.offset())?;
        }
    }
    Ok(begin)
}
