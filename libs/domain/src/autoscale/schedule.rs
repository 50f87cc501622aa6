//! Schedules of profiles: cron with a duration, days of the week, or dates, in local time.
//!
//! **Clock changes.** A window opens and closes at local times.
//! - An opening or closing time that does not exist (clocks go forward over it) moves to the next
//!   instant that does.
//! - If a time exists twice (clocks go back over it), the window opens at the first and closes at
//!   the last occurrence.
//! - A cron window closes `duration` after its opening by the wall clock, so a window from 9:00
//!   that lasts 9 h closes at 18:00 on every day of the year. If the opening had to move, the
//!   duration counts from where it moved to.
//!
//! Windows include their opening instant and exclude their closing one.

use chrono::{Datelike, Days, Duration, NaiveDate, NaiveDateTime, NaiveTime, Weekday};
use contract::problem::Finding;
use contract::resources::{DatedSpec, ScheduleSpec, WeeklySpec};
use contract::time::{Span, Timestamp};

use super::cron::Cron;
use crate::zones::{Instants, Zone, ZoneData};

/// Longest duration of a cron window.
pub const DURATION_MAX: Span = Span::from_secs(31 * 86_400);

/// Upper bound on how far the offset from UTC changes from one day to the next; occurrences further
/// than this from an instant on the wall clock cannot open at it. Samoa once skipped a whole day.
const WALL_SLACK_HOURS: i64 = 26;

#[derive(Clone, Debug, PartialEq)]
pub enum Schedule {
    Cron {
        cron: Cron,
        /// As written.
        expression: String,
        duration: Span,
        zone: Zone,
    },
    Weekly {
        days: [bool; 7],
        start: NaiveTime,
        /// Counted from the day's midnight; beyond 24 h it falls on the next day.
        end: Duration,
        zone: Zone,
    },
    Dated {
        from: Timestamp,
        to: Timestamp,
    },
}

/// Whether a schedule is active, and how long that is certain to stay so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScheduleState {
    pub is_open: bool,
    /// The next possible change; `None` if there is none.
    pub until: Option<Timestamp>,
}

impl Schedule {
    pub fn compile(
        spec: &ScheduleSpec,
        zones: &ZoneData,
        pointer: &str,
    ) -> Result<Self, Vec<Finding>> {
        let mut findings = Vec::new();
        let zone = zone_of(spec, zones, pointer, &mut findings);
        let kinds = [
            spec.cron.is_some(),
            spec.weekly.is_some(),
            spec.dated.is_some(),
        ];
        let schedule = match kinds.iter().filter(|given| **given).count() {
            1 => compile_kind(spec, &zone, pointer, &mut findings),
            0 => {
                let detail =
                    "the schedule says nothing: write one of cron (with duration), weekly or dated";
                findings.push(Finding::new(pointer, detail));
                None
            }
            _ => {
                let detail = "the schedule says several things: keep one of cron, weekly and dated, and make a profile each for the others";
                findings.push(Finding::new(pointer, detail));
                None
            }
        };
        if spec.cron.is_none() && spec.duration.is_some() {
            let detail = "a duration belongs to cron; remove it, or write cron";
            findings.push(Finding::new(format!("{pointer}/duration"), detail));
        }
        match schedule {
            Some(schedule) if findings.is_empty() => Ok(schedule),
            _ => Err(findings),
        }
    }

    /// Dated windows take precedence over recurring ones of the same priority.
    pub fn is_dated(&self) -> bool {
        matches!(self, Self::Dated { .. })
    }

    pub fn state_at(&self, now: Timestamp) -> ScheduleState {
        match self {
            Self::Dated { from, to } => dated_state(*from, *to, now),
            Self::Weekly {
                days,
                start,
                end,
                zone,
            } => state_among(&weekly_windows(days, *start, *end, zone, now), now),
            Self::Cron {
                cron,
                duration,
                zone,
                ..
            } => cron_state(cron, *duration, zone, now),
        }
    }
}

fn zone_of(
    spec: &ScheduleSpec,
    zones: &ZoneData,
    pointer: &str,
    findings: &mut Vec<Finding>,
) -> Zone {
    let Some(name) = &spec.time_zone else {
        return Zone::UTC;
    };
    zones.zone(name).unwrap_or_else(|| {
        let detail = format!(
            "`{name}` is not a time zone: write an IANA name such as Europe/Paris, America/New_York or UTC"
        );
        findings.push(Finding::new(format!("{pointer}/timeZone"), detail));
        Zone::UTC
    })
}

