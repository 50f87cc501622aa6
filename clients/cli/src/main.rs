//! `penstock-client`: the command line client without the server, for client machines.

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use cli::client::config::ConnectArgs;
use cli::error::CliError;
use cli::{ClientCommand, CompletionsArgs, VersionArgs};

/// Penstock: autoscaling and observability for model endpoints (the client alone)
#[derive(Debug, Parser)]
#[command(
    name = "penstock",
    version,
    propagate_version = true,
    max_term_width = 100,
    after_help = help()
)]
struct Program {
    #[command(flatten)]
    connect: ConnectArgs,
    #[command(subcommand)]
    command: Command,
}

fn help() -> String {
    format!(
        "Examples:
  penstock apply -f deploy/examples/quickstart   create endpoints, deployments and their rules
  penstock top                                   watch load, instances and decisions

{}",
        cli::CONNECT_HELP
    )
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Client(Box<ClientCommand>),
    Completions(CompletionsArgs),
    Version(VersionArgs),
}

fn main() -> ExitCode {
    cli::main(|Program { connect, command }| -> Result<(), CliError> {
        match command {
            Command::Client(command) => cli::run(&connect, *command),
            Command::Completions(args) => args.run(&mut Program::command()),
            Command::Version(args) => args.run(),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_tree_is_consistent() {
        Program::command().debug_assert();
    }

    #[test]
    fn commands_that_need_the_log_are_not_offered() {
        for command in ["serve", "store"] {
            let error = Program::try_parse_from(["penstock", command]).unwrap_err();
            assert_eq!(
                error.kind(),
                clap::error::ErrorKind::InvalidSubcommand,
                "{command}"
            );
        }
    }
}
