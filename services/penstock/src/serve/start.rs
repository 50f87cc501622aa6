//! How each service is started and kept running. Listeners are bound before the first request can
//! arrive, and rebound on the same address after a failure.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use actuator::logs::{NodeLogs, router};
use actuator::node::{NodeConfig, NodeDeps};
use actuator::planner::OwnNode;
use anyhow::Context;
use autoscaler::PastSource;
use axum::Router;
use backends::process::node_id;
use bus::Bus;
use contract::resources::TERMINATION_GRACE_DEFAULT;
use control::{Control, ControlConfig, ControlDeps, HistorySource, Limits, NoHistory};
use gateway::Gateway;
use meter::{HistoryLocation, HistoryStore, Meter};
use prometheus_client::metrics::counter::Counter;
use runtime::health::Component;
use runtime::reconcile::Deps;
use runtime::relay::{RELAY, RelayDeps};
use store::ARCHIVE_LEASE;

use super::admin::Admin;
use super::archiver::Archiver;
use super::args::ServeArgs;
use super::backends::{BACKENDS, BackendSetup};
use super::context::ServerContext;
use super::folder_logs::FolderLogs;
use super::history::{MeterHistory, MeterPast};
use super::log_end::LogEnd;
use super::member_logs::MemberLogs;
use super::plan::{Plan, Startup};
use super::service::Service;
use super::supervisor::supervise;
use super::task_groups::{TaskGroup, TaskGroupName};

/// How often the health of the bus is polled.
const BUS_POLL_INTERVAL: Duration = Duration::from_secs(1);
/// The id of the only gateway in an all-in-one process.
const GATEWAY_ID: &str = "gateway";

fn deps(ctx: &ServerContext) -> anyhow::Result<Deps> {
    Ok(Deps {
        store: ctx.store()?,
        bus: ctx.bus.clone(),
        clock: ctx.clock.clone(),
        ids: ctx.ids.clone(),
    })
}

/// Starts the relay, which publishes the log on the bus. On a shared bus every process with the store is
/// a candidate, and one at a time relays.
pub fn relay(ctx: &ServerContext, is_shared: bool, group: &mut TaskGroup) {
    let Some(store) = ctx.store.clone() else {
        return;
    };
    let (bus, stop) = (ctx.bus.clone(), group.stop.clone());
    if !is_shared {
        group.spawn(runtime::relay::run(store, bus, stop));
        return;
    }
    let deps = RelayDeps {
        store,
        bus,
        holder: ctx.ids.uid().to_string(),
        component: ctx.health.component(RELAY),
        metrics: ctx.metrics.clone(),
    };
    let run = move || {
        let (deps, stop) = (deps.clone(), stop.clone());
        async move {
            runtime::relay::run_durable(deps, stop).await;
            Ok::<(), std::convert::Infallible>(())
        }
    };
    group.spawn(supervise(RELAY, group.stop.clone(), run));
}

/// Compares the log with its saved heads, and keeps saving them.
pub async fn log_end(ctx: &ServerContext, group: &mut TaskGroup) -> anyhow::Result<()> {
    let Some(store) = &ctx.store else {
        return Ok(());
    };
    if let Some(log_end) = LogEnd::check(store, ctx.health.component("store")).await? {
        group.spawn(log_end.run(group.stop.clone()));
    }
    Ok(())
}

/// Starts the archiver if it is configured; one process at a time archives.
pub fn archiver(args: &ServeArgs, ctx: &ServerContext, group: &mut TaskGroup) {
    let (Some(store), Some(age)) = (ctx.store.clone(), args.archive_after) else {
        return;
    };
    let archiver = Archiver {
        store,
        clock: ctx.clock.clone(),
        ids: ctx.ids.clone(),
        age,
        events_min: args.archive_min_events,
        component: ctx.health.component(ARCHIVE_LEASE),
    };
    group.spawn(archiver.run(group.stop.clone()));
}

