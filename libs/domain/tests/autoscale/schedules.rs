//! Schedules against an oracle that does not use them: it lists the wall clock of every minute and
//! looks up times there.

use chrono::{Datelike, Duration, NaiveDateTime, NaiveTime, Timelike};
use chrono_tz::Tz;
use contract::decision::{CarriedState, Decision, InstanceCounts, Pause};
use contract::time::{Span, Timestamp};
use domain::autoscale::{Policy, Selection, TRANSITIONS_MAX, TickInputs, explain, is_reproducible};
use serde_json::{Value, json};

use crate::harness::*;

fn policy(profiles: Vec<Value>) -> Policy {
    let mut all = vec![json!({"name": "default", "capacity": {"min": 1, "max": 9, "default": 1}})];
    all.extend(profiles);
    compile(&spec(&document(json!([]), json!({"profiles": all})))).unwrap()
}

fn profile(name: &str, priority: i32, schedule: Value) -> Value {
    json!({"name": name, "priority": priority, "schedule": schedule,
        "capacity": {"min": 2, "max": 9, "default": 2}})
}

fn instant(text: &str) -> Timestamp {
    text.parse().unwrap()
}

/// Opening and closing instants of one schedule in a period.
fn changes(schedule: Value, from: &str, to: &str) -> Vec<String> {
    let policy = policy(vec![profile("other", 1, schedule)]);
    policy
        .transitions(instant(from), instant(to))
        .iter()
        .map(|transition| transition.at.to_utc().format("%m-%d %H:%M").to_string())
        .collect()
}

#[test]
fn the_examples_in_the_documentation_of_time_zones_hold() {
    let cron = |text: &str, duration: &str| json!({"cron": text, "duration": duration, "timeZone": "Europe/Paris"});
    let weekly = |start: &str, end: &str| json!({"weekly": {"days": ["Sun"], "start": start, "end": end}, "timeZone": "Europe/Paris"});
    let spring = ("2026-03-28T12:00:00Z", "2026-03-29T12:00:00Z");
    let autumn = ("2026-10-24T12:00:00Z", "2026-10-25T12:00:00Z");
    for (schedule, (from, to), expected) in [
        (
            cron("30 2 * * *", "1h"),
            spring,
            vec!["03-29 01:00", "03-29 02:00"],
        ),
        (weekly("02:10", "02:50"), spring, vec![]),
        (
            cron("30 2 * * *", "1h"),
            autumn,
            vec!["10-25 00:30", "10-25 02:30"],
        ),
        (
            weekly("00:00", "02:30"),
            autumn,
            vec!["10-24 22:00", "10-25 01:30"],
        ),
        (
            cron("0 22 * * *", "9h"),
            spring,
            vec!["03-28 21:00", "03-29 05:00"],
        ),
        (
            cron("0 22 * * *", "9h"),
            autumn,
            vec!["10-24 20:00", "10-25 06:00"],
        ),
    ] {
        assert_eq!(changes(schedule.clone(), from, to), expected, "{schedule}");
    }
}

#[test]
fn a_preview_says_from_when_on_it_was_cut_and_continues_there() {
    let schedule = json!({"cron": "*/2 * * * *", "duration": "1m"});
    let policy = policy(vec![profile("other", 1, schedule)]);
    let (from, to) = (
        instant("2026-06-01T00:00:00Z"),
        instant("2026-06-09T00:00:00Z"),
    );
    let cut = policy.preview(from, to);
    assert_eq!(cut.items.len(), TRANSITIONS_MAX + 1);
    let cut_at = cut.cut_at.unwrap();
    let last = cut.items.last().unwrap();
    assert_eq!(cut_at.since(last.at), Span::from_secs(60));
    let rest = policy.preview(cut_at, to);
    assert_eq!((rest.items[0].at, rest.cut_at), (cut_at, None));
    let minutes = to.since(from).secs() as usize / 60;
    assert_eq!(cut.items.len() + rest.items.len(), minutes);
}

