//! The OpenAPI document, generated from the route table.

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::api::routes;
use crate::auth::role_name;
use crate::table::{Content, Gate, RouteEntry};

/// OpenAPI 3.1, whose schemas are JSON Schema 2020-12.
pub fn document() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.definitions_path = "/components/schemas".into();
    settings.meta_schema = None;
    let mut generator = settings.into_generator();
    let problem = generator.subschema_for::<contract::problem::Problem>();
    let mut paths: Map<String, Value> = Map::new();
    for entry in routes() {
        let operation = operation(&entry, &mut generator);
        let path = paths.entry(entry.path).or_insert_with(|| json!({}));
        path[entry.method.as_str().to_lowercase()] = operation;
    }
    let schemas = generator.take_definitions(true);
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Penstock control API",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Endpoints, deployments, autoscale rules and their results. A write responds once its events are durable, with the header penstock-position; a GET with that header waits (2 s at most) until it reflects them.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "responses": {"Problem": {
                "description": "Refused or failed",
                "content": {"application/problem+json": {"schema": problem}},
            }},
        },
    })
}

/// The document as written to `schemas/openapi.json`.
pub fn text() -> String {
    // Serializing a tree of plain values cannot fail.
    let text = serde_json::to_string_pretty(&document()).unwrap_or_default();
    text + "\n"
}

fn operation(entry: &RouteEntry, generator: &mut schemars::SchemaGenerator) -> Value {
    let mut parameters: Vec<Value> = path_parameters(entry.path)
        .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}))
        .collect();
    parameters.extend(entry.query.iter().map(|(name, description)| {
        json!({"name": name, "in": "query", "description": description, "schema": {"type": "string"}})
    }));
    let content = match entry.response {
        Content::Json(schema) => json!({"application/json": {"schema": schema(generator)}}),
        Content::Text => json!({"text/plain": {"schema": {"type": "string"}}}),
        Content::EventStream => json!({"text/event-stream": {"schema": {"type": "string"}}}),
    };
    let mut responses = Map::new();
    for status in entry.statuses {
        let response = json!({"description": entry.summary, "content": content});
        responses.insert(status.to_string(), response);
    }
    responses.insert(
        "default".into(),
        json!({"$ref": "#/components/responses/Problem"}),
    );
    let mut operation = json!({
        "operationId": entry.id,
        "summary": entry.summary,
        "parameters": parameters,
        "responses": responses,
    });
    match entry.gate {
        Gate::Open => operation["security"] = json!([]),
        Gate::Loopback => {
            operation["security"] = json!([{}, {"token": []}]);
            operation["description"] = json!("Needs no token on loopback.");
        }
        Gate::Health => {
            operation["security"] = json!([{}, {"token": []}]);
            operation["description"] =
                json!("Without a token, and not on loopback, only the status is returned.");
        }
        Gate::Role(role) => {
            operation["security"] = json!([{"token": []}]);
            operation["description"] = json!(format!("Minimum role: {}.", role_name(role)));
            operation["x-penstock-role"] = json!(role_name(role));
        }
    }
    if let Some(schema) = entry.request {
        let schema = schema(generator);
        operation["requestBody"] = json!({"required": true, "content": {
            "application/json": {"schema": schema.clone()},
            "application/yaml": {"schema": schema},
        }});
    }
    operation
}

/// The names in braces in a path template.
fn path_parameters(path: &str) -> impl Iterator<Item = &str> {
    path.split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
}
