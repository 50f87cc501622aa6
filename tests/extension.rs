//! CONTRIBUTING says which places something new of a kind has; each is there, and holds what is said of it.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

/// Most files that something new may have to touch, tests and generated files apart.
const FILES_MAX: [(&str, usize); 8] = [
    ("A metric", 3),
    ("A source of measurements", 2),
    ("A backend", 5),
    ("A kind of document", 8),
    ("An event", 1),
    ("A kind of stream", 2),
    ("A read model", 2),
    ("A service", 6),
];

/// By what is new: the places, each a file and what stands in it.
type Places<'a> = BTreeMap<&'a str, Vec<(&'a str, &'a str)>>;

fn read(path: &str) -> Option<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    std::fs::read_to_string(root.join(path)).ok()
}

/// The section is prose: a kind is set in bold, a place is `FILE` (`TEXT`), perhaps over the end of a line.
fn places(text: &str) -> Places<'_> {
    let section = text
        .split("## Something new of a kind that there is")
        .nth(1);
    let section = section.unwrap().split("\n## ").next().unwrap();
    let mut places = Places::new();
    let kinds = section.split("**").skip(1);
    let (names, bodies): (Vec<_>, Vec<_>) =
        kinds.enumerate().partition(|(index, _)| index % 2 == 0);
    for ((_, name), (_, body)) in names.into_iter().zip(bodies) {
        let quoted: Vec<&str> = body.split('`').collect();
        let of_kind = quoted.windows(3).enumerate().filter_map(|(index, parts)| {
            let is_place = index % 2 == 1 && parts[1].trim_start() == "(";
            is_place.then_some((parts[0], parts[2]))
        });
        places.insert(name, of_kind.collect());
    }
    places
}

#[test]
fn every_place_for_something_new_is_there_and_holds_what_is_said_of_it() {
    let text = read("CONTRIBUTING.md").unwrap();
    for (kind, places) in places(&text) {
        for (file, holds) in places {
            let content = read(file).unwrap_or_else(|| panic!("{kind}: there is no file {file}"));
            assert!(
                content.contains(holds),
                "{kind}: {file} does not hold `{holds}`"
            );
        }
    }
}

#[test]
fn something_new_touches_few_places() {
    let text = read("CONTRIBUTING.md").unwrap();
    let places = places(&text);
    let kinds: Vec<&str> = places.keys().copied().collect();
    let mut expected = FILES_MAX.map(|(kind, _)| kind);
    expected.sort_unstable();
    assert_eq!(kinds, expected);
    for (kind, max) in FILES_MAX {
        let count = places[kind].len();
        assert!(
            (1..=max).contains(&count),
            "{kind} takes {count} places, at most {max} are allowed"
        );
    }
}
