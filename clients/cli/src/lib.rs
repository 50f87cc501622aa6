//! The command line client: the commands that talk to a server, and their implementations. It depends on
//! no store, bus or service, so it builds in a fraction of the time of the full program.
//!
//! [`ClientCommand`] lists the commands. The program `penstock` adds `serve` and `store`; the program
//! `penstock-client` of this package has only these.
//!
//! Invariants: results go to standard output, everything else to standard error; exit codes are
//! 0 done, 1 refused or failed, 2 usage, 3 server unreachable; every command's help has examples.

mod access;
mod apply;
mod autoscale;
mod chart;
pub mod client;
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
mod names;
mod operate;
pub mod output;
mod run_load;
mod top;

use std::process::ExitCode;

use clap::Subcommand;

use client::Client;
use client::config::{self, ConnectArgs};
use error::CliError;
use output::{Screen, print};

/// The end of a program's help: how the server and the credentials are found, and exit codes.
pub const CONNECT_HELP: &str =
    "Server and credentials: --server, PENSTOCK_SERVER and PENSTOCK_TOKEN; else the file named by
PENSTOCK_CONFIG; else client.json in the default data folder, which `penstock serve` writes.
Exit codes: 0 done, 1 refused or failed, 2 usage, 3 server unreachable.";

/// Commands that need a server, or not even that.
#[derive(Debug, Subcommand)]
pub enum ClientCommand {
    Apply(apply::ApplyArgs),
    Validate(crate::documents::ValidateArgs),
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
    Load(load::LoadArgs),
    Decisions(decisions::DecisionsArgs),
    Explain(decisions::ExplainArgs),
    Autoscale(autoscale::AutoscaleArgs),
    Access(access::AccessArgs),
    Events(events::EventsArgs),
}

/// Print a completion script for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock completions bash > ~/.local/share/bash-completion/completions/penstock
  penstock completions zsh > ~/.zfunc/_penstock
  penstock completions fish > ~/.config/fish/completions/penstock.fish")]
pub struct CompletionsArgs {
    /// The shell that will read it
    shell: clap_complete::Shell,
}

impl CompletionsArgs {
    /// Prints the completion script of a program with these commands.
    ///
    /// # Errors
    ///
    /// When standard output cannot be written.
    pub fn run(&self, command: &mut clap::Command) -> Result<(), CliError> {
        print(&completion_script(self.shell, command))
    }
}

/// The completion script of a program with these commands.
pub fn completion_script(shell: clap_complete::Shell, command: &mut clap::Command) -> String {
    let (name, mut script) = (command.get_name().to_owned(), Vec::new());
    clap_complete::generate(shell, command, name, &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// Print the version, and that of the time zone data used for schedules
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock version")]
pub struct VersionArgs {}

impl VersionArgs {
    /// Prints both versions.
    ///
    /// # Errors
    ///
    /// When standard output cannot be written.
    pub fn run(&self) -> Result<(), CliError> {
        let zones = domain::zones::ZoneData::bundled();
        print(&format!(
            "penstock {}\ntime zones {}",
            env!("CARGO_PKG_VERSION"),
            zones.version()
        ))
    }
}

/// Parses the command line, passes it to `run`, and maps the result to an exit code.
pub fn main<C: clap::Parser>(run: impl FnOnce(C) -> Result<(), CliError>) -> ExitCode {
    let parsed = match C::try_parse() {
        Ok(parsed) => parsed,
        Err(error) => {
            // If standard error is closed there is nobody to report to.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    match run(parsed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let sentence = error.to_string();
            if !sentence.is_empty() {
                output::print_notice(&format!("penstock: {sentence}"));
            }
            ExitCode::from(error.exit_code())
        }
    }
}

/// Runs a command.
///
/// # Errors
///
/// An error message for the user, with its exit code.
pub fn run(connect: &ConnectArgs, command: ClientCommand) -> Result<(), CliError> {
    match command {
        ClientCommand::Load(args) => run_load::run(connect, &args),
        ClientCommand::Validate(args) => crate::documents::validate(&args),
        ClientCommand::Autoscale(args) if args.is_offline() => {
            autoscale::preview_file(&args, Screen::of_process())
        }
        command => run_online(connect, command),
    }
}

/// Runs a command that needs the server.
fn run_online(connect: &ConnectArgs, command: ClientCommand) -> Result<(), CliError> {
    let connection = config::resolve(connect, &config::Environment::read())?;
    let client = Client::new(connection)?;
    let screen = Screen::of_process();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| {
            CliError::Failed(format!("the client cannot start: {error}")).caused_by(error)
        })?;
    runtime.block_on(async {
        let done = dispatch(&client, command, screen).await;
        client.settle().await;
        done
    })
}

async fn dispatch(client: &Client, command: ClientCommand, screen: Screen) -> Result<(), CliError> {
    match command {
        ClientCommand::Apply(args) => apply::apply(client, &args).await,
        ClientCommand::Diff(args) => diff::diff(client, &args).await,
        ClientCommand::Get(args) => get::get(client, &args, screen).await,
        ClientCommand::Describe(args) => describe::describe(client, &args, screen).await,
        ClientCommand::Delete(args) => get::delete(client, &args).await,
        ClientCommand::Traffic(args) => operate::traffic(client, &args).await,
        ClientCommand::Scale(args) => operate::scale(client, &args).await,
        ClientCommand::Pause(args) => operate::pause(client, &args).await,
        ClientCommand::Resume(args) => operate::resume(client, &args).await,
        ClientCommand::Invoke(args) => operate::invoke(client, &args).await,
        ClientCommand::Keys(args) => operate::keys(client, &args, screen).await,
        ClientCommand::Logs(args) => logs::logs(client, &args).await,
        ClientCommand::Top(args) => top::top(client, &args, screen).await,
        ClientCommand::Decisions(args) => decisions::decisions(client, &args, screen).await,
        ClientCommand::Explain(args) => decisions::explain(client, &args).await,
        ClientCommand::Autoscale(args) => autoscale::preview_live(client, &args, screen).await,
        ClientCommand::Access(args) => access::access(client, &args, screen).await,
        ClientCommand::Events(args) => events::events(client, &args).await,
        // Handled by `run`; listed so that the match stays exhaustive.
        ClientCommand::Load(_) | ClientCommand::Validate(_) => Ok(()),
    }
}
