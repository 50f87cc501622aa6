//! What the meter exports about itself.

use contract::events::Event;
use domain::usage::Counted;
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
                "Frames taken in: in time, late, or counted before; and those that could not be read",
                exported.frames.clone(),
            );
            registry.register(
                "penstock_usage_events",
                "Events of usage written, by kind",
                exported.events.clone(),
            );
            registry.register(
                "penstock_usage_frames_missing",
                "Frames that never came, as events of the log name them, once per endpoint",
                exported.frames_missing.clone(),
            );
            registry.register(
                "penstock_meter_open_minutes",
                "Minutes that are not closed yet, over all buckets",
                exported.open_minutes.clone(),
            );
            registry.register(
                "penstock_meter_idle_deployments",
                "Deployments that had no request for a while, whose usage is told when one comes or the hour is over",
                exported.idle_deployments.clone(),
            );
            registry.register(
                "penstock_meter_saves_failed",
                "Times that history and open minutes could not be saved",
                exported.saves_failed.clone(),
            );
        });
        exported
    }

    pub(crate) fn frame(&self, counted: Counted) {
        let counted = match counted {
            Counted::InTime => "in-time",
            Counted::Late => "late",
            Counted::Before => "before",
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
