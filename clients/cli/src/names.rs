//! Names as they are typed: `ENDPOINT`, `ENDPOINT/DEPLOYMENT`, and shares such as `blue=90`.

use contract::ids::{DeploymentRef, Name};

use super::error::CliError;
use crate::client::Client;

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
