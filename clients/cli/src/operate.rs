//! Day-to-day commands: traffic, manual pins, pauses, keys, and a request to a model.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use contract::ids::{DeploymentRef, Name};
use contract::time::Span;
use serde_json::{Value, json};

use super::apply::split_body;
use super::error::CliError;
use super::names::{deployment_ref, name, share};
use super::output::{Format, Screen, Table, print, print_notice, shares, text, yaml};
use crate::client::{Client, root_cause};

/// Show or set which share of the requests each deployment gets
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock traffic iris                               show it
  penstock traffic iris blue=90 green=10

Shares are percent and sum to 100 (or to 0: no traffic). Deployments left out get none.")]
pub struct TrafficArgs {
    /// The endpoint whose traffic it is
    #[arg(value_parser = name)]
    endpoint: Name,
    /// DEPLOYMENT=PERCENT …
    #[arg(value_name = "DEPLOYMENT=PERCENT", value_parser = share)]
    shares: Vec<(Name, u8)>,
    /// DEPLOYMENT=PERCENT of live requests that are copied to it; not implemented yet, and refused
    #[arg(long, value_name = "DEPLOYMENT=PERCENT", value_parser = share)]
    mirror: Vec<(Name, u8)>,
    /// Stop copying requests
    #[arg(long, conflicts_with = "mirror")]
    no_mirror: bool,
}

/// Pin a deployment to a number of instances, or release it
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock scale iris/blue --instances 5 --for 1h
  penstock scale iris/blue --instances 0              until released
  penstock scale iris/blue --release                  the rules decide again")]
#[command(group(clap::ArgGroup::new("what").required(true).args(["instances", "release"])))]
pub struct ScaleArgs {
    /// ENDPOINT/DEPLOYMENT
    #[arg(value_parser = deployment_ref)]
    deployment: DeploymentRef,
    /// The number of instances, whatever the rules say
    #[arg(long, value_name = "N")]
    instances: Option<u32>,
    /// How long; until released by default
    #[arg(long = "for", value_name = "DURATION", requires = "instances")]
    duration: Option<Span>,
    /// End the pin
    #[arg(long)]
    release: bool,
}

/// Stop the rules of a deployment from changing its number of instances
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock pause iris/blue
  penstock pause iris/blue --scale-in                 it may still grow")]
pub struct PauseArgs {
    /// ENDPOINT/DEPLOYMENT
    #[arg(value_parser = deployment_ref)]
    deployment: DeploymentRef,
    /// Only scaling in
    #[arg(long)]
    scale_in: bool,
    /// Only scaling out
    #[arg(long)]
    scale_out: bool,
}

/// Let the rules of a deployment act again
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock resume iris/blue
  penstock resume iris/blue --scale-out")]
pub struct ResumeArgs {
    /// ENDPOINT/DEPLOYMENT
    #[arg(value_parser = deployment_ref)]
    deployment: DeploymentRef,
    /// Only scaling in
    #[arg(long)]
    scale_in: bool,
    /// Only scaling out
    #[arg(long)]
    scale_out: bool,
}

/// Send one request to an endpoint and show the answer
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock invoke iris --data '{\"data\": [[5.1, 3.5, 1.4, 0.2]]}'
  penstock invoke iris --data request.json --deployment green
  penstock invoke iris --data request.json --path predict

The answer goes to standard output; status, deployment and latency go to standard error. The key
is taken from the control API.")]
pub struct InvokeArgs {
    /// The endpoint to send it to
    #[arg(value_parser = name)]
    endpoint: Name,
    /// A file, or literal JSON
    #[arg(long, value_name = "FILE|JSON")]
    data: String,
    /// Pick this deployment instead of the traffic split
    #[arg(long, value_name = "NAME", value_parser = name)]
    deployment: Option<Name>,
    /// What follows …/score/
    #[arg(long, value_name = "PATH")]
    path: Option<String>,
    /// Another key than the endpoint's primary one
    #[arg(long, env = "PENSTOCK_KEY", hide_env_values = true)]
    key: Option<String>,
}

/// Show an endpoint's keys, or generate a new one
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock keys iris
  penstock keys iris --regenerate secondary
  penstock keys iris -o json")]
