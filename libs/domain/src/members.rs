//! Which gateways and nodes there are: folded from the log, and told from frames by the one who
//! writes that part of the log.
//!
//! Invariants: a source joins by its own word (a hello) and leaves by its own word (a goodbye) or by
//! a long silence that others do not share; when nobody is heard, it is we who are deaf, and nobody
//! leaves.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use contract::events::{Event, LeaveReason, MemberJoined, MemberLeft};
use contract::frame::{Frame, Hello, Source, SourceKind};
use contract::ids::{Bucket, Position};
use contract::log::{Record, StreamName};
use contract::resources::BackendKind;
use contract::time::{Span, Timestamp};
use uuid::Uuid;

/// A member of which nothing is heard for this long has left. Sixty frames: longer than a restart, a
/// rebalance or a full garbage collection of a broker takes, and short enough that instances lost
/// with their node are replaced within two minutes.
pub const SILENT_AFTER: Span = Span::from_secs(60);
/// A node that said goodbye may be restarting with its instances alive, so they count for this long
/// after it. As long as silence is borne: whoever means to come back has no more time than that.
pub const NODE_GRACE: Span = SILENT_AFTER;
/// Sources send every second; when nothing at all came for longer than this, we are deaf.
const DEAF_AFTER: Span = Span::from_secs(3);
/// Hellos stand in the frames of this bucket.
const HELLOS: Bucket = Bucket(0);
/// Former sets of gateways that are remembered, to tell who is new since a route was dealt.
const HISTORY_MAX: usize = 64;

/// The members, as far as the log has been read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Members {
    /// By id, those that have left for a moment too.
    pub gateways: BTreeMap<String, Member>,
    /// By id, those that have left for a moment too.
    pub nodes: BTreeMap<String, Member>,
    /// Sources that only measure.
    others: BTreeMap<Source, Member>,
    /// Nodes that left and did not come back.
    away: BTreeMap<String, Away>,
    /// The gateways as they were one after the other, the newest last. Before the first there was
    /// none.
    sets: VecDeque<GatewaySet>,
    forgotten: bool,
    /// Of the last event taken in.
    pub position: Position,
    /// Of the stream of members, up to that event.
    pub version: u64,
}

/// A gateway or a node that counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Member {
    /// Where its admin listener answers, as a URL.
    pub address: Option<String>,
    /// What a node can run.
    pub backends: Vec<BackendKind>,
}

/// The gateways from a position on.
#[derive(Clone, Debug, PartialEq)]
struct GatewaySet {
    from: Position,
    since: Timestamp,
    gateways: BTreeSet<String>,
}

#[derive(Clone, Debug, PartialEq)]
struct Away {
    since: Timestamp,
    reason: LeaveReason,
    was: Member,
}

impl Members {
    /// Takes in a record; those of other streams change nothing.
    pub fn apply(&mut self, record: &Record) {
        if record.stream != StreamName::members() {
            return;
        }
        self.position = record.position;
        self.version = record.version;
        match &record.event {
            Event::MemberJoined(joined) => self.join(joined),
            Event::MemberLeft(left) => self.leave(left, record.time),
            _ => {}
        }
        let now: BTreeSet<String> = self.gateways.keys().cloned().collect();
        let changed = match self.sets.back() {
            Some(before) => before.gateways != now,
            None => !now.is_empty(),
        };
        if changed {
            self.sets.push_back(GatewaySet {
                from: record.position,
                since: record.time,
                gateways: now,
            });
            if self.sets.len() > HISTORY_MAX {
                self.sets.pop_front();
                self.forgotten = true;
            }
        }
    }

    /// An event of the stream that cannot be read tells nothing, but it has its place.
    pub fn pass_over(&mut self, position: Position, version: u64) {
        self.position = position;
        self.version = version;
    }

    /// Whether there were gateways, and all of them have left.
    pub fn every_gateway_left(&self) -> bool {
        self.gateways.is_empty() && !self.sets.is_empty()
    }

    fn join(&mut self, joined: &MemberJoined) {
        let source = joined.source.clone();
        let member = Member {
            address: joined.address.clone(),
            backends: joined.backends.clone(),
        };
        if source.kind == SourceKind::GATEWAY {
            self.gateways.insert(source.id, member);
        } else if source.kind == SourceKind::NODE {
            self.away.remove(&source.id);
            self.nodes.insert(source.id, member);
        } else {
            self.others.insert(source, member);
        }
    }

    fn leave(&mut self, left: &MemberLeft, at: Timestamp) {
        let Source { kind, id } = &left.source;
        if *kind == SourceKind::GATEWAY {
            self.gateways.remove(id);
        } else if *kind == SourceKind::NODE {
            if let Some(was) = self.nodes.remove(id) {
                let (since, reason) = (at, left.reason);
                let away = Away { since, reason, was };
                self.away.insert(id.clone(), away);
            }
        } else {
            self.others.remove(&left.source);
        }
    }

    /// The member that sends frames as this source.
    pub fn get(&self, source: &Source) -> Option<&Member> {
        if source.kind == SourceKind::GATEWAY {
            self.gateways.get(&source.id)
        } else if source.kind == SourceKind::NODE {
            self.nodes.get(&source.id)
        } else {
            self.others.get(source)
        }
    }

    fn sources(&self) -> impl Iterator<Item = Source> {
        let of = |kind: SourceKind| {
            move |id: &String| Source {
                kind: kind.clone(),
                id: id.clone(),
            }
        };
        let gateways = self.gateways.keys().map(of(SourceKind::GATEWAY));
        let nodes = self.nodes.keys().map(of(SourceKind::NODE));
        gateways.chain(nodes).chain(self.others.keys().cloned())
    }

