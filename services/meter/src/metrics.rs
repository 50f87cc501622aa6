//! Metrics of the meter.

use contract::events::Event;
use domain::usage::FrameOutcome;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use runtime::metrics::Metrics;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FrameLabels {
    counted: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EventLabels {
    kind: &'static str,
}

#[derive(Clone, Default)]
pub(crate) struct MeterMetrics {
    frames: Family<FrameLabels, Counter>,
    events: Family<EventLabels, Counter>,
    frames_missing: Counter,
    pub open_minutes: Gauge,
    pub idle_deployments: Gauge,
    pub saves_failed: Counter,
}

impl MeterMetrics {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        let exported = Self::default();
        metrics.register(|registry| {
            registry.register(
                "penstock_meter_frames",
                "Frames received: in time, late, or already counted; and those that could not be read",
                exported.frames.clone(),
            );
            registry.register(
                "penstock_usage_events",
                "Usage events written, by kind",
                exported.events.clone(),
            );
            registry.register(
                "penstock_usage_frames_missing",
                "Missing frames, as recorded in usage gaps, once per endpoint",
                exported.frames_missing.clone(),
            );
            registry.register(
                "penstock_meter_open_minutes",
                "Minutes that are not closed yet, in all buckets",
                exported.open_minutes.clone(),
            );
            registry.register(
                "penstock_meter_idle_deployments",
                "Idle deployments, whose usage is reported with the next request or at the end of the hour",
                exported.idle_deployments.clone(),
            );
            registry.register(
                "penstock_meter_saves_failed",
                "Failed saves of history and open minutes",
                exported.saves_failed.clone(),
            );
        });
        exported
    }

    pub(crate) fn frame(&self, counted: FrameOutcome) {
        let counted = match counted {
            FrameOutcome::InTime => "in-time",
            FrameOutcome::Late => "late",
            FrameOutcome::Duplicate => "before",
        };
        self.frames.get_or_create(&FrameLabels { counted }).inc();
    }

    pub(crate) fn unreadable_frame(&self) {
        let counted = "unreadable";
        self.frames.get_or_create(&FrameLabels { counted }).inc();
    }

    pub(crate) fn written(&self, event: &Event) {
        let kind = event.type_name();
        self.events.get_or_create(&EventLabels { kind }).inc();
        if let Event::UsageGap(gap) = event {
            self.frames_missing.inc_by(gap.last - gap.first + 1);
        }
    }
}