#[test]
fn an_opening_in_the_gap_moves_to_the_next_instant_that_exists() {
    // On 2026-03-29 in Paris, 02:00 is 03:00 (01:00 UTC).
    let cron = json!({"cron": "30 2 * * *", "duration": "1h", "timeZone": "Europe/Paris"});
    let found = changes(cron, "2026-03-28T12:00:00Z", "2026-03-30T12:00:00Z");
    assert_eq!(
        found,
        ["03-29 01:00", "03-29 02:00", "03-30 00:30", "03-30 01:30"]
    );
    let weekly = json!({"weekly": {"days": ["Sun"], "start": "02:30", "end": "04:00"}, "timeZone": "Europe/Paris"});
    let found = changes(weekly, "2026-03-28T12:00:00Z", "2026-03-30T12:00:00Z");
    assert_eq!(found, ["03-29 01:00", "03-29 02:00"]);
    // A window entirely inside the gap does not open.
    let inside = json!({"weekly": {"days": ["Sun"], "start": "02:15", "end": "02:45"}, "timeZone": "Europe/Paris"});
    assert!(changes(inside, "2026-03-28T12:00:00Z", "2026-03-30T12:00:00Z").is_empty());
}

#[test]
fn a_time_that_exists_twice_opens_at_the_first_and_closes_at_the_last() {
    // On 2026-10-25 in Paris, 02:00 to 03:00 occurs twice, from 00:00 and from 01:00 UTC.
    let cron = json!({"cron": "30 2 * * *", "duration": "1h", "timeZone": "Europe/Paris"});
    let found = changes(cron, "2026-10-24T12:00:00Z", "2026-10-25T12:00:00Z");
    assert_eq!(found, ["10-25 00:30", "10-25 02:30"]);
    let weekly = json!({"weekly": {"days": ["Sun"], "start": "01:30", "end": "02:30"}, "timeZone": "Europe/Paris"});
    let found = changes(weekly, "2026-10-24T12:00:00Z", "2026-10-25T12:00:00Z");
    assert_eq!(found, ["10-24 23:30", "10-25 01:30"]);
    let dated = json!({"dated": {"from": "2026-10-25T02:00", "to": "2026-10-25T02:30"}, "timeZone": "Europe/Paris"});
    let found = changes(dated, "2026-10-24T12:00:00Z", "2026-10-25T12:00:00Z");
    assert_eq!(found, ["10-25 00:00", "10-25 01:30"]);
}

#[test]
fn office_hours_begin_and_end_at_the_same_wall_clock_all_year() {
    let office = json!({"cron": "0 9 * * Mon-Fri", "duration": "9h", "timeZone": "Europe/Paris"});
    let found = changes(
        office.clone(),
        "2026-03-27T00:00:00Z",
        "2026-03-31T00:00:00Z",
    );
    assert_eq!(
        found,
        ["03-27 08:00", "03-27 17:00", "03-30 07:00", "03-30 16:00"]
    );
    // A night shift across the change ends at 06:00 local time, whatever its length.
    let night = json!({"cron": "0 22 * * *", "duration": "8h", "timeZone": "Europe/Paris"});
    let found = changes(night, "2026-10-24T12:00:00Z", "2026-10-25T12:00:00Z");
    assert_eq!(found, ["10-24 20:00", "10-25 05:00"]);
}

#[test]
fn windows_reach_over_midnight_and_whole_days() {
    let night = json!({"weekly": {"days": ["Fri"], "start": "22:00", "end": "06:00"}});
    assert_eq!(
        changes(night, "2026-03-02T00:00:00Z", "2026-03-09T00:00:00Z"),
        ["03-06 22:00", "03-07 06:00"]
    );
    let day = json!({"weekly": {"days": ["Sat", "Sun"], "start": "00:00", "end": "24:00"}});
    assert_eq!(
        changes(day, "2026-03-03T00:00:00Z", "2026-03-09T12:00:00Z"),
        ["03-07 00:00", "03-09 00:00"]
    );
    // Longer than the time between openings: it never closes.
    let always = json!({"cron": "0 0 * * *", "duration": "30h"});
    assert!(changes(always, "2026-03-02T00:01:00Z", "2026-04-02T00:00:00Z").is_empty());
}

