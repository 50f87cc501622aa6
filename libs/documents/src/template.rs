//! `{{name}}` placeholders, replaced in the text before it is read (`apply --set name=value`).

use std::collections::BTreeMap;

use crate::syntax::Place;

/// A placeholder without a value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: `{{{{{name}}}}}` has no value; give one with --set {name}=VALUE")]
pub struct Unresolved {
    /// Where it stands.
    pub place: Place,
    /// What it is called.
    pub name: String,
}

/// Replaces every placeholder, or names all that have no value. Values are put in as they are and
/// not looked at again, so a value that contains `{{` stays what it is.
///
/// # Errors
///
/// Every placeholder without a value, in order of place.
pub fn substitute(
    text: &str,
    values: &BTreeMap<String, String>,
) -> Result<String, Vec<Unresolved>> {
    let mut output = String::with_capacity(text.len());
    let mut unresolved = Vec::new();
    let mut rest = text;
    while let Some((before, name, after)) = next_placeholder(rest) {
        output.push_str(before);
        match values.get(name) {
            Some(value) => output.push_str(value),
            None => unresolved.push(Unresolved {
                place: place_of(text, text.len() - rest.len() + before.len()),
                name: name.to_owned(),
            }),
        }
        rest = after;
    }
    output.push_str(rest);
    if unresolved.is_empty() {
        Ok(output)
    } else {
        Err(unresolved)
    }
}

/// Text before it, its name, text after it.
fn next_placeholder(text: &str) -> Option<(&str, &str, &str)> {
    let mut from = 0;
    loop {
        let start = from + text[from..].find("{{")?;
        let inner = &text[start + 2..];
        let end = inner.find("}}")?;
        let name = inner[..end].trim();
        let is_name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
        if !name.is_empty() && name.bytes().all(is_name) {
            return Some((&text[..start], name, &inner[end + 2..]));
        }
        from = start + 2;
    }
}

fn place_of(text: &str, offset: usize) -> Place {
    let before = &text[..offset];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    Place {
        line: before.matches('\n').count() + 1,
        column: before[line_start..].chars().count() + 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_replaced_once_and_missing_ones_named_with_their_place() {
        let values = BTreeMap::from([("level".to_owned(), "{{other}}".to_owned())]);
        assert_eq!(
            substitute("a: {{ level }}\nb: {port}", &values).unwrap(),
            "a: {{other}}\nb: {port}"
        );
        let unresolved = substitute("a: {{level}}\nb: [{{x}}, {{y}}]", &values).unwrap_err();
        let lines: Vec<String> = unresolved.iter().map(ToString::to_string).collect();
        assert_eq!(
            lines,
            [
                "2:5: `{{x}}` has no value; give one with --set x=VALUE",
                "2:12: `{{y}}` has no value; give one with --set y=VALUE"
            ]
        );
    }

    #[test]
    fn yaml_in_flow_style_is_not_taken_for_a_placeholder() {
        let text = "a: {b: {c: 1}}\nd: {{e: 1}: 2}";
        assert_eq!(substitute(text, &BTreeMap::new()).unwrap(), text);
    }
}
