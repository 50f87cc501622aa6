//! Opens what all services of a process share: the store and the bus that its flags name.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use bus::Bus;
use store::Store;

use crate::cli::serve_args::ServeArgs;

pub async fn open_store(args: &ServeArgs, data: &Path) -> anyhow::Result<Store> {
    let url = args
        .store
        .clone()
        .unwrap_or_else(|| format!("sqlite:{}", data.join("penstock.db").display()));
    Store::open(&url)
        .await
        .context("cannot open the event store")
}

/// The bus, and whether it lives outside of this process.
pub struct OpenBus {
    pub bus: Arc<dyn Bus>,
    pub is_shared: bool,
}

pub async fn open_bus(url: &str) -> anyhow::Result<OpenBus> {
    Ok(OpenBus {
        bus: bus::open(url).await?,
        is_shared: url != "local",
    })
}
