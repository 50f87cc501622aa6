//! Membership of gateways and nodes: folded from the log, and derived from frames by the service
//! that writes that part of the log.
//!
//! Invariants: a source joins with a hello and leaves with a goodbye, or after a long silence while
//! others are still heard. If no frames arrive from anyone, the fault is on our side and nobody
//! leaves. Where there can only be one node, any other has left at once.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use contract::events::{Event, LeaveReason, MemberJoined, MemberLeft};
use contract::frame::{Frame, Hello, Source, SourceKind};
use contract::ids::{Bucket, Position};
use contract::log::{Record, StreamName};
use contract::resources::BackendKind;
use contract::time::{Span, Timestamp};
use uuid::Uuid;

/// A member that sends nothing for this long has left. Sixty frames: longer than a restart, a
/// rebalance or a full garbage collection of a broker takes, and short enough to replace instances
/// lost with their node within two minutes.
pub const SILENT_AFTER: Span = Span::from_secs(60);
/// How long the instances of a node that said goodbye still count, since it may be restarting with
/// them alive. The same as the timeout for silence: a node that means to come back gets no longer
/// than that.
pub const NODE_GRACE: Span = SILENT_AFTER;
/// Sources send every second; without a frame from anyone for longer than this, we are
/// disconnected.
const DISCONNECTED_AFTER: Span = Span::from_secs(3);
/// The bucket whose frames carry hellos.
const HELLO_BUCKET: Bucket = Bucket(0);
/// How many past gateway sets are kept, to tell which gateways are new since a route was published.
const HISTORY_MAX: usize = 64;

/// The members, as of the last event applied.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Members {
    /// By id.
    pub gateways: BTreeMap<String, Member>,
    /// By id.
    pub nodes: BTreeMap<String, Member>,
    /// Sources that only report measurements.
    others: BTreeMap<Source, Member>,
    /// Nodes that left and have not come back.
    departed: BTreeMap<String, DepartedNode>,
    /// The gateway sets over time, newest last; empty until the first gateway joins.
    sets: VecDeque<GatewaySet>,
    is_truncated: bool,
    /// Position of the last event applied.
    pub position: Position,
    /// Version of the members stream at that event.
    pub version: u64,
}

/// A current gateway or node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Member {
    /// URL of its admin listener.
    pub address: Option<String>,
    /// Backends that the node offers.
    pub backends: Vec<BackendKind>,
}

/// The set of gateways from a position on.
#[derive(Clone, Debug, PartialEq)]
struct GatewaySet {
    from: Position,
    since: Timestamp,
    gateways: BTreeSet<String>,
}

#[derive(Clone, Debug, PartialEq)]
struct DepartedNode {
    since: Timestamp,
    reason: LeaveReason,
    member: Member,
}

impl Members {
    /// Applies a record; records of other streams change nothing.
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
                self.is_truncated = true;
            }
        }
    }

    /// Skips an event of the stream that cannot be read, keeping its position and version.
    pub fn skip(&mut self, position: Position, version: u64) {
        self.position = position;
        self.version = version;
    }

    /// Whether there have been gateways and all of them have left.
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
            self.departed.remove(&source.id);
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
            if let Some(member) = self.nodes.remove(id) {
                let (since, reason) = (at, left.reason);
                let departed = DepartedNode {
                    since,
                    reason,
                    member,
                };
                self.departed.insert(id.clone(), departed);
            }
        } else {
            self.others.remove(&left.source);
        }
    }

    /// The member with this source.
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

    /// The backends that the current nodes offer.
    pub fn backends(&self) -> BTreeSet<BackendKind> {
        let nodes = self.nodes.values();
        nodes
            .flat_map(|node| node.backends.iter().cloned())
            .collect()
    }

    /// The position at which the set of gateways last changed: slots are allocated as of it.
    pub fn gateway_set_position(&self) -> Position {
        self.sets.back().map_or(Position::START, |set| set.from)
    }

    /// When the set of gateways last changed.
    pub fn gateway_set_since(&self) -> Timestamp {
        self.sets
            .back()
            .map_or_else(Timestamp::default, |set| set.since)
    }

    /// The set of gateways before the last change.
    pub fn previous_gateways(&self) -> BTreeSet<String> {
        let before = self.sets.iter().rev().nth(1);
        before.map(|set| set.gateways.clone()).unwrap_or_default()
    }

    /// The current gateways.
    pub fn gateway_ids(&self) -> BTreeSet<String> {
        self.gateways.keys().cloned().collect()
    }

    /// The gateways at a position, or `None` if that is too long ago to know.
    pub fn gateways_at(&self, position: Position) -> Option<BTreeSet<String>> {
        let then = self.sets.iter().rev().find(|set| set.from <= position);
        match then {
            Some(set) => Some(set.gateways.clone()),
            None => (!self.is_truncated).then(BTreeSet::new),
        }
    }

    /// Whether the instances of a node count as lost. A node that was never a member is not lost:
    /// its first frame may be on its way.
    pub fn is_lost(&self, node: &str, now: Timestamp) -> bool {
        self.departed
            .get(node)
            .is_some_and(|departed| match departed.reason {
                LeaveReason::Silent => true,
                LeaveReason::Goodbye => now.since(departed.since) >= NODE_GRACE,
            })
    }

    /// Whether a node that offers the backend has left and may still come back.
    pub fn may_return(&self, backend: &BackendKind, now: Timestamp) -> bool {
        self.departed.iter().any(|(node, departed)| {
            departed.member.backends.contains(backend) && !self.is_lost(node, now)
        })
    }
}

