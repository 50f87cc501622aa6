//! Fuzzing of external input: documents and stored events, mutated at random. Nothing may panic, and
//! accepted input must survive a round trip. A seed is one run of both; `SEED` and `COUNT` select others,
//! longer with `make fuzz`. The gateway's response parser is compared with hyper's in its own crate.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use contract::events::Event;
use documents::{read, to_yaml};

const BYTES_MAX: usize = 64 * 1024;

/// Tokens with a meaning to one of the parsers.
const WORDS: &[&str] = &[
    "---\n",
    "\n",
    ": ",
    "- ",
    "  ",
    "{",
    "}",
    "[",
    "]",
    "\"",
    "'",
    "#",
    "&a ",
    "*a",
    "!!str ",
    "<<: ",
    "|\n",
    "null",
    "~",
    "true",
    "0",
    "-1",
    "1e400",
    "18446744073709551616",
    "9007199254740993",
    ".nan",
    "0x1f",
    "1s",
    "100%",
    "\u{0}",
    "\u{feff}",
    "\\u0000",
    "\\ud800",
    "😀",
    "spec",
    "kind: Endpoint\n",
    "traffic",
    "profiles",
];

/// SplitMix64: small and portable.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
}

/// Mutates a text a few times, also with parts of another.
fn mutate(text: &str, other: &str, random: &mut Random) -> String {
    let mut bytes = text.as_bytes().to_vec();
    for _ in 0..=random.below(4) {
        let (from, to) = (random.below(bytes.len() + 1), random.below(bytes.len() + 1));
        let (from, to) = (from.min(to), from.max(to).min(from.min(to) + 200));
        match random.below(5) {
            0 => drop(bytes.drain(from..to)),
            1 => {
                let slice = bytes[from..to].to_vec();
                bytes.splice(from..from, slice);
            }
            2 => drop(bytes.splice(from..from, random.of(WORDS).bytes())),
            3 => {
                let (start, end) = (random.below(other.len()), random.below(other.len()));
                let slice = &other.as_bytes()[start.min(end)..start.max(end)];
                bytes.splice(from..to, slice.iter().copied());
            }
            _ => {
                if let Some(byte) = bytes.get_mut(from) {
                    *byte ^= 1 << random.below(8);
                }
            }
        }
        bytes.truncate(BYTES_MAX);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Files below the repository, by name.
fn files(folder: &str, extension: &str) -> BTreeMap<String, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .join(folder);
    let found = std::fs::read_dir(folder).unwrap();
    let found = found.map(|entry| entry.unwrap().path());
    let found = found.filter(|path| path.extension().is_some_and(|e| e == extension));
    let named = found.map(|path| {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (name, std::fs::read_to_string(path).unwrap())
    });
    let named: BTreeMap<_, _> = named.collect();
    assert!(named.len() > 2, "no seed files");
    named
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// Runs `check` on one mutated text per seed. A panic names the seed.
fn fuzz(texts: &BTreeMap<String, String>, check: impl Fn(&str, &str) -> bool) {
    let (first, count) = (setting("SEED", 1), setting("COUNT", 2_000));
    println!("SEED={first} COUNT={count}");
    let names: Vec<&String> = texts.keys().collect();
    let mut accepted = 0;
    for seed in first..first + count {
        let random = &mut Random(seed);
        let (name, other) = (*random.of(&names), *random.of(&names));
        let text = mutate(&texts[name], &texts[other], random);
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(name, &text)));
        match checked {
            Ok(yes) => accepted += u64::from(yes),
            Err(_) => panic!("SEED={seed} COUNT=1 ({name}) breaks on:\n{text}"),
        }
    }
    // Otherwise only the first checks of the parser were exercised.
    assert!(
        accepted > count / 100,
        "{accepted} of {count} were accepted"
    );
    assert!(accepted < count, "nothing was mutated");
}

#[test]
fn no_text_panics_the_document_parser_and_accepted_documents_round_trip() {
    let texts = files("deploy/examples/quickstart", "yaml");
    fuzz(&texts, |_, text| {
        let (resources, faults) = read(text);
        for fault in &faults {
            assert!(!fault.finding.detail.is_empty());
        }
        for found in &resources {
            let yaml = to_yaml(&found.resource.to_value());
            let (reread, faults) = read(&yaml);
            assert!(faults.is_empty(), "{faults:?} in\n{yaml}");
            let reread: Vec<_> = reread.iter().map(|read| &read.resource).collect();
            assert_eq!(reread, [&found.resource], "{yaml}");
        }
        !resources.is_empty()
    });
}

#[test]
fn no_stored_bytes_panic_the_event_decoder_and_accepted_events_round_trip() {
    let texts = files("libs/contract/tests/golden/events", "json");
    fuzz(&texts, |file, text| {
        let (name, version) = file.rsplit_once(".v").unwrap();
        let version = version.trim_end_matches(".json").parse().unwrap();
        let Ok(event) = Event::decode(name, version, text) else {
            return false;
        };
        let data = event.data_json().unwrap();
        let reread = Event::decode(event.type_name(), event.version(), &data).unwrap();
        assert_eq!(reread, event);
        true
    });
}
