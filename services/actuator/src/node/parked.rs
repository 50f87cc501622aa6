//! Endpoints that the agent cannot digest an event of: parked, and folded anew when people say so.
//!
//! Invariant: the history is read beside everything else, for an outage of the store must not keep
//! measurements from being sent; what the endpoint goes through meanwhile is read with it.

use contract::ids::{EndpointKey, Position};
use contract::log::Record;
use runtime::parking::{self, Verdict, endpoint_of, survive};
use runtime::retry::until_answered;
use store::{Entry, StoreError, Unreadable};

use super::Agent;

/// The history of an endpoint that is to be folded anew.
pub(super) struct Past {
    key: EndpointKey,
    to: Position,
    entries: Result<Vec<Entry>, StoreError>,
}

impl Agent {
    pub(super) fn fold(&mut self, record: &Record) {
        match self.parking.judge(record) {
            Verdict::Fold => {
                let state = &mut self.state;
                if let Err(detail) = survive(|| state.apply(record))
                    && let Some(key) = record.endpoint()
                {
                    self.park(&key, record.position, record.event.type_name(), &detail);
                }
            }
            Verdict::PassOver => self.refold_up_to(record.endpoint(), record.position),
            Verdict::FoldAnew => {
                if let Some(key) = record.endpoint() {
                    self.refolds.insert(key.clone(), record.position);
                    self.read_history(key, record.position);
                }
            }
        }
    }

    pub(super) fn pass_over(&mut self, unreadable: &Unreadable) {
        match self.parking.unreadable(unreadable, self.deps.clock.now()) {
            Some(key) => self.state.park(&key),
            None => self.refold_up_to(endpoint_of(unreadable), unreadable.position),
        }
    }

    pub(super) fn park(
        &mut self,
        key: &EndpointKey,
        position: Position,
        event_type: &str,
        detail: &str,
    ) {
        self.state.park(key);
        let now = self.deps.clock.now();
        self.parking.park(key, position, event_type, detail, now);
    }

    /// While its history is being read, an endpoint goes on to change.
    fn refold_up_to(&mut self, key: Option<EndpointKey>, position: Position) {
        if let Some(to) = key.and_then(|key| self.refolds.get_mut(&key)) {
            *to = position;
        }
    }

    /// Beside everything else: an outage of the store must not keep measurements from being sent.
    fn read_history(&mut self, key: EndpointKey, to: Position) {
        let (store, component) = (self.deps.store.clone(), self.deps.component.clone());
        self.reading.spawn(async move {
            let read = || parking::history(store.clone(), key.clone(), to);
            let entries = until_answered(&component, read).await;
            Past { key, to, entries }
        });
    }

    pub(super) fn fold_anew(&mut self, past: Past) -> Result<(), StoreError> {
        let Past { key, to, entries } = past;
        let entries = entries?;
        match self.refolds.get(&key).copied() {
            None => return Ok(()),
            Some(further) if further > to => {
                self.read_history(key, further);
                return Ok(());
            }
            Some(_) => self.refolds.remove(&key),
        };
        let (state, now) = (&mut self.state, self.deps.clock.now());
        let whole = parking::fold_anew(&mut self.parking, &key, entries, now, |record| {
            state.apply(record);
        });
        match whole {
            true => self.state.unpark(&key),
            false => self.state.park(&key),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use contract::events::{Empty, InstanceRequested, RequestReason};
    use contract::ids::Uid;
    use contract::log::{Record, StreamKind};
    use contract::time::Timestamp;
    use runtime::clock::SystemClock;
    use runtime::health::Health;
    use runtime::ids::SeededIds;
    use uuid::Uuid;

    use super::super::*;

    fn key(endpoint: &str) -> EndpointKey {
        EndpointKey::new(&endpoint.parse().unwrap())
    }

    fn record(position: u64, endpoint: &str, event: Event) -> Arc<Record> {
        let key = key(endpoint);
        Arc::new(Record {
            position: Position(position),
            prev: Position(position - 1),
            bucket: key.bucket(),
            stream: StreamName::of(StreamKind::Instances, &key),
            version: position,
            id: Uuid::from_u128(position.into()),
            time: Timestamp::from_secs(1),
            actor: Actor::service("test"),
            event,
        })
    }

    fn requested(endpoint: &str) -> Event {
        Event::InstanceRequested(Box::new(InstanceRequested {
            id: InstanceId::from(format!("{endpoint}-blue-1")),
            generation: 1,
            deployment: format!("{endpoint}/blue").parse().unwrap(),
            deployment_uid: Uid(Uuid::from_u128(7)),
            revision: 1,
            node: "n".into(),
            decision: None,
            reason: RequestReason::ScaleOut,
            spec: serde_json::from_str(r#"{"backend": "simulated", "instanceType": "t"}"#).unwrap(),
        }))
    }

    async fn agent(folder: &tempfile::TempDir, health: &Health) -> Agent {
        let url = format!("sqlite:{}", folder.path().join("log.db").display());
        let store = Store::open(&url).await.unwrap();
        let config = NodeConfig {
            node: "n".into(),
            address: None,
            keep_instances: true,
            grace: Span::from_secs(1),
        };
        let deps = NodeDeps {
            store: store.clone(),
            bus: bus::LocalBus::new(),
            clock: Arc::new(SystemClock),
            ids: Arc::new(SeededIds::new(1)),
            backends: BTreeMap::new(),
            component: health.component("node"),
        };
        let hello = Hello {
            address: None,
            backends: Vec::new(),
        };
        Agent {
            state: NodeState::new("n", config.grace),
            frames: Frames::new("n", hello, deps.ids.uid()),
            listed: 0,
            caught_up: false,
            carrying_out: JoinSet::new(),
            parking: Parking::open(CONSUMER, store.clone(), deps.component.clone()),
            refolds: BTreeMap::new(),
            reading: JoinSet::new(),
            fence: store.take("node/n").await.unwrap(),
            config,
            deps,
        }
    }

    #[tokio::test]
    async fn a_panic_in_the_fold_parks_the_endpoint_that_it_is_about() {
        let folder = tempfile::tempdir().unwrap();
        let health = Health::default();
        let mut agent = agent(&folder, &health).await;
        agent.state.panics_at = Some(Position(2));
        agent.take_in(FeedItem::Records(vec![
            record(1, "rose", requested("rose")),
            record(2, "rose", Event::EndpointDeleted(Empty {})),
            record(3, "iris", requested("iris")),
        ]));
        assert!(agent.parking.is_parked(&key("rose")));
        assert!(!agent.parking.is_parked(&key("iris")));
        let rose = agent.state.plan(&key("rose"));
        assert_eq!((rose.orders.len(), rose.events.len()), (0, 0));
        assert_eq!(agent.state.plan(&key("iris")).orders.len(), 1);
        assert!(health.remarks()[0].contains("rose (position 2)"));
    }
}
