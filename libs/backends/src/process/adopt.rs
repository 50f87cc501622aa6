//! What is found at the start: the records of the last Penstock, and what of it still runs.
//!
//! A process is adopted if it is the very one that its record names and nothing speaks against it.
//! Everything else of this installation is ended.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use contract::ids::InstanceId;
use rustix::process::Signal;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::os::{self, CpuMeter, Found, Leader};
use super::record::{Record, RecordPhase};
use super::{Entry, REMOVALS_MAX, Shared, launch, released, supervise};
use crate::logs::output_path;
use crate::{BackendError, ObservedPhase};

/// A child that was between fork and exec when Penstock was killed is marked within this time.
const HALF_STARTED_MAX: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(20);

const GONE: &str = "was gone when Penstock came back";

pub(super) async fn adopt(shared: &Arc<Shared>) -> Result<(), BackendError> {
    let worker = shared.clone();
    let records = tokio::task::spawn_blocking(move || load(&worker))
        .await
        .map_err(BackendError::Crashed)??;
    let found = find(shared, &records).await?;
    let mut leaders = BTreeMap::new();
    for (id, record) in &records {
        if let Some(adopted) = leader_of(shared, record, &found).await? {
            leaders.insert(id.clone(), adopted);
        }
    }
    end_strays(shared, &records, &leaders).await?;
    for (id, record) in records {
        match leaders.remove(&id) {
            Some((leader, record)) => take_over(shared, leader, record),
            None => settle(shared, record),
        }
    }
    Ok(())
}

fn load(shared: &Shared) -> Result<BTreeMap<InstanceId, Record>, BackendError> {
    let disk = shared.disk();
    let folder = disk.as_ref().ok_or_else(released)?;
    let (mut records, unreadable) = folder.load().map_err(|source| {
        let what = "the records of instances cannot be read".to_owned();
        BackendError::Unusable { what, source }
    })?;
    if let Some(path) = unreadable.first() {
        // To go on would end a healthy instance, or start one that was removed.
        return Err(BackendError::Unavailable(format!(
            "{}/record.json cannot be understood ({} such records); restore it, or remove its folder to have the instance ended",
            path.display(),
            unreadable.len()
        )));
    }
    for id in folder.prune(&records) {
        records.remove(&id);
    }
    Ok(records)
}

/// All our processes. Waits for those that are just becoming ours.
async fn find(
    shared: &Arc<Shared>,
    records: &BTreeMap<InstanceId, Record>,
) -> Result<Vec<Found>, BackendError> {
    let deadline = Instant::now() + HALF_STARTED_MAX;
    loop {
        let found = scan(shared).await?;
        let mut half_started = false;
        for record in records.values() {
            half_started |= record.phase == RecordPhase::Starting
                && !found.iter().any(|f| f.marks.instance == record.id.as_str())
                && is_output_held(shared, record).await?;
        }
        if !half_started || Instant::now() > deadline {
            return Ok(found);
        }
        sleep(LOOK_EVERY).await;
    }
}

async fn is_output_held(shared: &Arc<Shared>, record: &Record) -> Result<bool, BackendError> {
    let Some(order) = &record.order else {
        return Ok(false);
    };
    let data = &shared.config.data_dir;
    let output = output_path(data, &order.deployment, &order.id);
    look(shared, move |_| launch::is_output_held(&output)).await
}

async fn scan(shared: &Arc<Shared>) -> Result<Vec<Found>, BackendError> {
    look(shared, |shared| {
        os::scan(&shared.surroundings.installation, &shared.boot_id)
    })
    .await
}

/// What cannot be seen for a lack of ours is looked at again: a healthy instance would be taken for
/// gone.
async fn look<T: Send + 'static>(
    shared: &Arc<Shared>,
    look: impl Fn(&Arc<Shared>) -> io::Result<T> + Clone + Send + 'static,
) -> Result<T, BackendError> {
    let seen = shared.until_done("a look at what runs", look).await;
    seen.ok_or_else(released)
}

/// The process to adopt, and the record completed with what it tells.
async fn leader_of(
    shared: &Arc<Shared>,
    record: &Record,
    found: &[Found],
) -> Result<Option<(Leader, Record)>, BackendError> {
    let Some(record) = complete(record, found) else {
        return Ok(None);
    };
    let leader = {
        let record = record.clone();
        look(shared, move |shared| adoptable(shared, &record)).await?
    };
    Ok(leader.map(|leader| (leader, record)))
}

/// The record of an instance that may run, with what its process tells of itself.
fn complete(record: &Record, found: &[Found]) -> Option<Record> {
    let mut record = record.clone();
    match record.phase {
        RecordPhase::Running => {}
        // Killed between start and record: the process itself says what it is.
        RecordPhase::Starting => {
            let started = found.iter().find(|f| {
                f.leads_its_group
                    && f.marks.instance == record.id.as_str()
                    && f.marks.generation == Some(record.started_generation())
            })?;
            record.process = Some(started.identity.clone());
            record.port = started.marks.port;
            record.phase = RecordPhase::Running;
        }
        _ => return None,
    }
    Some(record)
}

