//! The one binary of Penstock: `serve`, and the command line client.

mod command_line;
mod serve;
mod store;

/// Requests allocate and free small pieces all the time, on several threads.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    // A child of `serve` that is to become an instance; nobody types this.
    if let Some(code) = backends::process::become_instance(std::env::args_os()) {
        return code;
    }
    command_line::main()
}
