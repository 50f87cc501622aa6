//! A Penstock process: the store, the bus, and the services of its plan on top of them.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use runtime::clock::{Clock, SteppedClock, SystemClock};
use runtime::health::HealthRegistry;
use runtime::ids::SystemIds;
use runtime::metrics::Metrics;
use runtime::retry::open_when_available;
use store::Store;
use tokio::sync::Semaphore;

use super::args::ServeArgs;
use super::context::{Addresses, ServerContext};
use super::data_folder::DataFolder;
use super::descriptor_budget::DescriptorBudget;
use super::folder_logs::READERS_MAX;
use super::own_secrets::own_secrets;
use super::plan::{Plan, Startup};
use super::secret::internal_token;
use super::task_groups::{TaskGroupName, TaskGroups};
use super::{start, zone_files};

/// A running process.
pub struct ServerProcess {
    folder: DataFolder,
    ctx: ServerContext,
    addresses: Addresses,
}

impl ServerProcess {
    /// Starts the services of the plan. Tasks that were started before an error or a cancellation are in
    /// `groups`; the caller must shut them down.
    pub async fn start(
        args: &ServeArgs,
        plan: Plan,
        budget: DescriptorBudget,
        groups: &mut TaskGroups,
    ) -> anyhow::Result<Self> {
        let folder = DataFolder::open(&args.data)?;
        let ctx = open_context(args, &plan, folder.path(), budget).await?;
        let log = groups.of(TaskGroupName::Log);
        start::log_end(&ctx, log).await?;
        start::relay(&ctx, args.bus != "local", log);
        start::archiver(args, &ctx, log);
        start::watch_bus(&plan, &ctx, log);
        let mut startup = Startup::new(args, &plan, &ctx, groups);
        startup.start_services().await?;
        let admin = start::admin(&mut startup).await?;
        let mut addresses = startup.addresses;
        addresses.admin = addresses.admin.or(admin);
        Ok(Self {
            folder,
            ctx,
            addresses,
        })
    }

    #[cfg(test)]
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Waits until every service is ready, then writes the ready file and logs the addresses.
    pub async fn announce_ready(&self, ready_file: Option<&Path>) -> anyhow::Result<()> {
        self.ctx.health.until_ready().await;
        let urls = self.addresses.to_json();
        if let Some(path) = ready_file {
            // Readers must never see a partial file.
            let temp_path = path.with_extension("unfinished");
            std::fs::write(&temp_path, format!("{urls}\n"))
                .and_then(|()| std::fs::rename(&temp_path, path))
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

    /// Closes the bus and the store; call it after the task groups have shut down.
    pub async fn close(self) {
        self.ctx.bus.close().await;
        if let Some(store) = &self.ctx.store {
            store.close().await;
        }
    }
}

/// If the error is that the store is damaged, describes the damage.
pub async fn with_damage(error: anyhow::Error, args: &ServeArgs) -> anyhow::Error {
    let Some(damage) = store::damage_in(error.as_ref()) else {
        return error;
    };
    match store::describe_damage(&store_url(args, &args.data), damage).await {
        Some(described) => anyhow::Error::new(described).context("the server cannot start"),
        None => error,
    }
}

fn store_url(args: &ServeArgs, data: &Path) -> String {
    let in_data = || format!("sqlite:{}", data.join("penstock.db").display());
    args.store.clone().unwrap_or_else(in_data)
}

async fn open_store(args: &ServeArgs, data: &Path) -> anyhow::Result<Store> {
    let url = store_url(args, data);
    let archives = args.archive.as_deref();
    let open = || async {
        let store = Store::open_with(&url, archives).await?;
        store::check_retained(&store).await?;
        Ok(store)
    };
    // A file exists or does not; a database server may start after us.
    let opened = match url.starts_with("sqlite:") {
        true => open().await,
        false => open_when_available(open).await,
    };
    opened.context("cannot open the event store")
}

async fn open_context(
    args: &ServeArgs,
    plan: &Plan,
    data: &Path,
    budget: DescriptorBudget,
) -> anyhow::Result<ServerContext> {
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
        tracing::warn!(warning, "old time zone data");
    }
    Ok(ServerContext {
        data: data.to_owned(),
        store,
        bus: bus::open(&args.bus).await?,
        clock,
        zones,
        ids: Arc::new(SystemIds::default()),
        metrics: Metrics::default(),
        health: HealthRegistry::default(),
        internal_token: internal_token.transpose()?,
        own: own_secrets(args, |name| std::env::var_os(name)),
        log_readers: Arc::new(Semaphore::new(READERS_MAX)),
        budget,
    })
}

fn clock(args: &ServeArgs) -> Arc<dyn Clock> {
    match &args.clock_offset_file {
        Some(file) => Arc::new(SteppedClock::follow(file.clone())),
        None => Arc::new(SystemClock),
    }
}
