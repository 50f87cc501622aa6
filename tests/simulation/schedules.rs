//! A month of schedules through the whole system, with both clock changes in Paris, New York and Lord
//! Howe (which shifts by half an hour).

use chrono::{DateTime, Datelike, NaiveTime, Timelike, Utc, Weekday};
use chrono_tz::Tz;
use contract::resources::AutoscaleSpec;
use contract::time::{Span, Timestamp};

use crate::world::World;

fn office_hours(endpoint: &str, zone: Tz) -> AutoscaleSpec {
    serde_json::from_value(serde_json::json!({
        "target": {"endpoint": endpoint, "deployment": "blue"},
        "stabilization": {"out": "0s", "in": "0s"}, "cooldown": {"out": "0s", "in": "0s"},
        "profiles": [
            {"name": "default", "capacity": {"min": 1, "max": 1, "default": 1}},
            {"name": "office-hours", "priority": 10, "capacity": {"min": 3, "max": 3, "default": 3},
             "schedule": {"cron": "0 9 * * Mon-Fri", "duration": "9h", "timeZone": zone.name()}},
            {"name": "night", "capacity": {"min": 2, "max": 2, "default": 2},
             "schedule": {"weekly": {"days": ["Sat", "Sun"], "start": "22:00", "end": "04:30"}, "timeZone": zone.name()}}
        ]
    }))
    .unwrap()
}

/// The expected count by the zone's wall clock, computed independently of the engine.
fn expected(at: DateTime<Utc>, zone: Tz) -> usize {
    let local = at.with_timezone(&zone);
    let weekend = |day| matches!(day, Weekday::Sat | Weekday::Sun);
    let clock = NaiveTime::from_hms_opt(local.hour(), local.minute(), 0).unwrap();
    let time = |hour, minute| NaiveTime::from_hms_opt(hour, minute, 0).unwrap();
    let evening = clock >= time(22, 0) && weekend(local.weekday());
    let morning = clock < time(4, 30) && weekend(local.weekday().pred());
    if !weekend(local.weekday()) && clock >= time(9, 0) && clock < time(18, 0) {
        3
    } else if evening || morning {
        2
    } else {
        1
    }
}

/// Checks a month in steps of five minutes.
fn a_month(from: &str, zone: Tz) {
    let start: Timestamp = from.parse().unwrap();
    let mut world = World::new(1, start);
    world.deploy("iris", 1, Some(office_hours("iris", zone)));
    let mut changes = 0;
    let mut before = None;
    while world.clock.since(start) < Span::from_secs(31 * 86_400) {
        let at = world.clock;
        let expected = expected(at.to_utc(), zone);
        // Decision, request, start, ready, and for scale-in drain and removal: a few turns.
        (0..16).for_each(|_| world.step(Span::from_secs(1)));
        assert_eq!(world.ready("iris"), expected, "at {at} ({zone})");
        changes += u32::from(before.is_some_and(|before| before != expected));
        before = Some(expected);
        world.clock = at + Span::from_secs(300);
    }
    assert!(changes >= 40, "{changes} changes in a month");
}

#[test]
fn a_month_with_the_spring_change_in_paris_and_new_york() {
    a_month("2026-03-05T00:00:00Z", chrono_tz::Europe::Paris);
    a_month("2026-03-05T00:00:00Z", chrono_tz::America::New_York);
}

#[test]
fn a_month_with_the_autumn_change_in_paris_and_new_york() {
    a_month("2026-10-10T00:00:00Z", chrono_tz::Europe::Paris);
    a_month("2026-10-10T00:00:00Z", chrono_tz::America::New_York);
}

#[test]
fn a_month_with_each_half_hour_change_on_lord_howe() {
    a_month("2026-03-20T00:00:00Z", chrono_tz::Australia::Lord_Howe);
    a_month("2026-09-20T00:00:00Z", chrono_tz::Australia::Lord_Howe);
}
