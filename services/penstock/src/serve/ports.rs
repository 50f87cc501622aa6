//! Opens what all services of a process share: the store and the bus that its flags name.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use bus::{Bus, LocalBus};
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
    if url == "local" {
        return Ok(OpenBus {
            bus: LocalBus::new(),
            is_shared: false,
        });
    }
    if url.starts_with("kafka://") {
        return Ok(OpenBus {
            bus: open_kafka(url).await?,
            is_shared: true,
        });
    }
    // The URL may hold a password, so it is not repeated.
    anyhow::bail!("--bus names no bus of this version; use local, or kafka://HOST:PORT/PREFIX")
}

#[cfg(feature = "kafka")]
async fn open_kafka(url: &str) -> anyhow::Result<Arc<dyn Bus>> {
    let bus = bus::KafkaBus::open(url.parse().context("--bus")?)
        .await
        .context("cannot open the bus")?;
    Ok(bus)
}

#[cfg(not(feature = "kafka"))]
async fn open_kafka(_url: &str) -> anyhow::Result<Arc<dyn Bus>> {
    anyhow::bail!(
        "--bus kafka://… is not available: this binary was built without the feature `kafka`"
    )
}
