//! The one binary of Penstock: `serve`, and the command line client.

mod command_line;
mod serve;
mod store;

/// Requests make many small allocations on several threads.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    // A child of `serve` that becomes an instance; not for interactive use.
    if let Some(code) = backends::process::become_instance(std::env::args_os()) {
        return code;
    }
    command_line::main()
}
