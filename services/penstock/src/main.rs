//! The one binary of Penstock: `serve`, and the command line client.

mod cli;
mod client;
mod load;
mod serve;

fn main() -> std::process::ExitCode {
    cli::main()
}
