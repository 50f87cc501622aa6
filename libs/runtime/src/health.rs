//! What a process still waits for before it can serve, what it cannot reach, and what people should
//! know of, in sentences.
//!
//! Invariant: who waits or cannot reach something is not ready; a remark takes nothing from
//! readiness.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// Shared by all components of a process; `/readyz` prints what is missing.
#[derive(Clone, Debug)]
pub struct Health {
    words: Arc<Mutex<BTreeMap<String, Words>>>,
    all_ready: Arc<watch::Sender<bool>>,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            words: Arc::default(),
            all_ready: Arc::new(watch::Sender::new(true)),
        }
    }
}

/// What one component says.
#[derive(Clone, Debug, Default)]
struct Words {
    waiting: Option<String>,
    trouble: Option<String>,
    remark: Option<String>,
}

impl Words {
    fn hinders(&self) -> bool {
        self.waiting.is_some() || self.trouble.is_some()
    }
}

/// One component's word on itself; waits until it says `ready`.
#[derive(Clone, Debug)]
pub struct Component {
    name: String,
    health: Health,
}

impl Health {
    /// A component of this name, which is starting. The same name twice is the same component.
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
        self.told(|words| words.waiting.iter().chain(&words.trouble).collect())
    }

    /// `name: what people should know of`, such as endpoints that are parked.
    pub fn remarks(&self) -> Vec<String> {
        self.told(|words| words.remark.iter().collect())
    }

    fn told(&self, of: impl Fn(&Words) -> Vec<&String>) -> Vec<String> {
        let words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        let mut told = Vec::new();
        for (name, words) in words.iter() {
            told.extend(of(words).into_iter().map(|text| format!("{name}: {text}")));
        }
        told
    }

    /// Returns when every component known by then is ready.
    pub async fn until_ready(&self) {
        // The sender lives in `self`, so the channel cannot close.
        let _ = self.all_ready.subscribe().wait_for(|ready| *ready).await;
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Words)) {
        let mut words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        change(words.entry(name.to_owned()).or_default());
        let ready = !words.values().any(Words::hinders);
        self.all_ready.send_replace(ready);
    }
}

/// What a service that shares the buckets with its replicas says before it has any.
pub const UNASSIGNED: &str =
    "waits for its share of the buckets, which the bus deals out among the replicas";

/// What it says then.
pub const READS_THE_LOG: &str = "reads the log up to its end";

impl Component {
    /// It does its work from now on.
    pub fn ready(&self) {
        self.health.change(&self.name, |words| words.waiting = None);
    }

    /// It does not do its work; `reason` goes on after the component's name: "reads the routes from
    /// the bus".
    pub fn waiting(&self, reason: &str) {
        self.health
            .change(&self.name, |words| words.waiting = Some(reason.to_owned()));
    }

    /// Another reason, if it still waits: who is ready stays so.
    pub fn waits_on(&self, reason: &str) {
        self.health.change(&self.name, |words| {
            if words.waiting.is_some() {
                words.waiting = Some(reason.to_owned());
            }
        });
    }

    /// What cannot be reached at the moment; comes and goes without a word on the rest.
    pub fn trouble(&self, trouble: Option<String>) {
        self.health
            .change(&self.name, |words| words.trouble = trouble);
    }

    /// Something that people should know of; does not make the process unready.
    pub fn remark(&self, remark: Option<String>) {
        self.health
            .change(&self.name, |words| words.remark = remark);
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

    #[test]
    fn who_is_ready_does_not_begin_to_wait_again_for_something_else() {
        let health = Health::default();
        let meter = health.component("meter");
        meter.waits_on("reads the log");
        assert_eq!(health.missing(), ["meter: reads the log"]);
        meter.ready();
        meter.waits_on("reads the log");
        assert!(health.missing().is_empty());
    }

    #[test]
    fn what_cannot_be_reached_and_what_is_remarked_do_not_undo_each_other() {
        let health = Health::default();
        let meter = health.component("meter");
        meter.ready();
        meter.trouble(Some("the store cannot be reached: gone".into()));
        meter.remark(Some("1 endpoint is parked".into()));
        assert_eq!(
            health.missing(),
            ["meter: the store cannot be reached: gone"]
        );
        meter.trouble(None);
        assert!(health.missing().is_empty());
        assert_eq!(health.remarks(), ["meter: 1 endpoint is parked"]);
    }
}
