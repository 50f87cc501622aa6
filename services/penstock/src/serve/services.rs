//! The services that a process can run, a row each.
//!
//! Invariant: a row says all that the rest of the program asks about a service: what it is called, what it
//! needs, when it is started and stopped, and how. Services start in the order of [`SERVICES`], and stop
//! in that of their stages.

use std::fmt;
use std::sync::Arc;

use control::HistorySource;
use futures::future::BoxFuture;

use super::args::ServeArgs;
use super::house::{Addresses, Ground};
use super::plan::Plan;
use super::stages::{Stage, StageName, Stages};
use super::start;

/// The name of a service, as `--services` takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service(pub &'static str);

impl Service {
    pub const CONTROL: Self = Self("control");
    pub const GATEWAY: Self = Self("gateway");
    pub const AUTOSCALER: Self = Self("autoscaler");
    pub const ACTUATOR: Self = Self("actuator");
    pub const METER: Self = Self("meter");
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

#[derive(Clone, Copy)]
pub struct ServiceEntry {
    pub name: Service,
    /// It reads or writes the log. One that does not can run where no store is reached.
    pub needs_store: bool,
    /// It looks at schedules, so that old data of time zones are worth a warning.
    pub has_schedules: bool,
    /// Where its tasks belong, unless it says otherwise for one of them.
    pub stage: StageName,
    pub start: for<'a> fn(&'a mut Starting<'_>) -> BoxFuture<'a, anyhow::Result<()>>,
}

impl fmt::Debug for ServiceEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ServiceEntry").field(&self.name).finish()
    }
}

/// All services of this release, in the order in which they are started: control shows what the gateway
/// and the meter have opened.
pub static SERVICES: &[ServiceEntry] = &[
    ServiceEntry {
        name: Service::GATEWAY,
        // It lives by routes and frames alone.
        needs_store: false,
        has_schedules: false,
        stage: StageName::Doors,
        start: |starting| Box::pin(start::gateway(starting)),
    },
    ServiceEntry {
        name: Service::METER,
        needs_store: true,
        has_schedules: false,
        stage: StageName::Log,
        start: |starting| Box::pin(start::meter(starting)),
    },
    ServiceEntry {
        name: Service::CONTROL,
        needs_store: true,
        has_schedules: true,
        stage: StageName::Doors,
        start: |starting| Box::pin(start::control(starting)),
    },
    ServiceEntry {
        name: Service::AUTOSCALER,
        needs_store: true,
        has_schedules: true,
        stage: StageName::Engines,
        start: |starting| Box::pin(async { start::autoscaler(starting) }),
    },
    ServiceEntry {
        name: Service::ACTUATOR,
        needs_store: true,
        has_schedules: false,
        stage: StageName::Hands,
        start: |starting| Box::pin(start::actuator(starting)),
    },
];

/// A process on its way up: what a service is started with, and what those before it have opened.
pub struct Starting<'a> {
    pub args: &'a ServeArgs,
    pub plan: &'a Plan,
    pub ground: &'a Ground,
    pub stages: &'a mut Stages,
    pub addresses: Addresses,
    /// Set by a meter in this process.
    pub history: Option<Arc<dyn HistorySource>>,
    /// The admin listener, once it has been opened.
    pub admin: Option<String>,
    /// The stage of the service that is being started.
    stage: StageName,
}

impl<'a> Starting<'a> {
    pub fn new(
        args: &'a ServeArgs,
        plan: &'a Plan,
        ground: &'a Ground,
        stages: &'a mut Stages,
    ) -> Self {
        Self {
            args,
            plan,
            ground,
            stages,
            addresses: Addresses::default(),
            history: None,
            admin: None,
            stage: StageName::Log,
        }
    }

    /// Starts the services of the plan; gives where they are reached.
    ///
    /// # Errors
    /// Of the first service that cannot be started.
    pub async fn services(mut self) -> anyhow::Result<Addresses> {
        for entry in &self.plan.services {
            self.stage = entry.stage;
            (entry.start)(&mut self).await?;
        }
        let admin = start::admin(&mut self).await?;
        self.addresses.admin = self.addresses.admin.or(admin);
        Ok(self.addresses)
    }

    /// The stage of the service that is being started.
    pub fn stage(&mut self) -> &mut Stage {
        self.stages.of(self.stage)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use clap::Parser;
    use tokio::sync::watch;

    use super::super::house::House;
    use super::super::means::Means;
    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: ServeArgs,
    }

    /// What the toy is doing.
    static TOY: LazyLock<watch::Sender<&str>> = LazyLock::new(|| watch::Sender::new("absent"));

    /// A service that this release does not know.
    const TOYS: &[ServiceEntry] = &[ServiceEntry {
        name: Service("toy"),
        needs_store: false,
        has_schedules: false,
        stage: StageName::Engines,
        start: |starting| {
            Box::pin(async {
                starting.addresses.gateway = Some("http://toy".to_owned());
                let stage = starting.stage();
                let stop = stage.stop.clone();
                stage.spawn(async move {
                    TOY.send_replace("running");
                    stop.cancelled().await;
                    TOY.send_replace("stopped");
                });
                Ok(())
            })
        },
    }];

    #[tokio::test]
    async fn a_service_of_another_table_is_planned_started_reached_and_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let data = format!("--data={}", folder.path().display());
        let args = Command::parse_from(["serve", "--bus=local", "--services=toy", &data]).args;
        let plan = Plan::among(TOYS, &args).unwrap();
        assert!(plan.is_whole() && plan.runs(Service("toy")) && !plan.needs_store());
        let mut stages = Stages::default();
        let means = Means::of(&args).unwrap();
        let house = House::start(&args, plan, means, &mut stages).await.unwrap();
        assert_eq!(house.addresses().gateway.as_deref(), Some("http://toy"));
        let mut toy = TOY.subscribe();
        toy.wait_for(|state| *state == "running").await.unwrap();
        stages.end().await;
        assert_eq!(*TOY.borrow(), "stopped");
        house.close().await;
    }

    #[test]
    fn a_service_without_an_entry_is_refused_with_those_that_have_one() {
        let args = Command::parse_from(["serve", "--services=toy"]).args;
        let refused = Plan::of(&args).unwrap_err().to_string();
        assert!(
            refused.contains("`toy`") && refused.contains("autoscaler"),
            "{refused}"
        );
    }

    #[test]
    fn who_writes_a_kind_of_stream_is_a_service() {
        for kind in contract::log::StreamKind::ALL {
            let is_known = SERVICES.iter().any(|entry| entry.name.0 == kind.writer());
            assert!(
                is_known,
                "SERVICES lacks `{}`, which writes `{}`",
                kind.writer(),
                kind.as_str()
            );
        }
    }

    #[tokio::test]
    async fn stages_end_one_after_the_other() {
        let (ended, mut order) = tokio::sync::mpsc::unbounded_channel();
        let mut stages = Stages::default();
        let names = [
            StageName::Log,
            StageName::Hands,
            StageName::Doors,
            StageName::Engines,
        ];
        for name in names {
            let (stage, ended) = (stages.of(name), ended.clone());
            let stop = stage.stop.clone();
            stage.spawn(async move {
                stop.cancelled().await;
                let _ = ended.send(name);
            });
        }
        stages.end().await;
        let mut seen = Vec::new();
        while let Ok(name) = order.try_recv() {
            seen.push(name);
        }
        let expected = [
            StageName::Doors,
            StageName::Engines,
            StageName::Hands,
            StageName::Log,
        ];
        assert_eq!(seen, expected);
    }
}
