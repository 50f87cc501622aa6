//! The table of services that a process can run.
//!
//! Invariant: an entry holds everything the rest of the program needs to know about a service: its name,
//! its requirements, when it starts and stops, and how. Services start in the order of [`SERVICES`] and stop
//! in the order of their task groups.

use super::plan::ServiceEntry;
use super::service::Service;
use super::start;
use super::task_groups::TaskGroupName;

/// All services of this release, in start order: control needs what the gateway and the meter have opened.
pub static SERVICES: &[ServiceEntry] = &[
    ServiceEntry {
        name: Service::GATEWAY,
        // It needs only routes and frames.
        needs_store: false,
        has_schedules: false,
        group: TaskGroupName::Listeners,
        start: |startup| Box::pin(start::gateway(startup)),
    },
    ServiceEntry {
        name: Service::METER,
        needs_store: true,
        has_schedules: false,
        group: TaskGroupName::Log,
        start: |startup| Box::pin(start::meter(startup)),
    },
    ServiceEntry {
        name: Service::CONTROL,
        needs_store: true,
        has_schedules: true,
        group: TaskGroupName::Listeners,
        start: |startup| Box::pin(start::control(startup)),
    },
    ServiceEntry {
        name: Service::AUTOSCALER,
        needs_store: true,
        has_schedules: true,
        group: TaskGroupName::Controllers,
        start: |startup| Box::pin(async { start::autoscaler(startup) }),
    },
    ServiceEntry {
        name: Service::ACTUATOR,
        needs_store: true,
        has_schedules: false,
        group: TaskGroupName::NodeAgent,
        start: |startup| Box::pin(start::actuator(startup)),
    },
];

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use clap::Parser;
    use tokio::sync::watch;

    use super::super::args::ServeArgs;
    use super::super::descriptor_budget::DescriptorBudget;
    use super::super::plan::Plan;
    use super::super::server::ServerProcess;
    use super::super::task_groups::TaskGroups;
    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: ServeArgs,
    }

    /// The state of the test service.
    static TOY: LazyLock<watch::Sender<&str>> = LazyLock::new(|| watch::Sender::new("absent"));

    /// A table with a service that this release does not have.
    const TOYS: &[ServiceEntry] = &[ServiceEntry {
        name: Service("toy"),
        needs_store: false,
        has_schedules: false,
        group: TaskGroupName::Controllers,
        start: |startup| {
            Box::pin(async {
                startup.addresses.gateway = Some("http://toy".to_owned());
                let group = startup.group();
                let stop = group.stop.clone();
                group.spawn(async move {
                    TOY.send_replace("running");
                    stop.cancelled().await;
                    TOY.send_replace("stopped");
                });
                Ok(())
            })
        },
    }];

    #[tokio::test]
    async fn a_service_of_another_table_is_planned_started_and_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let data = format!("--data={}", folder.path().display());
        let args = Command::parse_from(["serve", "--bus=local", "--services=toy", &data]).args;
        let plan = Plan::of(TOYS, &args).unwrap();
        assert!(plan.is_all_in_one() && plan.runs(Service("toy")) && !plan.needs_store());
        let mut groups = TaskGroups::default();
        let budget = DescriptorBudget::of(&args).unwrap();
        let server = ServerProcess::start(&args, plan, budget, &mut groups)
            .await
            .unwrap();
        assert_eq!(server.addresses().gateway.as_deref(), Some("http://toy"));
        let mut toy = TOY.subscribe();
        toy.wait_for(|state| *state == "running").await.unwrap();
        groups.shutdown().await;
        assert_eq!(*TOY.borrow(), "stopped");
        server.close().await;
    }

    #[test]
    fn a_service_without_an_entry_is_refused_with_those_that_have_one() {
        let args = Command::parse_from(["serve", "--services=toy"]).args;
        let error = Plan::of(SERVICES, &args).unwrap_err().to_string();
        assert!(
            error.contains("`toy`") && error.contains("autoscaler"),
            "{error}"
        );
    }

    #[test]
    fn every_named_service_has_an_entry() {
        let entries: Vec<Service> = SERVICES.iter().map(|entry| entry.name).collect();
        assert_eq!(entries, Service::ALL);
    }

    #[test]
    fn every_stream_writer_is_a_service() {
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
    async fn task_groups_shut_down_one_after_the_other() {
        let (stopped, mut stop_order) = tokio::sync::mpsc::unbounded_channel();
        let mut groups = TaskGroups::default();
        let names = [
            TaskGroupName::Log,
            TaskGroupName::NodeAgent,
            TaskGroupName::Listeners,
            TaskGroupName::Controllers,
        ];
        for name in names {
            let (group, stopped) = (groups.of(name), stopped.clone());
            let stop = group.stop.clone();
            group.spawn(async move {
                stop.cancelled().await;
                let _ = stopped.send(name);
            });
        }
        groups.shutdown().await;
        let mut stopped_groups = Vec::new();
        while let Ok(name) = stop_order.try_recv() {
            stopped_groups.push(name);
        }
        let expected = [
            TaskGroupName::Listeners,
            TaskGroupName::Controllers,
            TaskGroupName::NodeAgent,
            TaskGroupName::Log,
        ];
        assert_eq!(stopped_groups, expected);
    }
}