/// Reports an unreachable bus in readiness. A gateway that has had routes, in this run or an earlier one,
/// keeps serving without the bus: for a process with only gateways the problem is then a warning, since a
/// load balancer would otherwise take all of them out at once.
pub fn watch_bus(plan: &Plan, ctx: &ServerContext, group: &mut TaskGroup) {
    let (bus, stop) = (ctx.bus.clone(), group.stop.clone());
    let component = ctx.health.component("bus");
    let dropped = Counter::<u64>::default();
    ctx.metrics.register(|registry| {
        registry.register(
            "penstock_bus_dropped",
            "Messages that did not reach the bus, or a subscriber of this process that was slow",
            dropped.clone(),
        );
    });
    let mut bus_health = BusHealth {
        is_needed: plan.needs_store(),
        has_answered: gateway::has_saved_routes(&ctx.data),
    };
    bus_health.poll(bus.as_ref(), &component);
    component.ready();
    group.spawn(async move {
        let mut ticks = tokio::time::interval(BUS_POLL_INTERVAL);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            bus_health.poll(bus.as_ref(), &component);
            dropped.inc_by(bus.dropped().saturating_sub(dropped.get()));
        }
    });
}

struct BusHealth {
    is_needed: bool,
    has_answered: bool,
}

impl BusHealth {
    fn poll(&mut self, bus: &dyn Bus, component: &Component) {
        self.update(bus.problem(), bus.warning(), component);
    }

    fn update(
        &mut self,
        bus_problem: Option<String>,
        warning: Option<String>,
        component: &Component,
    ) {
        self.has_answered |= bus_problem.is_none();
        let (problem, warning) = match self.is_needed || !self.has_answered {
            true => (bus_problem, warning),
            false => (None, bus_problem.or(warning)),
        };
        component.set_problem(problem);
        component.set_warning(warning);
    }
}

pub async fn gateway(startup: &mut Startup<'_>) -> anyhow::Result<()> {
    let (args, plan, ctx) = (startup.args, startup.plan, startup.ctx);
    let group = startup.group();
    let id = match plan.is_all_in_one() {
        true => GATEWAY_ID.to_owned(),
        false => gateway_id(&ctx.data)?,
    };
    let config = gateway::Config {
        data: Some(ctx.data.clone()),
        domain: args.gateway_domain.clone(),
        trusted_proxies: args.trusted_proxies.0.clone(),
        upload_buffer_bytes: args.upload_buffer,
        threads: ctx.budget.shares.threads,
        descriptors: ctx.budget.descriptors.clone(),
        ..gateway::Config::new(id, args.gateway_addr)
    };
    let deps = gateway::Deps {
        bus: ctx.bus.clone(),
        clock: ctx.clock.clone(),
        metrics: ctx.metrics.clone(),
        health: ctx.health.clone(),
    };
    let gateway = Gateway::bind(config.clone(), deps.clone())?;
    let url = format!("http://{}", gateway.address);
    let rebind_config = gateway::Config {
        address: gateway.address,
        ..config
    };
    let (stop, mut bound) = (group.stop.clone(), Some(gateway));
    let run = move || {
        let (bound, config, deps, stop) = (
            bound.take(),
            rebind_config.clone(),
            deps.clone(),
            stop.clone(),
        );
        async move {
            let gateway = bound.map_or_else(|| Gateway::bind(config, deps), Ok)?;
            gateway.serve(stop).await
        }
    };
    group.spawn(supervise("gateway", group.stop.clone(), run));
    startup.addresses.gateway = Some(url);
    Ok(())
}

/// Stable across restarts, like the node's id, since slots are assigned by it.
fn gateway_id(data: &Path) -> anyhow::Result<String> {
    let node = node_id(data).context("cannot read or create the id of this data folder")?;
    Ok(node.replacen("node-", "gateway-", 1))
}

