//! Checks CONTRIBUTING's lists of places to extend: each file exists and contains the quoted text. Also its
//! examples of changes.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

/// Maximum number of files that an addition may have to touch, without tests and generated files.
const FILES_MAX: [(&str, usize); 9] = [
    ("A metric", 3),
    ("A source of measurements", 2),
    ("A backend", 3),
    ("A preset", 3),
    ("A kind of document", 6),
    ("An event", 1),
    ("A kind of stream", 2),
    ("A read model", 2),
    ("A service", 6),
];

/// The places for each kind of addition.
type Places<'a> = BTreeMap<&'a str, KindPlaces<'a>>;

struct KindPlaces<'a> {
    /// Files and text that they contain.
    all: Vec<(&'a str, &'a str)>,
    /// How many files every addition changes or makes.
    required: usize,
}

fn read(path: &str) -> Option<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    std::fs::read_to_string(root.join(path)).ok()
}

/// The quoted places of a text: `FILE` (`TEXT`), which may wrap.
fn quoted_places(text: &str) -> Vec<(&str, &str)> {
    let quoted: Vec<&str> = text.split('`').collect();
    let windows = quoted.windows(3).enumerate();
    let is_place = |index: usize, parts: &[&str]| index % 2 == 1 && parts[1].trim_start() == "(";
    let places = windows.filter(|(index, parts)| is_place(*index, parts));
    places.map(|(_, parts)| (parts[0], parts[2])).collect()
}

/// Parses the section: kinds are in bold.
fn places(text: &str) -> Places<'_> {
    let section = text.split("\n## Extension points\n").nth(1);
    let section = section.unwrap().split("\n## ").next().unwrap();
    let mut places = Places::new();
    let kinds = section.split("**").skip(1);
    let (names, bodies): (Vec<_>, Vec<_>) =
        kinds.enumerate().partition(|(index, _)| index % 2 == 0);
    for ((_, name), (_, body)) in names.into_iter().zip(bodies) {
        let (required, _) = body.split_once("Optionally").unwrap_or((body, ""));
        let new_files = required.matches("new file").count();
        let places_of_kind = KindPlaces {
            all: quoted_places(body),
            required: quoted_places(required).len() + new_files,
        };
        places.insert(name, places_of_kind);
    }
    places
}

#[test]
fn every_extension_place_exists_and_contains_the_quoted_text() {
    let text = read("CONTRIBUTING.md").unwrap();
    for (kind, places) in places(&text) {
        for (file, holds) in places.all {
            let content = read(file).unwrap_or_else(|| panic!("{kind}: there is no file {file}"));
            assert!(
                content.contains(holds),
                "{kind}: {file} does not hold `{holds}`"
            );
        }
    }
}

#[test]
fn additions_touch_few_places() {
    let text = read("CONTRIBUTING.md").unwrap();
    let places = places(&text);
    let kinds: Vec<&str> = places.keys().copied().collect();
    let mut expected = FILES_MAX.map(|(kind, _)| kind);
    expected.sort_unstable();
    assert_eq!(kinds, expected);
    for (kind, max) in FILES_MAX {
        let count = places[kind].required;
        assert!(
            (1..=max).contains(&count),
            "{kind} takes {count} places, at most {max} are allowed"
        );
    }
}

/// Whether a line of code contains this number.
fn contains_number(line: &str, number: &str) -> bool {
    let mut words = line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    !line.trim_start().starts_with("//") && words.any(|word| word.replace('_', "") == number)
}

#[test]
fn the_changes_that_test_the_code_map_start_from_what_the_code_has() {
    let text = read("CONTRIBUTING.md").unwrap();
    let section = text.split("\n## Ten changes to test the code map\n").nth(1);
    let section = section.unwrap().split("\n## ").next().unwrap();
    let rows = section.lines().filter_map(|line| {
        let mut cells = line.split('|').map(str::trim).skip(1);
        Some((
            cells.next()?,
            cells.next()?.strip_prefix('`')?.strip_suffix('`')?,
        ))
    });
    let rows: Vec<(&str, &str)> = rows.collect();
    assert_eq!(rows.len(), 10);
    let mut numbers = 0;
    for (change, file) in rows {
        let content = read(file).unwrap_or_else(|| panic!("{change}: there is no file {file}"));
        let Some((_, number)) = change.split_once(" instead of ") else {
            continue;
        };
        numbers += 1;
        assert!(
            content.lines().any(|line| contains_number(line, number)),
            "{change}: {file} does not contain {number}"
        );
    }
    assert!(numbers > 0);
}
