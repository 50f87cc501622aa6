//! Instants and spans of time, in whole milliseconds. Written as RFC 3339 in UTC and as `500ms`,
//! `30s`, `5m`, `1h`, `7d`. Nothing here reads a clock.

use std::fmt;
use std::ops::{Add, Sub};
use std::str::FromStr;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An instant, in milliseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    millis: i64,
}

impl Timestamp {
    /// Before all others.
    pub const MIN: Self = Self { millis: i64::MIN };

    /// After all others.
    pub const MAX: Self = Self { millis: i64::MAX };

    /// Creates an instant from milliseconds since 1970; negative values are before it.
    pub const fn from_millis(millis: i64) -> Self {
        Self { millis }
    }

    /// Creates an instant from seconds since 1970; negative values are before it.
    pub const fn from_secs(seconds: i64) -> Self {
        Self {
            millis: seconds * 1000,
        }
    }

    /// Milliseconds since 1970.
    pub const fn millis(self) -> i64 {
        self.millis
    }

    /// Whole seconds since 1970, rounded down.
    pub const fn secs(self) -> i64 {
        self.millis.div_euclid(1000)
    }

    /// Returns the time since `earlier`; zero if that is later.
    pub fn since(self, earlier: Self) -> Span {
        Span::from_millis(self.millis.saturating_sub(earlier.millis).max(0) as u64)
    }

    /// Converts to a calendar date and time, saturating at the end of the calendar.
    pub fn to_utc(self) -> DateTime<Utc> {
        DateTime::from_timestamp_millis(self.millis).unwrap_or(DateTime::<Utc>::MAX_UTC)
    }
}

impl From<DateTime<Utc>> for Timestamp {
    fn from(instant: DateTime<Utc>) -> Self {
        Self {
            millis: instant.timestamp_millis(),
        }
    }
}

impl Add<Span> for Timestamp {
    type Output = Self;
    fn add(self, span: Span) -> Self {
        Self {
            millis: self.millis.saturating_add(span.millis as i64),
        }
    }
}

impl Sub<Span> for Timestamp {
    type Output = Self;
    fn sub(self, span: Span) -> Self {
        Self {
            millis: self.millis.saturating_sub(span.millis as i64),
        }
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_utc().to_rfc3339_opts(SecondsFormat::Millis, true))
    }
}

/// The text is not an instant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an instant: write RFC 3339 with an offset, such as 2026-03-29T01:00:00Z")]
pub struct InvalidTimestamp(String);

impl FromStr for Timestamp {
    type Err = InvalidTimestamp;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        DateTime::parse_from_rfc3339(text)
            .map(|instant| Self {
                millis: instant.timestamp_millis(),
            })
            .map_err(|_| InvalidTimestamp(text.to_owned()))
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// A length of time, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    millis: u64,
}

impl Span {
    /// The empty span.
    pub const ZERO: Self = Self { millis: 0 };

    /// Creates a span from milliseconds.
    pub const fn from_millis(millis: u64) -> Self {
        Self { millis }
    }

    /// Creates a span from seconds.
    pub const fn from_secs(seconds: u64) -> Self {
        Self {
            millis: seconds * 1000,
        }
    }

    /// Whether it is empty.
    pub const fn is_zero(&self) -> bool {
        self.millis == 0
    }

    /// The length in milliseconds.
    pub const fn millis(self) -> u64 {
        self.millis
    }

    /// The length in whole seconds, rounded down.
    pub const fn secs(self) -> u64 {
        self.millis / 1000
    }

    /// Converts to the standard library's type.
    pub const fn to_std(self) -> std::time::Duration {
        std::time::Duration::from_millis(self.millis)
    }
}

/// Unit, milliseconds, and the digits that a count may have: a few centuries exceed any use, and keep sums of
/// instants and spans in range. The pattern of the schema states the same.
const UNITS: [(&str, u64, usize); 5] = [
    ("ms", 1, 13),
    ("d", 86_400_000, 5),
    ("h", 3_600_000, 6),
    ("m", 60_000, 8),
    ("s", 1000, 10),
];

/// The text is not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a duration: write a whole number and a unit, such as 500ms, 30s, 5m, 1h or 7d"
)]
pub struct InvalidSpan(String);

impl FromStr for Span {
    type Err = InvalidSpan;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidSpan(text.to_owned());
        let (unit, factor, digits_max) = UNITS
            .iter()
            .find(|(unit, ..)| text.ends_with(unit))
            .ok_or_else(invalid)?;
        let digits = &text[..text.len() - unit.len()];
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(invalid());
        }
        if digits.trim_start_matches('0').len() > *digits_max {
            return Err(invalid());
        }
        let count: u64 = digits.parse().map_err(|_| invalid())?;
        Ok(Self::from_millis(count * factor))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.millis == 0 {
            return f.write_str("0s");
        }
        let largest = UNITS
            .iter()
            .filter(|(_, factor, _)| self.millis.is_multiple_of(*factor))
            .max_by_key(|(_, factor, _)| *factor);
        let (unit, factor) = largest.map_or(("ms", 1), |(unit, factor, _)| (*unit, *factor));
        write!(f, "{}{unit}", self.millis / factor)
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

impl schemars::JsonSchema for Span {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Duration".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string",
            "pattern": "^0*([0-9]{1,13}ms|[0-9]{1,10}s|[0-9]{1,8}m|[0-9]{1,6}h|[0-9]{1,5}d)$",
            "description": "A whole number and a unit: 500ms, 30s, 5m, 1h, 7d"})
    }
}

impl schemars::JsonSchema for Timestamp {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Timestamp".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "format": "date-time",
            "description": "RFC 3339, in UTC with milliseconds"})
    }
}

impl schemars::JsonSchema for crate::ids::Name {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Name".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "pattern": "^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$"})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_parsed_and_displayed_in_the_largest_whole_unit() {
        for (text, millis, canonical) in [
            ("500ms", 500, "500ms"),
            ("30s", 30_000, "30s"),
            ("90s", 90_000, "90s"),
            ("5m", 300_000, "5m"),
            ("60m", 3_600_000, "1h"),
            ("7d", 604_800_000, "7d"),
            ("0m", 0, "0s"),
        ] {
            let span: Span = text.parse().unwrap();
            assert_eq!(span.millis(), millis);
            assert_eq!(span.to_string(), canonical);
        }
        for bad in [
            "",
            "5",
            "s",
            "-5s",
            "1.5h",
            "5 m",
            "100000d",
            "10000000000000ms",
            "1w",
        ] {
            assert!(bad.parse::<Span>().is_err(), "{bad}");
        }
    }
}
