//! What is wrong with a document, as sentences for the person who wrote it.

use serde_json::Value;

use crate::fault::{Fault, Found, Kind, Known, Wanted};

/// Fields and values of later releases, so that they are refused by name and not as mistakes:
/// pointer, value (empty: the field itself), sentence.
const NOT_YET: &[(&str, &str, &str)] = &[
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

/// The fault as a sentence; `value` is what stands there.
pub(crate) fn in_words(fault: &Fault, pointer: &str, value: Option<&Value>) -> String {
    // A field of a later release is one whatever its value is.
    let value = value.filter(|_| !matches!(fault.kind, Kind::UnknownField(_)));
    if let Some(sentence) = not_yet(pointer, value) {
        return sentence;
    }
    let last = fault.steps.last().map_or("", String::as_str);
    match &fault.kind {
        Kind::UnknownField(known) => unknown_field(last, known),
        Kind::MissingField => format!("`{last}` is missing; add it"),
        Kind::UnknownWord { word, known } => format!(
            "`{word}` is not known here; use one of: {}",
            known.join(", ")
        ),
        Kind::Mismatch { found, wanted } => mismatch(found, wanted, pointer),
        Kind::Length { found, wanted } => format!("invalid length {found}, expected {wanted}"),
        Kind::Said(sentence) => sentence.clone(),
    }
}

fn not_yet(pointer: &str, value: Option<&Value>) -> Option<String> {
    let text = value.and_then(Value::as_str).unwrap_or_default();
    let entry = NOT_YET
        .iter()
        .find(|(field, value, _)| *field == pointer && *value == text);
    entry.map(|(_, _, sentence)| (*sentence).to_owned())
}

fn unknown_field(field: &str, known: Known) -> String {
    if known.is_empty() {
        return format!("`{field}` is not a field here, where there are none; remove it");
    }
    if let Some(near) = nearest(field, known) {
        return format!("`{field}` is not a field here; did you mean `{near}`?");
    }
    format!(
        "`{field}` is not a field here; remove it, or use one of: {}",
        known.join(", ")
    )
}

fn mismatch(found: &Found, wanted: &Wanted, pointer: &str) -> String {
    let in_shares = ["/traffic/", "/mirror/"]
        .iter()
        .any(|part| pointer.contains(part));
    let words = match wanted {
        Wanted::U8 if in_shares => "a whole percentage from 0 to 100",
        Wanted::U8 => "a whole number from 0 to 255",
        Wanted::U16 => "a whole number from 0 to 65535",
        Wanted::Unsigned => "a whole number that is not negative",
        Wanted::Signed => "a whole number",
        Wanted::Number => "a number",
        Wanted::Text => "text",
        Wanted::Boolean => "true or false",
        Wanted::List => "a list",
        Wanted::Mapping => "a mapping",
        Wanted::Fields => "a mapping of fields",
        Wanted::Other(words) => words,
    };
    match found {
        Found::Nothing => {
            format!("this is empty, but {words} is wanted; fill it in or remove the field")
        }
        Found::Mapping => format!("this is a mapping, but {words} is wanted; write {words}"),
        Found::List => format!("this is a list, but {words} is wanted; write {words}"),
        Found::Value(found) if *wanted == Wanted::Text => {
            format!("this is the {found}, but text is wanted; put it in quotes")
        }
        Found::Value(found) => format!("this is the {found}, but {words} is wanted; write {words}"),
    }
}

/// The known word that is at most two changes away.
pub(crate) fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let word = word.to_lowercase();
    let distance = |known: &str| strsim::levenshtein(&word, &known.to_lowercase());
    let near = known.iter().map(|known| (distance(known), *known));
    near.min()
        .filter(|(d, known)| *d <= 2 && *d < known.len())
        .map(|(_, known)| known)
}
