//! Routes: the compacted topic from its beginning, then what comes.
//!
//! Invariant: a subscriber never sees an endpoint's revision go back.

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
use super::reader::{Brake, Outbox, Room, Unread, partitions, skip};
use super::{Quiet, Shared, is_broken};
use crate::RouteMessage;

pub(super) fn read(shared: &Shared, sender: mpsc::Sender<RouteMessage>) {
    if !shared.wait_for_topics() {
        return;
    }
    let mut outbox = Outbox::new(sender);
    let mut seen = Seen::default();
    while !shared.stopping() && outbox.flush() != Room::Gone {
        let Some((consumer, unread)) = open(shared) else {
            continue;
        };
        seen.begin(unread, &mut outbox);
        let mut brake = Brake::default();
        while !shared.stopping() && !is_broken(consumer.client()) {
            let room = outbox.flush();
            if room == Room::Gone {
                return;
            }
            let patience = brake.apply(&consumer, room);
            match consumer.poll(patience) {
                Some(Ok(message)) => {
                    if let Some(update) = read_route(shared, &message) {
                        seen.take(update, &mut outbox);
                    }
                    seen.progress(|unread| unread.read(&message), &mut outbox);
                }
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    seen.progress(|unread| unread.reached_end(partition), &mut outbox);
                }
                Some(Err(error)) => tracing::debug!(%error, "routes cannot be read"),
                None => {}
            }
        }
    }
}

fn open(shared: &Shared) -> Option<(BaseConsumer<Quiet>, Unread)> {
    let mut config = shared.config.consumer("routes");
    config
        .set("enable.partition.eof", "true")
        .set("auto.offset.reset", "earliest");
    let all = partitions(&shared.topics.routes, BUCKETS, Offset::Beginning);
    let opened = BaseConsumer::from_config_and_context(&config, Quiet).and_then(|consumer| {
        let unread = Unread::up_to_ends(&consumer, &all)?;
        consumer.assign(&all)?;
        Ok((consumer, unread))
    });
    match opened {
        Ok(opened) => Some(opened),
        Err(error) => {
            tracing::debug!(%error, "routes cannot be read yet");
            shared.pause(super::reader::POLL);
            None
        }
    }
}

fn read_route(shared: &Shared, message: &BorrowedMessage<'_>) -> Option<Arc<RouteUpdate>> {
    match decode_route(message.key(), message.headers(), message.payload()) {
        Ok(update) => Some(Arc::new(update)),
        Err(why) => {
            skip(shared, message, &why);
            None
        }
    }
}

#[derive(Default)]
struct Seen {
    /// Revision, and how far its slots were dealt.
    newest: BTreeMap<EndpointKey, (Position, Position)>,
    /// Until all partitions have been read once: the newest of each endpoint.
    first: BTreeMap<EndpointKey, Arc<RouteUpdate>>,
    /// None once they have been told.
    unread: Option<Unread>,
}

impl Seen {
    fn begin(&mut self, unread: Unread, outbox: &mut Outbox<RouteMessage>) {
        self.unread = Some(unread);
        self.progress(|_| {}, outbox);
    }

    fn take(&mut self, update: Arc<RouteUpdate>, outbox: &mut Outbox<RouteMessage>) {
        let age = (update.revision, update.members);
        match self.newest.entry(update.endpoint.clone()) {
            Entry::Occupied(newest) if *newest.get() > age => return,
            Entry::Occupied(mut newest) => {
                newest.insert(age);
            }
            Entry::Vacant(entry) => {
                entry.insert(age);
            }
        }
        if self.unread.is_none() {
            outbox.push(RouteMessage::Update(update));
        } else {
            self.first.insert(update.endpoint.clone(), update);
        }
    }

    /// Tells what came first when nothing is unread any more.
    fn progress(&mut self, made: impl FnOnce(&mut Unread), outbox: &mut Outbox<RouteMessage>) {
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
