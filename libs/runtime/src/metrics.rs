//! The registry behind `/metrics`, shared by all services of a process.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let labels = [("version".into(), env!("CARGO_PKG_VERSION").into())];
        registry
            .sub_registry_with_labels(labels.into_iter())
            .register(
                "penstock_build_info",
                "The version of this process",
                ConstGauge::new(1i64),
            );
        Self {
            registry: Arc::new(Mutex::new(registry)),
        }
    }
}

impl Metrics {
    /// Registers metrics; names are written in full, with `penstock_` and the unit.
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut self.registry.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The OpenMetrics text format.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        match encode(&mut text, &registry) {
            Ok(()) => text,
            // Writing to a String fails only where a metric's own encoder does.
            Err(_) => String::from("# EOF\n"),
        }
    }
}