fn compile_kind(
    spec: &ScheduleSpec,
    zone: &Zone,
    pointer: &str,
    findings: &mut Vec<Finding>,
) -> Option<Schedule> {
    if let Some(expression) = &spec.cron {
        return compile_cron(expression, spec.duration, zone, pointer, findings);
    }
    if let Some(weekly) = &spec.weekly {
        return compile_weekly(weekly, zone, &format!("{pointer}/weekly"), findings);
    }
    let dated = spec.dated.as_ref()?;
    compile_dated(dated, zone, &format!("{pointer}/dated"), findings)
}

fn compile_cron(
    expression: &str,
    duration: Option<Span>,
    zone: &Zone,
    pointer: &str,
    findings: &mut Vec<Finding>,
) -> Option<Schedule> {
    let cron = Cron::parse(expression)
        .map_err(|detail| findings.push(Finding::new(format!("{pointer}/cron"), detail)))
        .ok();
    let at = format!("{pointer}/duration");
    match duration {
        None => {
            let detail = "cron says when the window opens, not how long it stays open: write a duration, such as 9h";
            findings.push(Finding::new(at, detail));
            None
        }
        Some(duration) if duration == Span::ZERO || duration > DURATION_MAX => {
            let detail = format!(
                "{duration} is no duration of a window: write more than 0s and at most {DURATION_MAX}"
            );
            findings.push(Finding::new(at, detail));
            None
        }
        Some(duration) => Some(Schedule::Cron {
            cron: cron?,
            expression: expression.to_owned(),
            duration,
            zone: zone.clone(),
        }),
    }
}

fn compile_weekly(
    spec: &WeeklySpec,
    zone: &Zone,
    pointer: &str,
    findings: &mut Vec<Finding>,
) -> Option<Schedule> {
    let mut days = [false; 7];
    if spec.days.is_empty() {
        let detail = "no day is named: write at least one of Mon Tue Wed Thu Fri Sat Sun";
        findings.push(Finding::new(format!("{pointer}/days"), detail));
    }
    for (index, text) in spec.days.iter().enumerate() {
        match text.parse::<Weekday>() {
            Ok(day) => days[day.num_days_from_monday() as usize] = true,
            Err(_) => {
                let detail = format!("`{text}` is not a day: write Mon Tue Wed Thu Fri Sat or Sun");
                findings.push(Finding::new(format!("{pointer}/days/{index}"), detail));
            }
        }
    }
    let mut clock = |field: &str, text: &str| {
        let read = parse_time_of_day(text);
        if read.is_none() {
            let detail = format!("`{text}` is not a time of day: write HH:MM, such as 09:00");
            findings.push(Finding::new(format!("{pointer}/{field}"), detail));
        }
        read
    };
    let start = clock("start", &spec.start);
    let end = match spec.end.as_str() {
        "24:00" => Some(NaiveTime::MIN),
        text => clock("end", text),
    };
    let (start, end) = (start?, end?);
    let mut until = end.signed_duration_since(NaiveTime::MIN);
    if end <= start {
        until += Duration::days(1);
    }
    Some(Schedule::Weekly {
        days,
        start,
        end: until,
        zone: zone.clone(),
    })
}

fn parse_time_of_day(text: &str) -> Option<NaiveTime> {
    let shape = text.len() == 5 && text.as_bytes()[2] == b':';
    shape
        .then(|| NaiveTime::parse_from_str(text, "%H:%M").ok())
        .flatten()
}

fn compile_dated(
    spec: &DatedSpec,
    zone: &Zone,
    pointer: &str,
    findings: &mut Vec<Finding>,
) -> Option<Schedule> {
    let mut read = |field: &str, text: &str, resolve: fn(&Zone, NaiveDateTime) -> Timestamp| {
        if let Ok(instant) = text.parse::<Timestamp>() {
            return Some(instant);
        }
        let local = ["%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"]
            .iter()
            .find_map(|format| NaiveDateTime::parse_from_str(text, format).ok());
        if local.is_none() {
            let detail = format!(
                "`{text}` is not a date and time: write YYYY-MM-DDTHH:MM in the schedule's time zone, or RFC 3339 with an offset"
            );
            findings.push(Finding::new(format!("{pointer}/{field}"), detail));
        }
        local.map(|local| resolve(zone, local))
    };
    let from = read("from", &spec.from, |zone, local| opening(zone, local).0);
    let to = read("to", &spec.to, closing);
    let (from, to) = (from?, to?);
    if from >= to {
        let detail = "the window ends before it begins: write a `to` that lies after `from`";
        findings.push(Finding::new(format!("{pointer}/to"), detail));
        return None;
    }
    Some(Schedule::Dated { from, to })
}

