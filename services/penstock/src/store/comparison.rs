//! The result of a comparison, as text and as JSON.
//!
//! Invariant: a log that merely ends before the other is never reported as a difference between events.

use contract::ids::Position;
use serde::Serialize;
use store::{LogHash, RawRecord};

use super::{Extent, describe_hash, is_kafka_url, without_options};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LogComparison {
    pub equal: bool,
    /// The last position before the first difference.
    pub same_up_to: Position,
    pub a: ComparedLog,
    pub b: ComparedLog,
    /// The first position that is not the same in both.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub differs_at: Option<Position>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub difference: Option<Difference>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ComparedLog {
    #[serde(flatten)]
    pub hash: LogHash,
    /// Number of events beyond the hashed range.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub more: Option<u64>,
    /// Events that the other log does not have, within the compared range.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub only: Option<UnmatchedEvents>,
    pub last: Position,
    /// For a store: everything up to here is confirmed by Kafka.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub carried: Option<Position>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kafka: Option<Extent>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct UnmatchedEvents {
    pub events: u64,
    pub first: Position,
    pub last: Position,
}

impl UnmatchedEvents {
    pub fn count(&mut self, at: Position) {
        if self.events == 0 {
            self.first = at;
        }
        self.events += 1;
        self.last = at;
    }

    fn describe(self, adjective: &str) -> String {
        match self.events {
            1 => format!("1 {adjective} event, at position {}, is", self.last),
            events => format!(
                "{events} {adjective} events, up to position {}, are",
                self.last
            ),
        }
    }
}

/// How two logs differ at a position.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Difference {
    /// The other log has no event there.
    OnlyIn(&'static str),
    /// Kafka lacks this event, but has what follows it.
    Hole,
    /// These fields differ.
    Fields(Vec<&'static str>),
}

impl Difference {
    pub fn of(a: &RawRecord, b: &RawRecord) -> Option<Self> {
        if a.is_same_as(b) {
            return None;
        }
        let fields = [
            ("previous position", a.prev == b.prev),
            (
                "hash of the event before it",
                a.prev_hash.is_none() || b.prev_hash.is_none() || a.prev_hash == b.prev_hash,
            ),
            ("bucket", a.bucket == b.bucket),
            ("stream", a.stream == b.stream),
            ("version", a.version == b.version),
            ("id", a.id == b.id),
            ("type", a.type_name == b.type_name),
            ("version of the type", a.type_version == b.type_version),
            ("time", a.time == b.time),
            ("actor", a.actor == b.actor),
            ("data", a.data == b.data),
        ];
        let differ = fields.into_iter().filter(|(_, same)| !same);
        Some(Self::Fields(differ.map(|(name, _)| name).collect()))
    }
}

/// One of the two logs, with its name and location for text output.
#[derive(Clone, Copy)]
struct NamedLog<'a> {
    name: &'static str,
    location: &'a str,
    compared: &'a ComparedLog,
}

impl LogComparison {
    pub fn text(&self, [a, b]: [&str; 2]) -> String {
        let a = NamedLog {
            name: "a",
            location: a,
            compared: &self.a,
        };
        let b = NamedLog {
            name: "b",
            location: b,
            compared: &self.b,
        };
        let mut lines = match self.differs_at {
            None => vec![format!(
                "equal up to position {}: {} events, sha256 {}",
                self.same_up_to, self.a.hash.events, self.a.hash.sha256
            )],
            Some(at) => self.describe_difference(at, a, b),
        };
        if self.equal {
            lines.extend(
                [(a, b), (b, a)]
                    .into_iter()
                    .filter_map(|(of, other)| newer(of, other)),
            );
        }
        for side in [a, b] {
            let extent = side.compared.kafka.as_ref();
            lines.extend(
                extent
                    .into_iter()
                    .flat_map(|extent| extent.lines(side.location)),
            );
        }
        lines.join("\n")
    }

    fn describe_difference(&self, at: Position, a: NamedLog<'_>, b: NamedLog<'_>) -> Vec<String> {
        let ends_before = |side: &NamedLog<'_>| side.compared.last < at;
        let shorter = [(a, b), (b, a)]
            .into_iter()
            .find(|(side, _)| ends_before(side));
        if let Some((shorter, longer)) = shorter {
            return self.describe_shorter(shorter, longer);
        }
        let what = match &self.difference {
            Some(Difference::Fields(fields)) => format!(": {} not the same", enumerate(fields)),
            Some(Difference::OnlyIn(side)) => format!(", where only {side} has an event"),
            Some(Difference::Hole) => ", which is missing on Kafka".to_owned(),
            None => String::new(),
        };
        let mut lines = vec![format!("not the same: they diverge at position {at}{what}")];
        lines.extend(
            [a, b].map(|side| format!("{}: {}", side.name, describe_hash(&side.compared.hash))),
        );
        lines
    }

