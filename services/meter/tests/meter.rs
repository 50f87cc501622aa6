//! What the meter writes to the log and to the history.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use contract::events::{Event, InstanceEvent, InstanceRequested, InstanceStarted, RequestReason};
use contract::frame::Frame;
use contract::ids::{DeploymentRef, InstanceId};
use contract::log::{Actor, NewEvent, StreamKind, StreamName};
use contract::time::{Span, Timestamp};
use contract::usage::{FrameRange, SLICES_PER_MINUTE, UsageCounts, UsageMinute, UsageSlice};
use meter::{GapSpan, HistoryStore, PointsQuery};
use runtime::ids::Ids;
use store::{Append, Commit};
use support::{Harness, START, arrivals, blue, cpu_us, endpoint, frame, points, uid};
use uuid::Uuid;

on_both!(
    a_minute_is_written_to_the_log_once_it_is_over,
    an_open_minute_survives_a_restart,
    missing_frames_are_recorded_as_gaps,
    frames_sent_before_the_buckets_are_acquired_are_counted,
    a_meter_that_was_taken_over_reacquires,
    a_usage_stream_that_moved_on_is_caught_up_with,
    history_has_a_point_for_each_step_and_reports_gaps,
    panes_past_the_retention_are_deleted,
    a_query_for_too_many_points_is_refused,
    a_reader_sees_what_the_meter_has_saved,
    a_crash_loses_few_seconds_of_windows,
    an_open_minute_survives_restarts_in_quick_succession,
    idle_minutes_are_reported_with_the_next_request_even_after_a_restart,
    open_minutes_lose_what_the_log_has_of_them_already,
);

async fn a_minute_is_written_to_the_log_once_it_is_over(mut harness: Harness) {
    let meter = harness.run().await;
    harness.report(1, 0..60);
    harness.set_second(60);
    let minute = harness.next_closed().await;
    assert_eq!(minute.minute, Timestamp::from_secs(START));
    assert_eq!((minute.deployment_uid, arrivals(&minute)), (uid(), 60));
    let text = meter.metrics.encode();
    assert!(
        text.contains("penstock_meter_frames_total{counted=\"in-time\"} 60"),
        "{text}"
    );
    meter.stop().await;
}

async fn an_open_minute_survives_a_restart(mut harness: Harness) {
    let meter = harness.run().await;
    harness.report(1, 0..30);
    harness.set_second(30);
    meter.stop().await;
    let meter = harness.run().await;
    // The gateway kept running; frames sent meanwhile are redelivered or lost.
    harness.report(1, 25..60);
    harness.set_second(60);
    let minute = harness.next_closed().await;
    assert_eq!(arrivals(&minute), 60);
    meter.stop().await;
}

async fn missing_frames_are_recorded_as_gaps(mut harness: Harness) {
    let meter = harness.run().await;
    harness.report(1, 0..20);
    harness.report(1, 24..60);
    harness.set_second(60);
    assert_eq!(arrivals(&harness.next_closed().await), 56);
    let stream = StreamName::of(StreamKind::Usage, &endpoint());
    let records = harness.store.read_stream(&stream, 0, 10).await.unwrap();
    let Event::UsageGap(gap) = &records[1].event else {
        panic!("{records:?}")
    };
    assert_eq!((gap.first, gap.last), (20, 23));
    meter.stop().await;
}

async fn frames_sent_before_the_buckets_are_acquired_are_counted(mut harness: Harness) {
    let meter = harness.run_on(harness.bus.clone()).await;
    // It has subscribed, and has not run yet.
    harness.report(1, 0..20);
    meter.health.until_ready().await;
    harness.report(1, 20..60);
    harness.set_second(60);
    let minute = harness.next_closed().await;
    assert_eq!(arrivals(&minute), 60);
    harness.report(1, 60..120);
    harness.set_second(120);
    assert_eq!(
        arrivals(&harness.next_closed().await),
        60,
        "and no gap between"
    );
    meter.stop().await;
}

async fn idle_minutes_are_reported_with_the_next_request_even_after_a_restart(
    mut harness: Harness,
) {
    let meter = harness.run().await;
    harness.report_idle(0..130);
    harness.set_second(130);
    meter.stop().await;
    let meter = harness.run().await;
    harness.report_idle(130..240);
    harness.report(1, 180..240);
    harness.set_second(240);
    let idle = harness.next_closed().await;
    assert_eq!(idle.minute, Timestamp::from_secs(START));
    assert_eq!((idle.minutes, cpu_us(&idle)), (3, 180 * 100));
    let busy = harness.next_closed().await;
    assert_eq!(busy.minute, idle.end());
    assert_eq!((arrivals(&busy), cpu_us(&busy)), (60, 60 * 100));
    let text = meter.metrics.encode();
    assert!(text.contains("penstock_meter_idle_deployments 0"), "{text}");
    meter.stop().await;
}

