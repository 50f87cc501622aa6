//! The shape of the route table: method, path, minimum role, request, response and handler of every route.
//! The router, the authorization and the OpenAPI document are all generated from [`crate::api::routes`].

use std::sync::Arc;

use contract::events::AccessRole;
use futures::future::BoxFuture;
use http::Method;
use schemars::generate::SchemaGenerator;
use schemars::{JsonSchema, Schema, json_schema};

use crate::app::App;
use crate::call::Call;
use crate::response::ApiResult;

pub type Handler = fn(Arc<App>, Call) -> BoxFuture<'static, ApiResult>;
type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// Who may call a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    Open,
    /// Open on loopback; elsewhere it takes a viewer or the internal token.
    Loopback,
    /// Open, but details are only for callers that [`Gate::Loopback`] admits.
    Health,
    Role(AccessRole),
}

/// A query parameter: its name and description.
pub type Parameter = (&'static str, &'static str);

#[derive(Clone)]
pub struct RouteEntry {
    pub method: Method,
    pub path: &'static str,
    /// The unique OpenAPI operation id.
    pub id: &'static str,
    pub summary: &'static str,
    pub gate: Gate,
    pub query: &'static [Parameter],
    pub request: Option<SchemaOf>,
    /// The content type of the response, and its schema if it is JSON.
    pub response: Content,
    /// The statuses of success.
    pub statuses: &'static [u16],
    pub handler: Handler,
}

#[derive(Clone, Copy)]
pub enum Content {
    Json(SchemaOf),
    Text,
    EventStream,
}

pub(crate) const VIEWER: Gate = Gate::Role(AccessRole::Viewer);
pub(crate) const OPERATOR: Gate = Gate::Role(AccessRole::Operator);
pub(crate) const ADMIN: Gate = Gate::Role(AccessRole::Admin);

/// The statuses of a PUT that succeeded, and of a DELETE that may take a while.
pub(crate) const PUT: &[u16] = &[200, 201];
pub(crate) const DELETE: &[u16] = &[200, 202];

pub(crate) const PAGE: [Parameter; 2] = [
    ("limit", "Items per page, 1 to 1000; 100 by default"),
    ("cursor", "`nextCursor` of the previous page"),
];
pub(crate) const BY_ENDPOINT: Parameter = ("endpoint", "Only of this endpoint");
pub(crate) const BY_DEPLOYMENT: Parameter = ("deployment", "Only of deployments with this name");
pub(crate) const SINCE: Parameter = ("since", "A timestamp, or a duration before now");
pub(crate) const DRY_RUN: Parameter = (
    "dryRun",
    "true: return what would change, and change nothing",
);
pub(crate) const FROM: Parameter = ("from", "A timestamp, or a duration before now");
pub(crate) const TO: Parameter = ("to", "A timestamp, or a duration before now");

pub(crate) const PAGED: &[Parameter] = &[PAGE[0], PAGE[1]];
pub(crate) const FILTERED: &[Parameter] = &[BY_ENDPOINT, BY_DEPLOYMENT, PAGE[0], PAGE[1]];
pub(crate) const WRITE: &[Parameter] = &[DRY_RUN];

pub(crate) fn schema<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// Declares a route; omitted parts are empty.
macro_rules! route {
    ($method:ident $path:literal $id:literal $gate:expr, $summary:literal, $response:expr, $function:path
        $(, query $query:expr)? $(, body $body:expr)? $(, statuses $statuses:expr)?) => {{
        let route = $crate::table::RouteEntry {
            method: http::Method::$method,
            path: $path,
            id: $id,
            summary: $summary,
            gate: $gate,
            query: &[],
            request: None,
            response: $response,
            statuses: &[200],
            handler: |app, call| Box::pin($function(app, call)),
        };
        $(let route = $crate::table::RouteEntry { query: $query, ..route };)?
        $(let route = $crate::table::RouteEntry { request: Some($body), ..route };)?
        $(let route = $crate::table::RouteEntry { statuses: $statuses, ..route };)?
        route
    }};
}
pub(crate) use route;

/// The schema of a record. Its data depends on its type.
pub fn record_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "required": ["position", "prev", "bucket", "stream", "version", "id", "time", "actor", "type", "typeVersion", "data"],
        "properties": {
            "position": {"type": "integer", "minimum": 1},
            "prev": {"type": "integer", "minimum": 0},
            "bucket": {"type": "integer", "minimum": 0},
            "stream": {"type": "string"},
            "version": {"type": "integer", "minimum": 1},
            "id": {"type": "string", "format": "uuid"},
            "time": {"type": "string", "format": "date-time"},
            "actor": {"type": "string"},
            "type": {"type": "string"},
            "typeVersion": {"type": "integer", "minimum": 1},
            "data": {"type": "object"}
        }
    })
}