/// Starts the meter, and provides its history to control.
pub async fn meter(startup: &mut Startup<'_>) -> anyhow::Result<()> {
    let ctx = startup.ctx;
    let location = history_location(startup.args, ctx);
    let deps = meter::Deps {
        store: ctx.store()?,
        bus: ctx.bus.clone(),
        clock: ctx.clock.clone(),
        ids: ctx.ids.clone(),
        metrics: ctx.metrics.clone(),
        health: ctx.health.clone(),
    };
    let config = meter::Config::with_history(location);
    let meter = Meter::open(config.clone(), deps.clone()).await?;
    let history = Arc::new(MeterHistory::new(meter.history()));
    startup.past = Some(meter.history());
    let group = startup.group();
    let (stop, mut opened) = (group.stop.clone(), Some(meter));
    let run = move || {
        let (opened, config, deps, stop) =
            (opened.take(), config.clone(), deps.clone(), stop.clone());
        async move {
            let meter = match opened {
                Some(meter) => meter,
                None => Meter::open(config, deps).await?,
            };
            Box::pin(meter.run(stop)).await
        }
    };
    group.spawn(supervise("meter", group.stop.clone(), run));
    startup.history = Some(history);
    Ok(())
}

fn history_location(args: &ServeArgs, ctx: &ServerContext) -> HistoryLocation {
    HistoryLocation::for_store(args.store.as_deref().unwrap_or_default(), &ctx.data)
}

/// The history that meters in other processes keep; it can be read only if it is stored next to the log in
/// a shared database.
async fn shared_history(location: &HistoryLocation) -> anyhow::Result<Arc<dyn HistorySource>> {
    if matches!(location, HistoryLocation::File(_)) {
        return Ok(Arc::new(NoHistory));
    }
    let history = HistoryStore::open_read_only(location).await?;
    Ok(Arc::new(MeterHistory::new(history)))
}

pub async fn control(startup: &mut Startup<'_>) -> anyhow::Result<()> {
    let (args, plan, ctx) = (startup.args, startup.plan, startup.ctx);
    let history = match startup.history.clone() {
        Some(history) => history,
        None => shared_history(&history_location(args, ctx)).await?,
    };
    let config = ControlConfig {
        listen: args.control_addr,
        data: ctx.data.clone(),
        seal_key: args.seal_key.clone(),
        replica: replica(plan, &ctx.data)?,
        only_node: only_node(args, plan, ctx)?,
        gateway: (args.gateway_url.clone()).or(startup.addresses.gateway.clone()),
        limits: ctx.budget.limits(Limits::default()),
        own_secrets: ctx.own.clone(),
        descriptors: ctx.budget.descriptors.clone(),
    };
    let deps = ControlDeps {
        store: ctx.store()?,
        bus: ctx.bus.clone(),
        clock: ctx.clock.clone(),
        ids: ctx.ids.clone(),
        metrics: ctx.metrics.clone(),
        health: ctx.health.clone(),
        internal_token: ctx.internal_token.clone(),
        zones: ctx.zones.clone(),
        logs: Arc::new(MemberLogs::new(
            own_logs(plan, ctx)?,
            ctx.store()?,
            ctx.internal_token.clone(),
        )),
        history,
    };
    let control = Control::bind(config.clone(), deps.clone()).await?;
    let url = format!("http://{}", control.addr);
    let rebind_config = ControlConfig {
        listen: control.addr,
        ..config
    };
    let group = startup.group();
    let (stop, mut bound) = (group.stop.clone(), Some(control));
    let run = move || {
        let (bound, config, deps, stop) = (
            bound.take(),
            rebind_config.clone(),
            deps.clone(),
            stop.clone(),
        );
        async move {
            let control = match bound {
                Some(control) => control,
                None => Control::bind(config, deps).await?,
            };
            Box::pin(control.serve(stop)).await
        }
    };
    group.spawn(supervise("control", group.stop.clone(), run));
    startup.addresses.admin = Some(url.clone());
    startup.addresses.control = Some(url);
    Ok(())
}

