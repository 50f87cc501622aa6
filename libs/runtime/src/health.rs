//! Why a process is not ready, what it cannot reach, and warnings for operators, as sentences.
//!
//! Invariant: a component that is waiting or cannot reach something is not ready; a warning does
//! not affect readiness.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// Shared by all components of a process; `/readyz` prints what is missing.
#[derive(Clone, Debug)]
pub struct HealthRegistry {
    statuses: Arc<Mutex<BTreeMap<String, ComponentStatus>>>,
    all_ready: Arc<watch::Sender<bool>>,
}

impl Default for HealthRegistry {
    fn default() -> Self {
        Self {
            statuses: Arc::default(),
            all_ready: Arc::new(watch::Sender::new(true)),
        }
    }
}

/// The status of one component.
#[derive(Clone, Debug, Default)]
struct ComponentStatus {
    waiting: Option<String>,
    problem: Option<String>,
    warning: Option<String>,
}

impl ComponentStatus {
    fn blocks_readiness(&self) -> bool {
        self.waiting.is_some() || self.problem.is_some()
    }
}

/// A handle for one component to report its status; it is waiting until it is ready.
#[derive(Clone, Debug)]
pub struct Component {
    name: String,
    health: HealthRegistry,
}

impl HealthRegistry {
    /// Registers a component, which is starting. The same name returns the same component.
    pub fn component(&self, name: &str) -> Component {
        let component = Component {
            name: name.to_owned(),
            health: self.clone(),
        };
        component.waiting("is starting");
        component
    }

    /// Returns `name: reason` for everything that is not ready; empty when the process is ready.
    pub fn missing(&self) -> Vec<String> {
        self.sentences(|status| status.waiting.iter().chain(&status.problem).collect())
    }

    /// Returns `name: warning` for each warning, such as endpoints that are parked.
    pub fn warnings(&self) -> Vec<String> {
        self.sentences(|status| status.warning.iter().collect())
    }

    fn sentences(&self, of: impl Fn(&ComponentStatus) -> Vec<&String>) -> Vec<String> {
        let statuses = self.statuses.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sentences = Vec::new();
        for (name, status) in statuses.iter() {
            sentences.extend(of(status).into_iter().map(|text| format!("{name}: {text}")));
        }
        sentences
    }

    /// Waits until every component registered by then is ready.
    pub async fn until_ready(&self) {
        // The sender lives in `self`, so the channel cannot close.
        let _ = self.all_ready.subscribe().wait_for(|ready| *ready).await;
    }

    fn update(&self, name: &str, change: impl FnOnce(&mut ComponentStatus)) {
        let mut statuses = self.statuses.lock().unwrap_or_else(PoisonError::into_inner);
        change(statuses.entry(name.to_owned()).or_default());
        let ready = !statuses.values().any(ComponentStatus::blocks_readiness);
        self.all_ready.send_replace(ready);
    }
}

/// The initial status of a service that shares the buckets with its replicas.
pub const WAITING_FOR_BUCKETS: &str = "is waiting for the bus to assign it a share of the buckets";

/// The status once it has buckets.
pub const READING_LOG: &str = "is reading the log up to its head";

impl Component {
    /// Marks the component as ready.
    pub fn ready(&self) {
        self.health
            .update(&self.name, |status| status.waiting = None);
    }

    /// Marks the component as not ready; `reason` follows the component's name: "is reading the
    /// routes".
    pub fn waiting(&self, reason: &str) {
        self.health.update(&self.name, |status| {
            status.waiting = Some(reason.to_owned())
        });
    }

    /// Changes the reason if the component is waiting; a ready component stays ready.
    pub fn set_waiting_reason(&self, reason: &str) {
        self.health.update(&self.name, |status| {
            if status.waiting.is_some() {
                status.waiting = Some(reason.to_owned());
            }
        });
    }

    /// Sets or clears what cannot be reached at the moment, independently of the rest.
    pub fn set_problem(&self, problem: Option<String>) {
        self.health
            .update(&self.name, |status| status.problem = problem);
    }

    /// Sets or clears a warning for operators; it does not affect readiness.
    pub fn set_warning(&self, warning: Option<String>) {
        self.health
            .update(&self.name, |status| status.warning = warning);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_ready_once_every_component_is() {
        let health = HealthRegistry::default();
        let (gateway, control) = (health.component("gateway"), health.component("control"));
        gateway.waiting("no routes yet");
        control.ready();
        assert_eq!(health.missing(), ["gateway: no routes yet"]);
        gateway.ready();
        assert!(health.missing().is_empty());
    }

    #[test]
    fn a_ready_component_does_not_start_to_wait_again() {
        let health = HealthRegistry::default();
        let meter = health.component("meter");
        meter.set_waiting_reason("reads the log");
        assert_eq!(health.missing(), ["meter: reads the log"]);
        meter.ready();
        meter.set_waiting_reason("reads the log");
        assert!(health.missing().is_empty());
    }

    #[test]
    fn problems_and_warnings_are_independent() {
        let health = HealthRegistry::default();
        let meter = health.component("meter");
        meter.ready();
        meter.set_problem(Some("the store cannot be reached: gone".into()));
        meter.set_warning(Some("1 endpoint is parked".into()));
        assert_eq!(
            health.missing(),
            ["meter: the store cannot be reached: gone"]
        );
        meter.set_problem(None);
        assert!(health.missing().is_empty());
        assert_eq!(health.warnings(), ["meter: 1 endpoint is parked"]);
    }
}
