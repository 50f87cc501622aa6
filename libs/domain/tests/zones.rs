//! The bundled time zones compared with Python's of the same release, and, by name, where rules
//! changed recently.

#![allow(clippy::unwrap_used, reason = "helpers of tests count as such")]

use std::process::Command;

use contract::time::Timestamp;
use domain::zones::{Instants, ZoneData};

/// Zones of all continents and of every kind of rule: none, one a year, Ramadan's, negative summer
/// time, half hours, rules that changed in 2026, links.
const ZONES: [&str; 42] = [
    "Africa/Cairo",
    "Africa/Casablanca",
    "Africa/El_Aaiun",
    "Africa/Johannesburg",
    "Africa/Lagos",
    "America/Asuncion",
    "America/Bogota",
    "America/Chicago",
    "America/Edmonton",
    "America/Havana",
    "America/Inuvik",
    "America/Los_Angeles",
    "America/Mexico_City",
    "America/New_York",
    "America/Nuuk",
    "America/Santiago",
    "America/Sao_Paulo",
    "America/St_Johns",
    "America/Vancouver",
    "America/Winnipeg",
    "Antarctica/Troll",
    "Asia/Almaty",
    "Asia/Beirut",
    "Asia/Gaza",
    "Asia/Jerusalem",
    "Asia/Kathmandu",
    "Asia/Kolkata",
    "Asia/Shanghai",
    "Asia/Tehran",
    "Asia/Tokyo",
    "Atlantic/Azores",
    "Australia/Lord_Howe",
    "Australia/Sydney",
    "Europe/Berlin",
    "Europe/Chisinau",
    "Europe/Dublin",
    "Europe/Istanbul",
    "Europe/London",
    "Europe/Paris",
    "Pacific/Apia",
    "Pacific/Auckland",
    "Pacific/Chatham",
];
const FROM_YEAR: i64 = 2026;
const TO_YEAR: i64 = 2038;

/// The Python package of a release: `2026f` is 2026.6.
fn python_package(release: &str) -> String {
    let (year, letter) = release.split_at(4);
    let number = u32::from(letter.as_bytes()[0] - b'a') + 1;
    format!("tzdata=={year}.{number}")
}

fn offset(zones: &ZoneData, zone: &str, at: i64) -> i32 {
    let zone = zones.zone(zone).unwrap();
    zone.offset_seconds(Timestamp::from_millis(at * 1000))
}

/// The same text that `tests/servers/python/zones.py` prints for a zone.
fn changes(zones: &ZoneData, zone: &str, from: i64, to: i64) -> String {
    const STEP: usize = 6 * 3600;
    let known = zones.zone(zone).unwrap();
    let offset = |at: i64| known.offset_seconds(Timestamp::from_millis(at * 1000));
    let mut text = format!("{zone} {}", offset(from));
    let mut before = from;
    for at in (from..to).step_by(STEP).skip(1) {
        if offset(at) != offset(before) {
            let (mut low, mut high) = (before, at);
            while high - low > 1 {
                let middle = i64::midpoint(low, high);
                if offset(middle) == offset(low) {
                    low = middle;
                } else {
                    high = middle;
                }
            }
            text += &format!(" {high}={}", offset(high));
        }
        before = at;
    }
    text
}

fn year_begins(year: i64) -> i64 {
    let text = format!("{year}-01-01T00:00:00Z");
    text.parse::<Timestamp>().unwrap().millis() / 1000
}

#[test]
fn zone_offsets_to_2037_equal_those_of_python_for_the_same_release() {
    let zones = ZoneData::bundled();
    let package = python_package(zones.version());
    let Some(interpreter) = servers::python(&[&package]) else {
        return;
    };
    let script = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/servers/python/zones.py"
    );
    let output = Command::new(interpreter)
        .args([script, &FROM_YEAR.to_string(), &TO_YEAR.to_string()])
        .args(ZONES)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let expected = String::from_utf8(output.stdout).unwrap();
    let (from, to) = (year_begins(FROM_YEAR), year_begins(TO_YEAR));
    let ours: String = ZONES
        .iter()
        .map(|zone| changes(&zones, zone, from, to) + "\n")
        .collect();
    assert_eq!(ours, expected);
    assert!(expected.split_whitespace().count() > 500, "{expected}");
}

#[test]
fn zones_whose_rules_changed_in_2026_show_the_right_time_that_december() {
    let zones = ZoneData::bundled();
    let december = year_begins(2027) - 15 * 86_400;
    for (zone, hours) in [
        ("America/Vancouver", -7),
        ("America/Edmonton", -6),
        ("America/Winnipeg", -5),
        ("America/Inuvik", -6),
        ("America/Havana", -4),
        ("Africa/Casablanca", 0),
        ("Africa/El_Aaiun", 0),
    ] {
        assert_eq!(offset(&zones, zone, december), hours * 3600, "{zone}");
    }
}

#[test]
fn a_rule_goes_on_past_the_last_change_that_the_data_lists() {
    let zones = ZoneData::bundled();
    let summer = year_begins(2150) + 200 * 86_400;
    assert_eq!(offset(&zones, "Europe/Paris", summer), 7200);
    assert_eq!(offset(&zones, "Europe/Paris", year_begins(2150)), 3600);
}

#[test]
fn names_have_one_spelling_and_unknown_names_have_no_zone() {
    let zones = ZoneData::bundled();
    for name in [
        "UTC",
        "Etc/UTC",
        "Europe/Paris",
        "America/Argentina/Buenos_Aires",
    ] {
        assert!(zones.zone(name).is_some(), "{name}");
    }
    for name in ["europe/paris", "Europe", "", "Mars/Phobos", "CET5CEST"] {
        assert!(zones.zone(name).is_none(), "{name}");
    }
}

#[test]
fn a_local_time_is_at_one_instant_at_two_or_skipped() {
    let paris = ZoneData::bundled().zone("Europe/Paris").unwrap();
    let at = |text: &str| text.parse::<Timestamp>().unwrap();
    let instants = |text: &str| paris.instants(text.parse().unwrap());
    assert_eq!(
        instants("2026-06-01T12:00:00"),
        Instants::One(at("2026-06-01T10:00:00Z"))
    );
    assert_eq!(
        instants("2026-10-25T02:30:00"),
        Instants::Two(at("2026-10-25T00:30:00Z"), at("2026-10-25T01:30:00Z"))
    );
    for skipped in ["2026-03-29T02:00:00", "2026-03-29T02:59:59.999"] {
        let skipped_at = at("2026-03-29T01:00:00Z");
        assert_eq!(
            instants(skipped),
            Instants::None { skipped_at },
            "{skipped}"
        );
    }
}
