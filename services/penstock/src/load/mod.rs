//! `penstock load`: the open-loop load generator.

/// Send load to an endpoint at a given rate and measure what comes back
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock load iris --rate 50 --for 1m --data '{\"x\": [1, 2, 3]}'")]
pub struct LoadArgs {}

pub fn run(_args: LoadArgs) -> anyhow::Result<()> {
    anyhow::bail!("this build has no load generator; use a build that has it")
}
