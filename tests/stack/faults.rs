//! The faults: drawn from a seed, injected, held for a while, and healed.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::time::sleep;

use crate::cluster::{Cluster, Process, Role};
use crate::stack::Stack;
use crate::workload::WorkloadRecord;

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

/// A fault in one part of the system.
#[derive(Clone, Debug)]
pub struct Fault {
    pub kind: FaultKind,
    /// Delay after the previous fault.
    pub after: Duration,
    pub duration: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// SIGKILL, then a restart.
    Kill(&'static str),
    /// SIGSTOP for longer than any session or lease: it resumes after it was replaced.
    Pause(&'static str),
    /// SIGSTOP and SIGCONT in quick alternation.
    Slow(&'static str),
    /// The clock is off by this many milliseconds, then correct again.
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
    /// The store's disk is full.
    FullDisk,
    /// A broker's disk is full.
    FullBrokerDisk(usize),
    /// Old records are republished on the topic, out of order; at least one.
    Duplicates(u64),
}

impl FaultKind {
    /// The name, without the target.
    pub fn name(&self) -> String {
        let whole = format!("{self:?}");
        whole.split('(').next().unwrap_or_default().to_owned()
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} for {:?}", self.kind, self.duration)
    }
}

const CONTROL_PLANES: [&str; 2] = ["control-1", "control-2"];
const PROCESSES: [&str; 6] = [
    "control-1",
    "control-2",
    "gate-1",
    "gate-2",
    "node-1",
    "node-2",
];
/// Processes that use the store.
const STORE_CLIENTS: [&str; 4] = ["control-1", "control-2", "node-1", "node-2"];

/// Draws the faults of one round: `count`, or fewer if there are not enough distinct targets. `only`
/// restricts the kinds, unless it is empty.
pub fn draw_faults(rng: &mut Rng, stack: &Stack, count: usize, only: &str) -> Vec<Fault> {
    const ATTEMPTS: usize = 1_000;
    let mut faults: Vec<Fault> = Vec::new();
    for _ in 0..ATTEMPTS {
        if faults.len() == count {
            break;
        }
        let kind = draw_fault_kind(rng, stack.kafka.count());
        if !only.is_empty() && !only.split(',').any(|name| name == kind.name()) {
            continue;
        }
        if matches!(kind, FaultKind::FullDisk | FaultKind::FullBrokerDisk(_))
            && !stack.can_fill_disks()
        {
            continue;
        }
        // Two faults on one target would undo each other.
        if faults
            .iter()
            .any(|other| target_of(&other.kind) == target_of(&kind))
        {
            continue;
        }
        let duration = match kind {
            // Longer than a group session (6 s) and any lease (5 s).
            FaultKind::Pause(_) => rng.millis(7_000, 9_000),
            FaultKind::PauseBroker(_) | FaultKind::PausePostgres => rng.millis(1_000, 8_000),
            // Up to longer than the store's statement timeout (10 s).
            FaultKind::CutStore(_) | FaultKind::CutBus(_) => rng.millis(1_000, 15_000),
            FaultKind::FullDisk | FaultKind::FullBrokerDisk(_) => rng.millis(1_000, 5_000),
            _ => rng.millis(100, 3_000),
        };
        let after = rng.millis(0, 1_500);
        faults.push(Fault {
            kind,
            after,
            duration,
        });
    }
    faults
}

fn draw_fault_kind(rng: &mut Rng, brokers: usize) -> FaultKind {
    match rng.in_range(0, 16) {
        0..=2 => FaultKind::Kill(rng.one_of(&PROCESSES)),
        3 => FaultKind::Kill(rng.one_of(&CONTROL_PLANES)),
        4 => FaultKind::Pause(rng.one_of(&PROCESSES)),
        5 => FaultKind::Slow(rng.one_of(&STORE_CLIENTS)),
        6 => {
            let far = rng.in_range(1_000, 3_600_000) as i64;
            let offset = if rng.next().is_multiple_of(2) {
                far
            } else {
                -far
            };
            FaultKind::StepClock(rng.one_of(&PROCESSES), offset)
        }
        7 => FaultKind::KillBroker(rng.in_range(0, brokers as u64) as usize),
        8 => FaultKind::KillLeader,
        9 => FaultKind::PauseBroker(rng.in_range(0, brokers as u64) as usize),
        10 => FaultKind::KillPostgres,
        11 => FaultKind::PausePostgres,
        12 => FaultKind::CutStore(rng.one_of(&STORE_CLIENTS)),
        13 => FaultKind::CutBus(rng.one_of(&PROCESSES)),
        14 if rng.next().is_multiple_of(2) => FaultKind::FullDisk,
        14 => FaultKind::FullBrokerDisk(rng.in_range(0, brokers as u64) as usize),
        _ => FaultKind::Duplicates(rng.next()),
    }
}

/// The part that a fault affects.
fn target_of(kind: &FaultKind) -> String {
    match kind {
        FaultKind::Kill(name)
        | FaultKind::Pause(name)
        | FaultKind::Slow(name)
        | FaultKind::StepClock(name, _)
        | FaultKind::CutStore(name)
        | FaultKind::CutBus(name) => (*name).to_owned(),
        // One broker at a time: of three, two must agree.
        FaultKind::KillBroker(_)
        | FaultKind::KillLeader
        | FaultKind::PauseBroker(_)
        | FaultKind::FullBrokerDisk(_) => "kafka".to_owned(),
        FaultKind::KillPostgres | FaultKind::PausePostgres | FaultKind::FullDisk => {
            "postgres".to_owned()
        }
        FaultKind::Duplicates(_) => "topic".to_owned(),
    }
}

/// Injects the faults of a round, overlapping as drawn. Returns when the last one was healed: killed
/// processes have been started by then, but need not be ready.
pub async fn inject(
    faults: &[Fault],
    cluster: &Arc<Cluster>,
    stack: &Arc<Stack>,
    record: &Arc<Mutex<WorkloadRecord>>,
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
            inject_one(&fault, &cluster, &stack, &record).await
        }));
    }
    let mut last = Instant::now();
    for (index, fault) in running.into_iter().enumerate() {
        let healed = fault.await.unwrap();
        last = if index == 0 { healed } else { last.max(healed) };
    }
    last
}

