//! Which services this process runs, on which store and bus, and whether that can work.

use std::collections::BTreeSet;
use std::fmt;

use anyhow::bail;

use crate::cli::serve_args::ServeArgs;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Service {
    Control,
    Gateway,
    Autoscaler,
    Actuator,
    Meter,
}

impl Service {
    pub const ALL: [Self; 5] = [
        Self::Control,
        Self::Gateway,
        Self::Autoscaler,
        Self::Actuator,
        Self::Meter,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Gateway => "gateway",
            Self::Autoscaler => "autoscaler",
            Self::Actuator => "actuator",
            Self::Meter => "meter",
        }
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What one process is there for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub services: BTreeSet<Service>,
}

impl Plan {
    pub fn of(args: &ServeArgs) -> anyhow::Result<Self> {
        let plan = Self {
            services: services(&args.services)?,
        };
        if args.bus == "local" && !plan.is_whole() {
            bail!(
                "--services: with --bus local all services share one process; leave the flag out, or name a bus such as kafka://127.0.0.1:9092/penstock"
            );
        }
        let own_store = !args
            .store
            .as_deref()
            .is_some_and(|url| url.starts_with("postgres"));
        if plan.needs_store() && !plan.is_whole() && own_store {
            bail!(
                "--services: an embedded store belongs to one process, which then runs all services; name a shared one with --store postgres://…"
            );
        }
        Ok(plan)
    }

    pub fn runs(&self, service: Service) -> bool {
        self.services.contains(&service)
    }

    /// Everything in one process: its instances end with it.
    pub fn is_whole(&self) -> bool {
        self.services.len() == Service::ALL.len()
    }

    /// A gateway lives by routes and frames alone.
    pub fn needs_store(&self) -> bool {
        self.services
            .iter()
            .any(|service| *service != Service::Gateway)
    }
}

fn services(named: &[String]) -> anyhow::Result<BTreeSet<Service>> {
    let mut services = BTreeSet::new();
    for name in named {
        if name == "all" {
            services.extend(Service::ALL);
            continue;
        }
        let Some(service) = Service::ALL.into_iter().find(|known| known.name() == name) else {
            bail!(
                "--services: `{name}` is not a service of this version; use all, or {}",
                Service::ALL.map(Service::name).join(" ")
            );
        };
        services.insert(service);
    }
    if services.is_empty() {
        bail!("--services names none; use all, or some of them separated by commas");
    }
    Ok(services)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: ServeArgs,
    }

    fn plan(arguments: &[&str]) -> anyhow::Result<Plan> {
        let arguments = ["serve"].iter().chain(arguments);
        Plan::of(&Command::parse_from(arguments).args)
    }

    fn refused(arguments: &[&str]) -> String {
        plan(arguments).unwrap_err().to_string()
    }

    const KAFKA: &str = "--bus=kafka://127.0.0.1:9092/penstock";

    #[test]
    fn all_services_share_one_process_unless_some_are_named() {
        assert!(plan(&["--bus=local"]).unwrap().is_whole());
    }

    #[test]
    fn an_unknown_service_is_refused_by_name() {
        assert!(refused(&[KAFKA, "--services=gateway,sla2"]).contains("`sla2`"));
    }

    #[test]
    fn services_apart_need_a_bus_between_processes() {
        assert!(refused(&["--bus=local", "--services=gateway"]).contains("--bus local"));
    }

    #[test]
    fn services_apart_need_a_store_between_processes() {
        let text = refused(&[KAFKA, "--store=sqlite:x.db", "--services=autoscaler"]);
        assert!(text.contains("--store postgres"), "{text}");
    }

    #[test]
    fn a_gateway_alone_needs_no_store() {
        let plan = plan(&[KAFKA, "--services=gateway"]).unwrap();
        assert!(!plan.needs_store());
    }
}
