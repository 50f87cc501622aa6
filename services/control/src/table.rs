//! The shape of the route table: method, path, minimum role, request, response and handler of every route.
//! The router, the authorization and the OpenAPI document are all generated from [`crate::api::routes`].

use std::sync::Arc;

use contract::events::AccessRole;
use futures::future::BoxFuture;
use http::Method;
use schemars::generate::SchemaGenerator;
use schemars::{JsonSchema, Schema, json_schema};

use crate::app::App;
use crate::call::{Call, PAGE_MAX, POSITION_MAX};
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

/// A parameter in the path, the query or a header.
#[derive(Clone, Copy, Debug)]
pub struct Parameter {
    pub name: &'static str,
    pub description: &'static str,
    pub shape: Shape,
}

/// The texts that a parameter may have.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    /// Any text: a filter, which may match nothing.
    Text,
    /// The name of a resource.
    Name,
    Flag,
    Uuid,
    /// A whole number in this range.
    Whole(u64, u64),
    /// A timestamp, or a duration before now.
    Time,
    Span,
    Matching(&'static str),
    OneOf(&'static [&'static str]),
}

impl Parameter {
    const fn new(name: &'static str, description: &'static str, shape: Shape) -> Self {
        Self {
            name,
            description,
            shape,
        }
    }

    pub(crate) const fn text(name: &'static str, description: &'static str) -> Self {
        Self::new(name, description, Shape::Text)
    }

    pub(crate) const fn flag(name: &'static str, description: &'static str) -> Self {
        Self::new(name, description, Shape::Flag)
    }

    pub(crate) const fn time(name: &'static str) -> Self {
        Self::new(name, "A timestamp, or a duration before now", Shape::Time)
    }

    pub(crate) const fn span(name: &'static str, description: &'static str) -> Self {
        Self::new(name, description, Shape::Span)
    }

    pub(crate) const fn whole(
        name: &'static str,
        description: &'static str,
        min: u64,
        max: u64,
    ) -> Self {
        Self::new(name, description, Shape::Whole(min, max))
    }

    /// The parameter with this name in paths.
    pub(crate) fn in_path(name: &str) -> Option<Self> {
        PATH.into_iter().find(|parameter| parameter.name == name)
    }
}

const PATH: [Parameter; 6] = [
    Parameter::new("endpoint", "The name of the endpoint", Shape::Name),
    Parameter::new("deployment", "The name of the deployment", Shape::Name),
    Parameter::new("name", "The name of the token", Shape::Name),
    Parameter::new("id", "The id of the decision", Shape::Uuid),
    Parameter::new("slot", "Which key", Shape::OneOf(&["primary", "secondary"])),
    Parameter::new(
        "position",
        "The position of the event",
        Shape::Whole(1, POSITION_MAX),
    ),
];

/// Of GET: what it waits for.
pub(crate) const MIN_POSITION: Parameter = Parameter::new(
    "penstock-position",
    "Wait until the response reflects this position of the log, 2 s at most",
    Shape::Whole(0, POSITION_MAX),
);
const PRECONDITIONS: [Parameter; 2] = [
    Parameter::new(
        "If-Match",
        "Only if the resource has this revision, its ETag; `*`: only if it exists",
        Shape::Matching(r#"^(\*|[0-9]{1,19}|"[0-9]{1,19}")$"#),
    ),
    Parameter::new(
        "If-None-Match",
        "`*`: only if the resource does not exist",
        Shape::OneOf(&["*"]),
    ),
];
pub(crate) const IDEMPOTENT: Parameter = Parameter::new(
    "Idempotency-Key",
    "A repeat with the same key and body returns the first response",
    Shape::Matching("^[!-~]{1,144}$"),
);

#[derive(Clone)]
pub struct RouteEntry {
    pub method: Method,
    pub path: &'static str,
    /// The unique OpenAPI operation id.
    pub id: &'static str,
    pub summary: &'static str,
    pub gate: Gate,
    pub query: &'static [Parameter],
    /// Headers that only this route reads.
    pub headers: &'static [Parameter],
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
    Metrics,
    EventStream,
}

pub(crate) const VIEWER: Gate = Gate::Role(AccessRole::Viewer);
pub(crate) const OPERATOR: Gate = Gate::Role(AccessRole::Operator);
pub(crate) const ADMIN: Gate = Gate::Role(AccessRole::Admin);

/// The statuses of a PUT that succeeded, and of a DELETE that may take a while.
pub(crate) const PUT: &[u16] = &[200, 201];
pub(crate) const DELETE: &[u16] = &[200, 202];

pub(crate) const PAGE: [Parameter; 2] = [
    Parameter::whole(
        "limit",
        "Items per page; 100 by default",
        1,
        PAGE_MAX as u64,
    ),
    Parameter::whole(
        "cursor",
        "`nextCursor` of the previous page",
        0,
        POSITION_MAX,
    ),
];
pub(crate) const BY_ENDPOINT: Parameter = Parameter::text("endpoint", "Only of this endpoint");
pub(crate) const BY_DEPLOYMENT: Parameter =
    Parameter::text("deployment", "Only of deployments with this name");
pub(crate) const SINCE: Parameter = Parameter::time("since");
pub(crate) const DRY_RUN: Parameter =
    Parameter::flag("dryRun", "Return what would change, and change nothing");
pub(crate) const FROM: Parameter = Parameter::time("from");
pub(crate) const TO: Parameter = Parameter::time("to");

pub(crate) const PAGED: &[Parameter] = &[PAGE[0], PAGE[1]];
pub(crate) const FILTERED: &[Parameter] = &[BY_ENDPOINT, BY_DEPLOYMENT, PAGE[0], PAGE[1]];
pub(crate) const WRITE: &[Parameter] = &[DRY_RUN];

/// The headers of writes that take a precondition, and of those that can also be repeated.
pub(crate) const GUARDED: &[Parameter] = &PRECONDITIONS;
pub(crate) const REPEATABLE: &[Parameter] = &[PRECONDITIONS[0], PRECONDITIONS[1], IDEMPOTENT];

pub(crate) fn schema<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// Declares a route; omitted parts are empty.
macro_rules! route {
    ($method:ident $path:literal $id:literal $gate:expr, $summary:literal, $response:expr, $function:path
        $(, query $query:expr)? $(, headers $headers:expr)? $(, body $body:expr)? $(, statuses $statuses:expr)?) => {{
        let route = $crate::table::RouteEntry {
            method: http::Method::$method,
            path: $path,
            id: $id,
            summary: $summary,
            gate: $gate,
            query: &[],
            headers: &[],
            request: None,
            response: $response,
            statuses: &[200],
            handler: |app, call| Box::pin($function(app, call)),
        };
        $(let route = $crate::table::RouteEntry { query: const { $query }, ..route };)?
        $(let route = $crate::table::RouteEntry { headers: const { $headers }, ..route };)?
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
