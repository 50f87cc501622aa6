//! Limits on the contents of documents, and the rules for shares and counts, which commands check too.

use super::{INSTANCES_MAX, Percentages};
use crate::problem::Finding;
use crate::time::Span;

/// Maximum number of labels of a resource.
pub const LABELS_MAX: usize = 32;
/// Maximum length of a label's key or value.
pub const LABEL_BYTES_MAX: usize = 63;
/// Maximum number of arguments of a command, including the program.
pub const COMMAND_ARGUMENTS_MAX: usize = 256;
/// Maximum length of an argument.
pub const ARGUMENT_BYTES_MAX: usize = 4096;
/// Maximum number of environment variables of an instance.
pub const ENV_MAX: usize = 256;
/// Maximum length of a variable's value.
pub const ENV_VALUE_BYTES_MAX: usize = 16 * 1024;
/// Maximum size of a spec. It is copied into events for each instance, which are limited to 256 KiB.
pub const SPEC_BYTES_MAX: usize = 64 * 1024;
/// Maximum time to the first byte of a response. Azure allows 180 s; large language models take longer.
pub const TIMEOUT_MAX: Span = Span::from_secs(3600);
/// Maximum duration of a request in total, and of a drain: a streamed response may go on for long after its
/// first byte.
pub const DURATION_MAX: Span = Span::from_secs(24 * 3600);
/// Maximum queue wait. Clients give up before that.
pub const QUEUE_WAIT_MAX: Span = Span::from_secs(300);
/// Maximum idle time of a connection. Servers seldom keep an idle connection for longer.
pub const KEEP_ALIVE_IDLE_MAX: Span = Span::from_secs(300);
/// Maximum of the concurrent requests per instance.
pub const CONCURRENT_REQUESTS_MAX: u32 = 10_000;
/// Minimum time that a start is given.
pub const STARTUP_TIMEOUT_MIN: Span = Span::from_secs(1);
/// Minimum time from the termination signal to the kill signal.
pub const TERMINATION_GRACE_MIN: Span = Span::from_secs(1);
/// Maximum time from the termination signal to the kill signal.
pub const TERMINATION_GRACE_MAX: Span = Span::from_secs(3600);
/// Maximum number of further ports of an instance.
pub const NAMED_PORTS_MAX: usize = 8;
/// Minimum time from one probe to the next.
pub const PROBE_PERIOD_MIN: Span = Span::from_millis(100);
/// Maximum of any span in a probe.
pub const PROBE_SPAN_MAX: Span = Span::from_secs(3600);
/// Maximum threshold of consecutive probes.
pub const PROBE_THRESHOLD_MAX: u32 = 10_000;
/// Maximum length of a probe's path.
pub const PROBE_PATH_BYTES_MAX: usize = 1024;
/// Maximum length of a path in `routes`.
pub const ROUTE_PATH_BYTES_MAX: usize = 1024;
/// Maximum length of the name of a gRPC service in a probe: one byte holds the length.
pub const PROBE_SERVICE_BYTES_MAX: usize = 120;
/// Maximum of an endpoint's request body limit: 1 GiB.
pub const REQUEST_BYTES_MAX: u64 = 1024 * 1024 * 1024;
/// Maximum length of the name of an instance type or region.
pub const INSTANCE_TYPE_BYTES_MAX: usize = 64;
/// Prefix of the environment variables that Penstock sets on instances, which adoption relies on.
pub const RESERVED_ENV_PREFIX: &str = "PENSTOCK_";

/// Checks shares of live traffic: each at most 100, in sum 0 or 100. Pointers begin with `base`.
pub fn traffic(shares: &Percentages, base: &str) -> Vec<Finding> {
    let mut findings = mirror(shares, base);
    let sum: u32 = shares.values().map(|share| u32::from(*share)).sum();
    if sum != 0 && sum != 100 && findings.is_empty() {
        let detail =
            format!("the shares sum to {sum}; make them sum to 100, or to 0 for no traffic");
        findings.push(Finding::new(base, detail));
    }
    findings
}

/// Checks shares of mirrored traffic: each at most 100. Pointers begin with `base`.
pub fn mirror(shares: &Percentages, base: &str) -> Vec<Finding> {
    let too_large = shares.iter().filter(|(_, share)| **share > 100);
    let finding = |(name, share)| {
        let detail = format!("{share} percent is too much; use 0 to 100");
        Finding::new(format!("{base}/{name}"), detail)
    };
    too_large.map(finding).collect()
}

/// Checks an instance count, from a document or a pin.
pub fn instances(count: u32, pointer: &str) -> Option<Finding> {
    (count > INSTANCES_MAX).then(|| {
        let detail = format!(
            "{count} instances are more than a deployment may have; use 0 to {INSTANCES_MAX}"
        );
        Finding::new(pointer, detail)
    })
}
