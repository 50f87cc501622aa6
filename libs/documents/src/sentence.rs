//! What serde says of a wrong document, as sentences for the person who wrote it.

use serde_json::{Value, json};
use serde_path_to_error::Segment;

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

/// What serde stopped at.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    /// From the root of what is read.
    pub steps: Vec<String>,
    pub kind: Kind,
    message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A field that is not known.
    Unknown,
    /// A field that is not there.
    Missing,
    /// A value that does not fit.
    Unfit,
}

impl Fault {
    pub fn of(error: &serde_path_to_error::Error<serde_json::Error>) -> Self {
        let message = error.inner().to_string();
        let mut steps = steps_of(error.path());
        let mut kind = Kind::Unfit;
        if let Some(field) = quoted_after(&message, "unknown field ") {
            kind = Kind::Unknown;
            if steps.last().map(String::as_str) != Some(field) {
                steps.push(field.to_owned());
            }
        } else if let Some(field) = quoted_after(&message, "missing field ") {
            kind = Kind::Missing;
            steps.push(field.to_owned());
        }
        Self {
            steps,
            kind,
            message,
        }
    }

    /// A word that is not one of a few, and resembles none of them: what was meant is not known.
    pub fn is_unclear_choice(&self) -> bool {
        let word = quoted_after(&self.message, "unknown variant ");
        let known = quoted(self.message.split_once(", ").map_or("", |(_, rest)| rest));
        word.is_some_and(|word| nearest(word, &known).is_none())
    }

    /// Values that would fit, as far as serde says.
    pub fn fitting(&self) -> Vec<Value> {
        let message = &self.message;
        if let Some(word) = quoted_after(message, "unknown variant ") {
            let known = quoted(message.split_once(", ").map_or("", |(_, rest)| rest));
            let meant = nearest(word, &known).or(known.first().copied());
            return meant.map(|meant| json!(meant)).into_iter().collect();
        }
        let expected = message.split_once(", expected ").map(|(_, rest)| rest);
        let value = match expected {
            Some("u8" | "u16" | "u32" | "u64" | "i32" | "i64" | "f64") => json!(1),
            Some("a boolean") => json!(true),
            Some("a sequence") => json!([]),
            Some(other) if other == "a map" || other.starts_with("struct ") => json!({}),
            _ => return Vec::new(),
        };
        vec![value]
    }
}

/// The fault as a sentence; `value` is what stands there.
pub(crate) fn in_words(fault: &Fault, pointer: &str, value: Option<&Value>) -> String {
    match fault.kind {
        Kind::Unknown => not_yet(pointer, None).unwrap_or_else(|| {
            let field = fault.steps.last().map_or("", String::as_str);
            unknown_field(field, &fault.message)
        }),
        Kind::Missing | Kind::Unfit => {
            not_yet(pointer, value).unwrap_or_else(|| sentence(&fault.message, pointer))
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
pub(crate) fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let word = word.to_lowercase();
    let distance = |known: &str| strsim::levenshtein(&word, &known.to_lowercase());
    let near = known.iter().map(|known| (distance(known), *known));
    near.min()
        .filter(|(d, known)| *d <= 2 && *d < known.len())
        .map(|(_, known)| known)
}
