//! The whole house in one process: store, bus, and every service on them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use actuator::node::{NodeConfig, NodeDeps};
use anyhow::Context;
use backends::Backend;
use backends::process::{ProcessBackend, ProcessConfig, node_id};
use backends::simulated::SimulatedBackend;
use bus::{Bus, LocalBus};
use contract::resources::BackendKind;
use control::{Control, ControlConfig, ControlDeps, Limits};
use domain::instances::plan::REMOVAL_GRACE;
use gateway::Gateway;
use meter::Meter;
use runtime::clock::{Clock, SystemClock};
use runtime::health::Health;
use runtime::ids::{Ids, SystemIds};
use runtime::metrics::Metrics;
use runtime::reconcile::Deps;
use store::Store;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::data_folder::DataFolder;
use super::sources::{FolderLogs, MeterHistory};
use super::supervisor::supervise;
use crate::cli::serve_args::ServeArgs;

/// How often simulated instances live on.
const SIMULATED_STEP: Duration = Duration::from_millis(50);
/// The only gateway of the embedded default.
const GATEWAY_ID: &str = "gateway";

pub struct House {
    folder: DataFolder,
    store: Store,
    health: Health,
    control_url: String,
    gateway_url: String,
    /// Stages in the order in which they are stopped.
    stages: Vec<Stage>,
}

/// Services that stop together.
struct Stage {
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Stage {
    fn new() -> Self {
        Self {
            stop: CancellationToken::new(),
            tasks: Vec::new(),
        }
    }

    fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.push(tokio::spawn(task));
    }

    async fn end(self) {
        self.stop.cancel();
        for task in self.tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "a task ended badly");
            }
        }
    }
}

impl House {
    pub async fn start(args: &ServeArgs) -> anyhow::Result<Self> {
        let folder = DataFolder::open(&args.data)?;
        let data = folder.path().to_owned();
        let store_url = args
            .store
            .clone()
            .unwrap_or_else(|| format!("sqlite:{}", data.join("penstock.db").display()));
        let store = Store::open(&store_url)
            .await
            .context("cannot open the event store")?;
        let bus: Arc<dyn Bus> = LocalBus::new();
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let ids: Arc<dyn Ids> = Arc::new(SystemIds::default());
        let (metrics, health) = (Metrics::default(), Health::default());
        let deps = Deps {
            store: store.clone(),
            bus: bus.clone(),
            clock: clock.clone(),
            ids: ids.clone(),
        };

        let (mut doors, mut engines, mut hands, mut log) =
            (Stage::new(), Stage::new(), Stage::new(), Stage::new());
        log.spawn(runtime::relay::run(
            store.clone(),
            bus.clone(),
            log.stop.clone(),
        ));

        let gateway_config = gateway::Config {
            data: Some(data.clone()),
            domain: args.gateway_domain.clone(),
            ..gateway::Config::new(GATEWAY_ID, args.gateway_addr)
        };
        let gateway_deps = gateway::Deps {
            bus: bus.clone(),
            clock: clock.clone(),
            metrics: metrics.clone(),
            health: health.clone(),
        };
        let gateway = Gateway::bind(gateway_config.clone(), gateway_deps.clone())?;
        let gateway_url = format!("http://{}", gateway.address);
        let again = gateway::Config {
            address: gateway.address,
            ..gateway_config
        };
        spawn_gateway(&mut doors, gateway, again, gateway_deps);

        let meter_deps = meter::Deps {
            store: store.clone(),
            bus: bus.clone(),
            clock: clock.clone(),
            ids: ids.clone(),
            metrics: metrics.clone(),
            health: health.clone(),
        };
        let meter_config = meter::Config::new(&data);
        let meter = Meter::open(meter_config.clone(), meter_deps.clone()).await?;
        let control_config = ControlConfig {
            listen: args.control_addr,
            data: data.clone(),
            seal_key: None,
            replica: None,
            gateway: Some(gateway_url.clone()),
            limits: Limits::default(),
        };
        let control_deps = ControlDeps {
            store: store.clone(),
            bus: bus.clone(),
            clock: clock.clone(),
            ids: ids.clone(),
            metrics: metrics.clone(),
            health: health.clone(),
            logs: Arc::new(FolderLogs::new(&data)),
            history: Arc::new(MeterHistory::new(meter.history())),
        };
        let control = Control::bind(control_config.clone(), control_deps.clone()).await?;
        let control_url = format!("http://{}", control.addr);
        let again = ControlConfig {
            listen: control.addr,
            ..control_config
        };
        spawn_control(&mut doors, control, again, control_deps);

        spawn_autoscaler(&mut engines, deps.clone(), metrics.clone(), health.clone());
        let node = node_id(&data).context("cannot read or make the node's id")?;
        spawn_planner(&mut engines, node.clone(), deps.clone(), health.clone());
        let backends = start_backends(&data, &node, clock.clone(), &mut log).await?;
        let node_config = NodeConfig {
            node,
            keep_instances: args.keep_instances,
            grace: REMOVAL_GRACE,
        };
        spawn_node(&mut hands, node_config, deps, backends, &health);
        spawn_meter(&mut log, meter, meter_config, meter_deps);
        let stages = vec![doors, engines, hands, log];
        Ok(Self {
            folder,
            store,
            health,
            control_url,
            gateway_url,
            stages,
        })
    }