#[test]
fn instants_with_an_offset_mean_themselves() {
    let dated = json!({"dated": {"from": "2026-06-01T10:00:00+02:00", "to": "2026-06-01T12:00"}, "timeZone": "America/New_York"});
    assert_eq!(
        changes(dated, "2026-06-01T00:00:00Z", "2026-06-02T00:00:00Z"),
        ["06-01 08:00", "06-01 16:00"]
    );
}

#[test]
fn priority_comes_first_then_dated_then_recurring_then_the_order() {
    let always = |name: &str, priority| {
        profile(
            name,
            priority,
            json!({"cron": "* * * * *", "duration": "5m"}),
        )
    };
    let dated = |name: &str, priority| {
        let schedule = json!({"dated": {"from": "2026-01-01T00:00", "to": "2026-12-31T00:00"}});
        profile(name, priority, schedule)
    };
    for (profiles, expected) in [
        (vec![], "default"),
        (vec![always("a", 0)], "a"),
        (vec![always("a", -1)], "default"),
        (vec![always("a", 0), always("b", 0)], "a"),
        (vec![always("a", 0), always("b", 1)], "b"),
        (vec![always("a", 0), dated("b", 0)], "b"),
        (vec![always("a", 1), dated("b", 0)], "a"),
    ] {
        let at = policy(profiles).profile_at(instant("2026-06-01T12:00:00Z"));
        assert_eq!(at.profile, expected);
    }
}

#[test]
fn transitions_name_the_profile_and_its_capacity_at_each_change() {
    let policy = policy(vec![profile(
        "day",
        1,
        json!({"cron": "0 9 * * *", "duration": "1h"}),
    )]);
    let found = policy.transitions(
        instant("2026-06-01T09:00:00Z"),
        instant("2026-06-02T09:00:00Z"),
    );
    let names: Vec<(&str, u32)> = found
        .iter()
        .map(|change| (change.profile.as_str(), change.min))
        .collect();
    assert_eq!(names, [("day", 2), ("default", 1)]);
    assert_eq!(found[0].at, instant("2026-06-01T09:00:00Z"));
}

/// The wall clock of every minute of a period.
struct WallClock {
    first: Timestamp,
    minutes: Vec<NaiveDateTime>,
}

impl WallClock {
    fn new(zone: Tz, first: Timestamp, days: i64) -> Self {
        let minutes = (0..days * 1440)
            .map(|minute| {
                let at = first + Span::from_secs(minute as u64 * 60);
                at.to_utc().with_timezone(&zone).naive_local()
            })
            .collect();
        Self { first, minutes }
    }

    fn at(&self, index: usize) -> Timestamp {
        self.first + Span::from_secs(index as u64 * 60)
    }

    /// The first minute that shows this time, or a later one if none does.
    fn opens(&self, wall: NaiveDateTime) -> Option<usize> {
        let shown = self.minutes.iter().position(|shown| *shown == wall);
        shown.or_else(|| self.minutes.iter().position(|shown| *shown > wall))
    }

    /// The last minute that shows this time, or the first that shows a later one.
    fn closes(&self, wall: NaiveDateTime) -> Option<usize> {
        let shown = self.minutes.iter().rposition(|shown| *shown == wall);
        shown.or_else(|| self.minutes.iter().position(|shown| *shown > wall))
    }

