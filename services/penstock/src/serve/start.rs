//! How each service is started and kept running. What listens is bound before the first request may
//! come, and bound again on the same address after a failure.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use actuator::logs::{NodeLogs, router};
use actuator::node::{NodeConfig, NodeDeps};
use anyhow::Context;
use axum::Router;
use backends::process::node_id;
use bus::Bus;
use control::{Control, ControlConfig, ControlDeps, HistorySource, Limits, NoHistory};
use domain::instances::plan::REMOVAL_GRACE;
use gateway::Gateway;
use meter::{History, HistoryPlace, Meter};
use prometheus_client::metrics::counter::Counter;
use runtime::health::Component;
use runtime::reconcile::Deps;
use runtime::relay::{RELAY, RelayDeps};
use store::ARCHIVE_LEASE;

use super::admin::Admin;
use super::archiver::{Archiver, EVENTS_MIN};
use super::args::ServeArgs;
use super::backends::{BACKENDS, Site};
use super::folder_logs::FolderLogs;
use super::history::MeterHistory;
use super::house::Ground;
use super::member_logs::MemberLogs;
use super::plan::Plan;
use super::services::{Service, Starting};
use super::stages::{Stage, StageName};
use super::supervisor::supervise;

/// How often the bus is asked how it is.
const BUS_EVERY: Duration = Duration::from_secs(1);
/// The only gateway of the embedded default.
const GATEWAY_ID: &str = "gateway";

fn deps(ground: &Ground) -> anyhow::Result<Deps> {
    Ok(Deps {
        store: ground.store()?,
        bus: ground.bus.clone(),
        clock: ground.clock.clone(),
        ids: ground.ids.clone(),
    })
}

/// What carries the log from the store to the bus. On a bus between processes every one with the
/// store stands ready, and one at a time does it.
pub fn relay(ground: &Ground, is_shared: bool, stage: &mut Stage) {
    let Some(store) = ground.store.clone() else {
        return;
    };
    let (bus, stop) = (ground.bus.clone(), stage.stop.clone());
    if !is_shared {
        stage.spawn(runtime::relay::run(store, bus, stop));
        return;
    }
    let deps = RelayDeps {
        store,
        bus,
        holder: ground.ids.uid().to_string(),
        component: ground.health.component(RELAY),
        metrics: ground.metrics.clone(),
    };
    let run = move || {
        let (deps, stop) = (deps.clone(), stop.clone());
        async move {
            runtime::relay::run_durable(deps, stop).await;
            Ok::<(), std::convert::Infallible>(())
        }
    };
    stage.spawn(supervise(RELAY, stage.stop.clone(), run));
}

/// What moves old events into archives, where that is asked for: one process at a time.
pub fn archiver(args: &ServeArgs, ground: &Ground, stage: &mut Stage) {
    let (Some(store), Some(age)) = (ground.store.clone(), args.archive_after) else {
        return;
    };
    let archiver = Archiver {
        store,
        clock: ground.clock.clone(),
        holder: ground.ids.uid().to_string(),
        age,
        events_min: EVENTS_MIN,
        component: ground.health.component(ARCHIVE_LEASE),
    };
    stage.spawn(archiver.run(stage.stop.clone()));
}

/// Lets readiness say when the bus cannot be reached. A gateway serves on without it once it has had
/// routes, in this life or an earlier one: for a process of gateways it is then a remark, or a load
/// balancer would take all of them out at once.
pub fn watch_bus(plan: &Plan, ground: &Ground, stage: &mut Stage) {
    let (bus, stop) = (ground.bus.clone(), stage.stop.clone());
    let component = ground.health.component("bus");
    let dropped = Counter::<u64>::default();
    ground.metrics.register(|registry| {
        registry.register(
            "penstock_bus_dropped",
            "Messages that did not reach the bus, or a subscriber of this process that was slow",
            dropped.clone(),
        );
    });
    let mut told = BusWord {
        is_needed: plan.needs_store(),
        has_answered: gateway::has_saved_routes(&ground.data),
    };
    told.take(bus.as_ref(), &component);
    component.ready();
    stage.spawn(async move {
        let mut ticks = tokio::time::interval(BUS_EVERY);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            told.take(bus.as_ref(), &component);
            dropped.inc_by(bus.dropped().saturating_sub(dropped.get()));
        }
    });
}

