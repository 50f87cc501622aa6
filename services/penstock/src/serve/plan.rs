//! Which services this process runs, whether its store and bus allow that, and how they start.

use std::fmt;
use std::sync::Arc;

use anyhow::bail;
use control::{HistorySource, SEAL_FILE};
use futures::future::BoxFuture;

use super::args::ServeArgs;
use super::context::{Addresses, ServerContext};
use super::service::Service;
use super::task_groups::{TaskGroup, TaskGroupName, TaskGroups};

/// What the program needs to know about a service.
#[derive(Clone, Copy)]
pub struct ServiceEntry {
    pub name: Service,
    /// Whether it reads or writes the log. One that does not can run without access to a store.
    pub needs_store: bool,
    /// Whether it evaluates schedules, so that outdated time zone data is worth a warning.
    pub has_schedules: bool,
    /// The default group of its tasks.
    pub group: TaskGroupName,
    pub start: for<'a> fn(&'a mut Startup<'_>) -> BoxFuture<'a, anyhow::Result<()>>,
}

impl fmt::Debug for ServiceEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ServiceEntry").field(&self.name).finish()
    }
}

/// The services of one process.
#[derive(Clone, Debug)]
pub struct Plan {
    /// In start order.
    pub services: Vec<ServiceEntry>,
    is_all_in_one: bool,
}

impl Plan {
    /// Picks the services that are named from a table.
    pub fn of(entries: &[ServiceEntry], args: &ServeArgs) -> anyhow::Result<Self> {
        let services = services(entries, &args.services)?;
        let plan = Self {
            is_all_in_one: services.len() == entries.len(),
            services,
        };
        if args.bus == "local" && !plan.is_all_in_one() {
            bail!(
                "--services: with --bus local all services share one process; omit the flag, or use a shared bus such as kafka://127.0.0.1:9092/penstock"
            );
        }
        let own_store = !args
            .store
            .as_deref()
            .is_some_and(|url| url.starts_with("postgres"));
        if plan.needs_store() && !plan.is_all_in_one() && own_store {
            bail!(
                "--services: an embedded store belongs to one process, which must run all services; use a shared store with --store postgres://…"
            );
        }
        Ok(plan)
    }

    pub fn runs(&self, service: Service) -> bool {
        self.services.iter().any(|entry| entry.name == service)
    }

    /// Whether all services run in this process; its instances then stop with it.
    pub fn is_all_in_one(&self) -> bool {
        self.is_all_in_one
    }

    /// Whether this process needs an admin listener. Control serves health and metrics itself, but other
    /// processes read instance logs at the admin listener.
    pub fn has_admin_listener(&self) -> bool {
        !self.is_all_in_one() && (!self.runs(Service::CONTROL) || self.runs(Service::ACTUATOR))
    }

    /// Warnings about features that do not work without a shared secret. Nothing fails at startup because of
    /// it, so the cause would be hard to find.
    pub fn warnings(&self, args: &ServeArgs) -> Vec<String> {
        if self.is_all_in_one() {
            return Vec::new();
        }
        let token_warning = args
            .internal_token
            .is_none()
            .then(|| self.missing_token_warning(args));
        let without_key = args.seal_key.is_none() && self.runs(Service::CONTROL);
        let own_key = args.data.join(SEAL_FILE);
        let unsealed = without_key.then(|| {
            format!(
                "there is no --seal-key (PENSTOCK_SEAL_KEY), so this control seals endpoint keys with {own}: other controls, or this one with another data folder, cannot show them (`penstock keys`, `penstock invoke`); give every process with control the same key, such as file:{own}",
                own = own_key.display()
            )
        });
        token_warning
            .flatten()
            .into_iter()
            .chain(unsealed)
            .collect()
    }

    fn missing_token_warning(&self, args: &ServeArgs) -> Option<String> {
        let mut unavailable = Vec::new();
        if self.runs(Service::CONTROL) {
            unavailable
                .push("`penstock logs` shows no logs of instances on other nodes".to_owned());
        }
        if self.runs(Service::ACTUATOR) {
            unavailable.push(
                "other processes cannot read the logs of local instances (`penstock logs`)"
                    .to_owned(),
            );
        }
        // Control shows its metrics to viewers too.
        if !self.runs(Service::CONTROL) && !args.admin_addr.ip().is_loopback() {
            unavailable.push(format!(
                "metrics at {} are refused to other machines",
                args.admin_addr
            ));
        }
        (!unavailable.is_empty()).then(|| {
            format!(
                "there is no --internal-token (PENSTOCK_INTERNAL_TOKEN), so {}; generate one with `openssl rand -hex 32`, and give all processes the same",
                unavailable.join(", and ")
            )
        })
    }

    pub fn needs_store(&self) -> bool {
        self.services.iter().any(|entry| entry.needs_store)
    }

    pub fn has_schedules(&self) -> bool {
        self.services.iter().any(|entry| entry.has_schedules)
    }
}

