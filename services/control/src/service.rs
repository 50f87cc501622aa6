//! The server: binds, reads what it needs, answers requests by the table.

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
use contract::ids::{Bucket, EndpointKey, Name, Position};
use domain::endpoint::Endpoint;
use domain::views::ReadModel;
use http::{Method, StatusCode};
use serde_json::json;
use store::{RowQuery, StoreError};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::access::Access;
use crate::auth::{authorize, is_ours};
use crate::call::Call;
use crate::commands::{Commands, Known};
use crate::config::{CLIENT_FILE, ControlConfig, SEAL_FILE};
use crate::deps::ControlDeps;
use crate::error::ApiError;
use crate::listener;
use crate::metrics::{CallLabels, ControlMetrics};
use crate::routes::Routes;
use crate::seal::{Seal, SealError, write_private};
use crate::table::{self, Entry};
use crate::views::{CONSUMER, Progress, Views, ViewsConsumer, lag};

/// Largest request body.
pub const BODY_BYTES_MAX: usize = documents::TEXT_BYTES_MAX;
/// How long a GET waits for the read models to reach the position that it names.
pub const POSITION_WAIT: Duration = Duration::from_secs(2);
/// Endpoints whose keys may be looked at, to find one that can be read.
const SEALED_MAX: usize = 50;
/// How often the cursor of rows that another replica writes is looked at meanwhile.
const CURSOR_POLL: Duration = Duration::from_millis(20);

/// What handlers share.
pub struct App {
    pub config: ControlConfig,
    pub deps: ControlDeps,
    pub commands: Arc<Commands>,
    pub access: Arc<Access>,
    pub seal: Seal,
    pub views: Views,
    /// As far as this replica has read, who the members are.
    pub routes: Arc<Routes>,
    pub metrics: ControlMetrics,
    pub openapi: String,
    /// Room for streams that go on until somebody ends them, and for long answers.
    pub streams: Arc<Semaphore>,
    /// Streams end when it is cancelled.
    pub shutdown: CancellationToken,
}

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
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the first token cannot be made: {0}")]
    Token(String),
}

/// Bound, and ready to serve.
pub struct Control {
    pub addr: SocketAddr,
    listener: TcpListener,
    app: Arc<App>,
    consumer: ViewsConsumer,
    routes: Arc<Routes>,
}

impl Control {
    /// Listens, makes the first token, and writes `client.json`.
    pub async fn bind(config: ControlConfig, deps: ControlDeps) -> Result<Self, ControlError> {
        let component = deps.health.component("control");
        let address = config.listen;
        let listen = |source| ControlError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        let addr = listener.local_addr().map_err(listen)?;
        let seal = match &config.seal_key {
            Some(reference) => Seal::by_reference(reference)?,
            None => Seal::open(&config.data.join(SEAL_FILE), deps.ids.as_ref())?,
        };
        let (store, clock, ids) = (&deps.store, &deps.clock, &deps.ids);
        let access = Access::open(store.clone(), clock.clone(), ids.clone()).await?;
        let access = Arc::new(access);
        let commands = Commands::new(
            store.clone(),
            clock.clone(),
            ids.clone(),
            deps.zones.clone(),
        );
        let commands = Arc::new(commands);
        let metrics = ControlMetrics::new(&deps.metrics);
        let routes = Routes::new(deps.bus.clone(), clock.clone(), metrics.clone());
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

    /// Runs until `shutdown`, or until the store is closed.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), ControlError> {
        let stop = shutdown.child_token();
        let streams = self.app.shutdown.clone();
        let limits = self.app.config.limits;
        let descriptors = self.app.config.descriptors.clone();
        let deals = crate::routes::run(self.routes, self.app.views.clone(), stop.clone());
        let members = Box::pin(crate::members::run(self.app.deps.clone(), stop.clone()));
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
            let connections =
                listener::accept(self.listener, router(self.app), limits, descriptors, stop);
            tokio::join!(connections, async {
                closing.cancelled().await;
                streams.cancel();
            });
        };
        // Without read models the API would show a world that stands still.
        let consumer = async {
            let ended = Box::pin(self.consumer.run(stop.clone())).await;
            stop.cancel();
            ended
        };
        let served = async { tokio::join!(server, consumer, members, deals) };
        tokio::select! {
            ((), consumed, (), ()) = served => Ok(consumed?),
            () = lag => Ok(()),
        }
    }
}

impl App {
    /// Room for one more stream, held until the permit is dropped.
    pub fn room_for_stream(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        self.streams.clone().try_acquire_owned().map_err(|_| {
            ApiError::too_many_streams(format!(
                "{} event streams and logs are being read, and there is no room for more; close one, or try again later",
                self.config.limits.streams
            ))
        })
    }

