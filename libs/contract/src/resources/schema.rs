//! JSON Schemas of whole documents, for editors and for the OpenAPI document.

use schemars::generate::SchemaGenerator;
use schemars::{JsonSchema, Schema, json_schema};
use serde_json::{Value, json};

use super::{API_VERSION, READ_ONLY_METADATA};

pub(super) fn document<M: JsonSchema, S: JsonSchema>(
    kind: &str,
    generator: &mut SchemaGenerator,
) -> Schema {
    let mut metadata = M::json_schema(generator).to_value();
    if let Some(Value::Object(properties)) = metadata.get_mut("properties") {
        for field in READ_ONLY_METADATA {
            properties.insert(field.into(), json!({"readOnly": true}));
        }
    }
    let spec = generator.subschema_for::<S>();
    let needs_metadata = metadata.get("required").is_some();
    let mut required = vec!["apiVersion", "kind", "spec"];
    if needs_metadata {
        required.push("metadata");
    }
    json_schema!({
        "type": "object",
        "title": kind,
        "additionalProperties": false,
        "required": required,
        "properties": {
            "apiVersion": {"const": API_VERSION},
            "kind": {"const": kind},
            "metadata": metadata,
            "spec": spec,
            "status": {"readOnly": true, "description": "The actual state, as reported by Penstock; ignored in input."},
        },
    })
}
