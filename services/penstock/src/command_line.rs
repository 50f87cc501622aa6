//! The command line: the client's commands, plus `serve` and `store`.

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use cli::client::config::ConnectArgs;
use cli::error::CliError;
use cli::{ClientCommand, CompletionsArgs, VersionArgs};

use crate::serve::{self, ServeArgs};
use crate::store::{self, StoreArgs};

/// Penstock: autoscaling and observability for model endpoints
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
  penstock serve                                 start everything on this machine
  penstock apply -f deploy/examples/quickstart   create endpoints, deployments and their rules
  penstock top                                   watch load, instances and decisions

{}",
        cli::CONNECT_HELP
    )
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Box<ServeArgs>),
    #[command(flatten)]
    Client(ClientCommand),
    Store(StoreArgs),
    Completions(CompletionsArgs),
    Version(VersionArgs),
}

/// Parses and runs the command line; maps the result to an exit code.
pub fn main() -> ExitCode {
    cli::main(run)
}

fn run(Program { connect, command }: Program) -> Result<(), CliError> {
    match command {
        Command::Serve(args) => Ok(serve::run(*args)?),
        Command::Client(command) => cli::run(&connect, command),
        Command::Store(args) => store::store(&connect, &args),
        Command::Completions(args) => args.run(&mut Program::command()),
        Command::Version(args) => args.run(),
    }
}

#[cfg(test)]
mod tests {
    use cli::completion_script;

    use super::*;

    #[test]
    fn the_command_tree_is_consistent() {
        Program::command().debug_assert();
    }

    #[test]
    fn every_command_has_examples_in_its_help() {
        fn check(path: &str, command: &clap::Command) {
            for sub in command.get_subcommands() {
                if sub.get_name() == "help" {
                    continue;
                }
                let path = format!("{path} {}", sub.get_name());
                let help = sub.get_after_help().map(ToString::to_string);
                let help = help.unwrap_or_default();
                assert!(help.contains("Examples:"), "{path} has no examples");
                assert!(
                    help.contains(&path),
                    "the examples of {path} do not show it"
                );
                assert!(
                    sub.get_about().is_some(),
                    "{path} says nothing about itself"
                );
                check(&path, sub);
            }
        }
        check("penstock", &Program::command());
    }

    #[test]
    fn every_command_and_argument_has_help() {
        fn check(path: &str, command: &clap::Command, blank: &mut Vec<String>) {
            let help = |arg: &clap::Arg| arg.get_help().map(ToString::to_string);
            let shown = command.get_arguments().filter(|arg| !arg.is_hide_set());
            let silent = shown.filter(|arg| help(arg).unwrap_or_default().trim().is_empty());
            blank.extend(silent.map(|arg| format!("{path} {arg}")));
            for sub in command.get_subcommands() {
                let path = format!("{path} {}", sub.get_name());
                let about = sub.get_about().map(ToString::to_string);
                if about.unwrap_or_default().trim().is_empty() {
                    blank.push(path.clone());
                }
                check(&path, sub, blank);
            }
        }
        let (mut command, mut blank) = (Program::command(), Vec::new());
        command.build();
        check("penstock", &command, &mut blank);
        assert_eq!(blank, Vec::<String>::new(), "no help");
    }

    #[test]
    fn every_example_in_the_help_can_be_parsed() {
        fn examples(command: &clap::Command, found: &mut Vec<String>) {
            let help = command.get_after_help().map(ToString::to_string);
            let help = help.unwrap_or_default();
            let lines = help.lines().map(str::trim);
            found.extend(
                lines
                    .filter(|line| line.starts_with("penstock "))
                    .map(str::to_owned),
            );
            for sub in command.get_subcommands() {
                examples(sub, found);
            }
        }
        let mut found = Vec::new();
        examples(&Program::command(), &mut found);
        assert!(found.len() > 40, "only {} examples", found.len());
        for example in found {
            let words = shell_words(&example);
            if let Err(error) = Program::try_parse_from(&words) {
                panic!("{example}: {error}");
            }
        }
    }

    /// Words up to a comment (two spaces), a pipe or a redirection, with single quotes.
    fn shell_words(line: &str) -> Vec<String> {
        let (mut words, mut word, mut quoted) = (Vec::new(), String::new(), false);
        let ends = [" > ", " < ", " | "];
        let end = ends.iter().filter_map(|end| line.find(end)).min();
        let line = &line[..end.unwrap_or(line.len())];
        let line = match line.contains('\'') {
            true => line,
            false => line.split("   ").next().unwrap(),
        };
        for c in line.chars() {
            match c {
                '\'' => quoted = !quoted,
                ' ' if !quoted => {
                    if !word.is_empty() {
                        words.push(std::mem::take(&mut word));
                    }
                }
                c => word.push(c),
            }
        }
        words.push(word);
        words
    }

    #[test]
    fn completions_name_every_command_in_each_shell() {
        use clap_complete::Shell;
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = completion_script(shell, &mut Program::command());
            for command in ["apply", "traffic", "explain", "completions"] {
                assert!(script.contains(command), "{shell}: {command}");
            }
        }
    }

    #[test]
    fn commands_of_later_releases_are_not_offered() {
        for command in [
            "backtest", "sla", "cost", "shadow", "rollout", "batch", "import",
        ] {
            let error = Program::try_parse_from(["penstock", command]).unwrap_err();
            assert_eq!(
                error.kind(),
                clap::error::ErrorKind::InvalidSubcommand,
                "{command}"
            );
        }
    }
}