    async fn write_client_file(&self, addr: SocketAddr) -> Result<(), ControlError> {
        let path = self.config.data.join(CLIENT_FILE);
        let known = std::fs::read_to_string(&path).ok();
        let known = known.and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
        let known = known.and_then(|file| Some(file.get("token")?.as_str()?.to_owned()));
        let replica = self.config.replica.as_deref();
        let token = self.access.first_token(known, replica).await;
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

    /// Waits until the rows show the event at a position, for a while.
    pub async fn wait_for(&self, position: Position) -> Result<(), ApiError> {
        let after = Position(position.0.saturating_sub(1));
        let event = self.deps.store.read_raw(after, 1).await?;
        let Some(bucket) = event.first().map(|event| event.bucket) else {
            return Ok(());
        };
        let reached = async {
            self.folded(bucket, position).await;
            self.written(bucket, position).await
        };
        // Too late is no failure: the answer shows what there is.
        match tokio::time::timeout(POSITION_WAIT, reached).await {
            Ok(Err(error)) => Err(error.into()),
            Ok(Ok(())) | Err(_) => Ok(()),
        }
    }

    /// This replica has taken it in.
    async fn folded(&self, bucket: Bucket, position: Position) {
        let mut progress = self.views.progress();
        let reached = |progress: &Progress| {
            let folded = progress.folded.get(&bucket);
            folded.is_some_and(|folded| *folded >= position)
        };
        // The consumer ends with the server only.
        let _ = progress.wait_for(reached).await;
    }

    /// The rows show it, whoever writes them.
    async fn written(&self, bucket: Bucket, position: Position) -> Result<(), StoreError> {
        let mut progress = self.views.progress();
        loop {
            let ours = progress.borrow_and_update().written.get(&bucket).copied();
            match ours {
                Some(written) if written >= position => return Ok(()),
                Some(_) => {
                    let _ = progress.changed().await;
                }
                None => {
                    if self.deps.store.cursor(CONSUMER, bucket).await? >= position {
                        return Ok(());
                    }
                    tokio::time::sleep(CURSOR_POLL).await;
                }
            }
        }
    }

    /// Says so if this replica's key does not open what others have sealed.
    async fn check_seal(&self) -> Result<(), StoreError> {
        let Some(endpoint) = self.newest_readable().await? else {
            return Ok(());
        };
        let context = crate::api::endpoints::context(endpoint.uid);
        let sealed = &endpoint.keys.primary.sealed;
        if self.seal.unseal(sealed, &context).is_err() {
            let problem = "the seal key does not open the keys that are stored: give every replica of control the same one, by PENSTOCK_SEAL_KEY (env:NAME or file:PATH) or as seal.key in its data directory";
            tracing::error!(endpoint = %endpoint.name, "{problem}");
            let component = self.deps.health.component("seal");
            component.remark(Some(problem.to_owned()));
            component.ready();
        }
        Ok(())
    }

    /// An endpoint with an event that cannot be read must not keep the others from being served.
    async fn newest_readable(&self) -> Result<Option<Endpoint>, StoreError> {
        let newest = RowQuery {
            model: ReadModel::Endpoints.name().to_owned(),
            limit: SEALED_MAX,
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
                    tracing::warn!(endpoint = %key, %position, detail, "its keys cannot be held against the seal key, trying those of another endpoint");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

impl Known for Views {
    fn at_most(&self) -> usize {
        self.models().len()
    }

    fn names(&self) -> Vec<Name> {
        let models = self.models();
        let living = models.iter();
        let living = living.filter_map(|(_, entry)| entry.state.endpoint.as_ref());
        living.map(|endpoint| endpoint.name.clone()).collect()
    }
}

fn router(app: Arc<App>) -> Router {
    let mut by_path: BTreeMap<&'static str, MethodRouter<Arc<App>>> = BTreeMap::new();
    for entry in table::routes() {
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
        router = router.route(path, routed.fallback(wrong_method));
    }
    router.fallback(unknown_path).with_state(app)
}

async fn serve(
    app: &Arc<App>,
    entry: &Entry,
    peer: SocketAddr,
    params: &RawPathParams,
    request: Request,
) -> Result<Response, ApiError> {
    let now = app.deps.clock.now();
    let (parts, body) = request.into_parts();
    let is_ours = is_ours(app.deps.internal_token.as_ref(), &parts.headers, peer);
    let principal = authorize(entry.gate, &app.access, &parts.headers, is_ours, now)?;
    let query = query(entry, parts.uri.query().unwrap_or_default())?;
    let body = read_whole(body, app.config.limits.body).await?;
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
        is_trusted: is_ours || principal.is_some(),
        principal,
        now,
    };
    if let Some(position) = call.seen()?
        && call.method == Method::GET
    {
        app.wait_for(position).await?;
    }
    (entry.handler)(app.clone(), call).await
}

async fn read_whole(body: Body, within: Duration) -> Result<Bytes, ApiError> {
    let reading = axum::body::to_bytes(body, BODY_BYTES_MAX);
    let Ok(read) = tokio::time::timeout(within, reading).await else {
        let detail = format!(
            "the body did not come whole within {} seconds; send it at once",
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
            "the body is larger than {BODY_BYTES_MAX} bytes, or broke off; send a smaller one"
        );
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too-large", detail)
    })
}

/// The query as a map; what the route does not know is refused, so that a misspelt filter does not
/// pass for none.
fn query(entry: &Entry, text: &str) -> Result<BTreeMap<String, String>, ApiError> {
    let mut query = BTreeMap::new();
    for (name, value) in form_urlencoded::parse(text.as_bytes()) {
        if !entry.query.iter().any(|(known, _)| *known == name) {
            let known: Vec<&str> = entry.query.iter().map(|(known, _)| *known).collect();
            let remedy = match known.is_empty() {
                true => "there are none here".to_owned(),
                false => format!("use one of: {}", known.join(", ")),
            };
            return Err(ApiError::bad_request(format!(
                "the query parameter `{name}` is not known; {remedy}"
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
        format!("there is nothing at {path}; see /openapi.json for what there is"),
    )
}

async fn wrong_method(request: Request) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let detail = format!("{method} is not possible at {path}; see the header Allow for what is");
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", detail).into_response()
}
