//! The command line: what can be typed, and which function carries it out.
//!
//! Invariants: answers go to standard output, everything else to standard error; exit codes are
//! 0 done, 1 refused or failed, 2 usage, 3 server unreachable; every command's help has examples.

mod access;
mod apply;
mod autoscale;
mod chart;
mod decisions;
mod describe;
mod diff;
mod documents;
mod engine;
pub mod error;
mod events;
mod get;
mod heads;
mod kinds;
mod logs;
mod operate;
pub mod output;
mod run_load;
pub mod serve_args;
mod store;
mod top;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::client::Client;
use crate::client::config::{self, ConnectArgs};
use error::CliError;
use output::{Screen, print};

/// Penstock: autoscaling and observability for model endpoints
#[derive(Debug, Parser)]
#[command(
    name = "penstock",
    version,
    propagate_version = true,
    max_term_width = 100
)]
#[command(after_help = "Examples:
  penstock serve                                 start everything on this machine
  penstock apply -f deploy/examples/quickstart   make endpoints, deployments and their rules
  penstock top                                   watch load, instances and decisions

Server and credentials: --server, PENSTOCK_SERVER and PENSTOCK_TOKEN; else the file named by
PENSTOCK_CONFIG; else client.json in the default data directory, which `penstock serve` writes.
Exit codes: 0 done, 1 refused or failed, 2 usage, 3 server unreachable.")]
struct Cli {
    #[command(flatten)]
    connect: ConnectArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve_args::ServeArgs),
    Apply(apply::ApplyArgs),
    Validate(documents::ValidateArgs),
    Diff(diff::DiffArgs),
    Get(get::GetArgs),
    Describe(describe::DescribeArgs),
    Delete(get::DeleteArgs),
    Traffic(operate::TrafficArgs),
    Scale(operate::ScaleArgs),
    Pause(operate::PauseArgs),
    Resume(operate::ResumeArgs),
    Invoke(operate::InvokeArgs),
    Keys(operate::KeysArgs),
    Logs(logs::LogsArgs),
    Top(top::TopArgs),
    Load(crate::load::LoadArgs),
    Decisions(decisions::DecisionsArgs),
    Explain(decisions::ExplainArgs),
    Autoscale(autoscale::AutoscaleArgs),
    Access(access::AccessArgs),
    Events(events::EventsArgs),
    Store(store::StoreArgs),
    Completions(CompletionsArgs),
    Version(VersionArgs),
}

/// Print a completion script for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock completions bash > ~/.local/share/bash-completion/completions/penstock
  penstock completions zsh > ~/.zfunc/_penstock
  penstock completions fish > ~/.config/fish/completions/penstock.fish")]
struct CompletionsArgs {
    /// The shell that will read it
    shell: clap_complete::Shell,
}

/// Print the version, and that of the time zone data that schedules go by
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock version")]
struct VersionArgs {}

/// Parses the command line, carries it out and turns what happened into an exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing can be done if the terminal has gone.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let sentence = error.to_string();
            if !sentence.is_empty() {
                output::remark(&format!("penstock: {sentence}"));
            }
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(cli: Cli) -> Result<(), CliError> {
    match cli.command {
        Command::Serve(args) => Ok(crate::serve::run(args)?),
        Command::Load(args) => run_load::run(&cli.connect, &args),
        Command::Validate(args) => documents::validate(&args),
        Command::Store(args) => store::store(&args),
        Command::Completions(args) => completions(args.shell),
        Command::Version(_) => version(),
        Command::Autoscale(args) if args.is_offline() => {
            autoscale::preview_file(&args, Screen::of_process())
        }
        command => online(&cli.connect, command),
    }
}

fn version() -> Result<(), CliError> {
    let zones = domain::zones::ZoneData::bundled();
    print(&format!(
        "penstock {}\ntime zones {}",
        env!("CARGO_PKG_VERSION"),
        zones.version()
    ))
}

fn completions(shell: clap_complete::Shell) -> Result<(), CliError> {
    print(&completion_script(shell))
}

fn completion_script(shell: clap_complete::Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "penstock", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// Commands that talk to the server.
fn online(connect: &ConnectArgs, command: Command) -> Result<(), CliError> {
    let connection = config::resolve(connect, &config::Environment::read())?;
    let client = Client::new(connection)?;
    let screen = Screen::of_process();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CliError::Failed(format!("the client cannot start: {error}")))?;
    runtime.block_on(async {
        let done = carry_out(&client, command, screen).await;
        client.settle().await;
        done
    })
}

async fn carry_out(client: &Client, command: Command, screen: Screen) -> Result<(), CliError> {
    match command {
        Command::Apply(args) => apply::apply(client, &args).await,
        Command::Diff(args) => diff::diff(client, &args).await,
        Command::Get(args) => get::get(client, &args, screen).await,
        Command::Describe(args) => describe::describe(client, &args, screen).await,
        Command::Delete(args) => get::delete(client, &args).await,
        Command::Traffic(args) => operate::traffic(client, &args).await,
        Command::Scale(args) => operate::scale(client, &args, screen).await,
        Command::Pause(args) => operate::pause(client, &args).await,
        Command::Resume(args) => operate::resume(client, &args).await,
        Command::Invoke(args) => operate::invoke(client, &args).await,
        Command::Keys(args) => operate::keys(client, &args, screen).await,
        Command::Logs(args) => logs::logs(client, &args).await,
        Command::Top(args) => top::top(client, &args, screen).await,
        Command::Decisions(args) => decisions::decisions(client, &args, screen).await,
        Command::Explain(args) => decisions::explain(client, &args).await,
        Command::Autoscale(args) => autoscale::preview_live(client, &args, screen).await,
        Command::Access(args) => access::access(client, &args, screen).await,
        Command::Events(args) => events::events(client, &args).await,
        // Handled by `run`; listed so that a new command cannot be forgotten.
        Command::Serve(_)
        | Command::Load(_)
        | Command::Validate(_)
        | Command::Store(_)
        | Command::Completions(_)
        | Command::Version(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_tree_is_consistent() {
        Cli::command().debug_assert();
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
        check("penstock", &Cli::command());
    }

    #[test]
    fn every_argument_says_what_it_is() {
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
        let (mut command, mut blank) = (Cli::command(), Vec::new());
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
        examples(&Cli::command(), &mut found);
        assert!(found.len() > 40, "only {} examples", found.len());
        for example in found {
            let words = shell_words(&example);
            if let Err(error) = Cli::try_parse_from(&words) {
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
            let script = completion_script(shell);
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
            let error = Cli::try_parse_from(["penstock", command]).unwrap_err();
            assert_eq!(
                error.kind(),
                clap::error::ErrorKind::InvalidSubcommand,
                "{command}"
            );
        }
    }
}
