//! The OpenAPI document, generated from the route table.

use contract::ids::Name;
use contract::time::{Span, Timestamp};
use http::Method;
use schemars::generate::SchemaSettings;
use schemars::{Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::api::routes;
use crate::auth::role_name;
use crate::table::{Content, Gate, MIN_POSITION, Parameter, RouteEntry, Shape};

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
    let mut document = json!({
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
    });
    complete_schemas(&mut document);
    document
}

/// States what generators of clients and tests do not derive: the range of an integer's format, `true`, the
/// schema of anything, as an object, and a choice of texts as one enumeration.
fn complete_schemas(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(complete_schemas),
        Value::Object(fields) => {
            let max =
                fields
                    .get("format")
                    .and_then(Value::as_str)
                    .and_then(|format| match format {
                        "uint8" => Some(u64::from(u8::MAX)),
                        "uint16" => Some(u64::from(u16::MAX)),
                        "uint32" => Some(u64::from(u32::MAX)),
                        "uint" | "uint64" => Some(u64::MAX),
                        _ => None,
                    });
            if let Some(max) = max {
                fields.entry("maximum").or_insert_with(|| json!(max));
            }
            if let Some((texts, description)) = enumeration(fields) {
                fields.remove("oneOf");
                fields.insert("type".to_owned(), json!("string"));
                fields.insert("enum".to_owned(), texts);
                fields.insert("description".to_owned(), json!(description));
            }
            for key in ["items", "additionalProperties"] {
                if fields.get(key) == Some(&Value::Bool(true)) {
                    fields.insert(key.to_owned(), json!({}));
                }
            }
            if let Some(Value::Object(properties)) = fields.get_mut("properties") {
                for property in properties
                    .values_mut()
                    .filter(|schema| **schema == json!(true))
                {
                    *property = json!({});
                }
            }
            fields.values_mut().for_each(complete_schemas);
        }
        _ => {}
    }
}

/// The document as written to `schemas/openapi.json`.
pub fn text() -> String {
    // Serializing a tree of plain values cannot fail.
    let text = serde_json::to_string_pretty(&document()).unwrap_or_default();
    text + "\n"
}

fn operation(entry: &RouteEntry, generator: &mut SchemaGenerator) -> Value {
    let mut parameters: Vec<Value> = path_parameters(entry.path)
        .filter_map(Parameter::in_path)
        .map(|parameter| described(&parameter, "path", generator))
        .collect();
    for parameter in entry.query {
        parameters.push(described(parameter, "query", generator));
    }
    let waits = (entry.method == Method::GET).then_some(&MIN_POSITION);
    for parameter in waits.into_iter().chain(entry.headers) {
        parameters.push(described(parameter, "header", generator));
    }
    let content = match entry.response {
        Content::Json(schema) => json!({"application/json": {"schema": schema(generator)}}),
        Content::Text => json!({"text/plain": {"schema": {"type": "string"}}}),
        Content::Metrics => json!({
            "application/openmetrics-text": {"schema": {"type": "string"}},
            "text/plain": {"schema": {"type": "string"}},
        }),
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
        // An empty body is an empty object.
        let is_required = !accepts_empty_object(&schema, generator);
        operation["requestBody"] = json!({"required": is_required, "content": {
            "application/json": {"schema": schema.clone()},
            "application/yaml": {"schema": schema},
        }});
    }
    operation
}

/// The texts of a choice among texts only, and its description with those of the texts.
fn enumeration(fields: &Map<String, Value>) -> Option<(Value, String)> {
    let mut texts = Vec::new();
    let own = fields.get("description").and_then(Value::as_str);
    let mut lines: Vec<String> = own.map(str::to_owned).into_iter().collect();
    for choice in fields.get("oneOf")?.as_array()? {
        let of_choice = match (choice.get("const"), choice.get("enum")) {
            (Some(text), _) => std::slice::from_ref(text),
            (None, Some(Value::Array(texts))) => texts,
            _ => return None,
        };
        if !of_choice.iter().all(Value::is_string) {
            return None;
        }
        if let Some(description) = choice.get("description").and_then(Value::as_str) {
            let names: Vec<&str> = of_choice.iter().filter_map(Value::as_str).collect();
            lines.push(format!("`{}`: {description}", names.join("`, `")));
        }
        texts.extend_from_slice(of_choice);
    }
    Some((Value::Array(texts), lines.join("\n\n")))
}

fn described(parameter: &Parameter, place: &str, generator: &mut SchemaGenerator) -> Value {
    let schema = match parameter.shape {
        Shape::Text => json!({"type": "string"}),
        Shape::Name => generator.subschema_for::<Name>().to_value(),
        Shape::Flag => json!({"type": "boolean"}),
        Shape::Uuid => json!({"type": "string", "format": "uuid"}),
        Shape::Whole(min, max) => json!({"type": "integer", "minimum": min, "maximum": max}),
        Shape::Time => json!({"anyOf": [
            generator.subschema_for::<Timestamp>(), generator.subschema_for::<Span>(),
        ]}),
        Shape::Span => generator.subschema_for::<Span>().to_value(),
        Shape::Matching(pattern) => json!({"type": "string", "pattern": pattern}),
        Shape::OneOf(texts) => json!({"type": "string", "enum": texts}),
    };
    json!({
        "name": parameter.name, "in": place, "required": place == "path",
        "description": parameter.description, "schema": schema,
    })
}

/// Whether a schema has no required properties.
fn accepts_empty_object(schema: &Schema, generator: &SchemaGenerator) -> bool {
    let name = schema.get("$ref").and_then(Value::as_str);
    let name = name.and_then(|path| path.rsplit('/').next());
    let defined = name.and_then(|name| generator.definitions().get(name));
    let required = defined.unwrap_or(schema.as_value()).get("required");
    required.and_then(Value::as_array).is_none_or(Vec::is_empty)
}

/// The names in braces in a path template.
fn path_parameters(path: &str) -> impl Iterator<Item = &str> {
    path.split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
}
