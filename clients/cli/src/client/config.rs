//! The server's address and the client's credentials.
//!
//! Order: `--server`, then `PENSTOCK_SERVER`; `PENSTOCK_TOKEN`; else the file named by
//! `PENSTOCK_CONFIG`; else `client.json` in the default data folder. Invariant: the token of a
//! file is sent only to the server that the file names.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The name of the file that `serve` writes into its data folder, mode 0600.
pub const CLIENT_FILE: &str = "client.json";

/// The contents of `client.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientFile {
    pub server: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

/// Connection flags, common to all commands.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ConnectArgs {
    /// The control API's address, such as http://127.0.0.1:7070
    #[arg(
        long,
        global = true,
        env = "PENSTOCK_SERVER",
        value_name = "URL",
        help_heading = "Connection"
    )]
    pub server: Option<String>,
}

/// Connection settings from the environment.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    pub token: Option<String>,
    pub config: Option<PathBuf>,
    pub data_dir: PathBuf,
}

impl Environment {
    pub fn read() -> Self {
        let text = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self {
            token: text("PENSTOCK_TOKEN"),
            config: text("PENSTOCK_CONFIG").map(PathBuf::from),
            data_dir: default_data_dir(),
        }
    }
}

/// `$XDG_DATA_HOME/penstock`, else `~/.local/share/penstock`; the same for `serve` and its clients.
pub fn default_data_dir() -> PathBuf {
    let absolute = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute("XDG_DATA_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
        .unwrap_or_else(|| PathBuf::from("."))
        .join("penstock")
}

/// Everything a client needs to talk to a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionSettings {
    pub server: String,
    pub gateway: Option<String>,
    pub token: Option<String>,
}

/// The connection cannot be determined.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file or an address cannot be used because of an error, which the sentence includes.
    #[error("{sentence}")]
    Unusable {
        sentence: String,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An argument or a file is invalid.
    #[error("{0}")]
    Invalid(String),
    /// No server is named, and none has left its address here.
    #[error("{0}")]
    NoServer(String),
}

/// Resolves the connection in the documented order.
pub fn resolve(
    args: &ConnectArgs,
    environment: &Environment,
) -> Result<ConnectionSettings, ConfigError> {
    let named = args.server.as_deref().filter(|server| !server.is_empty());
    let file = match (&environment.config, named) {
        (Some(path), _) => Some(read_file(path)?),
        (None, _) => read_default(&environment.data_dir.join(CLIENT_FILE), named.is_some())?,
    };
    let server = match (named, &file) {
        (Some(server), _) => normalize(server)?,
        (None, Some(file)) => normalize(&file.server)?,
        (None, None) => return Err(unknown_server(&environment.data_dir)),
    };
    // A file applies to its own server only; its token must not leak to another one.
    let file = file.filter(|file| normalize(&file.server).is_ok_and(|own| own == server));
    let (gateway, file_token) = file.map_or((None, None), |file| (file.gateway, file.token));
    Ok(ConnectionSettings {
        server,
        gateway,
        token: environment.token.clone().or(file_token),
    })
}

fn unknown_server(data_dir: &Path) -> ConfigError {
    ConfigError::NoServer(format!(
        "no server is known: there is no {}. Start one with `penstock serve`, or name it with --server or PENSTOCK_SERVER (and its client.json with PENSTOCK_CONFIG)",
        data_dir.join(CLIENT_FILE).display()
    ))
}

fn read_file(path: &Path) -> Result<ClientFile, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Unusable {
        sentence: format!(
            "the client's configuration {} cannot be read: {error}",
            path.display()
        ),
        source: error.into(),
    })?;
    serde_json::from_str(&text).map_err(|error| ConfigError::Unusable {
        sentence: format!(
            "{} is not a client configuration ({error}): it must be {{\"server\": \"http://…\", \"gateway\": \"http://…\", \"token\": \"…\"}}",
            path.display()
        ),
        source: error.into(),
    })
}

