//! Kinds of resources and their command line names, and `ENDPOINT/DEPLOYMENT` references.

use clap::ValueEnum;
use clap::builder::{EnumValueParser, PossibleValue, TypedValueParser};
use clap::error::ErrorKind;
use contract::ids::{DeploymentRef, Name};

use super::error::CliError;
use crate::client::Client;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    #[value(name = "endpoints", aliases = ["endpoint", "ep"])]
    Endpoints,
    #[value(name = "deployments", aliases = ["deployment", "dep"])]
    Deployments,
    #[value(name = "autoscales", aliases = ["autoscale", "as"])]
    Autoscales,
    #[value(name = "instances", aliases = ["instance", "inst"])]
    Instances,
    #[value(name = "decisions", aliases = ["decision"])]
    Decisions,
    #[value(name = "access", aliases = ["tokens", "token"])]
    Access,
}

impl Kind {
    /// The singular.
    pub const fn singular(self) -> &'static str {
        match self {
            Self::Endpoints => "endpoint",
            Self::Deployments => "deployment",
            Self::Autoscales => "autoscale",
            Self::Instances => "instance",
            Self::Decisions => "decision",
            Self::Access => "token",
        }
    }
}

/// For clap: a kind, with a hint if a name was typed in its place.
#[derive(Clone, Debug)]
pub struct KindParser {
    /// `get`, `describe` or `delete`.
    pub command: &'static str,
}

impl TypedValueParser for KindParser {
    type Value = Kind;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<Kind, clap::Error> {
        let known = EnumValueParser::<Kind>::new().parse_ref(command, argument, value);
        let typed = value.to_string_lossy();
        known.map_err(|error| match typed.parse::<Scope>() {
            Ok(scope) if scope.deployment.is_some() => self.hint(command, &typed, "deployment"),
            _ => error,
        })
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let kinds = Kind::value_variants().iter();
        Some(Box::new(kinds.filter_map(ValueEnum::to_possible_value)))
    }
}

impl KindParser {
    fn hint(&self, command: &clap::Command, typed: &str, kind: &str) -> clap::Error {
        let message = format!(
            "`{typed}` is a name, and a kind comes before it: write `penstock {} {kind} {typed}`\n",
            self.command
        );
        clap::Error::raw(ErrorKind::InvalidValue, message).with_cmd(command)
    }
}

/// `ENDPOINT` or `ENDPOINT/DEPLOYMENT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    pub endpoint: Name,
    pub deployment: Option<Name>,
}

impl std::str::FromStr for Scope {
    type Err = contract::ids::InvalidName;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            None => Ok(Self {
                endpoint: text.parse()?,
                deployment: None,
            }),
            Some(_) => {
                let of: DeploymentRef = text.parse()?;
                Ok(Self {
                    endpoint: of.endpoint,
                    deployment: Some(of.deployment),
                })
            }
        }
    }
}

impl std::fmt::Display for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.deployment {
            Some(deployment) => write!(f, "{}/{deployment}", self.endpoint),
            None => write!(f, "{}", self.endpoint),
        }
    }
}

impl Scope {
    /// Fails as `get` does if there is no such endpoint or deployment, since a list of its resources would
    /// merely be empty.
    pub async fn must_exist(&self, client: &Client) -> Result<(), CliError> {
        let endpoint = ["v1", "endpoints", self.endpoint.as_str()];
        client.get(&endpoint, &[]).await?;
        if let Some(deployment) = &self.deployment {
            let path = [&endpoint[..], &["deployments", deployment.as_str()]].concat();
            client.get(&path, &[]).await?;
        }
        Ok(())
    }
}

/// For clap: `ENDPOINT/DEPLOYMENT`, with an error that says so.
pub fn deployment_ref(text: &str) -> Result<DeploymentRef, String> {
    if !text.contains('/') {
        return Err(format!(
            "write the deployment's full name, ENDPOINT/DEPLOYMENT, such as {text}/blue"
        ));
    }
    text.parse().map_err(|error| format!("{error}"))
}

/// For clap: an endpoint's name.
pub fn name(text: &str) -> Result<Name, String> {
    text.parse().map_err(|error| format!("{error}"))
}

/// The full name of a deployment, for commands that need one.
pub fn full_name(name: &str) -> Result<DeploymentRef, CliError> {
    deployment_ref(name).map_err(CliError::Usage)
}

/// For clap: `blue=90`.
pub fn share(text: &str) -> Result<(Name, u8), String> {
    let wrong = || format!("`{text}` is not a share: write DEPLOYMENT=PERCENT, such as blue=90");
    let (name, percent) = text.split_once('=').ok_or_else(wrong)?;
    let name: Name = name.parse().map_err(|error| format!("{error}"))?;
    let percent: u8 = percent.trim_end_matches('%').parse().map_err(|_| wrong())?;
    if percent > 100 {
        return Err(wrong());
    }
    Ok((name, percent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn get_supports_every_kind_of_document() {
        for kind in contract::resources::KINDS {
            let word = kind.to_lowercase();
            let is_known = Kind::value_variants()
                .iter()
                .any(|known| known.singular() == word);
            assert!(
                is_known,
                "`penstock get` does not know `{word}`: add it to `Kind`"
            );
        }
    }

    #[test]
    fn a_share_is_a_name_and_a_percentage() {
        assert_eq!(share("blue=90").unwrap(), ("blue".parse().unwrap(), 90));
        assert_eq!(share("blue=90%").unwrap().1, 90);
        for bad in ["blue", "blue=", "blue=101", "=5", "Blue=5", "blue=-1"] {
            assert!(share(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_deployment_needs_its_endpoint() {
        assert!(deployment_ref("iris").unwrap_err().contains("iris/blue"));
        assert_eq!(
            deployment_ref("iris/blue").unwrap().to_string(),
            "iris/blue"
        );
    }
}
