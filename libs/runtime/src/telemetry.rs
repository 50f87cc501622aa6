//! Logging to stderr: text on a terminal, JSON otherwise.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Starts logging. `PENSTOCK_LOG` takes filters such as `info,gateway=debug`; the default is `info`.
/// A second call changes nothing.
pub fn start() {
    let filter = EnvFilter::try_from_env("PENSTOCK_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // A line that cannot be written, since the terminal is gone, is lost; reporting that on the same
        // terminal would panic.
        .log_internal_errors(false);
    // A test may have initialized logging already; that one stays.
    let _ = if std::io::stderr().is_terminal() {
        builder.try_init()
    } else {
        builder.json().try_init()
    };
}
