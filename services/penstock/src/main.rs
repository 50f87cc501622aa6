//! The one binary of Penstock: `serve`, and the command line client.

mod cli;
mod client;
mod load;
mod serve;

/// Requests allocate and free small pieces all the time, on several threads.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    cli::main()
}
