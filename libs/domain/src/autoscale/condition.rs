//! Parsing of the short texts in rules: conditions (`> 4`, `>= 300ms`), amounts (`2`, `"50%"`),
//! shares.
//!
//! Invariant: a parsed value is finite and in the metric's unit, and can be formatted again.

use std::fmt;

use contract::resources::{Direction, NumberOrText};
use contract::time::Span;

use crate::measure::{Metric, Unit};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    Above,
    AtLeast,
    Below,
    AtMost,
    Equal,
    NotEqual,
}

/// Longer ones first, since `>=` starts with `>`.
const OPERATORS: [(&str, Operator); 6] = [
    (">=", Operator::AtLeast),
    ("<=", Operator::AtMost),
    ("==", Operator::Equal),
    ("!=", Operator::NotEqual),
    (">", Operator::Above),
    ("<", Operator::Below),
];

impl Operator {
    pub fn holds(self, value: f64, threshold: f64) -> bool {
        match self {
            Self::Above => value > threshold,
            Self::AtLeast => value >= threshold,
            Self::Below => value < threshold,
            Self::AtMost => value <= threshold,
            Self::Equal => value == threshold,
            Self::NotEqual => value != threshold,
        }
    }

    pub fn symbol(self) -> &'static str {
        OPERATORS
            .iter()
            .find(|(_, operator)| *operator == self)
            .map_or("", |(symbol, _)| symbol)
    }
}

/// `OPERATOR VALUE`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Condition {
    pub operator: Operator,
    pub threshold: f64,
}

impl Condition {
    pub fn parse(metric: Metric, text: &str) -> Result<Self, String> {
        let trimmed = text.trim();
        let found = OPERATORS
            .iter()
            .find_map(|(symbol, operator)| Some((trimmed.strip_prefix(symbol)?, *operator)));
        let Some((value, operator)) = found else {
            return Err(format!(
                "`{text}` is not a condition: write one of > >= < <= == != and a value, such as `{}`",
                example(metric)
            ));
        };
        Ok(Self {
            operator,
            threshold: parse_value(metric, value)?,
        })
    }

    pub fn holds(&self, value: f64) -> bool {
        self.operator.holds(value, self.threshold)
    }
}

fn example(metric: Metric) -> &'static str {
    match metric.unit() {
        Unit::Number => "> 4",
        Unit::Percent => "> 70%",
        Unit::Ratio => "> 0.05",
        Unit::Duration => "> 300ms",
    }
}

/// Parses a value in the metric's unit: latency as a duration (in milliseconds internally),
/// utilisation in percent, ratios from 0 to 1, the rest as numbers.
pub fn parse_value(metric: Metric, text: &str) -> Result<f64, String> {
    let text = text.trim();
    let number = |text: &str| text.parse::<f64>().ok().filter(|n| n.is_finite());
    let percent = text.strip_suffix('%').map(str::trim_end);
    let value = match (metric.unit(), percent) {
        (Unit::Duration, _) => text.parse::<Span>().ok().map(|span| span.millis() as f64),
        (Unit::Percent, Some(percent)) => number(percent),
        (Unit::Ratio, Some(percent)) => number(percent).map(|percent| percent / 100.0),
        (_, Some(_)) => None,
        (_, None) => number(text),
    };
    let name = metric.name();
    let Some(value) = value else {
        let wanted = match metric.unit() {
            Unit::Number => "a number, such as 4",
            Unit::Percent => "a percentage, such as 70 or \"70%\"",
            Unit::Ratio => "a ratio from 0 to 1, such as 0.05",
            Unit::Duration => "a duration, such as 300ms",
        };
        return Err(format!("`{text}` is no value of {name}: write {wanted}"));
    };
    if value < 0.0 {
        return Err(format!("`{text}` is below zero, which {name} never is"));
    }
    if metric.unit() == Unit::Ratio && value > 1.0 {
        return Err(format!(
            "`{text}` is above 1, which {name} never is: write a ratio from 0 to 1, such as 0.05"
        ));
    }
    Ok(value)
}

pub fn value_of(metric: Metric, value: &NumberOrText) -> Result<f64, String> {
    match value {
        NumberOrText::Text(text) => parse_value(metric, text),
        NumberOrText::Number(number) if number.is_finite() => {
            parse_value(metric, &number.to_string())
        }
        NumberOrText::Number(_) => Err("the value is not a finite number".into()),
    }
}

/// How many instances a rule adds or removes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    Count(u32),
    /// In thousandths of a percent, so that 10 % of 30 is 3 exactly.
    Share(u32),
}

/// Precision of shares, in parts per percent.
const PARTS_PER_PERCENT: u64 = 1000;
const SHARE_PERCENT_MAX: u64 = 1000;

impl Amount {
    pub fn parse(value: &NumberOrText, count_max: u32) -> Result<Self, String> {
        let text = match value {
            NumberOrText::Number(number) => number.to_string(),
            NumberOrText::Text(text) => text.trim().to_owned(),
        };
        if let Some(percent) = text.strip_suffix('%') {
            return match parts_of(percent.trim_end(), PARTS_PER_PERCENT) {
                Some(parts) if (1..=SHARE_PERCENT_MAX * PARTS_PER_PERCENT).contains(&parts) => {
                    Ok(Self::Share(parts as u32))
                }
                _ => Err(format!(
                    "`{text}` is not a share: write more than 0% and at most {SHARE_PERCENT_MAX}%, with at most three decimals"
                )),
            };
        }
        match text.parse::<u32>() {
            Ok(count) if (1..=count_max).contains(&count) => Ok(Self::Count(count)),
            _ => Err(format!(
                "`{text}` is not an amount: write a whole number from 1 to {count_max}, or a share such as \"50%\""
            )),
        }
    }

