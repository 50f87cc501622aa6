//! Words faults as sentences for the author of a document.

use serde_json::Value;

use crate::fault::{ActualValue, ExpectedType, Fault, FaultKind, KnownNames};

/// Fields and values of later releases, which get a message of their own instead of being reported as
/// mistakes: pointer, value (empty: the field itself), message.
const UNAVAILABLE: &[(&str, &str, &str)] = &[
    (
        "/spec/auth",
        "token",
        "token authentication is not available yet; use `key` or `none`",
    ),
    ("/spec/cors", "", "`cors` is not available yet; remove it"),
    (
        "/spec/image",
        "",
        "`image` is not available yet; give a `command` for the process backend",
    ),
    (
        "/spec/model",
        "",
        "`model` is not available yet; give a `command` for the process backend",
    ),
    (
        "/spec/code",
        "",
        "`code` is not available yet; give a `command` for the process backend",
    ),
    (
        "/spec/environment",
        "",
        "`environment` is not available yet; give a `command` and `env`",
    ),
];

/// Describes a fault in a sentence. `value` is the value at `pointer`.
pub(crate) fn describe(fault: &Fault, pointer: &str, value: Option<&Value>) -> String {
    // A field of a later release is reported as such whatever its value is.
    let value = value.filter(|_| !matches!(fault.kind, FaultKind::UnknownField(_)));
    if let Some(message) = unavailable(pointer, value) {
        return message;
    }
    let last = fault.steps.last().map_or("", String::as_str);
    match &fault.kind {
        FaultKind::UnknownField(known) => unknown_field(last, known),
        FaultKind::MissingField => format!("`{last}` is missing; add it"),
        FaultKind::UnknownVariant { variant, known } => format!(
            "`{variant}` is not a valid value; use one of: {}",
            known.join(", ")
        ),
        FaultKind::Mismatch { actual, expected } => mismatch(actual, expected, pointer),
        FaultKind::Length { actual, expected } => {
            format!("invalid length {actual}, expected {expected}")
        }
        FaultKind::Custom(message) => message.clone(),
    }
}

fn unavailable(pointer: &str, value: Option<&Value>) -> Option<String> {
    let text = value.and_then(Value::as_str).unwrap_or_default();
    let entry = UNAVAILABLE
        .iter()
        .find(|(field, value, _)| *field == pointer && *value == text);
    entry.map(|(_, _, message)| (*message).to_owned())
}

fn unknown_field(field: &str, known: KnownNames) -> String {
    if known.is_empty() {
        return format!("`{field}` is not a field here, and no other is allowed; remove it");
    }
    if let Some(near) = nearest(field, known) {
        return format!("`{field}` is not a field here; did you mean `{near}`?");
    }
    format!(
        "`{field}` is not a field here; remove it, or use one of: {}",
        known.join(", ")
    )
}

fn mismatch(actual: &ActualValue, expected: &ExpectedType, pointer: &str) -> String {
    let in_shares = ["/traffic/", "/mirror/"]
        .iter()
        .any(|part| pointer.contains(part));
    let description = match expected {
        ExpectedType::U8 if in_shares => "a whole percentage from 0 to 100",
        ExpectedType::U8 => "a whole number from 0 to 255",
        ExpectedType::U16 => "a whole number from 0 to 65535",
        ExpectedType::Unsigned => "a whole number that is not negative",
        ExpectedType::Signed => "a whole number",
        ExpectedType::Number => "a number",
        ExpectedType::Text => "text",
        ExpectedType::Boolean => "true or false",
        ExpectedType::List => "a list",
        ExpectedType::Mapping => "a mapping",
        ExpectedType::Fields => "a mapping of fields",
        ExpectedType::Other(description) => description,
    };
    match actual {
        ActualValue::Null => {
            format!("this is empty, but {description} is expected; fill it in or remove the field")
        }
        ActualValue::Mapping => {
            format!("this is a mapping, but {description} is expected; write {description}")
        }
        ActualValue::List => {
            format!("this is a list, but {description} is expected; write {description}")
        }
        ActualValue::Value(actual) if *expected == ExpectedType::Text => {
            format!("this is the {actual}, but text is expected; put it in quotes")
        }
        ActualValue::Value(actual) => {
            format!("this is the {actual}, but {description} is expected; write {description}")
        }
    }
}

/// Returns the closest known name, if it is at most two edits away.
pub(crate) fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let name = name.to_lowercase();
    let distance = |known: &str| strsim::levenshtein(&name, &known.to_lowercase());
    let near = known.iter().map(|known| (distance(known), *known));
    near.min()
        .filter(|(d, known)| *d <= 2 && *d < known.len())
        .map(|(_, known)| known)
}