/// The logs of the node in this process, if it is one.
fn own_logs(
    plan: &Plan,
    ctx: &ServerContext,
) -> anyhow::Result<Option<(String, Arc<dyn NodeLogs>)>> {
    if !plan.runs(Service::ACTUATOR) {
        return Ok(None);
    }
    let node = node_id(&ctx.data).context("cannot read or create the node's id")?;
    let logs = FolderLogs::new(&ctx.data, ctx.log_readers.clone());
    Ok(Some((node, Arc::new(logs))))
}

/// The node in this process, if there can be no other.
fn only_node(args: &ServeArgs, plan: &Plan, ctx: &ServerContext) -> anyhow::Result<Option<String>> {
    if !is_only_node(args, plan) {
        return Ok(None);
    }
    let node = node_id(&ctx.data).context("cannot read or create the node's id")?;
    Ok(Some(node))
}

/// Whether no other process can be a node: it could neither open the embedded store nor reach the bus.
fn is_only_node(args: &ServeArgs, plan: &Plan) -> bool {
    let has_own_store = args
        .store
        .as_deref()
        .is_none_or(|url| url.starts_with("sqlite:"));
    plan.runs(Service::ACTUATOR) && args.bus == "local" && has_own_store
}

/// The id that distinguishes this control from others on the same store; `None` in an all-in-one process.
fn replica(plan: &Plan, data: &Path) -> anyhow::Result<Option<String>> {
    if plan.is_all_in_one() {
        return Ok(None);
    }
    let node = node_id(data).context("cannot read or create the id of this data folder")?;
    Ok(Some(node.replacen("node-", "", 1)))
}

/// Opens the admin listener on the first call: health and metrics of a process without control, and
/// instance logs for other processes. Returns its URL, or `None` if the process needs none.
pub async fn admin(startup: &mut Startup<'_>) -> anyhow::Result<Option<String>> {
    let (args, plan, ctx) = (startup.args, startup.plan, startup.ctx);
    if !plan.has_admin_listener() || startup.admin.is_some() {
        return Ok(startup.admin.clone());
    }
    let group = startup.groups.of(TaskGroupName::Log);
    let logs = match own_logs(plan, ctx)? {
        Some((_, logs)) => router(logs, ctx.internal_token.clone(), group.stop.clone()),
        None => Router::new(),
    };
    let admin = Admin::bind(
        args.admin_addr,
        ctx.health.clone(),
        ctx.metrics.clone(),
        ctx.internal_token.clone(),
        logs,
    )
    .await?
    .with_budget(&ctx.budget);
    let url = format!("http://{}", admin.address);
    let stop = group.stop.clone();
    group.spawn(admin.serve(stop));
    startup.admin = Some(url.clone());
    Ok(Some(url))
}

/// The history from which windows are refilled, if this process can read it: its own meter's, or the one
/// next to the log in a shared database.
fn past(startup: &Startup<'_>) -> Option<Arc<dyn PastSource>> {
    let location = history_location(startup.args, startup.ctx);
    let own = startup.past.clone();
    let is_readable = own.is_some() || !matches!(location, HistoryLocation::File(_));
    is_readable.then(|| Arc::new(MeterPast::new(location, own)) as Arc<dyn PastSource>)
}

pub fn autoscaler(startup: &mut Startup<'_>) -> anyhow::Result<()> {
    let ctx = startup.ctx;
    let past = past(startup);
    let group = startup.group();
    let (deps, stop) = (deps(ctx)?, group.stop.clone());
    let (metrics, health) = (ctx.metrics.clone(), ctx.health.clone());
    let zones = ctx.zones.clone();
    let run = move || {
        let (deps, zones, stop) = (deps.clone(), zones.clone(), stop.clone());
        let (past, metrics, health) = (past.clone(), metrics.clone(), health.clone());
        async move { autoscaler::run(deps, zones, past, &metrics, &health, stop).await }
    };
    group.spawn(supervise("autoscaler", group.stop.clone(), run));
    Ok(())
}

