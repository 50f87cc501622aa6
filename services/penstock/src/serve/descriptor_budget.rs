//! The file descriptors of this process, and the share of each service.

use std::sync::Arc;
use std::time::Duration;

use runtime::descriptors::{Descriptors, Limit, Needs, Shares, raise_limit};

use super::args::ServeArgs;

/// With fewer connections than this for control, idle ones must be closed early.
const FEW_CONNECTIONS: usize = 64;
const FEW_CONNECTIONS_HEAD_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
/// The descriptor limit, divided among the services.
pub struct DescriptorBudget {
    limit: Limit,
    pub shares: Shares,
    pub descriptors: Descriptors,
}

impl DescriptorBudget {
    /// Raises the descriptor limit and divides it among the services.
    ///
    /// # Errors
    /// If the limit is too low to serve anything.
    pub fn of(args: &ServeArgs) -> anyhow::Result<Self> {
        let limit = raise_limit();
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

    /// Reduces the limits to what the descriptors allow. With few connections the head timeout is shorter,
    /// since others wait for the idle ones.
    pub fn limits(&self, limits: control::Limits) -> control::Limits {
        let is_scarce = self.shares.control < FEW_CONNECTIONS;
        control::Limits {
            head: match is_scarce {
                true => limits.head.min(FEW_CONNECTIONS_HEAD_TIMEOUT),
                false => limits.head,
            },
            connections: limits.connections.min(self.shares.control),
            streams: limits.streams.min(self.shares.streams),
            ..limits
        }
    }

    /// The budget of the process backend; instances get the limit that this process was started with.
    pub fn for_instances(&self) -> backends::process::ResourceLimits {
        let Limit { now, original } = self.limit;
        let descriptors = self.descriptors.clone();
        backends::process::ResourceLimits {
            instance_descriptors: (now != original).then_some(original),
            probes_max: self.shares.probes,
            blocking_max: self.shares.file_tasks,
            held_descriptors: self.descriptors.held(),
            held_descriptors_max: self.shares.instances_max(),
            listener: Arc::new(move |what, error| descriptors.record_shortage(what, error)),
        }
    }
}
