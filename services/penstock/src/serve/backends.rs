//! The table of backends that nodes of this release offer, and how each is opened.
//!
//! Invariant: a node advertises exactly the backends that were opened here. A backend with a constant in
//! `BackendKind` also has an entry in `documents::BACKENDS`, which says what its documents must specify; a
//! test names the missing one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use backends::Backend;
use backends::process::{Host, ProcessBackend, ProcessConfig};
use backends::simulated::SimulatedBackend;
use contract::resources::BackendKind;
use futures::future::BoxFuture;

use super::args::ServeArgs;
use super::context::ServerContext;
use super::task_groups::TaskGroup;

/// How often simulated instances are advanced.
const SIMULATED_STEP: Duration = Duration::from_millis(50);

/// Opens a backend on this node.
pub type OpenBackend =
    for<'a> fn(&'a mut BackendSetup<'_>) -> BoxFuture<'a, anyhow::Result<Arc<dyn Backend>>>;

pub struct BackendEntry {
    pub kind: BackendKind,
    pub open: OpenBackend,
}

/// All backends of this release.
pub static BACKENDS: &[BackendEntry] = &[
    BackendEntry {
        kind: BackendKind::PROCESS,
        open: |setup| Box::pin(process(setup)),
    },
    BackendEntry {
        kind: BackendKind::SIMULATED,
        open: |setup| Box::pin(simulated(setup)),
    },
];

/// The arguments for opening a backend.
pub struct BackendSetup<'a> {
    pub args: &'a ServeArgs,
    pub ctx: &'a ServerContext,
    /// The id of this node.
    pub node: &'a str,
    /// The group for tasks of backends; it outlives the node agent.
    pub group: &'a mut TaskGroup,
}

impl BackendSetup<'_> {
    /// Opens all backends.
    ///
    /// # Errors
    /// If a backend cannot be opened: the first error, with the backend's name.
    pub async fn open(
        &mut self,
        entries: &[BackendEntry],
    ) -> anyhow::Result<BTreeMap<BackendKind, Arc<dyn Backend>>> {
        let mut opened = BTreeMap::new();
        for BackendEntry { kind, open } in entries {
            let backend = open(self).await;
            let backend = backend.with_context(|| format!("cannot open the {kind} backend"))?;
            opened.insert(kind.clone(), backend);
        }
        Ok(opened)
    }
}

/// Opens the process backend, which adopts instances left by an earlier run.
async fn process(setup: &mut BackendSetup<'_>) -> anyhow::Result<Arc<dyn Backend>> {
    let directory = std::env::current_dir().context("cannot determine the working directory")?;
    let ctx = setup.ctx;
    let config = ProcessConfig {
        host: advertised_host(setup.args).await?,
        own_secrets: ctx.own.clone(),
        resource_limits: ctx.budget.for_instances(),
        ..ProcessConfig::new(ctx.data.clone(), setup.node.to_owned(), directory)
    };
    Ok(ProcessBackend::open(config).await?)
}

async fn advertised_host(args: &ServeArgs) -> anyhow::Result<Host> {
    let name = args.advertise_host.clone();
    let found = tokio::task::spawn_blocking(move || Host::advertised(&name)).await?;
    found.map_err(|why| anyhow::anyhow!("--advertise-host: {why}"))
}

async fn simulated(setup: &mut BackendSetup<'_>) -> anyhow::Result<Arc<dyn Backend>> {
    let clock = setup.ctx.clock.clone();
    let simulated = SimulatedBackend::new(setup.node, clock.now());
    let (stepped, stop) = (simulated.clone(), setup.group.stop.clone());
    setup.group.spawn(async move {
        let mut steps = tokio::time::interval(SIMULATED_STEP);
        while stop.run_until_cancelled(steps.tick()).await.is_some() {
            stepped.advance(clock.now());
        }
    });
    Ok(simulated)
}

#[cfg(test)]
mod tests {
    use bus::LocalBus;
    use clap::Parser;
    use domain::zones::ZoneData;
    use runtime::clock::SystemClock;
    use runtime::health::HealthRegistry;
    use runtime::ids::SystemIds;
    use runtime::metrics::Metrics;
    use tokio::sync::Semaphore;

    use super::super::descriptor_budget::DescriptorBudget;
    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: ServeArgs,
    }

    /// The table of a release with one more backend, which no other table knows.
    static WITH_TOY: &[BackendEntry] = &[BackendEntry {
        kind: BackendKind::from_static("toy"),
        open: |setup| {
            let backend = SimulatedBackend::new(setup.node, setup.ctx.clock.now());
            Box::pin(async { Ok(backend as Arc<dyn Backend>) })
        },
    }];

    /// Opens the backends of a table as a node does.
    async fn open(
        entries: &[BackendEntry],
    ) -> anyhow::Result<BTreeMap<BackendKind, Arc<dyn Backend>>> {
        let folder = tempfile::tempdir().unwrap();
        let args = Command::parse_from(["serve"]).args;
        let ctx = ServerContext {
            data: folder.path().to_owned(),
            store: None,
            bus: LocalBus::new(),
            clock: Arc::new(SystemClock),
            ids: Arc::new(SystemIds::default()),
            metrics: Metrics::default(),
            health: HealthRegistry::default(),
            internal_token: None,
            zones: ZoneData::bundled(),
            own: Default::default(),
            log_readers: Arc::new(Semaphore::new(1)),
            budget: DescriptorBudget::of(&args).unwrap(),
        };
        let mut setup = BackendSetup {
            args: &args,
            ctx: &ctx,
            node: "node-1",
            group: &mut TaskGroup::default(),
        };
        setup.open(entries).await
    }

    #[tokio::test]
    async fn a_backend_of_another_table_is_opened_by_its_entry() {
        let opened = open(WITH_TOY).await.unwrap();
        let kind = &WITH_TOY[0].kind;
        assert_eq!(opened.keys().collect::<Vec<_>>(), [kind]);
        assert_eq!(opened[kind].list().await.unwrap(), []);
    }

    #[tokio::test]
    async fn a_backend_that_cannot_be_opened_is_named() {
        let entries = [BackendEntry {
            kind: BackendKind::from_static("toy"),
            open: |_| Box::pin(async { anyhow::bail!("it is broken") }),
        }];
        let error = open(&entries).await.err().unwrap();
        assert_eq!(
            format!("{error:#}"),
            "cannot open the toy backend: it is broken"
        );
    }

    /// A backend without a name here may have neither.
    #[test]
    fn every_named_backend_can_be_opened_and_has_rules_for_its_documents() {
        let opened: Vec<&BackendKind> = BACKENDS.iter().map(|entry| &entry.kind).collect();
        let with_rules: Vec<&BackendKind> =
            documents::BACKENDS.iter().map(|row| &row.kind).collect();
        for (place, kinds) in [
            ("serve::backends::BACKENDS", opened),
            ("documents::BACKENDS", with_rules),
        ] {
            let known = BackendKind::KNOWN.iter();
            let missing: Vec<&BackendKind> = known.filter(|kind| !kinds.contains(kind)).collect();
            assert!(missing.is_empty(), "{place} lacks {missing:?}");
        }
    }
}
