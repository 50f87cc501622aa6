//! Instances as processes of this machine.
//!
//! Owns `DATA/instances` (a record per instance), `DATA/installation` and `DATA/logs`. Invariants:
//! an order is durable before it is carried out; at most one process group runs per instance; an
//! instance outlives Penstock and is adopted by the next one, and nothing of ours runs that no
//! record names; when an instance is reported as ended, all its processes are gone.

mod adopt;
mod host;
mod lack;
mod launch;
mod limit;
mod os;
mod probe;
mod record;
mod secret;
mod supervise;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use contract::ids::InstanceId;
use contract::own_secrets::OwnSecrets;
use contract::time::{Span, Timestamp};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::logs::{LogLimits, output_path, sweep};
use crate::watchers::Watchers;
use crate::{Backend, BackendError, Observed, ObservedPhase, Order, ResourceSample};
use lack::LACK_PAUSE;
use launch::{StartError, Surroundings};
use os::{CpuMeter, Leader};
use record::{Record, RecordPhase, StateFolder, is_usable_id};

pub use host::{Host, UnknownHost};
pub use lack::{LackListener, Means};
pub use limit::become_instance;
pub use record::{installation_id, node_id};

/// How often output files are looked at.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// What the backend of local processes is told at its start.
#[derive(Clone, Debug)]
pub struct ProcessConfig {
    /// Holds records, secrets and output of instances; this process has it alone.
    pub data_dir: PathBuf,
    /// Goes into what is observed; see [`node_id`].
    pub node: String,
    /// Relative programs are looked up here, and instances run here.
    pub working_directory: PathBuf,
    /// Of the instances that are started from now on; others keep theirs.
    pub host: Host,
    /// How much output is kept.
    pub log_limits: LogLimits,
    /// What this node has its own secrets from, the data folder among them: no instance is given any.
    pub own: OwnSecrets,
    /// From the polite signal to the hard one, where no order says it: for what is found running
    /// without a record, and for instances given up by their probes.
    pub grace: Span,
    /// What of this process the instances may take.
    pub means: Means,
}

impl ProcessConfig {
    /// On loopback, with a grace of 10 seconds and the defaults for the rest.
    pub fn new(data_dir: PathBuf, node: String, working_directory: PathBuf) -> Self {
        let mut own = OwnSecrets::default();
        own.add_place(&data_dir);
        Self {
            own,
            data_dir,
            node,
            working_directory,
            host: Host::default(),
            log_limits: LogLimits::default(),
            grace: Span::from_secs(10),
            means: Means::default(),
        }
    }
}

/// See the module. Dropping it lets go of all instances, as [`release`](Backend::release) does.
#[derive(Debug)]
pub struct ProcessBackend {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: ProcessConfig,
    surroundings: Surroundings,
    boot_id: String,
    state: Mutex<State>,
    /// Taken for each write of a record, before its content is read: the last write has the last word.
    disk: Mutex<Option<StateFolder>>,
    /// For work that opens files: more at a time would take descriptors that others were promised.
    hands: Semaphore,
    /// For connections of probes.
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
    record: Record,
    phase: ObservedPhase,
    adopted: bool,
    /// To the task that looks after the instance; none once it is over.
    orders: Option<mpsc::Sender<Removal>>,
    cpu: CpuMeter,
}

/// Removals that wait for a supervisor: it acts on the first, and a further one would say the same.
const REMOVALS_MAX: usize = 1;

/// To a supervisor: end the instance.
#[derive(Clone, Copy, Debug)]
struct Removal {
    grace: Span,
}

impl Entry {
    fn observed(&self, node: &str) -> Observed {
        Observed {
            id: self.record.id.clone(),
            generation: self.record.generation,
            node: node.to_owned(),
            address: self.record.address(),
            pid: self.record.process.as_ref().map(|p| p.pid as u32),
            phase: self.phase.clone(),
            adopted: self.adopted,
        }
    }
}

impl ProcessBackend {
    /// Takes the data folder, adopts what runs well and ends the rest.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] where the data folder cannot be used, is another process's, or
    /// holds records that cannot be read.
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
    async fn ensure(&self, order: Order) -> Result<(), BackendError> {
        self.carry_out(|shared| shared.ensure(order)).await
    }

    async fn remove(
        &self,
        id: &InstanceId,
        generation: u64,
        grace: Span,
    ) -> Result<(), BackendError> {
        let id = id.clone();
        self.carry_out(move |shared| shared.remove(&id, generation, grace))
            .await
    }

    async fn list(&self) -> Result<Vec<Observed>, BackendError> {
        let state = self.shared.state();
        let known = state.entries.values();
        Ok(known
            .filter(|entry| !matches!(entry.phase, ObservedPhase::Removed { .. }))
            .map(|entry| entry.observed(&self.shared.config.node))
            .collect())
    }

