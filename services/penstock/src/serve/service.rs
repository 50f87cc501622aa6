//! The names of the services.

use std::fmt;

/// The name of a service, as `--services` takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service(pub &'static str);

impl Service {
    pub const CONTROL: Self = Self("control");
    pub const GATEWAY: Self = Self("gateway");
    pub const AUTOSCALER: Self = Self("autoscaler");
    pub const ACTUATOR: Self = Self("actuator");
    pub const METER: Self = Self("meter");

    /// All services of this release; [`SERVICES`](super::services::SERVICES) has an entry for each, in this
    /// order.
    pub const ALL: &[Self] = &[
        Self::GATEWAY,
        Self::METER,
        Self::CONTROL,
        Self::AUTOSCALER,
        Self::ACTUATOR,
    ];
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}
