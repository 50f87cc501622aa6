//! What a process still waits for before it can serve, in sentences.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// Shared by all components of a process; `/readyz` prints what is missing.
#[derive(Clone, Debug)]
pub struct Health {
    waiting: Arc<Mutex<BTreeMap<String, String>>>,
    all_ready: Arc<watch::Sender<bool>>,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            waiting: Arc::default(),
            all_ready: Arc::new(watch::Sender::new(true)),
        }
    }
}

/// One component's word on itself; waits until it says `ready`.
#[derive(Clone, Debug)]
pub struct Component {
    name: String,
    health: Health,
}

impl Health {
    pub fn component(&self, name: &str) -> Component {
        let component = Component {
            name: name.to_owned(),
            health: self.clone(),
        };
        component.waiting("is starting");
        component
    }

    /// `name: what it waits for`, empty when everything is ready.
    pub fn missing(&self) -> Vec<String> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting
            .iter()
            .map(|(name, reason)| format!("{name}: {reason}"))
            .collect()
    }

    /// Returns when every component known by then is ready.
    pub async fn until_ready(&self) {
        // The sender lives in `self`, so the channel cannot close.
        let _ = self.all_ready.subscribe().wait_for(|ready| *ready).await;
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<String, String>)) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut waiting);
        self.all_ready.send_replace(waiting.is_empty());
    }
}

impl Component {
    pub fn ready(&self) {
        self.health.change(|waiting| {
            waiting.remove(&self.name);
        });
    }

    pub fn waiting(&self, reason: &str) {
        self.health.change(|waiting| {
            waiting.insert(self.name.clone(), reason.to_owned());
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_ready_once_every_component_is() {
        let health = Health::default();
        let (gateway, control) = (health.component("gateway"), health.component("control"));
        gateway.waiting("no routes yet");
        control.ready();
        assert_eq!(health.missing(), ["gateway: no routes yet"]);
        gateway.ready();
        assert!(health.missing().is_empty());
    }
}
