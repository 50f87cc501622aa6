//! The gateway alone, with one static route: what the benchmark against nginx measures.
//!
//! `gateway_bench --port 8080 --upstream 127.0.0.1:9000 [--threads 1] [--key KEY] [--split 90/10]`
//! serves `/endpoints/bench/score`. With `--split` two deployments share the traffic.

use std::collections::BTreeMap;
use std::sync::Arc;

use bus::{Bus, LocalBus};
use contract::resources::{
    AuthMode, Authorization, ErrorMapping, ModelClientErrors, RequestSettings,
};
use contract::route::{DeploymentRoute, InstanceRoute, Route, RouteUpdate};
use contract::time::Span;
use contract::{EndpointKey, Name, Position, Uid};
use gateway::{Config, Deps};
use runtime::clock::SystemClock;
use runtime::health::HealthRegistry;
use runtime::metrics::Metrics;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

// The allocator of the product's binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type AnyError = Box<dyn std::error::Error>;

struct Options {
    port: u16,
    upstream: String,
    threads: usize,
    key: Option<String>,
    split: Vec<u8>,
}

fn options() -> Result<Options, AnyError> {
    let mut options = Options {
        port: 8080,
        upstream: "127.0.0.1:9000".into(),
        threads: 1,
        key: None,
        split: vec![100],
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or(format!("{name} needs a value"))?;
        match name.as_str() {
            "--port" => options.port = value.parse()?,
            "--upstream" => options.upstream = value,
            "--threads" => options.threads = value.parse()?,
            "--key" => options.key = Some(value),
            "--split" => {
                let shares: Result<_, _> = value.split('/').map(str::parse).collect();
                options.split = shares?;
            }
            _ => return Err(format!("{name} is not an option").into()),
        }
    }
    Ok(options)
}

fn deployment(
    index: usize,
    percent: u8,
    upstream: &str,
) -> Result<(Name, DeploymentRoute), AnyError> {
    let name: Name = format!("d{index}").parse()?;
    let instance = InstanceRoute {
        id: format!("bench-{name}-1").into(),
        address: upstream.to_owned(),
        draining: false,
        slots: BTreeMap::new(),
    };
    let route = DeploymentRoute {
        uid: Uid(Uuid::from_u128(index as u128 + 1)),
        percent,
        request_settings: RequestSettings {
            timeout: Span::from_secs(5),
            max_concurrent_requests_per_instance: 10_000,
            max_queue_wait: Span::from_millis(500),
            ..RequestSettings::default()
        },
        routes: None,
        error_mapping: ErrorMapping::default(),
        protocol: Default::default(),
        authorization: Authorization::Strip,
        latency_thresholds_us: Vec::new(),
        instances: vec![instance],
    };
    Ok((name, route))
}

fn route(options: &Options) -> Result<RouteUpdate, AnyError> {
    let key = options.key.as_deref();
    let deployments: Result<_, AnyError> = options
        .split
        .iter()
        .enumerate()
        .map(|(index, percent)| {
            let (name, route) = deployment(index, *percent, &options.upstream)?;
            Ok((name, Box::new(route)))
        })
        .collect();
    Ok(RouteUpdate {
        endpoint: EndpointKey::new(&"bench".parse()?),
        revision: Position(1),
        members: Position::START,
        route: Some(Route {
            endpoint_uid: Uid(Uuid::from_u128(u128::MAX)),
            auth: if key.is_some() {
                AuthMode::Key
            } else {
                AuthMode::None
            },
            key_hashes: key
                .iter()
                .map(|key| hex::encode(Sha256::digest(key)))
                .collect(),
            model_client_errors: ModelClientErrors::Good,
            request_bytes_max: 100 << 20,
            deployments: deployments?,
        }),
    })
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), AnyError> {
    let options = options()?;
    let bus = LocalBus::new();
    bus.publish_route(Arc::new(route(&options)?));
    bus.mark_routes_complete();
    let address = ([127, 0, 0, 1], options.port).into();
    let config = Config {
        threads: options.threads,
        ..Config::new("bench", address)
    };
    let deps = Deps {
        bus,
        clock: Arc::new(SystemClock),
        metrics: Metrics::default(),
        health: HealthRegistry::default(),
    };
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone();
    tokio::spawn(async move {
        // Stop on the signal, and also if it cannot be received.
        let _ = tokio::signal::ctrl_c().await;
        stop.cancel();
    });
    gateway::run(config, deps, shutdown).await?;
    Ok(())
}