/// A meter may end between the commit of a minute and the save of what is still open.
async fn open_minutes_lose_what_the_log_has_of_them_already(mut harness: Harness) {
    let meter = harness.run().await;
    harness.report(1, 0..30);
    harness.set_second(30);
    meter.stop().await;
    let committed = UsageMinute {
        deployment: blue(),
        deployment_uid: uid(),
        minute: Timestamp::from_secs(START),
        minutes: 1,
        slices: slices(&(0..30).map(|second| frame(1, second)).collect::<Vec<_>>()),
        counted: vec![FrameRange {
            source: frame(1, 0).source,
            boot: frame(1, 0).boot,
            first: 0,
            last: 29,
        }],
    };
    harness
        .append(StreamKind::Usage, vec![Event::UsageClosed(committed)])
        .await;
    assert_eq!(arrivals(&harness.next_closed().await), 30);
    let meter = harness.run().await;
    harness.report(1, 30..60);
    harness.set_second(60);
    let rest = match harness.next_usage_event().await {
        Event::UsageClosed(rest) | Event::UsageCorrected(rest) => rest,
        event => panic!("{event:?}"),
    };
    assert_eq!(arrivals(&rest), 30);
    meter.stop().await;
}

/// What a minute has counted after these frames.
fn slices(frames: &[Frame]) -> Vec<UsageSlice> {
    let mut slices = vec![UsageSlice::default(); SLICES_PER_MINUTE];
    for frame in frames {
        for deployment in &frame.deployments {
            let slice = &mut slices[frame.sequence as usize / 10];
            let counts = slice.by_role.entry(deployment.role.clone()).or_default();
            counts.add(&UsageCounts {
                outcomes: deployment.outcomes,
                arrivals: deployment.arrivals,
                in_flight_us: deployment.in_flight_us,
                request_bytes: deployment.request_bytes,
                response_bytes: deployment.response_bytes,
                ..UsageCounts::default()
            });
        }
    }
    slices
}

async fn a_meter_that_was_taken_over_reacquires(mut harness: Harness) {
    let meter = harness.run().await;
    let bucket = endpoint().bucket();
    let other = harness
        .store
        .acquire_fence(&format!("meter/{bucket}"))
        .await
        .unwrap();
    harness.report(1, 0..60);
    harness.set_second(60);
    assert_eq!(arrivals(&harness.next_closed().await), 60);
    let next = harness.store.acquire_fence(&other.name).await.unwrap();
    assert_eq!(next.generation, other.generation + 2);
    meter.stop().await;
}

async fn a_usage_stream_that_moved_on_is_caught_up_with(mut harness: Harness) {
    let meter = harness.run().await;
    harness.report(1, 0..60);
    let foreign = UsageMinute {
        deployment: blue(),
        deployment_uid: uid(),
        minute: Timestamp::from_secs(START - 600),
        minutes: 1,
        slices: Vec::new(),
        counted: Vec::new(),
    };
    harness
        .append(StreamKind::Usage, vec![Event::UsageClosed(foreign)])
        .await;
    let first = harness.next_closed().await;
    harness.set_second(60);
    let second = harness.next_closed().await;
    // If the meter was faster, its own minute comes first.
    let mut counts = [arrivals(&first), arrivals(&second)];
    counts.sort_unstable();
    assert_eq!(counts, [0, 60]);
    meter.stop().await;
}

