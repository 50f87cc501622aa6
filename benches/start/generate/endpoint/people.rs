//! Actions of users: applying and changing documents.

use contract::decision::{Pause, Pin};
use contract::events::{EndpointKeys, KeySlot, SealedKey};
use contract::ids::Uid;
use contract::log::{Actor, StreamKind};
use contract::resources::{Labels, ProvisioningState};
use contract::time::{Span, Timestamp};
use domain::endpoint::commands::{Command, Context, Precondition, decide};
use runtime::ids::Ids;

use super::{Endpoint, FollowUps, name};
use crate::documents::{self, Green};
use crate::installation::{SharedState, hex};

#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// A new model release, which replaces the instances.
    Release,
    Policy,
    Traffic,
    Pin,
    Pause,
    Key,
    Delete,
}

impl Endpoint {
    fn command(
        &mut self,
        command: &Command,
        now: Timestamp,
        shared: &mut SharedState,
    ) -> anyhow::Result<()> {
        let context = Context {
            endpoint: self.name.clone(),
            other_endpoints: 0,
            precondition: Precondition::None,
            zones: shared.zones.clone(),
            now,
        };
        let events = decide(self.fold.endpoint.as_ref(), command, &context);
        let events = events.map_err(|refusal| anyhow::anyhow!("{}: {refusal:?}", self.name))?;
        for event in events {
            self.append(
                StreamKind::Endpoint,
                &Actor::token("ci"),
                now,
                event,
                shared,
            )?;
        }
        Ok(())
    }

    pub(super) fn create(
        &mut self,
        now: Timestamp,
        shared: &mut SharedState,
        follow_ups: &mut FollowUps,
    ) -> anyhow::Result<()> {
        self.revision += 1;
        let keys = EndpointKeys {
            primary: sealed_key(shared),
            secondary: sealed_key(shared),
        };
        let put = Command::PutEndpoint {
            labels: labels("team", &format!("team-{}", self.rng.u32(0..20))),
            spec: documents::endpoint(self.shape)?,
            uid: Uid(shared.log.ids.uid()),
            keys,
        };
        self.command(&put, now, shared)?;
        let has_green = self.shape.green != Green::None;
        for deployment in ["blue", "green"].iter().take(1 + usize::from(has_green)) {
            let put = self.put_deployment(deployment, shared)?;
            self.command(&put, now, shared)?;
        }
        self.set_traffic(90, now, shared)?;
        self.put_policy(now, shared)?;
        self.evaluate_at(now + Span::from_millis(20), follow_ups);
        self.begin_later(now, follow_ups);
        Ok(())
    }

    fn put_deployment(
        &mut self,
        deployment: &str,
        shared: &SharedState,
    ) -> serde_json::Result<Command> {
        let instances = if deployment == "blue" { 2 } else { 1 };
        Ok(Command::PutDeployment {
            deployment: name(deployment),
            labels: labels("release", &self.revision.to_string()),
            spec: Box::new(documents::deployment(self.revision, instances)?),
            uid: Uid(shared.log.ids.uid()),
        })
    }

    fn put_policy(&mut self, now: Timestamp, shared: &mut SharedState) -> anyhow::Result<()> {
        let Some(shape) = self.shape.policy else {
            return Ok(());
        };
        let deployment = name("blue");
        let put = Command::PutAutoscale {
            spec: documents::policy(&self.name, &deployment, shape, self.revision)?,
            labels: Labels::new(),
            deployment,
        };
        self.command(&put, now, shared)
    }

    fn set_traffic(
        &mut self,
        blue: u8,
        now: Timestamp,
        shared: &mut SharedState,
    ) -> anyhow::Result<()> {
        let (blue_name, green_name) = (name("blue"), name("green"));
        let (traffic, mirror) = match self.shape.green {
            Green::None => (vec![(blue_name, 100)], Vec::new()),
            Green::Live => (
                vec![(blue_name, blue), (green_name, 100 - blue)],
                Vec::new(),
            ),
            Green::Mirrored => (vec![(blue_name, 100)], vec![(green_name, blue / 2)]),
        };
        let set = Command::SetTraffic {
            traffic: Some(traffic.into_iter().collect()),
            mirror: Some(mirror.into_iter().collect()),
        };
        self.command(&set, now, shared)
    }

    pub(super) fn change(
        &mut self,
        change: Change,
        now: Timestamp,
        shared: &mut SharedState,
    ) -> anyhow::Result<()> {
        let deployment = name("blue");
        match self.fold.endpoint.as_ref() {
            Some(endpoint) if endpoint.state != ProvisioningState::Deleting => {}
            _ => return Ok(()),
        }
        self.revision += 1;
        match change {
            Change::Release => {
                let put = self.put_deployment("blue", shared)?;
                self.command(&put, now, shared)
            }
            Change::Policy => self.put_policy(now, shared),
            Change::Traffic => {
                let blue = self.rng.u8(50..100);
                self.set_traffic(blue, now, shared)
            }
            Change::Pin => {
                let pin = Pin {
                    instances: self.rng.u32(1..5),
                    until: Some(now + Span::from_secs(self.rng.u64(300..3600))),
                };
                self.command(&Command::Pin { deployment, pin }, now, shared)
            }
            Change::Pause => {
                let pause = Pause {
                    scale_in: self.rng.bool(),
                    scale_out: false,
                };
                self.command(&Command::SetPause { deployment, pause }, now, shared)
            }
            Change::Key => {
                let (slot, key) = (KeySlot::Secondary, sealed_key(shared));
                self.command(&Command::RegenerateKey { slot, key }, now, shared)
            }
            Change::Delete => {
                self.session = None;
                self.command(&Command::DeleteEndpoint, now, shared)
            }
        }
    }
}

/// A sealed key as control writes it; it cannot be opened.
fn sealed_key(shared: &SharedState) -> SealedKey {
    let ids = &shared.log.ids;
    SealedKey {
        hash: hex(&ids.secret()),
        sealed: hex(&ids.secret()),
    }
}

fn labels(key: &str, value: &str) -> Labels {
    [(key.to_owned(), value.to_owned())].into()
}
