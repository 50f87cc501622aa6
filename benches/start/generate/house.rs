//! The installation: its endpoints, its gateway and its node, its tokens; and time, which goes from one
//! thing that is due to the next.

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
pub const BEGINNING: Timestamp = Timestamp::from_secs(1_756_684_800);

/// As `penstock serve` calls its only gateway.
const GATEWAY: &str = "gateway";
const DAY: Span = Span::from_secs(24 * 3600);
/// Everything is restarted once a week, for a new release, and is back before anybody misses it.
const RESTART_EVERY: Span = Span::from_secs(7 * 24 * 3600);
const AWAY: Span = Span::from_secs(4);
const TOKENS: [&str; 6] = ["ci", "alice", "bob", "dashboard", "nightly", "oncall"];

/// What is due, and for whom.
#[derive(Debug)]
enum Due {
    Endpoint(usize, Task),
    Restart,
    Token(usize),
}

/// Things that are due; those of one moment come in the order in which they were added.
#[derive(Default)]
struct Agenda {
    order: BinaryHeap<Reverse<(Timestamp, u64)>>,
    due: BTreeMap<u64, Due>,
    added: u64,
}

impl Agenda {
    fn add(&mut self, at: Timestamp, due: Due) {
        self.added += 1;
        self.order.push(Reverse((at, self.added)));
        self.due.insert(self.added, due);
    }

    fn next(&mut self) -> Option<(Timestamp, Due)> {
        let Reverse((at, number)) = self.order.pop()?;
        Some((at, self.due.remove(&number)?))
    }
}

/// What endpoints share.
pub struct Ground {
    pub log: Log,
    pub members: Members,
    pub zones: ZoneData,
    pub node: String,
    sources: [(Source, Uuid); 2],
    booted: Timestamp,
}

impl Ground {
    /// The frames that gateway and node sent of the minute that begins here.
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

    fn boot(&mut self, now: Timestamp) -> anyhow::Result<()> {
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
            self.tell_members(now, Event::MemberJoined(joined))?;
        }
        Ok(())
    }

    fn tell_members(&mut self, now: Timestamp, event: Event) -> anyhow::Result<()> {
        let (stream, actor) = (StreamName::members(), Actor::service("control"));
        let record = self.log.append(&stream, now, &actor, event)?;
        self.members.apply(&record);
        Ok(())
    }
}

pub struct House {
    ground: Ground,
    endpoints: Vec<Endpoint>,
    agenda: Agenda,
    now: Timestamp,
}

impl House {
    pub fn new(endpoints: usize, seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let log = Log::new(seed);
        let node = format!("node-{}", &log.ids.uid().simple().to_string()[..12]);
        let source = |kind, id: &str| {
            let id = id.to_owned();
            (Source { kind, id }, Uuid::nil())
        };
        let mut agenda = Agenda::default();
        agenda.add(BEGINNING, Due::Restart);
        for token in 0..TOKENS.len() {
            agenda.add(BEGINNING + Span::from_secs(60), Due::Token(token));
        }
        for index in 0..endpoints {
            let at = 120 + rng.u64(0..DAY.secs());
            let at = BEGINNING + Span::from_secs(at);
            agenda.add(at, Due::Endpoint(index, Task::Create));
        }
        let ground = Ground {
            log,
            members: Members::default(),
            zones: ZoneData::default(),
            sources: [
                source(SourceKind::GATEWAY, GATEWAY),
                source(SourceKind::NODE, &node),
            ],
            node,
            booted: BEGINNING,
        };
        let endpoints = 0..endpoints;
        let endpoints = endpoints.map(|index| Endpoint::new(index, rng.u64(..)));
        Self {
            ground,
            endpoints: endpoints.collect(),
            agenda,
            now: BEGINNING,
        }
    }

    /// Lets the next thing happen.
    pub fn go_on(&mut self) -> anyhow::Result<bool> {
        self.step(|_| true)
    }

    /// The same, of what has begun already; false when all of it is over.
    pub fn come_to_rest(&mut self) -> anyhow::Result<bool> {
        self.step(Task::is_under_way)
    }

    fn step(&mut self, wanted: impl Fn(&Task) -> bool) -> anyhow::Result<bool> {
        let Some((at, due)) = self.agenda.next() else {
            return Ok(false);
        };
        // Some things follow at once from what has just been written.
        let now = self.now.max(at);
        match due {
            Due::Endpoint(index, task) if wanted(&task) => {
                self.now = now;
                let followed = self.endpoints[index].perform(task, now, &mut self.ground)?;
                for (at, task) in followed {
                    self.agenda.add(at, Due::Endpoint(index, task));
                }
            }
            Due::Restart if wanted(&Task::Begin) => {
                self.now = now;
                self.restart()?;
            }
            Due::Token(token) if wanted(&Task::Begin) => {
                self.now = now;
                self.renew(token)?;
            }
            _ => {}
        }
        Ok(true)
    }

    fn restart(&mut self) -> anyhow::Result<()> {
        let now = self.now;
        let ground = &mut self.ground;
        for (source, _) in ground.sources.clone() {
            if ground.members.get(&source).is_some() {
                let reason = LeaveReason::Goodbye;
                let left = MemberLeft { source, reason };
                ground.tell_members(now, Event::MemberLeft(left))?;
            }
        }
        ground.boot(now + AWAY)?;
        self.agenda.add(now + RESTART_EVERY, Due::Restart);
        Ok(())
    }

    /// Tokens are replaced before they expire.
    fn renew(&mut self, token: usize) -> anyhow::Result<()> {
        let (now, log) = (self.now, &mut self.ground.log);
        let (stream, actor) = (StreamName::access(), Actor::token("admin"));
        let name = TOKENS[token].to_owned();
        if now.since(BEGINNING) > DAY {
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
        self.agenda.add(again, Due::Token(token));
        Ok(())
    }

    /// Positions given out so far.
    pub fn written(&self) -> u64 {
        self.ground.log.written()
    }

    /// Events that have not been taken yet.
    pub fn waiting(&self) -> usize {
        self.ground.log.waiting.len()
    }

    pub fn take(&mut self) -> Vec<RawRecord> {
        std::mem::take(&mut self.ground.log.waiting)
    }

    /// The first endpoint that has not come to rest.
    pub fn restless(&self) -> Option<&Endpoint> {
        let mut endpoints = self.endpoints.iter();
        endpoints.find(|endpoint| !endpoint.is_at_rest(self.now, &self.ground))
    }

    pub fn now(&self) -> Timestamp {
        self.now
    }

    pub fn node(&self) -> &str {
        &self.ground.node
    }

    pub fn counts(&self) -> &BTreeMap<&'static str, u64> {
        &self.ground.log.counts
    }

    pub fn bytes(&self) -> u64 {
        self.ground.log.bytes
    }

    /// Instances that are there.
    pub fn instances(&self) -> usize {
        self.endpoints.iter().map(Endpoint::instances).sum()
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
