//! The faults: chosen by a seed, each injected, held for a while, and healed.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::time::sleep;

use crate::cluster::{Cluster, Process, Role};
use crate::stack::Stack;
use crate::workload::Record;

/// SplitMix64 (Steele, Lea, Flood 2014).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn in_range(&mut self, from: u64, to: u64) -> u64 {
        from + self.next() % (to - from)
    }

    fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(self.in_range(from, to))
    }

    fn one_of(&mut self, names: &[&'static str]) -> &'static str {
        names[self.in_range(0, names.len() as u64) as usize]
    }
}

/// What happens to one part of the system, and for how long.
#[derive(Clone, Debug)]
pub struct Fault {
    pub kind: Kind,
    /// After the fault before it.
    pub after: Duration,
    pub held: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// SIGKILL, and a new start.
    Kill(&'static str),
    /// SIGSTOP for longer than any session and lease: it wakes up after it was replaced.
    Pause(&'static str),
    /// Stopped and continued again and again.
    Slow(&'static str),
    /// Its clock is off by so many milliseconds, and then right again.
    StepClock(&'static str, i64),
    KillBroker(usize),
    /// The broker that leads the partition of the endpoint that the workload writes to.
    KillLeader,
    PauseBroker(usize),
    KillPostgres,
    PausePostgres,
    /// One process cannot reach the store.
    CutStore(&'static str),
    /// One process cannot reach the bus.
    CutBus(&'static str),
    /// No byte more fits where the store is.
    FullDisk,
    /// No byte more fits where a broker keeps its log.
    FullBrokerDisk(usize),
    /// Old records come again on the topic, out of order; one at least.
    Duplicates(u64),
}

impl Kind {
    /// Without what it strikes.
    pub fn name(&self) -> String {
        let whole = format!("{self:?}");
        whole.split('(').next().unwrap_or_default().to_owned()
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} for {:?}", self.kind, self.held)
    }
}

const BRAINS: [&str; 2] = ["brain-1", "brain-2"];
const PROCESSES: [&str; 6] = ["brain-1", "brain-2", "gate-1", "gate-2", "node-1", "node-2"];
/// What has the store.
const KEEPERS: [&str; 4] = ["brain-1", "brain-2", "node-1", "node-2"];

/// The faults of one round: so many, or fewer if there are not as many things to lay a hand on.
/// `only` names kinds; if it is empty, all are drawn.
pub fn draw(rng: &mut Rng, stack: &Stack, count: usize, only: &str) -> Vec<Fault> {
    const ATTEMPTS: usize = 1_000;
    let mut faults: Vec<Fault> = Vec::new();
    for _ in 0..ATTEMPTS {
        if faults.len() == count {
            break;
        }
        let kind = draw_kind(rng, stack.kafka.count());
        if !only.is_empty() && !only.split(',').any(|name| name == kind.name()) {
            continue;
        }
        if matches!(kind, Kind::FullDisk | Kind::FullBrokerDisk(_)) && !stack.can_be_full() {
            continue;
        }
        // Two hands on one thing would undo each other.
        if faults
            .iter()
            .any(|other| touches(&other.kind) == touches(&kind))
        {
            continue;
        }
        let held = match kind {
            // Past the session of a group (6 s) and any lease (5 s).
            Kind::Pause(_) => rng.millis(7_000, 9_000),
            Kind::PauseBroker(_) | Kind::PausePostgres => rng.millis(1_000, 8_000),
            // Past what a statement of the store may take (10 s).
            Kind::CutStore(_) | Kind::CutBus(_) => rng.millis(1_000, 15_000),
            Kind::FullDisk | Kind::FullBrokerDisk(_) => rng.millis(1_000, 5_000),
            _ => rng.millis(100, 3_000),
        };
        let after = rng.millis(0, 1_500);
        faults.push(Fault { kind, after, held });
    }
    faults
}

fn draw_kind(rng: &mut Rng, brokers: usize) -> Kind {
    match rng.in_range(0, 16) {
        0..=2 => Kind::Kill(rng.one_of(&PROCESSES)),
        3 => Kind::Kill(rng.one_of(&BRAINS)),
        4 => Kind::Pause(rng.one_of(&PROCESSES)),
        5 => Kind::Slow(rng.one_of(&KEEPERS)),
        6 => {
            let far = rng.in_range(1_000, 3_600_000) as i64;
            let offset = if rng.next().is_multiple_of(2) {
                far
            } else {
                -far
            };
            Kind::StepClock(rng.one_of(&PROCESSES), offset)
        }
        7 => Kind::KillBroker(rng.in_range(0, brokers as u64) as usize),
        8 => Kind::KillLeader,
        9 => Kind::PauseBroker(rng.in_range(0, brokers as u64) as usize),
        10 => Kind::KillPostgres,
        11 => Kind::PausePostgres,
        12 => Kind::CutStore(rng.one_of(&KEEPERS)),
        13 => Kind::CutBus(rng.one_of(&PROCESSES)),
        14 if rng.next().is_multiple_of(2) => Kind::FullDisk,
        14 => Kind::FullBrokerDisk(rng.in_range(0, brokers as u64) as usize),
        _ => Kind::Duplicates(rng.next()),
    }
}

/// The part that a fault lays its hand on.
fn touches(kind: &Kind) -> String {
    match kind {
        Kind::Kill(name)
        | Kind::Pause(name)
        | Kind::Slow(name)
        | Kind::StepClock(name, _)
        | Kind::CutStore(name)
        | Kind::CutBus(name) => (*name).to_owned(),
        // One broker at a time: of three, two must agree.
        Kind::KillBroker(_) | Kind::KillLeader | Kind::PauseBroker(_) | Kind::FullBrokerDisk(_) => {
            "kafka".to_owned()
        }
        Kind::KillPostgres | Kind::PausePostgres | Kind::FullDisk => "postgres".to_owned(),
        Kind::Duplicates(_) => "topic".to_owned(),
    }
}

/// Injects the faults of a round, overlapping as drawn. Returns the moment at which the last one was
/// healed: what was killed is started then, and need not be ready.
pub async fn inject(
    faults: &[Fault],
    cluster: &Arc<Cluster>,
    stack: &Arc<Stack>,
    record: &Arc<Mutex<Record>>,
) -> Instant {
    let mut running = Vec::new();
    for fault in faults {
        sleep(fault.after).await;
        println!("  {fault}");
        let (fault, cluster, stack, record) = (
            fault.clone(),
            cluster.clone(),
            stack.clone(),
            record.clone(),
        );
        running.push(tokio::spawn(async move {
            one(&fault, &cluster, &stack, &record).await
        }));
    }
    let mut last = Instant::now();
    for (index, fault) in running.into_iter().enumerate() {
        let healed = fault.await.unwrap();
        last = if index == 0 { healed } else { last.max(healed) };
    }
    last
}

async fn one(fault: &Fault, cluster: &Cluster, stack: &Stack, record: &Mutex<Record>) -> Instant {
    let began = Instant::now();
    let held = fault.held;
    match &fault.kind {
        Kind::Kill(name) => {
            let process = cluster.get(name);
            process.kill();
            sleep(held).await;
            let healed = Instant::now();
            process.launch();
            process.until_ready().await;
            explain(process, began, record);
            return healed;
        }
        Kind::Pause(name) => {
            let process = cluster.get(name);
            process.signal(Signal::STOP);
            sleep(held).await;
            process.signal(Signal::CONT);
            explain(process, began, record);
        }
        Kind::Slow(name) => slow(cluster.get(name), held).await,
        Kind::StepClock(name, offset) => {
            let process = cluster.get(name);
            process.step_clock(*offset);
            sleep(held).await;
            process.step_clock(0);
        }
        Kind::KillBroker(broker) => return stack.with_broker_down(*broker, held).await,
        Kind::KillLeader => {
            let leader = stack.leader_of("notes").await;
            return stack.with_broker_down(leader, held).await;
        }
        Kind::PauseBroker(broker) => {
            stack.kafka.pause(*broker);
            sleep(held).await;
            stack.kafka.resume(*broker);
        }
        Kind::KillPostgres => {
            stack.postgres.kill();
            sleep(held).await;
            return stack.restart_postgres().await;
        }
        Kind::PausePostgres => {
            stack.postgres.pause();
            sleep(held).await;
            stack.postgres.resume();
        }
        Kind::CutStore(name) => {
            let ways = stack.ways_of(name);
            ways.store.cut();
            sleep(held).await;
            ways.store.heal();
        }
        Kind::CutBus(name) => {
            let ways = stack.ways_of(name);
            ways.bus.iter().for_each(|proxy| proxy.cut());
            sleep(held).await;
            ways.bus.iter().for_each(|proxy| proxy.heal());
        }
        Kind::FullDisk => return stack.with_full_disk(held).await,
        Kind::FullBrokerDisk(broker) => {
            return stack.with_full_broker_disk(*broker, held).await;
        }
        Kind::Duplicates(seed) => {
            let again = stack.publish_again(*seed).await;
            println!("  {again} records were published again");
        }
    }
    Instant::now()
}

/// Requests to a gateway that was killed or paused cannot be answered by it.
fn explain(process: &Process, began: Instant, record: &Mutex<Record>) {
    if process.role == Role::Gateway {
        let outage = (process.name, began, Instant::now());
        record.lock().unwrap().outages.push(outage);
    }
}

async fn slow(process: &Process, held: Duration) {
    const PULSE: Duration = Duration::from_millis(100);
    let until = Instant::now() + held;
    while Instant::now() < until {
        process.signal(Signal::STOP);
        sleep(PULSE).await;
        process.signal(Signal::CONT);
        sleep(PULSE / 4).await;
    }
}