async fn history_has_a_point_for_each_step_and_reports_gaps(harness: Harness) {
    let deployment = DeploymentRef {
        endpoint: "iris".parse().unwrap(),
        deployment: blue(),
    };
    let id = InstanceId::new(&deployment, Uuid::from_u128(1));
    let spec = serde_json::from_value(serde_json::json!({
        "backend": "process", "instanceType": "cpu-small", "command": ["serve", "{port}"]
    }));
    let requested = InstanceRequested {
        id: id.clone(),
        generation: 1,
        deployment,
        deployment_uid: uid(),
        revision: 1,
        node: "n1".to_owned(),
        decision: None,
        reason: RequestReason::ScaleOut,
        spec: spec.unwrap(),
    };
    harness
        .append(
            StreamKind::Instances,
            vec![Event::InstanceRequested(Box::new(requested))],
        )
        .await;
    let started = InstanceStarted {
        id: id.clone(),
        generation: 1,
        address: "127.0.0.1:1".to_owned(),
        pid: None,
        adopted: false,
    };
    append_node(
        &harness,
        vec![
            Event::InstanceStarted(started),
            Event::InstanceReady(InstanceEvent { id }),
        ],
    )
    .await;
    let meter = harness.run().await;
    harness.report(1, 0..20);
    harness.report(1, 30..40);
    harness.set_second(45);
    meter.stop().await;
    let meter = harness.run().await;
    let points = points(&meter.history, 10).await;
    let counts: Vec<_> = points
        .iter()
        .map(|p| (p.time.secs() - START, p.covered_seconds, p.requests))
        .collect();
    assert_eq!(counts, [(0, 10, 10), (10, 10, 10), (30, 10, 10)]);
    assert_eq!(points[0].requests_per_second, 1.0);
    assert_eq!(points[0].concurrency, 0.5);
    assert_eq!(points[0].instances, Some(1));
    let p99 = points[0].latency_p99_ms.unwrap();
    assert!((20.0..20.5).contains(&p99), "{p99}");
    let gaps = meter
        .history
        .gaps(
            &endpoint(),
            Timestamp::from_secs(START),
            Timestamp::from_secs(START + 40),
        )
        .await
        .unwrap();
    let gap = GapSpan {
        from: Timestamp::from_secs(START + 20),
        to: Timestamp::from_secs(START + 30),
    };
    assert_eq!(gaps, [gap]);
    meter.stop().await;
}

async fn append_node(harness: &Harness, events: Vec<Event>) {
    let new = |event| NewEvent {
        id: harness.ids.event_id(Timestamp::from_secs(START)),
        time: Timestamp::from_secs(START),
        actor: Actor::service("test"),
        event,
    };
    let append = Append {
        stream: StreamName::of_node(&endpoint(), "n1"),
        expected_version: 0,
        events: events.into_iter().map(new).collect(),
    };
    let commit = Commit {
        appends: vec![append],
        ..Commit::default()
    };
    harness.store.commit(commit).await.unwrap();
}

async fn panes_past_the_retention_are_deleted(harness: Harness) {
    let meter = harness.run().await;
    harness.report(1, 0..60);
    harness.set_second(60);
    meter.stop().await;
    let meter = harness.run().await;
    assert_eq!(points(&meter.history, 60).await.len(), 1);
    harness.set_second(15 * 24 * 3600);
    meter.stop().await;
    let meter = harness.run().await;
    assert_eq!(points(&meter.history, 60).await, []);
    meter.stop().await;
}

async fn a_query_for_too_many_points_is_refused(harness: Harness) {
    let meter = harness.run().await;
    let query = PointsQuery {
        endpoint: None,
        deployment: None,
        from: Timestamp::from_secs(0),
        to: Timestamp::from_secs(1_000_000),
        step: Span::from_secs(1),
    };
    let refused = meter.history.points(&query).await.unwrap_err().to_string();
    assert!(refused.contains("longer step"), "{refused}");
    meter.stop().await;
}

async fn a_reader_sees_what_the_meter_has_saved(harness: Harness) {
    // Works before there is a meter, too.
    let reader = HistoryStore::open_read_only(&harness.location)
        .await
        .unwrap();
    assert_eq!(points(&reader, 60).await, []);
    let meter = harness.run().await;
    harness.report(1, 0..60);
    harness.set_second(60);
    meter.stop().await;
    assert_eq!(points(&reader, 60).await[0].requests, 60);
}

async fn a_crash_loses_few_seconds_of_windows(harness: Harness) {
    let meter = harness.run().await;
    harness.report(1, 0..6);
    harness.set_second(6);
    let saved = async {
        loop {
            let points = points(&meter.history, 60).await;
            if let Some(point) = points.first() {
                break (point.requests, point.covered_seconds);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    // Seconds of which another gateway may still report are not covered yet.
    let saved = tokio::time::timeout(Duration::from_secs(20), saved).await;
    assert_eq!(saved.unwrap(), (6, 3));
    meter.kill().await;
}

async fn an_open_minute_survives_restarts_in_quick_succession(mut harness: Harness) {
    for start in 0..3 {
        let meter = harness.run().await;
        harness.report(1, start * 10..(start + 1) * 10);
        meter.stop().await;
    }
    let meter = harness.run().await;
    harness.report(1, 30..60);
    harness.set_second(60);
    assert_eq!(arrivals(&harness.next_closed().await), 60);
    meter.stop().await;
    assert_eq!(
        points(&harness.run().await.history, 60).await[0].requests,
        60
    );
}
