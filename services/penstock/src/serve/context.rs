//! What the services of a process share, and where it serves.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use bus::Bus;
use contract::own_secrets::OwnSecrets;
use domain::zones::ZoneData;
use runtime::clock::Clock;
use runtime::health::HealthRegistry;
use runtime::ids::Ids;
use runtime::metrics::Metrics;
use runtime::token::InternalToken;
use serde_json::{Map, Value};
use store::Store;
use tokio::sync::Semaphore;

use super::descriptor_budget::DescriptorBudget;

/// What the services of a process share.
pub struct ServerContext {
    pub data: PathBuf,
    /// `None` in a process that runs only gateways.
    pub store: Option<Store>,
    pub bus: Arc<dyn Bus>,
    pub clock: Arc<dyn Clock>,
    pub ids: Arc<dyn Ids>,
    pub metrics: Metrics,
    pub health: HealthRegistry,
    pub internal_token: Option<InternalToken>,
    pub zones: ZoneData,
    /// This process's own secrets, which documents must not reference.
    pub own: OwnSecrets,
    /// Permits for readers of local instance logs.
    pub log_readers: Arc<Semaphore>,
    pub budget: DescriptorBudget,
}

impl ServerContext {
    pub fn store(&self) -> anyhow::Result<Store> {
        self.store
            .clone()
            .context("a service that needs the store was started without one")
    }
}

/// The URLs of this process; only of what it serves.
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    pub control: Option<String>,
    pub gateway: Option<String>,
    /// Control serves health and metrics too, so this is control's URL if control runs here.
    pub admin: Option<String>,
}

impl Addresses {
    pub fn to_json(&self) -> Value {
        let urls_served = [
            ("control", &self.control),
            ("gateway", &self.gateway),
            ("admin", &self.admin),
        ];
        let urls_served = urls_served
            .into_iter()
            .filter_map(|(name, url)| Some((name.to_owned(), Value::String(url.clone()?))));
        Value::Object(urls_served.collect::<Map<_, _>>())
    }
}
