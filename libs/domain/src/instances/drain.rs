//! When a draining instance may be stopped: by the gateways' own word. Each gateway says in its
//! frames which routes it has reached and what is still in flight on each instance.
//!
//! Silence is not consent: a gateway that has fallen silent is still a member, and a deadline runs
//! only while frames arrive at all.

use std::collections::BTreeMap;

use contract::frame::{Frame, SourceKind};
use contract::ids::{Bucket, EndpointKey, InstanceId, Position};
use contract::time::{Span, Timestamp};

use super::Instance;

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
        if frame.source.kind != SourceKind::Gateway {
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
        if frame.goodbye {
            self.last_words.remove(&key);
            return;
        }
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
                routes: frame.routes.clone(),
                in_flight,
            },
        );
    }

    /// Whether every gateway has let go of the instance, or its time is up.
    pub fn is_drained(&self, endpoint: &EndpointKey, instance: &Instance, now: Timestamp) -> bool {
        let bucket = endpoint.bucket();
        let Some(draining) = &instance.draining else {
            return false;
        };
        let mut members = self
            .last_words
            .range((bucket, String::new())..)
            .take_while(|((of, _), _)| *of == bucket)
            .map(|(_, word)| word)
            .peekable();
        let let_go = members.peek().is_some()
            && members.all(|word| {
                word.routes
                    .get(endpoint)
                    .is_some_and(|reached| *reached >= draining.position)
                    && word.in_flight.get(&instance.id).copied().unwrap_or(0) == 0
            });
        let_go || self.deadline_passed(bucket, draining.since, draining.timeout, now)
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
