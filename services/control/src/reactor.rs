//! The reactor: appends what follows from the state of endpoints and instances by itself, such as
//! Succeeded, Failed and the end of what is deleted.

use contract::ids::EndpointKey;
use contract::log::Actor;
use contract::time::Timestamp;
use domain::endpoint::settle::settle;
use domain::members::Members;
use domain::views::EndpointModel;
use store::StoreError;

use crate::commands::Commands;

/// Level-triggered: called again whenever a record about the endpoint arrives, and every second.
pub async fn react(
    commands: &Commands,
    key: &EndpointKey,
    model: &EndpointModel,
    members: &Members,
    now: Timestamp,
) -> Result<(), StoreError> {
    let Some(endpoint) = &model.endpoint else {
        return Ok(());
    };
    let events = settle(endpoint, &model.instances, &model.granted(), members, now);
    if events.is_empty() {
        return Ok(());
    }
    let actor = Actor::service("control");
    commands
        .settle(&key.endpoint(), model.version, events, &actor)
        .await
}
