//! Several meters on one PostgreSQL store: buckets change owners, and nothing is counted twice or lost.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::time::Duration;

use contract::events::Event;
use contract::frame::FrameHeader;
use contract::log::{StreamKind, StreamName};
use meter::HistoryStore;
use support::shared::{MemberBus, SharedFrames};
use support::{
    Database, Harness, RunningMeter, arrivals, cpu_us, endpoint, frame, idle_frame, saved_totals,
};

struct Cluster {
    harness: Harness,
    frames: Arc<SharedFrames>,
}

struct OwningMeter {
    bus: Arc<MemberBus>,
    running: RunningMeter,
}

impl OwningMeter {
    async fn start(cluster: &Cluster) -> Self {
        let bus = MemberBus::of(&cluster.frames);
        let running = cluster.harness.run_on(bus.clone()).await;
        bus.assign();
        running.health.until_ready().await;
        Self { bus, running }
    }

    fn history(&self) -> &HistoryStore {
        &self.running.history
    }
}

impl Cluster {
    async fn new() -> Option<Self> {
        Some(Self {
            harness: Harness::new(Database::Postgres).await?,
            frames: Arc::default(),
        })
    }

    /// Publishes gateway frames for these seconds, one request each, and advances time to their end.
    fn report_and_advance(&self, seconds: std::ops::Range<u64>) {
        self.report(seconds.clone());
        self.harness.set_second(seconds.end);
    }

    fn report(&self, seconds: std::ops::Range<u64>) {
        for second in seconds {
            self.frames.publish(frame(1, second));
        }
    }

    /// Publishes node frames for these seconds, in which the instance is idle.
    fn report_idle(&self, seconds: std::ops::Range<u64>) {
        for second in seconds {
            self.frames.publish(idle_frame(second));
        }
    }

    /// Asserts that the usage stream contains exactly minutes with these numbers of requests.
    async fn assert_log(&self, minutes: &[u64]) {
        let stream = StreamName::of(StreamKind::Usage, &endpoint());
        let records = self
            .harness
            .store
            .read_stream(&stream, 0, 100)
            .await
            .unwrap();
        let counted = records.iter().map(|record| match &record.event {
            Event::UsageClosed(minute) => arrivals(minute),
            event => panic!("{event:?}"),
        });
        assert_eq!(counted.collect::<Vec<_>>(), minutes);
    }
}