pub struct KeysArgs {
    /// The endpoint whose keys they are
    #[arg(value_parser = name)]
    endpoint: Name,
    /// Replace this key; the old one stops working
    #[arg(long, value_enum, value_name = "KEY")]
    regenerate: Option<KeySlot>,
    /// Output format
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum KeySlot {
    Primary,
    Secondary,
}

pub async fn traffic(client: &Client, args: &TrafficArgs) -> Result<(), CliError> {
    let endpoint = args.endpoint.as_str();
    let traffic = percentages("traffic", &args.shares)?;
    let mirror = if args.no_mirror {
        Some(json!({}))
    } else {
        percentages("mirror", &args.mirror)?
    };
    if traffic.is_none() && mirror.is_none() {
        return show_traffic(client, endpoint).await;
    }
    let body = split_body(traffic, mirror);
    client
        .put(&["v1", "endpoints", endpoint, "traffic"], &[], &body)
        .await?;
    show_traffic(client, endpoint).await
}

async fn show_traffic(client: &Client, endpoint: &str) -> Result<(), CliError> {
    let body = client
        .get(&["v1", "endpoints", endpoint], &[])
        .await?
        .json()?;
    let or_none = |text: String| if text.is_empty() { "none".into() } else { text };
    let live = or_none(shares(body.pointer("/spec/traffic")));
    let mirror = or_none(shares(body.pointer("/spec/mirror")));
    print(&format!("traffic of {endpoint}: {live}; mirror: {mirror}"))
}

/// `None` if nothing was typed: that part is left unchanged.
fn percentages(what: &str, typed: &[(Name, u8)]) -> Result<Option<Value>, CliError> {
    if typed.is_empty() {
        return Ok(None);
    }
    let mut shares = BTreeMap::new();
    for (name, percent) in typed {
        if shares.insert(name.to_string(), *percent).is_some() {
            return Err(CliError::Usage(format!(
                "`{name}` is given twice in the {what}; keep one of the two"
            )));
        }
    }
    let sum: u32 = shares.values().map(|share| u32::from(*share)).sum();
    if what == "traffic" && sum != 0 && sum != 100 {
        return Err(CliError::Usage(format!(
            "the shares sum to {sum}; they must sum to 100, or to 0 for no traffic"
        )));
    }
    Ok(Some(json!(shares)))
}

fn autoscale_path(of: &DeploymentRef, last: &'static str) -> [String; 5] {
    [
        "v1".into(),
        "autoscale".into(),
        of.endpoint.to_string(),
        of.deployment.to_string(),
        last.into(),
    ]
}

pub async fn scale(client: &Client, args: &ScaleArgs) -> Result<(), CliError> {
    let of = &args.deployment;
    let path = autoscale_path(of, "pin");
    let path = path.each_ref().map(String::as_str);
    let Some(instances) = args.instances else {
        client.delete(&path).await?;
        return print(&format!("deployment {of} released: its rules decide"));
    };
    let mut body = json!({"instances": instances});
    // The server counts from its own time: clocks differ.
    if let Some(duration) = args.duration {
        body["for"] = json!(duration);
    }
    let answer = client.put(&path, &[], &body).await?.json()?;
    warn_beyond_max(client, of, instances).await;
    let until = match text(&answer, "/pin/until") {
        until if until.is_empty() => "released".into(),
        until => until,
    };
    print(&format!(
        "deployment {of} pinned to {instances} instances until {until}"
    ))
}

/// Warns about a pin beyond the rules' limits, which a pin overrides.
async fn warn_beyond_max(client: &Client, of: &DeploymentRef, instances: u32) {
    let (endpoint, deployment) = (of.endpoint.to_string(), of.deployment.to_string());
    let path = ["v1", "autoscale", &endpoint, &deployment];
    // Without an Autoscale there is no limit.
    let Ok(answer) = client.get(&path, &[]).await else {
        return;
    };
    let Ok(autoscale) = answer.json() else { return };
    let profiles = autoscale
        .pointer("/spec/profiles")
        .and_then(Value::as_array);
    let limits = profiles.into_iter().flatten();
    let max = limits.filter_map(|profile| profile.pointer("/capacity/max")?.as_u64());
    if let Some(max) = max.max().filter(|max| u64::from(instances) > *max) {
        print_notice(&format!(
            "{instances} instances are more than the {max} that the Autoscale of {of} allows at most; \
             they run until the pin is released"
        ));
    }
}

/// Both directions if none was named.
fn directions(scale_in: bool, scale_out: bool) -> (Value, &'static str) {
    match (scale_in, scale_out) {
        (true, false) => (json!({"scaleIn": true, "scaleOut": false}), "scaling in"),
        (false, true) => (json!({"scaleIn": false, "scaleOut": true}), "scaling out"),
        _ => (json!({"scaleIn": true, "scaleOut": true}), "scaling"),
    }
}

pub async fn pause(client: &Client, args: &PauseArgs) -> Result<(), CliError> {
    let (body, what) = directions(args.scale_in, args.scale_out);
    let path = autoscale_path(&args.deployment, "pause");
    client
        .post(&path.each_ref().map(String::as_str), &body)
        .await?;
    print(&format!("{what} of {} paused", args.deployment))
}

pub async fn resume(client: &Client, args: &ResumeArgs) -> Result<(), CliError> {
    let (body, what) = directions(args.scale_in, args.scale_out);
    let path = autoscale_path(&args.deployment, "resume");
    client
        .post(&path.each_ref().map(String::as_str), &body)
        .await?;
    print(&format!("{what} of {} resumed", args.deployment))
}

pub async fn invoke(client: &Client, args: &InvokeArgs) -> Result<(), CliError> {
    let body = request_body(&args.data)?;
    let endpoint = args.endpoint.as_str();
    let resource = client
        .get(&["v1", "endpoints", endpoint], &[])
        .await?
        .json()?;
    let (url, origin) = scoring_url(client, endpoint, &resource, args.path.as_deref())?;
    let key = match (&args.key, text(&resource, "/spec/auth").as_str()) {
        (Some(key), _) => Some(key.clone()),
        (None, "none") => None,
        (None, _) => Some(primary_key(client, endpoint).await?),
    };
    let mut request = client
        .http()
        .post(&url)
        .header("content-type", "application/json")
        .body(body);
    if let Some(key) = key {
        request = request.bearer_auth(key);
    }
    if let Some(deployment) = &args.deployment {
        request = request.header("penstock-deployment", deployment.as_str());
    }
    let started = Instant::now();
    let response = request
        .send()
        .await
        .map_err(|error| gateway_error(&url, &origin, &error))?;
    let status = response.status();
    let headers = response.headers().clone();
    let answer = response
        .bytes()
        .await
        .map_err(|error| gateway_error(&url, &origin, &error))?;
    let elapsed = started.elapsed();

    let header = |name: &str| {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    let mut facts = vec![status.to_string()];
    for (label, name) in [
        ("from ", "penstock-deployment"),
        ("", "penstock-error-code"),
        ("model status ", "penstock-model-status"),
        ("request ", "x-request-id"),
    ] {
        let value = header(name);
        if !value.is_empty() {
            facts.push(format!("{label}{value}"));
        }
    }
    facts.push(format!("{:.1} ms", elapsed.as_secs_f64() * 1000.0));
    print(&String::from_utf8_lossy(&answer))?;
    print_notice(&facts.join(", "));
    if status.is_success() || status.is_redirection() {
        Ok(())
    } else {
        Err(CliError::Quiet(1))
    }
}

fn gateway_error(url: &str, origin: &str, error: &reqwest::Error) -> CliError {
    let reason = root_cause(error);
    if !error.is_connect() {
        return CliError::NoServer(format!(
            "the gateway at {url} closed the connection: {reason}"
        ));
    }
    CliError::NoServer(format!(
        "the gateway cannot be reached at {url}: {reason}. The address is {origin}. See that a gateway runs there (`penstock serve`, or `penstock serve --services gateway`); if clients reach it elsewhere, start control with --gateway-url http://HOST:PORT"
    ))
}

/// JSON as typed, or the bytes of a file.
fn request_body(data: &str) -> Result<Vec<u8>, CliError> {
    if serde_json::from_str::<Value>(data).is_ok() {
        return Ok(data.as_bytes().to_vec());
    }
    std::fs::read(Path::new(data)).map_err(|error| {
        let message =
            format!("--data `{data}` is neither JSON nor a file that can be read ({error})");
        // Malformed JSON is a usage error; a missing file is a failure, as elsewhere.
        match data.trim_start().starts_with(['{', '[', '"']) {
            true => CliError::Usage(message),
            false => CliError::Failed(message),
        }
    })
}

/// The endpoint's scoring URI, else a URL at the gateway of the configuration; and a description of where
/// it comes from.
pub fn scoring_url(
    client: &Client,
    endpoint: &str,
    resource: &Value,
    path: Option<&str>,
) -> Result<(String, String), CliError> {
    let scoring_uri = text(resource, "/status/scoringUri");
    let (base, origin) = match (scoring_uri.starts_with("http"), client.gateway()) {
        (true, _) => (
            scoring_uri,
            format!(
                "the endpoint's scoringUri, as the control API at {} has it",
                client.server()
            ),
        ),
        (false, Some(gateway)) => (
            format!(
                "{}/endpoints/{endpoint}/score",
                gateway.trim_end_matches('/')
            ),
            "made of `gateway` in client.json".to_owned(),
        ),
        (false, None) => {
            return Err(CliError::Failed(format!(
                "it is not known where the gateway of `{endpoint}` listens: start control with --gateway-url http://HOST:PORT, or write `gateway` into the client.json that PENSTOCK_CONFIG names"
            )));
        }
    };
    let url = match path {
        Some(path) => format!("{base}/{}", path.trim_start_matches('/')),
        None => base,
    };
    Ok((url, origin))
}

pub async fn primary_key(client: &Client, endpoint: &str) -> Result<String, CliError> {
    let path = ["v1", "endpoints", endpoint, "keys"];
    let keys = client.get(&path, &[]).await?.json()?;
    Ok(text(&keys, "/primary"))
}

pub async fn keys(client: &Client, args: &KeysArgs, screen: Screen) -> Result<(), CliError> {
    let endpoint = args.endpoint.as_str();
    let answer = match args.regenerate {
        None => {
            client
                .get(&["v1", "endpoints", endpoint, "keys"], &[])
                .await?
        }
        Some(slot) => {
            let slot = match slot {
                KeySlot::Primary => "primary",
                KeySlot::Secondary => "secondary",
            };
            let path = ["v1", "endpoints", endpoint, "keys", slot, "regenerate"];
            client.post(&path, &json!({})).await?
        }
    };
    match args.output {
        Format::Json => print(&answer.text),
        Format::Yaml => print(&yaml(&answer.json()?)),
        Format::Table => {
            let body = answer.json()?;
            let mut table = Table::new(&["KEY", "VALUE"]);
            for slot in ["primary", "secondary"] {
                let value = text(&body, &format!("/{slot}"));
                if !value.is_empty() {
                    table.row(vec![slot.into(), value]);
                }
            }
            print(&table.render(screen.tty))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traffic_sums_to_a_hundred_or_to_nothing() {
        let shares = |typed: &[&str]| -> Vec<(Name, u8)> {
            typed.iter().map(|text| share(text).unwrap()).collect()
        };
        assert!(percentages("traffic", &[]).unwrap().is_none());
        let body = percentages("traffic", &shares(&["green=10", "blue=90"])).unwrap();
        assert_eq!(body.unwrap(), json!({"blue": 90, "green": 10}));
        assert!(percentages("traffic", &shares(&["blue=0"])).is_ok());
        assert!(percentages("traffic", &shares(&["blue=90"])).is_err());
        assert!(percentages("traffic", &shares(&["blue=50", "blue=50"])).is_err());
        assert!(percentages("mirror", &shares(&["green=10"])).is_ok());
    }

    #[test]
    fn a_request_is_json_as_typed_or_a_file() {
        assert_eq!(request_body("[1, 2]").unwrap(), b"[1, 2]");
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("r.bin");
        std::fs::write(&file, [0, 159, 146]).unwrap();
        assert_eq!(request_body(file.to_str().unwrap()).unwrap(), [0, 159, 146]);
        assert_eq!(request_body("{broken").unwrap_err().exit_code(), 2);
        assert_eq!(request_body("none.json").unwrap_err().exit_code(), 1);
    }
}
