//! Startup: loads the records of the previous Penstock and adopts what still runs.
//!
//! A process is adopted if it is exactly the one named by its record and nothing contradicts that.
//! All other processes of this installation are ended.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use contract::ids::InstanceId;
use rustix::process::Signal;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::family::Family;
use super::os::{self, CpuMeter, Leader, TaggedProcess};
use super::record::{InstanceRecord, ProcessIdentity, RecordPhase};
use super::{Entry, REMOVALS_MAX, Shared, folder, launch, released, sockets, supervise};
use crate::logs::output_path;
use crate::{BackendError, ObservedPhase};

/// A child that was between fork and exec when Penstock was killed gets its tags within this time.
const HALF_STARTED_TIMEOUT: Duration = Duration::from_secs(2);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

const GONE: &str = "was gone when Penstock came back";

pub(super) async fn adopt(shared: &Arc<Shared>) -> Result<(), BackendError> {
    let worker = shared.clone();
    let records = tokio::task::spawn_blocking(move || load(&worker))
        .await
        .map_err(BackendError::Crashed)??;
    let found = find_processes(shared, &records).await?;
    let mut leaders = BTreeMap::new();
    for (id, record) in &records {
        if let Some(adopted) = leader_of(shared, record, &found).await? {
            leaders.insert(id.clone(), adopted);
        }
    }
    end_strays(shared, &records, &leaders).await?;
    let adopted = leaders.keys().cloned().collect();
    shared
        .run_blocking(move |shared| folder::remove_others(&shared.config.data_dir, &adopted))
        .await;
    for (id, record) in records {
        match leaders.remove(&id) {
            Some((leader, record)) => supervise_adopted(shared, leader, record),
            None => settle(shared, record),
        }
    }
    Ok(())
}

fn load(shared: &Shared) -> Result<BTreeMap<InstanceId, InstanceRecord>, BackendError> {
    let disk = shared.disk();
    let folder = disk.as_ref().ok_or_else(released)?;
    let (mut records, unreadable) = folder.load().map_err(|source| {
        let what = "the records of instances cannot be read".to_owned();
        BackendError::Unusable { what, source }
    })?;
    if let Some(path) = unreadable.first() {
        // Ignoring it could end a healthy instance, or start a removed one.
        return Err(BackendError::Unavailable(format!(
            "{}/record.json cannot be parsed ({} such records); restore it, or remove its folder to have the instance ended",
            path.display(),
            unreadable.len()
        )));
    }
    for id in folder.prune(&records) {
        records.remove(&id);
    }
    Ok(records)
}

/// Returns all processes of this installation. Waits for those still between fork and exec.
async fn find_processes(
    shared: &Arc<Shared>,
    records: &BTreeMap<InstanceId, InstanceRecord>,
) -> Result<Vec<TaggedProcess>, BackendError> {
    let deadline = Instant::now() + HALF_STARTED_TIMEOUT;
    loop {
        let found = scan(shared).await?;
        let mut half_started = false;
        for record in records.values() {
            half_started |= record.phase == RecordPhase::Starting
                && !found.iter().any(|f| f.tags.instance == record.id.as_str())
                && is_output_locked(shared, record).await?;
        }
        if !half_started || Instant::now() > deadline {
            return Ok(found);
        }
        sleep(POLL_INTERVAL).await;
    }
}

async fn is_output_locked(
    shared: &Arc<Shared>,
    record: &InstanceRecord,
) -> Result<bool, BackendError> {
    let Some(start) = &record.start else {
        return Ok(false);
    };
    let data = &shared.config.data_dir;
    let output = output_path(data, &start.deployment, &start.id);
    inspect(shared, move |_| launch::is_output_locked(&output)).await
}

async fn scan(shared: &Arc<Shared>) -> Result<Vec<TaggedProcess>, BackendError> {
    inspect(shared, |shared| {
        os::scan(&shared.launch_context.installation, &shared.boot_id)
    })
    .await
}

/// Retries an inspection during a resource shortage: otherwise a healthy instance would be taken for
/// gone.
async fn inspect<T: Send + 'static>(
    shared: &Arc<Shared>,
    inspect: impl Fn(&Arc<Shared>) -> io::Result<T> + Clone + Send + 'static,
) -> Result<T, BackendError> {
    let inspected = shared
        .retry_on_shortage("the scan of processes", inspect)
        .await;
    inspected.ok_or_else(released)
}

