//! Limits of what a document may hold, and the rules on shares and counts, which commands keep as well.

use super::{INSTANCES_MAX, Percentages};
use crate::problem::Finding;
use crate::time::Span;

/// Most labels of a resource.
pub const LABELS_MAX: usize = 32;
/// Longest key or value of a label.
pub const LABEL_BYTES_MAX: usize = 63;
/// Most words of a command, the program included.
pub const COMMAND_ARGUMENTS_MAX: usize = 256;
/// Longest of them.
pub const ARGUMENT_BYTES_MAX: usize = 4096;
/// Most variables of an instance.
pub const ENV_MAX: usize = 256;
/// Longest value of one.
pub const ENV_VALUE_BYTES_MAX: usize = 16 * 1024;
/// A spec is copied into events about each of its instances, and those have a limit of 256 KiB.
pub const SPEC_BYTES_MAX: usize = 64 * 1024;
/// Azure allows 180 s; large language models take longer.
pub const TIMEOUT_MAX: Span = Span::from_secs(3600);
/// Clients give up before.
pub const QUEUE_WAIT_MAX: Span = Span::from_secs(300);
/// Servers behind a gateway seldom keep a silent connection for longer.
pub const KEEP_ALIVE_IDLE_MAX: Span = Span::from_secs(300);
/// Most requests at once that an instance may be said to take.
pub const CONCURRENT_REQUESTS_MAX: u32 = 10_000;
/// Shortest time from one probe to the next.
pub const PROBE_PERIOD_MIN: Span = Span::from_millis(100);
/// Longest span in a probe.
pub const PROBE_SPAN_MAX: Span = Span::from_secs(3600);
/// Most probes in a row that may be asked for.
pub const PROBE_THRESHOLD_MAX: u32 = 10_000;
/// Longest path of a probe.
pub const PROBE_PATH_BYTES_MAX: usize = 1024;
/// Largest body that an endpoint may be told to take: 1 GiB.
pub const REQUEST_BYTES_MAX: u64 = 1024 * 1024 * 1024;
/// Longest name of an instance type, and of a region.
pub const INSTANCE_TYPE_BYTES_MAX: usize = 64;
/// Environment that Penstock itself gives to instances; adoption rests on it.
pub const RESERVED_ENV_PREFIX: &str = "PENSTOCK_";

/// Shares of live traffic: each at most 100, together 0 or 100. Pointers begin with `base`.
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

/// Shares of copied traffic: each at most 100. Pointers begin with `base`.
pub fn mirror(shares: &Percentages, base: &str) -> Vec<Finding> {
    let too_large = shares.iter().filter(|(_, share)| **share > 100);
    let finding = |(name, share)| {
        let detail = format!("{share} percent is more than the whole; use 0 to 100");
        Finding::new(format!("{base}/{name}"), detail)
    };
    too_large.map(finding).collect()
}

/// A count of instances, written in a document or set by hand.
pub fn instances(count: u32, pointer: &str) -> Option<Finding> {
    (count > INSTANCES_MAX).then(|| {
        let detail = format!(
            "{count} instances are more than a deployment may have; use 0 to {INSTANCES_MAX}"
        );
        Finding::new(pointer, detail)
    })
}