    /// The number of instances to add to or remove from `current`: shares are rounded up when
    /// adding, down when removing, and are never less than one.
    pub fn of(self, current: u32, direction: Direction) -> u32 {
        match self {
            Self::Count(count) => count,
            Self::Share(parts) => {
                let whole = 100 * PARTS_PER_PERCENT;
                let product = u64::from(current) * u64::from(parts);
                let rounded = match direction {
                    Direction::Out => product.div_ceil(whole),
                    Direction::In => product / whole,
                };
                u32::try_from(rounded).unwrap_or(u32::MAX).max(1)
            }
        }
    }
}

/// Parses a decimal as a whole number of `1/parts`; `None` if it is not a plain decimal or is finer
/// than that.
fn parts_of(text: &str, parts: u64) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || (text.contains('.') && !digits(fraction)) {
        return None;
    }
    let mut value = whole.parse::<u64>().ok()?.checked_mul(parts)?;
    let mut unit = parts;
    for digit in fraction.bytes().map(|b| u64::from(b - b'0')) {
        if unit < 10 && digit != 0 {
            return None;
        }
        unit /= 10;
        value = value.checked_add(digit * unit)?;
    }
    Some(value)
}

/// Parses a share below 100 %, as a fraction.
pub fn parse_tolerance(text: &str) -> Result<f64, String> {
    text.trim()
        .strip_suffix('%')
        .and_then(|percent| parts_of(percent.trim_end(), PARTS_PER_PERCENT))
        .filter(|parts| *parts < 100 * PARTS_PER_PERCENT)
        .map(|parts| parts as f64 / (100 * PARTS_PER_PERCENT) as f64)
        .ok_or_else(|| {
            format!("`{text}` is not a tolerance: write a share below 100%, such as \"10%\"")
        })
}

/// Formats a value for people: `12.4`, `71%`, `312.5ms`.
pub struct DisplayValue(pub Metric, pub f64);

impl fmt::Display for DisplayValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{:.3}", self.1);
        let text = text.trim_end_matches('0').trim_end_matches('.');
        f.write_str(text)?;
        f.write_str(match self.0.unit() {
            Unit::Percent => "%",
            Unit::Duration => "ms",
            Unit::Number | Unit::Ratio => "",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metric(name: &str) -> Metric {
        Metric::parse(name).unwrap()
    }

    #[test]
    fn values_are_read_in_the_unit_of_their_metric() {
        let latency = metric("latency_p95");
        for (metric, text, expected) in [
            (metric("concurrency"), "4", 4.0),
            (metric("concurrency"), "0.5", 0.5),
            (metric("cpu_utilization"), "70", 70.0),
            (metric("cpu_utilization"), "70%", 70.0),
            (metric("error_ratio"), "0.05", 0.05),
            (metric("error_ratio"), "5%", 0.05),
            (latency, "300ms", 300.0),
            (latency, "2s", 2000.0),
        ] {
            assert_eq!(parse_value(metric, text), Ok(expected), "{text}");
        }
        for (metric, text) in [
            (metric("concurrency"), "4%"),
            (metric("concurrency"), "4s"),
            (metric("concurrency"), "-4"),
            (metric("concurrency"), "NaN"),
            (metric("concurrency"), ""),
            (metric("error_ratio"), "5"),
            (latency, "300"),
            (latency, "soon"),
        ] {
            assert!(parse_value(metric, text).is_err(), "{text}");
        }
    }

    #[test]
    fn conditions_need_an_operator_and_a_value() {
        for (text, operator, threshold) in [
            ("> 4", Operator::Above, 4.0),
            (">=4", Operator::AtLeast, 4.0),
            (" < 4 ", Operator::Below, 4.0),
            ("<= 4", Operator::AtMost, 4.0),
            ("== 4", Operator::Equal, 4.0),
            ("!= 4", Operator::NotEqual, 4.0),
        ] {
            let expected = Condition {
                operator,
                threshold,
            };
            assert_eq!(Condition::parse(metric("concurrency"), text), Ok(expected));
        }
        for text in ["4", "= 4", "=> 4", ">", "over 4", "> > 4", ""] {
            assert!(
                Condition::parse(metric("concurrency"), text).is_err(),
                "{text}"
            );
        }
    }

    #[test]
    fn shares_round_up_when_adding_and_down_when_taking_away_and_never_to_nothing() {
        let share = |text: &str| Amount::parse(&NumberOrText::Text(text.into()), 1000).unwrap();
        for (text, current, out, scale_in) in [
            ("50%", 4, 2, 2),
            ("50%", 5, 3, 2),
            ("10%", 30, 3, 3),
            ("10%", 3, 1, 1),
            ("33.3%", 3, 1, 1),
            ("50%", 0, 1, 1),
            ("200%", 2, 4, 4),
            ("0.001%", 1000, 1, 1),
        ] {
            assert_eq!(share(text).of(current, Direction::Out), out, "{text}");
            assert_eq!(share(text).of(current, Direction::In), scale_in, "{text}");
        }
    }

    #[test]
    fn amounts_are_whole_counts_or_shares() {
        let parse = |value| Amount::parse(&value, 1000);
        assert_eq!(parse(NumberOrText::Number(2.0)), Ok(Amount::Count(2)));
        assert_eq!(parse(NumberOrText::Text("2".into())), Ok(Amount::Count(2)));
        for bad in [
            "0", "-1", "1.5", "0%", "1001%", "5.0001%", "5.00001%", "x", "", "%", "1001",
        ] {
            assert!(parse(NumberOrText::Text(bad.into())).is_err(), "{bad}");
        }
        assert!(parse(NumberOrText::Number(1.5)).is_err());
    }
}