    /// The minutes inside windows that start at `start` on the days that `on` accepts. The end
    /// counts from the wall clock at the opening, or from the day's midnight.
    fn open_minutes(
        &self,
        start: NaiveTime,
        end: End,
        on: impl Fn(NaiveDateTime) -> bool,
    ) -> Vec<bool> {
        let mut open = vec![false; self.minutes.len()];
        let days: std::collections::BTreeSet<_> =
            self.minutes.iter().map(|wall| wall.date()).collect();
        for day in days {
            let midnight = day.and_time(NaiveTime::MIN);
            if !on(midnight) {
                continue;
            }
            let Some(from) = self.opens(day.and_time(start)) else {
                continue;
            };
            let end = match end {
                End::After(minutes) => self.minutes[from] + Duration::minutes(minutes),
                End::At(minutes) => midnight + Duration::minutes(minutes),
            };
            let to = self.closes(end).unwrap_or(self.minutes.len());
            open[from..to.max(from)].fill(true);
        }
        open
    }
}

#[derive(Clone, Copy)]
enum End {
    After(i64),
    At(i64),
}

/// Checks a month of schedules around a clock change, minute by minute.
fn simulate(zone: Tz, first: &str, gap: NaiveTime, dated: (&str, &str)) {
    let name = zone.name();
    let zoned = |mut schedule: Value| {
        schedule["timeZone"] = json!(name);
        schedule
    };
    let cron = format!("{} {} * * *", gap.minute(), gap.hour());
    let policy = policy(vec![
        profile(
            "night",
            5,
            zoned(
                json!({"weekly": {"days": ["Fri", "Sat", "Sun"], "start": "22:30", "end": "02:30"}}),
            ),
        ),
        profile("early", 10, zoned(json!({"cron": cron, "duration": "45m"}))),
        profile(
            "office",
            7,
            zoned(json!({"cron": "0 9 * * 1-5", "duration": "9h"})),
        ),
        profile(
            "short",
            6,
            zoned(json!({"weekly": {"days": ["Sun"], "start": "01:15", "end": "02:15"}})),
        ),
        profile(
            "dated",
            5,
            zoned(json!({"dated": {"from": dated.0, "to": dated.1}})),
        ),
    ]);
    // The oracle covers a few more days on each side, for windows that extend into the month.
    let margin = 4;
    let days = 31;
    let start = instant(first);
    let clock = WallClock::new(
        zone,
        start - Span::from_secs(margin as u64 * 86_400),
        days + 2 * margin,
    );
    let weekday = |wall: NaiveDateTime| wall.weekday().num_days_from_monday();
    let time = |hour, minute| NaiveTime::from_hms_opt(hour, minute, 0).unwrap();
    let night = clock.open_minutes(time(22, 30), End::At(26 * 60 + 30), |day| weekday(day) >= 4);
    let early = clock.open_minutes(gap, End::After(45), |_| true);
    let office = clock.open_minutes(time(9, 0), End::At(18 * 60), |day| weekday(day) < 5);
    let short = clock.open_minutes(time(1, 15), End::At(2 * 60 + 15), |day| weekday(day) == 6);
    let local = |text: &str| NaiveDateTime::parse_from_str(text, "%Y-%m-%dT%H:%M").unwrap();
    let dated_from = clock.opens(local(dated.0)).unwrap();
    let dated_to = clock.closes(local(dated.1)).unwrap();

    let mut hint: Option<Selection> = None;
    let mut changes = Vec::new();
    let mut before = None;
    for minute in 0..(days * 1440) as usize {
        let index = minute + (margin * 1440) as usize;
        let now = clock.at(index);
        let expected = if early[index] {
            "early"
        } else if office[index] {
            "office"
        } else if short[index] {
            "short"
        } else if (dated_from..dated_to).contains(&index) {
            "dated"
        } else if night[index] {
            "night"
        } else {
            "default"
        };
        let wall = clock.minutes[index];
        let fresh = policy.select(now);
        assert_eq!(
            policy.profile_name(fresh),
            expected,
            "{name} at {now}, {wall} on the wall"
        );
        // A selection that still holds equals a fresh one.
        let kept = hint
            .filter(|selection| selection.holds(now))
            .unwrap_or(fresh);
        assert_eq!(policy.profile_name(kept), expected, "{name} at {now}");
        hint = Some(kept);
        if before.is_some_and(|before| before != expected) {
            changes.push((now, expected.to_owned()));
        }
        before = Some(expected);
    }
    let end = start + Span::from_secs(days as u64 * 86_400);
    let found: Vec<(Timestamp, String)> = policy
        .transitions(start + Span::from_millis(1), end)
        .into_iter()
        .map(|transition| (transition.at, transition.profile))
        .collect();
    assert_eq!(found, changes, "{name}");
}

