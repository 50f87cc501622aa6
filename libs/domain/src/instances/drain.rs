//! When a draining instance may be stopped: by the gateways' own word. Each gateway says in its
//! frames which routes it has reached and what is still in flight on each instance.
//!
//! Silence is not consent: a member that has not spoken since we listen is waited for, and a
//! deadline runs only while frames arrive at all. Who has left, by the log, is waited for no longer,
//! even if nobody is left. A gateway that speaks is waited for even before
//! the log calls it a member.

use std::collections::BTreeMap;

use contract::frame::{Frame, SourceKind};
use contract::ids::{Bucket, EndpointKey, InstanceId, Position};
use contract::time::{Span, Timestamp};

use super::Instance;
use crate::members::{Members, SILENT_AFTER};

/// Frames come every second; a longer pause than this stops the deadlines.
const SILENCE_MAX: Span = Span::from_secs(3);

/// The last word of each gateway, by bucket.
#[derive(Clone, Debug, Default)]
pub struct DrainWatch {
    last_words: BTreeMap<(Bucket, String), LastWord>,
    streams: BTreeMap<Bucket, FrameStream>,
}

#[derive(Clone, Debug)]
struct LastWord {
    at: Timestamp,
    /// It is gone, and took everything that was in flight with it.
    goodbye: bool,
    routes: BTreeMap<EndpointKey, Position>,
    in_flight: BTreeMap<InstanceId, u32>,
}

/// The time over which frames of a bucket have come without a pause.
#[derive(Clone, Copy, Debug)]
struct FrameStream {
    since: Timestamp,
    last: Timestamp,
}

impl DrainWatch {
    /// Takes in a frame that arrived at `now`. Frames of nodes say nothing about requests.
    pub fn observe(&mut self, frame: &Frame, now: Timestamp) {
        if frame.source.kind != SourceKind::GATEWAY {
            return;
        }
        let stream = self.streams.entry(frame.bucket).or_insert(FrameStream {
            since: now,
            last: now,
        });
        if now.since(stream.last) > SILENCE_MAX {
            stream.since = now;
        }
        stream.last = now;

        let key = (frame.bucket, frame.source.id.clone());
        let mut in_flight = BTreeMap::new();
        for instance in frame
            .deployments
            .iter()
            .flat_map(|deployment| &deployment.instances)
        {
            *in_flight.entry(instance.id.clone()).or_default() += instance.in_flight;
        }
        self.last_words.insert(
            key,
            LastWord {
                at: now,
                goodbye: frame.goodbye,
                routes: frame.routes.clone(),
                in_flight,
            },
        );
    }

    /// Whether every gateway has let go of the instance, or its time is up.
    pub fn is_drained(
        &self,
        endpoint: &EndpointKey,
        instance: &Instance,
        members: &Members,
        now: Timestamp,
    ) -> bool {
        let Some(draining) = &instance.draining else {
            return false;
        };
        let bucket = endpoint.bucket();
        let let_go = |word: &LastWord| {
            let reached = word.routes.get(endpoint);
            word.goodbye
                || reached.is_some_and(|reached| *reached >= draining.position)
                    && word.in_flight.get(&instance.id).copied().unwrap_or(0) == 0
        };
        // One that is no member has left when it has been silent for long.
        let mut strangers = self
            .last_words
            .range((bucket, String::new())..)
            .take_while(|((of, _), _)| *of == bucket)
            .filter(|((_, id), word)| {
                let silent = now.since(word.at) >= SILENT_AFTER;
                !members.gateways.contains_key(id) && !word.goodbye && !silent
            })
            .peekable();
        let somebody = !members.gateways.is_empty()
            || strangers.peek().is_some()
            || members.every_gateway_left();
        let members_let_go = members.gateways.keys().all(|id| {
            let word = self.last_words.get(&(bucket, id.clone()));
            word.is_some_and(let_go)
        });
        let all_let_go = somebody && members_let_go && strangers.all(|(_, word)| let_go(word));
        all_let_go || self.deadline_passed(bucket, draining.since, draining.timeout, now)
    }

    fn deadline_passed(
        &self,
        bucket: Bucket,
        since: Timestamp,
        timeout: Span,
        now: Timestamp,
    ) -> bool {
        self.streams.get(&bucket).is_some_and(|stream| {
            now.since(stream.last) <= SILENCE_MAX && now.since(since.max(stream.since)) >= timeout
        })
    }
}
