//! The simulated installation: endpoints, a gateway, a node and tokens; time advances from one scheduled
//! event to the next.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use contract::events::{
    AccessGranted, AccessRevoked, AccessRole, Event, LeaveReason, MemberJoined, MemberLeft,
};
use contract::frame::{Source, SourceKind};
use contract::log::{Actor, RawRecord, StreamName};
use contract::resources::BackendKind;
use contract::time::{Span, Timestamp};
use domain::members::Members;
use domain::zones::ZoneData;
use runtime::ids::Ids;
use uuid::Uuid;

use crate::endpoint::{Endpoint, Task};
use crate::log::Log;
use crate::usage::Range;

/// When the first endpoint is created: 1 September 2025.
pub const START: Timestamp = Timestamp::from_secs(1_756_684_800);

/// The id of the only gateway, as in `penstock serve`.
const GATEWAY: &str = "gateway";
const DAY: Span = Span::from_secs(24 * 3600);
/// Everything restarts once a week, quickly enough not to be missed.
const RESTART_INTERVAL: Span = Span::from_secs(7 * 24 * 3600);
const DOWNTIME: Span = Span::from_secs(4);
const TOKENS: [&str; 6] = ["ci", "alice", "bob", "dashboard", "nightly", "oncall"];

/// An event, and its subject.
#[derive(Debug)]
enum ScheduledEvent {
    Endpoint(usize, Task),
    Restart,
    Token(usize),
}

/// Scheduled events in order of time; simultaneous ones in insertion order.
#[derive(Default)]
struct Schedule {
    order: BinaryHeap<Reverse<(Timestamp, u64)>>,
    events: BTreeMap<u64, ScheduledEvent>,
    added: u64,
}

impl Schedule {
    fn add(&mut self, at: Timestamp, event: ScheduledEvent) {
        self.added += 1;
        self.order.push(Reverse((at, self.added)));
        self.events.insert(self.added, event);
    }

    fn next(&mut self) -> Option<(Timestamp, ScheduledEvent)> {
        let Reverse((at, number)) = self.order.pop()?;
        Some((at, self.events.remove(&number)?))
    }
}

/// State shared by all endpoints.
pub struct SharedState {
    pub log: Log,
    pub members: Members,
    pub zones: ZoneData,
    pub node: String,
    sources: [(Source, Uuid); 2],
    booted: Timestamp,
}

impl SharedState {
    /// The frames that the gateway and the node sent in a minute.
    pub fn frames(&self, minute: Timestamp) -> Vec<Range> {
        let second = |at: Timestamp| at.since(self.booted).secs();
        let end = minute + Span::from_secs(60);
        let of = |(source, boot): &(Source, Uuid)| Range {
            source: source.clone(),
            boot: *boot,
            first: second(minute),
            last: second(end).saturating_sub(1),
        };
        self.sources.iter().map(of).collect()
    }

    fn restart_members(&mut self, now: Timestamp) -> anyhow::Result<()> {
        self.booted = now;
        for (_, boot) in &mut self.sources {
            *boot = self.log.ids.uid();
        }
        for (source, _) in self.sources.clone() {
            let backends = match source.kind == SourceKind::NODE {
                true => vec![BackendKind::PROCESS, BackendKind::SIMULATED],
                false => Vec::new(),
            };
            let joined = MemberJoined {
                source,
                address: None,
                backends,
            };
            self.append_member_event(now, Event::MemberJoined(joined))?;
        }
        Ok(())
    }

    fn append_member_event(&mut self, now: Timestamp, event: Event) -> anyhow::Result<()> {
        let (stream, actor) = (StreamName::members(), Actor::service("control"));
        let record = self.log.append(&stream, now, &actor, event)?;
        self.members.apply(&record);
        Ok(())
    }
}

pub struct Installation {
    shared: SharedState,
    endpoints: Vec<Endpoint>,
    schedule: Schedule,
    now: Timestamp,
}

impl Installation {
    pub fn new(endpoints: usize, seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let log = Log::new(seed);
        let node = format!("node-{}", &log.ids.uid().simple().to_string()[..12]);
        let source = |kind, id: &str| {
            let id = id.to_owned();
            (Source { kind, id }, Uuid::nil())
        };
        let mut schedule = Schedule::default();
        schedule.add(START, ScheduledEvent::Restart);
        for token in 0..TOKENS.len() {
            schedule.add(START + Span::from_secs(60), ScheduledEvent::Token(token));
        }
        for index in 0..endpoints {
            let at = 120 + rng.u64(0..DAY.secs());
            let at = START + Span::from_secs(at);
            schedule.add(at, ScheduledEvent::Endpoint(index, Task::Create));
        }
        let shared = SharedState {
            log,
            members: Members::default(),
            zones: ZoneData::default(),
            sources: [
                source(SourceKind::GATEWAY, GATEWAY),
                source(SourceKind::NODE, &node),
            ],
            node,
            booted: START,
        };
        let endpoints = 0..endpoints;
        let endpoints = endpoints.map(|index| Endpoint::new(index, rng.u64(..)));
        Self {
            shared,
            endpoints: endpoints.collect(),
            schedule,
            now: START,
        }
    }

