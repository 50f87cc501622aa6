//! What people do: documents, and changes of them.

use contract::decision::{Pause, Pin};
use contract::events::{EndpointKeys, KeySlot, SealedKey};
use contract::ids::Uid;
use contract::log::{Actor, StreamKind};
use contract::resources::{Labels, ProvisioningState};
use contract::time::{Span, Timestamp};
use domain::endpoint::commands::{Command, Context, Precondition, decide};
use runtime::ids::Ids;

use super::{Endpoint, Followed, name};
use crate::documents::{self, Green};
use crate::house::{Ground, hex};

#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// Another release of the model, which replaces the instances.
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
        ground: &mut Ground,
    ) -> anyhow::Result<()> {
        let context = Context {
            endpoint: self.name.clone(),
            other_endpoints: 0,
            precondition: Precondition::None,
            zones: ground.zones.clone(),
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
                ground,
            )?;
        }
        Ok(())
    }

    pub(super) fn create(
        &mut self,
        now: Timestamp,
        ground: &mut Ground,
        followed: &mut Followed,
    ) -> anyhow::Result<()> {
        self.revision += 1;
        let keys = EndpointKeys {
            primary: sealed_key(ground),
            secondary: sealed_key(ground),
        };
        let put = Command::PutEndpoint {
            labels: labels("team", &format!("team-{}", self.rng.u32(0..20))),
            spec: documents::endpoint(self.shape)?,
            uid: Uid(ground.log.ids.uid()),
            keys,
        };
        self.command(&put, now, ground)?;
        let has_green = self.shape.green != Green::None;
        for deployment in ["blue", "green"].iter().take(1 + usize::from(has_green)) {
            let put = self.put_deployment(deployment, ground)?;
            self.command(&put, now, ground)?;
        }
        self.set_traffic(90, now, ground)?;
        self.put_policy(now, ground)?;
        self.evaluate_at(now + Span::from_millis(20), followed);
        self.begin_later(now, followed);
        Ok(())
    }

    fn put_deployment(&mut self, deployment: &str, ground: &Ground) -> serde_json::Result<Command> {
        let instances = if deployment == "blue" { 2 } else { 1 };
        Ok(Command::PutDeployment {
            deployment: name(deployment),
            labels: labels("release", &self.revision.to_string()),
            spec: documents::deployment(self.revision, instances)?,
            uid: Uid(ground.log.ids.uid()),
        })
    }

    fn put_policy(&mut self, now: Timestamp, ground: &mut Ground) -> anyhow::Result<()> {
        let Some(shape) = self.shape.policy else {
            return Ok(());
        };
        let deployment = name("blue");
        let put = Command::PutAutoscale {
            spec: documents::policy(&self.name, &deployment, shape, self.revision)?,
            labels: Labels::new(),
            deployment,
        };
        self.command(&put, now, ground)
    }

    fn set_traffic(&mut self, blue: u8, now: Timestamp, ground: &mut Ground) -> anyhow::Result<()> {
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
        self.command(&set, now, ground)
    }

    pub(super) fn change(
        &mut self,
        change: Change,
        now: Timestamp,
        ground: &mut Ground,
    ) -> anyhow::Result<()> {
        let deployment = name("blue");
        match self.fold.endpoint.as_ref() {
            Some(endpoint) if endpoint.state != ProvisioningState::Deleting => {}
            _ => return Ok(()),
        }
        self.revision += 1;
        match change {
            Change::Release => {
                let put = self.put_deployment("blue", ground)?;
                self.command(&put, now, ground)
            }
            Change::Policy => self.put_policy(now, ground),
            Change::Traffic => {
                let blue = self.rng.u8(50..100);
                self.set_traffic(blue, now, ground)
            }
            Change::Pin => {
                let pin = Pin {
                    instances: self.rng.u32(1..5),
                    until: Some(now + Span::from_secs(self.rng.u64(300..3600))),
                };
                self.command(&Command::Pin { deployment, pin }, now, ground)
            }
            Change::Pause => {
                let pause = Pause {
                    scale_in: self.rng.bool(),
                    scale_out: false,
                };
                self.command(&Command::SetPause { deployment, pause }, now, ground)
            }
            Change::Key => {
                let (slot, key) = (KeySlot::Secondary, sealed_key(ground));
                self.command(&Command::RegenerateKey { slot, key }, now, ground)
            }
            Change::Delete => {
                self.session = None;
                self.command(&Command::DeleteEndpoint, now, ground)
            }
        }
    }
}

/// As control writes it; nobody has the key that could open it.
fn sealed_key(ground: &Ground) -> SealedKey {
    let ids = &ground.log.ids;
    SealedKey {
        hash: hex(&ids.secret()),
        sealed: hex(&ids.secret()),
    }
}

fn labels(key: &str, value: &str) -> Labels {
    [(key.to_owned(), value.to_owned())].into()
}
