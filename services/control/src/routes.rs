//! Routes for the gateways: published when something changes, and all again from time to time, since
//! the bus may lose them.

use std::sync::Arc;
use std::time::Duration;

use bus::Bus;
use contract::ids::EndpointKey;
use domain::routes::{gone, route};
use domain::views::EndpointModel;

pub const REPUBLISH_EVERY: Duration = Duration::from_secs(30);

pub fn publish(bus: &dyn Bus, key: &EndpointKey, model: &EndpointModel) {
    let update = match &model.endpoint {
        Some(endpoint) => route(endpoint, &model.instances, model.position),
        None => gone(key, model.position),
    };
    bus.publish_route(Arc::new(update));
}
