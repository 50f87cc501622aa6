//! Several meters on one store in PostgreSQL: buckets change hands, and nothing is counted twice or
//! lost.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::time::Duration;

use contract::events::Event;
use contract::frame::FrameHead;
use contract::log::{StreamKind, StreamName};
use meter::History;
use support::shared::{Frames, Member};
use support::{House, On, Running, arrivals, cpu_us, endpoint, frame, resting, told};

struct Town {
    house: House,
    frames: Arc<Frames>,
}

struct Meter {
    bus: Arc<Member>,
    running: Running,
}

impl Meter {
    async fn owning(town: &Town) -> Self {
        let bus = Member::of(&town.frames);
        let running = town.house.run_on(bus.clone()).await;
        bus.assign();
        running.health.until_ready().await;
        Self { bus, running }
    }

    fn history(&self) -> &History {
        &self.running.history
    }
}

impl Town {
    async fn new() -> Option<Self> {
        Some(Self {
            house: House::new(On::Postgres).await?,
            frames: Arc::default(),
        })
    }

    /// The gateway tells of these seconds, one request each, and time moves on to their end.
    fn pass(&self, seconds: std::ops::Range<u64>) {
        self.tell(seconds.clone());
        self.house.at(seconds.end);
    }

    fn tell(&self, seconds: std::ops::Range<u64>) {
        for second in seconds {
            self.frames.publish(frame(1, second));
        }
    }

    /// The node tells of these seconds, in which nothing is asked of its instance.
    fn rest(&self, seconds: std::ops::Range<u64>) {
        for second in seconds {
            self.frames.publish(resting(second));
        }
    }

    /// The usage stream holds these minutes, with so many requests each, and nothing else.
    async fn assert_log(&self, minutes: &[u64]) {
        let stream = StreamName::of(StreamKind::Usage, &endpoint());
        let records = self.house.store.read_stream(&stream, 0, 100).await.unwrap();
        let counted = records.iter().map(|record| match &record.event {
            Event::UsageClosed(minute) => arrivals(minute),
            event => panic!("{event:?}"),
        });
        assert_eq!(counted.collect::<Vec<_>>(), minutes);
    }
}

