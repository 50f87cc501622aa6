//! Every route there is, once: method, path, least role, what goes in, what comes out, and who
//! answers. The router, the authorisation and the OpenAPI document are all made from it.

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

use crate::answer::{Answer, List};
use crate::api::{
    access, autoscale, decisions, deployments, endpoints, events, history, instances, logs, ops,
    parking,
};
use crate::call::Call;
use crate::service::App;

pub type Handler = fn(Arc<App>, Call) -> BoxFuture<'static, Answer>;
type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// Who may come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    Open,
    /// Open on loopback; elsewhere for viewers, and for who has the internal token.
    Loopback,
    /// Open, and tells the details to whom [`Gate::Loopback`] lets in.
    Health,
    Role(AccessRole),
}

/// A query parameter: name, what it is for.
pub type Parameter = (&'static str, &'static str);

#[derive(Clone)]
pub struct Entry {
    pub method: Method,
    pub path: &'static str,
    /// Unique; the OpenAPI operation.
    pub id: &'static str,
    pub summary: &'static str,
    pub gate: Gate,
    pub query: &'static [Parameter],
    pub request: Option<SchemaOf>,
    /// The answer's content type, and the schema of it where it is JSON.
    pub answer: Content,
    /// Statuses of success.
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
    ("limit", "Items per page, 1 to 1000; 100 unless given"),
    ("cursor", "`nextCursor` of the page before"),
];
const OF_ENDPOINT: Parameter = ("endpoint", "Only of this endpoint");
const OF_DEPLOYMENT: Parameter = ("deployment", "Only of deployments with this name");
const SINCE: Parameter = ("since", "An instant, or a duration back from now");
const DRY_RUN: Parameter = ("dryRun", "true: say what would change, and change nothing");
const FROM: Parameter = ("from", "An instant, or a duration back from now");
const TO: Parameter = ("to", "An instant, or a duration back from now");

const LISTED: &[Parameter] = &[PAGE[0], PAGE[1]];
const OF_ONE: &[Parameter] = &[OF_ENDPOINT, OF_DEPLOYMENT, PAGE[0], PAGE[1]];
const DECISIONS: &[Parameter] = &[OF_ENDPOINT, OF_DEPLOYMENT, SINCE, PAGE[0], PAGE[1]];
const WRITE: &[Parameter] = &[DRY_RUN];

fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

fn anything(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object"})
}

macro_rules! handler {
    ($function:path) => {
        |app, call| Box::pin($function(app, call))
    };
}

/// Declares one entry; what is left out is empty.
macro_rules! entry {
    ($method:ident $path:literal $id:literal $gate:expr, $summary:literal, $answer:expr, $function:path
        $(, query $query:expr)? $(, body $body:expr)? $(, statuses $statuses:expr)?) => {{
        let entry = Entry {
            method: Method::$method,
            path: $path,
            id: $id,
            summary: $summary,
            gate: $gate,
            query: &[],
            request: None,
            answer: $answer,
            statuses: &[200],
            handler: handler!($function),
        };
        $(let entry = Entry { query: $query, ..entry };)?
        $(let entry = Entry { request: Some($body), ..entry };)?
        $(let entry = Entry { statuses: $statuses, ..entry };)?
        entry
    }};
}