/// Waits until the meter exports this metric.
async fn until_exported(meter: &OwningMeter, metric: &str) {
    while !meter.running.metrics.encode().contains(metric) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until this many requests of a minute have been saved.
async fn until_saved(history: &HistoryStore, minute: i64, requests: u64) {
    while saved_totals(history, minute).await.0 != requests {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_released_bucket_hands_over_its_open_minute() {
    let Some(mut cluster) = Cluster::new().await else {
        return;
    };
    let first = OwningMeter::start(&cluster).await;
    cluster.report_and_advance(0..25);
    first.bus.revoke();
    until_saved(first.history(), 0, 25).await;
    let second = OwningMeter::start(&cluster).await;
    cluster.report_and_advance(25..60);
    assert_eq!(arrivals(&cluster.harness.next_closed().await), 60);
    first.running.stop().await;
    second.running.stop().await;
    let reader = HistoryStore::open_read_only(&cluster.harness.location)
        .await
        .unwrap();
    assert_eq!(saved_totals(&reader, 0).await, (60, 60));
    cluster.assert_log(&[60]).await;
}

#[tokio::test]
async fn a_former_owner_that_resumes_overwrites_nothing() {
    let Some(mut cluster) = Cluster::new().await else {
        return;
    };
    let old = OwningMeter::start(&cluster).await;
    cluster.report_and_advance(0..20);
    until_saved(old.history(), 0, 20).await;
    // Counted but not saved by the old owner.
    cluster.report(20..30);
    let new = OwningMeter::start(&cluster).await;
    // Both save now.
    cluster.report_and_advance(30..40);
    until_saved(new.history(), 0, 40).await;
    old.bus.revoke();
    old.running.stop().await;
    assert_eq!(saved_totals(new.history(), 0).await.0, 40);
    // The next owner starts from what the new owner saved, not from what the old one did.
    new.running.kill().await;
    let last = OwningMeter::start(&cluster).await;
    cluster.report_and_advance(40..60);
    assert_eq!(arrivals(&cluster.harness.next_closed().await), 60);
    last.running.stop().await;
    let reader = HistoryStore::open_read_only(&cluster.harness.location)
        .await
        .unwrap();
    assert_eq!(saved_totals(&reader, 0).await.0, 60);
    cluster.assert_log(&[60]).await;
}

#[tokio::test]
async fn frames_that_a_killed_meter_had_not_saved_are_redelivered() {
    let Some(mut cluster) = Cluster::new().await else {
        return;
    };
    let first = OwningMeter::start(&cluster).await;
    cluster.report_and_advance(0..20);
    until_saved(first.history(), 0, 20).await;
    cluster.report(20..30);
    first.running.kill().await;
    cluster.report(30..35);
    cluster.harness.set_second(35);
    let second = OwningMeter::start(&cluster).await;
    cluster.report_and_advance(35..60);
    assert_eq!(arrivals(&cluster.harness.next_closed().await), 60);
    second.running.stop().await;
    let reader = HistoryStore::open_read_only(&cluster.harness.location)
        .await
        .unwrap();
    assert_eq!(saved_totals(&reader, 0).await.0, 60);
    cluster.assert_log(&[60]).await;
}

#[tokio::test]
async fn idle_minutes_are_counted_again_from_the_log_alone() {
    let Some(mut cluster) = Cluster::new().await else {
        return;
    };
    let first = OwningMeter::start(&cluster).await;
    cluster.report_idle(0..130);
    cluster.harness.set_second(130);
    until_exported(&first, "penstock_meter_idle_deployments 1").await;
    first.running.kill().await;
    // Another owner had the bucket and saved nothing.
    let fence = format!("meter/{}", endpoint().bucket());
    cluster.harness.store.acquire_fence(&fence).await.unwrap();
    let second = OwningMeter::start(&cluster).await;
    cluster.report_idle(130..240);
    cluster.report(180..240);
    // Redelivery delays closing, and is extended while frames arrive.
    cluster.harness.set_second(310);
    let idle = cluster.harness.next_closed().await;
    assert_eq!((idle.minutes, cpu_us(&idle)), (3, 180 * 100));
    let busy = cluster.harness.next_closed().await;
    assert_eq!((arrivals(&busy), cpu_us(&busy)), (60, 60 * 100));
    second.running.stop().await;
}

#[tokio::test]
async fn unreadable_frames_are_recorded_as_gaps() {
    let Some(mut cluster) = Cluster::new().await else {
        return;
    };
    let meter = OwningMeter::start(&cluster).await;
    let unreadable = |second| FrameHeader::from(&frame(1, second));
    let heads = [unreadable(30), unreadable(32)];
    meter.bus.unreadable.lock().unwrap().extend(heads);
    cluster.report(0..30);
    cluster.report(31..32);
    cluster.report(33..60);
    let metric = "penstock_meter_frames_total{counted=\"unreadable\"} 2";
    until_exported(&meter, metric).await;
    cluster.harness.set_second(60);
    assert_eq!(arrivals(&cluster.harness.next_closed().await), 58);
    let mut missing = Vec::new();
    for _ in 0..2 {
        match cluster.harness.next_usage_event().await {
            Event::UsageGap(gap) => missing.push((gap.first, gap.last)),
            event => panic!("{event:?}"),
        }
    }
    missing.sort_unstable();
    assert_eq!(missing, [(30, 30), (32, 32)]);
    meter.running.stop().await;
}

#[tokio::test]
async fn seconds_in_the_history_are_not_written_again_when_counting_from_the_log() {
    let Some(mut cluster) = Cluster::new().await else {
        return;
    };
    let first = OwningMeter::start(&cluster).await;
    cluster.report_and_advance(0..60);
    assert_eq!(arrivals(&cluster.harness.next_closed().await), 60);
    cluster.report_and_advance(60..80);
    until_saved(first.history(), 1, 20).await;
    first.running.kill().await;
    // Another owner had the bucket and saved nothing, so the saved open minute is void.
    let fence = format!("meter/{}", endpoint().bucket());
    cluster.harness.store.acquire_fence(&fence).await.unwrap();
    let second = OwningMeter::start(&cluster).await;
    cluster.report_and_advance(80..120);
    assert_eq!(arrivals(&cluster.harness.next_closed().await), 60);
    second.running.stop().await;
    let reader = HistoryStore::open_read_only(&cluster.harness.location)
        .await
        .unwrap();
    assert_eq!(saved_totals(&reader, 0).await.0, 60);
    assert_eq!(saved_totals(&reader, 1).await.0, 60);
    cluster.assert_log(&[60, 60]).await;
}
