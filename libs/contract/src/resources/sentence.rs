//! What serde says of a wrong document, as sentences for the person who wrote it.

use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_path_to_error::Segment;

use super::syntax::escape;
use crate::problem::Finding;

/// Unknown fields reported at once; past them the document is of another kind altogether.
const UNKNOWN_FIELDS_MAX: usize = 20;

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
        "/spec/backend",
        "container",
        "the container backend is not available yet; use `process` or `simulated`",
    ),
    (
        "/spec/backend",
        "kubernetes",
        "the kubernetes backend is not available yet; use `process` or `simulated`",
    ),
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

/// Reads a typed value out of a tree. All unknown fields are reported together; of other faults only
/// the first, since reading ends there.
pub fn read_typed<T: DeserializeOwned>(value: &Value, base: &str) -> Result<T, Vec<Finding>> {
    let mut value = value.clone();
    let mut findings = Vec::new();
    loop {
        let error = match serde_path_to_error::deserialize::<_, T>(&value) {
            Ok(read) if findings.is_empty() => return Ok(read),
            Ok(_) => return Err(findings),
            Err(error) => error,
        };
        let inner = error.inner().to_string();
        let mut steps = steps_of(error.path());
        let Some(field) = quoted_after(&inner, "unknown field ") else {
            if let Some(field) = quoted_after(&inner, "missing field ") {
                steps.push(field.to_owned());
            }
            let pointer = pointer_of(base, &steps);
            let detail =
                not_yet(&pointer, at(&value, &steps)).unwrap_or_else(|| sentence(&inner, &pointer));
            findings.push(Finding::new(pointer, detail));
            return Err(findings);
        };
        if steps.last().map(String::as_str) != Some(field) {
            steps.push(field.to_owned());
        }
        let pointer = pointer_of(base, &steps);
        let detail = not_yet(&pointer, None).unwrap_or_else(|| unknown_field(field, &inner));
        findings.push(Finding::new(pointer, detail));
        if findings.len() >= UNKNOWN_FIELDS_MAX || !remove(&mut value, &steps) {
            return Err(findings);
        }
    }
}

fn steps_of(path: &serde_path_to_error::Path) -> Vec<String> {
    let step = |segment: &Segment| match segment {
        Segment::Seq { index } => Some(index.to_string()),
        Segment::Map { key } => Some(key.clone()),
        Segment::Enum { .. } | Segment::Unknown => None,
    };
    path.iter().filter_map(step).collect()
}

fn pointer_of(base: &str, steps: &[String]) -> String {
    let mut pointer = base.to_owned();
    for step in steps {
        pointer.push('/');
        pointer.push_str(&escape(step));
    }
    pointer
}

fn at<'a>(value: &'a Value, steps: &[String]) -> Option<&'a Value> {
    value.pointer(&pointer_of("", steps))
}

fn remove(value: &mut Value, steps: &[String]) -> bool {
    let Some((last, parents)) = steps.split_last() else {
        return false;
    };
    let parent = value.pointer_mut(&pointer_of("", parents));
    let fields = parent.and_then(Value::as_object_mut);
    fields.is_some_and(|fields| fields.remove(last).is_some())
}

fn not_yet(pointer: &str, value: Option<&Value>) -> Option<String> {
    let text = value.and_then(Value::as_str).unwrap_or_default();
    let entry = NOT_YET
        .iter()
        .find(|(field, value, _)| *field == pointer && *value == text);
    entry.map(|(_, _, sentence)| (*sentence).to_owned())
}

/// The word in backquotes after a beginning.
fn quoted_after<'a>(message: &'a str, beginning: &str) -> Option<&'a str> {
    message.strip_prefix(beginning)?.split('`').nth(1)
}

/// All words in backquotes.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

fn unknown_field(field: &str, message: &str) -> String {
    let known = quoted(message.split_once(", ").map_or("", |(_, rest)| rest));
    if known.is_empty() {
        return format!("`{field}` is not a field here, where there are none; remove it");
    }
    if let Some(near) = nearest(field, &known) {
        return format!("`{field}` is not a field here; did you mean `{near}`?");
    }
    format!(
        "`{field}` is not a field here; remove it, or use one of: {}",
        known.join(", ")
    )
}

fn sentence(message: &str, pointer: &str) -> String {
    if let Some(field) = quoted_after(message, "missing field ") {
        return format!("`{field}` is missing; add it");
    }
    if let Some(variant) = quoted_after(message, "unknown variant ") {
        let known = quoted(message.split_once(", ").map_or("", |(_, rest)| rest));
        return format!(
            "`{variant}` is not known here; use one of: {}",
            known.join(", ")
        );
    }
    if message.contains("untagged enum NumberOrText") {
        return "this must be a number, or text such as \"50%\"; write one of the two".into();
    }
    let mismatch = message
        .strip_prefix("invalid type: ")
        .or_else(|| message.strip_prefix("invalid value: "))
        .and_then(|rest| rest.split_once(", expected "));
    let Some((found, expected)) = mismatch else {
        return message.to_owned();
    };
    let in_shares = ["/traffic/", "/mirror/"]
        .iter()
        .any(|part| pointer.contains(part));
    let wanted = match expected {
        "u8" if in_shares => "a whole percentage from 0 to 100",
        "u8" => "a whole number from 0 to 255",
        "u16" => "a whole number from 0 to 65535",
        "u32" | "u64" => "a whole number that is not negative",
        "i32" | "i64" => "a whole number",
        "f64" => "a number",
        "a string" => "text",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        "a map" => "a mapping",
        other if other.starts_with("struct ") => "a mapping of fields",
        other => other,
    };
    match found {
        "null" => format!("this is empty, but {wanted} is wanted; fill it in or remove the field"),
        "map" => format!("this is a mapping, but {wanted} is wanted; write {wanted}"),
        "sequence" => format!("this is a list, but {wanted} is wanted; write {wanted}"),
        _ if wanted == "text" => {
            format!("this is the {found}, but text is wanted; put it in quotes")
        }
        _ => format!("this is the {found}, but {wanted} is wanted; write {wanted}"),
    }
}

/// The known word that is at most two changes away.
pub(super) fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let near = known.iter().map(|known| (distance(word, known), *known));
    near.min()
        .filter(|(d, known)| *d <= 2 && *d < known.len())
        .map(|(_, known)| known)
}

/// Levenshtein's distance, by rows, letter case aside.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.to_lowercase().chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.to_lowercase().chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