    /// One log is a prefix of the other.
    fn describe_shorter(&self, shorter: NamedLog<'_>, longer: NamedLog<'_>) -> Vec<String> {
        let mut lines = vec![format!(
            "not the same: they are equal up to position {}, and there {} ends",
            self.same_up_to, shorter.name
        )];
        let only = longer.compared.only.unwrap_or_default();
        let carried = longer.compared.carried.unwrap_or_default();
        if is_kafka_url(shorter.location) && only.first <= carried {
            lines.push(format!(
                "{} in {} only, although Kafka has confirmed everything up to position {carried} to its \
                 relay: the topics have lost them, or are not the ones that it publishes to. `penstock \
                 store republish --to {} --store STORE` fills them",
                only.describe("more"),
                longer.name,
                without_options(shorter.location)
            ));
            return lines;
        }
        lines.extend(newer(longer, shorter));
        lines
    }
}

/// Describes the events of one log that the other does not have yet.
fn newer(of: NamedLog<'_>, other: NamedLog<'_>) -> Option<String> {
    let only = of.compared.only?;
    let what = format!("{} in {} only", only.describe("newer"), of.name);
    let store_and_kafka = (is_kafka_url(of.location), is_kafka_url(other.location));
    let why = match store_and_kafka {
        (false, true) => {
            let after = match of.compared.carried {
                Some(carried @ Position(1..)) => format!(" --after {carried}"),
                _ => String::new(),
            };
            format!(
                ", the store: its relay has not published them to Kafka yet. While services run, it does so \
                 within moments; otherwise, `penstock store republish --to {}{after} --store STORE` does",
                without_options(other.location)
            )
        }
        (true, false) => format!(
            ", on Kafka: the store is an earlier state of it, such as a backup. If no service uses \
             it, `penstock store rebuild --from {} --store STORE` imports them",
            without_options(of.location)
        ),
        _ => String::new(),
    };
    Some(format!("{what}{why}"))
}

/// `the a is`, `the a and the b are`.
fn enumerate(names: &[&str]) -> String {
    match names {
        [] => "something is".to_owned(),
        [one] => format!("the {one} is"),
        [first @ .., last] => format!("the {} and the {last} are", first.join(", the ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KAFKA: &str = "kafka://k:9092/p";

    fn side(last: u64, only: Option<UnmatchedEvents>, carried: Option<u64>) -> ComparedLog {
        ComparedLog {
            hash: LogHash {
                events: 100,
                head: Position(100),
                sha256: "00".to_owned(),
            },
            more: None,
            only,
            last: Position(last),
            carried: carried.map(Position),
            kafka: None,
        }
    }

    fn store(carried: u64) -> ComparedLog {
        let only = UnmatchedEvents {
            events: 21,
            first: Position(101),
            last: Position(121),
        };
        side(121, Some(only), Some(carried))
    }

    fn ends_at_100(store: ComparedLog, differs_at: Option<u64>) -> String {
        let comparison = LogComparison {
            equal: differs_at.is_none(),
            same_up_to: Position(100),
            a: store,
            b: side(100, None, None),
            differs_at: differs_at.map(Position),
            difference: differs_at.map(|_| Difference::OnlyIn("a")),
        };
        comparison.text(["s.db", KAFKA])
    }

    #[test]
    fn events_not_yet_relayed_are_reported_with_an_equal_result() {
        let text = ends_at_100(store(90), None);
        assert!(
            text.starts_with("equal up to position 100: 100 events,"),
            "{text}"
        );
        let newer = "21 newer events, up to position 121, are in a only, the store";
        assert!(text.contains(newer), "{text}");
        assert!(text.contains("--to kafka://k:9092/p --after 90"), "{text}");
    }

    #[test]
    fn a_shorter_log_is_distinguished_from_a_different_one() {
        let text = ends_at_100(store(100), Some(101));
        let expected = "not the same: they are equal up to position 100, and there b ends";
        assert!(text.starts_with(expected), "{text}");
        assert!(text.contains("not published them to Kafka yet"), "{text}");
        let text = ends_at_100(store(121), Some(101));
        assert!(
            text.contains("confirmed everything up to position 121"),
            "{text}"
        );
        let text = ends_at_100(store(100), Some(77));
        let expected = "not the same: they diverge at position 77, where only a has an event";
        assert!(text.starts_with(expected), "{text}");
    }

    #[test]
    fn the_fields_that_differ_are_named() {
        let event = RawRecord {
            position: Position(1),
            prev: Position(0),
            prev_hash: None,
            bucket: contract::ids::Bucket(1),
            stream: String::new(),
            version: 1,
            id: String::new(),
            type_name: String::new(),
            type_version: 1,
            time: contract::time::Timestamp::from_secs(1),
            actor: String::new(),
            data: "{}".to_owned(),
        };
        let other = RawRecord {
            actor: "x".to_owned(),
            data: "{ }".to_owned(),
            ..event.clone()
        };
        assert_eq!(Difference::of(&event, &event), None);
        let fields = vec!["actor", "data"];
        assert_eq!(
            Difference::of(&event, &other),
            Some(Difference::Fields(fields))
        );
    }
}
