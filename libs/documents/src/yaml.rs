//! Renders a tree as YAML.

use saphyr::{Scalar, Yaml, YamlEmitter};
use serde_json::Value;

/// Renders a tree as YAML, as `get -o yaml` prints it.
pub fn to_yaml(value: &Value) -> String {
    let mut text = String::new();
    let node = yaml_node(value);
    // Writing to a String cannot fail, and the emitter rejects nothing that a JSON tree holds.
    let _ = YamlEmitter::new(&mut text).dump(&node);
    let body = text.strip_prefix("---\n").unwrap_or(&text);
    format!("{}\n", body.trim_end())
}

fn yaml_node(value: &Value) -> Yaml<'static> {
    match value {
        Value::Null => Yaml::Value(Scalar::Null),
        Value::Bool(value) => Yaml::Value(Scalar::Boolean(*value)),
        Value::Number(number) => match number.as_i64() {
            Some(whole) => Yaml::Value(Scalar::Integer(whole)),
            None => Yaml::Value(Scalar::FloatingPoint(
                number.as_f64().unwrap_or_default().into(),
            )),
        },
        Value::String(text) => Yaml::Value(Scalar::String(text.clone().into())),
        Value::Array(items) => Yaml::Sequence(items.iter().map(yaml_node).collect()),
        Value::Object(fields) => {
            let entry = |(key, value): (&String, &Value)| {
                (
                    Yaml::Value(Scalar::String(key.clone().into())),
                    yaml_node(value),
                )
            };
            Yaml::Mapping(fields.iter().map(entry).collect())
        }
    }
}