/// The entries with these names, in table order.
fn services(entries: &[ServiceEntry], named: &[String]) -> anyhow::Result<Vec<ServiceEntry>> {
    let known: Vec<&str> = entries.iter().map(|entry| entry.name.0).collect();
    let is_known = |name: &&String| *name == "all" || known.contains(&name.as_str());
    if let Some(name) = named.iter().find(|name| !is_known(name)) {
        bail!(
            "--services: `{name}` is not a service of this version; use all, or {}",
            known.join(" ")
        );
    }
    let is_named = |entry: &&ServiceEntry| named.iter().any(|n| n == "all" || n == entry.name.0);
    let services: Vec<ServiceEntry> = entries.iter().filter(is_named).copied().collect();
    if services.is_empty() {
        bail!("--services names no service; use all, or a comma-separated list");
    }
    Ok(services)
}

/// A process that is starting: the arguments of a service's start, and what earlier services have opened.
pub struct Startup<'a> {
    pub args: &'a ServeArgs,
    pub plan: &'a Plan,
    pub ctx: &'a ServerContext,
    pub groups: &'a mut TaskGroups,
    pub addresses: Addresses,
    /// Set by the meter, if it runs in this process.
    pub history: Option<Arc<dyn HistorySource>>,
    /// The same, for the windows of rules.
    pub past: Option<meter::HistoryStore>,
    /// The URL of the admin listener, once it is open.
    pub admin: Option<String>,
    /// The task group of the service that is being started.
    group: TaskGroupName,
}

impl<'a> Startup<'a> {
    pub fn new(
        args: &'a ServeArgs,
        plan: &'a Plan,
        ctx: &'a ServerContext,
        groups: &'a mut TaskGroups,
    ) -> Self {
        Self {
            args,
            plan,
            ctx,
            groups,
            addresses: Addresses::default(),
            history: None,
            past: None,
            admin: None,
            group: TaskGroupName::Log,
        }
    }

    /// Starts the services of the plan.
    ///
    /// # Errors
    /// If a service cannot be started.
    pub async fn start_services(&mut self) -> anyhow::Result<()> {
        for entry in &self.plan.services {
            self.group = entry.group;
            (entry.start)(self).await?;
        }
        Ok(())
    }

    /// The task group of the service that is being started.
    pub fn group(&mut self) -> &mut TaskGroup {
        self.groups.of(self.group)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::services::SERVICES;
    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: ServeArgs,
    }

    fn plan(arguments: &[&str]) -> anyhow::Result<Plan> {
        let arguments = ["serve"].iter().chain(arguments);
        Plan::of(SERVICES, &Command::parse_from(arguments).args)
    }

    fn refusal(arguments: &[&str]) -> String {
        plan(arguments).unwrap_err().to_string()
    }

    const KAFKA: &str = "--bus=kafka://127.0.0.1:9092/penstock";

    #[test]
    fn all_services_share_one_process_unless_some_are_named() {
        assert!(plan(&["--bus=local"]).unwrap().is_all_in_one());
    }

    #[test]
    fn an_unknown_service_is_refused_by_name() {
        assert!(refusal(&[KAFKA, "--services=gateway,sla2"]).contains("`sla2`"));
    }

    #[test]
    fn separate_processes_need_a_shared_bus() {
        assert!(refusal(&["--bus=local", "--services=gateway"]).contains("--bus local"));
    }

    #[test]
    fn separate_processes_need_a_shared_store() {
        let text = refusal(&[KAFKA, "--store=sqlite:x.db", "--services=autoscaler"]);
        assert!(text.contains("--store postgres"), "{text}");
    }

    fn warnings(arguments: &[&str]) -> Vec<String> {
        let arguments = ["serve", KAFKA, "--store=postgres://db/penstock"]
            .iter()
            .chain(arguments);
        let args = Command::parse_from(arguments).args;
        Plan::of(SERVICES, &args).unwrap().warnings(&args)
    }

    #[test]
    fn control_warns_of_what_does_not_work_without_shared_secrets() {
        let warnings_given = warnings(&["--services=control", "--data=/d"]);
        let [token, key] = warnings_given.as_slice() else {
            panic!("{warnings_given:?}");
        };
        for word in ["--internal-token", "penstock logs"] {
            assert!(token.contains(word), "{token}");
        }
        for word in ["--seal-key", "penstock keys", "file:/d/seal.key"] {
            assert!(key.contains(word), "{key}");
        }
        let token = "--internal-token=env:T";
        assert_eq!(warnings(&["--services=control", token]).len(), 1);
        let key = "--seal-key=env:K";
        assert_eq!(warnings(&["--services=control", key]).len(), 1);
        assert!(warnings(&["--services=control", token, key]).is_empty());
    }

    #[test]
    fn services_that_need_no_secret_give_no_warning() {
        assert!(warnings(&["--services=all"]).is_empty());
        assert!(warnings(&["--services=gateway"]).is_empty());
        assert!(warnings(&["--services=autoscaler,meter"]).is_empty());
        // No endpoint keys are sealed there.
        assert_eq!(warnings(&["--services=actuator"]).len(), 1);
    }

    #[test]
    fn metrics_on_a_public_address_need_the_token() {
        let warnings_given = warnings(&["--services=gateway", "--admin-addr=0.0.0.0:7071"]);
        assert!(
            warnings_given[0].contains("metrics at 0.0.0.0:7071"),
            "{warnings_given:?}"
        );
    }

    #[test]
    fn a_gateway_alone_needs_no_store() {
        let plan = plan(&[KAFKA, "--services=gateway"]).unwrap();
        assert!(!plan.needs_store());
    }
}
