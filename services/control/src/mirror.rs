//! Rejects changes of a traffic split that mirror requests, which no gateway implements yet. Documents are
//! checked by `documents`.
//!
//! The engine supports mirrors, and stored ones are kept; a new one would be accepted, shown and
//! ignored. Remove this once gateways mirror requests.

use contract::events::Event;
use contract::problem::Finding;
use documents::MIRROR_UNSUPPORTED;
use domain::endpoint::Endpoint;
use domain::endpoint::commands::CommandRefusal;

/// Returns the events of a command, or an error if they start a mirror or raise its share.
pub fn refuse_new_shares(
    before: Option<&Endpoint>,
    events: Vec<Event>,
) -> Result<Vec<Event>, CommandRefusal> {
    let share = |name| {
        let shares = before.map(|endpoint| &endpoint.mirror);
        shares.and_then(|shares| shares.get(name)).copied()
    };
    let mirrors = events.iter().filter_map(|event| match event {
        Event::TrafficSet(set) => Some(&set.mirror),
        _ => None,
    });
    let increased = mirrors
        .flatten()
        .filter(|(name, percent)| **percent > share(name).unwrap_or(0));
    let findings: Vec<Finding> = increased
        .map(|(name, _)| Finding::new(format!("/mirror/{name}"), MIRROR_UNSUPPORTED))
        .collect();
    match findings.is_empty() {
        true => Ok(events),
        false => Err(CommandRefusal::Invalid(findings)),
    }
}