/// Returns the process to adopt, and its record completed from the process's tags.
async fn leader_of(
    shared: &Arc<Shared>,
    record: &InstanceRecord,
    found: &[TaggedProcess],
) -> Result<Option<(Leader, InstanceRecord)>, BackendError> {
    let Some(mut record) = complete(record, found) else {
        return Ok(None);
    };
    let candidates = [record.process.clone()].into_iter().flatten();
    for process in candidates.chain(successors(shared, &record, found).await?) {
        record.process = Some(process);
        let checked = record.clone();
        let leader = inspect(shared, move |shared| adoptable(shared, &checked)).await?;
        if let Some(leader) = leader {
            return Ok(Some((leader, record)));
        }
    }
    Ok(None)
}

/// The processes of the group that listen on the instance's port: they serve on after the recorded one.
async fn successors(
    shared: &Arc<Shared>,
    record: &InstanceRecord,
    found: &[TaggedProcess],
) -> Result<Vec<ProcessIdentity>, BackendError> {
    let (Some(process), Some(port)) = (&record.process, record.port) else {
        return Ok(Vec::new());
    };
    let own = found
        .iter()
        .filter(|found| found.tags.instance == record.id.as_str());
    let of_group = own.map(|found| &found.identity).filter(|other| {
        other.boot_id == process.boot_id
            && other.group_id() == process.group_id()
            && other.pid != process.pid
    });
    let mut of_group: Vec<_> = of_group.cloned().collect();
    let pids: Vec<i32> = of_group.iter().map(|other| other.pid).collect();
    let listening = inspect(shared, move |_| sockets::listening(&pids)).await?;
    of_group.retain(|other| listening.on(port).any(|pid| pid == other.pid));
    Ok(of_group)
}

/// Completes the record of an instance that may be running from the tags of its process.
fn complete(record: &InstanceRecord, found: &[TaggedProcess]) -> Option<InstanceRecord> {
    let mut record = record.clone();
    match record.phase {
        RecordPhase::Running => {}
        // Penstock was killed between start and record: the tags identify the process.
        RecordPhase::Starting => {
            let started = found.iter().find(|f| {
                f.identity.group.is_none()
                    && f.tags.instance == record.id.as_str()
                    && f.tags.generation == Some(record.started_generation())
            })?;
            record.process = Some(started.identity.clone());
            if let Some(ports) = started.tags.ports.clone() {
                record.port = Some(ports.main);
                record.ports = ports.named;
            }
            record.phase = RecordPhase::Running;
        }
        _ => return None,
    }
    Some(record)
}

fn adoptable(shared: &Shared, record: &InstanceRecord) -> io::Result<Option<Leader>> {
    let Some(identity) = &record.process else {
        return Ok(None);
    };
    let resource_limits = &shared.config.resource_limits;
    let Some(leader) = Leader::adopt(identity, &shared.boot_id, resource_limits)? else {
        return Ok(None);
    };
    // Some programs overwrite their environment; what is still readable must not contradict the record.
    let contradicts = os::process_tags(identity.pid)?.is_some_and(|tags| {
        tags.installation != shared.launch_context.installation
            || tags.instance != record.id.as_str()
            || tags.generation != Some(record.started_generation())
    });
    Ok((!contradicts).then_some(leader))
}

/// Ends processes of this installation that were not adopted.
async fn end_strays(
    shared: &Arc<Shared>,
    records: &BTreeMap<InstanceId, InstanceRecord>,
    adopted: &BTreeMap<InstanceId, (Leader, InstanceRecord)>,
) -> Result<(), BackendError> {
    let mut begun = None;
    loop {
        let strays: BTreeMap<InstanceId, Option<i32>> = strays(shared, records, adopted)
            .await?
            .into_iter()
            .filter(|(id, _)| !adopted.contains_key(id))
            .collect();
        if strays.is_empty() {
            return Ok(());
        }
        let is_first_pass = begun.is_none();
        let begun = *begun.get_or_insert_with(Instant::now);
        if is_first_pass {
            tracing::info!(
                instances = strays.len(),
                "ending processes that no record covers"
            );
        }
        for (id, group) in strays {
            let record = records.get(&id);
            let grace = record.and_then(InstanceRecord::grace);
            let grace = grace.unwrap_or(shared.config.grace).to_std();
            let signal = match begun.elapsed() < grace {
                true if is_first_pass => Signal::TERM,
                true => continue,
                false => Signal::KILL,
            };
            let mut matcher = shared.matcher(&id, group);
            let start = record.and_then(|record| record.start.as_ref());
            matcher.output = start.and_then(|start| shared.output_of(start));
            inspect(shared, move |_| matcher.signal(signal)).await?;
        }
        sleep(POLL_INTERVAL).await;
    }
}