struct BusWord {
    is_needed: bool,
    has_answered: bool,
}

impl BusWord {
    fn take(&mut self, bus: &dyn Bus, component: &Component) {
        self.hear(bus.trouble(), bus.remark(), component);
    }

    fn hear(&mut self, trouble: Option<String>, remark: Option<String>, component: &Component) {
        self.has_answered |= trouble.is_none();
        let (hinders, remark) = match self.is_needed || !self.has_answered {
            true => (trouble, remark),
            false => (None, trouble.or(remark)),
        };
        component.trouble(hinders);
        component.remark(remark);
    }
}

pub async fn gateway(starting: &mut Starting<'_>) -> anyhow::Result<()> {
    let (args, plan, ground) = (starting.args, starting.plan, starting.ground);
    let stage = starting.stage();
    let id = match plan.is_whole() {
        true => GATEWAY_ID.to_owned(),
        false => gateway_id(&ground.data)?,
    };
    let config = gateway::Config {
        data: Some(ground.data.clone()),
        domain: args.gateway_domain.clone(),
        threads: ground.means.shares.threads,
        descriptors: ground.means.descriptors.clone(),
        ..gateway::Config::new(id, args.gateway_addr)
    };
    let deps = gateway::Deps {
        bus: ground.bus.clone(),
        clock: ground.clock.clone(),
        metrics: ground.metrics.clone(),
        health: ground.health.clone(),
    };
    let gateway = Gateway::bind(config.clone(), deps.clone())?;
    let url = format!("http://{}", gateway.address);
    let again = gateway::Config {
        address: gateway.address,
        ..config
    };
    let (stop, mut bound) = (stage.stop.clone(), Some(gateway));
    let run = move || {
        let (bound, config, deps, stop) = (bound.take(), again.clone(), deps.clone(), stop.clone());
        async move {
            let gateway = bound.map_or_else(|| Gateway::bind(config, deps), Ok)?;
            gateway.serve(stop).await
        }
    };
    stage.spawn(supervise("gateway", stage.stop.clone(), run));
    starting.addresses.gateway = Some(url);
    Ok(())
}

/// Stable over restarts, like the node's id, since slots are dealt by it.
fn gateway_id(data: &Path) -> anyhow::Result<String> {
    let node = node_id(data).context("cannot read or make the id of this data folder")?;
    Ok(node.replacen("node-", "gateway-", 1))
}

/// The meter, and where control finds the past.
pub async fn meter(starting: &mut Starting<'_>) -> anyhow::Result<()> {
    let ground = starting.ground;
    let place = history_place(starting.args, ground);
    let deps = meter::Deps {
        store: ground.store()?,
        bus: ground.bus.clone(),
        clock: ground.clock.clone(),
        ids: ground.ids.clone(),
        metrics: ground.metrics.clone(),
        health: ground.health.clone(),
    };
    let config = meter::Config::keeping(place);
    let meter = Meter::open(config.clone(), deps.clone()).await?;
    let history = Arc::new(MeterHistory::new(meter.history()));
    let stage = starting.stage();
    let (stop, mut opened) = (stage.stop.clone(), Some(meter));
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
    stage.spawn(supervise("meter", stage.stop.clone(), run));
    starting.history = Some(history);
    Ok(())
}

fn history_place(args: &ServeArgs, ground: &Ground) -> HistoryPlace {
    HistoryPlace::of_store(args.store.as_deref().unwrap_or_default(), &ground.data)
}

