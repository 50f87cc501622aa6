//! `load`: resolves the target and the key, and prints the report. The generator itself is the crate
//! `load`.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::FutureExt;
use serde_json::Value;

use super::chart;
use super::error::CliError;
use super::operate::{primary_key, scoring_url};
use super::output::{items, print, text};
use crate::client::Client;
use crate::client::config::{self, ConnectArgs};
use load::{self, InstanceSampler, LoadArgs, LoadFormat, LoadReport, LoadTarget};

/// Size of the chart if the terminal's width is unknown.
const CHART_WIDTH: usize = 100;
const CHART_HEIGHT: usize = 18;

pub fn run(connect: &ConnectArgs, args: &LoadArgs) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| {
            CliError::Failed(format!("the load cannot start: {error}")).caused_by(error)
        })?;
    let report = runtime.block_on(async {
        let target = target(connect, args).await?;
        Ok::<_, CliError>(load::run(args, target).await?)
    })?;
    show(args, &report)?;
    if report.passed() {
        Ok(())
    } else {
        Err(CliError::Quiet(1))
    }
}

/// The target: a URL as given, without a server; or an endpoint, whose URL comes from the server.
async fn target(connect: &ConnectArgs, args: &LoadArgs) -> Result<LoadTarget, CliError> {
    let endpoint = match (&args.url, &args.endpoint) {
        (Some(url), _) => {
            return Ok(LoadTarget {
                url: url.clone(),
                key: args.key.clone(),
                instances: None,
            });
        }
        (None, Some(endpoint)) => endpoint.clone(),
        (None, None) => return Err(CliError::Usage("name an endpoint, or a --url".into())),
    };
    let connection = config::resolve(connect, &config::Environment::read())?;
    let client = Client::new(connection)?;
    let path = ["v1", "endpoints", &endpoint];
    let resource = client.get(&path, &[]).await?.json()?;
    let (url, _) = scoring_url(&client, &endpoint, &resource, None)?;
    let key = match (&args.key, text(&resource, "/spec/auth").as_str()) {
        (Some(key), _) => Some(key.clone()),
        (None, "none") => None,
        (None, _) => Some(primary_key(&client, &endpoint).await?),
    };
    Ok(LoadTarget {
        url,
        key,
        instances: Some(sampler(Arc::new(client), endpoint)),
    })
}

/// Ready instances of the endpoint, by deployment.
fn sampler(client: Arc<Client>, endpoint: String) -> InstanceSampler {
    Arc::new(move || {
        let (client, endpoint) = (client.clone(), endpoint.clone());
        async move {
            let path = ["v1", "endpoints", &endpoint, "deployments"];
            let body = client.get(&path, &[]).await?.json()?;
            let count = |one: &Value| one.pointer("/status/instances/ready")?.as_u64();
            let ready = items(&body).into_iter().map(|one| {
                let ready = count(&one).and_then(|count| u32::try_from(count).ok());
                (text(&one, "/metadata/name"), ready.unwrap_or(0))
            });
            let ready: BTreeMap<String, u32> = ready.collect();
            Ok(ready)
        }
        .boxed()
    })
}

fn show(args: &LoadArgs, report: &LoadReport) -> Result<(), CliError> {
    match args.output {
        LoadFormat::Json => {
            let json = serde_json::to_string(report).map_err(|error| {
                CliError::Failed(format!("the report cannot be written: {error}")).caused_by(error)
            })?;
            print(&json)
        }
        LoadFormat::Text => {
            if args.chart {
                let drawn = chart::load_and_instances(
                    &report.load_points(),
                    &report.instance_points(),
                    chart_width(),
                    CHART_HEIGHT,
                );
                print(&drawn)?;
                print("\n")?;
            }
            print(&report.text())
        }
    }
}

/// The width of the terminal, within readable bounds.
fn chart_width() -> usize {
    let (columns, _) = ratatui::crossterm::terminal::size().unwrap_or((0, 0));
    match usize::from(columns) {
        0 => CHART_WIDTH,
        columns => columns.clamp(40, 160),
    }
}
