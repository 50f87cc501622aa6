//! What came of a comparison, in words and as JSON.
//!
//! Invariant: that one log ends before the other is never worded as if their events differed.

use contract::ids::Position;
use serde::Serialize;
use store::{LogHash, RawRecord};

use super::{Extent, is_kafka, line, shown};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Comparison {
    pub equal: bool,
    /// The last position before the first difference.
    pub same_up_to: Position,
    pub a: Compared,
    pub b: Compared,
    /// The first position that is not the same in both.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub differs_at: Option<Position>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub difference: Option<What>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Compared {
    #[serde(flatten)]
    pub hash: LogHash,
    /// Events above those that were compared by the hash.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub more: Option<u64>,
    /// Events that the other has not, as far as was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub only: Option<Only>,
    pub last: Position,
    /// Of a store: its relay has had everything up to here confirmed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub carried: Option<Position>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kafka: Option<Extent>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Only {
    pub events: u64,
    pub first: Position,
    pub last: Position,
}

impl Only {
    pub fn count(&mut self, at: Position) {
        if self.events == 0 {
            self.first = at;
        }
        self.events += 1;
        self.last = at;
    }

    fn told(self, adjective: &str) -> String {
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
pub enum What {
    /// The other has nothing there.
    OnlyIn(&'static str),
    /// Kafka has nothing there, and what follows it.
    Hole,
    /// These of the event are not the same.
    Fields(Vec<&'static str>),
}

impl What {
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

/// One of the two, as text names it.
#[derive(Clone, Copy)]
struct Named<'a> {
    name: &'static str,
    place: &'a str,
    compared: &'a Compared,
}

impl Comparison {
    pub fn text(&self, [a, b]: [&str; 2]) -> String {
        let a = Named {
            name: "a",
            place: a,
            compared: &self.a,
        };
        let b = Named {
            name: "b",
            place: b,
            compared: &self.b,
        };
        let mut lines = match self.differs_at {
            None => vec![format!(
                "equal up to position {}: {} events, sha256 {}",
                self.same_up_to, self.a.hash.events, self.a.hash.sha256
            )],
            Some(at) => self.parted(at, a, b),
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
                    .flat_map(|extent| extent.lines(side.place)),
            );
        }
        lines.join("\n")
    }

    fn parted(&self, at: Position, a: Named<'_>, b: Named<'_>) -> Vec<String> {
        let ends_before = |side: &Named<'_>| side.compared.last < at;
        let ended = [(a, b), (b, a)]
            .into_iter()
            .find(|(side, _)| ends_before(side));
        if let Some((ended, longer)) = ended {
            return self.ended(ended, longer);
        }
        let what = match &self.difference {
            Some(What::Fields(fields)) => format!(": {} not the same", list(fields)),
            Some(What::OnlyIn(side)) => format!(", where only {side} has an event"),
            Some(What::Hole) => ", which is missing on Kafka".to_owned(),
            None => String::new(),
        };
        let mut lines = vec![format!("not the same: they part at position {at}{what}")];
        lines.extend([a, b].map(|side| format!("{}: {}", side.name, line(&side.compared.hash))));
        lines
    }

    /// Nothing differs but their length.
    fn ended(&self, ended: Named<'_>, longer: Named<'_>) -> Vec<String> {
        let mut lines = vec![format!(
            "not the same: they are equal up to position {}, and there {} ends",
            self.same_up_to, ended.name
        )];
        let only = longer.compared.only.unwrap_or_default();
        let carried = longer.compared.carried.unwrap_or_default();
        if is_kafka(ended.place) && only.first <= carried {
            lines.push(format!(
                "{} in {} only, although its relay has had Kafka's word on everything up to position \
                 {carried}: the topics have lost them, or are not the ones that it publishes to. `penstock \
                 store republish --to {} --store STORE` fills them",
                only.told("more"),
                longer.name,
                shown(ended.place)
            ));
            return lines;
        }
        lines.extend(newer(longer, ended));
        lines
    }
}

/// Events of one that the other has not got yet.
fn newer(of: Named<'_>, other: Named<'_>) -> Option<String> {
    let only = of.compared.only?;
    let what = format!("{} in {} only", only.told("newer"), of.name);
    let store_and_kafka = (is_kafka(of.place), is_kafka(other.place));
    let why = match store_and_kafka {
        (false, true) => {
            let after = match of.compared.carried {
                Some(carried @ Position(1..)) => format!(" --after {carried}"),
                _ => String::new(),
            };
            format!(
                ", the store: its relay has not carried them to Kafka yet. While services run, it does so \
                 within moments; where none runs, `penstock store republish --to {}{after} --store STORE` does",
                shown(other.place)
            )
        }
        (true, false) => format!(
            ", on Kafka: the store is an earlier state of it, such as a backup. Where no service uses \
             it, `penstock store rebuild --from {} --store STORE` takes them in",
            shown(of.place)
        ),
        _ => String::new(),
    };
    Some(format!("{what}{why}"))
}

/// `the a is`, `the a and the b are`.
fn list(names: &[&str]) -> String {
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

    fn side(last: u64, only: Option<Only>, carried: Option<u64>) -> Compared {
        Compared {
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

    fn store(carried: u64) -> Compared {
        let only = Only {
            events: 21,
            first: Position(101),
            last: Position(121),
        };
        side(121, Some(only), Some(carried))
    }

    fn ends_at_100(store: Compared, differs_at: Option<u64>) -> String {
        let comparison = Comparison {
            equal: differs_at.is_none(),
            same_up_to: Position(100),
            a: store,
            b: side(100, None, None),
            differs_at: differs_at.map(Position),
            difference: differs_at.map(|_| What::OnlyIn("a")),
        };
        comparison.text(["s.db", KAFKA])
    }

    #[test]
    fn what_is_not_relayed_yet_is_told_beside_what_is_equal() {
        let said = ends_at_100(store(90), None);
        assert!(
            said.starts_with("equal up to position 100: 100 events,"),
            "{said}"
        );
        let newer = "21 newer events, up to position 121, are in a only, the store";
        assert!(said.contains(newer), "{said}");
        assert!(said.contains("--to kafka://k:9092/p --after 90"), "{said}");
    }

    #[test]
    fn a_log_that_ends_early_is_told_from_one_that_differs() {
        let said = ends_at_100(store(100), Some(101));
        let expected = "not the same: they are equal up to position 100, and there b ends";
        assert!(said.starts_with(expected), "{said}");
        assert!(said.contains("not carried them to Kafka yet"), "{said}");
        let lost = ends_at_100(store(121), Some(101));
        assert!(
            lost.contains("word on everything up to position 121"),
            "{lost}"
        );
        let differs = ends_at_100(store(100), Some(77));
        let expected = "not the same: they part at position 77, where only a has an event";
        assert!(differs.starts_with(expected), "{differs}");
    }

    #[test]
    fn what_is_not_the_same_of_an_event_is_named() {
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
        assert_eq!(What::of(&event, &event), None);
        let fields = vec!["actor", "data"];
        assert_eq!(What::of(&event, &other), Some(What::Fields(fields)));
    }
}