#[test]
fn a_month_with_either_clock_change_in_paris() {
    let gap = NaiveTime::from_hms_opt(2, 30, 0).unwrap();
    simulate(
        chrono_tz::Europe::Paris,
        "2026-03-10T00:00:00Z",
        gap,
        ("2026-03-28T12:00", "2026-03-29T02:30"),
    );
    simulate(
        chrono_tz::Europe::Paris,
        "2026-10-05T00:00:00Z",
        gap,
        ("2026-10-25T02:30", "2026-10-25T02:45"),
    );
}

#[test]
fn a_month_with_either_clock_change_in_new_york() {
    let gap = NaiveTime::from_hms_opt(2, 15, 0).unwrap();
    let repeated = NaiveTime::from_hms_opt(1, 30, 0).unwrap();
    simulate(
        chrono_tz::America::New_York,
        "2026-02-20T00:00:00Z",
        gap,
        ("2026-03-08T02:01", "2026-03-08T05:00"),
    );
    simulate(
        chrono_tz::America::New_York,
        "2026-10-20T00:00:00Z",
        repeated,
        ("2026-11-01T00:30", "2026-11-01T01:15"),
    );
}

#[test]
fn a_month_with_either_clock_change_on_lord_howe_island() {
    // Half an hour: forward at 02:00 to 02:30, back at 02:00 to 01:30.
    let gap = NaiveTime::from_hms_opt(2, 10, 0).unwrap();
    let repeated = NaiveTime::from_hms_opt(1, 45, 0).unwrap();
    simulate(
        chrono_tz::Australia::Lord_Howe,
        "2026-09-15T00:00:00Z",
        gap,
        ("2026-10-04T02:05", "2026-10-04T03:00"),
    );
    simulate(
        chrono_tz::Australia::Lord_Howe,
        "2026-03-20T00:00:00Z",
        repeated,
        ("2026-04-05T01:30", "2026-04-05T01:50"),
    );
}

/// The decision of a tick without instances and measurements.
fn decided(document: &Value) -> Decision {
    let policy = compile(&spec(document)).unwrap();
    let tick = TickInputs {
        pinned_by: None,
        failed_starts: None,
        starts_at_default: false,
        policy_revision: 1,
        fixed_instances: 1,
        pin: None,
        pause: Pause::default(),
        instances: InstanceCounts::default(),
        signals: &[],
        carried: &CarriedState::default(),
        selection: None,
    };
    explain(&deployment(), uid(), Some(&policy), &tick, START)
}

#[test]
fn a_decision_by_a_schedule_names_the_release_of_its_time_zones() {
    let daily = json!({"cron": "0 9 * * *", "duration": "9h", "timeZone": "Europe/Paris"});
    let profiles = json!([
        {"name": "default", "capacity": {"min": 1, "max": 9, "default": 1}},
        profile("day", 1, daily),
    ]);
    let scheduled = decided(&document(json!([]), json!({"profiles": profiles})));
    assert_eq!(
        scheduled.inputs.zone_data.as_deref(),
        Some(zones().version())
    );
    assert!(is_reproducible(&scheduled, &zones()));
    let mut older = scheduled.clone();
    older.inputs.zone_data = Some("2025b".into());
    assert!(!is_reproducible(&older, &zones()), "made with other zones");
    assert_eq!(
        reevaluated(&older).inputs,
        older.inputs,
        "the inputs still record the other release"
    );
    let plain = decided(&document(json!([]), json!({})));
    assert_eq!(plain.inputs.zone_data, None);
    assert!(is_reproducible(&plain, &zones()));
}