fn adoptable(shared: &Shared, record: &Record) -> io::Result<Option<Leader>> {
    let Some(identity) = &record.process else {
        return Ok(None);
    };
    let means = &shared.config.means;
    let Some(leader) = Leader::adopt(identity, &shared.boot_id, means)? else {
        return Ok(None);
    };
    // Some programs overwrite their environment; what still can be read must not contradict.
    let contradicts = os::marks(identity.pid)?.is_some_and(|marks| {
        marks.installation != shared.surroundings.installation
            || marks.instance != record.id.as_str()
            || marks.generation != Some(record.started_generation())
    });
    Ok((!contradicts).then_some(leader))
}

/// Ends what runs in our name and was not adopted.
async fn end_strays(
    shared: &Arc<Shared>,
    records: &BTreeMap<InstanceId, Record>,
    adopted: &BTreeMap<InstanceId, (Leader, Record)>,
) -> Result<(), BackendError> {
    let mut hard_from = None;
    loop {
        let strays: BTreeMap<InstanceId, Option<i32>> = strays(shared, records)
            .await?
            .into_iter()
            .filter(|(id, _)| !adopted.contains_key(id))
            .collect();
        if strays.is_empty() {
            return Ok(());
        }
        let politely = hard_from.is_none();
        let deadline =
            *hard_from.get_or_insert_with(|| Instant::now() + shared.config.grace.to_std());
        let signal = if politely {
            tracing::info!(
                instances = strays.len(),
                "ending what no record vouches for"
            );
            Some(Signal::TERM)
        } else {
            (Instant::now() >= deadline).then_some(Signal::KILL)
        };
        if let Some(signal) = signal {
            for (id, group) in strays {
                let membership = shared.membership(&id, group);
                look(shared, move |_| membership.signal(signal)).await?;
            }
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Whose processes run: known by their marks, or, where a program has overwritten its environment,
/// by the record that names it. With the group, where its leader is proven to live.
async fn strays(
    shared: &Arc<Shared>,
    records: &BTreeMap<InstanceId, Record>,
) -> Result<BTreeMap<InstanceId, Option<i32>>, BackendError> {
    let marked = scan(shared).await?.into_iter();
    let mut strays: BTreeMap<_, _> = marked
        .map(|found| (InstanceId::from(found.marks.instance), None))
        .collect();
    let recorded: Vec<_> = records
        .iter()
        .filter_map(|(id, record)| Some((id.clone(), record.process.clone()?)))
        .collect();
    let running = look(shared, move |shared| {
        let mut running = Vec::new();
        for (id, leader) in &recorded {
            if os::is_running(leader, &shared.boot_id)? {
                running.push((id.clone(), Some(leader.pid)));
            }
        }
        Ok(running)
    });
    strays.extend(running.await?);
    Ok(strays)
}

fn take_over(shared: &Arc<Shared>, leader: Leader, record: Record) {
    let id = record.id.clone();
    let (sender, receiver) = mpsc::channel(REMOVALS_MAX);
    tracing::info!(instance = %id, pid = leader.pid, "adopted");
    let entry = Entry {
        record,
        phase: ObservedPhase::Starting,
        adopted: true,
        orders: Some(sender),
        cpu: CpuMeter::default(),
    };
    shared.state().entries.insert(id.clone(), entry);
    persist(shared, &id);
    supervise::spawn(shared, id, leader, receiver);
}

/// Nothing of the instance runs: brings its record to the end that this means.
fn settle(shared: &Shared, mut record: Record) {
    let (phase, observed) = match record.phase {
        // The order was about to be carried out, and was not: as if it had never come.
        RecordPhase::Starting => {
            if let Some(folder) = shared.disk().as_ref()
                && let Err(error) = folder.forget(&record.id)
            {
                tracing::warn!(instance = %record.id, %error, "a record cannot be removed");
            }
            return;
        }
        RecordPhase::Running => (
            RecordPhase::Exited {
                code: None,
                reason: GONE.into(),
            },
            ObservedPhase::Exited {
                code: None,
                reason: GONE.into(),
            },
        ),
        RecordPhase::Exited { code, ref reason } => (
            record.phase.clone(),
            ObservedPhase::Exited {
                code,
                reason: reason.clone(),
            },
        ),
        RecordPhase::Removing => (
            RecordPhase::Removed { code: None },
            ObservedPhase::Removed { code: None },
        ),
        RecordPhase::Removed { code } => (record.phase.clone(), ObservedPhase::Removed { code }),
    };
    let changed = record.phase != phase;
    record.phase = phase;
    let id = record.id.clone();
    let entry = Entry {
        record,
        phase: observed,
        adopted: false,
        orders: None,
        cpu: CpuMeter::default(),
    };
    shared.state().entries.insert(id.clone(), entry);
    if changed {
        persist(shared, &id);
    }
}

fn persist(shared: &Shared, id: &InstanceId) {
    if let Err(error) = shared.persist(id) {
        tracing::warn!(instance = %id, %error, "what was found is not recorded");
    }
}
