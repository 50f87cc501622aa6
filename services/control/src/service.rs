//! The server: binds, loads its state and serves requests by the route table.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, RawPathParams, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, MethodRouter};
use bytes::Bytes;
use contract::ids::{EndpointKey, Name};
use domain::endpoint::Endpoint;
use domain::views::ReadModel;
use http::{Method, StatusCode};
use serde_json::json;
use store::{RowQuery, StoreError};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::access::AccessTokens;
use crate::api;
use crate::app::App;
use crate::auth::{authorize, is_trusted_peer};
use crate::call::Call;
use crate::commands::{Commands, EndpointIndex};
use crate::config::{CLIENT_FILE, ControlConfig, SEAL_FILE};
use crate::deps::ControlDeps;
use crate::error::ApiError;
use crate::listener;
use crate::metrics::{CallLabels, ControlMetrics};
use crate::routes::RoutePublisher;
use crate::seal::{Seal, SealError, write_private};
use crate::table::RouteEntry;
use crate::views::{Views, ViewsConsumer, lag};

/// Largest request body.
pub const BODY_BYTES_MAX: usize = documents::TEXT_BYTES_MAX;
/// Maximum endpoints to try when looking for a readable one to check the seal key against.
const SEAL_CHECK_ENDPOINTS_MAX: usize = 50;

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("control cannot listen on {address}: {source}; choose another with --control-addr")]
    Listen {
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error("control cannot write {file}: {source}")]
    File {
        file: String,
        source: std::io::Error,
    },
    #[error(transparent)]
    Seal(#[from] SealError),
    // Not transparent: whoever reports it looks for a damaged store.
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error("the first token cannot be created: {0}")]
    Token(String),
}

/// A bound server, ready to serve.
pub struct Control {
    pub addr: SocketAddr,
    listener: TcpListener,
    app: Arc<App>,
    consumer: ViewsConsumer,
    routes: Arc<RoutePublisher>,
}

impl Control {
    /// Binds the listener, creates the first token and writes `client.json`.
    pub async fn bind(config: ControlConfig, deps: ControlDeps) -> Result<Self, ControlError> {
        let component = deps.health.component("control");
        let address = config.listen;
        let listen = |source| ControlError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        let addr = listener.local_addr().map_err(listen)?;
        let seal = match &config.seal_key {
            Some(reference) => Seal::from_reference(reference)?,
            None => Seal::open(&config.data.join(SEAL_FILE), deps.ids.as_ref())?,
        };
        let (store, clock, ids) = (&deps.store, &deps.clock, &deps.ids);
        let access = AccessTokens::open(store.clone(), clock.clone(), ids.clone()).await?;
        let access = Arc::new(access);
        let commands = Commands::new(
            store.clone(),
            clock.clone(),
            ids.clone(),
            deps.zones.clone(),
        );
        let commands = Arc::new(commands);
        let metrics = ControlMetrics::new(&deps.metrics);
        let routes = RoutePublisher::new(deps.bus.clone(), clock.clone(), metrics.clone());
        let (consumer, views) = ViewsConsumer::open(
            deps.clone(),
            commands.clone(),
            access.clone(),
            metrics.clone(),
            routes.clone(),
            component,
        );
        let app = App {
            streams: Arc::new(Semaphore::new(config.limits.streams)),
            config,
            deps,
            commands,
            access,
            seal,
            views,
            routes: routes.clone(),
            metrics,
            openapi: crate::openapi::text(),
            shutdown: CancellationToken::new(),
        };
        app.write_client_file(addr).await?;
        app.check_seal().await?;
        let app = Arc::new(app);
        Ok(Self {
            addr,
            listener,
            app,
            consumer,
            routes,
        })
    }