    /// Waits until everything can serve, then says so.
    pub async fn announce(&self, ready_file: Option<&Path>) -> anyhow::Result<()> {
        self.health.until_ready().await;
        let urls = serde_json::json!({
            "control": self.control_url, "gateway": self.gateway_url, "admin": self.control_url
        });
        if let Some(path) = ready_file {
            // A reader must never see half of it.
            let unfinished = path.with_extension("unfinished");
            std::fs::write(&unfinished, format!("{urls}\n"))
                .and_then(|()| std::fs::rename(&unfinished, path))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        tracing::info!(
            control = self.control_url,
            gateway = self.gateway_url,
            data = %self.folder.path().display(),
            "ready"
        );
        Ok(())
    }

    pub async fn stop(self) {
        for stage in self.stages {
            stage.end().await;
        }
        self.store.close().await;
    }
}

/// Serves on what is bound already, and after a failure on the same address again.
fn spawn_gateway(stage: &mut Stage, bound: Gateway, config: gateway::Config, deps: gateway::Deps) {
    let (stop, mut bound) = (stage.stop.clone(), Some(bound));
    let run = move || {
        let (bound, config, deps, stop) =
            (bound.take(), config.clone(), deps.clone(), stop.clone());
        async move {
            let gateway = bound.map_or_else(|| Gateway::bind(config, deps), Ok)?;
            gateway.serve(stop).await
        }
    };
    stage.spawn(supervise("gateway", stage.stop.clone(), run));
}

fn spawn_control(stage: &mut Stage, bound: Control, config: ControlConfig, deps: ControlDeps) {
    let (stop, mut bound) = (stage.stop.clone(), Some(bound));
    let run = move || {
        let (bound, config, deps, stop) =
            (bound.take(), config.clone(), deps.clone(), stop.clone());
        async move {
            let control = match bound {
                Some(control) => control,
                None => Control::bind(config, deps).await?,
            };
            Box::pin(control.serve(stop)).await
        }
    };
    stage.spawn(supervise("control", stage.stop.clone(), run));
}

fn spawn_meter(stage: &mut Stage, opened: Meter, config: meter::Config, deps: meter::Deps) {
    let (stop, mut opened) = (stage.stop.clone(), Some(opened));
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
}

fn spawn_autoscaler(stage: &mut Stage, deps: Deps, metrics: Metrics, health: Health) {
    let stop = stage.stop.clone();
    let run = move || {
        let (deps, metrics, health, stop) =
            (deps.clone(), metrics.clone(), health.clone(), stop.clone());
        async move { autoscaler::run(deps, &metrics, &health, stop).await }
    };
    stage.spawn(supervise("autoscaler", stage.stop.clone(), run));
}

fn spawn_planner(stage: &mut Stage, node: String, deps: Deps, health: Health) {
    let stop = stage.stop.clone();
    let run = move || {
        let (node, deps, health, stop) = (node.clone(), deps.clone(), health.clone(), stop.clone());
        async move { actuator::planner::run(node, deps, &health, stop).await }
    };
    stage.spawn(supervise("actuator", stage.stop.clone(), run));
}

fn spawn_node(
    stage: &mut Stage,
    config: NodeConfig,
    deps: Deps,
    backends: BTreeMap<BackendKind, Arc<dyn Backend>>,
    health: &Health,
) {
    let stop = stage.stop.clone();
    let component = health.component("node");
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
}

/// Opens the backends that this version has; the process backend adopts what a former life left.
async fn start_backends(
    data: &Path,
    node: &str,
    clock: Arc<dyn Clock>,
    stage: &mut Stage,
) -> anyhow::Result<BTreeMap<BackendKind, Arc<dyn Backend>>> {
    let directory = std::env::current_dir().context("cannot tell the working directory")?;
    let config = ProcessConfig::new(data.to_owned(), node.to_owned(), directory);
    let process = ProcessBackend::open(config)
        .await
        .context("cannot open the process backend")?;
    let simulated = SimulatedBackend::new(node, clock.now());
    let (living, stop) = (simulated.clone(), stage.stop.clone());
    stage.spawn(async move {
        let mut steps = tokio::time::interval(SIMULATED_STEP);
        while stop.run_until_cancelled(steps.tick()).await.is_some() {
            living.advance(clock.now());
        }
    });
    Ok(BTreeMap::from([
        (BackendKind::Process, process as Arc<dyn Backend>),
        (BackendKind::Simulated, simulated as Arc<dyn Backend>),
    ]))
}
