//! The route table: method, path, minimum role, request, response and handler of every route. The router,
//! the authorization and the OpenAPI document are all generated from it.

use std::sync::Arc;

use contract::events::AccessRole;
use contract::resources::{
    AccessView, Applied, AutoscaleView, DecisionView, DeploymentView, EndpointView, InstanceView,
    document_schema,
};
use futures::future::BoxFuture;
use http::Method;
use schemars::generate::SchemaGenerator;
use schemars::{JsonSchema, Schema, json_schema};

use crate::api::{
    access, autoscale, decisions, deployments, endpoints, events, history, instances, logs, ops,
    parking,
};
use crate::call::Call;
use crate::response::{ApiResult, List};
use crate::service::App;

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

const PAGE: [Parameter; 2] = [
    ("limit", "Items per page, 1 to 1000; 100 by default"),
    ("cursor", "`nextCursor` of the previous page"),
];
const BY_ENDPOINT: Parameter = ("endpoint", "Only of this endpoint");
const BY_DEPLOYMENT: Parameter = ("deployment", "Only of deployments with this name");
const SINCE: Parameter = ("since", "A timestamp, or a duration before now");
const DRY_RUN: Parameter = (
    "dryRun",
    "true: return what would change, and change nothing",
);
const FROM: Parameter = ("from", "A timestamp, or a duration before now");
const TO: Parameter = ("to", "A timestamp, or a duration before now");

const PAGED: &[Parameter] = &[PAGE[0], PAGE[1]];
const FILTERED: &[Parameter] = &[BY_ENDPOINT, BY_DEPLOYMENT, PAGE[0], PAGE[1]];
const DECISIONS: &[Parameter] = &[BY_ENDPOINT, BY_DEPLOYMENT, SINCE, PAGE[0], PAGE[1]];
const WRITE: &[Parameter] = &[DRY_RUN];

fn schema<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

fn any_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object"})
}

macro_rules! handler {
    ($function:path) => {
        |app, call| Box::pin($function(app, call))
    };
}

/// Declares one entry; omitted parts are empty.
macro_rules! entry {
    ($method:ident $path:literal $id:literal $gate:expr, $summary:literal, $response:expr, $function:path
        $(, query $query:expr)? $(, body $body:expr)? $(, statuses $statuses:expr)?) => {{
        let entry = RouteEntry {
            method: Method::$method,
            path: $path,
            id: $id,
            summary: $summary,
            gate: $gate,
            query: &[],
            request: None,
            response: $response,
            statuses: &[200],
            handler: handler!($function),
        };
        $(let entry = RouteEntry { query: $query, ..entry };)?
        $(let entry = RouteEntry { request: Some($body), ..entry };)?
        $(let entry = RouteEntry { statuses: $statuses, ..entry };)?
        entry
    }};
}