    /// Serves until `shutdown`, or until the store is closed.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), ControlError> {
        let stop = shutdown.child_token();
        let streams = self.app.shutdown.clone();
        let limits = self.app.config.limits;
        let descriptors = self.app.config.descriptors.clone();
        let progress = self.app.views.progress();
        let routing = crate::routes::run(
            self.routes,
            self.app.views.shared_models(),
            move || progress.borrow().caught_up,
            stop.clone(),
        );
        let members = Box::pin(crate::members::run(
            self.app.deps.clone(),
            self.app.config.only_node.clone(),
            stop.clone(),
        ));
        let lag = {
            let app = self.app.clone();
            async move {
                let App {
                    deps,
                    views,
                    metrics,
                    ..
                } = &*app;
                lag::watch(&deps.store, &*deps.clock, views.progress(), metrics).await;
            }
        };
        let closing = stop.clone();
        let server = async move {
            let stop = closing.clone();
            let connections = listener::serve_connections(
                self.listener,
                router(self.app),
                limits,
                descriptors,
                stop,
            );
            tokio::join!(connections, async {
                closing.cancelled().await;
                streams.cancel();
            });
        };
        // Without the consumer, the API would serve stale read models.
        let consumer = async {
            let ended = Box::pin(self.consumer.run(stop.clone())).await;
            stop.cancel();
            ended
        };
        let served = async { tokio::join!(server, consumer, members, routing) };
        tokio::select! {
            ((), consumed, (), ()) = served => Ok(consumed?),
            () = lag => Ok(()),
        }
    }
}

impl App {
    async fn write_client_file(&self, addr: SocketAddr) -> Result<(), ControlError> {
        let path = self.config.data.join(CLIENT_FILE);
        let stored = std::fs::read_to_string(&path).ok();
        let stored = stored.and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
        let stored = stored.and_then(|file| Some(file.get("token")?.as_str()?.to_owned()));
        let replica = self.config.replica.as_deref();
        let token = self.access.first_token(stored, replica).await;
        let token = token.map_err(|error| ControlError::Token(error.detail))?;
        let mut file = json!({"server": format!("http://{addr}"), "token": token});
        if let Some(gateway) = &self.config.gateway {
            file["gateway"] = json!(gateway);
        }
        write_private(&path, format!("{file}\n").as_bytes()).map_err(|source| ControlError::File {
            file: path.display().to_string(),
            source,
        })
    }

    /// Reports a problem if this replica's seal key cannot open what other replicas sealed.
    async fn check_seal(&self) -> Result<(), StoreError> {
        let Some(endpoint) = self.newest_readable_endpoint().await? else {
            return Ok(());
        };
        let context = crate::api::endpoints::key_context(endpoint.uid);
        let sealed = &endpoint.keys.primary.sealed;
        if self.seal.unseal(sealed, &context).is_err() {
            let problem = "the seal key cannot open the stored keys; give every replica of control the same one, in PENSTOCK_SEAL_KEY (env:NAME or file:PATH) or as seal.key in its data folder";
            tracing::error!(endpoint = %endpoint.name, problem, "stored keys cannot be opened");
            let component = self.deps.health.component("seal");
            component.set_warning(Some(problem.to_owned()));
            component.ready();
        }
        Ok(())
    }