    /// Processes the next event.
    pub fn advance(&mut self) -> anyhow::Result<bool> {
        self.step(|_| true)
    }

    /// As [`advance`](Self::advance), but only completes what has begun; returns false when all is done.
    pub fn drain(&mut self) -> anyhow::Result<bool> {
        self.step(Task::is_completion)
    }

    fn step(&mut self, wanted: impl Fn(&Task) -> bool) -> anyhow::Result<bool> {
        let Some((at, event)) = self.schedule.next() else {
            return Ok(false);
        };
        // Follow-ups may be scheduled for the current time.
        let now = self.now.max(at);
        match event {
            ScheduledEvent::Endpoint(index, task) if wanted(&task) => {
                self.now = now;
                let follow_ups = self.endpoints[index].perform(task, now, &mut self.shared)?;
                for (at, task) in follow_ups {
                    self.schedule.add(at, ScheduledEvent::Endpoint(index, task));
                }
            }
            ScheduledEvent::Restart if wanted(&Task::BeginLoad) => {
                self.now = now;
                self.restart()?;
            }
            ScheduledEvent::Token(token) if wanted(&Task::BeginLoad) => {
                self.now = now;
                self.renew(token)?;
            }
            _ => {}
        }
        Ok(true)
    }

    fn restart(&mut self) -> anyhow::Result<()> {
        let now = self.now;
        let shared = &mut self.shared;
        for (source, _) in shared.sources.clone() {
            if shared.members.get(&source).is_some() {
                let reason = LeaveReason::Goodbye;
                let left = MemberLeft { source, reason };
                shared.append_member_event(now, Event::MemberLeft(left))?;
            }
        }
        shared.restart_members(now + DOWNTIME)?;
        self.schedule
            .add(now + RESTART_INTERVAL, ScheduledEvent::Restart);
        Ok(())
    }

    /// Replaces a token before it expires.
    fn renew(&mut self, token: usize) -> anyhow::Result<()> {
        let (now, log) = (self.now, &mut self.shared.log);
        let (stream, actor) = (StreamName::access(), Actor::token("admin"));
        let name = TOKENS[token].to_owned();
        if now.since(START) > DAY {
            let revoked = AccessRevoked { name: name.clone() };
            log.append(&stream, now, &actor, Event::AccessRevoked(revoked))?;
        }
        let role = match token % 3 {
            0 => AccessRole::Operator,
            1 => AccessRole::Admin,
            _ => AccessRole::Viewer,
        };
        let granted = AccessGranted {
            name,
            role,
            hash: hex(&log.ids.secret()),
            expires: Some(now + Span::from_secs(30 * DAY.secs())),
        };
        log.append(&stream, now, &actor, Event::AccessGranted(granted))?;
        let again = now + Span::from_secs((9 + 3 * token as u64) * DAY.secs());
        self.schedule.add(again, ScheduledEvent::Token(token));
        Ok(())
    }

    /// Number of positions assigned.
    pub fn written(&self) -> u64 {
        self.shared.log.written()
    }

    /// Number of events that have not been taken yet.
    pub fn unwritten(&self) -> usize {
        self.shared.log.unwritten.len()
    }

    pub fn take(&mut self) -> Vec<RawRecord> {
        std::mem::take(&mut self.shared.log.unwritten)
    }

    /// The first endpoint that has not settled.
    pub fn unsettled_endpoint(&self) -> Option<&Endpoint> {
        let mut endpoints = self.endpoints.iter();
        endpoints.find(|endpoint| !endpoint.is_settled(self.now, &self.shared))
    }

    pub fn now(&self) -> Timestamp {
        self.now
    }

    pub fn node(&self) -> &str {
        &self.shared.node
    }

    pub fn counts(&self) -> &BTreeMap<&'static str, u64> {
        &self.shared.log.counts
    }

    pub fn bytes(&self) -> u64 {
        self.shared.log.bytes
    }

    /// Number of existing instances.
    pub fn instances(&self) -> usize {
        self.endpoints.iter().map(Endpoint::instances).sum()
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