/// Waits until the meter exports this.
async fn until_exported(meter: &Meter, metric: &str) {
    while !meter.running.metrics.encode().contains(metric) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until so many requests of a minute have been saved.
async fn until_saved(history: &History, minute: i64, requests: u64) {
    while told(history, minute).await.0 != requests {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_meter_that_lets_go_hands_over_its_open_minute() {
    let Some(mut town) = Town::new().await else {
        return;
    };
    let first = Meter::owning(&town).await;
    town.pass(0..25);
    first.bus.revoke();
    until_saved(first.history(), 0, 25).await;
    let second = Meter::owning(&town).await;
    town.pass(25..60);
    assert_eq!(arrivals(&town.house.closed().await), 60);
    first.running.stop().await;
    second.running.stop().await;
    let reader = History::open_reader(&town.house.place).await.unwrap();
    assert_eq!(told(&reader, 0).await, (60, 60));
    town.assert_log(&[60]).await;
}

#[tokio::test]
async fn an_old_owner_that_wakes_up_overwrites_nothing() {
    let Some(mut town) = Town::new().await else {
        return;
    };
    let old = Meter::owning(&town).await;
    town.pass(0..20);
    until_saved(old.history(), 0, 20).await;
    // Counted by the old owner, and not saved by it.
    town.tell(20..30);
    let new = Meter::owning(&town).await;
    // Both of them save now.
    town.pass(30..40);
    until_saved(new.history(), 0, 40).await;
    old.bus.revoke();
    old.running.stop().await;
    assert_eq!(told(new.history(), 0).await.0, 40);
    // The successor of the new owner finds what that saved, not what the old one did.
    new.running.die().await;
    let last = Meter::owning(&town).await;
    town.pass(40..60);
    assert_eq!(arrivals(&town.house.closed().await), 60);
    last.running.stop().await;
    let reader = History::open_reader(&town.house.place).await.unwrap();
    assert_eq!(told(&reader, 0).await.0, 60);
    town.assert_log(&[60]).await;
}

#[tokio::test]
async fn what_a_meter_that_died_had_not_saved_is_heard_again() {
    let Some(mut town) = Town::new().await else {
        return;
    };
    let first = Meter::owning(&town).await;
    town.pass(0..20);
    until_saved(first.history(), 0, 20).await;
    town.tell(20..30);
    first.running.die().await;
    town.tell(30..35);
    town.house.at(35);
    let second = Meter::owning(&town).await;
    town.pass(35..60);
    assert_eq!(arrivals(&town.house.closed().await), 60);
    second.running.stop().await;
    let reader = History::open_reader(&town.house.place).await.unwrap();
    assert_eq!(told(&reader, 0).await.0, 60);
    town.assert_log(&[60]).await;
}

#[tokio::test]
async fn who_counts_from_the_log_alone_counts_minutes_without_a_request_again() {
    let Some(mut town) = Town::new().await else {
        return;
    };
    let first = Meter::owning(&town).await;
    town.rest(0..130);
    town.house.at(130);
    until_exported(&first, "penstock_meter_idle_deployments 1").await;
    first.running.die().await;
    // Somebody had the bucket and saved nothing.
    let fence = format!("meter/{}", endpoint().bucket());
    town.house.store.take(&fence).await.unwrap();
    let second = Meter::owning(&town).await;
    town.rest(130..240);
    town.tell(180..240);
    // Frames of the past are waited for, and more of them may follow.
    town.house.at(310);
    let idle = town.house.closed().await;
    assert_eq!((idle.minutes, cpu_us(&idle)), (3, 180 * 100));
    let busy = town.house.closed().await;
    assert_eq!((arrivals(&busy), cpu_us(&busy)), (60, 60 * 100));
    second.running.stop().await;
}

#[tokio::test]
async fn frames_that_cannot_be_read_are_missing_by_name() {
    let Some(mut town) = Town::new().await else {
        return;
    };
    let meter = Meter::owning(&town).await;
    let unreadable = |second| FrameHead::from(&frame(1, second));
    let heads = [unreadable(30), unreadable(32)];
    meter.bus.unreadable.lock().unwrap().extend(heads);
    town.tell(0..30);
    town.tell(31..32);
    town.tell(33..60);
    let metric = "penstock_meter_frames_total{counted=\"unreadable\"} 2";
    until_exported(&meter, metric).await;
    town.house.at(60);
    assert_eq!(arrivals(&town.house.closed().await), 58);
    let mut missing = Vec::new();
    for _ in 0..2 {
        match town.house.usage().await {
            Event::UsageGap(gap) => missing.push((gap.first, gap.last)),
            event => panic!("{event:?}"),
        }
    }
    missing.sort_unstable();
    assert_eq!(missing, [(30, 30), (32, 32)]);
    meter.running.stop().await;
}

#[tokio::test]
async fn seconds_in_the_history_are_not_told_again_by_who_counts_from_the_log() {
    let Some(mut town) = Town::new().await else {
        return;
    };
    let first = Meter::owning(&town).await;
    town.pass(0..60);
    assert_eq!(arrivals(&town.house.closed().await), 60);
    town.pass(60..80);
    until_saved(first.history(), 1, 20).await;
    first.running.die().await;
    // Somebody had the bucket and saved nothing, so the open minute is nobody's.
    let fence = format!("meter/{}", endpoint().bucket());
    town.house.store.take(&fence).await.unwrap();
    let second = Meter::owning(&town).await;
    town.pass(80..120);
    assert_eq!(arrivals(&town.house.closed().await), 60);
    second.running.stop().await;
    let reader = History::open_reader(&town.house.place).await.unwrap();
    assert_eq!(told(&reader, 0).await.0, 60);
    assert_eq!(told(&reader, 1).await.0, 60);
    town.assert_log(&[60, 60]).await;
}