    /// Returns the newest endpoint whose events can be read; an unreadable one must not prevent the start.
    async fn newest_readable_endpoint(&self) -> Result<Option<Endpoint>, StoreError> {
        let newest = RowQuery {
            model: ReadModel::Endpoints.name().to_owned(),
            limit: SEAL_CHECK_ENDPOINTS_MAX,
            ..RowQuery::default()
        };
        let rows = self.deps.store.rows(newest).await?;
        let keys = rows
            .iter()
            .filter_map(|row| row.key.parse::<EndpointKey>().ok());
        for key in keys {
            match self.commands.endpoint(&key.endpoint()).await {
                Ok(aggregate) if aggregate.state.is_some() => return Ok(aggregate.state),
                Ok(_) => {}
                Err(StoreError::Unreadable { position, detail }) => {
                    tracing::warn!(endpoint = %key, %position, %detail, "cannot check the seal key against this endpoint, trying another");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

impl EndpointIndex for Views {
    fn upper_bound(&self) -> usize {
        self.models().len()
    }

    fn names(&self) -> Vec<Name> {
        let models = self.models();
        let endpoints = models.iter();
        let endpoints = endpoints.filter_map(|(_, entry)| entry.state.endpoint.as_ref());
        endpoints.map(|endpoint| endpoint.name.clone()).collect()
    }
}

fn router(app: Arc<App>) -> Router {
    let mut by_path: BTreeMap<&'static str, MethodRouter<Arc<App>>> = BTreeMap::new();
    for entry in api::routes() {
        let Ok(filter) = MethodFilter::try_from(entry.method.clone()) else {
            continue;
        };
        let path = entry.path;
        let entry = Arc::new(entry);
        let serve = move |State(app): State<Arc<App>>,
                          ConnectInfo(peer): ConnectInfo<SocketAddr>,
                          params: RawPathParams,
                          request: Request| {
            let entry = entry.clone();
            async move {
                let route = entry.path;
                let method = request.method().as_str().to_owned();
                let response = match serve(&app, &entry, peer, &params, request).await {
                    Ok(response) => response,
                    Err(error) => error.into_response(),
                };
                let code = response.status().as_u16();
                let labels = CallLabels {
                    route,
                    method,
                    code,
                };
                app.metrics.calls.get_or_create(&labels).inc();
                response
            }
        };
        let routed = by_path.remove(path).unwrap_or_default().on(filter, serve);
        by_path.insert(path, routed);
    }
    let mut router = Router::new();
    for (path, routed) in by_path {
        router = router.route(path, routed.fallback(method_not_allowed));
    }
    router.fallback(unknown_path).with_state(app)
}

async fn serve(
    app: &Arc<App>,
    entry: &RouteEntry,
    peer: SocketAddr,
    params: &RawPathParams,
    request: Request,
) -> Result<Response, ApiError> {
    let now = app.deps.clock.now();
    let (parts, body) = request.into_parts();
    let is_trusted_peer = is_trusted_peer(app.deps.internal_token.as_ref(), &parts.headers, peer);
    let principal = authorize(
        entry.gate,
        &app.access,
        &parts.headers,
        is_trusted_peer,
        now,
    )?;
    let query = parse_query(entry, parts.uri.query().unwrap_or_default())?;
    let body = read_body(body, app.config.limits.body).await?;
    let params = params
        .iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let call = Call {
        method: parts.method,
        path: parts.uri.path().to_owned(),
        params: params.collect(),
        query,
        headers: parts.headers,
        body,
        is_trusted: is_trusted_peer || principal.is_some(),
        principal,
        now,
    };
    if let Some(position) = call.min_position()?
        && call.method == Method::GET
    {
        app.wait_for(position).await?;
    }
    // Also where the handler does not get to read them.
    if !entry.headers.is_empty() {
        call.precondition()?;
        call.idempotency_key()?;
    }
    (entry.handler)(app.clone(), call).await
}

async fn read_body(body: Body, within: Duration) -> Result<Bytes, ApiError> {
    let reading = axum::body::to_bytes(body, BODY_BYTES_MAX);
    let Ok(read) = tokio::time::timeout(within, reading).await else {
        let detail = format!(
            "the body did not arrive in full within {} seconds; send it without pauses",
            within.as_secs_f64()
        );
        return Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "too-slow",
            detail,
        ));
    };
    read.map_err(|_| {
        let detail = format!(
            "the body is larger than {BODY_BYTES_MAX} bytes, or was cut off; send a smaller one"
        );
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too-large", detail)
    })
}

/// Parses the query. Unknown parameters are rejected, so that a misspelt filter is not silently
/// ignored.
fn parse_query(entry: &RouteEntry, text: &str) -> Result<BTreeMap<String, String>, ApiError> {
    let mut query = BTreeMap::new();
    for (name, value) in form_urlencoded::parse(text.as_bytes()) {
        if !entry.query.iter().any(|allowed| allowed.name == name) {
            let allowed: Vec<&str> = entry.query.iter().map(|allowed| allowed.name).collect();
            let remedy = match allowed.is_empty() {
                true => "this path takes none".to_owned(),
                false => format!("use one of: {}", allowed.join(", ")),
            };
            return Err(ApiError::bad_request(format!(
                "the query parameter `{name}` is unknown; {remedy}"
            )));
        }
        if query
            .insert(name.clone().into_owned(), value.into_owned())
            .is_some()
        {
            return Err(ApiError::bad_request(format!(
                "the query parameter `{name}` is given twice; keep one of the two"
            )));
        }
    }
    Ok(query)
}

async fn unknown_path(request: Request) -> ApiError {
    let path = request.uri().path();
    ApiError::new(
        StatusCode::NOT_FOUND,
        "unknown-path",
        format!("there is nothing at {path}; see /openapi.json for the paths that exist"),
    )
}

async fn method_not_allowed(request: Request) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let detail =
        format!("{method} is not allowed at {path}; the header Allow lists the methods that are");
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", detail).into_response()
}
