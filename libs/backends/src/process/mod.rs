//! Instances as local processes.
//!
//! Owns `DATA/instances` (a record per instance), `DATA/run` (private folders of instances),
//! `DATA/installation` and `DATA/logs`. Invariants:
//! a request is durable before it is carried out; at most one process group runs per instance; an
//! instance outlives Penstock and is adopted by the next one, and no process of this installation
//! runs without a record; when an instance is reported as ended, all its processes are gone.

mod adopt;
mod control_group;
mod family;
mod folder;
mod grpc_health;
mod host;
mod launch;
mod limit;
mod node;
mod os;
mod probe;
mod record;
mod secret;
mod shortage;
mod sockets;
mod supervise;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use contract::ids::InstanceId;
use contract::own_secrets::OwnSecrets;
use contract::resources::placeholders;
use contract::time::{Span, Timestamp};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::logs::{LogLimits, output_path, sweep};
use crate::watchers::Watchers;
use crate::{Backend, BackendError, ObservedInstance, ObservedPhase, ResourceSample, StartSpec};
use control_group::ControlGroups;
use family::{Family, ProcessTable};
use launch::{LaunchContext, Ports};
use os::{CpuMeter, Leader};
use record::{
    InstanceRecord, RECORD_FORMAT, RecordFolder, RecordPhase, TOMBSTONES_MAX, is_usable_id,
};
use shortage::{SHORTAGE_RETRY_PAUSE, StartError};

pub use host::{Host, UnknownHost};
pub use limit::become_instance;
pub use node::node_id;
pub use record::installation_id;
pub use shortage::{ResourceLimits, ShortageListener};

/// How often output files are marked and rotated.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// Configuration of the process backend.
#[derive(Clone, Debug)]
pub struct ProcessConfig {
    /// Holds records, secrets and output of instances; used by one process at a time.
    pub data_dir: PathBuf,
    /// The id of this node, reported with every instance; see [`node_id`].
    pub node: String,
    /// The working directory of instances, from which relative programs are resolved.
    pub working_directory: PathBuf,
    /// The host of instances started from now on; running ones keep theirs.
    pub host: Host,
    /// How much instance output is kept.
    pub log_limits: LogLimits,
    /// Sources of this node's own secrets, including the data folder: instances never get any of them.
    pub own_secrets: OwnSecrets,
    /// Time from SIGTERM to SIGKILL of processes without a record.
    pub grace: Span,
    /// How much of this process's resources the instances may use.
    pub resource_limits: ResourceLimits,
    /// Whether each instance gets a control group of its own where that is allowed, by which processes
    /// that leave its session and clear their environment are found.
    pub control_groups: bool,
}

impl ProcessConfig {
    /// Returns a configuration on loopback, with a grace period of 10 seconds and defaults for the rest.
    pub fn new(data_dir: PathBuf, node: String, working_directory: PathBuf) -> Self {
        let mut own_secrets = OwnSecrets::default();
        own_secrets.add_path(&data_dir);
        Self {
            own_secrets,
            data_dir,
            node,
            working_directory,
            host: Host::default(),
            log_limits: LogLimits::default(),
            grace: Span::from_secs(10),
            resource_limits: ResourceLimits::default(),
            control_groups: true,
        }
    }
}

/// Runs instances as local processes. Dropping it releases all instances, like
/// [`release`](Backend::release).
#[derive(Debug)]
pub struct ProcessBackend {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: ProcessConfig,
    launch_context: LaunchContext,
    control_groups: ControlGroups,
    boot_id: String,
    state: Mutex<State>,
    /// Locked for each write of a record, before its content is read, so that the last write wins.
    disk: Mutex<Option<RecordFolder>>,
    /// Limits concurrent work that opens files, to leave descriptors for others.
    blocking_slots: Semaphore,
    /// Limits concurrent probe connections.
    probes: Arc<Semaphore>,
    released: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<InstanceId, Entry>,
    watchers: Watchers,
}

#[derive(Debug)]
struct Entry {
    record: InstanceRecord,
    phase: ObservedPhase,
    adopted: bool,
    /// What it waits for, if its start takes long.
    progress: Option<String>,
    /// Why its liveness probe fails, if it does.
    unhealthy: Option<String>,
    /// Sends to the supervisor of the instance; `None` once the instance has ended.
    removals: Option<mpsc::Sender<Removal>>,
    cpu: CpuMeter,
    /// Its processes when they were last looked for.
    family: Family,
}