    fn watch(&self) -> mpsc::Receiver<Observed> {
        self.shared.state().watchers.subscribe()
    }

    async fn resources(&self) -> Vec<ResourceSample> {
        let measured = self.shared.work(|shared| shared.resources()).await;
        measured.unwrap_or_default()
    }

    async fn release(&self) {
        self.shared.released.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
        self.shared.state().watchers.close();
        // Free for the next one only now that nobody writes any more.
        self.shared.disk().take();
    }
}

impl ProcessBackend {
    /// Runs to its end even if the caller goes away: a start that is half done has nobody else.
    async fn carry_out(
        &self,
        work: impl FnOnce(&Arc<Shared>) -> Result<(), BackendError> + Send + 'static,
    ) -> Result<(), BackendError> {
        if self.shared.released.is_cancelled() {
            return Err(released());
        }
        let shared = self.shared.clone();
        let carried_out = self.shared.tasks.spawn(async move {
            let failed = || BackendError::Unavailable("the process backend failed".into());
            shared.work(work).await.unwrap_or_else(|| Err(failed()))
        });
        carried_out.await.map_err(BackendError::Crashed)?
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
        let folder = StateFolder::open(&config.data_dir)?;
        let surroundings = Surroundings {
            installation: installation_id(&config.data_dir).map_err(failed)?,
            working_directory: config.working_directory.clone(),
            listen: config.host.listen(),
            own: config.own.clone(),
            descriptors: config.means.instance_descriptors,
        };
        Ok(Self {
            surroundings,
            boot_id: os::boot_id().map_err(failed)?,
            state: Mutex::default(),
            hands: Semaphore::new(config.means.hands_max.max(1)),
            probes: Arc::new(Semaphore::new(config.means.probes_max.max(1))),
            config,
            disk: Mutex::new(Some(folder)),
            released: CancellationToken::new(),
            tasks: TaskTracker::new(),
        })
    }

