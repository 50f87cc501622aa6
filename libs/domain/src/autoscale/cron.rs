//! Five-field cron expressions, as in crontab, translated for the `cron` crate, which expects
//! seconds first and numbers weekdays 1 to 7 from Sunday.
//!
//! Every field is expanded to the plain list of its numbers, so that nothing depends on how the
//! crate parses names, steps and ranges. Weekdays are 0 to 7, where both 0 and 7 are Sunday; a
//! range may wrap (`Fri-Mon`). If both the day of the month and the weekday are restricted, either
//! suffices, as in crontab; the crate would require both, so that becomes two schedules.
//!
//! Occurrences are local wall-clock times; `schedule` maps them to instants.

use std::str::FromStr;

use chrono::{NaiveDateTime, TimeZone, Utc};
use contract::time::Span;

struct Field {
    name: &'static str,
    min: u32,
    max: u32,
    names: &'static [&'static str],
}

const MONTHS: [&str; 12] = [
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
];
const WEEKDAYS: [&str; 7] = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"];

const FIELDS: [Field; 5] = [
    Field {
        name: "minute",
        min: 0,
        max: 59,
        names: &[],
    },
    Field {
        name: "hour",
        min: 0,
        max: 23,
        names: &[],
    },
    Field {
        name: "day of the month",
        min: 1,
        max: 31,
        names: &[],
    },
    Field {
        name: "month",
        min: 1,
        max: 12,
        names: &MONTHS,
    },
    Field {
        name: "weekday",
        min: 0,
        max: 7,
        names: &WEEKDAYS,
    },
];

/// Enough to see every gap in a year of daily occurrences.
const OCCURRENCES_EXAMINED: usize = 400;

const DAY_OF_MONTH: usize = 2;
const WEEKDAY: usize = 4;

/// A compiled expression.
#[derive(Clone, Debug, PartialEq)]
pub struct Cron {
    schedules: Vec<cron::Schedule>,
}

impl Cron {
    pub fn parse(expression: &str) -> Result<Self, String> {
        let fields: Vec<&str> = expression.split_whitespace().collect();
        if fields.len() != FIELDS.len() {
            return Err(format!(
                "`{expression}` has {} fields, and five are wanted: minute, hour, day of the month, month, weekday, such as `0 9 * * Mon-Fri`",
                fields.len()
            ));
        }
        let mut numbers = Vec::new();
        for (field, text) in FIELDS.iter().zip(&fields) {
            numbers.push(field.expand(text)?);
        }
        // Sunday is 0 or 7 here, and 1 for the crate.
        let mut weekdays: Vec<u32> = numbers[WEEKDAY].iter().map(|day| day % 7 + 1).collect();
        weekdays.sort_unstable();
        weekdays.dedup();
        numbers[WEEKDAY] = weekdays;
        let restricted = |field: usize| !fields[field].starts_with('*');
        let variants: Vec<Vec<Vec<u32>>> = if restricted(DAY_OF_MONTH) && restricted(WEEKDAY) {
            [WEEKDAY, DAY_OF_MONTH]
                .map(|free| {
                    let mut variant = numbers.clone();
                    variant[free].clear();
                    variant
                })
                .into()
        } else {
            vec![numbers]
        };
        let schedules = variants
            .iter()
            .map(|fields| translate(fields))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| format!("`{expression}` is not a cron expression: {error}"))?;
        let compiled = Self { schedules };
        let epoch = NaiveDateTime::default();
        if compiled.next_after(epoch).is_none() {
            return Err(format!(
                "`{expression}` names no day that exists; correct the day of the month or the month"
            ));
        }
        Ok(compiled)
    }

    /// The first occurrence after a local time.
    pub fn next_after(&self, local: NaiveDateTime) -> Option<NaiveDateTime> {
        let after = Utc.from_utc_datetime(&local);
        self.schedules
            .iter()
            .filter_map(|schedule| schedule.after(&after).next())
            .map(|occurrence| occurrence.naive_utc())
            .min()
    }

    /// The longest time between consecutive occurrences, among the next few hundred.
    pub fn widest_gap(&self) -> Span {
        let mut at = NaiveDateTime::default();
        let mut widest = Span::ZERO;
        for count in 0..OCCURRENCES_EXAMINED {
            let Some(next) = self.next_after(at) else {
                return Span::from_millis(u64::MAX);
            };
            let gap = (next - at).num_milliseconds();
            if count > 0 {
                widest = widest.max(Span::from_millis(gap.unsigned_abs()));
            }
            at = next;
        }
        widest
    }

    /// The last occurrence before a local time.
    pub fn last_before(&self, local: NaiveDateTime) -> Option<NaiveDateTime> {
        let before = Utc.from_utc_datetime(&local);
        self.schedules
            .iter()
            .filter_map(|schedule| schedule.after(&before).next_back())
            .map(|occurrence| occurrence.naive_utc())
            .max()
    }
}

