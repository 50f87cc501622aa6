//! The reactor: appends the state changes of endpoints that follow from other events, such as Succeeded,
//! Failed and the end of a deletion.

use contract::ids::EndpointKey;
use contract::log::Actor;
use contract::time::Timestamp;
use domain::members::Members;
use domain::settle::settle;
use domain::views::EndpointModel;
use store::StoreError;

use crate::commands::Commands;

/// Level-triggered: called after every record about the endpoint, and every second.
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
