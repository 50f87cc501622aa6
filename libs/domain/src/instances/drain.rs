//! When a draining instance may be stopped. Each gateway reports in its frames which routes it has
//! reached and what is still in flight on each instance.
//!
//! Silence is not consent: a member that has not reported since this process started listening is
//! waited for, and a deadline runs only while frames arrive at all. Gateways that have left,
//! according to the log, are not waited for, even if none remain. A gateway that sends frames is
//! waited for even before the log lists it as a member.

use std::collections::BTreeMap;

use contract::frame::{Frame, SourceKind};
use contract::ids::{Bucket, EndpointKey, InstanceId, Position};
use contract::resources::DeploymentSpec;
use contract::time::{Span, Timestamp};

use super::Instance;
use crate::members::{Members, SILENT_AFTER};

/// Frames arrive every second; a longer pause than this stops the deadlines.
const SILENCE_MAX: Span = Span::from_secs(3);

/// How much longer than the longest request draining may take: until the last gateway knows of it.
const MARGIN: Span = Span::from_secs(10);

/// Returns how long an instance may drain. Requests in flight were sent by the present settings of its
/// deployment, if it still exists, or by those that the instance was started with: the longer time counts.
pub fn timeout(instance: &Instance, present: Option<&DeploymentSpec>) -> Span {
    let started_with = limit(&instance.spec);
    present.map_or(started_with, |present| started_with.max(limit(present)))
}

fn limit(spec: &DeploymentSpec) -> Span {
    spec.drain_timeout.unwrap_or_else(|| {
        let longest_request = spec.request_settings.longest_request();
        Span::from_millis(longest_request.millis() + MARGIN.millis())
    })
}

/// The latest report of each gateway, by bucket.
#[derive(Clone, Debug, Default)]
pub struct DrainWatch {
    reports: BTreeMap<(Bucket, String), GatewayReport>,
    streams: BTreeMap<Bucket, FrameStream>,
}

#[derive(Clone, Debug)]
struct GatewayReport {
    at: Timestamp,
    /// The gateway is gone, and so is everything that it had in flight.
    goodbye: bool,
    routes: BTreeMap<EndpointKey, Position>,
    in_flight: BTreeMap<InstanceId, u32>,
}

/// The period over which frames of a bucket have arrived without interruption.
#[derive(Clone, Copy, Debug)]
struct FrameStream {
    since: Timestamp,
    last: Timestamp,
}

impl DrainWatch {
    /// Observes a frame that arrived at `now`. Frames of nodes say nothing about requests.
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
        self.reports.insert(
            key,
            GatewayReport {
                at: now,
                goodbye: frame.goodbye,
                routes: frame.routes.clone(),
                in_flight,
            },
        );
    }

    /// Whether every gateway has released the instance, or its deadline has passed.
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
        let has_released = |report: &GatewayReport| {
            let reached = report.routes.get(endpoint);
            report.goodbye
                || reached.is_some_and(|reached| *reached >= draining.position)
                    && report.in_flight.get(&instance.id).copied().unwrap_or(0) == 0
        };
        // A gateway that is not a member counts as gone once it has been silent for long.
        let mut unlisted = self
            .reports
            .range((bucket, String::new())..)
            .take_while(|((of, _), _)| *of == bucket)
            .filter(|((_, id), report)| {
                let is_silent = now.since(report.at) >= SILENT_AFTER;
                !members.gateways.contains_key(id) && !report.goodbye && !is_silent
            })
            .peekable();
        let has_gateways = !members.gateways.is_empty()
            || unlisted.peek().is_some()
            || members.every_gateway_left();
        let members_released = members.gateways.keys().all(|id| {
            let report = self.reports.get(&(bucket, id.clone()));
            report.is_some_and(has_released)
        });
        let all_released =
            has_gateways && members_released && unlisted.all(|(_, report)| has_released(report));
        all_released || self.deadline_passed(bucket, draining.since, draining.timeout, now)
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