/// What other schedulers read differently in a valid expression, and what to write instead.
pub fn ambiguities(expression: &str) -> Vec<String> {
    let fields: Vec<&str> = expression.split_whitespace().collect();
    let (Some(day), Some(weekday)) = (fields.get(DAY_OF_MONTH), fields.get(WEEKDAY)) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    let is_star = |text: &str| text.starts_with('*');
    let is_stepped = |text: &str| is_star(text) && text != "*";
    if (is_stepped(day) && *weekday != "*") || (is_stepped(weekday) && *day != "*") {
        found.push(format!(
            "day of the month `{day}` and weekday `{weekday}` must both match here, as in crontab; Kubernetes and KEDA take either: name the days, or write a profile for each"
        ));
    } else if !is_star(day) && !is_star(weekday) {
        found.push(format!(
            "either of day of the month `{day}` and weekday `{weekday}` suffices here, as in crontab; some schedulers, such as APScheduler, require both: write a profile for each"
        ));
    }
    let items = FIELDS
        .iter()
        .zip(&fields)
        .flat_map(|(field, text)| text.split(',').map(move |item| (field, item)));
    for (field, item) in items {
        let (range, step) = item.split_once('/').unwrap_or((item, ""));
        if !step.is_empty() && range != "*" && !range.contains('-') {
            found.push(format!(
                "`{item}` runs to the end of the {} field here; crontab refuses it: write `{range}-{}/{step}`",
                field.name,
                field.last()
            ));
        }
    }
    for item in weekday.split(',') {
        let (range, _) = item.split_once('/').unwrap_or((item, ""));
        let ends: Vec<&str> = range.split('-').collect();
        let has_seven = ends.contains(&"7");
        if has_seven {
            found.push(format!(
                "weekday `{item}` has 7 for Sunday, as in crontab; Kubernetes and KEDA refuse 7: write Sun"
            ));
        }
        let numbers: Vec<u32> = ends
            .iter()
            .filter_map(|end| FIELDS[WEEKDAY].number(end).ok())
            .collect();
        if let [first, last] = numbers[..]
            && first > last
        {
            found.push(format!(
                "weekday `{item}` goes on over the end of the week here; crontab never fires for it, and Kubernetes and KEDA refuse it: list the days"
            ));
        } else if let Some(step) = stars_step(item) {
            let named: Vec<&str> = WEEKDAYS.into_iter().step_by(step).collect();
            found.push(counts_from(item, &named.join(",")));
        } else if !has_seven
            && (range == item || range.contains('-'))
            && ends.iter().any(|end| end.parse::<u32>().is_ok())
        {
            let names = numbers.iter().filter_map(|n| WEEKDAYS.get(*n as usize));
            let names: Vec<&str> = names.copied().collect();
            found.push(counts_from(
                item,
                &item.replacen(range, &names.join("-"), 1),
            ));
        }
    }
    found
}

/// The step of `*/2`; of weekdays, it depends on the first of them.
fn stars_step(item: &str) -> Option<usize> {
    let step = item.strip_prefix("*/")?.parse().ok()?;
    (step > 1).then_some(step)
}

fn counts_from(item: &str, named: &str) -> String {
    format!(
        "weekday `{item}` counts from 0 for Sunday here, as in crontab; others count from 0 for Monday, such as APScheduler, or from 1 for Sunday, such as Quartz: write `{named}`"
    )
}