    /// Nothing that holds these locks can leave the state half changed.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn disk(&self) -> MutexGuard<'_, Option<StateFolder>> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what blocks and opens files, as soon as a hand is free. None if it panics.
    async fn work<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Arc<Self>) -> T + Send + 'static,
    ) -> Option<T> {
        // It is never closed.
        let _hand = self.hands.acquire().await;
        let shared = self.clone();
        tokio::task::spawn_blocking(move || work(&shared))
            .await
            .ok()
    }

    /// The same for what may lack the means: again and again until it is done. None once the backend
    /// has let go.
    async fn until_done<T: Send + 'static>(
        self: &Arc<Self>,
        what: &str,
        work: impl Fn(&Arc<Self>) -> io::Result<T> + Clone + Send + 'static,
    ) -> Option<T> {
        while !self.released.is_cancelled() {
            match self.work(work.clone()).await? {
                Ok(done) => return Some(done),
                Err(error) => self.config.means.lack(what, &error),
            }
            self.pause().await;
        }
        None
    }

    async fn pause(&self) {
        let pause = tokio::time::sleep(LACK_PAUSE);
        self.released.run_until_cancelled(pause).await;
    }

    /// Writes down what is known of an instance now. Blocks on the disk.
    fn persist(&self, id: &InstanceId) -> Result<(), BackendError> {
        let disk = self.disk();
        let folder = disk.as_ref().ok_or_else(released)?;
        let Some(record) = self.state().entries.get(id).map(|e| e.record.clone()) else {
            return Ok(());
        };
        folder.write(&record).map_err(|error| {
            if lack::is_lack(&error) {
                return self.lacking(id, "the record of an instance", error);
            }
            BackendError::Unusable {
                what: format!("the record of instance {id} cannot be written"),
                source: error,
            }
        })
    }

    fn lacking(&self, id: &InstanceId, what: &str, source: io::Error) -> BackendError {
        self.config.means.lack(what, &source);
        let id = id.clone();
        BackendError::Lacking { id, source }
    }

    /// Changes what is known of an instance, and tells it on if `f` says so.
    fn update(&self, id: &InstanceId, f: impl FnOnce(&mut Entry) -> bool) {
        let mut state = self.state();
        let State { entries, watchers } = &mut *state;
        if let Some(entry) = entries.get_mut(id)
            && f(entry)
        {
            watchers.publish(&entry.observed(&self.config.node));
        }
    }

    fn ensure(self: &Arc<Self>, order: Order) -> Result<(), BackendError> {
        let id = order.id.clone();
        if !is_usable_id(&id) || !is_usable_deployment(&order.deployment) {
            let detail = "its id or its deployment's name cannot be the name of a file".into();
            return Err(BackendError::CannotStart { id, detail });
        }
        let Some(orders) = self.admit(&order)? else {
            return self.persist(&id);
        };
        if let Err(error) = self.persist(&id) {
            self.state().entries.remove(&id);
            return Err(error);
        }
        match self.start(&order) {
            Ok(leader) => {
                supervise::spawn(self, id, leader, orders);
                Ok(())
            }
            Err(StartError::Refused(detail)) => {
                self.over(&id, None, detail.clone());
                Err(BackendError::CannotStart { id, detail })
            }
            Err(StartError::Lack(error)) => {
                self.undo(&id);
                Err(self.lacking(&id, "the start of an instance", error))
            }
        }
    }

    /// As if the order had not come, unless the instance has been condemned meanwhile.
    fn undo(&self, id: &InstanceId) {
        let condemned = {
            let mut state = self.state();
            let condemned = state
                .entries
                .get(id)
                .is_some_and(|entry| entry.record.phase == RecordPhase::Removing);
            if !condemned {
                state.entries.remove(id);
            }
            condemned
        };
        if condemned {
            return self.over(id, None, "was never started".into());
        }
        // A record that stays says that nothing has been started, which is true.
        if let Some(folder) = self.disk().as_ref() {
            let _ = folder.forget(id);
        }
    }

    /// Decides whether the order leads to a start; if so the instance is ours to start from here on.
    fn admit(&self, order: &Order) -> Result<Option<mpsc::Receiver<Removal>>, BackendError> {
        let mut state = self.state();
        let State { entries, watchers } = &mut *state;
        if let Some(entry) = entries.get_mut(&order.id) {
            let newest = entry.record.generation;
            let refused = order.generation < newest
                || order.generation == newest && entry.record.has_tombstone()
                || matches!(entry.record.phase, RecordPhase::Removing);
            if refused {
                return Err(BackendError::Stale {
                    id: order.id.clone(),
                    ours: order.generation,
                    newest,
                });
            }
            if entry.orders.is_some() {
                entry.record.generation = order.generation;
                return Ok(None);
            }
            if order.generation == newest {
                // It was carried out, and the instance is over. Say so again.
                watchers.publish(&entry.observed(&self.config.node));
                return Ok(None);
            }
        }
        let (sender, receiver) = mpsc::channel(REMOVALS_MAX);
        let entry = Entry {
            record: Record {
                id: order.id.clone(),
                generation: order.generation,
                phase: RecordPhase::Starting,
                order: Some(order.clone()),
                process: None,
                port: None,
                host: self.config.host.clone(),
            },
            phase: ObservedPhase::Starting,
            adopted: false,
            orders: Some(sender),
            cpu: CpuMeter::default(),
        };
        entries.insert(order.id.clone(), entry);
        Ok(Some(receiver))
    }

    /// Starts the process of an instance that is admitted and recorded.
    fn start(&self, order: &Order) -> Result<Leader, StartError> {
        self.config.means.room_for_one().map_err(StartError::Lack)?;
        let id = &order.id;
        let listen = self.surroundings.listen;
        let port = launch::free_port(listen, |port| self.is_promised(port));
        let port = port.map_err(|error| StartError::of(error, io::Error::to_string))?;
        let output = output_path(&self.config.data_dir, &order.deployment, id);
        let mut child = launch::launch(order, &self.surroundings, port, &output)?;
        let pid = child.id() as i32;
        // From here on the process runs, so nothing may return without a word about it.
        let process = os::identity(pid, &self.boot_id).map_err(|error| {
            os::end_unwatched(&mut child);
            StartError::Lack(error)
        })?;
        let leader = Leader::of_child(child, &self.config.means).map_err(|error| {
            StartError::of(error, |e| format!("its process cannot be watched: {e}"))
        })?;
        self.update(id, |entry| {
            entry.record.process = process;
            entry.record.port = Some(port);
            entry.record.host = self.config.host.clone();
            if entry.record.phase == RecordPhase::Starting {
                entry.record.phase = RecordPhase::Running;
            }
            true
        });
        if let Err(error) = self.persist(id) {
            // Adoption finds the process by its environment as well.
            tracing::warn!(instance = %id, %error, "a started instance is not recorded");
        }
        Ok(leader)
    }

    fn is_promised(&self, port: u16) -> bool {
        let state = self.state();
        let mut in_use = state
            .entries
            .values()
            .filter(|entry| entry.orders.is_some());
        in_use.any(|entry| entry.record.port == Some(port))
    }

    fn remove(&self, id: &InstanceId, generation: u64, grace: Span) -> Result<(), BackendError> {
        if !is_usable_id(id) {
            return Err(BackendError::Unavailable(format!(
                "`{id}` cannot be the id of an instance"
            )));
        }
        let orders = self.condemn(id, generation)?;
        self.persist(id)?;
        match orders {
            // A supervisor that is just finishing sees the condemned record and acts on that.
            Some(orders) => drop(orders.try_send(Removal { grace })),
            None => self.update(id, |entry| {
                matches!(entry.record.phase, RecordPhase::Removed { .. })
            }),
        }
        Ok(())
    }

    /// Notes that the instance is not wanted any more.
    fn condemn(
        &self,
        id: &InstanceId,
        generation: u64,
    ) -> Result<Option<mpsc::Sender<Removal>>, BackendError> {
        let mut state = self.state();
        let entry = state.entries.entry(id.clone()).or_insert_with(|| Entry {
            record: Record {
                id: id.clone(),
                generation,
                phase: RecordPhase::Removed { code: None },
                order: None,
                process: None,
                port: None,
                host: self.config.host.clone(),
            },
            phase: ObservedPhase::Removed { code: None },
            adopted: false,
            orders: None,
            cpu: CpuMeter::default(),
        });
        if generation < entry.record.generation {
            return Err(BackendError::Stale {
                id: id.clone(),
                ours: generation,
                newest: entry.record.generation,
            });
        }
        entry.record.generation = generation;
        if entry.orders.is_some() {
            entry.record.phase = RecordPhase::Removing;
        } else if let RecordPhase::Exited { code, .. } = entry.record.phase {
            entry.record.phase = RecordPhase::Removed { code };
            entry.phase = ObservedPhase::Removed { code };
        }
        Ok(entry.orders.clone())
    }

    /// The instance has no process any more. Blocks on the disk.
    fn over(&self, id: &InstanceId, code: Option<i32>, reason: String) {
        let mut told = None;
        self.update(id, |entry| {
            entry.orders = None;
            if entry.record.phase == RecordPhase::Removing {
                entry.record.phase = RecordPhase::Removed { code };
                told = Some(ObservedPhase::Removed { code });
            } else {
                entry.record.phase = RecordPhase::Exited {
                    code,
                    reason: reason.clone(),
                };
                told = Some(ObservedPhase::Exited { code, reason });
            }
            false
        });
        if let Err(error) = self.persist(id) {
            // The next start finds no process and comes to the same end, less the code.
            tracing::warn!(instance = %id, %error, "the end of an instance is not recorded");
        }
        if let Some(phase) = told {
            self.update(id, |entry| {
                entry.phase = phase;
                true
            });
        }
    }

    fn membership(&self, id: &InstanceId, group: Option<i32>) -> os::Membership {
        os::Membership {
            installation: self.surroundings.installation.clone(),
            instance: id.as_str().to_owned(),
            group,
        }
    }

    /// Nothing where it cannot be seen: that is no evidence of an instance that does nothing.
    fn resources(&self) -> Vec<ResourceSample> {
        let groups = match os::usage_by_group() {
            Ok(groups) => groups,
            Err(error) => {
                self.config
                    .means
                    .lack("the measurement of instances", &error);
                return Vec::new();
            }
        };
        let mut state = self.state();
        let running = state.entries.values_mut().filter(|e| e.orders.is_some());
        running
            .filter_map(|entry| {
                let leader = entry.record.process.as_ref()?.pid;
                let usage = groups.get(&leader).copied().unwrap_or_default();
                Some(ResourceSample {
                    id: entry.record.id.clone(),
                    cpu_us_total: entry.cpu.total(usage.cpu_us),
                    memory_bytes: usage.memory_bytes,
                })
            })
            .collect()
    }

    /// The instances that may still write output, by deployment.
    fn in_use(&self) -> BTreeMap<String, BTreeSet<InstanceId>> {
        let mut in_use = BTreeMap::<String, BTreeSet<InstanceId>>::new();
        for entry in self.state().entries.values() {
            if let (Some(_), Some(order)) = (&entry.orders, &entry.record.order) {
                let deployment = in_use.entry(order.deployment.clone()).or_default();
                deployment.insert(order.id.clone());
            }
        }
        in_use
    }
}

/// `ENDPOINT/DEPLOYMENT`, checked because it becomes a path.
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
        let swept = shared.work(|shared| {
            let config = &shared.config;
            sweep(&config.data_dir, &shared.in_use(), config.log_limits, now())
        });
        match swept.await {
            Some(Err(error)) if lack::is_lack(&error) => {
                shared.config.means.lack("the rotation of output", &error);
            }
            Some(Err(error)) => tracing::warn!(%error, "output of instances cannot be rotated"),
            Some(Ok(_)) | None => {}
        }
    }
}

/// Only for marks in logs; nothing is decided by it.
#[expect(
    clippy::disallowed_methods,
    reason = "it marks output for people, and no result depends on it"
)]
fn now() -> Timestamp {
    let since_1970 = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    Timestamp::from_millis(since_1970.as_millis() as i64)
}

fn released() -> BackendError {
    BackendError::Unavailable("the process backend has let go of its instances".into())
}
