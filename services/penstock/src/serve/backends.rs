//! The backends that nodes of this release offer, a row each, and how each is opened.
//!
//! Invariant: what a node says that it offers is what was opened here. What a document must hold for a
//! backend is a row of the same name in `documents::BACKENDS`; a test names the one that lacks the other.

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
use super::house::Ground;
use super::stages::Stage;

/// How often simulated instances live on.
const SIMULATED_STEP: Duration = Duration::from_millis(50);

/// Opens a backend on this node.
pub type Open = for<'a> fn(&'a mut Site<'_>) -> BoxFuture<'a, anyhow::Result<Arc<dyn Backend>>>;

pub struct BackendEntry {
    pub kind: BackendKind,
    pub open: Open,
}

/// All backends of this release.
pub static BACKENDS: &[BackendEntry] = &[
    BackendEntry {
        kind: BackendKind::PROCESS,
        open: |site| Box::pin(process(site)),
    },
    BackendEntry {
        kind: BackendKind::SIMULATED,
        open: |site| Box::pin(simulated(site)),
    },
];

/// What a backend is opened with.
pub struct Site<'a> {
    pub args: &'a ServeArgs,
    pub ground: &'a Ground,
    /// The id of this node.
    pub node: &'a str,
    /// Where tasks of backends belong; it outlives the node agent.
    pub stage: &'a mut Stage,
}

impl Site<'_> {
    /// Opens all of them.
    ///
    /// # Errors
    /// Of the first that cannot be opened, with its name.
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

/// Adopts what a former life left.
async fn process(site: &mut Site<'_>) -> anyhow::Result<Arc<dyn Backend>> {
    let directory = std::env::current_dir().context("cannot tell the working directory")?;
    let ground = site.ground;
    let config = ProcessConfig {
        host: advertised_host(site.args).await?,
        own: ground.own.clone(),
        means: ground.means.of_instances(),
        ..ProcessConfig::new(ground.data.clone(), site.node.to_owned(), directory)
    };
    Ok(ProcessBackend::open(config).await?)
}

async fn advertised_host(args: &ServeArgs) -> anyhow::Result<Host> {
    let name = args.advertise_host.clone();
    let found = tokio::task::spawn_blocking(move || Host::advertised(&name)).await?;
    found.map_err(|why| anyhow::anyhow!("--advertise-host: {why}"))
}

async fn simulated(site: &mut Site<'_>) -> anyhow::Result<Arc<dyn Backend>> {
    let clock = site.ground.clock.clone();
    let simulated = SimulatedBackend::new(site.node, clock.now());
    let (living, stop) = (simulated.clone(), site.stage.stop.clone());
    site.stage.spawn(async move {
        let mut steps = tokio::time::interval(SIMULATED_STEP);
        while stop.run_until_cancelled(steps.tick()).await.is_some() {
            living.advance(clock.now());
        }
    });
    Ok(simulated)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_backend_can_be_opened_and_has_rules_for_its_documents() {
        let known: Vec<&BackendKind> = BackendKind::KNOWN.iter().collect();
        let opened: Vec<&BackendKind> = BACKENDS.iter().map(|entry| &entry.kind).collect();
        let with_rules: Vec<&BackendKind> =
            documents::BACKENDS.iter().map(|row| &row.kind).collect();
        for (place, kinds) in [
            ("serve::backends::BACKENDS", opened),
            ("documents::BACKENDS", with_rules),
        ] {
            let missing: Vec<_> = known.iter().filter(|kind| !kinds.contains(kind)).collect();
            assert!(missing.is_empty(), "{place} lacks {missing:?}");
            let unknown: Vec<_> = kinds.iter().filter(|kind| !known.contains(kind)).collect();
            assert!(
                unknown.is_empty(),
                "BackendKind lacks {unknown:?} of {place}"
            );
        }
    }
}
