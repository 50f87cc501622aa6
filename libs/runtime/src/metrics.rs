//! The metrics behind `/metrics`, shared by all services of a process.

use std::collections::BTreeMap;
use std::panic::Location;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

/// Registries by the code location that registered them.
type Registries = BTreeMap<(&'static str, u32), Registry>;

/// The metrics of a process, registered by its services and exposed at `/metrics`. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    registries: Arc<Mutex<Registries>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registries: Arc::default(),
        };
        metrics.register(|registry| {
            let labels = [("version".into(), env!("CARGO_PKG_VERSION").into())];
            registry
                .sub_registry_with_labels(labels.into_iter())
                .register(
                    "penstock_build_info",
                    "The version of this process",
                    ConstGauge::new(1i64),
                );
        });
        #[cfg(feature = "log")]
        metrics.register(|registry| {
            registry.register(
                "penstock_parked_endpoints",
                "Endpoints that a consumer has parked because it cannot process one of their events",
                crate::parking::PARKED_ENDPOINTS.clone(),
            );
            registry.register(
                "penstock_unprocessed_events",
                "Events that belong to no endpoint and that a consumer has skipped because it cannot process them",
                crate::parking::UNPROCESSED_EVENTS.clone(),
            );
        });
        metrics
    }
}

impl Metrics {
    /// Registers metrics; names are written in full, with `penstock_` and the unit. A restarted
    /// service registers from the same location, and its new metrics replace the old ones.
    #[track_caller]
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        let location = Location::caller();
        let mut registry = Registry::default();
        add(&mut registry);
        self.registries()
            .insert((location.file(), location.line()), registry);
    }

    /// Encodes all metrics in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        for registry in self.registries().values() {
            if let Err(error) = encode_registry(&mut text, registry) {
                tracing::error!(%error, "failed to encode some metrics");
            }
        }
        // Writing to a string does not fail.
        let _ = encode_eof(&mut text);
        text
    }

    fn registries(&self) -> MutexGuard<'_, Registries> {
        self.registries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;

    use super::*;

    #[test]
    fn a_restarted_service_replaces_its_metrics() {
        let metrics = Metrics::default();
        for _ in 0..2 {
            metrics.register(|registry| {
                registry.register("penstock_tests", "Tests", Counter::<u64>::default());
            });
        }
        let text = metrics.encode();
        assert_eq!(text.matches("penstock_tests_total 0").count(), 1, "{text}");
        assert_eq!(text.matches("# EOF").count(), 1, "{text}");
    }
}