/// Removals queued for a supervisor: it acts on the first, and any further one is redundant.
const REMOVALS_MAX: usize = 1;

/// Tells a supervisor to end the instance.
#[derive(Clone, Copy, Debug)]
struct Removal {
    grace: Span,
}

impl Entry {
    fn observed(&self, node: &str) -> ObservedInstance {
        ObservedInstance {
            id: self.record.id.clone(),
            generation: self.record.generation,
            node: node.to_owned(),
            address: self.record.address(),
            pid: self.record.process.as_ref().map(|p| p.pid as u32),
            phase: self.phase.clone(),
            adopted: self.adopted,
            progress: self.progress.clone(),
            unhealthy: self.unhealthy.clone(),
        }
    }
}

impl ProcessBackend {
    /// Locks the data folder, adopts healthy instances and ends all other processes of this installation.
    ///
    /// # Errors
    ///
    /// If the data folder cannot be used, is locked by another process, or contains unreadable records.
    pub async fn open(config: ProcessConfig) -> Result<Arc<Self>, BackendError> {
        let shared = tokio::task::spawn_blocking(move || Shared::open(config))
            .await
            .map_err(BackendError::Crashed)??;
        let shared = Arc::new(shared);
        adopt::adopt(&shared).await?;
        shared.tasks.spawn(sweep_logs(shared.clone()));
        Ok(Arc::new(Self { shared }))
    }
}

impl Drop for ProcessBackend {
    fn drop(&mut self) {
        self.shared.released.cancel();
    }
}

#[async_trait]
impl Backend for ProcessBackend {
    async fn ensure(&self, start: StartSpec) -> Result<(), BackendError> {
        self.run_to_completion(|shared| shared.ensure(start)).await
    }

    async fn remove(
        &self,
        id: &InstanceId,
        generation: u64,
        grace: Span,
    ) -> Result<(), BackendError> {
        let id = id.clone();
        self.run_to_completion(move |shared| shared.remove(&id, generation, grace))
            .await
    }

    async fn list(&self) -> Result<Vec<ObservedInstance>, BackendError> {
        let state = self.shared.state();
        let entries = state.entries.values();
        Ok(entries
            .filter(|entry| !matches!(entry.phase, ObservedPhase::Removed { .. }))
            .map(|entry| entry.observed(&self.shared.config.node))
            .collect())
    }

    fn watch(&self) -> mpsc::Receiver<ObservedInstance> {
        self.shared.state().watchers.subscribe()
    }

    async fn resources(&self) -> Vec<ResourceSample> {
        let samples = self.shared.run_blocking(|shared| shared.resources()).await;
        samples.unwrap_or_default()
    }

    async fn release(&self) {
        self.shared.released.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
        self.shared.state().watchers.close();
        // Unlock the folder only now that nothing writes to it any more.
        self.shared.disk().take();
    }
}

impl ProcessBackend {
    /// Runs `work` to completion even if the caller is cancelled, so that no start is left half done.
    async fn run_to_completion(
        &self,
        work: impl FnOnce(&Arc<Shared>) -> Result<(), BackendError> + Send + 'static,
    ) -> Result<(), BackendError> {
        if self.shared.released.is_cancelled() {
            return Err(released());
        }
        let shared = self.shared.clone();
        let task = self.shared.tasks.spawn(async move {
            let failed = || BackendError::Unavailable("the process backend failed".into());
            shared
                .run_blocking(work)
                .await
                .unwrap_or_else(|| Err(failed()))
        });
        task.await.map_err(BackendError::Crashed)?
    }
}

impl Shared {
    fn open(config: ProcessConfig) -> Result<Self, BackendError> {
        let failed = |source: io::Error| BackendError::Unusable {
            what: format!(
                "the data folder {} cannot be used",
                config.data_dir.display()
            ),
            source,
        };
        let folder = RecordFolder::open(&config.data_dir)?;
        let launch_context = LaunchContext {
            installation: installation_id(&config.data_dir).map_err(failed)?,
            working_directory: config.working_directory.clone(),
            listen: config.host.listen(),
            own_secrets: config.own_secrets.clone(),
            descriptors: config.resource_limits.instance_descriptors,
        };
        Ok(Self {
            control_groups: ControlGroups::open(
                &launch_context.installation,
                config.control_groups,
            ),
            launch_context,
            boot_id: os::boot_id().map_err(failed)?,
            state: Mutex::default(),
            blocking_slots: Semaphore::new(config.resource_limits.blocking_max.max(1)),
            probes: Arc::new(Semaphore::new(config.resource_limits.probes_max.max(1))),
            config,
            disk: Mutex::new(Some(folder)),
            released: CancellationToken::new(),
            tasks: TaskTracker::new(),
        })
    }

