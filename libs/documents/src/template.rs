//! `{{name}}` placeholders, replaced in the text before it is read (`apply --set name=value`).

use std::collections::BTreeMap;

use crate::syntax::Location;

/// A placeholder without a value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{location}: `{{{{{name}}}}}` has no value; give one with --set {name}=VALUE")]
pub struct UnresolvedPlaceholder {
    /// The location of the placeholder.
    pub location: Location,
    /// Its name.
    pub name: String,
}

/// Replaces every placeholder. Values are inserted verbatim and not scanned again, so a value may
/// contain `{{`.
///
/// # Errors
///
/// Returns every placeholder without a value, ordered by location.
pub fn substitute(
    text: &str,
    values: &BTreeMap<String, String>,
) -> Result<String, Vec<UnresolvedPlaceholder>> {
    let mut output = String::with_capacity(text.len());
    let mut unresolved = Vec::new();
    let mut rest = text;
    while let Some((before, name, after)) = next_placeholder(rest) {
        output.push_str(before);
        match values.get(name) {
            Some(value) => output.push_str(value),
            None => unresolved.push(UnresolvedPlaceholder {
                location: location_at(text, text.len() - rest.len() + before.len()),
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

/// Returns the text before the next placeholder, its name, and the text after it.
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

fn location_at(text: &str, offset: usize) -> Location {
    let before = &text[..offset];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    Location {
        line: before.matches('\n').count() + 1,
        column: before[line_start..].chars().count() + 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_replaced_once_and_unresolved_ones_are_reported_with_their_location() {
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
    fn flow_style_yaml_is_not_mistaken_for_a_placeholder() {
        let text = "a: {b: {c: 1}}\nd: {{e: 1}: 2}";
        assert_eq!(substitute(text, &BTreeMap::new()).unwrap(), text);
    }
}
