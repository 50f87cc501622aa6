//! Reading routes: the compacted topic from its start, then updates.
//!
//! Invariant: for a subscriber, an endpoint's revision never goes back.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use contract::ids::{BUCKETS, EndpointKey, Position};
use contract::route::RouteUpdate;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::topic_partition_list::Offset;
use tokio::sync::mpsc;

use super::message::decode_route;
use super::reader::{Backpressure, FlushState, Outbox, UnreadPartitions, partitions, skip_message};
use super::{LogContext, Shared, has_fatal_error};
use crate::RouteMessage;

pub(super) fn read(shared: &Shared, sender: mpsc::Sender<RouteMessage>) {
    if !shared.wait_for_topics() {
        return;
    }
    let mut outbox = Outbox::new(sender);
    let mut tracker = RouteTracker::default();
    while !shared.is_stopping() && outbox.flush() != FlushState::Closed {
        let Some((consumer, unread)) = open(shared) else {
            continue;
        };
        tracker.start(unread, &mut outbox);
        let mut brake = Backpressure::default();
        while !shared.is_stopping() && !has_fatal_error(consumer.client()) {
            let state = outbox.flush();
            if state == FlushState::Closed {
                return;
            }
            let timeout = brake.apply(&consumer, state);
            match consumer.poll(timeout) {
                Some(Ok(message)) => {
                    if let Some(update) = read_route(shared, &message) {
                        tracker.receive(update, &mut outbox);
                    }
                    tracker.progress(|unread| unread.read(&message), &mut outbox);
                }
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    tracker.progress(|unread| unread.mark_end(partition), &mut outbox);
                }
                Some(Err(error)) => {
                    tracing::debug!(%error, "Kafka consumer poll failed for routes")
                }
                None => {}
            }
        }
    }
}

fn open(shared: &Shared) -> Option<(BaseConsumer<LogContext>, UnreadPartitions)> {
    let mut config = shared.config.consumer("routes");
    config
        .set("enable.partition.eof", "true")
        .set("auto.offset.reset", "earliest");
    let all = partitions(&shared.topics.routes, BUCKETS, Offset::Beginning);
    let opened = BaseConsumer::from_config_and_context(&config, LogContext).and_then(|consumer| {
        let unread = UnreadPartitions::up_to_ends(&consumer, &all)?;
        consumer.assign(&all)?;
        Ok((consumer, unread))
    });
    match opened {
        Ok(opened) => Some(opened),
        Err(error) => {
            tracing::debug!(%error, "failed to start reading routes, retrying");
            shared.pause(super::reader::POLL_TIMEOUT);
            None
        }
    }
}

fn read_route(shared: &Shared, message: &BorrowedMessage<'_>) -> Option<Arc<RouteUpdate>> {
    match decode_route(message.key(), message.headers(), message.payload()) {
        Ok(update) => Some(Arc::new(update)),
        Err(why) => {
            skip_message(shared, message, why.as_ref());
            None
        }
    }
}

#[derive(Default)]
struct RouteTracker {
    /// Revision, and position of the slot assignment.
    newest: BTreeMap<EndpointKey, (Position, Position)>,
    /// The newest update of each endpoint, until all partitions have been read once.
    first: BTreeMap<EndpointKey, Arc<RouteUpdate>>,
    /// `None` once those have been sent.
    unread: Option<UnreadPartitions>,
}

impl RouteTracker {
    fn start(&mut self, unread: UnreadPartitions, outbox: &mut Outbox<RouteMessage>) {
        self.unread = Some(unread);
        self.progress(|_| {}, outbox);
    }

    fn receive(&mut self, update: Arc<RouteUpdate>, outbox: &mut Outbox<RouteMessage>) {
        let version = (update.revision, update.members);
        match self.newest.entry(update.endpoint.clone()) {
            Entry::Occupied(newest) if *newest.get() > version => return,
            Entry::Occupied(mut newest) => {
                newest.insert(version);
            }
            Entry::Vacant(entry) => {
                entry.insert(version);
            }
        }
        if self.unread.is_none() {
            outbox.push(RouteMessage::Update(update));
        } else {
            self.first.insert(update.endpoint.clone(), update);
        }
    }

    /// Records progress, and sends the initial routes once everything has been read.
    fn progress(
        &mut self,
        made: impl FnOnce(&mut UnreadPartitions),
        outbox: &mut Outbox<RouteMessage>,
    ) {
        let Some(unread) = &mut self.unread else {
            return;
        };
        made(unread);
        if !unread.is_empty() {
            return;
        }
        self.unread = None;
        for update in std::mem::take(&mut self.first).into_values() {
            outbox.push(RouteMessage::Update(update));
        }
        outbox.push(RouteMessage::CaughtUp);
    }
}