/// What meters in other processes keep can be read where it is beside the log.
async fn elsewhere(place: &HistoryPlace) -> anyhow::Result<Arc<dyn HistorySource>> {
    if matches!(place, HistoryPlace::File(_)) {
        return Ok(Arc::new(NoHistory));
    }
    let history = History::open_reader(place).await?;
    Ok(Arc::new(MeterHistory::new(history)))
}

pub async fn control(starting: &mut Starting<'_>) -> anyhow::Result<()> {
    let (args, plan, ground) = (starting.args, starting.plan, starting.ground);
    let history = match starting.history.clone() {
        Some(history) => history,
        None => elsewhere(&history_place(args, ground)).await?,
    };
    let config = ControlConfig {
        listen: args.control_addr,
        data: ground.data.clone(),
        seal_key: args.seal_key.clone(),
        replica: replica(plan, &ground.data)?,
        gateway: (args.gateway_url.clone()).or(starting.addresses.gateway.clone()),
        limits: ground.means.limits(Limits::default()),
        own: ground.own.clone(),
        descriptors: ground.means.descriptors.clone(),
    };
    let deps = ControlDeps {
        store: ground.store()?,
        bus: ground.bus.clone(),
        clock: ground.clock.clone(),
        ids: ground.ids.clone(),
        metrics: ground.metrics.clone(),
        health: ground.health.clone(),
        internal_token: ground.internal_token.clone(),
        zones: ground.zones.clone(),
        logs: Arc::new(MemberLogs::new(
            own_logs(plan, ground)?,
            ground.store()?,
            ground.internal_token.clone(),
        )),
        history,
    };
    let control = Control::bind(config.clone(), deps.clone()).await?;
    let url = format!("http://{}", control.addr);
    let again = ControlConfig {
        listen: control.addr,
        ..config
    };
    let stage = starting.stage();
    let (stop, mut bound) = (stage.stop.clone(), Some(control));
    let run = move || {
        let (bound, config, deps, stop) = (bound.take(), again.clone(), deps.clone(), stop.clone());
        async move {
            let control = match bound {
                Some(control) => control,
                None => Control::bind(config, deps).await?,
            };
            Box::pin(control.serve(stop)).await
        }
    };
    stage.spawn(supervise("control", stage.stop.clone(), run));
    starting.addresses.admin = Some(url.clone());
    starting.addresses.control = Some(url);
    Ok(())
}

/// The logs of the node in this process, if it is one.
fn own_logs(plan: &Plan, ground: &Ground) -> anyhow::Result<Option<(String, Arc<dyn NodeLogs>)>> {
    if !plan.runs(Service::ACTUATOR) {
        return Ok(None);
    }
    let node = node_id(&ground.data).context("cannot read or make the node's id")?;
    let logs = FolderLogs::new(&ground.data, ground.log_readers.clone());
    Ok(Some((node, Arc::new(logs))))
}

/// What tells this control from others on the same store; one that runs everything is alone.
fn replica(plan: &Plan, data: &Path) -> anyhow::Result<Option<String>> {
    if plan.is_whole() {
        return Ok(None);
    }
    let node = node_id(data).context("cannot read or make the id of this data folder")?;
    Ok(Some(node.replacen("node-", "", 1)))
}

/// Health and metrics of a process without control, and the output of its instances for others. Gives
/// where they are; opens it the first time. None: the process needs none.
pub async fn admin(starting: &mut Starting<'_>) -> anyhow::Result<Option<String>> {
    let (args, plan, ground) = (starting.args, starting.plan, starting.ground);
    if !plan.has_admin_listener() || starting.admin.is_some() {
        return Ok(starting.admin.clone());
    }
    let stage = starting.stages.of(StageName::Log);
    let logs = match own_logs(plan, ground)? {
        Some((_, logs)) => router(logs, ground.internal_token.clone(), stage.stop.clone()),
        None => Router::new(),
    };
    let admin = Admin::bind(
        args.admin_addr,
        ground.health.clone(),
        ground.metrics.clone(),
        ground.internal_token.clone(),
        logs,
    )
    .await?
    .within(&ground.means);
    let url = format!("http://{}", admin.address);
    let stop = stage.stop.clone();
    stage.spawn(admin.serve(stop));
    starting.admin = Some(url.clone());
    Ok(Some(url))
}