async fn inject_one(
    fault: &Fault,
    cluster: &Cluster,
    stack: &Stack,
    record: &Mutex<WorkloadRecord>,
) -> Instant {
    let began = Instant::now();
    let duration = fault.duration;
    match &fault.kind {
        FaultKind::Kill(name) => {
            let process = cluster.get(name);
            process.kill();
            sleep(duration).await;
            let healed = Instant::now();
            process.launch();
            process.until_ready().await;
            record_outage(process, began, record);
            return healed;
        }
        FaultKind::Pause(name) => {
            let process = cluster.get(name);
            process.signal(Signal::STOP);
            sleep(duration).await;
            process.signal(Signal::CONT);
            record_outage(process, began, record);
        }
        FaultKind::Slow(name) => slow(cluster.get(name), duration).await,
        FaultKind::StepClock(name, offset) => {
            let process = cluster.get(name);
            process.step_clock(*offset);
            sleep(duration).await;
            process.step_clock(0);
        }
        FaultKind::KillBroker(broker) => return stack.with_broker_down(*broker, duration).await,
        FaultKind::KillLeader => {
            let leader = stack.leader_of("notes").await;
            return stack.with_broker_down(leader, duration).await;
        }
        FaultKind::PauseBroker(broker) => {
            stack.kafka.pause(*broker);
            sleep(duration).await;
            stack.kafka.resume(*broker);
        }
        FaultKind::KillPostgres => {
            stack.postgres.kill();
            sleep(duration).await;
            return stack.restart_postgres().await;
        }
        FaultKind::PausePostgres => {
            stack.postgres.pause();
            sleep(duration).await;
            stack.postgres.resume();
        }
        FaultKind::CutStore(name) => {
            let proxies = stack.proxies_of(name);
            proxies.store.cut();
            sleep(duration).await;
            proxies.store.heal();
        }
        FaultKind::CutBus(name) => {
            let proxies = stack.proxies_of(name);
            proxies.bus.iter().for_each(|proxy| proxy.cut());
            sleep(duration).await;
            proxies.bus.iter().for_each(|proxy| proxy.heal());
        }
        FaultKind::FullDisk => return stack.with_full_disk(duration).await,
        FaultKind::FullBrokerDisk(broker) => {
            return stack.with_full_broker_disk(*broker, duration).await;
        }
        FaultKind::Duplicates(seed) => {
            let again = stack.republish_old_records(*seed).await;
            println!("  {again} records were published again");
        }
    }
    Instant::now()
}

/// Records the outage of a gateway that was killed or paused, which explains failed requests to it.
fn record_outage(process: &Process, began: Instant, record: &Mutex<WorkloadRecord>) {
    if process.role == Role::Gateway {
        let outage = (process.name, began, Instant::now());
        record.lock().unwrap().outages.push(outage);
    }
}

async fn slow(process: &Process, duration: Duration) {
    const PAUSE: Duration = Duration::from_millis(100);
    let until = Instant::now() + duration;
    while Instant::now() < until {
        process.signal(Signal::STOP);
        sleep(PAUSE).await;
        process.signal(Signal::CONT);
        sleep(PAUSE / 4).await;
    }
}