    /// A panic while holding the lock cannot leave the state half changed.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn disk(&self) -> MutexGuard<'_, Option<RecordFolder>> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs work that blocks or opens files, once a slot is free. Returns `None` if it panics.
    async fn run_blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Arc<Self>) -> T + Send + 'static,
    ) -> Option<T> {
        // The semaphore is never closed.
        let _slot = self.blocking_slots.acquire().await;
        let shared = self.clone();
        tokio::task::spawn_blocking(move || work(&shared))
            .await
            .ok()
    }

    /// Like [`run_blocking`](Self::run_blocking), but retries while the process is short of resources.
    /// Returns `None` once the backend has been released.
    async fn retry_on_shortage<T: Send + 'static>(
        self: &Arc<Self>,
        what: &str,
        work: impl Fn(&Arc<Self>) -> io::Result<T> + Clone + Send + 'static,
    ) -> Option<T> {
        while !self.released.is_cancelled() {
            match self.run_blocking(work.clone()).await? {
                Ok(done) => return Some(done),
                Err(error) => self.config.resource_limits.report_shortage(what, &error),
            }
            self.pause().await;
        }
        None
    }

    async fn pause(&self) {
        let pause = tokio::time::sleep(SHORTAGE_RETRY_PAUSE);
        self.released.run_until_cancelled(pause).await;
    }

    /// Writes the current record of an instance. Blocks on the disk.
    fn persist(&self, id: &InstanceId) -> Result<(), BackendError> {
        let disk = self.disk();
        let folder = disk.as_ref().ok_or_else(released)?;
        let Some(record) = self.state().entries.get(id).map(|e| e.record.clone()) else {
            return Ok(());
        };
        folder.write(&record).map_err(|error| {
            if shortage::is_shortage(&error) {
                return self.shortage_error(id, "the record of an instance", error);
            }
            BackendError::Unusable {
                what: format!("the record of instance {id} cannot be written"),
                source: error,
            }
        })
    }

    fn shortage_error(&self, id: &InstanceId, what: &str, source: io::Error) -> BackendError {
        self.config.resource_limits.report_shortage(what, &source);
        let id = id.clone();
        BackendError::OutOfResources { id, source }
    }

    /// Updates the entry of an instance, and publishes it if `f` returns true.
    fn update(&self, id: &InstanceId, f: impl FnOnce(&mut Entry) -> bool) {
        let mut state = self.state();
        let State { entries, watchers } = &mut *state;
        if let Some(entry) = entries.get_mut(id)
            && f(entry)
        {
            watchers.publish(&entry.observed(&self.config.node));
        }
    }

    fn ensure(self: &Arc<Self>, start: StartSpec) -> Result<(), BackendError> {
        let id = start.id.clone();
        if !is_usable_id(&id) || !is_usable_deployment(&start.deployment) {
            let detail = "its id or its deployment's name cannot be the name of a file".into();
            return Err(BackendError::CannotStart { id, detail });
        }
        let Some(removals) = self.admit(&start)? else {
            return self.persist(&id);
        };
        if let Err(error) = self.persist(&id) {
            self.state().entries.remove(&id);
            return Err(error);
        }
        match self.start(&start) {
            Ok(leader) => {
                supervise::spawn(self, id, leader, removals);
                Ok(())
            }
            Err(StartError::Refused(detail)) => {
                self.record_exit(&id, None, detail.clone());
                Err(BackendError::CannotStart { id, detail })
            }
            Err(StartError::Shortage(error)) => {
                self.roll_back(&id);
                Err(self.shortage_error(&id, "the start of an instance", error))
            }
        }
    }

    /// Undoes an admitted start, unless the removal of the instance was requested meanwhile.
    fn roll_back(&self, id: &InstanceId) {
        let is_removing = {
            let mut state = self.state();
            let is_removing = state
                .entries
                .get(id)
                .is_some_and(|entry| entry.record.phase == RecordPhase::Removing);
            if !is_removing {
                state.entries.remove(id);
            }
            is_removing
        };
        if is_removing {
            return self.record_exit(id, None, "was never started".into());
        }
        let _ = folder::remove(&self.config.data_dir, id);
        // A leftover record says that nothing was started, which is true.
        if let Some(folder) = self.disk().as_ref() {
            let _ = folder.delete(id);
        }
    }

    /// Decides whether the instance is to be started. If so, the caller is the one that starts it.
    fn admit(&self, start: &StartSpec) -> Result<Option<mpsc::Receiver<Removal>>, BackendError> {
        let mut state = self.state();
        let State { entries, watchers } = &mut *state;
        if let Some(entry) = entries.get_mut(&start.id) {
            let newest = entry.record.generation;
            let refused = start.generation < newest
                || start.generation == newest && entry.record.has_tombstone()
                || matches!(entry.record.phase, RecordPhase::Removing);
            if refused {
                return Err(BackendError::Stale {
                    id: start.id.clone(),
                    requested: start.generation,
                    newest,
                });
            }
            if entry.removals.is_some() {
                entry.record.generation = start.generation;
                return Ok(None);
            }
            if start.generation == newest {
                // Already carried out, and the instance has ended: report that again.
                watchers.publish(&entry.observed(&self.config.node));
                return Ok(None);
            }
        }
        let (sender, receiver) = mpsc::channel(REMOVALS_MAX);
        let entry = Entry {
            record: InstanceRecord {
                id: start.id.clone(),
                generation: start.generation,
                phase: RecordPhase::Starting,
                start: Some(start.clone()),
                process: None,
                port: None,
                ports: BTreeMap::new(),
                host: self.config.host.clone(),
                node: self.config.node.clone(),
                format: RECORD_FORMAT,
            },
            phase: ObservedPhase::Starting,
            adopted: false,
            progress: None,
            unhealthy: None,
            removals: Some(sender),
            cpu: CpuMeter::default(),
            family: Family::new(),
        };
        entries.insert(start.id.clone(), entry);
        Ok(Some(receiver))
    }

    /// Starts the process of an admitted and recorded instance.
    fn start(&self, start: &StartSpec) -> Result<Leader, StartError> {
        self.config
            .resource_limits
            .check_capacity()
            .map_err(StartError::Shortage)?;
        let id = &start.id;
        let ports = self.reserve_ports(start);
        let ports = ports.map_err(|error| StartError::from_io(error, io::Error::to_string))?;
        let data = &self.config.data_dir;
        let folder = folder::is_used(&start.spec).then(|| folder::create(data, id));
        let folder = folder.transpose().map_err(|error| {
            StartError::from_io(error, |e| format!("its folder cannot be created: {e}"))
        })?;
        let output = output_path(data, &start.deployment, id);
        let context = &self.launch_context;
        let mut child = launch::launch(start, context, &ports, folder.as_deref(), &output)?;
        let pid = child.id() as i32;
        self.control_groups.add(id.as_str(), pid);
        // The process runs from here on: every return must either keep track of it or kill it.
        let process = os::identity(pid, &self.boot_id).map_err(|error| {
            os::kill_unwatched(&mut child);
            StartError::Shortage(error)
        })?;
        let leader = Leader::from_child(child, &self.config.resource_limits).map_err(|error| {
            StartError::from_io(error, |e| format!("its process cannot be watched: {e}"))
        })?;
        self.update(id, |entry| {
            entry.record.process = process;
            if entry.record.phase == RecordPhase::Starting {
                entry.record.phase = RecordPhase::Running;
            }
            true
        });
        if let Err(error) = self.persist(id) {
            // Adoption can also find the process by its environment.
            tracing::warn!(instance = %id, %error, "failed to record started instance");
        }
        Ok(leader)
    }

    /// Chooses free ports for an instance. From here on no other instance gets them, while this one lives.
    fn reserve_ports(&self, start: &StartSpec) -> io::Result<Ports> {
        let mut state = self.state();
        let running = state.entries.values().filter(|e| e.removals.is_some());
        let mut reserved: BTreeSet<u16> =
            running.flat_map(|entry| entry.record.all_ports()).collect();
        let mut next = || {
            let listen = self.launch_context.listen;
            let port = launch::find_free_port(listen, |port| reserved.contains(&port))?;
            reserved.insert(port);
            io::Result::Ok(port)
        };
        let main = next()?;
        let names = placeholders::named_ports(&start.spec).into_iter();
        let named = names.map(|name| Ok((name, next()?)));
        let named = named.collect::<io::Result<BTreeMap<_, _>>>()?;
        if let Some(entry) = state.entries.get_mut(&start.id) {
            entry.record.port = Some(main);
            entry.record.ports = named.clone();
            entry.record.host = self.config.host.clone();
        }
        Ok(Ports { main, named })
    }

    fn remove(&self, id: &InstanceId, generation: u64, grace: Span) -> Result<(), BackendError> {
        if !is_usable_id(id) {
            return Err(BackendError::Unavailable(format!(
                "`{id}` cannot be the id of an instance"
            )));
        }
        let removals = self.mark_for_removal(id, generation)?;
        self.persist(id)?;
        match removals {
            // A supervisor that is just finishing sees the record's phase and acts on it.
            Some(removals) => drop(removals.try_send(Removal { grace })),
            None => self.update(id, |entry| {
                matches!(entry.record.phase, RecordPhase::Removed { .. })
            }),
        }
        Ok(())
    }

    /// Marks the instance for removal.
    fn mark_for_removal(
        &self,
        id: &InstanceId,
        generation: u64,
    ) -> Result<Option<mpsc::Sender<Removal>>, BackendError> {
        let mut state = self.state();
        let entry = state.entries.entry(id.clone()).or_insert_with(|| Entry {
            record: InstanceRecord {
                id: id.clone(),
                generation,
                phase: RecordPhase::Removed { code: None },
                start: None,
                process: None,
                port: None,
                ports: BTreeMap::new(),
                host: self.config.host.clone(),
                node: self.config.node.clone(),
                format: RECORD_FORMAT,
            },
            phase: ObservedPhase::Removed { code: None },
            adopted: false,
            progress: None,
            unhealthy: None,
            removals: None,
            cpu: CpuMeter::default(),
            family: Family::new(),
        });
        if generation < entry.record.generation {
            return Err(BackendError::Stale {
                id: id.clone(),
                requested: generation,
                newest: entry.record.generation,
            });
        }
        entry.record.generation = generation;
        if entry.removals.is_some() {
            entry.record.phase = RecordPhase::Removing;
        } else if let RecordPhase::Exited { code, .. } = entry.record.phase {
            entry.record.phase = RecordPhase::Removed { code };
            entry.phase = ObservedPhase::Removed { code };
        }
        Ok(entry.removals.clone())
    }

    /// Records and reports that the instance has no process any more. Blocks on the disk.
    fn record_exit(&self, id: &InstanceId, code: Option<i32>, reason: String) {
        let mut final_phase = None;
        self.update(id, |entry| {
            entry.removals = None;
            if entry.record.phase == RecordPhase::Removing {
                entry.record.phase = RecordPhase::Removed { code };
                final_phase = Some(ObservedPhase::Removed { code });
            } else {
                entry.record.phase = RecordPhase::Exited {
                    code,
                    reason: reason.clone(),
                };
                final_phase = Some(ObservedPhase::Exited { code, reason });
            }
            false
        });
        self.control_groups.remove(id.as_str());
        if let Err(error) = folder::remove(&self.config.data_dir, id) {
            tracing::warn!(instance = %id, %error, "failed to remove the folder of an ended instance");
        }
        if let Err(error) = self.persist(id) {
            // The next startup finds no process and records the same end, without the code.
            tracing::warn!(instance = %id, %error, "failed to record end of instance");
        }
        if let Some(phase) = final_phase {
            self.update(id, |entry| {
                entry.phase = phase;
                true
            });
        }
    }

    fn matcher(&self, id: &InstanceId, group: Option<i32>) -> os::ProcessMatcher {
        os::ProcessMatcher {
            installation: self.launch_context.installation.clone(),
            instance: id.as_str().to_owned(),
            group,
            output: None,
            family: self.family(id),
        }
    }

    fn family(&self, id: &InstanceId) -> Family {
        let state = self.state();
        let entry = state.entries.get(id);
        entry.map(|entry| entry.family.clone()).unwrap_or_default()
    }

    /// Looks for processes of an instance that only descent shows. `group` must be certain to be its own.
    fn find_family(&self, id: &InstanceId, group: Option<i32>) -> io::Result<()> {
        let table: ProcessTable = os::live_processes()?.iter().collect();
        self.update(id, |entry| {
            entry.family = table.family(group, &entry.family);
            false
        });
        Ok(())
    }

    /// The output file of an instance.
    fn output(&self, id: &InstanceId) -> Option<PathBuf> {
        let state = self.state();
        let start = state.entries.get(id)?.record.start.as_ref()?;
        self.output_of(start)
    }

    /// As the descriptors of its processes show it; `None` without such a file.
    fn output_of(&self, start: &StartSpec) -> Option<PathBuf> {
        let path = output_path(&self.config.data_dir, &start.deployment, &start.id);
        path.canonicalize().ok()
    }

    /// Returns nothing if usage cannot be read: that must not be mistaken for an idle instance.
    fn resources(&self) -> Vec<ResourceSample> {
        let processes = match os::live_processes() {
            Ok(processes) => processes,
            Err(error) => {
                self.config
                    .resource_limits
                    .report_shortage("the measurement of instances", &error);
                return Vec::new();
            }
        };
        let groups = os::usage_by_group(&processes);
        let table: ProcessTable = processes.iter().collect();
        // Processes have no limit of their own.
        let memory_limit_bytes = os::memory_bytes();
        let mut state = self.state();
        let running = state.entries.values_mut().filter(|e| e.removals.is_some());
        running
            .filter_map(|entry| {
                let process = entry.record.process.as_ref()?;
                entry.family = table.family(table.group_of(process), &entry.family);
                let usage = groups.get(&process.group_id());
                let usage = usage.copied().unwrap_or_default();
                Some(ResourceSample {
                    id: entry.record.id.clone(),
                    cpu_us_total: entry.cpu.total(usage.cpu_us),
                    memory_bytes: usage.memory_bytes,
                    memory_limit_bytes,
                })
            })
            .collect()
    }

    /// Deletes the folders of the oldest removed instances beyond the limit. Blocks on the disk.
    fn prune(&self) {
        let disk = self.disk();
        let Some(folder) = disk.as_ref() else {
            return;
        };
        let tombstones: BTreeMap<InstanceId, InstanceRecord> = {
            let state = self.state();
            let ended = state.entries.values().filter(|entry| {
                entry.removals.is_none()
                    && matches!(entry.record.phase, RecordPhase::Removed { .. })
            });
            ended
                .map(|entry| (entry.record.id.clone(), entry.record.clone()))
                .collect()
        };
        if tombstones.len() <= TOMBSTONES_MAX {
            return;
        }
        let pruned = folder.prune(&tombstones);
        let mut state = self.state();
        for id in pruned {
            state.entries.remove(&id);
        }
    }

    /// Returns the instances that may still write output, by deployment.
    fn in_use(&self) -> BTreeMap<String, BTreeSet<InstanceId>> {
        let mut in_use = BTreeMap::<String, BTreeSet<InstanceId>>::new();
        for entry in self.state().entries.values() {
            if let (Some(_), Some(start)) = (&entry.removals, &entry.record.start) {
                let deployment = in_use.entry(start.deployment.clone()).or_default();
                deployment.insert(start.id.clone());
            }
        }
        in_use
    }
}

/// Whether the text is a valid `ENDPOINT/DEPLOYMENT`; it becomes part of a path.
fn is_usable_deployment(text: &str) -> bool {
    text.parse::<contract::ids::DeploymentRef>().is_ok()
}

async fn sweep_logs(shared: Arc<Shared>) {
    let mut ticks = tokio::time::interval(SWEEP_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shared.released.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let swept = shared.run_blocking(|shared| {
            shared.prune();
            let config = &shared.config;
            sweep(&config.data_dir, &shared.in_use(), config.log_limits, now())
        });
        match swept.await {
            Some(Err(error)) if shortage::is_shortage(&error) => {
                shared
                    .config
                    .resource_limits
                    .report_shortage("the rotation of output", &error);
            }
            Some(Err(error)) => tracing::warn!(%error, "failed to rotate instance output"),
            Some(Ok(_)) | None => {}
        }
    }
}

/// Used only for marks of instance output; no decision depends on it.
#[expect(
    clippy::disallowed_methods,
    reason = "marks output for people; no result depends on it"
)]
fn now() -> Timestamp {
    let since_1970 = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    Timestamp::from_millis(since_1970.as_millis() as i64)
}

fn released() -> BackendError {
    BackendError::Unavailable("the process backend has been released".into())
}