/// The table.
pub fn routes() -> Vec<Entry> {
    use Content::{EventStream, Json, Text};
    const VIEWER: Gate = Gate::Role(AccessRole::Viewer);
    const OPERATOR: Gate = Gate::Role(AccessRole::Operator);
    const ADMIN: Gate = Gate::Role(AccessRole::Admin);
    const PUT: &[u16] = &[200, 201];
    const GOING: &[u16] = &[200, 202];
    vec![
        entry!(GET "/v1/endpoints" "listEndpoints" VIEWER, "Endpoints, newest first",
            Json(of::<List<EndpointView>>), endpoints::list, query LISTED),
        entry!(GET "/v1/endpoints/{endpoint}" "getEndpoint" VIEWER, "One endpoint",
            Json(of::<EndpointView>), endpoints::get),
        entry!(PUT "/v1/endpoints/{endpoint}" "putEndpoint" OPERATOR, "Make an endpoint, or change it to what the document says",
            Json(of::<Applied<EndpointView>>), endpoints::put, query WRITE,
            body |g| document_schema("Endpoint", g), statuses PUT),
        entry!(DELETE "/v1/endpoints/{endpoint}" "deleteEndpoint" OPERATOR, "Delete an endpoint with its deployments",
            Json(of::<endpoints::Deleted>), endpoints::delete, query WRITE, statuses GOING),
        entry!(PUT "/v1/endpoints/{endpoint}/traffic" "putTraffic" OPERATOR, "Split and mirror traffic; what is left out stays",
            Json(of::<Applied<EndpointView>>), endpoints::traffic, query WRITE, body of::<endpoints::Traffic>),
        entry!(GET "/v1/endpoints/{endpoint}/keys" "getKeys" ADMIN, "The keys of an endpoint",
            Json(of::<endpoints::Keys>), endpoints::keys),
        entry!(POST "/v1/endpoints/{endpoint}/keys/{slot}/regenerate" "regenerateKey" ADMIN, "Replace a key; the old one stops working",
            Json(of::<endpoints::Keys>), endpoints::regenerate),
        entry!(GET "/v1/endpoints/{endpoint}/deployments" "listDeployments" VIEWER, "Deployments of an endpoint, newest first",
            Json(of::<List<DeploymentView>>), deployments::list, query LISTED),
        entry!(GET "/v1/endpoints/{endpoint}/deployments/{deployment}" "getDeployment" VIEWER, "One deployment",
            Json(of::<DeploymentView>), deployments::get),
        entry!(PUT "/v1/endpoints/{endpoint}/deployments/{deployment}" "putDeployment" OPERATOR, "Make a deployment, or change it to what the document says",
            Json(of::<Applied<DeploymentView>>), deployments::put, query WRITE,
            body |g| document_schema("Deployment", g), statuses PUT),
        entry!(DELETE "/v1/endpoints/{endpoint}/deployments/{deployment}" "deleteDeployment" OPERATOR, "Delete a deployment that gets no traffic",
            Json(of::<endpoints::Deleted>), deployments::delete, query WRITE, statuses GOING),
        entry!(GET "/v1/deployments" "listAllDeployments" VIEWER, "Deployments of all endpoints, newest first",
            Json(of::<List<DeploymentView>>), deployments::list_all, query OF_ONE),
        entry!(GET "/v1/autoscale" "listAutoscale" VIEWER, "Autoscale settings, newest first",
            Json(of::<List<AutoscaleView>>), autoscale::list, query OF_ONE),
        entry!(GET "/v1/autoscale/{endpoint}/{deployment}" "getAutoscale" VIEWER, "The Autoscale of a deployment",
            Json(of::<AutoscaleView>), autoscale::get),
        entry!(PUT "/v1/autoscale/{endpoint}/{deployment}" "putAutoscale" OPERATOR, "Set the Autoscale of a deployment",
            Json(of::<Applied<AutoscaleView>>), autoscale::put, query WRITE,
            body |g| document_schema("Autoscale", g), statuses PUT),
        entry!(DELETE "/v1/autoscale/{endpoint}/{deployment}" "deleteAutoscale" OPERATOR, "Go back to the deployment's own count",
            Json(of::<endpoints::Deleted>), autoscale::delete, query WRITE),
        entry!(PUT "/v1/autoscale/{endpoint}/{deployment}/pin" "pin" OPERATOR, "Hold a count, whatever the rules say",
            Json(of::<autoscale::Manual>), autoscale::pin, body of::<autoscale::PinBody>),
        entry!(DELETE "/v1/autoscale/{endpoint}/{deployment}/pin" "release" OPERATOR, "Let the rules decide again",
            Json(of::<autoscale::Manual>), autoscale::release),
        entry!(POST "/v1/autoscale/{endpoint}/{deployment}/pause" "pause" OPERATOR, "Stop scaling, in one direction or both",
            Json(of::<autoscale::Manual>), autoscale::pause, body of::<autoscale::Directions>),
        entry!(POST "/v1/autoscale/{endpoint}/{deployment}/resume" "resume" OPERATOR, "Scale again, in one direction or both",
            Json(of::<autoscale::Manual>), autoscale::resume, body of::<autoscale::Directions>),
        entry!(GET "/v1/autoscale/{endpoint}/{deployment}/preview" "previewAutoscale" VIEWER, "Which profile holds when, oldest first; the next seven days unless given",
            Json(of::<autoscale::Preview>), autoscale::preview, query &[FROM, TO]),
        entry!(GET "/v1/decisions" "listDecisions" VIEWER, "Decisions, newest first",
            Json(of::<List<DecisionView>>), decisions::list, query DECISIONS),
        entry!(GET "/v1/decisions/{id}" "getDecision" VIEWER, "One decision with everything that led to it",
            Json(of::<DecisionView>), decisions::get),
        entry!(GET "/v1/instances" "listInstances" VIEWER, "Instances, newest first, with the last ones that ended",
            Json(of::<List<InstanceView>>), instances::list, query OF_ONE),
        entry!(GET "/v1/logs/{endpoint}/{deployment}" "getLogs" VIEWER, "Output of instances, oldest first",
        Text, logs::get, query &[
            SINCE,
            ("limit", "At most so many lines of the past; 100000 unless given"),
            ("follow", "true: go on with what is written later"),
            ("instance", "Only of this instance"),
            ("timestamps", "true: begin each line with `~` and when it was first seen, at most about ten seconds after it was written"),
        ]),
        entry!(GET "/v1/history" "getHistory" VIEWER, "Measurements of the past, oldest first",
        Json(of::<history::History>), history::get, query &[
            OF_ENDPOINT, OF_DEPLOYMENT, FROM, TO, SINCE,
            ("step", "Length of a point; 1s unless given"),
        ]),
        entry!(GET "/v1/events" "listEvents" VIEWER, "Events after a position, oldest first",
        Json(events::page_schema), events::list, query &[
            ("after", "Only events after this position; 0 unless given"), PAGE[0],
        ]),
        entry!(GET "/v1/events/stream" "streamEvents" VIEWER, "Events as they are written, from Last-Event-ID, `after`, or now on",
            EventStream, events::stream, query &[("after", "Begin after this position")]),
        entry!(GET "/v1/events/verify" "verifyEvents" OPERATOR, "Whether the log is sound and the read models are what it makes of them",
            Json(of::<events::Verified>), events::verify),
        entry!(POST "/v1/events/verify" "verifyEventsAgainst" OPERATOR, "The same, and whether the log still holds these ends of chains, kept elsewhere",
            Json(of::<events::Verified>), events::verify_against, body of::<events::Kept>),
        entry!(GET "/v1/events/heads" "listHeads" VIEWER, "The ends of the chains of events, a bucket each, to be kept elsewhere",
            Json(of::<List<events::ChainHead>>), events::heads),
        entry!(POST "/v1/events/replay" "replayEvents" OPERATOR, "Evaluate every recorded decision again",
            Json(of::<events::Replayed>), events::replay, body of::<events::Replay>),
        entry!(GET "/v1/events/parked" "listParked" VIEWER, "Endpoints that a consumer cannot digest an event of, and has parked",
            Json(of::<List<parking::Parked>>), parking::list, query &[OF_ENDPOINT, PAGE[0], PAGE[1]]),
        entry!(POST "/v1/events/{position}/skip" "skipEvent" OPERATOR, "Let a consumer pass over an event, from its next fold on",
            Json(of::<parking::Decided>), parking::skip, body of::<parking::Skip>),
        entry!(POST "/v1/endpoints/{endpoint}/unpark" "unparkEndpoint" OPERATOR, "Let a consumer rebuild its state of a parked endpoint",
            Json(of::<parking::Decided>), parking::unpark, body of::<parking::Unpark>),
        entry!(GET "/v1/access" "listAccess" ADMIN, "Tokens, without the tokens",
            Json(of::<List<AccessView>>), access::list, query LISTED),
        entry!(POST "/v1/access" "grantAccess" ADMIN, "Make a token; it is shown once",
            Json(of::<access::Granted>), access::grant, body of::<access::Grant>, statuses &[201]),
        entry!(DELETE "/v1/access/{name}" "revokeAccess" ADMIN, "Make a token worthless",
            Json(of::<access::Revoked>), access::revoke),
        entry!(GET "/openapi.json" "openapi" Gate::Open, "This document",
            Json(anything), ops::openapi),
        entry!(GET "/healthz" "healthz" Gate::Health, "Alive", Json(of::<ops::Health>), ops::healthz),
        entry!(GET "/readyz" "readyz" Gate::Health, "Can serve; else says what is missing",
            Json(of::<ops::Health>), ops::readyz),
        entry!(GET "/metrics" "metrics" Gate::Loopback, "Metrics in the OpenMetrics text format", Text, ops::metrics),
    ]
}

/// The schema of a record, whose data depends on its type.
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