/// Returns all routes.
pub fn routes() -> Vec<RouteEntry> {
    use Content::{EventStream, Json, Text};
    const VIEWER: Gate = Gate::Role(AccessRole::Viewer);
    const OPERATOR: Gate = Gate::Role(AccessRole::Operator);
    const ADMIN: Gate = Gate::Role(AccessRole::Admin);
    const PUT: &[u16] = &[200, 201];
    const DELETE: &[u16] = &[200, 202];
    vec![
        entry!(GET "/v1/endpoints" "listEndpoints" VIEWER, "Endpoints, newest first",
            Json(schema::<List<EndpointView>>), endpoints::list, query PAGED),
        entry!(GET "/v1/endpoints/{endpoint}" "getEndpoint" VIEWER, "One endpoint",
            Json(schema::<EndpointView>), endpoints::get),
        entry!(PUT "/v1/endpoints/{endpoint}" "putEndpoint" OPERATOR, "Create an endpoint, or update it to match the document",
            Json(schema::<Applied<EndpointView>>), endpoints::put, query WRITE,
            body |g| document_schema("Endpoint", g), statuses PUT),
        entry!(DELETE "/v1/endpoints/{endpoint}" "deleteEndpoint" OPERATOR, "Delete an endpoint with its deployments",
            Json(schema::<endpoints::Deleted>), endpoints::delete, query WRITE, statuses DELETE),
        entry!(PUT "/v1/endpoints/{endpoint}/traffic" "putTraffic" OPERATOR, "Split and mirror traffic; omitted parts stay as they are",
            Json(schema::<Applied<EndpointView>>), endpoints::traffic, query WRITE, body schema::<endpoints::Traffic>),
        entry!(GET "/v1/endpoints/{endpoint}/keys" "getKeys" ADMIN, "The keys of an endpoint",
            Json(schema::<endpoints::Keys>), endpoints::keys),
        entry!(POST "/v1/endpoints/{endpoint}/keys/{slot}/regenerate" "regenerateKey" ADMIN, "Replace a key; the old one stops working",
            Json(schema::<endpoints::Keys>), endpoints::regenerate),
        entry!(GET "/v1/endpoints/{endpoint}/deployments" "listDeployments" VIEWER, "Deployments of an endpoint, newest first",
            Json(schema::<List<DeploymentView>>), deployments::list, query PAGED),
        entry!(GET "/v1/endpoints/{endpoint}/deployments/{deployment}" "getDeployment" VIEWER, "One deployment",
            Json(schema::<DeploymentView>), deployments::get),
        entry!(PUT "/v1/endpoints/{endpoint}/deployments/{deployment}" "putDeployment" OPERATOR, "Create a deployment, or update it to match the document",
            Json(schema::<Applied<DeploymentView>>), deployments::put, query WRITE,
            body |g| document_schema("Deployment", g), statuses PUT),
        entry!(DELETE "/v1/endpoints/{endpoint}/deployments/{deployment}" "deleteDeployment" OPERATOR, "Delete a deployment that gets no traffic",
            Json(schema::<endpoints::Deleted>), deployments::delete, query WRITE, statuses DELETE),
        entry!(GET "/v1/deployments" "listAllDeployments" VIEWER, "Deployments of all endpoints, newest first",
            Json(schema::<List<DeploymentView>>), deployments::list_all, query FILTERED),
        entry!(GET "/v1/autoscale" "listAutoscale" VIEWER, "Autoscale settings, newest first",
            Json(schema::<List<AutoscaleView>>), autoscale::list, query FILTERED),
        entry!(GET "/v1/autoscale/{endpoint}/{deployment}" "getAutoscale" VIEWER, "The Autoscale of a deployment",
            Json(schema::<AutoscaleView>), autoscale::get),
        entry!(PUT "/v1/autoscale/{endpoint}/{deployment}" "putAutoscale" OPERATOR, "Set the Autoscale of a deployment",
            Json(schema::<Applied<AutoscaleView>>), autoscale::put, query WRITE,
            body |g| document_schema("Autoscale", g), statuses PUT),
        entry!(DELETE "/v1/autoscale/{endpoint}/{deployment}" "deleteAutoscale" OPERATOR, "Remove the Autoscale; the deployment's own count applies again",
            Json(schema::<endpoints::Deleted>), autoscale::delete, query WRITE),
        entry!(PUT "/v1/autoscale/{endpoint}/{deployment}/pin" "pin" OPERATOR, "Pin the number of instances, whatever the rules say",
            Json(schema::<autoscale::Manual>), autoscale::pin, body schema::<autoscale::PinBody>),
        entry!(DELETE "/v1/autoscale/{endpoint}/{deployment}/pin" "release" OPERATOR, "Release the pin, so that the rules decide again",
            Json(schema::<autoscale::Manual>), autoscale::release),
        entry!(POST "/v1/autoscale/{endpoint}/{deployment}/pause" "pause" OPERATOR, "Pause scaling, in one direction or both",
            Json(schema::<autoscale::Manual>), autoscale::pause, body schema::<autoscale::Directions>),
        entry!(POST "/v1/autoscale/{endpoint}/{deployment}/resume" "resume" OPERATOR, "Resume scaling, in one direction or both",
            Json(schema::<autoscale::Manual>), autoscale::resume, body schema::<autoscale::Directions>),
        entry!(GET "/v1/autoscale/{endpoint}/{deployment}/preview" "previewAutoscale" VIEWER, "The profiles in force over time, oldest first; the next seven days by default",
            Json(schema::<autoscale::Preview>), autoscale::preview, query &[FROM, TO]),
        entry!(GET "/v1/decisions" "listDecisions" VIEWER, "Decisions, newest first",
            Json(schema::<List<DecisionView>>), decisions::list, query DECISIONS),
        entry!(GET "/v1/decisions/{id}" "getDecision" VIEWER, "One decision with all its inputs",
            Json(schema::<DecisionView>), decisions::get),
        entry!(GET "/v1/instances" "listInstances" VIEWER, "Instances, newest first, including recently ended ones",
            Json(schema::<List<InstanceView>>), instances::list, query FILTERED),
        entry!(GET "/v1/logs/{endpoint}/{deployment}" "getLogs" VIEWER, "Output of instances, oldest first",
        Text, logs::get, query &[
            SINCE,
            ("limit", "Maximum number of past lines; 100000 by default"),
            ("follow", "true: keep following new output"),
            ("instance", "Only of this instance"),
            ("timestamps", "true: prefix each line with `~` and the time it was first seen, at most about ten seconds after it was written"),
        ]),
        entry!(GET "/v1/history" "getHistory" VIEWER, "Past measurements, oldest first",
        Json(schema::<history::History>), history::get, query &[
            BY_ENDPOINT, BY_DEPLOYMENT, FROM, TO, SINCE,
            ("step", "Length of a point; 1s by default"),
        ]),
        entry!(GET "/v1/events" "listEvents" VIEWER, "Events after a position, oldest first",
        Json(events::page_schema), events::list, query &[
            ("after", "Only events after this position; 0 by default"), PAGE[0],
        ]),
        entry!(GET "/v1/events/stream" "streamEvents" VIEWER, "Events as they are written, starting from Last-Event-ID, `after`, or now",
            EventStream, events::stream, query &[("after", "Start after this position")]),
        entry!(GET "/v1/events/verify" "verifyEvents" OPERATOR, "Verify that the log is intact and that the read models match it",
            Json(schema::<events::Verified>), events::verify),
        entry!(POST "/v1/events/verify" "verifyEventsAgainst" OPERATOR, "Also verify that the log still contains these chain heads, which were stored elsewhere",
            Json(schema::<events::Verified>), events::verify_against, body schema::<events::Kept>),
        entry!(GET "/v1/events/heads" "listHeads" VIEWER, "The chain head of each bucket, to be stored elsewhere",
            Json(schema::<List<events::ChainHead>>), events::heads),
        entry!(POST "/v1/events/replay" "replayEvents" OPERATOR, "Evaluate every recorded decision again",
            Json(schema::<events::Replayed>), events::replay, body schema::<events::Replay>),
        entry!(GET "/v1/events/parked" "listParked" VIEWER, "Endpoints that a consumer has parked because it cannot process one of their events",
            Json(schema::<List<parking::Parked>>), parking::list, query &[BY_ENDPOINT, PAGE[0], PAGE[1]]),
        entry!(POST "/v1/events/{position}/skip" "skipEvent" OPERATOR, "Make a consumer skip an event, from its next fold on",
            Json(schema::<parking::Decided>), parking::skip, body schema::<parking::Skip>),
        entry!(POST "/v1/endpoints/{endpoint}/unpark" "unparkEndpoint" OPERATOR, "Make a consumer rebuild its state of a parked endpoint",
            Json(schema::<parking::Decided>), parking::unpark, body schema::<parking::Unpark>),
        entry!(GET "/v1/access" "listAccess" ADMIN, "Tokens, without their secrets",
            Json(schema::<List<AccessView>>), access::list, query PAGED),
        entry!(POST "/v1/access" "grantAccess" ADMIN, "Create a token; it is shown once",
            Json(schema::<access::Granted>), access::grant, body schema::<access::Grant>, statuses &[201]),
        entry!(DELETE "/v1/access/{name}" "revokeAccess" ADMIN, "Revoke a token",
            Json(schema::<access::Revoked>), access::revoke),
        entry!(GET "/openapi.json" "openapi" Gate::Open, "This document",
            Json(any_object), ops::openapi),
        entry!(GET "/healthz" "healthz" Gate::Health, "Alive", Json(schema::<ops::Health>), ops::healthz),
        entry!(GET "/readyz" "readyz" Gate::Health, "Ready to serve; otherwise lists what is missing",
            Json(schema::<ops::Health>), ops::readyz),
        entry!(GET "/metrics" "metrics" Gate::Loopback, "Metrics in the OpenMetrics text format", Text, ops::metrics),
    ]
}

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