/// Derives from frames what to write to the members stream.
#[derive(Clone, Debug, Default)]
pub struct MemberWatch {
    sources: BTreeMap<Source, SourceState>,
    window: Option<ReceiveWindow>,
    only_node: Option<String>,
}

#[derive(Clone, Debug)]
struct SourceState {
    boot: Uuid,
    last: Timestamp,
    hello: Option<Hello>,
    goodbye: bool,
}

/// The period over which frames have arrived without interruption.
#[derive(Clone, Copy, Debug)]
struct ReceiveWindow {
    since: Timestamp,
    last: Timestamp,
}

impl MemberWatch {
    /// Creates a watch that has observed nothing. `only_node` is the node in this process if there can
    /// be no other, since store and bus are its own: what the log knows of others is from an earlier run,
    /// whose data folder this node has.
    pub fn new(only_node: Option<String>) -> Self {
        Self {
            only_node,
            ..Self::default()
        }
    }

    /// Observes a frame that arrived at `now`.
    pub fn observe(&mut self, frame: &Frame, now: Timestamp) {
        if frame.bucket != HELLO_BUCKET {
            return;
        }
        let fresh = ReceiveWindow {
            since: now,
            last: now,
        };
        let window = self.window.get_or_insert(fresh);
        if now.since(window.last) > DISCONNECTED_AFTER || now < window.since {
            window.since = now;
        }
        window.last = now;
        let before = self.sources.get(&frame.source);
        let same_boot = before.filter(|state| state.boot == frame.boot);
        if frame.goodbye && before.is_some() && same_boot.is_none() {
            // A late goodbye from an earlier start; the next start is already known.
            return;
        }
        let hello = match &frame.hello {
            Some(hello) => Some(hello.clone()),
            None => same_boot.and_then(|state| state.hello.clone()),
        };
        let state = SourceState {
            boot: frame.boot,
            last: now,
            hello,
            goodbye: frame.goodbye,
        };
        self.sources.insert(frame.source.clone(), state);
    }

    /// Returns the events to write now. An event is returned again until `members` reflects it.
    pub fn due(&mut self, members: &Members, now: Timestamp) -> Vec<Event> {
        let mut events = self.replaced_nodes(members);
        let Some(window) = self.window else {
            return events;
        };
        for (source, state) in &self.sources {
            let member = members.get(source);
            if state.goodbye && member.is_some() {
                events.push(left(source, LeaveReason::Goodbye));
            } else if !state.goodbye
                && now.since(state.last) <= DISCONNECTED_AFTER
                && let Some(hello) = &state.hello
                && member.is_none_or(|member| !matches_hello(member, hello))
            {
                events.push(joined(source, hello));
            }
        }
        if now.since(window.last) <= DISCONNECTED_AFTER {
            for source in members.sources() {
                let state = self.sources.get(&source);
                let last = state.map_or(window.since, |state| state.last.max(window.since));
                let goodbye = state.is_some_and(|state| state.goodbye);
                if !goodbye && !self.is_replaced(&source) && now.since(last) >= SILENT_AFTER {
                    events.push(left(&source, LeaveReason::Silent));
                }
            }
        }
        self.sources.retain(|source, state| {
            members.get(source).is_some() || now.since(state.last) < SILENT_AFTER
        });
        events
    }

    fn replaced_nodes(&self, members: &Members) -> Vec<Event> {
        let sources = members.sources();
        let replaced = sources.filter(|source| self.is_replaced(source));
        replaced
            .map(|source| left(&source, LeaveReason::Silent))
            .collect()
    }

    /// Whether it is a node that the only one has taken the place of.
    fn is_replaced(&self, source: &Source) -> bool {
        let only = self.only_node.as_ref();
        source.kind == SourceKind::NODE && only.is_some_and(|only| *only != source.id)
    }
}

fn matches_hello(member: &Member, hello: &Hello) -> bool {
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
