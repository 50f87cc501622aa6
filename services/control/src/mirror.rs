//! What is refused because no gateway carries it out yet.
//!
//! The engine knows mirrors, and stored ones stay as they are; a new one would be accepted, shown and
//! ignored. This goes when gateways copy requests.

use contract::events::Event;
use contract::problem::Finding;
use domain::endpoint::Endpoint;
use domain::endpoint::commands::{Command, Refusal};

const NOT_YET: &str =
    "requests are not copied to other deployments yet: leave `mirror` out, or set the share to 0";

/// The events of a command, unless they would begin to mirror or mirror more.
pub fn refuse_new_shares(
    before: Option<&Endpoint>,
    command: &Command,
    events: Vec<Event>,
) -> Result<Vec<Event>, Refusal> {
    let base = match command {
        Command::PutEndpoint { .. } => "/spec/mirror",
        _ => "/mirror",
    };
    let share = |name| {
        let shares = before.map(|endpoint| &endpoint.mirror);
        shares.and_then(|shares| shares.get(name)).copied()
    };
    let mirrors = events.iter().filter_map(|event| match event {
        Event::TrafficSet(set) => Some(&set.mirror),
        _ => None,
    });
    let more = mirrors
        .flatten()
        .filter(|(name, percent)| **percent > share(name).unwrap_or(0));
    let findings: Vec<Finding> = more
        .map(|(name, _)| Finding::new(format!("{base}/{name}"), NOT_YET))
        .collect();
    match findings.is_empty() {
        true => Ok(events),
        false => Err(Refusal::Invalid(findings)),
    }
}
