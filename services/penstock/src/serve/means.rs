//! The file descriptors of this process, and what each service may take of them.

use std::sync::Arc;
use std::time::Duration;

use runtime::descriptors::{Descriptors, Limit, Needs, Shares, raise};

use super::args::ServeArgs;

/// Connections of control that are so few that those at rest are in the way.
const NARROW: usize = 64;
const NARROW_HEAD: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub struct Means {
    limit: Limit,
    pub shares: Shares,
    pub descriptors: Descriptors,
}

impl Means {
    /// Raises the limit, and refuses one with which nothing could be served.
    pub fn of(args: &ServeArgs) -> anyhow::Result<Self> {
        let limit = raise();
        let store = args.store.as_deref().unwrap_or_default();
        let needs = Needs {
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            shared_bus: args.bus != "local" || store.starts_with("postgres"),
        };
        let shares = Shares::of(limit.now, needs)?;
        tracing::debug!(?limit, ?shares, "file descriptors");
        Ok(Self {
            limit,
            shares,
            descriptors: Descriptors::new(limit.now, shares.rest),
        })
    }

    /// With fewer connections where there are not descriptors for all; then none may rest for long,
    /// since others wait for it.
    pub fn limits(&self, limits: control::Limits) -> control::Limits {
        let is_narrow = self.shares.control < NARROW;
        control::Limits {
            head: match is_narrow {
                true => limits.head.min(NARROW_HEAD),
                false => limits.head,
            },
            connections: limits.connections.min(self.shares.control),
            streams: limits.streams.min(self.shares.streams),
            ..limits
        }
    }

    /// Instances get the limit that this process was started with.
    pub fn of_instances(&self) -> backends::process::Means {
        let Limit { now, original } = self.limit;
        let descriptors = self.descriptors.clone();
        backends::process::Means {
            instance_descriptors: (now != original).then_some(original),
            probes_max: self.shares.probes,
            hands_max: self.shares.hands,
            held: self.descriptors.held(),
            held_max: self.shares.instances_max(),
            listener: Arc::new(move |what, error| descriptors.lack(what, error)),
        }
    }
}
