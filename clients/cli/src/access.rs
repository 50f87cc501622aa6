//! `access`: tokens with a name, a role and an expiry.

use contract::ids::Name;
use contract::time::{Span, Timestamp};
use serde_json::json;

use super::error::CliError;
use super::kinds::{Kind, table};
use super::names::name;
use super::output::{Format, Screen, items, print, print_notice, text, yaml};
use crate::client::Client;

/// Grant, revoke and list tokens
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock access grant ci --role operator --expires 90d
  penstock access list
  penstock access revoke ci")]
pub struct AccessArgs {
    #[command(subcommand)]
    command: AccessCommand,
}

#[derive(Debug, clap::Subcommand)]
enum AccessCommand {
    Grant(GrantArgs),
    Revoke(RevokeArgs),
    List(ListArgs),
}

/// Create a token; it is shown only once
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock access grant ci --role operator --expires 90d
  penstock access grant grafana --role viewer
  penstock access grant ci --role operator -o json | jq -r .token

An operator's documents run programs on the nodes, with the user and the permissions of the server.
Grant operator only to people whom you would give a shell there.")]
struct GrantArgs {
    /// The token's name
    #[arg(value_parser = name)]
    name: Name,
    /// What the token permits
    #[arg(long, value_enum)]
    role: Role,
    /// A duration (90d) or an instant (RFC 3339); never by default
    #[arg(long, value_name = "TIME", value_parser = super::decisions::since)]
    expires: Option<String>,
    /// Output format
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Role {
    /// Read access
    Viewer,
    /// Read access, and changes to endpoints, deployments and rules: runs programs as the server's user
    Operator,
    /// Everything, tokens and keys included
    Admin,
}

/// Revoke a token
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock access revoke ci")]
struct RevokeArgs {
    /// The token, as `penstock access list` shows it
    #[arg(value_parser = name)]
    name: Name,
}

/// Show who has access
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock access list
  penstock access list -o json")]
struct ListArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

pub async fn access(client: &Client, args: &AccessArgs, screen: Screen) -> Result<(), CliError> {
    match &args.command {
        AccessCommand::Grant(args) => grant(client, args, screen.now).await,
        AccessCommand::Revoke(args) => {
            client.delete(&["v1", "access", args.name.as_str()]).await?;
            print(&format!("token {} revoked", args.name))
        }
        AccessCommand::List(args) => list(client, args, screen).await,
    }
}

async fn grant(client: &Client, args: &GrantArgs, now: Timestamp) -> Result<(), CliError> {
    let role = match args.role {
        Role::Viewer => "viewer",
        Role::Operator => "operator",
        Role::Admin => "admin",
    };
    let mut body = json!({"name": args.name, "role": role});
    if let Some(expires) = &args.expires {
        body["expires"] = json!(instant(expires, now));
    }
    let answer = client.post(&["v1", "access"], &body).await?;
    match args.output {
        Format::Json => print(&answer.text),
        Format::Yaml => print(&yaml(&answer.json()?)),
        Format::Table => {
            print_notice(&format!(
                "token {} granted as {role}; save it now, it cannot be shown again",
                args.name
            ));
            print(&text(&answer.json()?, "/token"))
        }
    }
}

/// An instant as given, or a duration from now.
fn instant(text: &str, now: Timestamp) -> String {
    match text.parse::<Span>() {
        Ok(span) => (now + span).to_string(),
        Err(_) => text.to_owned(),
    }
}

async fn list(client: &Client, args: &ListArgs, screen: Screen) -> Result<(), CliError> {
    let answer = client.get(&["v1", "access"], &[]).await?;
    match args.output {
        Format::Json => print(&answer.text),
        Format::Yaml => print(&yaml(&answer.json()?)),
        Format::Table => {
            let body = answer.json()?;
            print(&table(Kind::Access, &items(&body), screen.now).render(screen.tty))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expiry_is_a_duration_from_now_or_an_instant() {
        let now: Timestamp = "2026-10-10T12:00:00.000Z".parse().unwrap();
        assert_eq!(instant("2d", now), "2026-10-12T12:00:00.000Z");
        assert_eq!(instant("2027-01-01T00:00:00Z", now), "2027-01-01T00:00:00Z");
    }
}