/// Reads the default file, which may be missing; if a server is named it may also be invalid.
fn read_default(path: &Path, server_named: bool) -> Result<Option<ClientFile>, ConfigError> {
    if !path.exists() {
        return Ok(None);
    }
    match read_file(path) {
        Ok(file) => Ok(Some(file)),
        Err(_) if server_named => Ok(None),
        Err(error) => Err(error),
    }
}

/// Normalizes a server URL: one spelling, without a trailing slash.
fn normalize(server: &str) -> Result<String, ConfigError> {
    let url = reqwest::Url::parse(server).map_err(|error| ConfigError::Unusable {
        sentence: format!(
            "`{server}` is not a server's address ({error}): write it as http://HOST:PORT"
        ),
        source: error.into(),
    })?;
    if url.scheme() != "http" {
        return Err(ConfigError::Invalid(format!(
            "`{server}` cannot be used: this client speaks plain http; write it as http://HOST:PORT"
        )));
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::CliError;

    fn file_in(dir: &Path, name: &str, server: &str, token: &str) -> PathBuf {
        let path = dir.join(name);
        let text =
            format!(r#"{{"server":"{server}","gateway":"http://127.0.0.1:9","token":"{token}"}}"#);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn named(server: &str) -> ConnectArgs {
        ConnectArgs {
            server: Some(server.into()),
        }
    }

    #[test]
    fn the_file_of_the_default_directory_is_the_last_resort() {
        let dir = tempfile::tempdir().unwrap();
        file_in(dir.path(), CLIENT_FILE, "http://a:1/", "default-token");
        let other = file_in(dir.path(), "other.json", "http://b:1", "other-token");
        let mut environment = Environment {
            data_dir: dir.path().to_owned(),
            ..Environment::default()
        };

        let found = resolve(&ConnectArgs::default(), &environment).unwrap();
        assert_eq!(found.server, "http://a:1");
        assert_eq!(found.token.as_deref(), Some("default-token"));
        assert_eq!(found.gateway.as_deref(), Some("http://127.0.0.1:9"));

        environment.config = Some(other);
        let found = resolve(&ConnectArgs::default(), &environment).unwrap();
        assert_eq!(found.server, "http://b:1");
        assert_eq!(found.token.as_deref(), Some("other-token"));

        environment.token = Some("mine".into());
        let found = resolve(&ConnectArgs::default(), &environment).unwrap();
        assert_eq!(found.token.as_deref(), Some("mine"));
    }

    #[test]
    fn a_token_from_a_file_is_sent_to_no_other_server() {
        let dir = tempfile::tempdir().unwrap();
        file_in(dir.path(), CLIENT_FILE, "http://a:1", "secret");
        let environment = Environment {
            data_dir: dir.path().to_owned(),
            ..Environment::default()
        };
        let elsewhere = resolve(&named("http://evil:1"), &environment).unwrap();
        assert_eq!(elsewhere.server, "http://evil:1");
        assert_eq!(elsewhere.token, None);
        let same = resolve(&named("http://a:1/"), &environment).unwrap();
        assert_eq!(same.token.as_deref(), Some("secret"));
    }

    #[test]
    fn without_any_server_the_error_says_how_to_start_or_name_one() {
        let dir = tempfile::tempdir().unwrap();
        let environment = Environment {
            data_dir: dir.path().to_owned(),
            ..Environment::default()
        };
        let error = CliError::from(resolve(&ConnectArgs::default(), &environment).unwrap_err());
        assert_eq!(error.exit_code(), 3);
        assert!(error.to_string().contains("penstock serve"), "{error}");
    }

    #[test]
    fn a_named_configuration_that_is_missing_is_a_usage_error() {
        let environment = Environment {
            config: Some("/nowhere/client.json".into()),
            ..Environment::default()
        };
        let error = CliError::from(resolve(&ConnectArgs::default(), &environment).unwrap_err());
        assert_eq!(error.exit_code(), 2);
        assert!(std::error::Error::source(&error).is_some(), "{error:?}");
        assert!(error.to_string().contains("/nowhere/client.json"));
    }
}