/// Builds the crate's schedule; empty lists become `*`.
fn translate(fields: &[Vec<u32>]) -> Result<cron::Schedule, cron::error::Error> {
    let mut text = String::from("0");
    for (index, numbers) in fields.iter().enumerate() {
        text.push(' ');
        let all = match index {
            WEEKDAY => 7,
            _ => (FIELDS[index].max - FIELDS[index].min + 1) as usize,
        };
        if numbers.is_empty() || numbers.len() == all {
            text.push('*');
            continue;
        }
        let list: Vec<String> = numbers.iter().map(u32::to_string).collect();
        text.push_str(&list.join(","));
    }
    cron::Schedule::from_str(&text)
}

impl Field {
    /// All numbers that a field names, ascending.
    fn expand(&self, text: &str) -> Result<Vec<u32>, String> {
        let mut numbers = Vec::new();
        for item in text.split(',') {
            self.expand_item(item, &mut numbers)?;
        }
        numbers.sort_unstable();
        numbers.dedup();
        Ok(numbers)
    }

    fn expand_item(&self, item: &str, numbers: &mut Vec<u32>) -> Result<(), String> {
        let (range, step) = match item.split_once('/') {
            Some((range, step)) => (range, Some(self.step(item, step)?)),
            None => (item, None),
        };
        let (first, last) = if range == "*" {
            (self.min, self.last())
        } else if let Some((first, last)) = range.split_once('-') {
            (self.number(first)?, self.number(last)?)
        } else {
            let first = self.number(range)?;
            // `5/15` runs to the end of the range, as in cron daemons.
            (first, if step.is_some() { self.last() } else { first })
        };
        let length = self.last() - self.min + 1;
        let span = if first <= last {
            last - first
        } else if self.names.is_empty() {
            return Err(self.refuse(item, "the range runs backwards"));
        } else {
            last + length - first
        };
        for offset in (0..=span).step_by(step.unwrap_or(1)) {
            let number = first + offset;
            numbers.push(if number > self.max {
                number - length
            } else {
                number
            });
        }
        Ok(())
    }

    /// The last number; for weekdays 6, since 7 is another name for Sunday.
    fn last(&self) -> u32 {
        if self.names.len() == WEEKDAYS.len() {
            6
        } else {
            self.max
        }
    }

    fn number(&self, text: &str) -> Result<u32, String> {
        let mut names = self.names.iter();
        if let Some(index) = names.position(|name| name.eq_ignore_ascii_case(text)) {
            return Ok(self.min + index as u32);
        }
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        match text.parse::<u32>() {
            Ok(number) if digits && (self.min..=self.max).contains(&number) => Ok(number),
            _ => Err(self.refuse(text, "it is out of range")),
        }
    }

    fn step(&self, item: &str, text: &str) -> Result<usize, String> {
        match text.parse::<usize>() {
            Ok(step) if (1..=self.max as usize).contains(&step) => Ok(step),
            _ => Err(self.refuse(item, "the step is not a number that fits")),
        }
    }

    fn refuse(&self, text: &str, why: &str) -> String {
        let names = match self.names {
            [] => String::new(),
            [first, .., last] => format!(" or {first} to {last}"),
            [only] => format!(" or {only}"),
        };
        format!(
            "`{text}` does not fit the {} field: {why}; write {} to {}{names}, `*`, ranges, lists or steps",
            self.name, self.min, self.max
        )
    }
}

#[cfg(test)]
mod tests {
    use chrono::{Datelike, NaiveDate};

    use super::*;

    fn occurrences(expression: &str, count: usize) -> Vec<String> {
        let cron = Cron::parse(expression).unwrap();
        // 2026-03-01 is a Sunday.
        let mut at = NaiveDate::from_ymd_opt(2026, 3, 1)
            .unwrap()
            .and_hms_opt(0, 0, 0)
            .unwrap();
        let mut found = Vec::new();
        for _ in 0..count {
            at = cron.next_after(at).unwrap();
            found.push(format!("{} {}", at.weekday(), at.format("%d %H:%M")));
        }
        found
    }