/// Returns the instances that have running processes: found by tags or control group or, if a program has
/// overwritten its environment, by its record or its output. With the process group where its leader is
/// known to be alive.
async fn strays(
    shared: &Arc<Shared>,
    records: &BTreeMap<InstanceId, InstanceRecord>,
    adopted: &BTreeMap<InstanceId, (Leader, InstanceRecord)>,
) -> Result<BTreeMap<InstanceId, Option<i32>>, BackendError> {
    let tagged = scan(shared).await?.into_iter();
    let mut strays: BTreeMap<_, _> = tagged
        .map(|found| (InstanceId::from(found.tags.instance), None))
        .collect();
    let leaders: Vec<_> = records
        .iter()
        .filter_map(|(id, record)| Some((id.clone(), record.process.clone()?)))
        .collect();
    let running = inspect(shared, move |shared| {
        let mut running = Vec::new();
        for (id, leader) in &leaders {
            if os::is_running(leader, &shared.boot_id)? {
                running.push((id.clone(), Some(leader.group_id())));
            }
        }
        Ok(running)
    });
    let not_adopted = records.iter().filter(|(id, _)| !adopted.contains_key(*id));
    let outputs: Vec<_> = not_adopted
        .filter_map(|(id, record)| {
            let output = shared.output_of(record.start.as_ref()?)?;
            Some((id.clone(), output))
        })
        .collect();
    let writing = inspect(shared, move |shared| {
        let mut writing = Vec::new();
        for (id, output) in &outputs {
            let mut matcher = shared.matcher(id, None);
            matcher.output = Some(output.clone());
            if launch::is_output_locked(output)? && !matcher.pids()?.is_empty() {
                writing.push((id.clone(), None));
            }
        }
        Ok(writing)
    });
    strays.extend(writing.await?);
    strays.extend(running.await?);
    Ok(strays)
}

fn supervise_adopted(shared: &Arc<Shared>, leader: Leader, record: InstanceRecord) {
    let id = record.id.clone();
    let (sender, receiver) = mpsc::channel(REMOVALS_MAX);
    tracing::info!(instance = %id, pid = leader.pid, "adopted");
    let entry = Entry {
        record,
        phase: ObservedPhase::Starting,
        adopted: true,
        progress: None,
        unhealthy: None,
        removals: Some(sender),
        cpu: CpuMeter::default(),
        family: Family::new(),
    };
    shared.state().entries.insert(id.clone(), entry);
    persist(shared, &id);
    supervise::spawn(shared, id, leader, receiver);
}

/// Moves the record of an instance without processes to its final phase.
fn settle(shared: &Shared, mut record: InstanceRecord) {
    // Its processes ended while nobody was there to remove the group.
    shared.control_groups.remove(record.id.as_str());
    let (phase, observed) = match record.phase {
        // The start was not carried out: forget it.
        RecordPhase::Starting => {
            if let Some(folder) = shared.disk().as_ref()
                && let Err(error) = folder.delete(&record.id)
            {
                tracing::warn!(instance = %record.id, %error, "failed to remove record");
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
        progress: None,
        unhealthy: None,
        removals: None,
        cpu: CpuMeter::default(),
        family: Family::new(),
    };
    shared.state().entries.insert(id.clone(), entry);
    if changed {
        persist(shared, &id);
    }
}

fn persist(shared: &Shared, id: &InstanceId) {
    if let Err(error) = shared.persist(id) {
        tracing::warn!(instance = %id, %error, "failed to write record after startup");
    }
}
