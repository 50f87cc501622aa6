//! One process of Penstock: the store and the bus, and on them every service of its plan.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use bus::Bus;
use contract::own_secrets::OwnSecrets;
use domain::zones::ZoneData;
use runtime::clock::{Clock, SteppedClock, SystemClock};
use runtime::health::Health;
use runtime::ids::{Ids, SystemIds};
use runtime::metrics::Metrics;
use runtime::retry::until_opened;
use runtime::token::InternalToken;
use serde_json::{Map, Value};
use store::Store;
use tokio::sync::Semaphore;

use super::args::ServeArgs;
use super::data_folder::DataFolder;
use super::folder_logs::READERS_MAX;
use super::means::Means;
use super::own_secrets::own_secrets;
use super::plan::Plan;
use super::secret::internal_token;
use super::services::Starting;
use super::stages::{StageName, Stages};
use super::{start, zone_files};

/// What the services of a process share.
pub struct Ground {
    pub data: PathBuf,
    /// None in a process of gateways only.
    pub store: Option<Store>,
    pub bus: Arc<dyn Bus>,
    pub clock: Arc<dyn Clock>,
    pub ids: Arc<dyn Ids>,
    pub metrics: Metrics,
    pub health: Health,
    pub internal_token: Option<InternalToken>,
    pub zones: ZoneData,
    /// What documents may not refer to.
    pub own: OwnSecrets,
    /// Room for readers of the output of instances here.
    pub log_readers: Arc<Semaphore>,
    pub means: Means,
}

impl Ground {
    pub fn store(&self) -> anyhow::Result<Store> {
        self.store
            .clone()
            .context("a service that needs the store was started without one")
    }
}

/// Where this process is reached; only what it serves.
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    pub control: Option<String>,
    pub gateway: Option<String>,
    /// Control serves health and metrics too, so with it there is no listener beside.
    pub admin: Option<String>,
}

impl Addresses {
    fn to_json(&self) -> Value {
        let served = [
            ("control", &self.control),
            ("gateway", &self.gateway),
            ("admin", &self.admin),
        ];
        let served = served
            .into_iter()
            .filter_map(|(name, url)| Some((name.to_owned(), Value::String(url.clone()?))));
        Value::Object(served.collect::<Map<_, _>>())
    }
}

pub struct House {
    folder: DataFolder,
    ground: Ground,
    addresses: Addresses,
}

impl House {
    /// What has been started by the time of an error, or when this is dropped, is in `stages`; the
    /// caller ends them.
    pub async fn start(
        args: &ServeArgs,
        plan: Plan,
        means: Means,
        stages: &mut Stages,
    ) -> anyhow::Result<Self> {
        let folder = DataFolder::open(&args.data)?;
        let ground = ground(args, &plan, folder.path(), means).await?;
        let log = stages.of(StageName::Log);
        start::relay(&ground, args.bus != "local", log);
        start::archiver(args, &ground, log);
        start::watch_bus(&plan, &ground, log);
        let addresses = Starting::new(args, &plan, &ground, stages)
            .services()
            .await?;
        Ok(Self {
            folder,
            ground,
            addresses,
        })
    }

    #[cfg(test)]
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Waits until everything can serve, then says so.
    pub async fn announce(&self, ready_file: Option<&Path>) -> anyhow::Result<()> {
        self.ground.health.until_ready().await;
        let urls = self.addresses.to_json();
        if let Some(path) = ready_file {
            // A reader must never see half of it.
            let unfinished = path.with_extension("unfinished");
            std::fs::write(&unfinished, format!("{urls}\n"))
                .and_then(|()| std::fs::rename(&unfinished, path))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        let Addresses {
            control,
            gateway,
            admin,
        } = &self.addresses;
        let data = self.folder.path().display();
        tracing::info!(control, gateway, admin, %data, "ready");
        Ok(())
    }

    /// After the stages have ended.
    pub async fn close(self) {
        self.ground.bus.close().await;
        if let Some(store) = &self.ground.store {
            store.close().await;
        }
    }
}

async fn open_store(args: &ServeArgs, data: &Path) -> anyhow::Result<Store> {
    let url = args
        .store
        .clone()
        .unwrap_or_else(|| format!("sqlite:{}", data.join("penstock.db").display()));
    let archives = args.archive.as_deref();
    // A file is there or not; a server may be started after us.
    let opened = match url.starts_with("sqlite:") {
        true => Store::open_with(&url, archives).await,
        false => until_opened(|| Store::open_with(&url, archives)).await,
    };
    opened.context("cannot open the event store")
}

async fn ground(
    args: &ServeArgs,
    plan: &Plan,
    data: &Path,
    means: Means,
) -> anyhow::Result<Ground> {
    let internal_token = args.internal_token.as_deref().map(internal_token);
    let store = match plan.needs_store() {
        true => Some(open_store(args, data).await?),
        false => None,
    };
    let clock = clock(args);
    let zones = zone_files::zones(args.zoneinfo.as_deref())?;
    if let Some(warning) =
        zone_files::age_warning(&zones, clock.now()).filter(|_| plan.has_schedules())
    {
        tracing::warn!("{warning}");
    }
    Ok(Ground {
        data: data.to_owned(),
        store,
        bus: bus::open(&args.bus).await?,
        clock,
        zones,
        ids: Arc::new(SystemIds::default()),
        metrics: Metrics::default(),
        health: Health::default(),
        internal_token: internal_token.transpose()?,
        own: own_secrets(args, |name| std::env::var_os(name)),
        log_readers: Arc::new(Semaphore::new(READERS_MAX)),
        means,
    })
}

fn clock(args: &ServeArgs) -> Arc<dyn Clock> {
    match &args.clock_offset_file {
        Some(file) => Arc::new(SteppedClock::follow(file.clone())),
        None => Arc::new(SystemClock),
    }
}