/// Starts the planner, and the node agent with its backends.
pub async fn actuator(startup: &mut Startup<'_>) -> anyhow::Result<()> {
    let (args, plan, ctx) = (startup.args, startup.plan, startup.ctx);
    let admin = admin(startup).await?;
    let node = node_id(&ctx.data).context("cannot read or create the node's id")?;
    // In an all-in-one process the planner need not wait for the node to join as a member.
    let own = plan.is_all_in_one().then(|| OwnNode {
        id: node.clone(),
        is_only: is_only_node(args, plan),
    });
    planner(own, ctx, startup.groups.of(TaskGroupName::Controllers))?;
    let mut setup = BackendSetup {
        args,
        ctx,
        node: &node,
        group: startup.groups.of(TaskGroupName::Log),
    };
    let backends = setup.open(BACKENDS).await?;
    let config = NodeConfig {
        node,
        is_only: is_only_node(args, plan),
        address: args.admin_url.clone().or(admin),
        // A separate actuator may be replaced while its instances keep serving.
        keep_instances: args.keep_instances || !plan.is_all_in_one(),
        grace: TERMINATION_GRACE_DEFAULT,
    };
    let (deps, component) = (deps(ctx)?, ctx.health.component("node"));
    let group = startup.group();
    let stop = group.stop.clone();
    let run = move || {
        let node_deps = NodeDeps {
            store: deps.store.clone(),
            bus: deps.bus.clone(),
            clock: deps.clock.clone(),
            ids: deps.ids.clone(),
            backends: backends.clone(),
            component: component.clone(),
        };
        actuator::node::run(config.clone(), node_deps, stop.clone())
    };
    group.spawn(supervise("node", group.stop.clone(), run));
    Ok(())
}

fn planner(
    node: Option<OwnNode>,
    ctx: &ServerContext,
    group: &mut TaskGroup,
) -> anyhow::Result<()> {
    let (deps, health, stop) = (deps(ctx)?, ctx.health.clone(), group.stop.clone());
    let run = move || {
        let (node, deps, health, stop) = (node.clone(), deps.clone(), health.clone(), stop.clone());
        async move { actuator::planner::run(node, deps, &health, stop).await }
    };
    group.spawn(supervise("actuator", group.stop.clone(), run));
    Ok(())
}

#[cfg(test)]
mod tests {
    use runtime::health::HealthRegistry;

    use super::*;

    fn fixture(is_needed: bool, has_answered: bool) -> (HealthRegistry, Component, BusHealth) {
        let health = HealthRegistry::default();
        let component = health.component("bus");
        component.ready();
        let bus_health = BusHealth {
            is_needed,
            has_answered,
        };
        (health, component, bus_health)
    }

    #[test]
    fn a_gateway_that_has_had_routes_stays_ready_while_the_bus_is_down() {
        let (health, component, mut bus_health) = fixture(false, false);
        bus_health.update(Some("no broker answers".to_owned()), None, &component);
        assert_eq!(health.missing(), ["bus: no broker answers"]);
        bus_health.update(None, None, &component);
        assert!(health.missing().is_empty());
        bus_health.update(Some("no broker answers".to_owned()), None, &component);
        assert!(health.missing().is_empty());
        assert_eq!(health.warnings(), ["bus: no broker answers"]);
    }

    #[test]
    fn a_process_that_needs_the_log_is_not_ready_while_the_bus_is_down() {
        let (health, component, mut bus_health) = fixture(true, true);
        bus_health.update(Some("no broker answers".to_owned()), None, &component);
        assert_eq!(health.missing(), ["bus: no broker answers"]);
    }
}
