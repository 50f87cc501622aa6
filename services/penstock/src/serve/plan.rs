//! Which services this process runs, on which store and bus, and whether that can work.

use anyhow::bail;
use control::SEAL_FILE;

use super::args::ServeArgs;
use super::services::{SERVICES, Service, ServiceEntry};

/// What one process is there for.
#[derive(Clone, Debug)]
pub struct Plan {
    /// In the order in which they are started.
    pub services: Vec<ServiceEntry>,
    is_whole: bool,
}

impl Plan {
    pub fn of(args: &ServeArgs) -> anyhow::Result<Self> {
        Self::among(SERVICES, args)
    }

    /// [`of`](Self::of) with other services than those of this release.
    pub fn among(entries: &[ServiceEntry], args: &ServeArgs) -> anyhow::Result<Self> {
        let services = services(entries, &args.services)?;
        let plan = Self {
            is_whole: services.len() == entries.len(),
            services,
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
        self.services.iter().any(|entry| entry.name == service)
    }

    /// Everything in one process: its instances end with it.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// Where control runs, it shows health and metrics itself; but output of instances is read by one process
    /// from another at an admin listener.
    pub fn has_admin_listener(&self) -> bool {
        !self.is_whole() && (!self.runs(Service::CONTROL) || self.runs(Service::ACTUATOR))
    }

    /// What will not work for want of a secret that processes share. Nothing fails by it, so nobody would
    /// look for the reason.
    pub fn cautions(&self, args: &ServeArgs) -> Vec<String> {
        if self.is_whole() {
            return Vec::new();
        }
        let without_token = args.internal_token.is_none().then(|| self.tokenless(args));
        let without_key = args.seal_key.is_none() && self.runs(Service::CONTROL);
        let own_key = args.data.join(SEAL_FILE);
        let unsealed = without_key.then(|| {
            format!(
                "there is no --seal-key (PENSTOCK_SEAL_KEY), so this control seals the keys of endpoints with {own}: another control, or this one with another data folder, cannot show them (`penstock keys`, `penstock invoke`); give every process with control the same one, such as file:{own}",
                own = own_key.display()
            )
        });
        without_token
            .flatten()
            .into_iter()
            .chain(unsealed)
            .collect()
    }

    fn tokenless(&self, args: &ServeArgs) -> Option<String> {
        let mut lost = Vec::new();
        if self.runs(Service::CONTROL) {
            lost.push("`penstock logs` shows no output of instances on other nodes".to_owned());
        }
        if self.runs(Service::ACTUATOR) {
            lost.push(
                "other processes cannot read the output of the instances here (`penstock logs`)"
                    .to_owned(),
            );
        }
        // Control's metrics are shown to its viewers too.
        if !self.runs(Service::CONTROL) && !args.admin_addr.ip().is_loopback() {
            lost.push(format!(
                "metrics at {} are refused to other machines",
                args.admin_addr
            ));
        }
        (!lost.is_empty()).then(|| {
            format!(
                "there is no --internal-token (PENSTOCK_INTERNAL_TOKEN), so {}; make one with `openssl rand -hex 32`, and give all processes the same",
                lost.join(", and ")
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

/// The entries of these names, in the order of the table.
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

    fn cautions(arguments: &[&str]) -> Vec<String> {
        let arguments = ["serve", KAFKA, "--store=postgres://db/penstock"]
            .iter()
            .chain(arguments);
        let args = Command::parse_from(arguments).args;
        Plan::of(&args).unwrap().cautions(&args)
    }

    #[test]
    fn control_without_the_shared_secrets_says_what_will_not_work() {
        let said = cautions(&["--services=control", "--data=/d"]);
        let [token, key] = said.as_slice() else {
            panic!("{said:?}");
        };
        for word in ["--internal-token", "penstock logs"] {
            assert!(token.contains(word), "{token}");
        }
        for word in ["--seal-key", "penstock keys", "file:/d/seal.key"] {
            assert!(key.contains(word), "{key}");
        }
        let token = "--internal-token=env:T";
        assert_eq!(cautions(&["--services=control", token]).len(), 1);
        let key = "--seal-key=env:K";
        assert_eq!(cautions(&["--services=control", key]).len(), 1);
        assert!(cautions(&["--services=control", token, key]).is_empty());
    }

    #[test]
    fn who_needs_no_secret_is_not_asked_for_one() {
        assert!(cautions(&["--services=all"]).is_empty());
        assert!(cautions(&["--services=gateway"]).is_empty());
        assert!(cautions(&["--services=autoscaler,meter"]).is_empty());
        // No endpoint's key is sealed there.
        assert_eq!(cautions(&["--services=actuator"]).len(), 1);
    }

    #[test]
    fn metrics_that_other_machines_could_ask_for_need_the_token() {
        let said = cautions(&["--services=gateway", "--admin-addr=0.0.0.0:7071"]);
        assert!(said[0].contains("metrics at 0.0.0.0:7071"), "{said:?}");
    }

    #[test]
    fn a_gateway_alone_needs_no_store() {
        let plan = plan(&[KAFKA, "--services=gateway"]).unwrap();
        assert!(!plan.needs_store());
    }
}