    /// What the nodes of now can run.
    pub fn backends(&self) -> BTreeSet<BackendKind> {
        let nodes = self.nodes.values();
        nodes
            .flat_map(|node| node.backends.iter().cloned())
            .collect()
    }

    /// The position by which slots are dealt: where the gateways last became others.
    pub fn dealt_as_of(&self) -> Position {
        self.sets.back().map_or(Position::START, |set| set.from)
    }

    /// When the gateways last became others.
    pub fn dealt_since(&self) -> Timestamp {
        self.sets
            .back()
            .map_or_else(Timestamp::default, |set| set.since)
    }

    /// The gateways as they were before they last became others.
    pub fn gateways_before(&self) -> BTreeSet<String> {
        let before = self.sets.iter().rev().nth(1);
        before.map(|set| set.gateways.clone()).unwrap_or_default()
    }

    /// The gateways of now.
    pub fn gateway_ids(&self) -> BTreeSet<String> {
        self.gateways.keys().cloned().collect()
    }

    /// The gateways that there were at a position; none if that is too long ago.
    pub fn gateways_at(&self, position: Position) -> Option<BTreeSet<String>> {
        let then = self.sets.iter().rev().find(|set| set.from <= position);
        match then {
            Some(set) => Some(set.gateways.clone()),
            None => (!self.forgotten).then(BTreeSet::new),
        }
    }

    /// Whether the instances of a node are to be taken for lost. A node of which nothing was ever
    /// said is not: its first frame may be on its way.
    pub fn is_lost(&self, node: &str, now: Timestamp) -> bool {
        self.away.get(node).is_some_and(|away| match away.reason {
            LeaveReason::Silent => true,
            LeaveReason::Goodbye => now.since(away.since) >= NODE_GRACE,
        })
    }

    /// Whether a node that allows the backend is away for a moment only.
    pub fn comes_back(&self, backend: &BackendKind, now: Timestamp) -> bool {
        self.away
            .iter()
            .any(|(node, away)| away.was.backends.contains(backend) && !self.is_lost(node, now))
    }
}

/// Tells from frames what to write into the stream of members.
#[derive(Clone, Debug, Default)]
pub struct MemberWatch {
    heard: BTreeMap<Source, Heard>,
    hearing: Option<Hearing>,
}

#[derive(Clone, Debug)]
struct Heard {
    boot: Uuid,
    last: Timestamp,
    hello: Option<Hello>,
    goodbye: bool,
}

/// The time over which frames have come without a pause.
#[derive(Clone, Copy, Debug)]
struct Hearing {
    since: Timestamp,
    last: Timestamp,
}

impl MemberWatch {
    /// Takes in a frame that arrived at `now`.
    pub fn observe(&mut self, frame: &Frame, now: Timestamp) {
        if frame.bucket != HELLOS {
            return;
        }
        let fresh = Hearing {
            since: now,
            last: now,
        };
        let hearing = self.hearing.get_or_insert(fresh);
        if now.since(hearing.last) > DEAF_AFTER || now < hearing.since {
            hearing.since = now;
        }
        hearing.last = now;
        let before = self.heard.get(&frame.source);
        let same_boot = before.filter(|heard| heard.boot == frame.boot);
        if frame.goodbye && before.is_some() && same_boot.is_none() {
            // The last word of a former life; the next one has spoken already.
            return;
        }
        let hello = match &frame.hello {
            Some(hello) => Some(hello.clone()),
            None => same_boot.and_then(|heard| heard.hello.clone()),
        };
        let heard = Heard {
            boot: frame.boot,
            last: now,
            hello,
            goodbye: frame.goodbye,
        };
        self.heard.insert(frame.source.clone(), heard);
    }

    /// What is to be written now, given what was written so far. The same is said again until the
    /// members show it.
    pub fn due(&mut self, members: &Members, now: Timestamp) -> Vec<Event> {
        let Some(hearing) = self.hearing else {
            return Vec::new();
        };
        let mut events = Vec::new();
        for (source, heard) in &self.heard {
            let member = members.get(source);
            if heard.goodbye && member.is_some() {
                events.push(left(source, LeaveReason::Goodbye));
            } else if !heard.goodbye
                && now.since(heard.last) <= DEAF_AFTER
                && let Some(hello) = &heard.hello
                && member.is_none_or(|member| !is_as_said(member, hello))
            {
                events.push(joined(source, hello));
            }
        }
        if now.since(hearing.last) <= DEAF_AFTER {
            for source in members.sources() {
                let heard = self.heard.get(&source);
                let last = heard.map_or(hearing.since, |heard| heard.last.max(hearing.since));
                let goodbye = heard.is_some_and(|heard| heard.goodbye);
                if !goodbye && now.since(last) >= SILENT_AFTER {
                    events.push(left(&source, LeaveReason::Silent));
                }
            }
        }
        self.heard.retain(|source, heard| {
            members.get(source).is_some() || now.since(heard.last) < SILENT_AFTER
        });
        events
    }
}

fn is_as_said(member: &Member, hello: &Hello) -> bool {
    member.address == hello.address && member.backends == hello.backends
}

fn joined(source: &Source, hello: &Hello) -> Event {
    Event::MemberJoined(MemberJoined {
        source: source.clone(),
        address: hello.address.clone(),
        backends: hello.backends.clone(),
    })
}

fn left(source: &Source, reason: LeaveReason) -> Event {
    Event::MemberLeft(MemberLeft {
        source: source.clone(),
        reason,
    })
}