/// The instant at which a window with this local opening time opens, and the local time at that
/// instant.
fn opening(zone: &Zone, local: NaiveDateTime) -> (Timestamp, NaiveDateTime) {
    match zone.instants(local) {
        Instants::One(at) | Instants::Two(at, _) => (at, local),
        Instants::None { skipped_at } => (skipped_at, zone.local(skipped_at)),
    }
}

/// The instant at which a window with this local closing time closes.
fn closing(zone: &Zone, local: NaiveDateTime) -> Timestamp {
    match zone.instants(local) {
        Instants::One(at) | Instants::Two(_, at) | Instants::None { skipped_at: at } => at,
    }
}

fn dated_state(from: Timestamp, to: Timestamp, now: Timestamp) -> ScheduleState {
    let until = [from, to].into_iter().find(|change| *change > now);
    ScheduleState {
        is_open: from <= now && now < to,
        until,
    }
}

/// Windows that start between two days before and eight days after an instant.
fn weekly_windows(
    days: &[bool; 7],
    start: NaiveTime,
    end: Duration,
    zone: &Zone,
    now: Timestamp,
) -> Vec<(Timestamp, Timestamp)> {
    let today = zone.local(now).date();
    let first = today.checked_sub_days(Days::new(2)).unwrap_or(today);
    first
        .iter_days()
        .take(11)
        .filter(|day: &NaiveDate| days[day.weekday().num_days_from_monday() as usize])
        .map(|day| {
            let (open, _) = opening(zone, day.and_time(start));
            (open, closing(zone, day.and_time(NaiveTime::MIN) + end))
        })
        .collect()
}

fn state_among(windows: &[(Timestamp, Timestamp)], now: Timestamp) -> ScheduleState {
    let open = windows
        .iter()
        .any(|(open, close)| *open <= now && now < *close);
    let until = windows
        .iter()
        .flat_map(|(open, close)| [*open, *close])
        .filter(|change| *change > now)
        .min();
    ScheduleState {
        is_open: open,
        until,
    }
}

fn cron_window(zone: &Zone, duration: Span, start: NaiveDateTime) -> (Timestamp, Timestamp) {
    let (open, local) = opening(zone, start);
    let length = Duration::milliseconds(i64::try_from(duration.millis()).unwrap_or(i64::MAX / 2));
    (open, closing(zone, local + length))
}

/// Of two occurrences the later one neither opens nor closes before the other, whatever the clocks
/// do, so the latest one that has opened decides.
fn cron_state(cron: &Cron, duration: Span, zone: &Zone, now: Timestamp) -> ScheduleState {
    let ahead = zone.local(now) + wall_slack(zone, now);
    let mut opens: Option<Timestamp> = None;
    let mut at = ahead + Duration::seconds(1);
    while let Some(start) = cron.last_before(at) {
        let (open, close) = cron_window(zone, duration, start);
        if open > now {
            opens = Some(open);
            at = start;
            continue;
        }
        if now < close {
            return ScheduleState {
                is_open: true,
                until: Some(close),
            };
        }
        break;
    }
    let next = opens.or_else(|| {
        let start = cron.next_after(ahead)?;
        Some(cron_window(zone, duration, start).0)
    });
    ScheduleState {
        is_open: false,
        until: next,
    }
}

/// How far ahead on the wall clock an occurrence may lie that has already opened: zero, unless
/// clocks change around now.
fn wall_slack(zone: &Zone, now: Timestamp) -> Duration {
    let most = Span::from_secs(WALL_SLACK_HOURS as u64 * 3600);
    let offset = |at: Timestamp| zone.offset_seconds(at);
    if offset(now - most) == offset(now) && offset(now) == offset(now + most) {
        Duration::zero()
    } else {
        Duration::hours(WALL_SLACK_HOURS)
    }
}
