//! `penstock serve`: wires the services into one process.

use crate::cli::serve_args::ServeArgs;

pub fn run(_args: ServeArgs) -> anyhow::Result<()> {
    anyhow::bail!("this build has no services to run; use a build that has them")
}