    #[test]
    fn weekdays_count_from_sunday_as_zero_or_seven() {
        for (expression, expected) in [
            ("0 9 * * 1-5", ["Mon 02 09:00", "Tue 03 09:00"]),
            ("0 9 * * Mon-Fri", ["Mon 02 09:00", "Tue 03 09:00"]),
            ("0 9 * * 0", ["Sun 01 09:00", "Sun 08 09:00"]),
            ("0 9 * * 7", ["Sun 01 09:00", "Sun 08 09:00"]),
            ("0 9 * * 5-7", ["Sun 01 09:00", "Fri 06 09:00"]),
            ("0 9 * * sat-sun", ["Sun 01 09:00", "Sat 07 09:00"]),
            ("0 9 * * 6", ["Sat 07 09:00", "Sat 14 09:00"]),
            ("*/30 9 * * *", ["Sun 01 09:00", "Sun 01 09:30"]),
            ("5/30 9 * * *", ["Sun 01 09:05", "Sun 01 09:35"]),
            ("0 9 13 * Fri", ["Fri 06 09:00", "Fri 13 09:00"]),
            ("0 9 2 * Wed", ["Mon 02 09:00", "Wed 04 09:00"]),
            ("0 9 2 mar *", ["Mon 02 09:00", "Tue 02 09:00"]),
        ] {
            assert_eq!(occurrences(expression, 2), expected, "{expression}");
        }
    }

    #[test]
    fn what_other_schedulers_read_differently_is_found() {
        for (expression, parts) in [
            ("0 9 */2 * Fri", vec!["must both match"]),
            ("0 9 13 * */2", vec!["must both match", "write `Sun,Tue,"]),
            ("0 9 * * */3", vec!["write `Sun,Wed,Sat`"]),
            ("0 9 * * */1", vec![]),
            ("0 9 13 * Fri", vec!["either of"]),
            ("5/30 9 * * *", vec!["write `5-59/30`"]),
            ("0 2/4 * * *", vec!["write `2-23/4`"]),
            ("0 9 * * 7", vec!["write Sun"]),
            ("0 9 * * 5-7", vec!["write Sun"]),
            ("0 9 * * Fri-Mon", vec!["list the days"]),
            ("0 9 * * 5-1", vec!["list the days"]),
            (
                "0/5 9 */3 * 7",
                vec!["must both match", "write `0-59/5`", "write Sun"],
            ),
            ("*/30 9 * * Mon-Fri", vec![]),
            ("0 9 */2 * *", vec![]),
            ("0 9 * * 1-5", vec!["write `Mon-Fri`"]),
            ("0 9 * * 1-5/2", vec!["write `Mon-Fri/2`"]),
            ("0 9 * * 0,Mon,2", vec!["write `Sun`", "write `Tue`"]),
            ("0 9 * * mon-5", vec!["write `Mon-Fri`"]),
            ("0 9 1,15 * *", vec![]),
            ("0 9 * * sat,sun", vec![]),
        ] {
            let found = ambiguities(expression);
            let matches = found
                .iter()
                .zip(&parts)
                .all(|(text, part)| text.contains(part));
            assert!(
                matches && found.len() == parts.len(),
                "{expression}: {found:?}"
            );
        }
    }

    #[test]
    fn occurrences_are_found_backwards_too() {
        let cron = Cron::parse("0 9 * * Mon-Fri").unwrap();
        let monday = NaiveDate::from_ymd_opt(2026, 3, 2).unwrap();
        let before = cron
            .last_before(monday.and_hms_opt(9, 0, 0).unwrap())
            .unwrap();
        assert_eq!(before.to_string(), "2026-02-27 09:00:00");
        let after = cron
            .last_before(monday.and_hms_opt(9, 0, 1).unwrap())
            .unwrap();
        assert_eq!(after.to_string(), "2026-03-02 09:00:00");
    }

    #[test]
    fn malformed_expressions_are_refused_with_the_field() {
        for (expression, part) in [
            ("0 9 * *", "4 fields"),
            ("0 0 9 * * 1", "6 fields"),
            ("60 9 * * *", "minute"),
            ("0 24 * * *", "hour"),
            ("0 9 0 * *", "day of the month"),
            ("0 9 * 13 *", "month"),
            ("0 9 * * 8", "weekday"),
            ("0 9 * * Montag", "weekday"),
            ("0 17-9 * * *", "backwards"),
            ("*/0 9 * * *", "step"),
            ("a 9 * * *", "minute"),
            ("-1 9 * * *", "minute"),
            ("0 9 31 2 *", "no day"),
            ("@daily", "1 fields"),
            ("", "0 fields"),
        ] {
            let error = Cron::parse(expression).unwrap_err();
            assert!(error.contains(part), "{expression}: {error}");
        }
    }
}