pub fn autoscaler(starting: &mut Starting<'_>) -> anyhow::Result<()> {
    let ground = starting.ground;
    let stage = starting.stage();
    let (deps, stop) = (deps(ground)?, stage.stop.clone());
    let (metrics, health) = (ground.metrics.clone(), ground.health.clone());
    let zones = ground.zones.clone();
    let run = move || {
        let (deps, zones, stop) = (deps.clone(), zones.clone(), stop.clone());
        let (metrics, health) = (metrics.clone(), health.clone());
        async move { autoscaler::run(deps, zones, &metrics, &health, stop).await }
    };
    stage.spawn(supervise("autoscaler", stage.stop.clone(), run));
    Ok(())
}

/// The planner, and this machine's node agent with the backends it allows.
pub async fn actuator(starting: &mut Starting<'_>) -> anyhow::Result<()> {
    let (args, plan, ground) = (starting.args, starting.plan, starting.ground);
    let admin = admin(starting).await?;
    let node = node_id(&ground.data).context("cannot read or make the node's id")?;
    // Alone, it need not wait to hear of itself as a member.
    let own = plan.is_whole().then(|| node.clone());
    planner(own, ground, starting.stages.of(StageName::Engines))?;
    let mut site = Site {
        args,
        ground,
        node: &node,
        stage: starting.stages.of(StageName::Log),
    };
    let backends = site.open(BACKENDS).await?;
    let config = NodeConfig {
        node,
        address: args.admin_url.clone().or(admin),
        // An actuator of its own may be replaced while its instances serve on.
        keep_instances: args.keep_instances || !plan.is_whole(),
        grace: REMOVAL_GRACE,
    };
    let (deps, component) = (deps(ground)?, ground.health.component("node"));
    let stage = starting.stage();
    let stop = stage.stop.clone();
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
    stage.spawn(supervise("node", stage.stop.clone(), run));
    Ok(())
}

fn planner(node: Option<String>, ground: &Ground, stage: &mut Stage) -> anyhow::Result<()> {
    let (deps, health, stop) = (deps(ground)?, ground.health.clone(), stage.stop.clone());
    let run = move || {
        let (node, deps, health, stop) = (node.clone(), deps.clone(), health.clone(), stop.clone());
        async move { actuator::planner::run(node, deps, &health, stop).await }
    };
    stage.spawn(supervise("actuator", stage.stop.clone(), run));
    Ok(())
}

#[cfg(test)]
mod tests {
    use runtime::health::Health;

    use super::*;

    fn word(is_needed: bool, has_answered: bool) -> (Health, Component, BusWord) {
        let health = Health::default();
        let component = health.component("bus");
        component.ready();
        let word = BusWord {
            is_needed,
            has_answered,
        };
        (health, component, word)
    }

    #[test]
    fn a_gateway_that_has_had_routes_stays_ready_while_the_bus_is_away() {
        let (health, component, mut word) = word(false, false);
        word.hear(Some("nobody answers".to_owned()), None, &component);
        assert_eq!(health.missing(), ["bus: nobody answers"]);
        word.hear(None, None, &component);
        assert!(health.missing().is_empty());
        word.hear(Some("nobody answers".to_owned()), None, &component);
        assert!(health.missing().is_empty());
        assert_eq!(health.remarks(), ["bus: nobody answers"]);
    }

    #[test]
    fn who_works_on_the_log_is_not_ready_while_the_bus_is_away() {
        let (health, component, mut word) = word(true, true);
        word.hear(Some("nobody answers".to_owned()), None, &component);
        assert_eq!(health.missing(), ["bus: nobody answers"]);
    }
}
